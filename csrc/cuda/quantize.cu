// Dequantising a block of a frozen weight: memory-bound, one launch. Compiled with -fmad=false, so that products and sums
// round one by one as on the CPU.
#include "../quantize.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace fusetune::cuda {

namespace {

constexpr int kThreads = 256;

// Elements of a thread: 16 bytes out in 16-bit types. It divides every block size of NF4, so that the scale is one.
constexpr int kPack = 8;

template <class T>
struct alignas(16) Pack {
  T at[kPack];
};

__device__ void store(float* p, float x) { *p = x; }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ void store(__half* p, float x) { *p = __float2half_rn(x); }

__device__ float scale_of(const void* absmax, const float* nested, int64_t block) {
  if (!nested) return ((const float*)absmax)[block];
  const float scaled =
      nested[kNestedMap + ((const uint8_t*)absmax)[block]] * nested[kNestedAbsmax + block / kNestedBlock];
  return scaled + nested[0];
}

// Element i % 2 of a byte of two, or the element that a byte is, times its block's scale.
template <int kBits>
__device__ float value(const float* table, uint8_t byte, int64_t i, float scale) {
  if (kBits == 8) return (int8_t)byte * scale * kReciprocal127;
  return table[i % 2 ? byte & 15 : byte >> 4] * scale;
}

// Row blockIdx.y, and every gridDim.y-th from there: out[n, k] is the element (n0 + n, k0 + k) of the weight. Blocks have
// 2^block_bits elements; in 8 bits they are rows.
template <int kBits, class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows(const void* codes, const void* absmax, const float* nested, T* out, int64_t n0, int64_t k0,
                    int64_t rows, int64_t width, int64_t K, int64_t block_bits) {
  __shared__ float table[16];  // in as many banks
  if (kBits == 4) {
    constexpr float values[16] = FUSETUNE_NF4;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 16; i++) table[i] = values[i];
    }
    __syncthreads();
  }
  const int64_t k = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kPack;
  if (k >= width) return;
  const int count = (int)min(width - k, (int64_t)kPack);
  for (int64_t n = blockIdx.y; n < rows; n += gridDim.y) {
    const int64_t i = (n0 + n) * K + k0 + k;
    auto block_of = [&](int64_t element) { return kBits == 4 ? element >> block_bits : n0 + n; };
    T* to = out + n * width + k;
    constexpr int kEach = 8 / kBits;  // elements of a byte
    const uint8_t* const bytes = (const uint8_t*)codes;
    if (count == kPack && i % kPack == 0 && (uintptr_t)to % sizeof(uint4) == 0 &&
        (uintptr_t)codes % sizeof(uint64_t) == 0) {
      const float scale = scale_of(absmax, nested, block_of(i));
      const uint64_t packed = kBits == 4 ? ((const uint32_t*)codes)[i / kPack] : ((const uint64_t*)codes)[i / kPack];
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPack; j++)
        store(pack.at + j, value<kBits>(table, (uint8_t)(packed >> j / kEach * 8), j, scale));
      *(Pack<T>*)to = pack;
    } else {
      for (int j = 0; j < count; j++) {
        const float scale = scale_of(absmax, nested, block_of(i + j));
        store(to + j, value<kBits>(table, bytes[(i + j) / kEach], i + j, scale));
      }
    }
  }
}

template <int kBits, class T>
void dequantize_as(const void* codes, const void* absmax, const float* nested, void* out, int64_t n0, int64_t k0,
                   int64_t rows, int64_t width, int64_t K, int64_t block, void* stream) {
  int64_t block_bits = 0;
  while ((int64_t)1 << block_bits < block) block_bits++;
  const int64_t threads = (width + kPack - 1) / kPack;
  const dim3 blocks((unsigned)((threads + kThreads - 1) / kThreads), (unsigned)(rows < 65535 ? rows : 65535));
  launch("dequantize", dequantize_rows<kBits, T>, blocks, kThreads, stream, codes, absmax, nested, (T*)out, n0, k0,
         rows, width, K, block_bits);
}

}  // namespace

void dequantize(const void* codes, const void* absmax, const float* nested, void* out, int64_t n0, int64_t n1,
                int64_t k0, int64_t k1, int64_t K, int64_t block, int bits, int dtype, void* stream) {
  const int64_t rows = n1 - n0, width = k1 - k0;
  if (rows <= 0 || width <= 0) return;
  const auto run = [&](auto four, auto eight) {
    (bits == 4 ? four : eight)(codes, absmax, nested, out, n0, k0, rows, width, K, block, stream);
  };
  switch (dtype) {
    case kFloat32: run(dequantize_as<4, float>, dequantize_as<8, float>); break;
    case kBFloat16: run(dequantize_as<4, __nv_bfloat16>, dequantize_as<8, __nv_bfloat16>); break;
    default: run(dequantize_as<4, __half>, dequantize_as<8, __half>);
  }
}

}  // namespace fusetune::cuda
