"""LoRA layers, forward and backward, against the frozen layer alone, PEFT's layer, and PEFT's layer compiled.

lora_tax = t(LoRA) / t(frozen layer: y and dx) - 1. Its floor is the adapter's share of the flops, 1.5 R (1/K + 1/N).
Saved bytes are what forward keeps for backward beyond x and the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timer
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusetune import _native, patch
from fusetune.backend import BACKENDS, gemm_dtype
from fusetune.nn.lora import share_input

SHAPES = [  # M, K, N
    (4096, 384, 384),
    (4096, 384, 1536),
    (1024, 768, 768),
    (2048, 2048, 2048),
    (2048, 2048, 5632),
    (1024, 4096, 4096),
]
RANK = 16


def backends() -> list[str]:
    """What users get, and by name the other GPU back ends or instruction sets of this machine."""
    if torch.cuda.is_available():
        return list(BACKENDS["lora"]["cuda"])
    extension = _native.extension()
    return [level for level in extension.isa_available() if level != "emulated"]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    before = _native.extension().isa()
    if torch.cuda.is_available():
        monkeypatch.setenv("FUSETUNE_BACKEND", request.param)
    else:
        _native.extension().set_isa(request.param)
    yield request.param
    _native.extension().set_isa(before)


def layers(
    device: torch.device, sizes: list[tuple[int, int]], dtype: torch.dtype, **config: Any
) -> tuple[Block, Block]:
    """Frozen layers [K, N] and the same in PEFT, with float32 adapters as PEFT makes them."""
    torch.manual_seed(0)
    frozen = Block(nn.Linear(K, N, bias=False) for K, N in sizes).to(device, dtype).requires_grad_(False)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "init_lora_weights": False, **config}
    targets = [str(i) for i in range(len(sizes))]
    model = get_peft_model(copy.deepcopy(frozen), LoraConfig(target_modules=targets, **config))
    return frozen, model.base_model.model


class Block(nn.ModuleList):
    """Layers that share their input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def step(modules: nn.Module, x: Tensor, dys: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of x and of what is trained."""
    ys = modules(x)
    trained = [p for p in modules.parameters() if p.requires_grad]
    return torch.autograd.grad(ys, [x, *trained], dys)


def saved_bytes(modules: nn.Module, x: Tensor) -> int:
    own = {x.data_ptr(), *(p.data_ptr() for p in modules.parameters())}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        ys = modules(x)
    own |= {y.data_ptr() for y in ys}
    return sum(size for pointer, size in saved.items() if pointer not in own)


def agree(ours: Any, stock: Any, x: Tensor, dys: list[Tensor]) -> None:
    """Without dropout, whose masks differ."""
    for modules in (ours, stock):
        modules.eval()
    for got, expected in zip(step(ours, x, dys), step(stock, x, dys), strict=True):
        assert (got - expected).norm() <= (1e-4 if x.dtype == torch.float32 else 3e-2) * expected.norm()
    for modules in (ours, stock):
        modules.train()


def compare(
    benchmark: Any,
    device: torch.device,
    M: int,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    dropout_p: float,
    compiled: bool,
    backend: str | None = None,
    **config: Any,
) -> None:
    """Times patched layers of these sizes [K, N], which share x [M, K]."""
    if gemm_dtype(device.type, dtype) != dtype and M * sum(K * N for K, N in sizes) > 4e9:
        pytest.skip(f"torch emulates {dtype} products here: its step takes minutes")
    frozen, stock = layers(device, sizes, dtype, lora_dropout=dropout_p, **config)
    ours = copy.deepcopy(stock)
    patch(ours, ops=["lora"], strict=True)
    share_input(ours, tuple(str(i) for i in range(len(sizes))))  # as patch() has it for blocks that it knows
    x = torch.randn(M, sizes[0][0], device=device).to(dtype).requires_grad_()
    dys = [torch.randn(M, N, device=device).to(dtype) for _, N in sizes]
    agree(ours, stock, x, dys)
    others = {"frozen": lambda: step(frozen, x, dys), "peft": lambda: step(stock, x, dys)}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(stock, dynamic=False)
        others["peft_compiled"] = lambda: step(fast, x, dys)
    K, N = sizes[0][0], sum(N for _, N in sizes)
    options = "".join(f" {key}" for key in config)
    timer.compare(
        *(benchmark, lambda: step(ours, x, dys), others),
        **dict(op="lora_linear", shape=f"{M}x{K}x{'+'.join(str(N) for _, N in sizes)} r={RANK}{options}"),
        **dict(dtype=str(dtype)[6:], dropout_p=dropout_p, **({"backend": backend} if backend else {})),
        floor=round(1.5 * RANK * (len(sizes) / N + 1 / K), 4),
        saved_bytes=saved_bytes(ours, x),
        peft_saved_bytes=saved_bytes(stock, x),
    )
    info = benchmark.extra_info
    info["lora_tax"] = round(1 / info["speedup_over_frozen"] - 1, 4)
    for name in ("peft", "peft_compiled")[: 1 + compiled]:
        info[f"{name}_tax"] = round(info[f"speedup_over_{name}"] / info["speedup_over_frozen"] - 1, 4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lora_linear(
    benchmark: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, dropout_p: float
) -> None:
    M, K, N = shape
    compare(benchmark, device, M, [(K, N)], dtype, dropout_p, compiled=dtype == torch.float32 or device.type == "cuda")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("group", [(1024, 768, 768, 768, 768), (2048, 2048, 5632, 5632)], ids=str)
def test_shared_input(benchmark: Any, device: torch.device, group: tuple[int, ...], dropout_p: float) -> None:
    """Query, key and value of BERT's width; gate and up."""
    M, K, *Ns = group
    compare(benchmark, device, M, [(K, N) for N in Ns], torch.float32, dropout_p, compiled=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("backend", backends(), indirect=True)
def test_backends(benchmark: Any, device: torch.device, backend: str, dropout_p: float) -> None:
    compare(benchmark, device, 1024, [(768, 768)], torch.float32, dropout_p, compiled=False, backend=backend)
