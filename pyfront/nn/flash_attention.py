"""Flash attention behind transformers' attention interface, under the names `fusetune` and `fusetune_general`.

A mask function runs once per forward, and the attention function reads what it returns in each layer:

    None                 as for `sdpa`: every key is seen, or with a causal module those up to the query
    [B|1, H|1, Sq, Sk]   as for `sdpa`; [B, 1, 1, Sk] is a key padding mask, and floats are added to the logits
    [B, Sk]              causal with the last query at the last key, and only these keys
    Pattern              windows and packed sequences, with the last query at the last key

`fusetune` is for models whose code hands masks on as they are, which the tables vouch for. `fusetune_general`, for all
others, makes the masks that `sdpa` gets. As there, a query that sees no key gives zeros; eager attention, which some
models use unpatched, averages all values then.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from fusetune import ops
from fusetune._check import FLOATS
from fusetune.backend import choose
from fusetune.ops.flash_attention import MAX_HEAD_DIM

# transformers gives a meaning of its own to names with "flash", "sdpa", "flex_attention" or "/"
NAME = "fusetune"
GENERAL = "fusetune_general"
NAMES = (NAME, GENERAL)


class Pattern(NamedTuple):
    """Who sees whom: window, key_padding_mask and cu_seqlens of the op."""

    left: int | None
    right: int | None
    keys: Tensor | None = None  # [B, Sk] bool
    starts: Tensor | None = None  # [members + 1] int32, in the rows of the batch one behind the other

    # `generate` makes masks for caches of fixed size beforehand, and asks this of them.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> Pattern:
        return self


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
    """The same for a class that is in no table: its files may not do one thing for `sdpa` and another for us."""
    if reason := why_not(module):
        return reason
    return _why_not_files(type(module), nn.Module)


def why_not_general(model: PreTrainedModel) -> str | None:
    """Why a model with attention classes that are in no table must be left alone, or None."""
    name = type(model).__name__
    if not (model._supports_sdpa and model._supports_attention_backend):
        return f"{name} is not in the tables, and does not say that it supports other attention functions"
    return _why_not_files(type(model), PreTrainedModel)


def _why_not_files(cls: type, end: type) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(end)]:
        try:
            source = _source(base.__module__)
        except (KeyError, OSError, TypeError):
            return f"{cls.__name__} is not in the tables, and its source is not at hand"
        # It may hand the name on, and ask for flash attention, which we are not.
        if "generation" not in base.__module__ and re.search(r"_attn_implementation\b *(?![ ,)\]])", source):
            return f"{cls.__name__} is not in the tables, and its file does more with the implementation's name"
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
        position_bias: added to the logits: [1|B, H, Sq, Sk], or what `fusetune.nn.flash_attention_t5` makes of it.
        softcap, s_aux: softcap and sinks of the op.
        kwargs: cu_seq_lens_q and cu_seq_lens_k tell packed sequences apart where there is no mask.

    Returns:
        [B, Sq, H, Dv] contiguous, and None for the weights.

    Raises:
        NotImplementedError: attention weights asked for, packed sequences beside a mask, or sinks without a kernel.
        ValueError: as `fusetune.ops.flash_attention`.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attention: output_attentions must be False, got True; fusetune.unpatch the model and use eager attention"
        )
    (B, _, Sq, _), Sk = query.shape, key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = _read_mask(attention_mask, bool(is_causal), query, key)
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None and len(starts) > B + 1 and not isinstance(attention_mask, Pattern):
        if attention_mask is not None:
            raise NotImplementedError(
                f"attention: packed sequences must come without attention_mask, got {len(starts) - 1} in cu_seq_lens_q"
            )
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k": kwargs.get("cu_seq_lens_k")}
    if position_bias is not None and not getattr(module, "position_bias_is_zero", False):
        options |= _read_bias(position_bias, Sk)
    if kwargs.get("cache") is not None or not _takes(query, key, value):
        if s_aux is not None:
            raise NotImplementedError(f"attention: s_aux must be None for {query.dtype} on {query.device.type}")
        mask, bias = _to_sdpa(options, attention_mask, Sq, Sk)
        o, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, bias, softcap=softcap, **kwargs
        )
        return o, None
    # Members of a pack may lie in several rows of the batch, which the op takes one behind the other.
    rows = "cu_seqlens_q" in options and B > 1
    if rows:
        query, key, value = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
    o = ops.flash_attention(
        query, key, value, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout, **options
    ).transpose(1, 2)
    return (o.unflatten(1, (B, Sq)).squeeze(0) if rows else o).contiguous(), None


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the op has a kernel for them; `patch` looks, but a model may be moved or cast later."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not dtypes.issubset(FLOATS) or (len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type)):
        return False
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM or query.shape[0] != key.shape[0]:
        return False
    try:
        choose("flash_attention", query.device)
    except NotImplementedError:
        return False
    return True


def _to_sdpa(
    options: dict[str, Any], mask: Tensor | Pattern | None, Sq: int, Sk: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the position bias of our forms in those of `sdpa`."""
    bias, relative = options.get("bias"), options.get("relative_bias")
    device = next((t.device for t in (*options.values(), mask) if isinstance(t, Tensor)), None)
    distance = torch.arange(Sk, device=device) - torch.arange(Sk - Sq, Sk, device=device)[:, None]
    if relative is not None:
        bias = relative[None, :, distance + Sk - 1]
    if "cu_seqlens_q" not in options and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
        return mask, bias
    left, right = options.get("window", (None, 0 if options.get("causal") else None))
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    keys, starts = options.get("key_padding_mask"), options.get("cu_seqlens_q")
    seen = seen[None, None] if keys is None else seen & keys[:, None, None, :]
    if starts is not None:
        member = torch.bucketize(torch.arange(int(starts[-1]), device=device), starts, right=True).view(-1, 1, Sk)
        seen = seen & (member[..., None] == member[..., None, :])
    return seen, bias


