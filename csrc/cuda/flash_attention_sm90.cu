// Flash attention (csrc/flash_attention.h) on Hopper's own instructions, after Shah et al., "FlashAttention-3", arXiv
// 2407.08608, sections 3.1 and 3.2: q, k and v of 16 bits with D = Dv of 64 or 128, causal or not, and no more.
//
// A block works for 128 rows of a head: queries, or in the backward of k and v keys. One thread brings these rows and then
// streams those of the other kind, two tiles of them under way. Two warpgroups compute, 64 rows each, with all sums in
// registers: p and ds, rounded, go from there into the next product.
//
//   forward             s = q k^T                    o += p v
//   backward of q       s = q k^T    dp = do v^T     dq += ds k
//   backward of k, v    s = k q^T    dp = v do^T     dk += ds q,  dv += p do      here s, dp, p, ds are transposed
//
// Each sum is over tiles in order by one warpgroup: results are the same bits in every run. Blocks with the most tiles
// come first, and heads in sections whose streamed rows fit in half of the second-level cache.
//
// Compiled for sm_90a and run in the tests' emulation of its instructions; not yet on a device.
#include "flash_attention_sm90.cuh"

#include <algorithm>
#include <cmath>

#include "tensor_map.h"

namespace fusetune::cuda {

namespace {

constexpr const char* kOp = "flash_attention";

// --- Forward --------------------------------------------------------------------------------------------------------

template <int kD>
struct ForwardShared {
  Rows<kRows, kD> q[kConsumers];  // o in the end
  Rows<kKeys, kD> k[kStages], v[kStages];
  uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
};

// The softmax of the two rows of each lane, over the tiles so far.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};  // of s
  float sum[2] = {0, 0};                      // of exp2(factor (s - largest)), over this lane's columns
  float factor;                               // scale log2(e)

  __device__ explicit Softmax(float scale) : factor(scale * kLog2e) {}

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
    const float pair = sum[r] + __shfl_xor_sync(kFullWarp, sum[r], 1);
    return pair + __shfl_xor_sync(kFullWarp, pair, 2);
  }
};

// One thread: keeps the stages full, with the last keys that are seen first.
template <int kD>
__device__ void produce_forward(ForwardShared<kD>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                const CUtensorMap& v_map, const Block& block, int head, int tiles) {
  barrier_arrive_expect(&shared.q_full, sizeof shared.q);
  for (int w = 0; w < kConsumers; w++)
    load(shared.q[w], q_map, block.first + w * kRows, block.h, block.b, &shared.q_full);
  for (int n = 0; n < tiles; n++) {
    const int stage = stage_of(n), key = (tiles - 1 - n) * kKeys;
    const uint32_t parity = parity_of(n);
    barrier_wait(&shared.k_empty[stage], parity ^ 1);
    barrier_arrive_expect(&shared.k_full[stage], sizeof shared.k[stage]);
    load(shared.k[stage], k_map, key, head, block.b, &shared.k_full[stage]);
    barrier_wait(&shared.v_empty[stage], parity ^ 1);
    barrier_arrive_expect(&shared.v_full[stage], sizeof shared.v[stage]);
    load(shared.v[stage], v_map, key, head, block.b, &shared.v_full[stage]);
  }
}

