"""Linear layers with frozen weights in 4 or 8 bits: ours, with bitsandbytes' checkpoints, and a view of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusetune import ops
from fusetune.ops.quantize import NESTED_BLOCKSIZE, NF4, QuantizedWeight, check_quantized

FORMATS = ("nf4", "int8")
NESTED_PARTS = (1, 256)  # of `nested`, and the rest: csrc/quantize.h


class QuantizedLinear(nn.Linear):
    """nn.Linear with a frozen weight in NF4 or int8.

    `quantized` is the weight. Attribute `weight` reads as the weight dequantised, anew each time, in `weight_dtype`;
    what is assigned to `weight.data` is quantised. So whoever reads and merges weights in that way (PEFT's merge, DoRA,
    PiSSA) gets right values, rounded to the format. Changing such a tensor in place raises NotImplementedError;
    what its `data` reads as is a copy.

    The state dict is that of bitsandbytes' Linear4bit or Linear8bitLt; a float weight is quantised when it is loaded.
    Moving the layer to another dtype moves the bias.

    Args:
        in_features, out_features, bias: as nn.Linear has them. The weight is 0, to be loaded; see `from_linear`.
        quantize: "nf4" (with double quantisation) or "int8".
        dtype: of the bias, and `weight_dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantize: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.quantize = quantize
        zero = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self.weight_dtype = zero.dtype
        for name in ("codes", "absmax", "nested"):
            self.register_buffer(name, None, persistent=False)
        self.set_weight(zero)
        self.register_parameter("bias", nn.Parameter(zero.new_zeros(out_features)) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantize: str = "nf4", dtype: torch.dtype | None = None) -> QuantizedLinear:
        """The layer with its weight quantised, after rounding to `dtype` where given, and its bias itself.

        Raises:
            ValueError: quantize is no format.
            TypeError: the weight is not float32, bfloat16 or float16.
        """
        layer = cls(0, 0, False, quantize, dtype=linear.weight.dtype)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.set_weight(linear.weight.detach().to(dtype or linear.weight.dtype))
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def quantized(self) -> QuantizedWeight:
        codes: Any = self.codes
        absmax: Any = self.absmax
        nested: Any = self.nested
        blocksize = self.in_features if codes.dtype == torch.int8 else self.blocksize
        return QuantizedWeight(codes, absmax, nested, (self.out_features, self.in_features), blocksize)

    @quantized.setter
    def quantized(self, q: QuantizedWeight) -> None:
        check_quantized("QuantizedLinear", "weight", q)
        self.codes, self.absmax, self.nested, _, self.blocksize = q

    def set_weight(self, w: Tensor) -> None:
        """Quantises w [out_features, in_features], float32, bfloat16 or float16."""
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"QuantizedLinear: weight must have shape [{self.out_features}, {self.in_features}],"
                f" got {list(w.shape)}"
            )
        self.quantized = quantizer(self.quantize)(w)

    @property
    def weight(self) -> Tensor:
        return _Dequantized.of(self)

    @weight.setter
    def weight(self, w: Tensor) -> None:
        self.set_weight(w.detach())

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantize={self.quantize}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = self.quantized
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        codes: Any = self.codes
        if codes.is_meta or kept.codes.is_meta:
            return self
        # The device may have changed; a dtype is for the bias alone.
        self.quantized = kept._replace(
            codes=kept.codes.to(codes.device),
            absmax=kept.absmax.to(codes.device),
            nested=None if kept.nested is None else kept.nested.to(codes.device),
        )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in to_bitsandbytes(self.quantized, self.weight_dtype).items():
            destination[prefix + name] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bias = {prefix + "bias": mine.pop("bias")} if "bias" in mine else {}
        if "weight" in mine:
            try:
                self._load_weight(mine)
            except (ValueError, TypeError, NotImplementedError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
        elif strict:
            missing_keys.append(prefix + "weight")
        rest = {prefix + key: value for key, value in mine.items()}
        super()._load_from_state_dict(
            {**bias, **rest}, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(self, entries: dict[str, Tensor]) -> None:
        """Loads the weight, and takes what belongs to it out of `entries`."""
        codes: Any = self.codes
        if entries["weight"].is_floating_point() and "weight.absmax" not in entries:
            self.set_weight(entries.pop("weight").to(codes.device))
            return
        q, dtype = from_bitsandbytes(entries)
        if q.shape != (self.out_features, self.in_features):
            raise ValueError(f"must have shape {[self.out_features, self.in_features]}, got {list(q.shape)}")
        self.quantized = q._replace(
            codes=q.codes.to(codes.device),
            absmax=q.absmax.to(codes.device),
            nested=None if q.nested is None else q.nested.to(codes.device),
        )
        self.quantize = "nf4" if q.bits == 4 else "int8"
        self.weight_dtype = dtype or self.weight_dtype


class _Dequantized(Tensor):
    """The weight of a QuantizedLinear at the time of asking; assignment to `data` quantises into the layer."""

    layer: QuantizedLinear

    @classmethod
    def of(cls, layer: QuantizedLinear) -> Tensor:
        w = ops.dequantize(layer.quantized, layer.weight_dtype).as_subclass(cls)
        w.layer = layer
        return w

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor)

    @data.setter
    def data(self, w: Tensor) -> None:
        self.layer.set_weight(w)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        given = kwargs or {}
        changed = given.get("out", (*args, given.get("tensor"))[0] if in_place or name == "__setitem__" else None)
        if isinstance(changed, cls):
            raise NotImplementedError(
                f"QuantizedLinear: weight must be changed by assignment to weight.data, got {name};"
                " a change in place would be lost"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantizer(quantize: str) -> Callable[[Tensor], QuantizedWeight]:
    """The op that quantises to this format.

    Raises:
        ValueError: there is no such format.
    """
    if quantize not in FORMATS:
        raise ValueError(f"quantize: must be one of {', '.join(FORMATS)}, got {quantize}")
    return ops.quantize_nf4 if quantize == "nf4" else ops.quantize_int8


def to_bitsandbytes(q: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The entries of a state dict, without prefix, that bitsandbytes' Linear4bit or Linear8bitLt has for this weight.

    Args:
        dtype: of the weight before it was quantised.
    """
    if q.bits == 8:
        return {"weight": q.codes, "SCB": q.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    entries = {"weight": q.codes, "weight.absmax": q.absmax}
    entries["weight.quant_map"] = torch.tensor(NF4, dtype=torch.float32, device=q.device)
    if q.nested is not None:
        offset, values, absmax = q.nested.split([*NESTED_PARTS, q.nested.numel() - sum(NESTED_PARTS)])
        # Copies: safetensors takes no two tensors of one storage.
        entries |= {"weight.nested_absmax": absmax.clone(), "weight.nested_quant_map": values.clone()}
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=q.device)
    return entries | {"weight.quant_state.bitsandbytes__nf4": packed}


def from_bitsandbytes(entries: dict[str, Tensor]) -> tuple[QuantizedWeight, torch.dtype | None]:
    """The weight of a state dict's entries, which have no prefix and are taken out; and its dtype before it was
    quantised, where they say.

    Raises:
        ValueError: something is missing, or is no weight of bitsandbytes.
        NotImplementedError: another format than NF4 or int8 by rows.
    """
    if "SCB" in entries:
        if int(entries.pop("weight_format", torch.tensor(0))) != 0:
            raise NotImplementedError("the codes must be stored by rows, got another weight_format")
        codes, absmax = entries.pop("weight"), entries.pop("SCB")
        return QuantizedWeight(codes, absmax.float(), None, (codes.shape[0], codes.shape[1]), codes.shape[1]), None
    packed = [key for key in entries if key.startswith("weight.quant_state.")]
    if len(packed) != 1:
        raise ValueError(f"one weight.quant_state must come with the codes, got {len(packed)}")
    if packed[0] != "weight.quant_state.bitsandbytes__nf4":
        raise NotImplementedError(f"the format must be nf4, got {packed[0].rpartition('__')[2]}")
    missing = {"weight", "weight.absmax"} - entries.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} must come with the codes")
    state = json.loads(bytes(entries.pop(packed[0]).tolist()))
    table = entries.pop("weight.quant_map", None)
    if table is not None and not torch.allclose(table.cpu(), torch.tensor(NF4), rtol=0, atol=1e-6):
        raise NotImplementedError("weight.quant_map must be that of NF4")
    nested = None
    if "weight.nested_absmax" in entries:
        _check_nested_blocksize(state["nested_blocksize"])
        parts = [entries.pop("weight.nested_quant_map"), entries.pop("weight.nested_absmax")]
        nested = torch.cat([parts[0].new_tensor([state["nested_offset"]]), *parts]).float()
    codes = _packed_codes(entries.pop("weight"))
    absmax = entries.pop("weight.absmax")
    N, K = state["shape"]
    dtype = getattr(torch, state["dtype"])
    return QuantizedWeight(
        codes, absmax if nested is not None else absmax.float(), nested, (N, K), state["blocksize"]
    ), dtype


def _packed_codes(weight: Tensor) -> Tensor:
    """As uint8 [bytes, 1]: some are stored as another dtype, for sharding, or as one row."""
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)[:, None]


def _check_nested_blocksize(blocksize: int) -> None:
    if blocksize != NESTED_BLOCKSIZE:
        raise NotImplementedError(f"nested_blocksize must be {NESTED_BLOCKSIZE}, got {blocksize}")


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The weight of a QuantizedLinear or of a layer of bitsandbytes, whose codes are not copied; None for other layers.

    Raises:
        NotImplementedError: a layer of bitsandbytes in another format than NF4 or int8.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.quantized
    weight: Any = layer._parameters.get("weight")
    state: Any
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = weight.quant_state
        if state is None:
            raise NotImplementedError("its weight is not quantised yet")
        if getattr(state, "packing_format_for_cpu", False):
            raise NotImplementedError("bitsandbytes has packed its weight for inference")
        if state.quant_type != "nf4":
            raise NotImplementedError(f"its weight is in {state.quant_type}, not NF4")
        nested = None if state.state2 is None else _nested_of(state)
        absmax = state.absmax if nested is not None else state.absmax.float()
        return QuantizedWeight(_packed_codes(weight.data), absmax, nested, tuple(state.shape), state.blocksize)
    if kind == "Int8Params":
        state = layer.state
        scales: Any = state.SCB if weight.SCB is None else weight.SCB
        if weight.dtype != torch.int8 or scales is None:
            raise NotImplementedError("its weight is not quantised")
        return QuantizedWeight(weight.data, scales, None, tuple(weight.shape), weight.shape[1])
    return None


def _nested_of(state: Any) -> Tensor:
    """`nested` of a QuantState, kept there as long as its parts stay what they are."""
    parts = state.offset, state.state2.code, state.state2.absmax
    kept = getattr(state, "_fusetune_nested", None)
    if kept is None or any(a is not b for a, b in zip(kept[0], parts, strict=True)):
        _check_nested_blocksize(state.state2.blocksize)
        kept = state._fusetune_nested = parts, torch.cat([parts[0].reshape(1), *parts[1:]]).float()
    nested: Tensor = kept[1]
    return nested


def quantize_linears(
    model: nn.Module, quantize: str, skip: Collection[nn.Module] = (), dtype: torch.dtype | None = None
) -> None:
    """Replaces each nn.Linear in `model` by a QuantizedLinear, in place: but for those in `skip` and inside of them,
    those whose weight is another module's too, and subclasses of nn.Linear. Where `dtype` is given, weights are rounded
    to it first.

    Raises:
        ValueError: quantize is no format.
        TypeError: a weight is not float32, bfloat16 or float16.
    """
    left_alone = {inner for module in skip for inner in module.modules()}
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    _replace(
        model,
        lambda child: type(child) is nn.Linear and child not in left_alone and uses[id(child.weight)] == 1,
        lambda child: QuantizedLinear.from_linear(child, quantize, dtype),
    )


def dequantize_linears(model: nn.Module) -> None:
    """Replaces each QuantizedLinear in `model` by an nn.Linear with its weight dequantised, in place."""

    def dequantized(child: Any) -> nn.Module:
        layer = nn.Linear(child.in_features, child.out_features, False, device="meta")
        layer.bias = child.bias
        layer.weight = nn.Parameter(child.weight.data, requires_grad=False)
        return layer.train(child.training)

    _replace(model, lambda child: isinstance(child, QuantizedLinear), dequantized)


def _replace(model: nn.Module, chosen: Callable[[Any], bool], replacement: Callable[[Any], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if chosen(child):
                setattr(parent, name, replacement(child))


class QuantizedSize(NamedTuple):
    layers: int
    weights: int  # elements
    bytes_before: int  # in the dtype that the weights had
    bytes_now: int


def quantized_size(model: nn.Module) -> QuantizedSize:
    """Of all QuantizedLinear in `model`."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    return QuantizedSize(
        len(layers),
        sum(weights),
        sum(count * layer.weight_dtype.itemsize for count, layer in zip(weights, layers, strict=True)),
        sum(layer.quantized.nbytes for layer in layers),
    )
