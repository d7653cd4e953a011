"""torch's own modules."""

TABLE = {
    "torch.nn.modules.activation.MultiheadAttention": (
        "attention",
        "fusetune.nn.flash_attention_torch.MultiheadAttention",
        "fusetune.nn.flash_attention_torch.why_not",
    ),
}