// The product of tile n, s = q k^T, starts before that of tile n - 1, o += p v, is done, which runs beside the softmax of
// tile n; and the two warpgroups take turns to start products, so that one's run beside the other's softmax.
template <class T, int kD>
__device__ void consume_forward(ForwardShared<kD>& shared, const CUtensorMap& o_map, const Problem& problem,
                                const Block& block, int tiles, const Thread& thread) {
  const int w = thread.w, first = block.first + w * kRows, row = first + thread.row;
  const int least_seen = problem.seen(first);  // by a row of this warpgroup
  const int seen[2] = {problem.seen(row), problem.seen(row + 8)};
  Softmax softmax(problem.scale);
  float o[kD / 2] = {}, s[kKeys / 2], rescale[2];
  uint32_t p[kKeys / 4];

  const auto mask = [&](int n) {
    const int key = (tiles - 1 - n) * kKeys;
    if (key + kKeys <= least_seen) return;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++)
      if (key + i / 4 * 8 + thread.column + i % 2 >= seen[i / 2 % 2]) s[i] = -INFINITY;
  };
  const auto take_turn = [&] { named_barrier_sync(kTurn + w, kConsumerThreads); };
  const auto end_turn = [&](int n) {
    if (w == 0 || n + 1 < tiles) named_barrier_arrive(kTurn + 1 - w, kConsumerThreads);
  };

  barrier_wait(&shared.q_full, 0);
  if (tiles > 0) {
    if (w == 1) named_barrier_arrive(kTurn, kConsumerThreads);  // the first turn is the other's
    barrier_wait(&shared.k_full[0], 0);
    take_turn();
    products_fence();
    start_abt<T>(s, shared.q[w], shared.k[0]);
    end_turn(0);
    products_wait<0>();
    hold(s);
    thread.release(&shared.k_empty[0]);
    mask(0);
    softmax.step(s, rescale);
    pack<T>(p, s);
    barrier_wait(&shared.v_full[0], 0);

    for (int n = 1; n < tiles; n++) {
      const int stage = stage_of(n), before = stage_of(n - 1);
      barrier_wait(&shared.k_full[stage], parity_of(n));
      take_turn();
      products_fence();
      start_abt<T>(s, shared.q[w], shared.k[stage]);
      start_ab<T>(o, p, shared.v[before]);
      end_turn(n);
      products_wait<1>();
      hold(s);
      thread.release(&shared.k_empty[stage]);
      mask(n);
      softmax.step(s, rescale);
      hold(s);
      // This loop for the next product also keeps the assembler from moving the wait behind it before the softmax.
      barrier_wait(&shared.v_full[stage], parity_of(n));
      products_wait<0>();
      hold(o);
      thread.release(&shared.v_empty[before]);
#pragma unroll
      for (int i = 0; i < kD / 2; i++) o[i] *= rescale[i / 2 % 2];
      pack<T>(p, s);
    }

    products_fence();
    start_ab<T>(o, p, shared.v[stage_of(tiles - 1)]);
    products_wait<0>();
    hold(o);
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float total = softmax.total(r);
    factor[r] = total == 0 ? 0 : 1 / total;
    if (thread.column == 0 && row + 8 * r < problem.Sq)
      problem.lse[(block.b * problem.H + block.h) * problem.Sq + row + 8 * r] =
          total == 0 ? -INFINITY : softmax.largest[r] * problem.scale + logf(total);
  }
  store<T>(o_map, first, block.h, block.b, o, factor, shared.q[w], thread);
}

// The number of the warpgroup, by a shuffle, so that the compiler sees that a warp has one.
__device__ int warpgroup() { return __shfl_sync(kFullWarp, (int)threadIdx.x / kWarpgroup, 0); }

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    forward_sm90(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap o_map,
                 const __grid_constant__ Problem problem) {
  auto& shared = shared_memory<ForwardShared<kD>>();
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int i = 0; i < kStages; i++) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.k_empty[i], kConsumerWarps);
      barrier_init(&shared.v_empty[i], kConsumerWarps);
    }
    fence_async();
  }
  __syncthreads();
  const Block block(problem, problem.H);
  const int last = (int)min((int64_t)block.first + kBlockRows, problem.Sq) - 1;
  const int tiles = (int)ceil_div(problem.seen(last), kKeys);
  if (const int group = warpgroup(); group == 0) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0)
      produce_forward(shared, q_map, k_map, v_map, block, (int)(block.h / (problem.H / problem.Hkv)), tiles);
  } else {
    more_registers<kConsumerRegisters>();
    consume_forward<T>(shared, o_map, problem, block, tiles, Thread(group - 1));
  }
}

// --- Backward -------------------------------------------------------------------------------------------------------

