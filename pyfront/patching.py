"""Swaps the modules of a model for kernel-backed ones, says what it did, and undoes it.

The public names are `fusetune.patch`, `unpatch`, `patched` and `PatchReport`. This file is not patch.py, because Python
puts an imported submodule `fusetune.patch` in the place of the function of that name.

There are three kinds of replacement (fusetune.models):

*   A class: the `__class__` of an instance becomes a subclass of its class. Parameters, their names and hooks stay.
*   Layers that share their input: the block around them gets two hooks, between which they are computed as one.
*   Attention of transformers: the model gets copies of its configs, which name our attention function. Other models may
    share the configs themselves, and must not change.
"""

from __future__ import annotations

import copy
import pkgutil
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fusetune.backend import choose
from fusetune.models import ROWS, SHARED_INPUT, UNLISTED, Row

OPS = {"attention": "flash_attention", "lora": "lora"}  # an op's name for patch(): its name in backend.py


@dataclass(frozen=True)
class PatchEntry:
    """Modules of one class and one fate: `replaced_by` and `backend`, or the `reason` why they were left alone."""

    module: str  # the class
    op: str
    replaced_by: str | None
    backend: str | None
    reason: str | None
    count: int


@dataclass(frozen=True)
class PatchReport:
    """What `patch` replaced and what it left alone. Printed, it is a table."""

    entries: tuple[PatchEntry, ...]

    @property
    def replaced(self) -> tuple[PatchEntry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def left_alone(self) -> tuple[PatchEntry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to replace: the model has no LoRA layers and no attention of a transformers model"
        rows = [("module", "count", "replaced by", "backend")]
        rows += [(e.module, str(e.count), str(e.replaced_by), str(e.backend)) for e in self.replaced]
        module, count, replaced_by = (max(len(row[column]) for row in rows) for column in range(3))
        module = max([module, *(len(e.module) for e in self.left_alone)])
        lines = [f"{a:<{module}}  {b:>{count}}  {c:<{replaced_by}}  {d}" for a, b, c, d in rows]
        lines += [f"{e.module:<{module}}  {e.count:>{count}}  left alone because {e.reason}" for e in self.left_alone]
        return "\n".join(lines)


def patch(
    model: nn.Module, *, ops: Iterable[str] | None = None, strict: bool = False, compute: str = "match"
) -> PatchReport:
    """Replaces what the kernels can compute in `model`, in place; `unpatch` undoes it exactly.

    Only this model changes; its parameters, their names and what it saves stay as they are. Call it again, with the
    same options, after adding adapters. A patched model holds copies of its configs: change `model.config`, not a
    config taken from it before.

    Args:
        model: a transformers model, a PEFT model, or any module that contains some.
        ops: what to replace, among "attention" and "lora"; by default all.
        strict: whether a module of these ops that must be left alone is an error.
        compute: "fast" lets LoRA round float32 adapters to the 16-bit type of its input (`fusetune.ops.lora_linear`).

    Returns:
        What is replaced now, and what is left alone and why.

    Raises:
        TypeError: `model` is not a module, or `ops` not a list of names.
        ValueError: an unknown name in `ops`, or `compute`; with `strict`, a module that must be left alone. Nothing is
            changed then.
    """
    _check_module("patch", model)
    names = _check_ops(ops)
    if compute not in ("match", "fast"):
        raise ValueError(f"patch: compute must be 'match' or 'fast', got {compute!r}")
    plan = [*_plan_attention(model, names), *_plan_classes(model, names)]
    blocks = list(_plan_blocks(model, plan))
    fates = Counter([*(step.fate() for step in plan), *(block.fate() for block in blocks)])
    report = PatchReport(tuple(PatchEntry(*fate, count) for fate, count in fates.items()))
    if strict and report.left_alone:
        first = "; ".join(f"{e.count} {e.module} because {e.reason}" for e in report.left_alone[:3])
        raise ValueError(f"patch: all modules must be replaceable with strict=True, got left alone: {first}")
    for step in plan:
        if step.row is not None and not step.row.replaced_by.startswith("fusetune.ops."):
            stock = _stock_class(step.module)
            step.module.__class__ = stock if step.reason else pkgutil.resolve_name(step.row.replaced_by)
            _set_compute(step.module, "match" if step.reason else compute)
    if "lora" in names:
        _unshare_input(model)
    for block in blocks:
        pkgutil.resolve_name("fusetune.nn.lora.share_input")(block.module, block.names)
    _switch_attention(model, plan)
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`: the same classes and the same config objects; what was set on the configs meanwhile is kept.

    Args:
        model: a patched model, or a copy of one. A model that is not patched does not change.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module("unpatch", model)
    for module in model.modules():
        if type(module) is not (stock := _stock_class(module)):
            module.__class__ = stock
            _set_compute(module, "match")
    _unshare_input(model)
    _restore_configs(list(model.modules()))


@contextmanager
def patched(
    model: nn.Module, *, ops: Iterable[str] | None = None, strict: bool = False, compute: str = "match"
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches for the length of the block; a model patched before stays patched.

    Arguments and errors are those of `patch`.
    """
    _check_module("patched", model)
    before = any(type(m) is not _stock_class(m) or _SWITCH in vars(m) for m in model.modules())
    computes = [(m, vars(m).get("_fusetune_compute", "match")) for m in model.modules()]
    try:
        yield patch(model, ops=ops, strict=strict, compute=compute)
    finally:
        if not before:
            unpatch(model)
        else:
            for module, setting in computes:
                _set_compute(module, setting)


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _check_ops(ops: Iterable[str] | None) -> Collection[str]:
    if isinstance(ops, str):
        raise TypeError(f"patch: ops must be a list of names, got {ops!r}; pass [{ops!r}]")
    names = list(OPS if ops is None else ops)
    for name in names:
        if name not in OPS:
            raise ValueError(f"patch: ops must be among {', '.join(OPS)}, got {name!r}")
    return names


class _Step(NamedTuple):
    """The fate of one module."""

    module: nn.Module
    op: str
    row: Row | None  # None for a class that is not in the tables
    backend: str | None
    reason: str | None
    root: nn.Module | None = None  # of attention: the outermost transformers model around it

    def fate(self) -> tuple[str, str, str | None, str | None, str | None]:
        name = _name(self.module)
        if self.reason or self.row is None:
            return name, self.op, None, None, self.reason
        return name, self.op, self.row.replaced_by, self.backend, None


class _Block(NamedTuple):
    """A module whose layers of these names share their input."""

    module: nn.Module
    names: tuple[str, ...]
    backend: str | None

    def fate(self) -> tuple[str, str, str | None, str | None, str | None]:
        layers = ", ".join(self.names)
        return _name(self.module), "lora", f"fusetune.ops.lora_linear_group of {layers}", self.backend, None


_REPLACEMENTS = frozenset(row.replaced_by for row in ROWS.values())


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _stock_class(module: nn.Module) -> type:
    """The class that the module has unpatched. The last base of a replacement is what it replaces."""
    cls = type(module)
    return cls.__bases__[-1] if _path(cls) in _REPLACEMENTS else cls


def _name(module: nn.Module) -> str:
    stock = _stock_class(module)
    return f"{stock.__module__.split('.')[0]}.{stock.__name__}"


def _choose(op: str, module: nn.Module) -> tuple[str | None, str | None]:
    """The backend of an op for a module, or why there is none."""
    parameter = next(module.parameters(), None)
    try:
        return choose(OPS[op], torch.device("cpu") if parameter is None else parameter.device), None
    except NotImplementedError as error:
        return None, str(error)


def _plan_classes(model: nn.Module, names: Collection[str]) -> Iterator[_Step]:
    adapters: tuple[type, ...] = ()
    if "lora" in names and "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = (BaseTunerLayer,)
    for module in model.modules():
        row = ROWS.get(_path(_stock_class(module)))
        if row is not None and row.op in names and not row.by_config:
            backend, reason = _choose(row.op, module)
            reason = pkgutil.resolve_name(row.why_not)(module) or reason
            if "forward" in vars(module):
                reason = "its forward was replaced by other code"
            yield _Step(module, row.op, row, backend, reason)
        elif row is None and isinstance(module, adapters):
            yield _Step(module, "lora", None, None, "its class is not in the tables")


def _plan_blocks(model: nn.Module, plan: list[_Step]) -> Iterator[_Block]:
    layers = {id(step.module): step for step in plan if step.op == "lora" and step.reason is None}
    for module in model.modules():
        candidates = SHARED_INPUT.get(_path(_stock_class(module)), ())
        names = tuple(name for name in candidates if id(getattr(module, name, None)) in layers)
        if len(names) > 1 and "forward" not in vars(module):
            yield _Block(module, names, layers[id(getattr(module, names[0]))].backend)


def _set_compute(module: nn.Module, compute: str) -> None:
    vars(module).pop("_fusetune_compute", None)
    if compute != "match":
        vars(module)["_fusetune_compute"] = compute


def _unshare_input(model: nn.Module) -> None:
    if lora := sys.modules.get("fusetune.nn.lora"):  # it was imported where there is something to undo
        for module in model.modules():
            lora.unshare_input(module)


def _plan_attention(model: nn.Module, names: Collection[str]) -> Iterator[_Step]:
    if "attention" not in names:
        return
    roots: dict[int, nn.Module] = {}  # by the id of a module inside
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        for module in model.modules():
            if isinstance(module, PreTrainedModel) and id(module) not in roots:
                roots.update((id(inner), module) for inner in module.modules())
    groups: dict[int, list[nn.Module]] = {}
    for module in filter(_is_attention, model.modules()):
        # A wrapper such as BertAttention has the word in its name too; the innermost one computes.
        if _attention_row(module).by_config and not any(map(_is_attention, list(module.modules())[1:])):
            groups.setdefault(id(roots.get(id(module))), []).append(module)
    for modules in groups.values():
        root = roots.get(id(modules[0]))
        rows = [_attention_row(module) for module in modules]
        backends, reasons = zip(*(_choose("attention", module) for module in modules), strict=True)
        reason = _why_not_attention(root, modules, rows) or next(filter(None, reasons), None)
        for module, row, backend in zip(modules, rows, backends, strict=True):
            yield _Step(module, "attention", row, backend, reason, root)


def _attention_row(module: nn.Module) -> Row:
    return ROWS.get(_path(_stock_class(module)), UNLISTED)


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _why_not_attention(root: Any, modules: list[nn.Module], rows: list[Row]) -> str | None:
    """Why the attention of a transformers model must be left alone: all of it is switched, or none."""
    if root is None:
        return "it is not inside of a transformers model, whose config names the attention function"
    for module, row in zip(modules, rows, strict=True):
        if reason := pkgutil.resolve_name(row.why_not)(module):
            return str(reason)
    from transformers import PreTrainedModel

    from fusetune.nn.flash_attention import NAMES, why_not_general

    if UNLISTED in rows:
        for model in root.modules():
            if isinstance(model, PreTrainedModel) and (reason := why_not_general(model)):
                return reason
    config = root.config
    name = config._attn_implementation
    if name not in (None, *NAMES) and not name.startswith(("eager", "sdpa", "flash_attention", "flex_attention")):
        return f"its model was given the attention implementation {name!r}"
    if config.output_attentions:
        return "the config of its model asks for output_attentions"
    return None


_SWITCH = "_fusetune_configs"  # attribute of each module that holds a copy of its config: the _ConfigSwitch


class _ConfigSwitch:
    """The configs of a patched model. It is copied and pickled along with the model."""

    def __init__(self, originals: list[Any]) -> None:
        self.originals = originals
        self.copies = copy.deepcopy(originals)  # in one call, so that what the configs share stays shared
        self.before = copy.deepcopy(originals)

    def __setstate__(self, state: dict[str, Any]) -> None:
        from fusetune.nn.flash_attention import register

        register()  # a model that was pickled patched names our attention function
        vars(self).update(state)

    def carry_over(self) -> None:
        """Sets on the originals what was set on the copies, other than our attention."""
        from fusetune.nn.flash_attention import NAMES

        ours = {id(config) for config in self.copies}
        for original, now, before in zip(self.originals, self.copies, self.before, strict=True):
            for key in vars(now).keys() | vars(before).keys():
                value = vars(now).get(key)
                if id(value) in ours or (key == "_attn_implementation_internal" and value in NAMES):
                    continue
                if key not in vars(now):
                    vars(original).pop(key, None)
                elif key not in vars(before) or vars(before)[key] != value:
                    vars(original)[key] = value
        self.before = copy.deepcopy(self.copies)


def _switch_attention(model: nn.Module, plan: list[_Step]) -> None:
    roots: dict[int, Any] = {id(step.root): step.root for step in plan if step.root and not step.reason}
    if not roots:
        return
    from fusetune.nn.flash_attention import GENERAL, NAME, register

    register()
    fresh = []
    for root in roots.values():
        switch = vars(root).get(_SWITCH)
        if switch is None or not any(root.config is config for config in switch.copies):
            _restore_configs(list(root.modules()))  # a model inside of it may have been patched by itself
            fresh.append(root)
    configs = {id(config): config for root in fresh for module in root.modules() for config in _configs(module)}
    switch = _ConfigSwitch(list(configs.values()))
    # Also in wrappers around the model, such as PeftModel, but not in models that are left alone.
    alone = {id(m) for step in plan if step.root and id(step.root) not in roots for m in step.root.modules()}
    _replace_configs([m for m in model.modules() if id(m) not in alone], switch.originals, switch.copies, switch)
    general = {id(step.root) for step in plan if step.row is UNLISTED}
    for root in roots.values():
        for config in vars(root)[_SWITCH].copies:
            # not by set_attn_implementation, which refuses models whose source it cannot read, as in a notebook
            config._attn_implementation = GENERAL if id(root) in general else NAME


def _restore_configs(modules: list[nn.Module]) -> None:
    switches = {id(s): s for m in modules if (s := vars(m).pop(_SWITCH, None)) is not None}
    for switch in switches.values():
        switch.carry_over()
        _replace_configs(modules, switch.copies, switch.originals)


def _replace_configs(
    modules: list[nn.Module], old: list[Any], new: list[Any], switch: _ConfigSwitch | None = None
) -> None:
    replacement = {id(a): b for a, b in zip(old, new, strict=True)}
    for module in modules:
        held = {name: value for name, value in vars(module).items() if id(value) in replacement}
        vars(module).update((name, replacement[id(value)]) for name, value in held.items())
        if held and switch is not None:
            vars(module)[_SWITCH] = switch


def _configs(holder: Any) -> Iterator[Any]:
    """The configs that a module holds, and those inside of them."""
    from transformers import PreTrainedConfig

    for value in vars(holder).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _configs(value)
