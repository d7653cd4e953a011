// What the attention kernels share (csrc/flash_attention.h): which part of a call a block works on, who sees whom, which
// keys are kept, and dropout in the registers of a product.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../flash_attention.h"
#include "block.cuh"
#include "philox.cuh"

namespace fusetune::cuda {

constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of kRows of the `tokens` that one head has. Member m of packed sequences has those from starts[m] / kRows + m
// on: at least as many as its tokens need, and no table of where they begin; what is left over finds no rows.
template <int kRows>
__host__ __device__ int64_t blocks_of_head(const FlashAttention& call, int64_t tokens) {
  if (!call.q_starts) return ceil_div(tokens, kRows);
  return call.members ? tokens / kRows + call.members : 0;
}

// Rows of one head of one sequence, which is one of the batch or a member of the packed ones.
struct Part {
  int b, head;   // of the tensors
  int sequence;  // b or the member: of dropout's row
  int q0, k0;    // tokens before those of the sequence
  int Sq, Sk;
  int first;  // row

  // The part of block `index`, kRows of the `tokens` queries or keys of which `starts` are the members' first.
  template <int kRows>
  __device__ static Part find(const FlashAttention& call, int64_t index, int64_t heads, int64_t tokens,
                              const int32_t* starts) {
    const int blocks = (int)blocks_of_head<kRows>(call, tokens), block = (int)(index % blocks);
    const int head = (int)(index / blocks % heads), b = (int)(index / blocks / heads);
    if (!call.q_starts) return {b, head, b, 0, 0, (int)call.Sq, (int)call.Sk, block * kRows};
    int member = 0, end = (int)call.members;  // the last one that begins at `block` or before lies in [member, end)
    while (end - member > 1) {
      const int middle = (member + end) / 2;
      (starts[middle] / kRows + middle <= block ? member : end) = middle;
    }
    const int32_t *q = call.q_starts + member, *k = call.k_starts + member;
    const int first = (block - starts[member] / kRows - member) * kRows;
    return {b, head, member, q[0], k[0], q[1] - q[0], k[1] - k[0], first};
  }
};

// The pairs of a query i and a key j with low <= j - i <= high.
struct Band {
  int low, high;

  __device__ static Band of(const FlashAttention& call, const Part& part) {
    constexpr int64_t kFar = 1 << 29;  // sequences are shorter
    const int64_t shift = call.top_left ? 0 : part.Sk - part.Sq;
    return {(int)(call.left < 0 ? -kFar : max(shift - call.left, -kFar)),
            (int)(call.right < 0 ? kFar : min(shift + call.right, kFar))};
  }
  __device__ bool has(int i, int j) const { return low <= j - i && j - i <= high; }
  // Whether all of queries [i0, i0 + rows) see all of keys [j0, j0 + columns).
  __device__ bool covers(int i0, int rows, int j0, int columns) const {
    return low <= j0 - (i0 + rows - 1) && j0 + columns - 1 - i0 <= high;
  }
  // The keys [first, end) outside of which queries [i0, i1) see none, and the queries that see none of [j0, j1).
  __device__ int first_key(int i0) const { return max(0, i0 + low); }
  __device__ int end_key(int i1, int Sk) const { return min(Sk, i1 + high); }
  __device__ int first_query(int j0) const { return max(0, j0 - high); }
  __device__ int end_query(int j1, int Sq) const { return min(Sq, j1 - low); }
};

// Keys [first, first + 64) of a sequence and which of them are kept: bit j is of key first + j.
struct Keys {
  int first;
  uint64_t kept;

  __device__ bool has(int j) const { return kept >> j & 1; }

