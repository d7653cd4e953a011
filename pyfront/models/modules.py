"""torch's own modules."""

TABLE = {
    "torch.nn.modules.activation.MultiheadAttention": (
        "attention",
        "fusetune.nn.multihead_attention.MultiheadAttention",
        "fusetune.nn.multihead_attention.why_not",
    ),
}
