"""What the CUDA C++ kernels promise of registers and shared memory, read from nvcc where there is one; and that 64 bits
hold every size and stride."""

import re

import cuda_compile
import pytest
from cuda_compile import GFX942, ROOT, SM80, SM90A, SOURCES, Usage
from cuda_host import harness

needs_nvcc = pytest.mark.skipif(not cuda_compile.nvcc(), reason="no nvcc 12 or later on PATH or in CUDACXX")
HEADERS = sorted((ROOT / "csrc").glob("*.h"))


@pytest.fixture(scope="module")
def usages():
    return cuda_compile.compile_all()


@needs_nvcc
def test_every_kernel_compiles_for_every_target(usages):
    """Without a warning, and sm_90a included; compile_all raises otherwise."""
    found = {(usage.case, usage.kernel.partition("<")[0], usage.target) for usage in usages}
    assert found == {
        (source.name, kernel, target)
        for source in SOURCES
        for kernel in cuda_compile.kernels(source)
        for target in cuda_compile.targets(source)
    }


@needs_nvcc
def test_every_kernel_fits_what_it_promises(usages):
    """Its launch bounds' blocks on a multiprocessor at a time, and all it keeps in registers."""
    broken = [f"{u.case}: {u.kernel} on {u.target.name} {problem}" for u in usages for problem in u.problems()]
    assert not broken


@needs_nvcc
@pytest.mark.parametrize("name", harness.ON_GPU)
def test_the_tests_kernels_compile_for_the_newest_target(name):
    """Inline PTX reaches the assembler only where a kernel uses it, and these use all. For sm_80 they are compiled by
    tests/test_cuda_products.py."""
    assert cuda_compile.compile_file(harness.HERE / name, SM90A)


PLANTED = {
    "spill": (
        """__global__ void __launch_bounds__(1024, 2) kernel(float* x) {
             float r[64];
             for (int i = 0; i < 64; i++) r[i] = x[i * 1024 + threadIdx.x];
             __syncthreads();
             for (int i = 0; i < 64; i++) x[(63 - i) * 1024 + threadIdx.x] = r[i] * r[(i + 1) % 64];
           }""",
        r"keeps \d+ bytes of a thread in memory",
    ),
    "array indexed at run time": (
        """__global__ void __launch_bounds__(32) kernel(float* x, int64_t at) {
             float r[256];
             for (int i = 0; i < 256; i++) r[i] = x[i];
             x[0] = r[at];
           }""",
        "keeps 1024 bytes of a thread in memory",
    ),
    "shared memory of fewer blocks": (
        """__global__ void __launch_bounds__(128, 6) kernel(float* x) {
             __shared__ float tile[40 * 256];
             for (int i = threadIdx.x; i < 40 * 256; i += 128) tile[i] = x[i];
             __syncthreads();
             x[threadIdx.x] = tile[x[0] > 0 ? 1 : 2];
           }""",
        "promises 6 blocks a multiprocessor where [45] fit",
    ),
    "no launch bounds": ("__global__ void kernel(float* x) { *x = 0; }", "must state __launch_bounds__"),
    "32-bit stride": (
        "__global__ void __launch_bounds__(32) kernel(float* x, int stride) { x[threadIdx.x * stride] = 0; }",
        "has a parameter of type int",
    ),
}


