// Flash attention's forward (csrc/flash_attention.h) on Hopper's own instructions, after Shah et al., "FlashAttention-3",
// arXiv 2407.08608, sections 3.1 and 3.2: q, k and v of 16 bits with D = Dv of 64 or 128, causal or not, no more.
//
// A block takes 128 queries of a head. One thread brings their q, then the keys and values of 128 at a time from the last
// that is seen to the first, two of each under way. Two warpgroups have 64 queries each, whose sums and softmax stay in
// their registers: p, rounded, goes from there into the product with v. The products of step n, s = q k^T, start before
// those of step n - 1, o += p v, are done, which run beside the softmax of step n; and the two warpgroups take turns to
// start products, so that one's run beside the other's softmax.
//
// Longest tiles of queries first. Heads come in sections whose k and v fit in half of the second-level cache.
//
// Compiled for sm_90a and run in the tests' emulation of its instructions; not yet on a device.
#include <algorithm>
#include <cmath>

#include "../flash_attention.h"
#include "block.cuh"
#include "launch.h"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace fusetune::cuda {

namespace {

constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kRows = 64;      // queries of each: a product's height
constexpr int kTile = kConsumers * kRows;
constexpr int kKeys = 128;  // of a step
constexpr int kStages = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarpSize;
// Of a thread of 65536 registers: 168 at the start; then few for the warpgroup that copies, and what that frees.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int64_t kSectionBytes = 24 << 20;  // of 50 MiB of cache
// Numbered barriers of each consumer.
constexpr int kTurn = 1, kTogether = kTurn + kConsumers;

struct alignas(kSwizzled) QueryBox {
  uint16_t at[kRows][kBoxColumns];
};
struct alignas(kSwizzled) KeyBox {
  uint16_t at[kKeys][kBoxColumns];
};

template <int kD>
struct Shared {
  static constexpr int kBoxes = kD / kBoxColumns;

  QueryBox q[kConsumers][kBoxes];  // o in the end
  KeyBox k[kStages][kBoxes], v[kStages][kBoxes];
  uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
};

struct Problem {
  float* lse;               // [heads, Sq]
  int64_t heads, H, group;  // B H; query heads; those of them to a head of k
  int64_t Sq, Sk;
  int64_t shift;    // query i sees keys up to i + shift
  int64_t section;  // heads
  float scale;

  __host__ __device__ int64_t tiles() const { return (Sq + kTile - 1) / kTile; }
  // How many keys query i sees: the first so many.
  __device__ int seen(int i) const { return (int)max((int64_t)0, min(Sk, i + shift + 1)); }
};

// The work of a block.
struct Tile {
  int b, h, first;  // batch, head, query
  int steps;        // of keys

  __device__ explicit Tile(const Problem& problem) {
    const int64_t per_section = problem.section * problem.tiles();
    const int64_t begin = blockIdx.x / per_section * problem.section, within = blockIdx.x % per_section;
    const int64_t heads = min(problem.section, problem.heads - begin);
    const int64_t head = begin + within % heads;
    b = (int)(head / problem.H);
    h = (int)(head % problem.H);
    first = (int)((problem.tiles() - 1 - within / heads) * kTile);
    const int last = (int)min((int64_t)first + kTile, problem.Sq) - 1;
    steps = (problem.seen(last) + kKeys - 1) / kKeys;
  }
};

// The place of step n among the stages, and how often that has been filled before, as a parity.
__device__ int stage_of(int n) { return n % kStages; }
__device__ uint32_t parity_of(int n) { return n / kStages % 2; }

template <int kD>
__device__ void load_keys(KeyBox (&boxes)[kD / kBoxColumns], const CUtensorMap& map, int key, int head, int b,
                          uint64_t* full, uint64_t* empty, uint32_t parity) {
  barrier_wait(empty, parity ^ 1);
  barrier_arrive_expect(full, sizeof boxes);
  for (int i = 0; i < kD / kBoxColumns; i++) load_box(boxes + i, &map, i * kBoxColumns, key, head, b, full);
}

// One thread: keeps the stages full.
template <int kD>
__device__ void produce(Shared<kD>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                        const CUtensorMap& v_map, const Problem& problem, const Tile& tile) {
  barrier_arrive_expect(&shared.q_full, sizeof shared.q);
  for (int w = 0; w < kConsumers; w++)
    for (int i = 0; i < shared.kBoxes; i++)
      load_box(&shared.q[w][i], &q_map, i * kBoxColumns, tile.first + w * kRows, tile.h, tile.b, &shared.q_full);
  const int head = (int)(tile.h / problem.group);
  for (int n = 0; n < tile.steps; n++) {
    const int stage = stage_of(n), key = (tile.steps - 1 - n) * kKeys;
    load_keys<kD>(shared.k[stage], k_map, key, head, tile.b, &shared.k_full[stage], &shared.k_empty[stage],
                  parity_of(n));
    load_keys<kD>(shared.v[stage], v_map, key, head, tile.b, &shared.v_full[stage], &shared.v_empty[stage],
                  parity_of(n));
  }
}

__device__ uint32_t packed(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *(const uint32_t*)&pair;
}
__device__ uint32_t packed(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const uint32_t*)&pair;
}