// lse2 and delta, a warp for each row.
template <class T>
__global__ void __launch_bounds__(kWarpgroup)
    delta_sm90(const T* o, const T* grad_o, Strides o_stride, Strides grad_o_stride, const float* grad_lse, int64_t D,
               const __grid_constant__ Problem problem) {
  const int64_t index = ((int64_t)blockIdx.x * kWarpgroup + threadIdx.x) / kWarpSize;
  const int64_t head = index / problem.padded(), i = index % problem.padded();
  if (head >= problem.B * problem.H) return;
  const int lane = threadIdx.x % kWarpSize;
  float sum = 0, lse = -INFINITY;
  if (i < problem.Sq) {
    const int64_t b = head / problem.H, h = head % problem.H;
    const T* const o_row = o + b * o_stride.b + h * o_stride.h + i * o_stride.s;
    const T* const grad_row = grad_o + b * grad_o_stride.b + h * grad_o_stride.h + i * grad_o_stride.s;
    for (int64_t d = lane; d < D; d += kWarpSize) sum += as_float(o_row[d]) * as_float(grad_row[d]);
    for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    lse = problem.lse[head * problem.Sq + i];
    if (grad_lse) sum -= grad_lse[head * problem.Sq + i];
  }
  if (lane > 0) return;
  problem.delta[index] = sum;
  problem.lse2[index] = lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// `a` are q, or of keys k; `b` do, or of keys v.
template <int kD>
struct BackwardShared {
  Rows<kRows, kD> a[kConsumers], b[kConsumers];  // those of the block; in the end their gradients
  struct {
    Rows<kRows, kD> a, b;
  } streamed[kStages];
  uint64_t own_full, full[kStages], empty[kStages];
};

// What is streamed past the rows of a block: of the queries of a block all keys that are seen; of keys, for each head of
// queries that reads them, the queries that see any.
template <bool kOfKeys>
struct Stream {
  int head, first, count;  // tiles of a head
  int tiles;

  __device__ Stream(const Problem& problem, const Block& block) {
    const int group = (int)(problem.H / problem.Hkv);
    if (kOfKeys) {
      first = (int)max((int64_t)0, block.first - problem.shift) / kRows * kRows;
      count = (int)max((int64_t)0, ceil_div(problem.Sq - first, kRows));
      head = block.h * group;
      tiles = group * count;
    } else {
      const int last = (int)min((int64_t)block.first + kBlockRows, problem.Sq) - 1;
      first = 0;
      tiles = count = (int)ceil_div(problem.seen(last), kRows);
      head = block.h / group;
    }
  }
  __device__ int head_of(int n) const { return head + n / count; }
  __device__ int row_of(int n) const { return first + n % count * kRows; }
};

template <int kD, bool kOfKeys>
__device__ void produce_backward(BackwardShared<kD>& shared, const CUtensorMap& own_a, const CUtensorMap& own_b,
                                 const CUtensorMap& streamed_a, const CUtensorMap& streamed_b, const Block& block,
                                 const Stream<kOfKeys>& stream) {
  barrier_arrive_expect(&shared.own_full, sizeof shared.a + sizeof shared.b);
  for (int w = 0; w < kConsumers; w++) {
    load(shared.a[w], own_a, block.first + w * kRows, block.h, block.b, &shared.own_full);
    load(shared.b[w], own_b, block.first + w * kRows, block.h, block.b, &shared.own_full);
  }
  for (int n = 0; n < stream.tiles; n++) {
    const int stage = stage_of(n);
    barrier_wait(&shared.empty[stage], parity_of(n) ^ 1);
    barrier_arrive_expect(&shared.full[stage], sizeof shared.streamed[stage]);
    load(shared.streamed[stage].a, streamed_a, stream.row_of(n), stream.head_of(n), block.b, &shared.full[stage]);
    load(shared.streamed[stage].b, streamed_b, stream.row_of(n), stream.head_of(n), block.b, &shared.full[stage]);
  }
}

template <class T, int kD, bool kOfKeys>
__device__ void consume_backward(BackwardShared<kD>& shared, const CUtensorMap& da_map, const CUtensorMap& db_map,
                                 const Problem& problem, const Block& block, const Stream<kOfKeys>& stream,
                                 const Thread& thread) {
  const int w = thread.w, first = block.first + w * kRows, row = first + thread.row;
  const int64_t heads_before = block.b * problem.H;
  const float factor = problem.scale * kLog2e;
  float s[kRows / 2], dp[kRows / 2], da[kD / 2] = {}, db[kD / 2] = {};  // db: of keys
  uint32_t p[kRows / 4], ds[kRows / 4];
  float lse2[2], delta[2];  // of queries' rows
  int seen[2];
  if (!kOfKeys) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t i = (heads_before + block.h) * problem.padded() + row + 8 * r;
      lse2[r] = problem.lse2[i];
      delta[r] = problem.delta[i];
      seen[r] = problem.seen(row + 8 * r);
    }
  }

  barrier_wait(&shared.own_full, 0);
  for (int n = 0; n < stream.tiles; n++) {
    const int stage = stage_of(n), other = stream.row_of(n);
    const auto& streamed = shared.streamed[stage];
    // Of the queries that are streamed, for this lane's columns.
    const int64_t i = (heads_before + stream.head_of(n)) * problem.padded() + other + thread.column;
    const float2* const lse2_of = (const float2*)(problem.lse2 + i);
    const float2* const delta_of = (const float2*)(problem.delta + i);
    barrier_wait(&shared.full[stage], parity_of(n));
    products_fence();
    start_abt<T>(s, shared.a[w], streamed.a);
    start_abt<T>(dp, shared.b[w], streamed.b);
    products_wait<1>();
    hold(s);
    if (kOfKeys) {
#pragma unroll
      for (int c = 0; c < kRows / 8; c++) {
        const float2 of_column = lse2_of[4 * c];
#pragma unroll
        for (int j = 0; j < 4; j++)
          s[4 * c + j] = exp2_fast(s[4 * c + j] * factor - (j % 2 ? of_column.y : of_column.x));
      }
      if (other + problem.shift < first + kRows - 1) {
#pragma unroll
        for (int j = 0; j < kRows / 2; j++)
          if (other + j / 4 * 8 + thread.column + j % 2 + problem.shift < row + j / 2 % 2 * 8) s[j] = 0;
      }
      pack<T>(p, s);
      products_fence();
      start_ab<T>(db, p, streamed.b);
      products_wait<1>();
    } else {
#pragma unroll
      for (int j = 0; j < kRows / 2; j++) s[j] = exp2_fast(s[j] * factor - lse2[j / 2 % 2]);
      if (other + kRows > problem.seen(first)) {
#pragma unroll
        for (int j = 0; j < kRows / 2; j++)
          if (other + j / 4 * 8 + thread.column + j % 2 >= seen[j / 2 % 2]) s[j] = 0;
      }
      products_wait<0>();
    }
    hold(dp);
#pragma unroll
    for (int c = 0; c < kRows / 8; c++) {
      const float2 of_column = kOfKeys ? delta_of[4 * c] : float2{};
#pragma unroll
      for (int j = 0; j < 4; j++)
        s[4 * c + j] *= dp[4 * c + j] - (!kOfKeys ? delta[j / 2] : j % 2 ? of_column.y : of_column.x);
    }
    pack<T>(ds, s);
    products_fence();
    start_ab<T>(da, ds, streamed.a);
    products_wait<0>();
    hold(da);
    if (kOfKeys) hold(db);
    thread.release(&shared.empty[stage]);
  }

  store<T>(da_map, first, block.h, block.b, da, {problem.scale, problem.scale}, shared.a[w], thread);
  if (kOfKeys) store<T>(db_map, first, block.h, block.b, db, {1, 1}, shared.b[w], thread);
}

