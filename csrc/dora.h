// DoRA linear (Liu et al., "DoRA: weight-decomposed low-rank adaptation", arXiv 2402.09353, eq. 5; section 4.3: the norm
// is not differentiated), on top of LoRA linear (lora.h):
//
//   y = g . pre + bias      pre = x w^T + scale x a^T b^T      g = m / norm      norm[n] = |w[n] + scale b[n] a|
//
// with g and the magnitudes m [N]; `.` is elementwise, g of the columns. With dropout D (philox.h) PEFT's layer computes
// what it adds to the frozen layer from the dropped input xd = x . D:
//
//   y = x w^T + bias + (g - 1) . (xd w^T) + scale xd a^T (g . b)^T
//
// that is LoRA with b scaled by rows, and (g - 1) . pre with pre = xd w^T.
//
// The launchers here are what remains beside LoRA's:
//
//   norm       in one pass over w; scale b a is made a block at a time and never stored. This costs what the products of
//              the expanded square would (|w|^2 + 2 scale w.(b a) + ..), and does not cancel where w + scale b a is small.
//   forward    y = g . pre + bias + rest                       or g - 1 for g
//   backward   dpre = g . dy      dg[n] = sum_m dy pre      dbias[n] = sum_m dy
//   dropout    out = x . D, the same from the same seed
//
// All arithmetic is float32, and sums are in an order that does not depend on the number of threads.
// Cost beyond LoRA: 2 N K R flops and one read of w; read pre, write y; read dy and pre, write dpre.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune::cpu {

using DoraNorm = void(const void* w,  // [N, K], element (n, k) at n w_row + k w_col; one of them is 1
                      const void* a,  // [R, K]
                      const void* b,  // [N, R]
                      float* norm,    // [N] out
                      int64_t N, int64_t K, int64_t R, int64_t w_row, int64_t w_col, float scale,
                      int dtype,          // of w
                      int adapter_dtype,  // of a and b
                      int threads);
FUSETUNE_LAUNCHER(DoraNorm, dora_norm)

using DoraForward = void(const void* pre,    // [M, N]
                         const float* g,     // [N]
                         const float* bias,  // [N], or null
                         const void* rest,   // [M, N], or null
                         void* y,            // [M, N] out
                         int64_t M, int64_t N,
                         int dtype,  // of pre, rest and y
                         int threads);
FUSETUNE_LAUNCHER(DoraForward, dora_forward)

using DoraBackward = void(const void* dy,   // [M, N], rows dy_row elements apart
                          const void* pre,  // [M, N]
                          const float* g,   // [N]
                          void* dpre,       // [M, N] out
                          float* dg,        // [N] out
                          float* dbias,     // [N] out
                          int64_t M, int64_t N, int64_t dy_row,
                          int dtype,  // of dy, pre and dpre
                          int threads);
FUSETUNE_LAUNCHER(DoraBackward, dora_backward)

using DoraDropout = void(const void* x,  // [M, K], rows x_row elements apart
                         void* out,      // [M, K] out
                         int64_t M, int64_t K, int64_t x_row, double dropout_p, uint64_t seed, int dtype, int threads);
FUSETUNE_LAUNCHER(DoraDropout, dora_dropout)

}  // namespace fusetune::cpu
