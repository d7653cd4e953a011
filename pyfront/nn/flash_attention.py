"""Flash attention behind transformers' attention interface, under the names `fusetune` and `fusetune_general`.

A mask function runs once per forward, and `attention` reads what it returns in each layer:

    None                 as for `sdpa`: every key is seen, or with a causal module those up to the query
    [B|1, H|1, Sq, Sk]   as for `sdpa`; [B, 1, 1, Sk] is a key padding mask, and floats are added to the logits
    [B, Sk]              causal with the last query at the last key, and only these keys
    Pattern              causal masks, windows and packed sequences as the op takes them

`fusetune` is for models whose code hands masks on as they are, which the tables vouch for. `fusetune_general`, for all
others, makes the masks that `sdpa` gets.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from fusetune import ops
from fusetune.ops.flash_attention import MAX_HEAD_DIM

# transformers gives a meaning of its own to names with "flash", "sdpa", "flex_attention" or "/"
NAME = "fusetune"
GENERAL = "fusetune_general"
NAMES = (NAME, GENERAL)


class Pattern(NamedTuple):
    """Who sees whom, with the last query at the last key: of window, key_padding_mask and cu_seqlens of the op."""

    left: int | None
    right: int | None
    keys: Tensor | None = None  # [B, Sk] bool
    starts: Tensor | None = None  # [members + 1] int32, in the rows of the batch one behind the other


def register() -> None:
    """Makes the names known to transformers. Nothing uses them before a model's config says so."""
    for name, mask_function in ((NAME, attention_mask), (GENERAL, sdpa_mask)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask_function)


def why_not(module: nn.Module) -> str | None:
    """Why an attention module of the tables cannot use the kernel, or None."""
    code = inspect.unwrap(type(module).forward).__code__
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return f"attention class {type(module).__name__} does not call transformers' attention interface"
    names = ("head_dim", "attention_head_size", "key_value_proj_dim", "qk_head_dim", "v_head_dim")
    sizes = [size for name in names if isinstance(size := getattr(module, name, None), int)]
    if sizes and max(sizes) > MAX_HEAD_DIM:
        return f"its head dimension is {max(sizes)}, over {MAX_HEAD_DIM}"
    return None


def why_not_unlisted(module: nn.Module) -> str | None:
    """The same for a class that is not in the tables: its file may not do one thing for `sdpa` and another for us."""
    if reason := why_not(module):
        return reason
    try:
        source = _source(type(module).__module__)
    except (OSError, TypeError):
        return f"attention class {type(module).__name__} is not in the tables, and its source is not at hand"
    # Apart from handing the name on, it may only ask for flash attention, which we are not.
    if re.search(r"_attn_implementation\b(?! *[,\])])", source):
        return f"the file of attention class {type(module).__name__} treats some attention implementations differently"
    return None


@functools.cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Pattern | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, with transformers' arguments.

    Args:
        module: the calling layer; `is_causal` is read from it where the argument is None.
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D], [B, Hkv, Sk, Dv].
        attention_mask: one of the forms above.
        position_bias: added to the logits: [1|B, H, Sq, Sk], or what `fusetune.nn.t5` makes of it.
        softcap, s_aux: softcap and sinks of the op.
        kwargs: cu_seq_lens_q and cu_seq_lens_k tell packed sequences apart where there is no mask.

    Returns:
        [B, Sq, H, Dv] contiguous, and None for the weights.

    Raises:
        NotImplementedError: attention weights asked for, or packed sequences beside a mask.
        TypeError, ValueError, NotImplementedError: as `fusetune.ops.flash_attention`.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attention: output_attentions must be False, got True; fusetune.unpatch the model and use eager attention"
        )
    if kwargs.get("cache") is not None:  # of continuous batching, which that function updates
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
    (B, _, Sq, _), Sk = query.shape, key.shape[2]
    options = _read_mask(attention_mask, B, Sk)
    starts = kwargs.get("cu_seq_lens_q")
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and Sq > 1:
            options = {"causal": True, "align": "bottom_right" if Sq == Sk else "top_left"}
        if starts is not None and len(starts) > B + 1:
            options = {"causal": causal, "cu_seqlens_q": starts, "cu_seqlens_k": kwargs.get("cu_seq_lens_k")}
    elif starts is not None and len(starts) > B + 1 and "cu_seqlens_q" not in options and attention_mask.dim() == 2:
        raise NotImplementedError(
            f"attention: packed sequences must be in the mask, got {len(starts) - 1} of them in cu_seq_lens_q;"
            " leave attention_mask out"
        )
    if position_bias is not None and not getattr(module, "position_bias_is_zero", False):
        options |= _read_bias(position_bias, Sk)
    # Members of a pack may lie in several rows of the batch, which the op takes one behind the other.
    rows = "cu_seqlens_q" in options and B > 1
    if rows:
        query, key, value = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
    o = ops.flash_attention(
        query, key, value, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout, **options
    ).transpose(1, 2)
    return (o.unflatten(1, (B, Sq)).squeeze(0) if rows else o).contiguous(), None


