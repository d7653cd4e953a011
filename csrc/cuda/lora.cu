// LoRA linear (csrc/lora.h). Three products make both passes; t is x or dy, its mask D where the contract has one:
//
//   down    s or ds   [M, R]      = (t . D) w^T     w = a, or b^T  [R, C]
//   up      y0 or dx0 [M, C]      = (s w) . D
//   outer   da or db  [R, C]      = s^T (t . D)     over parts of the rows, and the parts summed in a fixed order
//
// A block works on tiles of three matrices, and multiplies two of them into the third:
//
//   wide      kRows x kCols   of x, dy, y0 or dx0
//   narrow    kRows x kRank   of s or ds
//   adapter   kRank x kCols   of w
//
// float32 adapters take fmaf, in an order that does not depend on the device; 16-bit ones the tensor cores, for which
// s and ds are rounded to the adapter's type.
//
// Bytes: each product reads or writes its [M, C] matrix once, for ranks up to kRank; s and w come from the cache.
#include "../lora.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "mma.cuh"
#include "philox.cuh"

namespace fusetune::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kCols = kMaskGroup;
constexpr int kSmallRank = 16, kLargeRank = 64;  // the values of kRank: the first where R is no larger
constexpr int64_t kOuterBlocks = 512;            // wanted: about four on each of a large GPU's 132 multiprocessors
constexpr int64_t kPartRows = 4 * kRows;         // rows of a part, at least

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
__device__ void convert(T from, T& to) {
  to = from;
}
__device__ void convert(__nv_bfloat16 from, float& to) { to = __bfloat162float(from); }
__device__ void convert(__half from, float& to) { to = __half2float(from); }
__device__ void convert(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }
__device__ void convert(float from, __half& to) { to = __float2half_rn(from); }

// Neighbouring elements of a row: one or two 16-byte accesses.
template <class T>
struct alignas(16) Eight {
  T at[8];
};

// A matrix in global memory.
template <class T>
struct Matrix {
  T* p;
  int64_t row;  // elements from one row to the next
  int64_t rows, cols;

  __device__ bool aligned() const { return ((uintptr_t)p | (uintptr_t)(row * sizeof(T))) % 16 == 0; }
  // Elements from [r, c] to the end of the row; none below the last row.
  __device__ int64_t remaining(int64_t r, int64_t c) const { return r < rows ? cols - c : 0; }

  // Elements [r, c .. c + 8), zeros outside the matrix; c is a multiple of 8.
  __device__ Eight<std::remove_const_t<T>> load(int64_t r, int64_t c, bool aligned) const {
    Eight<std::remove_const_t<T>> v = {};
    const int64_t n = remaining(r, c);
    if (aligned && n >= 8) return *(const Eight<std::remove_const_t<T>>*)(p + r * row + c);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < n) v.at[j] = p[r * row + c + j];
    return v;
  }
  __device__ void store(int64_t r, int64_t c, const Eight<T>& v, bool aligned) const {
    const int64_t n = remaining(r, c);
    if (aligned && n >= 8) {
      *(Eight<T>*)(p + r * row + c) = v;
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < n) p[r * row + c + j] = v.at[j];
  }
};

template <class To, class From>
__device__ Eight<To> convert(const Eight<From>& from) {
  Eight<To> to;
#pragma unroll
  for (int j = 0; j < 8; j++) convert(from.at[j], to.at[j]);
  return to;
}

// A matrix in shared memory. From row to row it is an odd multiple of 16 bytes, so that eight rows of ldmatrix, or
// eight floats of a column, lie in different banks.
template <class T, int kHeight, int kWidth>
struct alignas(16) Tile {
  T at[kHeight][kWidth + 16 / sizeof(T)];

  __device__ Eight<T>& eight(int r, int c) { return *(Eight<T>*)&at[r][c]; }
};

// The mask of a wide tile: bit j of byte [r, c] is for column c + 16 j.
struct Mask {
  alignas(8) uint8_t at[kRows][16];

  __device__ void make(const Dropout& dropout, int64_t row0, int64_t col0) {
    const uint64_t seed = (uint64_t)*dropout.seed;
    const uint32_t counter0 = (uint32_t)(col0 / kMaskGroup * 16);
    for (int i = threadIdx.x; i < kRows * 16; i += kThreads)
      at[i / 16][i % 16] = keep_bits(seed, row0 + i / 16, counter0 + i % 16, dropout.threshold);
  }
  // Zeroes those of the elements [r, c .. c + 8) that are dropped.
  template <class T>
  __device__ void apply(int r, int c, Eight<T>& v) const {
    const uint2 bytes = *(const uint2*)&at[r][c % 16];
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (!((j < 4 ? bytes.x : bytes.y) >> (j % 4 * 8 + c / 16) & 1)) v.at[j] = T{};
  }
};

