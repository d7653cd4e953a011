"""T5's attention, whose position bias depends on the distance alone: [1, H, 1, 2N - 1] in the place of [1, H, Sq, Sk].

It travels through the stack as T5's own bias does, from the first layer to all others, checkpointed or not, and
`fusetune.nn.flash_attention` tells it by its shape. Where there is none, as in cross attention, [1, H, 1, 0] travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

from fusetune.nn.flash_attention import NAMES
from fusetune.ops.flash_attention import t5_relative_bias


class _RelativeBias:
    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
    ) -> Any:
        # T5's own is as small for one query, and serves where there are keys behind the last query.
        aligned = not isinstance(past_seen_tokens, Tensor) and past_seen_tokens + query_length == key_length
        if self.config._attn_implementation not in NAMES or query_length == 1 or not aligned:
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)  # type: ignore[misc]
        # Not the weight of the embedding, which an adapter may have wrapped.
        buckets = torch.arange(self.relative_attention_num_buckets, device=device)
        relative = t5_relative_bias(
            self.relative_attention_bias(buckets),
            key_length,
            bidirectional=not self.is_decoder,
            max_distance=self.relative_attention_max_distance,
        )
        return relative[None, :, None]


class _SharedBias(_RelativeBias):
    def forward(
        self: Any, hidden_states: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if position_bias is None and not self.has_relative_attention_bias and self.config._attn_implementation in NAMES:
            position_bias = hidden_states.new_empty(1, self.n_heads, 1, 0)
        return super().forward(hidden_states, *args, position_bias=position_bias, **kwargs)  # type: ignore[misc]


class T5Attention(_SharedBias, modeling_t5.T5Attention):
    """T5Attention with such biases."""


class MT5Attention(_SharedBias, modeling_mt5.MT5Attention):
    """MT5Attention with such biases."""


class UMT5Attention(_RelativeBias, modeling_umt5.UMT5Attention):
    """UMT5Attention with such biases. Each layer has its own; those of cross attention are zeros, and not read."""

    @property
    def position_bias_is_zero(self) -> bool:
        return not self.has_relative_attention_bias
