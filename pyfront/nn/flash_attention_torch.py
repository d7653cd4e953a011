"""torch's MultiheadAttention with flash attention, where no attention weights are asked for.

TransformerEncoderLayer and TransformerDecoderLayer ask for none. In evaluation without gradients torch computes a whole
encoder layer by one call, which does not come here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusetune import ops
from fusetune._check import FLOATS
from fusetune.ops.flash_attention import MAX_HEAD_DIM


def why_not(module: Any) -> str | None:
    """Why a module cannot use the kernel, or None."""
    if module.bias_k is not None:
        return "it has add_bias_kv"
    if module.add_zero_attn:
        return "it has add_zero_attn"
    if module.head_dim > MAX_HEAD_DIM:
        return f"its head dimension is {module.head_dim}, over {MAX_HEAD_DIM}"
    if module.out_proj.weight.dtype not in FLOATS:
        return f"its parameters are {module.out_proj.weight.dtype}"
    return None


class MultiheadAttention(nn.MultiheadAttention):
    """MultiheadAttention whose forward is flash attention with need_weights=False, and torch's own otherwise."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # torch's own also says what is wrong with a hint without its mask.
        if need_weights or query.is_nested or (is_causal and attn_mask is None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._project(query, key, value)  # [L, E], [L, B, E] or [B, L, E]
        if query.dim() == 2:
            q, k, v = (x[None] for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        options = _read_masks(key_padding_mask, None if is_causal else attn_mask, self.num_heads)
        if is_causal:
            options |= {"causal": True, "align": "top_left"}
        o = ops.flash_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, **options)
        o = o.transpose(1, 2).flatten(2)  # [B, L, E]
        if query.dim() == 2:
            o = o[0]
        elif not self.batch_first:
            o = o.transpose(0, 1)
        return F.linear(o, self.out_proj.weight, self.out_proj.bias), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key is value and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _read_masks(padding: Tensor | None, mask: Tensor | None, heads: int) -> dict[str, Any]:
    """The arguments of the op that say the same. torch's bool masks are True where a key is not seen."""
    options: dict[str, Any] = {}
    if mask is not None:
        mask = mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask  # [B H, L, S] or [L, S]
        options["mask"] = ~mask if mask.dtype == torch.bool else mask
    if padding is not None and padding.dtype == torch.bool:
        options["key_padding_mask"] = ~padding
    elif padding is not None:
        # TransformerEncoder makes floats of bools; reading them to find out would synchronise on a GPU.
        seen = options["key_padding_mask"] = padding != -torch.inf
        reading = padding.device.type == "cpu" and not torch.compiler.is_compiling() and not padding.requires_grad
        if not reading or padding[seen].any():
            options["bias"] = padding[:, None, None]
    return options
