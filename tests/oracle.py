"""What every op's tests share: the tolerance, gradients, the comparison of an op with its reference, and inputs with
awkward memory layouts.

A result is right where its error against the same computation in float64 is at most twice the error of plain torch in
the same low precision, plus a rounding floor:

    max|got - exact| <= 2 max|plain - exact| + floor

with 3 in place of 2 for attention with a softcap, and for gradients of its biases.

The floor is for results on which plain torch happens to round well, or not at all:

    bfloat16, float16   2 max|(exact + 0.3 - 0.3) - exact| computed in that dtype, as FlashAttention-3's tests have it
    float32             16 eps max|exact|

and, in every dtype, for float32 terms that cancel before the last product, which the op's tests derive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fusetune.ops.philox import draw_seed


def rounding_floor(exact: Tensor, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 16 * torch.finfo(dtype).eps * exact.abs().max().item()
    rounded = exact.to(dtype)
    return 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()


def assert_right(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, cancelled: float = 0.0, factor: float = 2.0
) -> None:
    """The rule above.

    Args:
        name: of the result, for the message.
        got: to be judged.
        plain: plain torch's result in the same precision.
        exact: plain torch's result in float64.
        cancelled: the part of the floor that the op's tests derive.
        factor: of plain torch's error.
    """
    assert got.dtype == plain.dtype, f"{name} is {got.dtype}, not {plain.dtype}"
    assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}, not {list(exact.shape)}"
    if not got.numel():
        return
    error, plain_error = ((result.double() - exact).abs().max().item() for result in (got, plain))
    floor = rounding_floor(exact, got.dtype) + cancelled
    bound = factor * plain_error + floor
    assert error <= bound, f"{name}: error {error:.3g} > {factor:g} x {plain_error:.3g} of plain torch + {floor:.3g}"


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor | None = None
) -> dict[str, Tensor]:
    """Result of `function(**inputs)` and the gradients of those inputs that require grad, by name.

    Args:
        function: differentiated at `inputs`.
        inputs: detached first; their values and strides stay.
        grad: gradient of the result, in any floating dtype; ones by default.
    """
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    out = function(**leaves)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(wanted, found, strict=True)}}


def to_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }


def compare(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad: Tensor,
    *,
    dropout_p: float = 0.0,
    plain: Callable[..., Tensor] | None = None,
    cancelled: Mapping[str, float] = MappingProxyType({}),
    factors: Mapping[str, float] = MappingProxyType({}),
    **options: object,
) -> dict[str, Tensor]:
    """Judges an op's result and gradients, whichever backend it takes; gives them.

    Args:
        op, reference: called with the inputs, dropout_p and options; the reference with the seed of the dropout too.
        inputs, grad: as `gradients` has them.
        plain: of the inputs alone, what to judge by in place of the reference in low precision.
        cancelled, factors: by the results' names, as `assert_right` has them.
    """
    torch.manual_seed(7)
    seed = int(draw_seed(grad.device)) if dropout_p else 0
    torch.manual_seed(7)
    got = gradients(lambda **t: op(**t, dropout_p=dropout_p, **options), inputs, grad)

    def judge(**tensors: Tensor) -> Tensor:
        return reference(**tensors, dropout_p=dropout_p, seed=seed, **options)

    yardstick, exact = gradients(plain or judge, inputs, grad), gradients(judge, to_double(inputs), grad)
    assert got.keys() == exact.keys()
    for name in exact:
        assert_right(name, got[name], yardstick[name], exact[name], cancelled.get(name, 0.0), factors.get(name, 2.0))
    return got


def row_strided(t: Tensor) -> Tensor:
    """t with a gap after each row."""
    return torch.nn.functional.pad(t, (0, 3), value=torch.nan)[..., : t.shape[-1]]


def transposed(t: Tensor) -> Tensor:
    """t with its last two dimensions swapped in memory."""
    return t.mT.contiguous().mT


def unaligned(t: Tensor) -> Tensor:
    """t one element past an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS = {"row_strided": row_strided, "transposed": transposed, "unaligned": unaligned}
