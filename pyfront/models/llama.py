"""Llama and the decoders whose attention is Llama's, with norms, biases or windows of their own."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not")

TABLE = {
    "transformers.models.llama.modeling_llama.LlamaAttention": _ATTENTION,
    "transformers.models.gemma.modeling_gemma.GemmaAttention": _ATTENTION,
    "transformers.models.granite.modeling_granite.GraniteAttention": _ATTENTION,
    "transformers.models.mistral.modeling_mistral.MistralAttention": _ATTENTION,
    "transformers.models.olmo2.modeling_olmo2.Olmo2Attention": _ATTENTION,
    "transformers.models.phi3.modeling_phi3.Phi3Attention": _ATTENTION,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention": _ATTENTION,
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention": _ATTENTION,
    "transformers.models.smollm3.modeling_smollm3.SmolLM3Attention": _ATTENTION,
}

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")

# Layers of a class that it calls with one and the same input, once each. Phi3's are one layer already.
SHARED_INPUT = {
    "transformers.models.llama.modeling_llama.LlamaAttention": _QKV,
    "transformers.models.gemma.modeling_gemma.GemmaAttention": _QKV,
    "transformers.models.granite.modeling_granite.GraniteAttention": _QKV,
    "transformers.models.mistral.modeling_mistral.MistralAttention": _QKV,
    "transformers.models.olmo2.modeling_olmo2.Olmo2Attention": _QKV,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention": _QKV,
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention": _QKV,
    "transformers.models.smollm3.modeling_smollm3.SmolLM3Attention": _QKV,
    "transformers.models.llama.modeling_llama.LlamaMLP": _GATE_UP,
    "transformers.models.gemma.modeling_gemma.GemmaMLP": _GATE_UP,
    "transformers.models.granite.modeling_granite.GraniteMLP": _GATE_UP,
    "transformers.models.mistral.modeling_mistral.MistralMLP": _GATE_UP,
    "transformers.models.olmo2.modeling_olmo2.Olmo2MLP": _GATE_UP,
    "transformers.models.qwen2.modeling_qwen2.Qwen2MLP": _GATE_UP,
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP": _GATE_UP,
    "transformers.models.smollm3.modeling_smollm3.SmolLM3MLP": _GATE_UP,
}
