// Frozen weights in 4 and 8 bits, in the formats of bitsandbytes 0.50, so that a checkpoint of either is one of the other.
//
// NF4 (Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", arXiv 2305.14314, section 3): a weight w [N, K]
// is read as one row of N K elements, cut into blocks of B. With m the largest |w| of a block and t the table below,
//
//   code = number of midpoints (t[i] + t[i + 1]) / 2 that lie below w (1 / m)          w' = t[code] m
//
// two codes a byte, the first in the upper four bits; an odd last one has a 7, the code of 0, beside it. The last block,
// where it is shorter than B, takes w / m instead of w (1 / m). An m below 1e-38 divides as 1e-38, which the last, shorter
// block stores too. A NaN in a block makes its m NaN and its codes 15. bitsandbytes does the same on the CPU; its CUDA
// kernel, built with fast arithmetic, may round a quotient otherwise, and gives 0 where a quotient is NaN.
//
// Double quantisation (the same, section 3) stores m in 8 bits. With c the mean of all m, d = m - c cut into blocks of 256,
// and e the largest |d| of a block, u a map of 256 values:
//
//   code = the nearest of u to d (1 / e)                m' = u[code] e + c
//
// `nested` is [c, u[0:256], e of each block]: float32 [257 + ceil(blocks / 256)].
//
// int8 (Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 3.1): with m the largest |w| of a row in float16,
//
//   code = round(w (127 / m)), ties to even             w' = code m float32(1 / 127)
//
// which is the above with blocks of K elements and no table. Products are float32, rounded one by one; w' is rounded once
// more, to its storage type.
//
// Cost of dequantising an element: read 0.5 bytes and 4/B or 1/B of a scale (int8: 1), write 4 or 2.
// Floor: those bytes over the stream rate.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// The quantiles of a normal distribution, [-1, 1] (the same, appendix E).
#define FUSETUNE_NF4      \
  {-1.0f,                 \
   -0.6961928009986877f,  \
   -0.5250730514526367f,  \
   -0.39491748809814453f, \
   -0.28444138169288635f, \
   -0.18477343022823334f, \
   -0.09105003625154495f, \
   0.0f,                  \
   0.07958029955625534f,  \
   0.16093020141124725f,  \
   0.24611230194568634f,  \
   0.33791524171829224f,  \
   0.44070982933044434f,  \
   0.5626170039176941f,   \
   0.7229568362236023f,   \
   1.0f}

constexpr float kReciprocal127 = 7.874015718698502e-3f;
constexpr float kLeastAbsmax = 1e-38f;

// Of `nested`: where its map and the scales of its blocks begin, and a block's size.
constexpr int kNestedMap = 1, kNestedAbsmax = 257, kNestedBlock = 256;

namespace cpu {

using QuantizeNf4 = void(const void* w,   // [count]
                         uint8_t* codes,  // [ceil(count / 2)] out
                         float* absmax,   // [ceil(count / block)] out
                         int64_t count,
                         int64_t block,  // even
                         int dtype, int threads);
FUSETUNE_LAUNCHER(QuantizeNf4, quantize_nf4)

// Rows n0 .. n1 and columns k0 .. k1 of the weight.
using Dequantize = void(const void* codes,    // uint8, two elements each, or int8
                        const void* absmax,   // a block's scale: float32, or with `nested` uint8
                        const float* nested,  // or null
                        void* out,            // [n1 - n0, k1 - k0] out
                        int64_t n0, int64_t n1, int64_t k0, int64_t k1, int64_t K,
                        int64_t block,  // a power of 2, or K in 8 bits
                        int bits,       // 4 or 8
                        int dtype, int threads);
FUSETUNE_LAUNCHER(Dequantize, dequantize)

}  // namespace cpu

namespace cuda {

// As above; all pointers are to device memory.
void dequantize(const void* codes, const void* absmax, const float* nested, void* out, int64_t n0, int64_t n1,
                int64_t k0, int64_t k1, int64_t K, int64_t block, int bits, int dtype, void* stream);

}  // namespace cuda
}  // namespace fusetune
