"""The primitives of csrc/cuda/mma.cuh, each alone and in a tiled product: on the host, and the same on a GPU."""

from types import ModuleType
from typing import NamedTuple

import cuda_compile
import pytest
import torch
from cuda_host import harness
from oracle import assert_right, row_strided, unaligned
from torch import Tensor

from fusetune import _native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Kernels(NamedTuple):
    """Calls the launchers of tests/cuda_host/products.h: tensors by their addresses, the stream added."""

    module: ModuleType
    device: torch.device

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        getattr(self.module, name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), stream)


@pytest.fixture
def host_kernels(cuda_on_host, host):
    return Kernels(host, torch.device("cpu"))


@pytest.fixture(params=["cuda-host", pytest.param("cuda-gpu", marks=pytest.mark.gpu)])
def kernels(request):
    if request.param == "cuda-host":
        return request.getfixturevalue("host_kernels")
    if not cuda_compile.nvcc():
        pytest.skip("nvcc is missing, which compiles the tests' kernels for this GPU")
    return Kernels(harness.load_for_gpu(), torch.device("cuda"))


def to_tf32(x: Tensor) -> Tensor:
    """x to 11 significant bits, or to multiples of 2^-136 where it is subnormal; halves away from zero."""
    unit = torch.ldexp(torch.ones_like(x, dtype=torch.float64), torch.frexp(x)[1].clamp(min=-125) - 11)
    return (x.sign() * (x.abs() / unit + 0.5).floor() * unit).float()


# --- The product ------------------------------------------------------------------------------------------------------


def aligned_rows(t: Tensor) -> Tensor:
    """t with rows at multiples of 16 bytes, and NaN between them."""
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % 8 + 8), value=torch.nan)[..., : t.shape[-1]]


LAYOUTS = {
    "contiguous": lambda t: t,
    "aligned_rows": aligned_rows,  # copied by cp.async up to the last element of each
    "row_strided": row_strided,
    "unaligned": unaligned,
}
TILE_M, TILE_N, TILE_K = 64, 64, 32
SHAPES = [  # M, N, K
    (0, 5, 3),
    (5, 0, 3),
    (5, 7, 0),
    (1, 1, 1),
    (13, 17, 11),
    (TILE_M, TILE_N, TILE_K),
    (TILE_M - 1, TILE_N + 1, TILE_K - 1),
    (TILE_M + 1, TILE_N - 1, TILE_K + 1),
    (131, 67, 97),
    (8, 200, 3 * TILE_K),
]