  // The first ones from `first` on, in steps of kKeys, of which some before `end` are kept; else kept is 0. For all lanes
  // of a warp.
  template <int kKeys>
  __device__ static Keys find(const uint8_t* keep, int first, int end) {
    static_assert(kKeys == 32 || kKeys == 64);
    const int lane = threadIdx.x % kWarpSize;
    for (; first < end; first += kKeys) {
      const auto kept = [&](int j) { return __ballot_sync(kFullWarp, j < end && (!keep || keep[j])); };
      uint64_t bits = kept(first + lane);
      if (kKeys == 64) bits |= (uint64_t)kept(first + kWarpSize + lane) << kWarpSize;
      if (bits) return {first, bits};
    }
    return {first, 0};
  }
};

// use(row, column, element) for the elements of sums that this lane has (mma.cuh).
template <int kE, int kF, class Use>
__device__ void each(float (&sums)[kE][kF][4], Use use) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int e = 0; e < kE; e++)
#pragma unroll
    for (int f = 0; f < kF; f++)
#pragma unroll
      for (int n = 0; n < 4; n++) use(16 * e + lane / 4 + n / 2 * 8, 8 * f + lane % 4 * 2 + n % 2, sums[e][f][n]);
}

// Dropout of a product whose rows are queries and whose columns are keys. One counter decides on 8 keys of 128: what a
// lane has made serves it until the next 128.
template <int kE>
struct KeptInRows {
  uint32_t bits[kE][2];  // byte c, bit j: of column 8 (c / 2) + 2 (lane % 4) + c % 2 + 16 j of the 128
  int group = -1;

  __device__ void make(const Dropout& dropout, uint64_t row0, int key) {
    if (key / kMaskGroup == group) return;
    group = key / kMaskGroup;
    const uint64_t seed = (uint64_t)*dropout.seed;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        bits[e][h] = 0;
#pragma unroll 1
        for (int c = 0; c < 4; c++) {
          const uint32_t counter = 16 * group + c / 2 * 8 + lane % 4 * 2 + c % 2;
          const uint64_t row = row0 + 16 * e + 8 * h + lane / 4;
          bits[e][h] |= (uint32_t)keep_bits(seed, row, counter, dropout.threshold) << (8 * c);
        }
      }
  }
  // sums, of columns from `key` on, times the mask, whose kept elements are `scale`.
  template <int kF>
  __device__ void apply(float (&sums)[kE][kF][4], int key, float scale) const {
    const int first = key % kMaskGroup / 16;
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int f = 0; f < kF; f++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const uint32_t kept = bits[e][n / 2] >> first >> (f % 2 * 16 + n % 2 * 8 + f / 2) & 1;
          sums[e][f][n] = kept ? sums[e][f][n] * scale : 0;
        }
  }
};

// Dropout of a product whose rows are keys and whose columns are queries, in shared memory: the 16 keys of a warp take
// one bit of each byte.
template <int kQueries>
struct KeptInColumns {
  uint8_t at[16][kQueries + 8];  // [c, i], bit j: of key c + 16 j of the 128. Eight rows lie in different banks

  // By all threads, between barriers.
  __device__ void make(const Dropout& dropout, uint64_t row0, int key) {
    const uint64_t seed = (uint64_t)*dropout.seed;
    for (int n = threadIdx.x; n < 16 * kQueries; n += blockDim.x)
      at[n % 16][n / 16] = keep_bits(seed, row0 + n / 16, key / kMaskGroup * 16 + n % 16, dropout.threshold);
  }
  // Of the rows from `key` on, what this lane has: bit 4 f + n is of element [f][n].
  __device__ uint32_t of_lane(int key) const {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kQueries / 2; i++) {
      const uint32_t byte = at[lane / 4 + i / 2 % 2 * 8][8 * (i / 4) + lane % 4 * 2 + i % 2];
      bits |= (byte >> (key % kMaskGroup / 16) & 1) << i;
    }
    return bits;
  }
};

// The row of query i of dropout (philox.h).
__device__ inline uint64_t dropout_row(const FlashAttention& call, int64_t sequence, int64_t head, int i) {
  return (uint64_t)(sequence * call.H + head) << 32 | (uint32_t)i;
}

}  // namespace fusetune::cuda
