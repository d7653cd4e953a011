"""Llama."""

TABLE = {
    "transformers.models.llama.modeling_llama.LlamaAttention": (
        "attention",
        "fusetune.ops.flash_attention",
        "fusetune.nn.attention.why_not",
    ),
}