template <class T, int kD, bool kOfKeys>
__global__ void __launch_bounds__(kThreads, 1)
    backward_sm90(const __grid_constant__ CUtensorMap own_a, const __grid_constant__ CUtensorMap own_b,
                  const __grid_constant__ CUtensorMap streamed_a, const __grid_constant__ CUtensorMap streamed_b,
                  const __grid_constant__ CUtensorMap da_map, const __grid_constant__ CUtensorMap db_map,
                  const __grid_constant__ Problem problem) {
  auto& shared = shared_memory<BackwardShared<kD>>();
  if (threadIdx.x == 0) {
    barrier_init(&shared.own_full, 1);
    for (int i = 0; i < kStages; i++) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kConsumerWarps);
    }
    fence_async();
  }
  __syncthreads();
  const Block block(problem, kOfKeys ? problem.Hkv : problem.H);
  const Stream<kOfKeys> stream(problem, block);
  if (const int group = warpgroup(); group == 0) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce_backward<kD, kOfKeys>(shared, own_a, own_b, streamed_a, streamed_b, block, stream);
  } else {
    more_registers<kConsumerRegisters>();
    consume_backward<T, kD, kOfKeys>(shared, da_map, db_map, problem, block, stream, Thread(group - 1));
  }
}

// --- Launches -------------------------------------------------------------------------------------------------------

Problem problem_of(const FlashAttention& c, float* workspace) {
  Problem problem = {c.B, c.H, c.Hkv, c.Sq, c.Sk, c.Sk, c.scale, c.lse};
  if (c.right == 0) problem.shift = c.top_left ? 0 : c.Sk - c.Sq;
  problem.lse2 = workspace;
  problem.delta = workspace + c.B * c.H * problem.padded();
  return problem;
}