// s = q k^T, started.
template <class T, int kD>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 2], const QueryBox* q, const KeyBox* k) {
  const uint64_t a = tile_descriptor(q), b = tile_descriptor(k);
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    const uint32_t box = d / kBoxColumns, within = d % kBoxColumns * sizeof(T);
    multiply_abt<T, kKeys>(s, advanced(a, box * sizeof(QueryBox) + within), advanced(b, box * sizeof(KeyBox) + within),
                           d > 0);
  }
  products_commit();
}

// o += p v, started.
template <class T, int kD>
__device__ __forceinline__ void start_output(float (&o)[kD / 2], const uint32_t (&p)[kKeys / 4], const KeyBox* v) {
  const uint64_t b = tile_descriptor(v, sizeof(KeyBox));
#pragma unroll
  for (int key = 0; key < kKeys; key += 16) multiply_ab<T, kD>(o, p + key / 4, advanced(b, key * kBoxRow));
  products_commit();
}

// The softmax of the two rows of each lane: it knows what steps so far had.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};  // of s
  float sum[2] = {0, 0};                      // of exp2(factor (s - largest)), over this lane's columns
  float factor;                               // scale log2(e)

  __device__ explicit Softmax(float scale) : factor(scale * 1.44269504f) {}

  // s becomes exp2(factor (s - largest)); `rescale` is what earlier sums are to be multiplied by.
  __device__ __forceinline__ void step(float (&s)[kKeys / 2], float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = largest[r];
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      const float base = top == -INFINITY ? 0 : top * factor;  // where nothing is seen exp2(-inf - 0) = 0
      rescale[r] = exp2_fast(largest[r] * factor - base);
      largest[r] = top;
      sum[r] *= rescale[r];
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) {
        s[i] = exp2_fast(s[i] * factor - base);
        s[i + 1] = exp2_fast(s[i + 1] * factor - base);
        sum[r] += s[i] + s[i + 1];
      }
    }
  }

  // The whole row's sum.
  __device__ float total(int r) const {
    float all = sum[r] + __shfl_xor_sync(kFullWarp, sum[r], 1);
    return all + __shfl_xor_sync(kFullWarp, all, 2);
  }
};

// One of the warpgroups that compute.
template <class T, int kD>
__device__ void consume(Shared<kD>& shared, const CUtensorMap& o_map, const Problem& problem, const Tile& tile, int w) {
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % kWarpSize;
  const int column = lane % 4 * 2;                                              // of this lane, in each eight
  const int row = tile.first + w * kRows + thread / kWarpSize * 16 + lane / 4;  // and row + 8
  QueryBox* const q = shared.q[w];
  const int least_seen = problem.seen(tile.first + w * kRows);  // by a row of this warpgroup
  const int seen[2] = {problem.seen(row), problem.seen(row + 8)};

  Softmax softmax(problem.scale);
  float o[kD / 2] = {}, s[kKeys / 2], rescale[2];
  uint32_t p[kKeys / 4];

  const auto mask = [&](int n) {
    const int first = (tile.steps - 1 - n) * kKeys;
    if (first + kKeys <= least_seen) return;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++)
      if (first + i / 4 * 8 + column + i % 2 >= seen[i / 2 % 2]) s[i] = -INFINITY;
  };
  const auto pack = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; i++) p[i] = packed(s[2 * i], s[2 * i + 1], T());
  };
  // Every warp has waited for its part of the products that read it.
  const auto release = [&](uint64_t* empty) {
    if (lane == 0) barrier_arrive(empty);
  };
  const auto take_turn = [&] { named_barrier_sync(kTurn + w, kConsumers * kWarpgroup); };
  const auto end_turn = [&](int n) {
    if (w == 0 || n + 1 < tile.steps) named_barrier_arrive(kTurn + 1 - w, kConsumers * kWarpgroup);
  };

  barrier_wait(&shared.q_full, 0);
  if (tile.steps > 0) {
    if (w == 1) named_barrier_arrive(kTurn, kConsumers * kWarpgroup);  // the first turn is the other's
    barrier_wait(&shared.k_full[0], 0);
    take_turn();
    products_fence();
    start_scores<T, kD>(s, q, shared.k[0]);
    end_turn(0);
    products_wait<0>();
    hold(s);
    release(&shared.k_empty[0]);
    mask(0);
    softmax.step(s, rescale);
    pack();
    barrier_wait(&shared.v_full[0], 0);

    for (int n = 1; n < tile.steps; n++) {
      const int stage = stage_of(n), before = stage_of(n - 1);
      barrier_wait(&shared.k_full[stage], parity_of(n));
      take_turn();
      products_fence();
      start_scores<T, kD>(s, q, shared.k[stage]);
      start_output<T, kD>(o, p, shared.v[before]);
      end_turn(n);
      products_wait<1>();
      hold(s);
      release(&shared.k_empty[stage]);
      mask(n);
      softmax.step(s, rescale);
      hold(s);
      // This loop for the next product also keeps the assembler from moving the wait behind it before the softmax.
      barrier_wait(&shared.v_full[stage], parity_of(n));
      products_wait<0>();
      hold(o);
      release(&shared.v_empty[before]);
#pragma unroll
      for (int i = 0; i < kD / 2; i++) o[i] *= rescale[i / 2 % 2];
      pack();
    }

    products_fence();
    start_output<T, kD>(o, p, shared.v[stage_of(tile.steps - 1)]);
    products_wait<0>();
    hold(o);
  }

  // o goes out through q's place, whose boxes are written as copies are swizzled: eight lanes' rows in different banks.
  named_barrier_sync(kTogether + w, kWarpgroup);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float total = softmax.total(r), factor = total == 0 ? 0 : 1 / total;
    const int i = row + 8 * r, within = i - tile.first - w * kRows;
