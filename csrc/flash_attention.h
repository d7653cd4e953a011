// Scaled dot-product attention with online softmax and a recomputing backward (Dao, "FlashAttention-2",
// arXiv 2307.08691, algorithms 1 and 2): nothing of size [Sq, Sk] is stored, the dropout mask included.
//
//   t   = softcap tanh(scale q k^T / softcap)                 without a softcap, scale q k^T
//   s   = t + bias + relative                                 -inf where query i does not see key j
//   lse = log(sum_j exp(s) + exp(sink))                       without sinks, the sum alone
//   P   = exp(s - lse)                                        o = (P . Z) v
//
// with Z the dropout mask of philox.h, its kept elements scaled by 1/(1 - p), and backward, for the gradients do of o
// and dlse of lse:
//
//   D  = rowsum(do . o) - dlse                   dP = Z . (do v^T)
//   ds = P . (dP - D)                            dv = (P . Z)^T do
//   dt = ds . (1 - (t / softcap)^2)              dq = scale dt k            dk = scale dt^T q
//   dbias, drelative = sums of ds                dsink = -sum_i exp(sink - lse_i) D_i
//
// q, dq [B, H, Sq, D]; k, dk [B, Hkv, Sk, D]; v, dv [B, Hkv, Sk, Dv]; o, do [B, H, Sq, Dv], with H a multiple of Hkv:
// query head h reads key head h / (H / Hkv). Any strides with neighbouring elements in the last dimension.
//
// Who sees whom. Query i stands at position i + Sk - Sq among the keys (aligned at the bottom right), or at i (top left).
// It sees key j if position - left <= j <= position + right (causal is right = 0), keep[b, j], and mask[b, h, i, j]. A
// query that sees none and has no sink has o = 0, lse = -inf and takes no part in the gradients; one whose s is -inf
// everywhere is such a query too. One that large finite numbers hide from all keys averages them, as their sum has it;
// where lse < kHidden, float32 holds lse too coarsely for P, and the query takes no part in the gradients either.
//
// Packed sequences. With q_starts and k_starts, [members + 1] and never decreasing, member m is the queries
// q_starts[m] .. q_starts[m + 1] and the keys likewise, each with positions of its own; B is 1, Sq and Sk are the
// packed totals, and keep, mask and bias are null. Nothing of tokens outside of all members is written.
//
// Dropout's row (philox.h) is (b H + h) << 32 | i and its column j, where of packed sequences b is the member, and i
// and j are counted within it.
//
// Arithmetic is float32, products of 16-bit tensors with operands rounded to their type (P and dt among them) and
// float32 sums; outputs are rounded once. Results do not depend on the number of threads.
//
// Cost: forward 4, backward 10 B H Sq Sk D flops (half with causal), and one exp an element of P in each. What no query
// sees is not computed where whole blocks can be left out: causal, windows, keys that are not kept, and in backward
// queries whose do and dlse are 0.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// Elements between neighbours in the batch, head and sequence dimensions.
struct Strides {
  int64_t b, h, s;
};
// The same for [B, H, Sq, Sk], 0 where it is broadcast.
struct MaskStrides {
  int64_t b, h, q, k;
};

constexpr float kHidden = -1e5f;

// The arguments of a call; forward reads none of the last block. Null stands for what is absent.
struct FlashAttention {
  const void *q, *k, *v;
  void* o;
  float* lse;  // [B, H, Sq]
  Strides q_stride, k_stride, v_stride, o_stride;
  int64_t B, H, Hkv, Sq, Sk, D, Dv;
  int dtype;
  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // -1: unbounded
  bool top_left;

  const uint8_t* keep;  // [B, Sk] rows keep_row apart
  int64_t keep_row;
  const uint8_t* mask;
  MaskStrides mask_stride;
  const void* bias;
  int bias_dtype;
  MaskStrides bias_stride;
  const float* relative;  // [H, 2 N - 1]: entry N - 1 + d is added where j - position = d; N >= max(Sq, Sk)
  int64_t N;
  const float* sinks;  // [H]
  const int32_t *q_starts, *k_starts;
  int64_t members;

  double dropout_p;
  uint64_t seed;             // on the CPU its value ...
  const int64_t* seed_cell;  // ... on a GPU where it lies

  const void* grad_o;
  Strides grad_o_stride;
  const float* grad_lse;  // [B, H, Sq]
  void *dq, *dk, *dv;
  Strides dq_stride, dk_stride, dv_stride;
  float* dbias;  // float32, of the shape that bias has unbroadcast, zeroed by the caller
  MaskStrides dbias_stride;
  float* drelative;  // [H, 2 N - 1]
  float* dsinks;     // [H]
  float* workspace;  // [B, H, Sq, 2], on a GPU
};

}  // namespace fusetune

namespace fusetune::cpu {

using FlashAttentionLauncher = void(const FlashAttention& call, int threads);
FUSETUNE_LAUNCHER(FlashAttentionLauncher, flash_attention_forward)
FUSETUNE_LAUNCHER(FlashAttentionLauncher, flash_attention_backward)

}  // namespace fusetune::cpu

namespace fusetune::cuda {

// On tensor cores of sm_80: bfloat16 and float16, D and Dv multiples of 8 up to 128, scale > 0, and rows at multiples of
// 16 bytes. mask, bias, relative, sinks and softcap are not read. kernels/flash_attention.py has the rest.
void flash_attention_forward(const FlashAttention& call, void* stream);
void flash_attention_backward(const FlashAttention& call, void* stream);

// On Hopper GPUs: 16-bit tensors with D = Dv of 64 or 128, all sizes at least 1, addresses and strides of multiples of 16
// bytes, scale > 0; left -1, right -1 or 0; nothing of softcap, keep, mask, bias, relative, sinks, members and dropout.
void flash_attention_sm90_forward(const FlashAttention& call, void* stream);
// Floats of the workspace of backward, whose address is a multiple of 8 bytes.
int64_t flash_attention_sm90_workspace(int64_t B, int64_t H, int64_t Sq);
void flash_attention_sm90_backward(const FlashAttention& call, float* workspace, void* stream);

}  // namespace fusetune::cuda
