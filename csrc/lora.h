// LoRA linear (Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685, section 4.1), for
// projections P that share their input, such as query, key and value, each with the sum of its adapters j:
//
//   y_P  = x w_P^T + bias_P + sum over j of P:  scale_j s_j b_j^T          s_j = (x . D_j) a_j^T
//
// with x [M, K], w [N, K] frozen, a [R, K], b [N, R], s [M, R] and D the adapter's dropout mask of philox.h, its kept
// elements scaled by 1/(1 - p); `.` is elementwise. The large products with w are the vendor's, called from Python,
// which lets them accumulate onto what the launchers here write first:
//
//   forward    y0_P = bias_P + sum_j scale_j s_j b_j^T            then  y_P = y0_P + x w_P^T
//   backward   dx0  = sum_j (ds_j a_j) . D_j                      then  dx  = dx0 + sum_P dy_P w_P
//                     ds_j = scale_j dy_P b_j  [M, R]
//              da_j = ds_j^T (x . D_j)         [R, K]
//              db_j = scale_j dy_P^T s_j       [N, R]
//
// Neither D nor x . D is stored: backward recomputes them from the seed. All arithmetic is float32; a tensor's storage
// type is rounded to once, when it is written (in CUDA, dx0 once for each mask). But where the machine multiplies 16-bit matrices, adapters of such a type,
// or those that may be rounded to it, have s and ds rounded too; float16 must hold them then.
//
// Cost beyond the frozen layers: 6 M R (K + N) flops an adapter; read x twice, each dy once, write each y0 and dx0 once.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// The adapters, int64 [adapters, kLoraAdapterColumns], in the order of their projections.
enum LoraAdapterColumn {
  kA,   // addresses of a,
  kB,   // b,
  kDa,  // and in backward of da
  kDb,  // and db, or 0 where they are not wanted
  kRank,
  kProjection,  // its row in the table of projections
  kSeed,        // of its mask
  kLoraAdapterColumns
};

// Their numbers, float64 [adapters, kLoraFactors].
enum LoraFactor { kScale, kDropout, kLoraFactors };

// The projections, int64 [projections, kLoraProjectionColumns].
enum LoraProjectionColumn {
  kFeatures,  // N
  kY,         // address of y0 [M, N], or in backward of dy, rows kYRow elements apart
  kYRow,
  kBias,  // address of bias [N], or 0
  kBiasDtype,
  kLoraProjectionColumns
};

namespace cpu {

using LoraForward = void(const void* x,  // [M, K], rows x_row elements apart
                         float* s,       // [M, sum of R] out: the adapters side by side
                         const int64_t* adapters, const double* factors, int64_t adapter_count,
                         const int64_t* projections, int64_t projection_count, int64_t M, int64_t K, int64_t x_row,
                         int dtype,          // of x
                         int adapter_dtype,  // of every a and b
                         int y_dtype,
                         bool fast,  // whether adapters may be rounded to dtype
                         int threads);
FUSETUNE_LAUNCHER(LoraForward, lora_forward)

using LoraBackward = void(const void* x, const float* s,
                          void* dx0,  // [M, K] out, or null; not written without adapters
                          const int64_t* adapters, const double* factors, int64_t adapter_count,
                          const int64_t* projections, int64_t projection_count, int64_t M, int64_t K, int64_t x_row,
                          int dtype,          // of x and dy
                          int adapter_dtype,  // of every a, b, da, db
                          int dx_dtype, bool fast, int threads);
FUSETUNE_LAUNCHER(LoraBackward, lora_backward)

}  // namespace cpu
}  // namespace fusetune

// The products of which GPUs make both passes, with D as above; kernels/lora.py has the same. There the vendor's products
// come first, and lora_up accumulates onto them. `factor` multiplies the product, as does the factor of kept elements
// where there is dropout.
//
// A stack of adapters that share x has one call: w is theirs, one below another, and t or out theirs side by side. With
// dropout it is cut into `masks` equal runs of ranks, and the i-th has the mask of seed[i]; without, seed is not read.
namespace fusetune::cuda {

// out = factor (t . D) w^T
void lora_down(const void* t,  // [M, C], rows t_row elements apart
               const void* w,  // [R, C], of strides w_rank and w_col, one of which is 1
               float* out,     // [M, R], rows out_row elements apart
               int64_t M, int64_t C, int64_t R, int64_t t_row, int64_t w_rank, int64_t w_col, int64_t out_row,
               float factor, double dropout_p,
               const int64_t* seed,  // [masks] on the device
               int64_t masks,
               int dtype,    // of t
               int w_dtype,  // dtype or float32: in it the product is taken
               void* stream);

// out = bias + factor (t w) . D, added to what out holds where `accumulate`
void lora_up(const float* t,    // [M, R], rows t_row elements apart
             const void* w,     // [R, C], as above
             const void* bias,  // [C], or null
             void* out,         // [M, C], rows out_row elements apart
             int64_t M, int64_t C, int64_t R, int64_t t_row, int64_t w_rank, int64_t w_col, int64_t out_row,
             float factor, double dropout_p, const int64_t* seed, int64_t masks, bool accumulate,
             int dtype,                    // of out
             int w_dtype, int bias_dtype,  // each dtype or float32
             void* stream);

// Floats of the workspace that lora_outer takes: the sums over parts of the rows.
int64_t lora_outer_workspace(int64_t M, int64_t C, int64_t R, double dropout_p, int64_t masks);

// out = factor t^T (u . D)
void lora_outer(const float* t,  // [M, R], rows t_row elements apart
                const void* u,   // [M, C], rows u_row elements apart
                void* out,       // [R, C], of strides out_rank and out_col
                float* workspace, int64_t M, int64_t C, int64_t R, int64_t t_row, int64_t u_row, int64_t out_rank,
                int64_t out_col, float factor, double dropout_p, const int64_t* seed, int64_t masks,
                int dtype,                     // of u
                int dot_dtype, int out_dtype,  // each dtype or float32; the product is taken in dot_dtype
                void* stream);

}  // namespace fusetune::cuda