// Blocks for `rows` rows of each of `heads` heads; each `sharing` of these stream the same `streamed` rows of 16 bits.
int64_t share_out(Problem& problem, int64_t heads, int64_t rows, int64_t sharing, int64_t streamed, bool last_first) {
  problem.heads = heads;
  problem.rows = rows;
  problem.last_first = last_first;
  problem.section = std::min(heads, sharing * std::max<int64_t>(1, kSectionBytes / streamed));
  return heads * ceil_div(rows, kBlockRows);
}

template <int kD>
struct Maps {
  const FlashAttention& c;
  CUtensorMap queries(const void* p, const Strides& stride) const { return map(p, c.H, c.Sq, stride, kRows); }
  CUtensorMap keys(const void* p, const Strides& stride, int height) const {
    return map(p, c.Hkv, c.Sk, stride, height);
  }
  CUtensorMap map(const void* p, int64_t heads, int64_t rows, const Strides& stride, int height) const {
    const Tensor16 t{p, {kD, rows, heads, c.B}, {stride.s, stride.h, stride.b}, c.dtype == kBFloat16};
    return tensor_map(kOp, t, (uint32_t)height);
  }
};

template <class T, int kD>
void forward(const FlashAttention& c, void* stream) {
  const Maps<kD> maps{c};
  Problem problem = problem_of(c, nullptr);
  const int64_t blocks = share_out(problem, c.B * c.H, c.Sq, c.H / c.Hkv, 4 * kD * c.Sk, true);
  launch_shared(kOp, forward_sm90<T, kD>, (unsigned)blocks, kThreads, sizeof(ForwardShared<kD>) + kSwizzled, stream,
                maps.queries(c.q, c.q_stride), maps.keys(c.k, c.k_stride, kKeys), maps.keys(c.v, c.v_stride, kKeys),
                maps.queries(c.o, c.o_stride), problem);
}

template <class T, int kD>
void backward(const FlashAttention& c, float* workspace, void* stream) {
  const Maps<kD> maps{c};
  Problem problem = problem_of(c, workspace);
  const CUtensorMap q = maps.queries(c.q, c.q_stride), grad_o = maps.queries(c.grad_o, c.grad_o_stride);
  const CUtensorMap k = maps.keys(c.k, c.k_stride, kRows), v = maps.keys(c.v, c.v_stride, kRows);
  const size_t shared = sizeof(BackwardShared<kD>) + kSwizzled;
  const int64_t group = c.H / c.Hkv, warps = c.B * c.H * problem.padded();
  launch(kOp, delta_sm90<T>, (unsigned)ceil_div(warps * kWarpSize, kWarpgroup), kWarpgroup, stream, (const T*)c.o,
         (const T*)c.grad_o, c.o_stride, c.grad_o_stride, c.grad_lse, (int64_t)kD, problem);
  int64_t blocks = share_out(problem, c.B * c.H, c.Sq, group, 4 * kD * c.Sk, true);
  const CUtensorMap dq = maps.queries(c.dq, c.dq_stride);
  launch_shared(kOp, backward_sm90<T, kD, false>, (unsigned)blocks, kThreads, shared, stream, q, grad_o, k, v, dq, dq,
                problem);
  blocks = share_out(problem, c.B * c.Hkv, c.Sk, 1, 4 * kD * c.Sq * group, false);
  launch_shared(kOp, backward_sm90<T, kD, true>, (unsigned)blocks, kThreads, shared, stream, k, v, q, grad_o,
                maps.keys(c.dk, c.dk_stride, kRows), maps.keys(c.dv, c.dv_stride, kRows), problem);
}

}  // namespace

void flash_attention_sm90_forward(const FlashAttention& call, void* stream) {
  if (call.dtype == kBFloat16)
    (call.D == 64 ? forward<__nv_bfloat16, 64> : forward<__nv_bfloat16, 128>)(call, stream);
  else
    (call.D == 64 ? forward<__half, 64> : forward<__half, 128>)(call, stream);
}

int64_t flash_attention_sm90_workspace(int64_t B, int64_t H, int64_t Sq) {
  return 2 * B * H * ceil_div(Sq, kBlockRows) * kBlockRows;
}

void flash_attention_sm90_backward(const FlashAttention& call, float* workspace, void* stream) {
  if (call.dtype == kBFloat16)
    (call.D == 64 ? backward<__nv_bfloat16, 64> : backward<__nv_bfloat16, 128>)(call, workspace, stream);
  else
    (call.D == 64 ? backward<__half, 64> : backward<__half, 128>)(call, workspace, stream);
}

}  // namespace fusetune::cuda
