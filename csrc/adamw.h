// AdamW step over many tensors at once (Loshchilov & Hutter, "Decoupled weight decay regularization",
// arXiv 1711.05101, algorithm 2), in the arithmetic of torch.optim.AdamW(fused=True).
//
// Per tensor, with t its step count after this step, and scalars computed in double and rounded once:
//
//   g  = grad / grad_scale, negated with maximize
//   p  = p (1 - lr weight_decay)
//   m  = fma(1 - beta1, g - m, m), or where 1 - beta1 >= 1/2, from the nearer end, fma(-beta1, g - m, g)
//   v  = fma((1 - beta2) g, g, v beta2)
//   v' = max(v', v) with amsgrad, else v
//   p  = p + (-lr / (1 - beta1^t)) m / (sqrt(v') / sqrt(1 - beta2^t) + eps)
//
// Arithmetic is float32 whatever the storage type of p, grad, m, v, v' (one type per tensor); results are rounded to
// nearest even. p, m, v, v' and the step count are updated in place; grad is read only.
//
// Cost: 28 bytes a parameter in float32 (read p g m v, write p m v), 14 in bfloat16; with amsgrad 36 and 18.
// Floor: those bytes over the stream rate.
#pragma once

#include <math.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// The table of tensors, int64 [rows, kAdamwColumns].
enum AdamwColumn {
  kParam,     // addresses of p,
  kGrad,      // grad,
  kExpAvg,    // m,
  kExpAvgSq,  // v,
  kMaxSq,     // v' (0 without amsgrad) and
  kStep,      // the float32 step count
  kNumel,     // elements of p, grad, m, v, v', which lie in the same order
  kDtype,
  kGroup,  // row of the hyper-parameters
  kAdamwColumns
};

// The hyper-parameters of each parameter group, float64 [groups, kAdamwHypers].
enum AdamwHyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kMaximize, kAdamwHypers };

// What a step of one tensor multiplies by: computed in double, rounded once.
struct AdamwScalars {
  float decay, lerp, beta2, beta2_complement, sqrt_bias2, eps, negative_step_size, sign, grad_scale;
  bool lerp_from_grad;  // the nearer end of the interpolation
};

// Of a tensor whose step count is `step` after this step; grad_scale may be null. Static: each ISA level has its own.
FUSETUNE_HOST_DEVICE static inline AdamwScalars adamw_scalars(const double* hyper, double step,
                                                              const float* grad_scale) {
  const double bias1 = 1 - pow(hyper[kBeta1], step), bias2 = 1 - pow(hyper[kBeta2], step);
  const float weight = (float)(1 - hyper[kBeta1]);
  return {
      (float)(1 - hyper[kLr] * hyper[kWeightDecay]),
      weight < 0.5f ? weight : weight - 1,
      (float)hyper[kBeta2],
      (float)(1 - hyper[kBeta2]),
      (float)sqrt(bias2),
      (float)hyper[kEps],
      (float)(-(hyper[kLr] / bias1)),
      hyper[kMaximize] ? -1.0f : 1.0f,
      grad_scale ? *grad_scale : 1.0f,
      !(weight < 0.5f),
  };
}

namespace cpu {

using AdamwStep = void(const int64_t* table, int64_t rows, const double* hypers,
                       const float* grad_scale,  // or null
                       const float* found_inf,   // nothing is updated where this is not 0; or null
                       int threads);
FUSETUNE_LAUNCHER(AdamwStep, adamw_step)

}  // namespace cpu

namespace cuda {

// As above; all pointers are to device memory.
void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, void* stream);

}  // namespace cuda
}  // namespace fusetune
