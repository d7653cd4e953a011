"""Vision transformers, and CLIP with its text encoder."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not", True)

TABLE = {
    "transformers.models.vit.modeling_vit.ViTAttention": _ATTENTION,
    "transformers.models.clip.modeling_clip.CLIPAttention": _ATTENTION,
}
