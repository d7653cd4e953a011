"""Registration of an op with torch.library: a schema, one implementation for all devices, and a fake for tracing.

`torch.library.Library` costs less per call than `custom_op`, and a call on ordinary tensors goes past it; autograd is a
torch.autograd.Function outside of the op, so that torch.compile sees the op as one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fusetune", "DEF")
_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `fusetune::<schema>` and returns its callable, which takes positional arguments, a tensor first.

    Args:
        schema: in torch's schema language, e.g. `"double(Tensor x) -> Tensor"`.
        implementation: runs the op on real tensors of any device.
        fake: allocates outputs of the right shape, strides and dtype, without data.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusetune::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.fusetune, name).default

    def call(*args: Any) -> Any:
        # The dispatcher costs 30 us a call for lists of tensors, and has nothing to do for ordinary ones.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(args[0]) not in _ORDINARY:
            return op(*args)
        return implementation(*args)

    return call
