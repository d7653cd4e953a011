"""PEFT's LoRA layers with their forward in one op, or in one op for several layers that share their input."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusetune import ops
from fusetune._check import FLOATS
from fusetune.backend import choose
from fusetune.nn.quantize import quantized_weight


class LoraLinear(Linear):
    """PEFT's LoRA layer around nn.Linear or Conv1D, computed by `fusetune.ops.lora_linear_group` or, with DoRA, by
    `fusetune.ops.dora_linear`.

    An instance becomes one by assignment to its `__class__`: it keeps its parameters, their names and its hooks, and
    PEFT merges, saves and switches it as before. A call that the ops cannot take is PEFT's own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else fused(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


def fused(layer: Any, x: Tensor) -> Tensor | None:
    """The result of a layer for x by the ops, or None where PEFT must compute it."""
    if why_not(layer, x) is not None:
        return None
    for name in _dora(layer):
        projection = _projection(layer)
        ((a, b, scale, _),) = projection.adapters
        # PEFT drops by the mode of the layer, where LoRA without DoRA goes by the mode of its dropout.
        p = _dropout_p(layer, name) if layer.training else 0.0
        w: Any = projection.w
        return ops.dora_linear(x, w, a, b, layer.lora_magnitude_vector[name].weight, scale, projection.bias, p)
    shared = None if torch.compiler.is_compiling() else getattr(_running, "shared", None)
    y = shared.take(layer, x) if shared else None
    return ops.lora_linear_group(x, [_projection(layer)], compute=_compute(layer))[0] if y is None else y


def why_not(layer: Any, x: Tensor | None = None) -> str | None:
    """Why `layer` must be computed by PEFT now, or None.

    Args:
        layer: a PEFT LoRA layer around a linear one.
        x: its input; without it, what depends on the input is not asked.
    """
    active = _active(layer)
    if reason := _why_not_now(layer, active):
        return reason
    variants = [layer.lora_variant[name] for name in active if name in layer.lora_variant]
    for variant in variants:
        if type(variant) is not DoraLinearVariant:
            return f"its adapter is of the kind {type(variant).__name__}"
    if variants and len(active) > 1:
        return f"{len(active)} of its adapters are active, and not all without DoRA"
    base: Any = layer.base_layer
    quantized = _is_quantized(base)
    if quantized and variants:
        return "its base layer is quantised, beside DoRA"
    if quantized and (reason := _why_not_quantized(base, x)):
        return reason
    if not quantized and type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is {type(base).__name__}, not Linear or Conv1D"
    parts = [base]
    for name in active:
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return f"its adapter is made of {type(down).__name__} and {type(up).__name__}, not of Linear"
        if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
            return f"its dropout is {type(dropout).__name__}, not Dropout"
        if down.bias is not None or (up.bias is not None and variants):
            return "its adapter has a bias" + " beside DoRA" * bool(variants)
        parts += [down, up, dropout, *([layer.lora_magnitude_vector[name]] if variants else [])]
    # The ops read the weights of these modules without calling them.
    if any(map(_hooked, parts)):
        return "a module inside of it has hooks or a replaced forward"
    if not quantized and base.weight.requires_grad:
        return "its base weight is trained"
    weights = [weight for part in parts for weight in _own(part)]
    for weight in weights:
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"it has a weight of type {type(weight).__name__}"
    device = weights[-1].device if x is None else x.device
    try:
        for op in ("lora", "dora") if variants else ("lora",):
            choose(op, device)
    except NotImplementedError as error:
        return str(error)
    return _why_not_dtypes(layer, active, x)


def why_not_embedding(layer: Embedding) -> str | None:
    """Why an embedding must be computed by PEFT now, or None."""
    active = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    if reason := _why_not_now(layer, active):
        return reason
    for name in active:
        if name in layer.lora_variant:
            return f"its adapter is of the kind {type(layer.lora_variant[name]).__name__}"
        if getattr(layer, "input_fns", {}).get(name):
            return "its adapter is split over devices"
    return None


def _why_not_now(layer: Linear | Embedding, active: Sequence[str]) -> str | None:
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    return None if active else "none of its adapters is active"