@needs_nvcc
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, tmp_path):
    code, problem = PLANTED[name]
    source = tmp_path / "planted.cu"
    source.write_text(f"#include <cstdint>\n{code}\n")
    for target in (SM80, SM90A):
        (usage,) = cuda_compile.compile_file(source, target)
        (found,) = usage.problems()
        assert re.match(problem, found)


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("__shared__ float t[16384]; t[threadIdx.x] = x[0]; __syncthreads(); x[0] = t[5];", "too much shared data"),
        ("int unused; x[0] = 0;", "unused"),
    ],
)
def test_what_the_compiler_refuses_or_warns_of_is_an_error(code, message, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(f"__global__ void __launch_bounds__(32) kernel(float* x) {{ {code} }}\n")
    with pytest.raises(RuntimeError, match=message):
        cuda_compile.compile_file(source, SM80)


@needs_nvcc
def test_names_are_short(tmp_path):
    source = tmp_path / "named.cu"
    source.write_text("""#include <cuda_bf16.h>
        namespace fusetune::cuda { namespace {
        template <class T> struct Matrix { T* at; long rows; };
        template <class T, int kRank, bool kMasked> __global__ void __launch_bounds__(64, 3)
            down(Matrix<const T> t, float* out, unsigned threshold) {
          extern __shared__ uint4 dynamic_shared[];
          dynamic_shared[threadIdx.x].x = threshold;
          __syncthreads();
          *out = (float)t.at[kRank] * dynamic_shared[0].x;
        }
        template __global__ void down<__nv_bfloat16, 32, true>(Matrix<const __nv_bfloat16>, float*, unsigned);
        }}""")
    (usage,) = cuda_compile.compile_file(source, SM90A)
    assert usage.kernel == "down<bf16, 32, true>"
    assert usage.parameters == ("Matrix<bf16 const>", "fp32*", "unsigned int")
    assert (usage.threads, usage.promised, usage.dynamic, usage.problems()) == (64, 3, True, [])


def test_an_architectures_own_file_is_for_it_alone():
    assert cuda_compile.targets(ROOT / "csrc/cuda/lora_sm90.cu") == (SM90A,)
    assert cuda_compile.targets(ROOT / "csrc/cuda/lora.cu") == (SM80, SM90A)


def test_flags_are_those_of_cmake():
    assert cuda_compile.flags(ROOT / "csrc/cuda/adamw.cu") == [
        "-std=c++17",
        "-O3",
        "-Xcompiler=-Wall,-Wextra",
        "-fmad=false",
    ]


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "blocks"),
    [
        (SM80, 256, 72, 2085, 3),  # by registers: 28 warps of 72 of the 65536
        (SM80, 256, 32, 0, 8),  # by threads
        (SM80, 32, 16, 0, 32),  # by blocks
        (SM80, 128, 32, 40 << 10, 4),  # by shared memory: 164 KiB / 41 KiB
        (SM90A, 128, 32, 40 << 10, 5),
        (SM90A, 1024, 65, 0, 0),
        (GFX942, 256, 128, 0, 4),  # four SIMDs with 512 registers a lane
        (GFX942, 256, 40, 24 << 10, 2),
    ],
)
def test_occupancy(target, threads, registers, shared, blocks):
    assert Usage("", "", target, threads, 1, registers, 0, shared).blocks == blocks


def test_the_table_names_every_kernel():
    """Its numbers are those of compilers that may not be here, and take minutes: a missing row alone is an error."""
    text = (ROOT / "benchmarks" / "results" / "cuda-build.md").read_text()
    kernels = [kernel for source in SOURCES for kernel in cuda_compile.kernels(source)]
    for path in (ROOT / "kernels").glob("*.py"):
        kernels += re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    missing = [kernel for kernel in kernels if not re.search(rf"`{kernel}[`<]", text)]
    assert not missing, "python benchmarks/cuda_build.py writes the table anew"


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_launchers_take_sizes_and_strides_in_64_bits(path):
    """Their 32-bit integers are dtype codes, bits of a code and thread counts."""
    text = re.sub(r"//.*", "", path.read_text())
    launchers = re.findall(r"\b(?:void|int64_t)\b[\s\w]*\(([^()]*)\)", text)
    names = [
        name
        for parameters in launchers
        for name in re.findall(r"\b(?:int|unsigned|int32_t|uint32_t|short) (\w+)", parameters)
    ]
    assert not [name for name in names if not re.fullmatch(r"(\w+_)?dtype|bits|threads", name)]
