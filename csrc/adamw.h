// AdamW step over many tensors at once (Loshchilov & Hutter, "Decoupled weight decay regularization",
// arXiv 1711.05101, algorithm 2), in the arithmetic of torch.optim.AdamW(fused=True).
//
// Per tensor, with t its step count after this step, and scalars computed in double and rounded once:
//
//   g  = grad / grad_scale min(1, max_grad_norm / (grad_norm + 1e-6)), negated with maximize
//   p  = p (1 - lr weight_decay)
//   m  = fma(1 - beta1, g - m, m), or where 1 - beta1 >= 1/2, from the nearer end, fma(-beta1, g - m, g)
//   v  = fma((1 - beta2) g, g, v beta2)
//   v' = max(v', v) with amsgrad, else v
//   p  = p + (-lr / (1 - beta1^t)) m / (sqrt(v') / sqrt(1 - beta2^t) + eps)
//
// Where p, m and v are all float32 and plain, that is torch's step bit by bit; elsewhere sqrt(v') is multiplied by the
// reciprocal 1 / sqrt(1 - beta2^t), rounded once, as divisions are what a step takes longest for.
//
// Arithmetic is float32 whatever the storage. grad is stored as p is; it is read only. p, m, v, v' and the step count are
// updated in place. What is stored with 16 bits is rounded to nearest even, but for:
//
//   stochastic rounding   What is stored as bfloat16 is (bits + r) >> 16, bits those of the float32 and r 16 random ones:
//                         of element i of tensor k (0: p, 1: m, 2: v, 3: v') the piece of philox.h with seed the row's
//                         key, row k 2^56 + t and col i. So it is up with the probability of the part cut off, and does
//                         not depend on thread, chunk or device. NaN stays NaN.
//   master weights        p is computed in float32 from a float32 copy of it, and stored there and, rounded, in p.
//   split weights         The same 32 bits in 16 + 16: p is the upper half of (bits + 0x8000), so the nearest bfloat16
//                         (ties away from 0), and `wide` the lower half of bits. bits = (p << 16) + (int16)wide.
//
// 8-bit m and v (Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861; the codes, maps and
// blocks of bitsandbytes): 256 neighbouring elements have one float32 absmax, the largest |value| of theirs, and a code
// each, the index of the map's value nearest to value / absmax:
//
//   unsigned map, of v:  code 0 is 0, code 255 is 1; else with code + 1 = 2^(d+1) + j, 0 <= j < 2^(d+1):
//                        10^(d-6) (0.1 + 0.9 (j + 1/2) / 2^(d+1))
//   signed map, of m:    code 127 is 0, code 255 is 1; else with |code - 127| = 2^d + j, 0 <= j < 2^d:
//                        +-10^(d-6) (0.1 + 0.9 (j + 1/2) / 2^d)
//
// Values may be computed by these formulas or read from a table of them: they differ by roundings, and a value within a
// rounding of the middle of two codes may take either. p is updated from m and v before they are quantised. An m or v
// that is not finite is stored as 0 and left out of absmax: it spoils its own parameter, as it would in float32, and not
// the block's. There is no v' with 8 bits.
//
// Cost in bytes a parameter, p and grad float32 / bfloat16: 28 / 22 with float32 m and v, 20 / 14 with bfloat16, 16 / 10
// with 8 bits; v' adds twice its size, a master 8, split weights 4, the norm one reading of grad. Floor: those bytes over
// the stream rate.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// The table of tensors, int64 [kAdamwColumns, rows]: column c of row r is table[c rows + r].
enum AdamwColumn {
  kParam,     // addresses of p,
  kGrad,      // grad,
  kExpAvg,    // m,
  kExpAvgSq,  // v,
  kMaxSq,     // v' (0 without amsgrad),
  kStep,      // the float32 step count,
  kWide,      // the float32 copy of p, or the uint16 lower halves (else 0),
  kAbsmax,    // the absmax of m's blocks and
  kAbsmaxSq,  // of v's (0 but with 8 bits), and
  kLr,        // a float32 lr that stands for that of the hyper-parameters (0: none; the CPU's launchers do not look)
  kNumel,     // elements of p, grad, m, v, v', wide, which lie in the same order
  kFormat,    // adamw_format
  kGroup,     // row of the hyper-parameters
  kKey,       // of stochastic rounding
  kAdamwColumns
};

// Of a row: how p is kept, its dtype, and that of m, v and v'.
enum AdamwWeights { kPlain, kStochastic, kMaster, kSplit };
constexpr int kInt8 = 3;  // a state "dtype" beside those of dtype.h
constexpr int kQuantBlock = 256;
FUSETUNE_HOST_DEVICE constexpr int adamw_format(int param_dtype, int state_dtype, int weights) {
  return param_dtype | state_dtype << 4 | weights << 8;
}
// Those that there are: p of any dtype with m and v of its own, float32, bfloat16 or 8 bits; kMaster with p of 16 bits;
// kStochastic and kSplit with p in bfloat16. m and v of float16 only with p of float16.

// The hyper-parameters of each parameter group, float64 [groups, kAdamwHypers].
enum AdamwHyper { kLearningRate, kBeta1, kBeta2, kEps, kWeightDecay, kMaximize, kAdamwHypers };

// What a step of one tensor multiplies by: computed in double, rounded once.
struct alignas(64) AdamwScalars {
  float decay, lerp, beta2, beta2_complement, sqrt_bias2, inverse_sqrt_bias2, eps, negative_step_size, sign, grad_scale,
      clip;
  bool lerp_from_grad;  // the nearer end of the interpolation
};

