"""Functional ops. `<op>_reference` is the same in plain torch: the oracle of the tests, and the specification."""

from fusetune.ops.adamw import adamw_grad_norm, adamw_grad_norm_reference, adamw_step, adamw_step_reference
from fusetune.ops.dora import dora_linear, dora_linear_reference
from fusetune.ops.flash_attention import (
    alibi_bias,
    flash_attention,
    flash_attention_reference,
    t5_relative_bias,
)
from fusetune.ops.lora import (
    Adapter,
    Projection,
    lora_linear,
    lora_linear_group,
    lora_linear_group_reference,
    lora_linear_reference,
)
from fusetune.ops.quantize import (
    dequantize,
    dequantize_reference,
    quantize_int8,
    quantize_nf4,
    quantize_nf4_reference,
    quantized_linear,
)

__all__ = [
    "Adapter",
    "Projection",
    "adamw_grad_norm",
    "adamw_grad_norm_reference",
    "adamw_step",
    "adamw_step_reference",
    "alibi_bias",
    "dequantize",
    "dequantize_reference",
    "dora_linear",
    "dora_linear_reference",
    "flash_attention",
    "flash_attention_reference",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_group_reference",
    "lora_linear_reference",
    "quantize_int8",
    "quantize_nf4",
    "quantize_nf4_reference",
    "quantized_linear",
    "t5_relative_bias",
]