def _why_not_dtypes(layer: Linear, active: Sequence[str], x: Tensor | None) -> str | None:
    base: Any = layer.base_layer
    quantized = _is_quantized(base)
    adapters = [p for name in active for part in (layer.lora_A[name], layer.lora_B[name]) for p in _own(part)]
    dtype, cast = adapters[0].dtype if quantized else base.weight.dtype, False
    if x is not None:
        if x.dtype not in FLOATS:
            return f"its input is {_short(x.dtype)}"
        cast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        if not layer.cast_input_dtype_enabled and x.dtype != adapters[0].dtype:
            return "the cast of its input is disabled"
    if (
        dtype not in FLOATS
        or (not quantized and base.weight.dtype not in (FLOATS if cast else (dtype,)))
        or (not quantized and base.bias is not None and base.bias.dtype != base.weight.dtype)
        or adapters[0].dtype not in (dtype, torch.float32)
        or any(p.dtype != adapters[0].dtype for p in adapters)
        or any(layer.lora_magnitude_vector[name].weight.dtype not in (dtype, torch.float32) for name in _dora(layer))
    ):
        dtypes = ", ".join(_short(p.dtype) for p in (*([] if quantized else [base.weight]), *adapters))
        return f"its weights are {dtypes}" + ("" if x is None else f" and it computes in {_short(dtype)}")
    return None


def _active(layer: Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dora(layer: Linear) -> list[str]:
    return [name for name in _active(layer) if name in layer.lora_variant]


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as accelerate and other patches do it
    )