// put(r, c, elements [row0 + r, col0 + c .. + 8) of m, zeros outside it) for every eight of a tile kHeight x kWidth.
template <int kHeight, int kWidth, class T, class Put>
__device__ void stage(const Matrix<const T>& m, int64_t row0, int64_t col0, Put put) {
  constexpr int kRowEights = kWidth / 8, kStep = kThreads / kRowEights;  // rows that all threads take together
  constexpr int kBatch = kHeight < 4 * kStep ? kHeight / kStep : 4;      // loads under way before the first is used
  static_assert(kHeight % (kStep * kBatch) == 0);
  const int r = threadIdx.x / kRowEights, c = threadIdx.x % kRowEights * 8;
  const bool aligned = m.aligned();
#pragma unroll 1
  for (int step = 0; step < kHeight; step += kStep * kBatch) {
    Eight<T> loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) loaded[i] = m.load(row0 + step + i * kStep + r, col0 + c, aligned);
#pragma unroll
    for (int i = 0; i < kBatch; i++) put(step + i * kStep + r, c, loaded[i]);
  }
}

// tile = m from [row0, col0] on, dropped elements zeroed where there is a mask.
template <class T, int kHeight, int kWidth, class Source>
__device__ void stage(Tile<T, kHeight, kWidth>& tile, const Matrix<const Source>& m, int64_t row0, int64_t col0,
                      const Mask* mask = nullptr) {
  stage<kHeight, kWidth>(m, row0, col0, [&](int r, int c, Eight<Source>& v) {
    if (mask) mask->apply(r, c, v);
    tile.eight(r, c) = convert<T>(v);
  });
}

// a [R, C], or b [C, R].
template <class T>
struct Adapter {
  Matrix<const T> m;
  bool transposed;

  // tile [kRank, kCols] = the rows from rank0 and columns from col0 of a, or of b^T.
  template <int kRank>
  __device__ void stage(Tile<T, kRank, kCols>& tile, int64_t rank0, int64_t col0) const {
    if (!transposed) return cuda::stage(tile, m, rank0, col0);
    cuda::stage<kCols, kRank>(m, col0, rank0, [&](int c, int r, const Eight<T>& v) {
#pragma unroll
      for (int j = 0; j < 8; j++) tile.at[r + j][c] = v.at[j];
    });
  }
};

// Element [i, k] of an operand that is stored [i, k], or by depth [k, i].
template <bool kByDepth, class Operand>
__device__ auto& element(Operand& operand, int i, int k) {
  return kByDepth ? operand.at[k][i] : operand.at[i][k];
}

// A product [I, J] on the FMA units. Thread (u, v) of 16 x 8 has the elements [u + 16 e, v + 8 f].
template <int I, int J>
struct FmaProduct {
  float acc[I / 16][J / 8] = {};

  template <bool kLeftByDepth, bool kRightByDepth, class Left, class Right>
  __device__ void add(const Left& left, const Right& right, int depth) {
    const int u = threadIdx.x / 8, v = threadIdx.x % 8;
#pragma unroll 4
    for (int k = 0; k < depth; k++) {
      float l[I / 16], r[J / 8];
#pragma unroll
      for (int e = 0; e < I / 16; e++) l[e] = element<kLeftByDepth>(left, u + 16 * e, k);
#pragma unroll
      for (int f = 0; f < J / 8; f++) r[f] = element<kRightByDepth>(right, v + 8 * f, k);
#pragma unroll
      for (int e = 0; e < I / 16; e++)
#pragma unroll
        for (int f = 0; f < J / 8; f++) acc[e][f] = fmaf(l[e], r[f], acc[e][f]);
    }
  }

  template <class Put>  // put(i, j, element) for the elements of this thread
  __device__ void each(Put put) const {
    const int u = threadIdx.x / 8, v = threadIdx.x % 8;
#pragma unroll
    for (int e = 0; e < I / 16; e++)
#pragma unroll
      for (int f = 0; f < J / 8; f++) put(u + 16 * e, v + 8 * f, acc[e][f]);
  }
};

// The same on the tensor cores, for operands of 16-bit type T. A warp has I / 4 rows; fragments are as in mma.cuh.
template <class T, int I, int J>
struct MmaProduct {
  float acc[I / 64][J / 8][4] = {};

