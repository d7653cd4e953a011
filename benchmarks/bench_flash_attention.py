"""Attention, forward and backward, against torch's scaled_dot_product_attention and what else is installed.

Useful flops: 14 B H S^2 D, halved for causal; with padding, those of real queries with real keys. A row says which
share that is of the rate of a large product of the same dtype, which takes its turn in every round. With padding, the
gradient of padded queries is 0, as it is where the loss leaves them out; stock computes them all the same.

Besides stock as it chooses, each of torch's back ends takes its turn where it takes the cell, and on a GPU
FlexAttention and flash-attn where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timer
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusetune.ops import flash_attention, t5_relative_bias

CELLS = [  # B, H, Hkv, S, D, mask
    (1, 8, 8, 2048, 128, "full"),
    (4, 12, 12, 512, 64, "full"),
    (4, 12, 12, 512, 64, "causal"),
    (1, 12, 12, 2048, 64, "causal"),
    (2, 9, 3, 512, 64, "causal"),
    (2, 32, 8, 512, 64, "causal"),
    (32, 12, 12, 128, 32, "full"),
    (8, 12, 12, 512, 64, "padded"),
]
ON_GPU = [
    (8, 32, 8, 2048, 128, "causal"),
    (32, 16, 16, 512, 64, "full"),
    (32, 16, 16, 512, 64, "padded"),
]
DTYPES = [torch.float32, torch.bfloat16]
SWEEP = {"cpu": (4096, 512, 2048), "cuda": (16384, 2048, 16384)}  # tokens, hidden size, longest sequence
GEMM = 2048  # size of the product that a share is of


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make(B: int, heads: int, S: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, heads, S, D] in the layout of a projection's output."""
    return torch.randn(B, S, heads, D, device=device).to(dtype).transpose(1, 2)


def lengths_of(B: int, S: int, least: float = 0.15) -> Tensor:
    return (torch.linspace(least, 1.0, B) * S).long()


def gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(GEMM, GEMM, device=device).to(dtype) for _ in range(2))
    return lambda: F.linear(a, b)


def step(attend: Callable[..., Tensor], leaves: list[Tensor], grad_o: Tensor) -> Any:
    return torch.autograd.grad(attend(*leaves), leaves, grad_o)


