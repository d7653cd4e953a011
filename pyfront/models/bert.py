"""BERT and encoders like it."""

_ATTENTION = ("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not", True)

TABLE = {
    "transformers.models.bert.modeling_bert.BertSelfAttention": _ATTENTION,
    "transformers.models.bert.modeling_bert.BertCrossAttention": _ATTENTION,
    "transformers.models.roberta.modeling_roberta.RobertaSelfAttention": _ATTENTION,
    "transformers.models.roberta.modeling_roberta.RobertaCrossAttention": _ATTENTION,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": _ATTENTION,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaCrossAttention": _ATTENTION,
    "transformers.models.electra.modeling_electra.ElectraSelfAttention": _ATTENTION,
    "transformers.models.electra.modeling_electra.ElectraCrossAttention": _ATTENTION,
    "transformers.models.albert.modeling_albert.AlbertAttention": _ATTENTION,
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention": _ATTENTION,
}

_QKV = ("query", "key", "value")

# Layers of a class that it calls with one and the same input, once each; cross attention has two inputs.
SHARED_INPUT = {
    "transformers.models.bert.modeling_bert.BertSelfAttention": _QKV,
    "transformers.models.roberta.modeling_roberta.RobertaSelfAttention": _QKV,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": _QKV,
    "transformers.models.electra.modeling_electra.ElectraSelfAttention": _QKV,
}