  template <bool kLeftByDepth, bool kRightByDepth, class Left, class Right>
  __device__ void add(const Left& left, const Right& right, int depth) {
    const int i0 = threadIdx.x / 32 * (I / 4), lane = threadIdx.x % 32;
    // Lanes 8 q .. 8 q + 7 give ldmatrix the rows of the q-th of four 8 x 8 matrices, which lie in a tile one below
    // another and then beside, or beside one another and then below.
    const int below_row = lane % 16, below_col = lane / 16 * 8;
    const int beside_row = lane % 8 + lane / 16 * 8, beside_col = lane / 8 % 2 * 8;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t l[I / 64][4], r[4];
#pragma unroll
      for (int e = 0; e < I / 64; e++) {
        const int i = i0 + 16 * e;
        if constexpr (kLeftByDepth)
          ldmatrix_x4_trans(l[e], &left.at[k + beside_row][i + beside_col]);
        else
          ldmatrix_x4(l[e], &left.at[i + below_row][k + below_col]);
      }
#pragma unroll
      for (int j = 0; j < J; j += 16) {
        if constexpr (kRightByDepth)
          ldmatrix_x4_trans(r, &right.at[k + below_row][j + below_col]);
        else
          ldmatrix_x4(r, &right.at[j + beside_row][k + beside_col]);
#pragma unroll
        for (int e = 0; e < I / 64; e++) {
          mma_m16n8k16<T>(acc[e][j / 8], l[e], r[0], r[1]);
          mma_m16n8k16<T>(acc[e][j / 8 + 1], l[e], r[2], r[3]);
        }
      }
    }
  }

  template <class Put>
  __device__ void each(Put put) const {
    const int i0 = threadIdx.x / 32 * (I / 4) + threadIdx.x % 32 / 4, j0 = threadIdx.x % 4 * 2;
#pragma unroll
    for (int e = 0; e < I / 64; e++)
#pragma unroll
      for (int f = 0; f < J / 8; f++)
#pragma unroll
        for (int n = 0; n < 4; n++) put(i0 + 16 * e + n / 2 * 8, j0 + 8 * f + n % 2, acc[e][f][n]);
  }
};

template <class T, int I, int J>
using Product = std::conditional_t<std::is_same_v<T, float>, FmaProduct<I, J>, MmaProduct<T, I, J>>;

template <class W, int kRank>
struct DownTiles {
  Tile<W, kRows, kCols> wide;
  Tile<W, kRank, kCols> adapter;
  Mask mask;
};

// out [M, R] = factor (t . D) w^T
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads)
    down(Matrix<const X> t, Adapter<W> w, float* out, int64_t R, float factor, Dropout dropout) {
  auto& tiles = *(DownTiles<W, kRank>*)dynamic_shared;
  const int64_t rank_blocks = ceil_div(R, kRank);
  const int64_t row0 = blockIdx.x / rank_blocks * kRows, rank0 = blockIdx.x % rank_blocks * kRank;
  Product<W, kRows, kRank> product;
  for (int64_t col0 = 0; col0 < t.cols; col0 += kCols) {
    if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
    __syncthreads();  // the mask is whole, and the tiles have been read
    stage(tiles.wide, t, row0, col0, dropout.threshold ? &tiles.mask : nullptr);
    w.stage(tiles.adapter, rank0, col0);
    __syncthreads();
    product.template add<false, false>(tiles.wide, tiles.adapter, (int)min((int64_t)kCols, t.cols - col0));
  }
  product.each([&](int i, int j, float sum) {
    if (row0 + i < t.rows && rank0 + j < R) out[(row0 + i) * R + rank0 + j] = sum * factor;
  });
}

template <class W, int kRank>
struct UpTiles {
  struct Operands {
    Tile<W, kRows, kRank> narrow;
    Tile<W, kRank, kCols> adapter;
  };
  union {
    Operands in;
    Tile<float, kRows, kCols> wide;
  };
  Mask mask;
};

