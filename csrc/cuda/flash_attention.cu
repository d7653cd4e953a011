// Flash attention (csrc/flash_attention.h) by the tensor cores of sm_80: 16-bit q, k and v whose head dimensions are
// multiples of 8 up to 128, without mask, bias, relative, softcap and sinks, and with a scale above 0.
//
// Tiles are kD wide, 64 or 128: columns from D on are zeros. A warp has whole rows of the products, so that a softmax is
// four lanes' affair, and P and ds go from the registers of one product into those of the next as its left operand.
//
//   forward      128 queries a block, 32 a warp; blocks of 64 keys pass by
//   backward_q    64 queries a block, 16 a warp; blocks of keys pass by
//   backward_kv   64 keys a block, 16 a warp; blocks of queries of every head that reads them pass by: P^T and ds^T
//
// Backward computes P and dP in each of its two kernels: 14 B H Sq Sk D flops, where one kernel for all gradients takes
// 10. But that one adds to dq from every block of keys: by atomics, in an order that differs from run to run, or in
// parts, float32, that are read and written again for every 64 x 128 of P and summed in the end. For D = 128 these are
// 64 KiB for every 10 MFlop, as much time for the cache as half of the products', and a workspace that grows with the
// number of parts. Two kernels need neither and sum in a fixed order.
//
// Shared memory leaves room for two blocks on a multiprocessor of sm_80, and for one where a block has 99 KiB.
#include "flash_attention.cuh"

#include <type_traits>

#include "flash_attention_tiles.cuh"
#include "launch.h"

namespace fusetune::cuda {

namespace {

constexpr char kOp[] = "flash_attention";

template <class T, class Void>
__device__ Matrix<T> queries(const Part& part, int64_t head, Void* p, const Strides& stride, int64_t cols) {
  return {(T*)p + part.b * stride.b + head * stride.h + part.q0 * stride.s, stride.s, part.Sq, (int)cols};
}
template <class T, class Void>
__device__ Matrix<T> keys_of(const Part& part, int64_t head, Void* p, const Strides& stride, int64_t cols) {
  return {(T*)p + part.b * stride.b + head * stride.h + part.k0 * stride.s, stride.s, part.Sk, (int)cols};
}

// s = -inf where query i0 + row does not see the key of a column.
template <int kE, int kF>
__device__ void mask_rows(float (&s)[kE][kF][4], const Band& band, const Keys& keys, int i0) {
  constexpr int kColumns = 8 * kF;
  if (band.covers(i0, 16 * kE, keys.first, kColumns) && keys.kept == ~0ull >> (64 - kColumns)) return;
  each(s, [&](int row, int column, float& x) {
    if (!keys.has(column) || !band.has(i0 + row, keys.first + column)) x = -INFINITY;
  });
}

// What the four lanes say that share a row.
__device__ float greatest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// The softmax of rows whose s come block by block.
template <int kE>
struct Softmax {
  float greatest[kE][2], sum[kE][2];  // s so far; sum is this lane's part

  __device__ Softmax() {
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int h = 0; h < 2; h++) greatest[e][h] = -INFINITY, sum[e][h] = 0;
  }
  // s becomes exp2(factor (s - greatest)), and o that of the new greatest.
  template <int kF, int kColumns>
  __device__ void add(float (&s)[kE][kF][4], float (&o)[kE][kColumns][4], float factor) {
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float most = greatest[e][h];
#pragma unroll
        for (int f = 0; f < kF; f++) most = fmaxf(most, fmaxf(s[e][f][2 * h], s[e][f][2 * h + 1]));
        most = greatest_of_row(most);
        const float base = most == -INFINITY ? 0 : factor * most;  // so that exp2 has no inf - inf
        const float shrunk = exp2_approx(fmaf(factor, greatest[e][h], -base));
        greatest[e][h] = most;
        sum[e][h] *= shrunk;
#pragma unroll
        for (int f = 0; f < kColumns; f++) o[e][f][2 * h] *= shrunk, o[e][f][2 * h + 1] *= shrunk;
#pragma unroll
        for (int f = 0; f < kF; f++)
#pragma unroll
          for (int n = 2 * h; n < 2 * h + 2; n++) {
            s[e][f][n] = exp2_approx(fmaf(factor, s[e][f][n], -base));
            sum[e][h] += s[e][f][n];
          }
      }
  }
};