def product(kernels: Kernels, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    rows = torch.full((M, N + 3), 7.0, device=kernels.device)
    strides = a.stride(0), b.stride(0), rows.stride(0)
    kernels("product", a, b, rows[:, :N], M, N, K, *strides, _native.code(dtype))
    assert (rows[:, N:] == 7).all()
    return rows[:, :N].cpu()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(kernels, dtype, M, N, K, layout):
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    if dtype == torch.float32:
        x, y = to_tf32(a), to_tf32(b)
    else:
        x, y = a.float(), b.float()
    a, b = (LAYOUTS[layout](t.to(kernels.device)) for t in (a, b))
    assert_right("product", product(kernels, a, b, dtype), x @ y, x.double() @ y.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_takes_different_layouts(kernels, dtype):
    a, b = (torch.randint(-4, 5, shape).to(dtype) for shape in ((70, 40), (40, 72)))
    exact = a.double() @ b.double()
    for wrap_a, wrap_b in ((unaligned, aligned_rows), (aligned_rows, unaligned)):
        got = product(kernels, wrap_a(a.to(kernels.device)), wrap_b(b.to(kernels.device)), dtype)
        assert torch.equal(got.double(), exact)


def test_product_carries_infinities_and_nans(kernels):
    a, b = torch.ones(20, 8, dtype=torch.float16), torch.ones(8, 20, dtype=torch.float16)
    a[3, 2], b[1, 5], b[2, 6] = torch.inf, torch.nan, -torch.inf
    got = product(kernels, a.to(kernels.device), b.to(kernels.device), torch.float16)
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_does_not_depend_on_the_order_of_threads(host_kernels, dtype):
    a, b = torch.randn(70, 40).to(dtype), torch.randn(40, 72).to(dtype)
    forward = product(host_kernels, a, b, dtype)
    with harness.reversed_order(host_kernels.module):
        backward = product(host_kernels, a, b, dtype)
    assert torch.equal(forward, backward)


@pytest.mark.skipif(not cuda_compile.nvcc(), reason="nvcc is missing")
def test_kernels_compile_for_gpus(tmp_path):
    harness.compile_for_gpu("sm_80", tmp_path / "module.so")


# --- Fragments, by the formulas of the PTX ISA for element i of a lane ------------------------------------------------

LANE = torch.arange(32)[:, None]
GROUP, THREAD = LANE // 4, LANE % 4  # groupID, threadID_in_group


def element_positions(matrix: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and columns [32, elements] of the elements that lanes hold."""
    i = torch.arange({"a": 4, "b": 2, "d": 4}[matrix] * (2 if matrix != "d" and dtype != torch.float32 else 1))[None]
    if matrix == "d":
        rows, columns = torch.where(i < 2, GROUP, GROUP + 8), THREAD * 2 + (i & 1)
    elif dtype == torch.float32:
        if matrix == "a":
            rows = torch.where((i == 0) | (i == 2), GROUP, GROUP + 8)
            columns = torch.where(i < 2, THREAD, THREAD + 4)
        else:
            rows, columns = torch.where(i == 0, THREAD, THREAD + 4), GROUP
    elif matrix == "a":
        rows = torch.where((i < 2) | ((4 <= i) & (i < 6)), GROUP, GROUP + 8)
        columns = THREAD * 2 + (i & 1) + torch.where(i >= 4, 8, 0)
    else:
        rows, columns = THREAD * 2 + (i & 1) + torch.where(i >= 2, 8, 0), GROUP
    return tuple(torch.broadcast_tensors(rows, columns))


def registers(name: str, matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, 32, registers] of int32 that hold matrices [n, rows, columns] of `dtype`."""
    rows, columns = element_positions(name, dtype)
    return matrices.to(dtype)[:, rows, columns].contiguous().view(torch.int32)


def multiply(kernels: Kernels, a: Tensor, b: Tensor, d: Tensor, dtype: torch.dtype, lanes: int = 32) -> Tensor:
    """D + A B by mma: registers [n, 32, ...] of A and B, D as [n, 16, 8]."""
    sums = registers("d", d, torch.float32).view(torch.float32).to(kernels.device)
    kernels("multiply_fragments", a.to(kernels.device), b.to(kernels.device), sums, len(d), lanes, _native.code(dtype))
    result = torch.full_like(d, torch.nan)
    rows, columns = element_positions("d", torch.float32)
    result[:, rows, columns] = sums.cpu()
    return result


def depth(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float32 else 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_of_each_element_alone(kernels, dtype):
    K = depth(dtype)
    d = (1 + torch.arange(16 * 8.0).view(1, 16, 8)).mul(1000).expand(16 * K, -1, -1)
    b = (1 + torch.arange(K * 8.0).view(1, K, 8)).expand(16 * K, -1, -1)
    a = torch.eye(16 * K).view(16 * K, 16, K)
    got = multiply(kernels, registers("a", a, dtype), registers("b", b, dtype), d, dtype)
    assert torch.equal(got, d + a @ b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_sums(kernels, dtype):
    K = depth(dtype)
    a, b, d = (torch.randint(-8, 9, (3, *shape)).float() for shape in ((16, K), (K, 8), (16, 8)))
    got = multiply(kernels, registers("a", a, dtype), registers("b", b, dtype), d, dtype)
    assert torch.equal(got, d + a @ b)


def test_mma_ignores_the_low_bits_of_tf32(kernels):
    a, b, d = torch.randn(1, 16, 8), torch.randn(1, 8, 8), torch.zeros(1, 16, 8)
    a, b = (registers(name, x, torch.float32) & ~0x1FFF for name, x in (("a", a), ("b", b)))
    expected = multiply(kernels, a, b, d, torch.float32)
    assert torch.equal(multiply(kernels, a | 0x1FFF, b | 0x1000, d, torch.float32), expected)


def test_to_tf32(kernels):
    x = torch.cat(
        [
            torch.randn(1000),
            torch.randn(1000) * 1e-39,  # subnormal
            torch.tensor([0.0, -0.0, 1.0, torch.finfo(torch.float32).max, torch.inf, -torch.inf, torch.nan]),
            1 + torch.arange(16.0) * 2**-11,  # every other one is halfway
            -1 - torch.arange(16.0) * 2**-11,
            (1 + torch.arange(16.0) * 2**-11) * (1 - 2**-23),
        ]
    ).to(kernels.device)
    bits = torch.empty(len(x), dtype=torch.int32, device=kernels.device)
    kernels("round_to_tf32", x, bits, len(x))
    got = (bits.cpu() & ~0x1FFF).view(torch.float32)
    torch.testing.assert_close(got, to_tf32(x.cpu()), rtol=0, atol=0, equal_nan=True)


def test_exp2_approx(kernels):
    x = torch.cat([torch.linspace(-125, 127, 10007), torch.tensor([0.0, -130.0, -torch.inf, torch.inf, torch.nan])])
    y = torch.empty_like(x, device=kernels.device)
    kernels("exponentials", x.to(kernels.device), y, len(x))
    exact = torch.where(x < -126, 0, torch.exp2(x.double()))
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2**-22, atol=0, equal_nan=True)


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(kernels, matrices, trans):
    row, column = torch.arange(32)[:, None], torch.arange(32)
    tile = (256 * row + column).to(torch.int16)
    offsets = 8 * torch.randperm(128)[:32].to(torch.int32)  # any row, at any 16 bytes
    got = load(kernels, tile, offsets, matrices, trans)
    for lane in range(32):
        for i in range(matrices):
            for half in range(2):
                position = lane // 4, 2 * (lane % 4) + half
                r, c = position[::-1] if trans else position
                element = offsets[8 * i + r].item() + c
                value = got[lane, i].item() >> 16 * half & 0xFFFF
                assert value == 256 * (element // 32) + element % 32, f"lane {lane}, register {i}, half {half}"


def load(kernels: Kernels, tile: Tensor, offsets: Tensor, matrices: int, trans: bool, barrier: bool = True) -> Tensor:
    got = torch.zeros(32, matrices, dtype=torch.int32, device=kernels.device)
    kernels("load_fragments", tile.to(kernels.device), offsets.to(kernels.device), got, matrices, trans, barrier)
    return got.cpu()


# --- cp.async ---------------------------------------------------------------------------------------------------------


def copy(
    kernels: Kernels, source_bytes: Tensor, complete: int, read: int, barrier: bool = True, halves: bool = False
) -> tuple[Tensor, Tensor]:
    """What lies at `from`, and what was copied, [2, 32, 16] bytes."""
    source = torch.randint(1, 256, (2, 32, 16), dtype=torch.uint8)
    target = torch.zeros_like(source, device=kernels.device)
    source_bytes = source_bytes.to(kernels.device, torch.int32)
    kernels("copy_groups", source.to(kernels.device), target, source_bytes, halves, complete, read, barrier)
    return source, target.cpu()


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_copies(kernels, groups, halves):
    source, target = copy(kernels, torch.full((2, 32), 16), groups, groups, halves=halves)
    assert torch.equal(target[:groups], source[:groups])
    assert not target[groups:].any()


@pytest.mark.parametrize("halves", [False, True])
def test_copies_fill_with_zeros(kernels, halves):
    source_bytes = torch.randint(0, 17, (2, 32))
    source_bytes[0, :17] = torch.arange(17)
    source, target = copy(kernels, source_bytes, 2, 2, halves=halves)
    kept = torch.arange(16) < source_bytes[..., None]
    assert torch.equal(target, torch.where(kept, source, 0))


# --- What the harness must report -------------------------------------------------------------------------------------

FULL = torch.full((2, 32), 16)


@pytest.mark.parametrize(("complete", "read"), [(0, 1), (1, 2)])
def test_a_missing_wait_is_reported(host_kernels, complete, read):
    with pytest.raises(RuntimeError, match=r"fragments\.cu:\d+: read .* cp\.async .* not waited for"):
        copy(host_kernels, FULL, complete, read)


def test_a_wait_without_a_barrier_is_reported(host_kernels):
    with pytest.raises(RuntimeError, match=r"fragments\.cu:\d+: read of 16 bytes: nobody has written"):
        copy(host_kernels, FULL, 2, 2, barrier=False)


def test_a_copy_of_too_many_bytes_is_reported(host_kernels):
    with pytest.raises(RuntimeError, match=r"fragments\.cu:\d+: cp\.async of 16 bytes reads 17"):
        copy(host_kernels, FULL + 1, 2, 2)


def test_ldmatrix_without_a_barrier_is_reported(host_kernels):
    tile, offsets = torch.zeros(32, 32, dtype=torch.int16), 32 * torch.arange(32, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"fragments\.cu:\d+: race"):
        load(host_kernels, tile, offsets, 4, False, barrier=False)


def test_ldmatrix_of_a_misaligned_row_is_reported(host_kernels):
    tile, offsets = torch.zeros(32, 32, dtype=torch.int16), 32 * torch.arange(32, dtype=torch.int32)
    offsets[9] += 4
    with pytest.raises(RuntimeError, match=r"fragments\.cu:\d+: .*multiple of 16"):
        load(host_kernels, tile, offsets, 2, True)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "mma_m16n8k16"), (torch.float32, "mma_m16n8k8_tf32")])
def test_mma_without_a_lane_is_reported(host_kernels, dtype, name):
    a, b, d = (torch.zeros(1, *shape) for shape in ((16, depth(dtype)), (depth(dtype), 8), (16, 8)))
    with pytest.raises(RuntimeError, match=rf"fragments\.cu:\d+: {name} .* 31 threads, but thread \(31, 0, 0\)"):
        multiply(host_kernels, registers("a", a, dtype), registers("b", b, dtype), d, dtype, lanes=31)