// out [M, C] = bias + factor (s w) . D; there is a bias or a mask, or neither.
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads)
    up(Matrix<const float> s, Adapter<W> w, const X* bias, Matrix<X> out, float factor, Dropout dropout) {
  auto& tiles = *(UpTiles<W, kRank>*)dynamic_shared;
  const int64_t col_blocks = ceil_div(out.cols, kCols);
  const int64_t row0 = blockIdx.x / col_blocks * kRows, col0 = blockIdx.x % col_blocks * kCols;
  if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
  Product<W, kRows, kCols> product;
  for (int64_t rank0 = 0; rank0 < s.cols; rank0 += kRank) {
    __syncthreads();  // the tiles have been read
    stage(tiles.in.narrow, s, row0, rank0);
    w.stage(tiles.in.adapter, rank0, col0);
    __syncthreads();
    product.template add<false, true>(tiles.in.narrow, tiles.in.adapter, (int)min((int64_t)kRank, s.cols - rank0));
  }
  __syncthreads();
  product.each([&](int i, int j, float sum) { tiles.wide.at[i][j] = sum * factor; });
  __syncthreads();

  const Matrix<const X> biases{bias, 0, out.rows, out.cols};  // a matrix of equal rows
  const bool aligned = out.aligned(), bias_aligned = biases.aligned();
  for (int i = threadIdx.x; i < kRows * kCols / 8; i += kThreads) {
    const int r = i / (kCols / 8), c = i % (kCols / 8) * 8;
    Eight<float> v = tiles.wide.eight(r, c);
    if (dropout.threshold) tiles.mask.apply(r, c, v);
    if (bias) {
      const Eight<float> add = convert<float>(biases.load(row0 + r, col0 + c, bias_aligned));
#pragma unroll
      for (int j = 0; j < 8; j++) v.at[j] += add.at[j];
    }
    out.store(row0 + r, col0 + c, convert<X>(v), aligned);
  }
}

template <class W, int kRank>
struct OuterTiles {
  Tile<W, kRows, kCols> wide;
  Tile<W, kRows, kRank> narrow;
  Mask mask;
};

// out [part, r, c] = factor s^T (t . D) over the rows of each part; r and c are r_step and c_step elements apart.
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads) outer(Matrix<const float> s, Matrix<const X> t, float* out, int64_t r_step,
                                                  int64_t c_step, int64_t part_rows, float factor, Dropout dropout) {
  auto& tiles = *(OuterTiles<W, kRank>*)dynamic_shared;
  const int64_t R = s.cols, rank_blocks = ceil_div(R, kRank), col_blocks = ceil_div(t.cols, kCols);
  const int64_t rank0 = blockIdx.x % rank_blocks * kRank, col0 = blockIdx.x / rank_blocks % col_blocks * kCols;
  const int64_t part = blockIdx.x / rank_blocks / col_blocks;
  s.rows = t.rows = min(t.rows, (part + 1) * part_rows);
  Product<W, kCols, kRank> product;
  for (int64_t row0 = part * part_rows; row0 < t.rows; row0 += kRows) {
    if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
    __syncthreads();  // the mask is whole, and the tiles have been read
    stage(tiles.wide, t, row0, col0, dropout.threshold ? &tiles.mask : nullptr);
    stage(tiles.narrow, s, row0, rank0);
    __syncthreads();
    product.template add<true, true>(tiles.wide, tiles.narrow, (int)min((int64_t)kRows, t.rows - row0));
  }
  out += part * R * t.cols;
  product.each([&](int i, int j, float sum) {
    if (col0 + i < t.cols && rank0 + j < R) out[(rank0 + j) * r_step + (col0 + i) * c_step] = sum * factor;
  });
}

// out [size] = the sum of parts [count, size], in order.
template <class W>
__global__ void __launch_bounds__(kThreads) sum(const float* parts, W* out, int64_t count, int64_t size) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0;
  for (int64_t part = 0; part < count; part++) total += parts[part * size + i];
  convert(total, out[i]);
}

// How `outer` cuts M rows up, depending on nothing but the sizes.
struct Parts {
  int64_t rows, count;

  static Parts of(int64_t M, int64_t C, int64_t R) {
    const int64_t rank = R <= kSmallRank ? kSmallRank : kLargeRank;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(C, kCols) * ceil_div(R, rank));
    const int64_t wanted = std::max<int64_t>(1, std::min(ceil_div(kOuterBlocks, blocks), ceil_div(M, kPartRows)));
    const int64_t rows = std::max<int64_t>(1, ceil_div(ceil_div(M, wanted), kRows)) * kRows;
    return {rows, std::max<int64_t>(1, ceil_div(M, rows))};
  }
  int64_t floats(int64_t C, int64_t R) const { return count * C * R; }
};

template <class... Parameters, class... Arguments>
void start(const char* op, void (*kernel)(Parameters...), int64_t blocks, size_t shared, void* stream,
           Arguments... arguments) {
  if (blocks > 0) launch_shared(op, kernel, dim3((unsigned)blocks), kThreads, shared, stream, arguments...);
}

// The launches of one choice of types and kRank.
template <class X, class W, int kRank>
struct Launch {
  const char* op;
  void* stream;
  int64_t M, R;

