"""T5 and its multilingual versions, whose position bias is made by a replacement of the class."""

_WHY_NOT = "fusetune.nn.flash_attention.why_not"

TABLE = {
    "transformers.models.t5.modeling_t5.T5Attention": (
        "attention",
        "fusetune.nn.flash_attention_t5.T5Attention",
        _WHY_NOT,
        True,
    ),
    "transformers.models.mt5.modeling_mt5.MT5Attention": (
        "attention",
        "fusetune.nn.flash_attention_t5.MT5Attention",
        _WHY_NOT,
        True,
    ),
    "transformers.models.umt5.modeling_umt5.UMT5Attention": (
        "attention",
        "fusetune.nn.flash_attention_t5.UMT5Attention",
        _WHY_NOT,
        True,
    ),
}