// Of a tensor whose step count is `step` after this step; grad_scale and grad_norm may be null. `clip` rounds as
// torch.nn.utils.clip_grad_norm_ does. Static: each ISA level has its own.
FUSETUNE_HOST_DEVICE static inline AdamwScalars adamw_scalars(const double* hyper, double lr, double step,
                                                              const float* grad_scale, const float* grad_norm,
                                                              float max_grad_norm) {
  const double bias1 = 1 - pow(hyper[kBeta1], step), bias2 = 1 - pow(hyper[kBeta2], step);
  const float weight = (float)(1 - hyper[kBeta1]);
  float clip = 1;
  if (grad_norm) {
    clip = 1 / (*grad_norm + 1e-6f) * max_grad_norm;
    if (clip > 1) clip = 1;  // and a NaN stays
  }
  return {
      (float)(1 - lr * hyper[kWeightDecay]),
      weight < 0.5f ? weight : weight - 1,
      (float)hyper[kBeta2],
      (float)(1 - hyper[kBeta2]),
      (float)sqrt(bias2),
      (float)(1 / sqrt(bias2)),
      (float)hyper[kEps],
      (float)(-(lr / bias1)),
      hyper[kMaximize] ? -1.0f : 1.0f,
      grad_scale ? *grad_scale : 1.0f,
      clip,
      !(weight < 0.5f),
  };
}

// The 8-bit maps as lines. Of a code, f = code + 1 (the unsigned map) or |code - 127| (the signed one) is 2^i + j: its
// exponent is the decade, its fraction the place in it. So value = slope f + offset with two constants of the exponent, and
// f from value is the same line the other way, whose piece (zero, a decade or 1) one comparison finds: between two
// neighbouring powers of two no two pieces begin. kFirst is f of the first code of decade 0: 2 of the unsigned map, 1 of
// the signed one. In each translation unit anew, as each ISA level has its own.
namespace {
template <int kFirst>
struct AdamwCodes {
  static constexpr int kDecades = 7;
  static constexpr int kOne = kDecades + 1;  // the last piece, 1; piece 0 is 0, piece d + 1 is decade d

  // value / absmax = slope f + offset, by the lowest 4 bits of f's exponent: 15 for 1, i for 2^(i + 1)
  alignas(64) float slope[16], offset[16];
  // f = min(round(inverse_slope x + inverse_offset), last) of x = value / absmax, by piece;
  alignas(64) float inverse_slope[16], inverse_offset[16], last[16];
  // by the lowest 5 bits of x's exponent, from where on it is the next piece after that of the power of two itself; the
  // latter is in the lowest 4 bits, for which the float is rounded to the nearest that has them (by 2^-21 at most)
  alignas(64) float next[32];

  static AdamwCodes make() {
    AdamwCodes t = {};
    double begin[kOne + 1] = {}, last_value = 0;
    double top = 1e-6;  // of the decade
    t.last[0] = t.inverse_offset[0] = kFirst - 1;
    for (int p = 1; p <= kDecades; p++, top *= 10) {
      const int count = kFirst << (p - 1), exponent = p - 3 + kFirst;
      t.slope[exponent & 15] = (float)(0.9 * top / count);
      t.offset[exponent & 15] = (float)(top * (0.45 / count - 0.8));
      t.inverse_slope[p] = (float)(count / (0.9 * top));
      t.inverse_offset[p] = (float)(count * 8 / 9.0 - 0.5);
      t.last[p] = 2 * count - 1;
      begin[p] = (last_value + top * (0.1 + 0.45 / count)) / 2;
      last_value = top * (1 - 0.45 / count);
    }
    t.offset[kDecades - 1 + kFirst - 1] = 1;
    begin[kOne] = (last_value + 1) / 2;
    t.last[kOne] = t.inverse_offset[kOne] = kFirst << kDecades;
    double power = 1;
    for (int exponent = 127; exponent > 127 - 24; exponent--, power /= 2) {
      int p = 0;
      while (p < kOne && begin[p + 1] <= power) p++;
      const float next = p < kOne ? (float)begin[p + 1] : 2;
      int32_t bits;
      memcpy(&bits, &next, 4);
      bits = (bits - p + 8) / 16 * 16 + p;
      memcpy(&t.next[exponent & 31], &bits, 4);
    }
    return t;
  }
};
}  // namespace

namespace cpu {

using AdamwStep = void(const int64_t* table, int64_t rows, const double* hypers,
                       const float* grad_scale,  // or null
                       const float* found_inf,   // nothing is updated where this is not 0; or null
                       const float* grad_norm,   // of all gradients over grad_scale; null: no clipping
                       float max_grad_norm, int threads);
FUSETUNE_LAUNCHER(AdamwStep, adamw_step)

// *norm = the 2-norm of all gradients of the table, over *grad_scale where that is not null. Squares are summed in
// double, in an order that depends on the table alone: the bits are those of any thread count and ISA level.
using AdamwGradNorm = void(const int64_t* table, int64_t rows, const float* grad_scale, float* norm, int threads);
FUSETUNE_LAUNCHER(AdamwGradNorm, adamw_grad_norm)

}  // namespace cpu

namespace cuda {

// As above; all pointers are to device memory. Nothing synchronises, and all is capturable. Scalars that must be on the
// device by then (step counts, lr, grad_scale, found_inf, grad_norm) are read there.
void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, const float* grad_norm, float max_grad_norm,
                AdamwScalars* workspace,  // [rows]
                void* stream);
void adamw_grad_norm(const int64_t* table, int64_t rows, const float* grad_scale, float* norm,
                     double* workspace,  // [adamw_grad_norm_workspace()]
                     void* stream);
int64_t adamw_grad_norm_workspace();

}  // namespace cuda
}  // namespace fusetune
