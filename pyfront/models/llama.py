"""Llama and the decoders whose attention is Llama's, with norms, biases, windows, caps or sinks of their own."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not", True)

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
    "transformers.models.cohere.modeling_cohere.CohereAttention": _ATTENTION,
    "transformers.models.cohere2.modeling_cohere2.Cohere2Attention": _ATTENTION,
    "transformers.models.gemma2.modeling_gemma2.Gemma2Attention": _ATTENTION,
    "transformers.models.gemma3.modeling_gemma3.Gemma3Attention": _ATTENTION,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssAttention": _ATTENTION,
    "transformers.models.mixtral.modeling_mixtral.MixtralAttention": _ATTENTION,
    "transformers.models.phi.modeling_phi.PhiAttention": _ATTENTION,
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeAttention": _ATTENTION,
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": _ATTENTION,
    "transformers.models.stablelm.modeling_stablelm.StableLmAttention": _ATTENTION,
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