template <class T, int kD>
struct ForwardTiles {
  static constexpr int kQueries = 128, kKeys = 64;
  Tile<T, kQueries, kD> q;
  Tile<T, kKeys, kD> k, v;
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) forward(FlashAttention call, Dropout dropout) {
  using Tiles = ForwardTiles<T, kD>;
  constexpr int kE = Tiles::kQueries / kWarps / 16, kF = Tiles::kKeys / 8;
  auto& tiles = *(Tiles*)dynamic_shared;
  // The last queries, which see most where attention is causal, are the first to be worked on.
  const auto part = Part::find<Tiles::kQueries>(call, gridDim.x - 1 - blockIdx.x, call.H, call.Sq, call.q_starts);
  if (part.first < 0 || part.first >= part.Sq) return;
  const int64_t key_head = part.head / (call.H / call.Hkv);
  const auto q = queries<const T>(part, part.head, call.q, call.q_stride, call.D);
  const auto k = keys_of<const T>(part, key_head, call.k, call.k_stride, call.D);
  const auto v = keys_of<const T>(part, key_head, call.v, call.v_stride, call.Dv);
  const uint8_t* keep = call.keep ? call.keep + part.b * call.keep_row : nullptr;
  const Band band = Band::of(call, part);
  const int end = band.end_key(min(part.first + Tiles::kQueries, part.Sq), part.Sk);
  const int warp_row = threadIdx.x / kWarpSize * 16 * kE, i0 = part.first + warp_row;

  const auto copy = [](Tile<T, Tiles::kKeys, kD>& tile, const Matrix<const T>& m, const Keys& keys) {
    if (keys.kept) tile.copy(m, keys.first, [&](int r) { return keys.has(r); });
    copy_async_commit();
  };
  Keys keys = Keys::find<Tiles::kKeys>(keep, band.first_key(part.first) / Tiles::kKeys * Tiles::kKeys, end);
  tiles.q.copy(q, part.first);
  copy(tiles.k, k, keys);

  float o[kE][kD / 8][4] = {};
  Softmax<kE> softmax;
  KeptInRows<kE> kept;
  while (keys.kept) {
    const int j0 = keys.first;
    copy_async_wait<0>();
    __syncthreads();  // k is here, and v has been read
    copy(tiles.v, v, keys);
    float s[kE][kF][4];
    multiply_rows(s, RowsOfTile<T, Tiles::kQueries, kD>{tiles.q, warp_row}, tiles.k);
    mask_rows(s, band, keys, i0);
    softmax.add(s, o, call.scale * kLog2E);
    if constexpr (kDropout) {
      kept.make(dropout, dropout_row(call, part.sequence, part.head, i0), j0);
      kept.apply(s, j0, 1);
    }
    const Rounded<T, kE, kF> p(s);
    copy_async_wait<0>();
    __syncthreads();  // v is here, and k has been read
    keys = Keys::find<Tiles::kKeys>(keep, j0 + Tiles::kKeys, end);
    copy(tiles.k, k, keys);
    multiply_columns(o, p, tiles.v);
  }

  copy_async_wait<0>();
  __syncthreads();  // q is here where there was no key
  const auto out = queries<T>(part, part.head, call.o, call.o_stride, call.Dv);
  float factor[kE][2];
#pragma unroll
  for (int e = 0; e < kE; e++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int i = i0 + 16 * e + 8 * h + threadIdx.x % kWarpSize / 4;
      const float sum = sum_of_row(softmax.sum[e][h]);
      factor[e][h] = sum == 0 ? 0 : dropout.scale / sum;
      if (i < part.Sq && threadIdx.x % 4 == 0)
        call.lse[(part.b * call.H + part.head) * call.Sq + part.q0 + i] =
            sum == 0 ? -INFINITY : call.scale * softmax.greatest[e][h] + logf(sum);
    }
  tiles.q.store(o, warp_row, out, i0, [&](int e, int h) { return factor[e][h]; });
}

