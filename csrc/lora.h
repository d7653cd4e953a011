// LoRA linear (Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685, section 4.1):
//
//   y  = x w^T + bias + scale s b^T            s = (x . D) a^T
//
// with x [M, K], w [N, K] frozen, a [R, K], b [N, R], s [M, R] and D the dropout mask of philox.h, its kept elements
// scaled by 1/(1 - p); `.` is elementwise. The large products with w are the vendor's, called from Python, which lets
// them accumulate onto what the launchers here write first:
//
//   forward    y0 = bias + scale s b^T                         then  y  = y0 + x w^T
//   backward   dx0 = (ds a) . D,   ds = scale dy b  [M, R]     then  dx = dx0 + dy w
//              da  = ds^T (x . D)                  [R, K]
//              db  = scale dy^T s                  [N, R]
//
// Neither D nor x . D is stored: backward recomputes them from the seed. All arithmetic is float32; a tensor's storage
// type is rounded to once, when it is written. But for the tensor cores of GPUs, 16-bit adapters have s and ds rounded to
// their type, in which float16 must hold them.
//
// Cost beyond the frozen layer: 6 M R (K + N) flops; read x twice, dy once, write y0 and dx0 once.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune::cpu {

using LoraForward = void(const void* x,     // [M, K], rows x_row elements apart
                         const void* a,     // [R, K]
                         const void* b,     // [N, R]
                         const void* bias,  // [N], or null
                         void* y0,          // [M, N] out
                         float* s,          // [M, R] out
                         int64_t M, int64_t N, int64_t K, int64_t R, int64_t x_row, float scale, double dropout_p,
                         uint64_t seed,
                         int dtype,          // of x and bias
                         int adapter_dtype,  // of a and b
                         int y_dtype, int threads);
FUSETUNE_LAUNCHER(LoraForward, lora_forward)

using LoraBackward = void(const void* dy,  // [M, N], rows dy_row elements apart
                          const void* x,   // [M, K]
                          const void* a, const void* b, const float* s,
                          void* dx0,  // [M, K] out, or null
                          void* da,   // [R, K] out, or null
                          void* db,   // [N, R] out, or null
                          int64_t M, int64_t N, int64_t K, int64_t R, int64_t dy_row, int64_t x_row, float scale,
                          double dropout_p, uint64_t seed,
                          int dtype,          // of dy and x
                          int adapter_dtype,  // of a, b, da, db
                          int dx_dtype, int threads);
FUSETUNE_LAUNCHER(LoraBackward, lora_backward)

}  // namespace fusetune::cpu

namespace fusetune::cuda {

// As above. y0 and dx0 have x's dtype; seed is on the device, and not read without dropout.
void lora_forward(const void* x, const void* a, const void* b, const void* bias, void* y0, float* s, int64_t M,
                  int64_t N, int64_t K, int64_t R, int64_t x_row, float scale, double dropout_p, const int64_t* seed,
                  int dtype, int adapter_dtype, void* stream);

// Floats of the workspace that backward takes: ds, and the parts of da or db.
int64_t lora_workspace(int64_t M, int64_t N, int64_t K, int64_t R);

void lora_backward(const void* dy, const void* x, const void* a, const void* b, const float* s, void* dx0, void* da,
                   void* db, float* workspace, int64_t M, int64_t N, int64_t K, int64_t R, int64_t dy_row,
                   int64_t x_row, float scale, double dropout_p, const int64_t* seed, int dtype, int adapter_dtype,
                   void* stream);

}  // namespace fusetune::cuda
