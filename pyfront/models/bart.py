"""Encoder-decoders whose attention is BART's, and speech encoders with the same."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not", True)

TABLE = {
    "transformers.models.bart.modeling_bart.BartAttention": _ATTENTION,
    "transformers.models.mbart.modeling_mbart.MBartAttention": _ATTENTION,
    "transformers.models.whisper.modeling_whisper.WhisperAttention": _ATTENTION,
    "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2Attention": _ATTENTION,
}