def _read_mask(mask: Tensor | Pattern | None, B: int, Sk: int) -> dict[str, Any]:
    """The arguments of the op that say the same."""
    if mask is None:
        return {}
    if isinstance(mask, Pattern):
        options: dict[str, Any] = {"window": (mask.left, mask.right), "key_padding_mask": mask.keys}
        return options if mask.starts is None else {**options, "cu_seqlens_q": mask.starts}
    if mask.dim() == 2:
        return {"causal": True, "key_padding_mask": mask}
    if mask.dtype == torch.bool and mask.shape == (B, 1, 1, Sk):
        return {"key_padding_mask": mask[:, 0, 0]}
    return {"mask": mask}


def _read_bias(bias: Tensor, Sk: int) -> dict[str, Any]:
    if bias.shape[3] == 0:
        return {}
    if bias.shape[2] == 1 and bias.shape[3] == 2 * Sk - 1 > Sk:
        return {"relative_bias": bias[0, :, 0]}
    return {"bias": bias}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | Pattern | None:
    """The mask function, with transformers' arguments.

    Args:
        q_offset, kv_offset: positions of the first query and the first key, ints or one-element tensors.
        attention_mask: [B, >= Sk], True where a key is a token.
        local_size: of a window, or of chunks.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the caller takes a causal, a bidirectional mask in
            another form than [B, 1, Sq, Sk]. They are False too where a mask function has been combined with others.

    Returns:
        One of the forms above.
    """
    # Caches of fixed size give offsets as tensors, and have room for keys behind the last query.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None and aligned:
        keys = keys[:, kv_offset : kv_offset + kv_length]
        # Reading it would break the graph under compilation and synchronise on a GPU.
        if keys.device.type == "cpu" and not torch.compiler.is_compiling() and keys.all():
            keys = None
    is_window = local_size is not None and getattr(config, "sliding_window", None) == local_size
    is_window = is_window and getattr(config, "attention_chunk_size", None) != local_size
    if aligned and allow_is_bidirectional_skip:
        if mask_function is bidirectional_mask_function or (is_window and kv_length <= local_size):
            return None if keys is None else keys[:, None, None, :]
        if is_window:
            return Pattern(local_size, local_size, keys)
    if aligned and allow_is_causal_skip:
        if mask_function is causal_mask_function or (local_size is not None and kv_length <= local_size):
            if keys is None and q_length not in (1, kv_length):
                return Pattern(None, 0)
            return keys
        if is_window:
            return Pattern(local_size - 1, 0, keys)
    packed = None if torch.compiler.is_compiling() else _packed_sequences(mask_function)
    if packed is not None and q_length == kv_length and attention_mask is None:
        return Pattern(packed[1], 0, starts=packed[0])
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


def _packed_sequences(mask_function: Any) -> tuple[Tensor, int | None] | None:
    """The starts of packed sequences and how far back a token sees, if the mask is causal within each and no more."""
    parts = dict(_parts(mask_function))
    ids, window = parts.pop("packed_sequence_mask_function", {}), parts.pop("sliding_window_overlay", None)
    if parts.keys() != {"causal_mask_function"} or not ids:
        return None
    ids = ids["packed_sequence_mask"]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = first.flatten().nonzero()[:, 0].int()
    starts = torch.cat([starts, starts.new_full([1], ids.numel())])
    return starts, None if window is None else window["sliding_window"] - 1


def _parts(mask_function: Any) -> list[tuple[str, dict[str, Any]]]:
    """The functions whose conjunction a mask function is: by whom each was made, and from what."""
    maker = mask_function.__qualname__.split(".")[0]
    values = inspect.getclosurevars(mask_function).nonlocals
    if maker == "and_masks":
        return [part for function in values["mask_functions"] for part in _parts(function)]
    if maker == "remap_positions_for_packed_sequence":
        return _parts(values["mask_function"])
    return [(maker, dict(values))]
