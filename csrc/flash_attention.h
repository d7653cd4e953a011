// Scaled dot-product attention with online softmax and a recomputing backward (Dao, "FlashAttention-2",
// arXiv 2307.08691, algorithms 1 and 2): nothing of size [Sq, Sk] is stored, the dropout mask included.
//
//   P   = softmax(scale q k^T, over the keys that a query sees)        o  = (P . Z) v
//   lse = log(sum(exp(scale q k^T)))
//
// with Z the dropout mask of philox.h, its kept elements scaled by 1/(1 - p), and backward, for the gradient do:
//
//   D  = rowsum(do . o)                          dP = Z . (do v^T)
//   dS = P . (dP - D)                            dv = (P . Z)^T do
//   dq = scale dS k                              dk = scale dS^T q
//
// q, o, do, dq [B, H, Sq, D]; k, v, dk, dv [B, Hkv, Sk, D] with H a multiple of Hkv: query head h reads key head
// h / (H / Hkv). Any strides with neighbouring elements in the last dimension. A query sees key j if keep[b, j] and,
// with causal, j <= i + Sk - Sq (aligned at the bottom right). A query that sees none has o = 0, lse = -inf and takes no
// part in the gradients.
//
// Keys that are not kept are left out when k and v are packed, so that padding costs nothing, wherever it is; what a
// query sees is then a prefix of the packed keys. Arithmetic is float32; outputs are rounded once.
//
// Cost: forward 4, backward 10 B H Sq Sk D flops (half with causal), and one exp an element of P in each.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "dtype.h"

namespace fusetune {

// Elements between neighbours in the batch, head and sequence dimensions.
struct Strides {
  int64_t b, h, s;
};

}  // namespace fusetune

namespace fusetune::cpu {

using FlashAttentionForward = void(const void* q, const void* k, const void* v,
                                   const uint8_t* keep,  // [B, Sk] rows keep_row apart, or null: all keys
                                   void* o,
                                   float* lse,  // [B, H, Sq]
                                   int64_t B, int64_t H, int64_t Hkv, int64_t Sq, int64_t Sk, int64_t D,
                                   const int64_t* strides,  // of q, k, v, o: [4, 3]
                                   int64_t keep_row, float scale, bool causal, double dropout_p, uint64_t seed,
                                   int dtype, int threads);
FUSETUNE_LAUNCHER(FlashAttentionForward, flash_attention_forward)

using FlashAttentionBackward = void(const void* grad_o, const void* q, const void* k, const void* v,
                                    const uint8_t* keep, const void* o, const float* lse, void* dq, void* dk, void* dv,
                                    int64_t B, int64_t H, int64_t Hkv, int64_t Sq, int64_t Sk, int64_t D,
                                    const int64_t* strides,  // of do, q, k, v, o, dq, dk, dv: [8, 3]
                                    int64_t keep_row, float scale, bool causal, double dropout_p, uint64_t seed,
                                    int dtype, int threads);
FUSETUNE_LAUNCHER(FlashAttentionBackward, flash_attention_backward)

}  // namespace fusetune::cpu