// What backward needs of a query: P = exp2(scale log2(e) q k^T - lse), ds = P (dP - d). Zeros for rows that are not there,
// whose do is 0.
struct RowSums {
  float lse;  // log2(e) lse, inf for a query that sees no key
  float d;
};

// workspace [B, H, Sq] = RowSums
template <class T, int kD>
__global__ void __launch_bounds__(kThreads) backward_rows(FlashAttention call) {
  constexpr int kLanes = kD / 8;  // of a row
  const int64_t row = (int64_t)blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int c = threadIdx.x % kLanes * 8;
  float sum = 0;
  if (row < call.B * call.H * call.Sq && c < call.Dv) {
    const int64_t i = row % call.Sq, head = row / call.Sq % call.H, b = row / call.Sq / call.H;
    const auto eight = [&](const void* p, const Strides& s) {
      return *(const uint4*)((const T*)p + b * s.b + head * s.h + i * s.s + c);
    };
    const uint4 o = eight(call.o, call.o_stride), grad_o = eight(call.grad_o, call.grad_o_stride);
    const auto add = [&](uint32_t x, uint32_t y) {
      const float2 a = unpack<T>(x), b = unpack<T>(y);
      sum = fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
    };
    add(o.x, grad_o.x), add(o.y, grad_o.y), add(o.z, grad_o.z), add(o.w, grad_o.w);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (row < call.B * call.H * call.Sq && c == 0) {
    const float lse = call.lse[row], d = sum - (call.grad_lse ? call.grad_lse[row] : 0);
    ((RowSums*)call.workspace)[row] = lse == -INFINITY ? RowSums{INFINITY, 0} : RowSums{kLog2E * lse, d};
  }
}

// Rows of the tiles that pass by: as many as leave room for two blocks.
template <int kD>
constexpr int kPassing = 4096 / kD;

template <class T, int kD>
struct BackwardQTiles {
  static constexpr int kQueries = 64, kKeys = kPassing<kD>;
  Tile<T, kQueries, kD> q, grad_o;
  struct {
    Tile<T, kKeys, kD> k, v;
  } passing[2];
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) backward_q(FlashAttention call, Dropout dropout) {
  using Tiles = BackwardQTiles<T, kD>;
  constexpr int kF = Tiles::kKeys / 8;
  auto& tiles = *(Tiles*)dynamic_shared;
  const auto part = Part::find<Tiles::kQueries>(call, gridDim.x - 1 - blockIdx.x, call.H, call.Sq, call.q_starts);
  if (part.first < 0 || part.first >= part.Sq) return;
  const int64_t key_head = part.head / (call.H / call.Hkv);
  const auto q = queries<const T>(part, part.head, call.q, call.q_stride, call.D);
  const auto k = keys_of<const T>(part, key_head, call.k, call.k_stride, call.D);
  const auto v = keys_of<const T>(part, key_head, call.v, call.v_stride, call.Dv);
  const auto grad_o = queries<const T>(part, part.head, call.grad_o, call.grad_o_stride, call.Dv);
  const uint8_t* keep = call.keep ? call.keep + part.b * call.keep_row : nullptr;
  const Band band = Band::of(call, part);
  const int end = band.end_key(min(part.first + Tiles::kQueries, part.Sq), part.Sk);
  const int warp_row = threadIdx.x / kWarpSize * 16, i0 = part.first + warp_row;

  const auto copy = [&](int into, const Keys& keys) {
    const auto inside = [&](int r) { return keys.has(r); };
    if (keys.kept) {
      tiles.passing[into].k.copy(k, keys.first, inside);
      tiles.passing[into].v.copy(v, keys.first, inside);
    }
    copy_async_commit();
  };
  Keys keys = Keys::find<Tiles::kKeys>(keep, band.first_key(part.first) / Tiles::kKeys * Tiles::kKeys, end);
  tiles.q.copy(q, part.first);
  tiles.grad_o.copy(grad_o, part.first);
  copy(0, keys);
  RowSums rows[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int i = i0 + 8 * h + threadIdx.x % kWarpSize / 4;
    if (i < part.Sq) rows[h] = ((const RowSums*)call.workspace)[(part.b * call.H + part.head) * call.Sq + part.q0 + i];
  }
  copy_async_wait<0>();
  __syncthreads();
  const RowsInRegisters<kD> q_rows(RowsOfTile<T, Tiles::kQueries, kD>{tiles.q, warp_row});
  const RowsInRegisters<kD> grad_o_rows(RowsOfTile<T, Tiles::kQueries, kD>{tiles.grad_o, warp_row});

  float dq[1][kD / 8][4] = {};
  KeptInRows<1> kept;
  for (int now = 0; keys.kept; now ^= 1) {
    const Keys following = Keys::find<Tiles::kKeys>(keep, keys.first + Tiles::kKeys, end);
    copy_async_wait<0>();
    __syncthreads();  // the keys of `now` are here, and the others have been read
    copy(now ^ 1, following);
    float p[1][kF][4], ds[1][kF][4];
    multiply_rows(p, q_rows, tiles.passing[now].k);
    mask_rows(p, band, keys, i0);
    multiply_rows(ds, grad_o_rows, tiles.passing[now].v);
    if constexpr (kDropout) {
      kept.make(dropout, dropout_row(call, part.sequence, part.head, i0), keys.first);
      kept.apply(ds, keys.first, dropout.scale);
    }
#pragma unroll
    for (int f = 0; f < kF; f++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const RowSums& row = rows[n / 2];
        ds[0][f][n] = exp2_approx(fmaf(call.scale * kLog2E, p[0][f][n], -row.lse)) * (ds[0][f][n] - row.d);
      }
    multiply_columns(dq, Rounded<T, 1, kF>(ds), tiles.passing[now].k);
    keys = following;
  }
  const auto out = queries<T>(part, part.head, call.dq, call.dq_stride, call.D);
  tiles.q.store(dq, warp_row, out, i0, [&](int, int h) { return rows[h].lse == INFINITY ? 0 : call.scale; });
}

template <class T, int kD>
struct BackwardKvTiles {
  static constexpr int kKeys = 64, kQueries = kPassing<kD>;
  Tile<T, kKeys, kD> k, v;
  struct {
    Tile<T, kQueries, kD> q, grad_o;
    alignas(16) RowSums rows[kQueries];
    KeptInColumns<kQueries> kept;
  } passing[2];
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) backward_kv(FlashAttention call, Dropout dropout) {
  using Tiles = BackwardKvTiles<T, kD>;
  constexpr int kF = Tiles::kQueries / 8;
  auto& tiles = *(Tiles*)dynamic_shared;
  const auto part = Part::find<Tiles::kKeys>(call, blockIdx.x, call.Hkv, call.Sk, call.k_starts);
  if (part.first < 0 || part.first >= part.Sk) return;
  const auto k = keys_of<const T>(part, part.head, call.k, call.k_stride, call.D);
  const auto v = keys_of<const T>(part, part.head, call.v, call.v_stride, call.Dv);
  const uint8_t* keep = call.keep ? call.keep + part.b * call.keep_row : nullptr;
  const Keys keys = Keys::find<Tiles::kKeys>(keep, part.first, min(part.first + Tiles::kKeys, part.Sk));
  const Band band = Band::of(call, part);
  const int warp_row = threadIdx.x / kWarpSize * 16, j0 = part.first + warp_row;
  const int lane = threadIdx.x % kWarpSize;

  // Blocks of the queries that see some of the keys, of one head after another.
  const int first_block = band.first_query(part.first) / Tiles::kQueries;
  const int end_query = band.end_query(min(part.first + Tiles::kKeys, part.Sk), part.Sq);
  const int blocks = keys.kept ? max(0, (int)ceil_div(end_query, Tiles::kQueries) - first_block) : 0;
  const int group = (int)(call.H / call.Hkv), steps = group * blocks;

  const auto copy = [&](int into, int step) {
    if (step < steps) {
      auto& tile = tiles.passing[into];
      const int64_t head = part.head * group + step / blocks;
      const int i = (first_block + step % blocks) * Tiles::kQueries;
      tile.q.copy(queries<const T>(part, head, call.q, call.q_stride, call.D), i);
      tile.grad_o.copy(queries<const T>(part, head, call.grad_o, call.grad_o_stride, call.Dv), i);
      const RowSums* rows = (const RowSums*)call.workspace + (part.b * call.H + head) * call.Sq + part.q0;
      if (threadIdx.x < Tiles::kQueries) {
        const bool there = i + (int)threadIdx.x < part.Sq;
        copy_async_8(&tile.rows[threadIdx.x], there ? rows + i + threadIdx.x : rows, there ? 8 : 0);
      }
      if constexpr (kDropout) tile.kept.make(dropout, dropout_row(call, part.sequence, head, i), part.first);
    }
    copy_async_commit();
  };
  tiles.k.copy(k, part.first);
  tiles.v.copy(v, part.first);
  copy(0, 0);

  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
  for (int step = 0; step < steps; step++) {
    auto& tile = tiles.passing[step % 2];
    const int i0 = (first_block + step % blocks) * Tiles::kQueries;
    copy_async_wait<0>();
    __syncthreads();  // the queries of `step` are here, and the others have been read
    copy((step + 1) % 2, step + 1);
    // What a query that sees no key has in do takes no part, be it NaN.
    bool blind = false;
    for (int i = lane; i < Tiles::kQueries; i += kWarpSize) blind |= tile.rows[i].lse == INFINITY;
    if (__any_sync(kFullWarp, blind)) {  // in all warps alike
      for (int i = threadIdx.x; i < Tiles::kQueries * kD / 8; i += kThreads) {
        const int r = i / (kD / 8), c = i % (kD / 8) * 8;
        if (tile.rows[r].lse == INFINITY) *(uint4*)&tile.grad_o.at[r][c] = make_uint4(0, 0, 0, 0);
      }
      __syncthreads();
    }
    // Rows are keys and columns are queries. Keys that are not kept are left out in the end.
    float p[1][kF][4], ds[1][kF][4];
    multiply_rows(p, RowsOfTile<T, Tiles::kKeys, kD>{tiles.k, warp_row}, tile.q);
    if (!band.covers(i0, Tiles::kQueries, j0, 16))
      each(p, [&](int row, int column, float& x) {
        if (!band.has(i0 + column, j0 + row)) x = -INFINITY;
      });
    const auto two_rows = [&](int f) { return *(const float4*)&tile.rows[8 * f + lane % 4 * 2]; };  // lse, d, lse, d
#pragma unroll
    for (int f = 0; f < kF; f++) {
      const float4 two = two_rows(f);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float& x = p[0][f][n];
        x = exp2_approx(fmaf(call.scale * kLog2E, x, -(n % 2 ? two.z : two.x)));
      }
    }
    uint32_t kept = ~0u;
    if constexpr (kDropout) kept = tile.kept.of_lane(j0);
    const auto dropped = [&](float (&to)[1][kF][4], const float (&from)[1][kF][4], float scale) {
#pragma unroll
      for (int f = 0; f < kF; f++)
#pragma unroll
        for (int n = 0; n < 4; n++) to[0][f][n] = kept >> (4 * f + n) & 1 ? from[0][f][n] * scale : 0;
    };
    dropped(ds, p, 1);
    multiply_columns(dv, Rounded<T, 1, kF>(ds), tile.grad_o);
    multiply_rows(ds, RowsOfTile<T, Tiles::kKeys, kD>{tiles.v, warp_row}, tile.grad_o);
    dropped(ds, ds, kDropout ? dropout.scale : 1);
#pragma unroll
    for (int f = 0; f < kF; f++) {
      const float4 two = two_rows(f);
#pragma unroll
      for (int n = 0; n < 4; n++) ds[0][f][n] = p[0][f][n] * (ds[0][f][n] - (n % 2 ? two.w : two.y));
    }
    multiply_columns(dk, Rounded<T, 1, kF>(ds), tile.q);
  }

  copy_async_wait<0>();
  __syncthreads();  // k and v are here where there was no query
  const auto kept_times = [&](float scale) {
    return [&keys, warp_row, lane, scale](int, int h) { return keys.has(warp_row + 8 * h + lane / 4) ? scale : 0; };
  };
  const auto dk_out = keys_of<T>(part, part.head, call.dk, call.dk_stride, call.D);
  const auto dv_out = keys_of<T>(part, part.head, call.dv, call.dv_stride, call.Dv);
  tiles.k.store(dk, warp_row, dk_out, j0, kept_times(call.scale));
  tiles.v.store(dv, warp_row, dv_out, j0, kept_times(dropout.scale));
}

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), int64_t blocks, size_t shared, void* stream, Arguments... arguments) {
  if (blocks > 0) launch_shared(kOp, kernel, dim3((unsigned)blocks), kThreads, shared, stream, arguments...);
}