def peers(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, p: float
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Other attentions for the same cell: those that do not take it raise."""

    def forced(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *(q, k, v, mask), dropout_p=p, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        yield backend.lower(), functools.partial(forced, getattr(SDPBackend, backend))
    if q.device.type == "cuda" and mask is None and not p:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        S = q.shape[2]
        blocks = create_block_mask(lambda b, h, i, j: j <= i, None, None, S, S, device="cuda") if causal else None
        flex: Any = torch.compile(flex_attention)
        yield "flex", lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            yield (
                "flash_attn",
                lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal).transpose(1, 2),
            )


def taking(step_of: Callable[..., Any], others: Iterator[tuple[str, Callable[..., Tensor]]]) -> dict[str, Any]:
    """Of the peers those that take the cell."""
    found = {}
    for name, attend in others:
        try:
            step_of(attend)
        except (RuntimeError, torch.OutOfMemoryError):
            continue
        found[name] = functools.partial(step_of, attend)
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cell", [*CELLS, *ON_GPU], ids=lambda cell: "x".join(map(str, cell)))
def test_flash_attention(
    benchmark: Any,
    device: torch.device,
    cell: tuple[int, int, int, int, int, str],
    dtype: torch.dtype,
    dropout_p: float,
) -> None:
    if cell in ON_GPU and device.type == "cpu":
        pytest.skip("too large for a CPU")
    run_cell(benchmark, device, cell, dtype, dropout_p)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("S", [512, 1024, 2048, 4096, 8192, 16384])
def test_sweep(benchmark: Any, device: torch.device, S: int, D: int, mask: str) -> None:
    """The same number of tokens in ever longer sequences, bfloat16."""
    tokens, hidden, longest = SWEEP[device.type]
    if S > longest or (device.type == "cpu" and D != 64):
        pytest.skip("too large for a CPU")
    heads = hidden // D
    run_cell(benchmark, device, (tokens // S, heads, heads, S, D, mask), torch.bfloat16, 0.0, sweep=True)


def run_cell(
    benchmark: Any,
    device: torch.device,
    cell: tuple[int, int, int, int, int, str],
    dtype: torch.dtype,
    dropout_p: float,
    **info: Any,
) -> None:
    B, H, Hkv, S, D, mask = cell
    torch.manual_seed(0)
    q, k, v, grad_o = (make(B, heads, S, D, dtype, device) for heads in (H, Hkv, Hkv, H))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    causal, keep, mask_of_keys = mask == "causal", None, None
    lengths = lengths_of(B, S) if mask == "padded" else torch.full((B,), S)
    if mask == "padded":
        keep = torch.arange(S, device=device) < lengths[:, None].to(device)
        mask_of_keys = keep[:, None, None, :]
        grad_o = grad_o * keep[:, None, :, None]

    def stock(q: Tensor, k: Tensor, v: Tensor, p: float = dropout_p) -> Tensor:
        return F.scaled_dot_product_attention(
            *(q, k, v, mask_of_keys), is_causal=causal, dropout_p=p, enable_gqa=H != Hkv
        )

    def ours(q: Tensor, k: Tensor, v: Tensor, p: float = dropout_p) -> Tensor:
        return flash_attention(q, k, v, causal=causal, key_padding_mask=keep, dropout_p=p)

    def both(attend: Callable[..., Tensor]) -> Any:
        return step(attend, leaves, grad_o)

    without = functools.partial(ours, p=0.0)
    for grad, expected in zip(both(without), both(functools.partial(stock, p=0.0)), strict=True):
        assert (grad - expected).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()
    others: dict[str, Callable[[], Any]] = {"stock": lambda: both(stock), "gemm": gemm(dtype, device)}
    others |= {"forward": lambda: ours(*leaves), "stock_forward": lambda: stock(*leaves)}
    if dropout_p:
        others["without_dropout"] = lambda: both(without)
    if device.type == "cuda":
        others |= taking(both, peers(*leaves, mask_of_keys, causal, dropout_p))
    timer.compare(
        *(benchmark, lambda: both(ours), others),
        **dict(op="flash_attention", shape=f"B={B} H={H}/{Hkv} S={S} D={D}", mask=mask),
        **dict(dtype=name_of(dtype), dropout_p=dropout_p),
        **info,
    )
    found = benchmark.extra_info
    pairs = float((lengths.double() ** 2).sum()) / (2 if causal else 1)
    found["gflops"] = round(14 * pairs * H * D / found["ours_ms"] / 1e6, 1)
    rate = 2 * GEMM**3 / found["gemm_ms"] / 1e6
    shares = {name: 14 * pairs * H * D / found[f"{name}_ms"] / 1e6 / rate for name in ("ours", "stock")}
    found["share"], found["stock_share"] = (round(shares[name], 3) for name in ("ours", "stock"))
    if dropout_p:
        found["dropout_cost"] = round(1 / found["speedup_over_without_dropout"] - 1, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_padding(benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    """45 % padding against none: `over_real_tokens` is the share of the time over that of the tokens."""
    B, H, S, D = 8, 12, 512, 64
    q, k, v, grad_o = (make(B, H, S, D, dtype, device) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    lengths = lengths_of(B, S, 0.1)
    keep = torch.arange(S, device=device) < lengths[:, None].to(device)
    masked = grad_o * keep[:, None, :, None]
    bias = keep[:, None, None, :]
    timer.compare(
        benchmark,
        lambda: step(lambda q, k, v: flash_attention(q, k, v, key_padding_mask=keep), leaves, masked),
        {
            "stock": lambda: step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias), leaves, masked),
            "unpadded": lambda: step(flash_attention, leaves, grad_o),
        },
        **dict(op="flash_attention", shape=f"B={B} H={H}/{H} S={S} D={D}", mask="45 % padding", dtype=name_of(dtype)),
    )
    real = float(lengths.double().mean() / S)
    benchmark.extra_info["over_real_tokens"] = round(1 / benchmark.extra_info["speedup_over_unpadded"] / real, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed(benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Packed causal sequences against the same padded, which is what stock attention takes."""
    H, D, S = 12, 64, 512
    lengths = lengths_of(8, S)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    packed = [make(1, H, int(lengths.sum()), D, dtype, device).requires_grad_() for _ in range(3)]
    padded = [make(8, H, S, D, dtype, device).requires_grad_() for _ in range(3)]
    grads = [torch.randn_like(packed[0]), torch.randn_like(padded[0])]
    timer.compare(
        benchmark,
        lambda: step(lambda q, k, v: flash_attention(q, k, v, causal=True, cu_seqlens_q=starts), packed, grads[0]),
        {
            "stock": lambda: step(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), padded, grads[1]
            )
        },
        **dict(op="flash_attention", shape=f"B=8 H={H}/{H} S={S} D={D}", mask="packed", dtype=name_of(dtype)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_t5_bias(benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    """T5's position bias, learned: by distance here, of [H, S, S] for stock."""
    B, H, S, D = 2, 8, 1024, 64
    q, k, v, grad_o = (make(B, H, S, D, dtype, device) for _ in range(4))
    table = torch.randn(32, H, device=device)
    leaves = [t.requires_grad_() for t in (q, k, v, table)]
    distance = torch.arange(S, device=device) - torch.arange(S, device=device)[:, None] + S - 1

    def stock(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = t5_relative_bias(table, S)[:, distance].to(dtype)[None]
        return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)

    def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return flash_attention(q, k, v, relative_bias=t5_relative_bias(table, S), scale=1.0)

    def saved(attend: Callable[..., Tensor]) -> float:
        """MB that autograd keeps besides the inputs."""
        sizes: dict[int, int] = {}
        hook = lambda t: sizes.__setitem__(t.data_ptr(), t.numel() * t.element_size()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            o = attend(*leaves)
        return round(sum(size for at, size in sizes.items() if at not in {t.data_ptr() for t in (*leaves, o)}) / 1e6, 3)

    for grad, expected in zip(step(ours, leaves, grad_o), step(stock, leaves, grad_o), strict=True):
        assert (grad - expected).norm() <= (1e-4 if dtype == torch.float32 else 5e-2) * expected.norm()
    timer.compare(
        *(benchmark, lambda: step(ours, leaves, grad_o), {"stock": lambda: step(stock, leaves, grad_o)}),
        **dict(op="flash_attention", shape=f"B={B} H={H}/{H} S={S} D={D}", mask="T5 bias", dtype=name_of(dtype)),
        **dict(saved_mb=saved(ours), stock_saved_mb=saved(stock)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("Sk", [128, 1024])
def test_decoding(benchmark: Any, device: torch.device, Sk: int, dtype: torch.dtype) -> None:
    """One new token against a cache."""
    B, H, Hkv, D = 1, 16, 4, 64
    q, k, v = make(B, H, 1, D, dtype, device), *(torch.randn(2, B, Hkv, Sk, D, device=device).to(dtype))

    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (flash_attention(q, k, v) - expected).norm() <= 1e-2 * expected.norm()

    @torch.no_grad()
    def repeat(attend: Callable[[], Tensor]) -> None:
        for _ in range(100):
            attend()

    timer.compare(
        benchmark,
        lambda: repeat(lambda: flash_attention(q, k, v)),
        {"stock": lambda: repeat(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))},
        **dict(op="flash_attention", shape=f"B={B} H={H}/{Hkv} S=1 cache={Sk} D={D}", mask="decoding, 100 calls"),
        dtype=name_of(dtype),
    )