def _read_mask(mask: Tensor | Pattern | None, is_causal: bool, query: Tensor, key: Tensor) -> dict[str, Any]:
    """The arguments of the op that say the same."""
    (B, _, Sq, _), Sk = query.shape, key.shape[2]
    if mask is None:
        if is_causal and Sq > 1:
            return {"causal": True, "align": "bottom_right" if Sq == Sk else "top_left"}
        return {}
    if isinstance(mask, Pattern):
        options: dict[str, Any] = {"window": (mask.left, mask.right), "key_padding_mask": mask.keys}
        return options if mask.starts is None else {**options, "cu_seqlens_q": mask.starts}
    if mask.dtype == torch.bool and mask.shape == (B, 1, 1, Sk):
        return {"key_padding_mask": mask[:, 0, 0]}
    return {"causal": True, "key_padding_mask": mask} if mask.dim() == 2 else {"mask": mask}


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
    attention_mask: Tensor | Pattern | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | Pattern | None:
    """The mask function, with transformers' arguments.

    Args:
        q_offset, kv_offset: positions of the first query and the first key, ints or one-element tensors.
        attention_mask: [B, >= Sk], True where a key is a token; or a Pattern that was made beforehand.
        local_size: of a window, or of chunks.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the caller takes a causal, a bidirectional mask in
            another form than [B, 1, Sq, Sk]. They are False too where a mask function has been combined with others.

    Returns:
        One of the forms above.
    """
    if isinstance(attention_mask, Pattern):
        return attention_mask
    # Caches of fixed size give offsets as tensors, and have room for keys behind the last query.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length]
        # Reading it would break the graph under compilation and synchronise on a GPU.
        if keys.device.type == "cpu" and not torch.compiler.is_compiling() and keys.all():
            keys = None
    sliding = getattr(config, "sliding_window", None)
    chunked = getattr(config, "attention_chunk_size", None)
    window = local_size if sliding == local_size != chunked else None
    reaches_all = local_size is not None and kv_offset + kv_length <= local_size
    if allow_is_bidirectional_skip:
        if mask_function is bidirectional_mask_function or reaches_all:
            return None if keys is None else keys[:, None, None, :]
        if window is not None and aligned:
            return Pattern(window, window, keys)
    if allow_is_causal_skip and aligned:
        if mask_function is causal_mask_function or reaches_all:
            square = keys is None and q_length in (1, kv_length)
            return keys if square or (keys is not None and kv_offset == 0) else Pattern(None, 0, keys)
        if window is not None:
            return Pattern(window - 1, 0, keys)
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