def _own(module: nn.Module) -> list[Tensor]:
    """The weight and bias of a module, which in replicas of nn.DataParallel are no parameters. The weight of a
    quantised layer is left out: it is made when it is asked for, or of a type of its own."""
    names = ("bias",) if _is_quantized(module) else ("weight", "bias")
    return [t for name in names if isinstance(t := getattr(module, name, None), Tensor)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dropout_p(layer: Linear, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _is_quantized(base: nn.Module) -> bool:
    # by name: bitsandbytes takes seconds to import
    return f"{type(base).__module__}.{type(base).__qualname__}" in (
        "fusetune.nn.quantize.QuantizedLinear",
        "bitsandbytes.nn.modules.Linear4bit",
    )


def _why_not_quantized(base: Any, x: Tensor | None) -> str | None:
    try:
        quantized_weight(base)
    except NotImplementedError as error:
        return str(error)
    # bitsandbytes' layer has a dtype to compute in, and gives x's also under autocast.
    computes_in = getattr(base, "compute_dtype", None)
    if x is not None and computes_in not in (None, x.dtype):
        return f"its base layer computes in {_short(computes_in)}"
    if x is not None and hasattr(base, "compute_dtype") and torch.is_autocast_enabled(x.device.type):
        return "its base layer, of bitsandbytes, is called under autocast"
    return None


def _compute(layer: nn.Module) -> str:
    """What patch() was told; see fusetune.ops.lora_linear."""
    return str(vars(layer).get("_fusetune_compute", "match"))


def _projection(layer: Any) -> ops.Projection:
    base = layer.base_layer
    w: Any = quantized_weight(base) if _is_quantized(base) else base.weight.t() if type(base) is Conv1D else base.weight
    bias, adapters = base.bias, []
    if bias is not None and _is_quantized(base):
        bias = bias.float()  # which the layers cast to x's dtype
    for name in _active(layer):
        down: Any = layer.lora_A[name]
        up: Any = layer.lora_B[name]
        scale = layer.scaling[name]
        if up.bias is not None:  # float32, in which the sum is as exact as PEFT's
            bias = scale * up.bias.float() + (0 if bias is None else bias.float())
        adapters.append(ops.Adapter(down.weight, up.weight, scale, _dropout_p(layer, name)))
    return ops.Projection(w, bias, adapters)


class LoraEmbedding(Embedding):
    """PEFT's LoRA layer around an embedding: the rank-wide product is added to the frozen rows in one pass.

    The frozen layer is called as it is, of whatever class, and the rows of A are PEFT's own lookup: options of
    nn.Embedding, such as padding_idx, hold for both as in PEFT. Instances and calls are as `LoraLinear` has them.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or why_not_embedding(self) is not None:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        embed_scale: Tensor | None = self._get_embed_scale()  # type: ignore[no-untyped-call]  # Gemma has one
        result = y
        for name in self.active_adapters:
            if name not in self.lora_embedding_A:
                continue
            s = self._embed(x, self.lora_embedding_A[name].t())
            wide = torch.promote_types(result.dtype, s.dtype)
            s = s if embed_scale is None else s * embed_scale.to(s.dtype)
            with torch.autocast(x.device.type, enabled=False):
                rows = torch.addmm(
                    *(result.reshape(-1, result.shape[-1]).to(wide), s.reshape(-1, s.shape[-1]).to(wide)),
                    self.lora_embedding_B[name].t().to(wide),
                    alpha=self.scaling[name],
                )
            result = rows.view(y.shape)
        rounded: Tensor = result.to(y.dtype)
        return rounded


# Layers that share their input. While a block such as an attention runs, the first of its layers to be called computes
# all of them, which reads x once; each other takes its result when it is called with the same x. What is kept for them
# is kept by the thread, and until the block has returned or raised. Blocks hold nothing but two hooks.

_running = threading.local()  # .shared: of the block that this thread runs
_wasteful: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # blocks that did not call a layer that had been computed


def share_input(block: nn.Module, names: tuple[str, ...]) -> None:
    """Has the layers `block.<name>`, LoraLinear and its like, computed together where they are."""
    unshare_input(block)
    _wasteful.discard(block)
    block.register_forward_pre_hook(functools.partial(_enter, names))
    block.register_forward_hook(_leave, always_call=True)


def unshare_input(block: nn.Module) -> None:
    """Undoes `share_input`; leaves other blocks as they are."""
    for hooks in (block._forward_pre_hooks, block._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook is _leave or getattr(hook, "func", None) is _enter:
                del hooks[key]
                block._forward_hooks_always_called.pop(key, None)


def _enter(names: tuple[str, ...], block: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    layers = [getattr(block, name, None) for name in names]
    shares = block not in _wasteful
    _running.shared = _Shared([layer for layer in layers if layer is not None]) if shares else None


def _leave(block: nn.Module, args: Any, result: Any) -> None:
    if torch.compiler.is_compiling():
        return
    shared = getattr(_running, "shared", None)
    _running.shared = None
    # Not where the block raised, nor under a checkpoint, which must compute it the same way again.
    if shared and shared.results and result is not None and shared.mode[1] is None:
        _wasteful.add(block)


class _Shared:
    """The layers of a block, and the results that they have not yet taken."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        self.mode = self.modes()
        self.x: Tensor | None = None
        self.results: dict[LoraLinear, tuple[Tensor, list[Any]]] = {}

    def take(self, layer: LoraLinear, x: Tensor) -> Tensor | None:
        """The result of `layer` for x, or None where it has to be computed by itself."""
        if self.mode != self.modes():
            return None
        if self.layers:
            layers, self.layers = [member for member in self.layers if self.joins(member, x, layer)], []
            if layer in layers and len(layers) > 1:
                ys = ops.lora_linear_group(x, [_projection(member) for member in layers], compute=_compute(layer))
                self.x = x
                self.results = {m: (y, self.state(m, x)) for m, y in zip(layers, ys, strict=True)}
        if x is not self.x or layer not in self.results:
            return None
        y, state = self.results.pop(layer)
        if not self.results:
            self.x = None
        return y if state == self.state(layer, x) else None

    @staticmethod
    def modes() -> Any:
        """Of the part of the block that runs: checkpointing a part of it computes this part again, and only this."""
        return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)

    @staticmethod
    def joins(layer: LoraLinear, x: Tensor, first: LoraLinear) -> bool:
        if type(layer) is not type(first) or _compute(layer) != _compute(first):
            return False
        # An inference tensor does not count its changes.
        if x.is_inference() or _hooked(layer) or why_not(layer, x) or why_not(first, x) or _dora(layer):
            return False
        one, other = (member.lora_A[_active(member)[0]].weight for member in (layer, first))
        return one.dtype == other.dtype and one.device == other.device

    @staticmethod
    def state(layer: LoraLinear, x: Tensor) -> list[Any]:
        """All that the result depends on."""
        base: Any = layer.base_layer
        device = x.device.type
        found: list[Any] = [x._version, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
        tensors = [*_own(base), *(quantized_weight(base) or ())[:1]]  # the codes of a quantised weight
        for name in _active(layer):
            found += [name, layer.scaling[name], _dropout_p(layer, name)]
            tensors += [*_own(layer.lora_A[name]), *_own(layer.lora_B[name])]
        return found + [(id(t), t.requires_grad, 0 if t.is_inference() else t._version) for t in tensors]