#pragma unroll
    for (int c = 0; c < kD / 8; c++) {
      const int piece = c % 8 ^ within % 8;
      *(uint32_t*)&q[c / 8].at[within][piece * 8 + column] =
          packed(o[4 * c + 2 * r] * factor, o[4 * c + 2 * r + 1] * factor, T());
    }
    if (column == 0 && i < problem.Sq)
      problem.lse[(tile.b * problem.H + tile.h) * problem.Sq + i] =
          total == 0 ? -INFINITY : softmax.largest[r] * problem.scale + logf(total);
  }
  fence_async();
  named_barrier_sync(kTogether + w, kWarpgroup);
  if (thread == 0) {
    for (int i = 0; i < shared.kBoxes; i++)
      store_box(&o_map, i * kBoxColumns, tile.first + w * kRows, tile.h, tile.b, q + i);
    wait_stores_read();
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    forward_sm90(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap o_map,
                 const __grid_constant__ Problem problem) {
  auto& shared = *(Shared<kD>*)(((uintptr_t)dynamic_shared + kSwizzled - 1) / kSwizzled * kSwizzled);
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int i = 0; i < kStages; i++) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.k_empty[i], kConsumerWarps);
      barrier_init(&shared.v_empty[i], kConsumerWarps);
    }
    fence_async();
    for (const CUtensorMap* map : {&q_map, &k_map, &v_map, &o_map}) prefetch_map(map);
  }
  __syncthreads();
  const Tile tile(problem);
  // By a shuffle, so that the compiler sees that a warp has one.
  const int warpgroup = __shfl_sync(kFullWarp, (int)threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kD>(shared, q_map, k_map, v_map, problem, tile);
  } else {
    more_registers<kConsumerRegisters>();
    consume<T, kD>(shared, o_map, problem, tile, warpgroup - 1);
  }
}

template <class T, int kD>
void forward(const FlashAttention& c, void* stream) {
  const char* const op = "flash_attention";
  const auto map = [&](const void* p, int64_t heads, int64_t rows, const Strides& stride, uint32_t box) {
    const Tensor16 t{p, {kD, rows, heads, c.B}, {stride.s, stride.h, stride.b}, c.dtype == kBFloat16};
    return tensor_map(op, t, box);
  };
  const int64_t group = c.H / c.Hkv, head_bytes = 4 * kD * c.Sk;
  Problem problem = {c.lse, c.B * c.H, c.H, group, c.Sq, c.Sk, c.Sk, 0, c.scale};
  if (c.right == 0) problem.shift = c.top_left ? 0 : c.Sk - c.Sq;
  problem.section = std::min(problem.heads, group * std::max<int64_t>(1, kSectionBytes / head_bytes));
  launch_shared(op, forward_sm90<T, kD>, (unsigned)(problem.heads * problem.tiles()), kThreads,
                sizeof(Shared<kD>) + kSwizzled, stream, map(c.q, c.H, c.Sq, c.q_stride, kRows),
                map(c.k, c.Hkv, c.Sk, c.k_stride, kKeys), map(c.v, c.Hkv, c.Sk, c.v_stride, kKeys),
                map(c.o, c.H, c.Sq, c.o_stride, kRows), problem);
}

}  // namespace

void flash_attention_sm90_forward(const FlashAttention& call, void* stream) {
  if (call.dtype == kBFloat16)
    (call.D == 64 ? forward<__nv_bfloat16, 64> : forward<__nv_bfloat16, 128>)(call, stream);
  else
    (call.D == 64 ? forward<__half, 64> : forward<__half, 128>)(call, stream);
}

}  // namespace fusetune::cuda
