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
