"""Llama."""

TABLE = {
    "transformers.models.llama.modeling_llama.LlamaAttention": (
        "attention",
        "fusetune.ops.flash_attention",
        "fusetune.nn.flash_attention.why_not",
    ),
}
