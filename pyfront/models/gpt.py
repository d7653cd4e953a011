"""GPT-2 and decoders of its time."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not", True)

TABLE = {
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": _ATTENTION,
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention": _ATTENTION,
    "transformers.models.opt.modeling_opt.OPTAttention": _ATTENTION,
}
