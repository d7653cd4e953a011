// Each primitive of csrc/cuda/mma.cuh alone: registers and bytes go in and out as they are.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.cuh"
#include "../../csrc/dtype.h"
#include "products.h"

namespace fusetune::cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kTile = 32 * 32;

template <int kMatrices, bool kTrans>
__global__ void load(const uint16_t* elements, const int* offsets, uint32_t* registers, bool barrier) {
  alignas(16) __shared__ uint16_t tile[kTile];
  for (int i = threadIdx.x; i < kTile; i += kWarp) tile[i] = elements[i];
  if (barrier) __syncwarp();
  const uint16_t* row = tile + offsets[threadIdx.x];
  uint32_t d[kMatrices];
  if constexpr (kMatrices == 2) {
    if constexpr (kTrans)
      ldmatrix_x2_trans(d, row);
    else
      ldmatrix_x2(d, row);
  } else {
    if constexpr (kTrans)
      ldmatrix_x4_trans(d, row);
    else
      ldmatrix_x4(d, row);
  }
  for (int i = 0; i < kMatrices; i++) registers[threadIdx.x * kMatrices + i] = d[i];
}

template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d, int lanes) {
  const int64_t lane = (int64_t)blockIdx.x * kWarp + threadIdx.x;
  uint32_t a_registers[4], b_registers[2];
  float sums[4];
  for (int i = 0; i < 4; i++) a_registers[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; i++) b_registers[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; i++) sums[i] = d[lane * 4 + i];
  if ((int)threadIdx.x < lanes) {
    if constexpr (sizeof(T) == 2)
      mma_m16n8k16<T>(sums, a_registers, b_registers[0], b_registers[1]);
    else
      mma_m16n8k8_tf32(sums, a_registers, b_registers[0], b_registers[1]);
  }
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = sums[i];
}

__global__ void round_each(const float* x, uint32_t* y, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * kWarp + threadIdx.x;
  if (i < n) y[i] = to_tf32(x[i]);
}

__global__ void exponentiate(const float* x, float* y, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * kWarp + threadIdx.x;
  if (i < n) y[i] = exp2_approx(x[i]);
}

__global__ void copy(const uint4* from, uint4* to, const int* source_bytes, bool halves, int complete, int read,
                     bool barrier) {
  __shared__ uint4 tile[2][kWarp];
  for (int group = 0; group < 2; group++) {
    const int i = group * kWarp + threadIdx.x;
    uint4* shared = &tile[group][threadIdx.x];
    if (halves) {
      copy_async_8(shared, from + i, min(source_bytes[i], 8));
      copy_async_8(&shared->z, &from[i].z, max(source_bytes[i] - 8, 0));
    } else {
      copy_async_16(shared, from + i, source_bytes[i]);
    }
    copy_async_commit();
  }
  if (complete == 1) copy_async_wait<1>();
  if (complete == 2) copy_async_wait<0>();
  if (barrier) __syncthreads();
  const int neighbour = threadIdx.x ^ 1;
  for (int group = 0; group < read; group++) to[group * kWarp + neighbour] = tile[group][neighbour];
}

}  // namespace

void load_fragments(const uint16_t* elements, const int* offsets, uint32_t* registers, int matrices, bool trans,
                    bool barrier, void* stream) {
  auto kernel = matrices == 2 ? (trans ? load<2, true> : load<2, false>) : (trans ? load<4, true> : load<4, false>);
  launch("load_fragments", kernel, 1, kWarp, stream, elements, offsets, registers, barrier);
}

void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d, int64_t warps, int lanes, int dtype,
                        void* stream) {
  auto kernel = dtype == kFloat32 ? multiply<float> : dtype == kBFloat16 ? multiply<__nv_bfloat16> : multiply<__half>;
  launch("multiply_fragments", kernel, (unsigned)warps, kWarp, stream, a, b, d, lanes);
}

void round_to_tf32(const float* x, uint32_t* y, int64_t n, void* stream) {
  launch("round_to_tf32", round_each, (unsigned)((n + kWarp - 1) / kWarp), kWarp, stream, x, y, n);
}

void exponentials(const float* x, float* y, int64_t n, void* stream) {
  launch("exponentials", exponentiate, (unsigned)((n + kWarp - 1) / kWarp), kWarp, stream, x, y, n);
}

void copy_groups(const void* from, void* to, const int* source_bytes, bool halves, int complete, int read, bool barrier,
                 void* stream) {
  launch("copy_groups", copy, 1, kWarp, stream, (const uint4*)from, (uint4*)to, source_bytes, halves, complete, read,
         barrier);
}

}  // namespace fusetune::cuda
