"""Flash attention behind transformers' attention interface, under the name `fusetune`.

The mask that `attention_mask` makes once per forward, and `attention` reads in each layer, has one of three forms:

    None           as for `sdpa`: every key is seen, or with a causal module those up to the query
    [B, Sk]        causal with the last query at the last key, and only these keys
    [B|1, H|1, Sq, Sk]   as for `sdpa`; [B, 1, 1, Sk] is a key padding mask

The first two and the key padding mask go to the kernel. Other masks (windows, packed sequences, chunks, a user's own)
and position biases go to transformers' own `sdpa` function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fusetune import ops
from fusetune._check import FLOATS
from fusetune.backend import choose
from fusetune.ops.flash_attention import MAX_HEAD_DIM

NAME = "fusetune"  # transformers gives a meaning of its own to names with "flash", "sdpa", "flex_attention" or "/"


def register() -> None:
    """Makes the name known to transformers. Nothing uses it before a model's config says so."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def why_not(module: nn.Module) -> str | None:
    """Why an attention module of the tables cannot use the kernel, or None."""
    head_dim: Any = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", 0)
    return f"its head dimension is {head_dim}, over {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, with transformers' arguments.

    Args:
        module: the calling layer; `is_causal` is read from it where the argument is None.
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D].
        attention_mask: one of the forms above.

    Returns:
        [B, Sq, H, D] contiguous, and None for the weights.

    Raises:
        NotImplementedError: capped logits, sinks, a window or packed sequences that the mask does not contain, or
            attention weights asked for.
    """
    _check_kwargs(key, attention_mask, kwargs)
    Sq, Sk = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    keys = attention_mask
    if attention_mask is None:
        causal = is_causal and Sq > 1
        plain = not causal or Sq == Sk
    elif attention_mask.dim() == 2:
        causal = plain = True
    else:
        causal = False
        plain = attention_mask.dtype == torch.bool and attention_mask.shape == (key.shape[0], 1, 1, Sk)
        keys = attention_mask[:, 0, 0] if plain else None
    general = kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    if plain and not general and _takes(query, key, value):
        o = ops.flash_attention(
            query, key, value, causal=causal, scale=scaling, key_padding_mask=keys, dropout_p=dropout
        )
        return o.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.dim() == 2:
        seen = torch.ones(Sq, Sk, dtype=torch.bool, device=key.device).tril(Sk - Sq)
        attention_mask = attention_mask[:, None, None, :] & seen
    o, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return o, None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function, with transformers' arguments.

    Args:
        q_offset, kv_offset: positions of the first query and the first key, ints or one-element tensors.
        attention_mask: [B, Sk], True where a key is a token.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the caller takes a causal, a bidirectional mask in
            another form than [B, 1, Sq, Sk].

    Returns:
        One of the forms above.
    """
    keys = attention_mask
    # Caches of fixed size give offsets as tensors, and have room for keys behind the last query.
    simple = not isinstance(q_offset, Tensor) and not isinstance(kv_offset, Tensor) and kv_offset == 0
    if keys is not None and simple:
        simple = keys.dtype == torch.bool and keys.shape == (batch_size, kv_length)
        # Reading it would break the graph under compilation and synchronise on a GPU.
        if simple and keys.device.type == "cpu" and not torch.compiler.is_compiling() and keys.all():
            keys = None
    if simple and mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return None if keys is None else keys[:, None, None, :]
    if simple and mask_function is causal_mask_function and allow_is_causal_skip and q_offset + q_length == kv_length:
        if keys is None and q_length not in (1, kv_length):
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        return keys
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    (B, H, _, D), (Bk, Hkv, _, Dk) = query.shape, key.shape
    if not (Bk == B and Dk == D <= MAX_HEAD_DIM and value.shape == key.shape and Hkv and H % Hkv == 0):
        return False
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not dtypes.issubset(FLOATS) or (len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type)):
        return False
    try:
        choose("flash_attention", query.device)
    except NotImplementedError:
        return False
    return True


def _check_kwargs(key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    general = attention_mask is not None and attention_mask.dim() == 4
    window, starts = kwargs.get("sliding_window"), kwargs.get("cu_seq_lens_q")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention: {name} must be None, got {kwargs[name]!r}; eager attention has it")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attention: output_attentions must be False, got True; fusetune.unpatch the model and use eager attention"
        )
    if window is not None and window < key.shape[2] and not general:
        raise NotImplementedError(
            f"attention: sliding_window must be in the mask or at least the number of keys, got {window}"
        )
    if starts is not None and starts.numel() > key.shape[0] + 1 and not general:
        raise NotImplementedError(
            f"attention: packed sequences must be in the mask, got {starts.numel() - 1} of them in cu_seq_lens_q;"
            " pass position_ids and use_cache=False"
        )