// use(T(), kD, kDropout) for those of a call.
template <class Use>
void with_kind(const FlashAttention& call, const Dropout& dropout, Use use) {
  const auto with_dropout = [&](auto type, auto width) {
    if (dropout.threshold)
      use(type, width, std::true_type());
    else
      use(type, width, std::false_type());
  };
  const auto with_width = [&](auto type) {
    if (std::max(call.D, call.Dv) <= 64)
      with_dropout(type, std::integral_constant<int, 64>());
    else
      with_dropout(type, std::integral_constant<int, 128>());
  };
  if (call.dtype == kBFloat16)
    with_width(__nv_bfloat16());
  else
    with_width(__half());
}

template <int kRows>
int64_t blocks_of(const FlashAttention& call, int64_t heads, int64_t tokens) {
  return call.B * heads * blocks_of_head<kRows>(call, tokens);
}

}  // namespace

void flash_attention_forward(const FlashAttention& call, void* stream) {
  const Dropout dropout = Dropout::make(call.dropout_p, call.seed_cell);
  with_kind(call, dropout, [&](auto type, auto width, auto dropped) {
    using T = decltype(type);
    using Tiles = ForwardTiles<T, width>;
    start(forward<T, width, dropped>, blocks_of<Tiles::kQueries>(call, call.H, call.Sq), sizeof(Tiles), stream, call,
          dropout);
  });
}

void flash_attention_backward(const FlashAttention& call, void* stream) {
  const Dropout dropout = Dropout::make(call.dropout_p, call.seed_cell);
  with_kind(call, dropout, [&](auto type, auto width, auto dropped) {
    using T = decltype(type);
    using QTiles = BackwardQTiles<T, width>;
    using KvTiles = BackwardKvTiles<T, width>;
    start(backward_rows<T, width>, ceil_div(call.B * call.H * call.Sq, kThreads * 8 / width), 0, stream, call);
    start(backward_q<T, width, dropped>, blocks_of<QTiles::kQueries>(call, call.H, call.Sq), sizeof(QTiles), stream,
          call, dropout);
    start(backward_kv<T, width, dropped>, blocks_of<KvTiles::kKeys>(call, call.Hkv, call.Sk), sizeof(KvTiles), stream,
          call, dropout);
  });
}

}  // namespace fusetune::cuda
