// What forward and backward of flash_attention_sm90.cu share: the rows that a block works on, and their way between global
// memory, shared memory and the registers of products.
#pragma once

#include "../flash_attention.h"
#include "block.cuh"
#include "launch.h"
#include "wgmma.cuh"

namespace fusetune::cuda {

namespace {

constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kRows = 64;      // of each: a product's height
constexpr int kBlockRows = kConsumers * kRows;
constexpr int kKeys = 128;  // of a tile in forward
constexpr int kStages = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kConsumerWarps = kConsumerThreads / kWarpSize;
// Of a thread of 65536 registers: 168 at the start; then few for the warpgroup that copies, and what that frees.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int64_t kSectionBytes = 24 << 20;  // of 50 MiB of cache
constexpr float kLog2e = 1.44269504f;
// Numbered barriers of each consumer.
constexpr int kTurn = 1, kTogether = kTurn + kConsumers;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- What a block works on ------------------------------------------------------------------------------------------

struct Problem {
  int64_t B, H, Hkv, Sq, Sk;
  int64_t shift;  // query i sees the keys up to i + shift
  float scale;
  float* lse;                               // [B, H, Sq]
  float *lse2 = nullptr, *delta = nullptr;  // of backward, [B, H, padded]: lse log2(e), or inf where nothing is seen; D
  int64_t heads = 0, section = 0;           // all heads whose rows blocks work on, and how many of them are a section
  int64_t rows = 0;                         // of each
  bool last_first = false;                  // the order of their blocks

  __host__ __device__ int64_t padded() const { return ceil_div(Sq, kBlockRows) * kBlockRows; }
  // How many keys query i sees: the first so many.
  __device__ int seen(int i) const { return (int)max((int64_t)0, min(Sk, i + shift + 1)); }
};

// The rows of a block.
struct Block {
  int b, h, first;

  __device__ Block(const Problem& problem, int64_t heads_of_batch) {
    const int64_t blocks = ceil_div(problem.rows, kBlockRows), per_section = problem.section * blocks;
    const int64_t begin = blockIdx.x / per_section * problem.section, within = blockIdx.x % per_section;
    const int64_t heads = min(problem.section, problem.heads - begin);
    const int64_t head = begin + within % heads, block = within / heads;
    b = (int)(head / heads_of_batch);
    h = (int)(head % heads_of_batch);
    first = (int)((problem.last_first ? blocks - 1 - block : block) * kBlockRows);
  }
};

// The place of the n-th tile among the stages, and how often that has been filled before, as a parity.
__device__ int stage_of(int n) { return n % kStages; }
__device__ uint32_t parity_of(int n) { return n / kStages % 2; }

// --- Rows in shared memory and in registers -------------------------------------------------------------------------

template <int kHeight>
struct alignas(kSwizzled) Box {
  uint16_t at[kHeight][kBoxColumns];
};

template <int kHeight, int kD>
struct Rows {
  static constexpr int kBoxes = kD / kBoxColumns;
  Box<kHeight> boxes[kBoxes];
};

// Starts to bring the rows of a head from `row` on.
template <int kHeight, int kD>
__device__ void load(Rows<kHeight, kD>& rows, const CUtensorMap& map, int row, int head, int b, uint64_t* full) {
  for (int i = 0; i < rows.kBoxes; i++) load_box(rows.boxes + i, &map, i * kBoxColumns, row, head, b, full);
}

// d = a b^T, started.
template <class T, int N, int kD>
__device__ __forceinline__ void start_abt(float (&d)[N / 2], const Rows<kRows, kD>& a, const Rows<N, kD>& b) {
  const uint64_t a_tile = tile_descriptor(&a), b_tile = tile_descriptor(&b);
#pragma unroll
  for (int k = 0; k < kD; k += 16) {
    const uint32_t box = k / kBoxColumns, within = k % kBoxColumns * sizeof(T);
    multiply_abt<T, N>(d, advanced(a_tile, box * sizeof(Box<kRows>) + within),
                       advanced(b_tile, box * sizeof(Box<N>) + within), k > 0);
  }
  products_commit();
}

// d += a b, started; `a` as `pack` has it.
template <class T, int N, int kD>
__device__ __forceinline__ void start_ab(float (&d)[kD / 2], const uint32_t (&a)[N / 4], const Rows<N, kD>& b) {
  const uint64_t tile = tile_descriptor(&b, sizeof(Box<N>));
#pragma unroll
  for (int k = 0; k < N; k += 16) multiply_ab<T, kD>(d, a + k / 4, advanced(tile, k * kBoxRow));
  products_commit();
}

__device__ float as_float(__half x) { return __half2float(x); }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ uint32_t packed(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *(const uint32_t*)&pair;
}
__device__ uint32_t packed(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const uint32_t*)&pair;
}

// Sums of a product as an operand of the next.
template <class T, int kCount>
__device__ __forceinline__ void pack(uint32_t (&to)[kCount / 2], const float (&from)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) to[i] = packed(from[2 * i], from[2 * i + 1], T());
}

// A thread of a warpgroup that computes: its lane, and the rows (its own, and that plus 8) and columns (its own and the
// next of each eight) of products' registers.
struct Thread {
  int w, number, lane, row, column;  // w: which warpgroup

  __device__ explicit Thread(int w)
      : w(w),
        number(threadIdx.x % kWarpgroup),
        lane(threadIdx.x % kWarpSize),
        row(number / kWarpSize * 16 + lane / 4),
        column(lane % 4 * 2) {}

  // Every warp has waited for its part of the products that read a stage.
  __device__ void release(uint64_t* empty) const {
    if (lane == 0) barrier_arrive(empty);
  }
  __device__ void sync_warpgroup() const { named_barrier_sync(kTogether + w, kWarpgroup); }
};

// Sums times a factor for each row go out as the rows of a head from `row` on, through shared memory that nobody else
// uses, written as copies are swizzled: eight lanes' rows in different banks.
template <class T, int kD>
__device__ void store(const CUtensorMap& map, int row, int head, int b, const float (&sums)[kD / 2],
                      const float (&factor)[2], Rows<kRows, kD>& rows, const Thread& thread) {
  thread.sync_warpgroup();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int within = thread.row + 8 * r;
#pragma unroll
    for (int c = 0; c < kD / 8; c++) {
      const int piece = c % 8 ^ within % 8;
      *(uint32_t*)&rows.boxes[c / 8].at[within][piece * 8 + thread.column] =
          packed(sums[4 * c + 2 * r] * factor[r], sums[4 * c + 2 * r + 1] * factor[r], T());
    }
  }
  fence_async();
  thread.sync_warpgroup();
  if (thread.number == 0) {
    for (int i = 0; i < rows.kBoxes; i++) store_box(&map, i * kBoxColumns, row, head, b, rows.boxes + i);
    wait_stores_read();
  }
}

// Shared memory of a kernel, at a multiple of what swizzled tiles need.
template <class Shared>
__device__ Shared& shared_memory() {
  return *(Shared*)(((uintptr_t)dynamic_shared + kSwizzled - 1) / kSwizzled * kSwizzled);
}

}  // namespace

}  // namespace fusetune::cuda