  void start_down(const void* t, int64_t t_row, int64_t C, const Adapter<W>& w, float* out, float factor,
                  const Dropout& dropout) const {
    start(op, down<X, W, kRank>, ceil_div(M, kRows) * ceil_div(R, kRank), sizeof(DownTiles<W, kRank>), stream,
          Matrix<const X>{(const X*)t, t_row, M, C}, w, out, R, factor, dropout);
  }
  void start_up(const float* s, const Adapter<W>& w, const void* bias, void* out, int64_t C, float factor,
                const Dropout& dropout) const {
    start(op, up<X, W, kRank>, ceil_div(M, kRows) * ceil_div(C, kCols), sizeof(UpTiles<W, kRank>), stream,
          Matrix<const float>{s, R, M, R}, w, (const X*)bias, Matrix<X>{(X*)out, C, M, C}, factor, dropout);
  }
  // out is [C, R] where `transposed`, else [R, C].
  void start_outer(const float* s, const void* t, int64_t t_row, int64_t C, void* out, bool transposed, float* parts,
                   float factor, const Dropout& dropout) const {
    const Parts cut = Parts::of(M, C, R);
    start(op, outer<X, W, kRank>, ceil_div(C, kCols) * ceil_div(R, kRank) * cut.count, sizeof(OuterTiles<W, kRank>),
          stream, Matrix<const float>{s, R, M, R}, Matrix<const X>{(const X*)t, t_row, M, C}, parts, transposed ? 1 : C,
          transposed ? R : 1, cut.rows, factor, dropout);
    start(op, sum<W>, ceil_div(C * R, kThreads), 0, stream, parts, (W*)out, cut.count, C * R);
  }
};

template <class T>
struct Type {
  using type = T;
};

// use(Type<X>, Type<W>, rank) for the types and kRank of a call.
template <class Use>
void with_types(int dtype, int adapter_dtype, int64_t R, Use use) {
  auto with_rank = [&](auto x, auto w) {
    if (R <= kSmallRank)
      use(x, w, std::integral_constant<int, kSmallRank>());
    else
      use(x, w, std::integral_constant<int, kLargeRank>());
  };
  auto with_adapter = [&](auto x) {
    if (adapter_dtype == dtype)
      with_rank(x, x);
    else
      with_rank(x, Type<float>());
  };
  switch (dtype) {
    case kFloat32: with_rank(Type<float>(), Type<float>()); break;
    case kBFloat16: with_adapter(Type<__nv_bfloat16>()); break;
    default: with_adapter(Type<__half>());
  }
}

}  // namespace

int64_t lora_workspace(int64_t M, int64_t N, int64_t K, int64_t R) {
  return M * R + std::max(Parts::of(M, K, R).floats(K, R), Parts::of(M, N, R).floats(N, R));
}

void lora_forward(const void* x, const void* a, const void* b, const void* bias, void* y0, float* s, int64_t M,
                  int64_t N, int64_t K, int64_t R, int64_t x_row, float scale, double dropout_p, const int64_t* seed,
                  int dtype, int adapter_dtype, void* stream) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  with_types(dtype, adapter_dtype, R, [&](auto x_type, auto w_type, auto rank) {
    using X = typename decltype(x_type)::type;
    using W = typename decltype(w_type)::type;
    const Launch<X, W, rank> with{"lora_forward", stream, M, R};
    with.start_down(x, x_row, K, {{(const W*)a, K, R, K}, false}, s, dropout.scale, dropout);
    with.start_up(s, {{(const W*)b, R, N, R}, true}, bias, y0, N, scale, Dropout::none());
  });
}

void lora_backward(const void* dy, const void* x, const void* a, const void* b, const float* s, void* dx0, void* da,
                   void* db, float* workspace, int64_t M, int64_t N, int64_t K, int64_t R, int64_t dy_row,
                   int64_t x_row, float scale, double dropout_p, const int64_t* seed, int dtype, int adapter_dtype,
                   void* stream) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  float *ds = workspace, *parts = workspace + M * R;
  with_types(dtype, adapter_dtype, R, [&](auto x_type, auto w_type, auto rank) {
    using X = typename decltype(x_type)::type;
    using W = typename decltype(w_type)::type;
    const Launch<X, W, rank> with{"lora_backward", stream, M, R};
    if (dx0 || da) with.start_down(dy, dy_row, N, {{(const W*)b, R, N, R}, true}, ds, scale, Dropout::none());
    if (dx0) with.start_up(ds, {{(const W*)a, K, R, K}, false}, nullptr, dx0, K, dropout.scale, dropout);
    if (da) with.start_outer(ds, x, x_row, K, da, false, parts, dropout.scale, dropout);
    if (db) with.start_outer(s, dy, dy_row, N, db, true, parts, scale, Dropout::none());
  });
}

}  // namespace fusetune::cuda
