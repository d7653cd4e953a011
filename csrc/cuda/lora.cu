// LoRA linear (csrc/lora.h): the three products of both passes. D is the mask of the dropout:
//
//   down    out [M, R] = factor (t . D) w^T           t is x or dy, out s or ds
//   up      out [M, C] = bias + factor (t w) . D      t is s or ds, out y0 or dx0
//   outer   out [R, C] = factor t^T (u . D)           over parts of the rows, and the parts summed in a fixed order
//
// A block works on tiles of three matrices, and multiplies two of them into the third:
//
//   wide      kRows x kCols   of x, dy, y0 or dx0
//   narrow    kRows x kRank   of s or ds
//   adapter   kRank x kCols   of w
//
// All products take the tensor cores. 16-bit adapters are multiplied as they are, with s and ds rounded to their type;
// float32 ones as TF32 products of their high and low halves, in an error of float32's order.
//
// Bytes: each product reads or writes its [M, C] matrix once, for ranks up to kRank; s and w come from the cache. Blocks
// that read the same rows of x for other ranks, or for other masks, are neighbours, and find them in the cache.
#include "../lora.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
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

// A matrix in shared memory. From row to row it is an odd multiple of 16 bytes, so that eight rows of ldmatrix lie in
// different banks; or for floats that a product takes by depth, whose four rows of eight are then in different banks, an
// odd multiple of 32.
template <class T, int kHeight, int kWidth, bool kByDepth = false>
struct alignas(16) Tile {
  T at[kHeight][kWidth + (kByDepth && sizeof(T) == 4 ? 32 : 16) / sizeof(T)];

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
template <class T, int kHeight, int kWidth, bool kByDepth, class Source>
__device__ void stage(Tile<T, kHeight, kWidth, kByDepth>& tile, const Matrix<const Source>& m, int64_t row0,
                      int64_t col0, const Mask* mask = nullptr) {
  stage<kHeight, kWidth>(m, row0, col0, [&](int r, int c, Eight<Source>& v) {
    if (mask) mask->apply(r, c, v);
    tile.eight(r, c) = convert<T>(v);
  });
}

// w [R, C] as a [R, C], or as b [C, R].
template <class T>
struct Adapter {
  Matrix<const T> m;
  bool transposed;

  static Adapter make(const void* w, int64_t R, int64_t C, int64_t w_rank, int64_t w_col) {
    const T* p = (const T*)w;
    return w_col == 1 ? Adapter{{p, w_rank, R, C}, false} : Adapter{{p, w_col, C, R}, true};
  }
  // `count` ranks from `begin` on.
  __host__ __device__ Adapter ranks(int64_t begin, int64_t count) const {
    if (transposed) return {{m.p + begin, m.row, m.rows, count}, true};
    return {{m.p + begin * m.row, m.row, count, m.cols}, false};
  }
  // tile [kRank, kCols] = w from [rank0, col0] on.
  template <int kRank, bool kByDepth>
  __device__ void stage(Tile<T, kRank, kCols, kByDepth>& tile, int64_t rank0, int64_t col0) const {
    if (!transposed) return cuda::stage(tile, m, rank0, col0);
    cuda::stage<kCols, kRank>(m, col0, rank0, [&](int c, int r, const Eight<T>& v) {
#pragma unroll
      for (int j = 0; j < 8; j++) tile.at[r + j][c] = v.at[j];
    });
  }
};

// put(i, j, element) for the elements of this thread, of a product of I rows.
template <int I, class Sums, class Put>
__device__ void each_element(const Sums& acc, Put put) {
  const int i0 = threadIdx.x / 32 * (I / 4) + threadIdx.x % 32 / 4, j0 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int e = 0; e < (int)std::extent_v<Sums, 0>; e++)
#pragma unroll
    for (int f = 0; f < (int)std::extent_v<Sums, 1>; f++)
#pragma unroll
      for (int n = 0; n < 4; n++) put(i0 + 16 * e + n / 2 * 8, j0 + 8 * f + n % 2, acc[e][f][n]);
}

// A float as the sum of two TF32 numbers, and a product of such: high high' + finite low' + low finite', which leaves out
// 2^-22 of it. `finite` is `high` but for infinities and NaNs: times a zero half they would make NaNs of infinities.
struct Split {
  uint32_t high, finite, low;

  __device__ static Split make(float x) {
    const bool finite = fabsf(x) <= FLT_MAX;
    const uint32_t high = to_tf32(x);
    return {high, finite ? high : 0, finite ? to_tf32(x - __uint_as_float(high)) : 0};
  }
};

// Fragment of mma_m16n8k8_tf32: the 16 x 8 elements from [i, k] on of an operand that is stored [i, k], or by depth
// [k, i]. Those of two 8 x 8 B side by side lie the same way, but for the order of the inner two.
template <bool kByDepth, bool kRight, class Operand>
__device__ void load_fragment(float (&f)[4], const Operand& operand, int i, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (kByDepth) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int low = n % 2, high = n / 2;
      f[n] = operand.at[k + lane % 4 + 4 * (kRight ? low : high)][i + lane / 4 + 8 * (kRight ? high : low)];
    }
  } else {
    uint32_t bits[4];
    const int quarter = lane / 8, low = quarter % 2, high = quarter / 2;
    ldmatrix_x4(bits, &operand.at[i + lane % 8 + 8 * (kRight ? high : low)][k + 4 * (kRight ? low : high)]);
#pragma unroll
    for (int n = 0; n < 4; n++) f[n] = __uint_as_float(bits[n]);
  }
}

// A product [I, J] of float operands on the tensor cores; those of `left` are TF32 numbers where kExactLeft, as 16-bit
// ones are. A warp has I / 4 rows; fragments are as in mma.cuh.
template <int I, int J, bool kExactLeft>
struct Tf32Product {
  float acc[I / 64][J / 8][4] = {};

  template <bool kLeftByDepth, bool kRightByDepth, class Left, class Right>
  __device__ void add(const Left& left, const Right& right, int depth) {
    const int i0 = threadIdx.x / 32 * (I / 4);
#pragma unroll 1
    for (int k = 0; k < depth; k += 8) {
      uint32_t high[I / 64][4], finite[I / 64][4], low[I / 64][4];
#pragma unroll
      for (int e = 0; e < I / 64; e++) {
        float f[4];
        load_fragment<kLeftByDepth, false>(f, left, i0 + 16 * e, k);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const Split split = Split::make(f[n]);
          high[e][n] = split.high, finite[e][n] = split.finite, low[e][n] = split.low;
        }
      }
#pragma unroll
      for (int j = 0; j < J; j += 16) {
        float f[4];
        load_fragment<kRightByDepth, true>(f, right, j, k);
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          const Split b0 = Split::make(f[n]), b1 = Split::make(f[n + 1]);
#pragma unroll
          for (int e = 0; e < I / 64; e++) {
            auto& sum = acc[e][j / 8 + n / 2];
            mma_m16n8k8_tf32(sum, finite[e], b0.low, b1.low);
            if constexpr (!kExactLeft) mma_m16n8k8_tf32(sum, low[e], b0.finite, b1.finite);
            mma_m16n8k8_tf32(sum, high[e], b0.high, b1.high);
          }
        }
      }
    }
  }
  template <class Put>
  __device__ void each(Put put) const {
    each_element<I>(acc, put);
  }
};

// The same for operands of 16-bit type T.
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
    each_element<I>(acc, put);
  }
};

// Of wide tiles of X, or of narrow ones where X is float, with W.
template <class X, class W, int I, int J>
using Product =
    std::conditional_t<std::is_same_v<W, float>, Tf32Product<I, J, !std::is_same_v<X, float>>, MmaProduct<W, I, J>>;

template <class W, int kRank>
struct DownTiles {
  Tile<W, kRows, kCols> wide;
  Tile<W, kRank, kCols> adapter;
  Mask mask;
};

// The ranks of a stack of adapters: `masks` runs of `run`, each of which has a mask of its own.
struct Ranks {
  int64_t run, masks;

  template <int kRank>
  __host__ __device__ int64_t blocks() const {
    return masks * ceil_div(run, kRank);
  }
};

// out [M, R] = factor (t . D) w^T
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads)
    down(Matrix<const X> t, Adapter<W> w, Matrix<float> out, Ranks ranks, float factor, Dropout dropout) {
  auto& tiles = *(DownTiles<W, kRank>*)dynamic_shared;
  const int64_t rank_block = blockIdx.x % ranks.blocks<kRank>(), run_blocks = ceil_div(ranks.run, kRank);
  const int64_t row0 = blockIdx.x / ranks.blocks<kRank>() * kRows, rank0 = rank_block % run_blocks * kRank;
  const int64_t mask = rank_block / run_blocks;
  w = w.ranks(mask * ranks.run, ranks.run);
  dropout.seed += mask;
  Product<X, W, kRows, kRank> product;
  for (int64_t col0 = 0; col0 < t.cols; col0 += kCols) {
    if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
    __syncthreads();  // the mask is whole, and the tiles have been read
    stage(tiles.wide, t, row0, col0, dropout.threshold ? &tiles.mask : nullptr);
    w.stage(tiles.adapter, rank0, col0);
    __syncthreads();
    product.template add<false, false>(tiles.wide, tiles.adapter, (int)min((int64_t)kCols, t.cols - col0));
  }
  out.p += mask * ranks.run;
  product.each([&](int i, int j, float sum) {
    if (row0 + i < t.rows && rank0 + j < ranks.run) out.p[(row0 + i) * out.row + rank0 + j] = sum * factor;
  });
}

template <class W, int kRank>
struct UpTiles {
  struct Operands {
    Tile<W, kRows, kRank> narrow;
    Tile<W, kRank, kCols, true> adapter;
  };
  union {
    Operands in;
    Tile<float, kRows, kCols> wide;
  };
  Mask mask;
};

// A row to be added to each row of a matrix: of its type, or float32, or none.
template <class X>
struct Bias {
  const X* p;
  const float* p32;

  static Bias make(const void* bias, int dtype) {
    return dtype == kFloat32 ? Bias{nullptr, (const float*)bias} : Bias{(const X*)bias, nullptr};
  }
  __device__ explicit operator bool() const { return p || p32; }
  // Elements [c .. c + 8), zeros from C on.
  __device__ Eight<float> load(int64_t c, int64_t C) const {
    const Matrix<const float> m32{p32, 0, 1, C};
    if (p32) return m32.load(0, c, m32.aligned());
    const Matrix<const X> m{p, 0, 1, C};
    return convert<float>(m.load(0, c, m.aligned()));
  }
};

// out [M, C] (+)= bias + factor (t w) . D
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads) up(Matrix<const float> t, Adapter<W> w, Bias<X> bias, Matrix<X> out,
                                               float factor, Dropout dropout, bool accumulate) {
  auto& tiles = *(UpTiles<W, kRank>*)dynamic_shared;
  const int64_t col_blocks = ceil_div(out.cols, kCols);
  const int64_t row0 = blockIdx.x / col_blocks * kRows, col0 = blockIdx.x % col_blocks * kCols;
  if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
  Product<float, W, kRows, kCols> product;
  for (int64_t rank0 = 0; rank0 < t.cols; rank0 += kRank) {
    __syncthreads();  // the tiles have been read
    stage(tiles.in.narrow, t, row0, rank0);
    w.stage(tiles.in.adapter, rank0, col0);
    __syncthreads();
    product.template add<false, true>(tiles.in.narrow, tiles.in.adapter, (int)min((int64_t)kRank, t.cols - rank0));
  }
  __syncthreads();
  product.each([&](int i, int j, float sum) { tiles.wide.at[i][j] = sum * factor; });
  __syncthreads();

  const bool aligned = out.aligned();
  auto add = [](Eight<float>& v, const Eight<float>& more) {
#pragma unroll
    for (int j = 0; j < 8; j++) v.at[j] += more.at[j];
  };
  for (int i = threadIdx.x; i < kRows * kCols / 8; i += kThreads) {
    const int r = i / (kCols / 8), c = i % (kCols / 8) * 8;
    Eight<float> v = tiles.wide.eight(r, c);
    if (dropout.threshold) tiles.mask.apply(r, c, v);
    if (bias) add(v, bias.load(col0 + c, out.cols));
    if (accumulate) add(v, convert<float>(out.load(row0 + r, col0 + c, aligned)));
    out.store(row0 + r, col0 + c, convert<X>(v), aligned);
  }
}

template <class W, int kRank>
struct OuterTiles {
  Tile<W, kRows, kCols, true> wide;
  Tile<W, kRows, kRank, true> narrow;
  Mask mask;
};

// A matrix of any strides.
template <class T>
struct Strided {
  T* p;
  int64_t row, col;
};

// out [part, R, C] = factor t^T (u . D) over the rows of each part, which are part_rows; parts are part_size apart.
template <class X, class W, int kRank>
__global__ void __launch_bounds__(kThreads)
    outer(Matrix<const float> t, Matrix<const X> u, Strided<float> out, Ranks ranks, int64_t part_rows,
          int64_t part_size, float factor, Dropout dropout) {
  auto& tiles = *(OuterTiles<W, kRank>*)dynamic_shared;
  const int64_t rank_block = blockIdx.x % ranks.blocks<kRank>(), run_blocks = ceil_div(ranks.run, kRank);
  const int64_t rank0 = rank_block % run_blocks * kRank, mask = rank_block / run_blocks;
  const int64_t col_blocks = ceil_div(u.cols, kCols), block = blockIdx.x / ranks.blocks<kRank>();
  const int64_t col0 = block % col_blocks * kCols, part = block / col_blocks;
  t.p += mask * ranks.run;
  t.cols = ranks.run;
  dropout.seed += mask;
  t.rows = u.rows = min(u.rows, (part + 1) * part_rows);
  Product<X, W, kCols, kRank> product;
  for (int64_t row0 = part * part_rows; row0 < u.rows; row0 += kRows) {
    if (dropout.threshold) tiles.mask.make(dropout, row0, col0);
    __syncthreads();  // the mask is whole, and the tiles have been read
    stage(tiles.wide, u, row0, col0, dropout.threshold ? &tiles.mask : nullptr);
    stage(tiles.narrow, t, row0, rank0);
    __syncthreads();
    product.template add<true, true>(tiles.wide, tiles.narrow, (int)min((int64_t)kRows, u.rows - row0));
  }
  out.p += part * part_size + mask * ranks.run * out.row;
  product.each([&](int i, int j, float sum) {
    if (col0 + i < u.cols && rank0 + j < ranks.run) out.p[(rank0 + j) * out.row + (col0 + i) * out.col] = sum * factor;
  });
}

// out [size / width, width] = the sum of parts [count, size], in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum(const float* parts, Strided<T> out, int64_t count, int64_t size, int64_t width) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0;
  for (int64_t part = 0; part < count; part++) total += parts[part * size + i];
  convert(total, out.p[i / width * out.row + i % width * out.col]);
}

// How `outer` cuts M rows up, depending on nothing but the sizes.
struct Parts {
  int64_t rows, count;

  static Parts of(int64_t M, int64_t C, const Ranks& ranks) {
    const int64_t rank_blocks = ranks.run <= kSmallRank ? ranks.blocks<kSmallRank>() : ranks.blocks<kLargeRank>();
    const int64_t blocks = std::max<int64_t>(1, ceil_div(C, kCols) * rank_blocks);
    const int64_t wanted = std::max<int64_t>(1, std::min(ceil_div(kOuterBlocks, blocks), ceil_div(M, kPartRows)));
    const int64_t rows = std::max<int64_t>(1, ceil_div(ceil_div(M, wanted), kRows)) * kRows;
    return {rows, std::max<int64_t>(1, ceil_div(M, rows))};
  }
};

template <class... Parameters, class... Arguments>
void start(const char* op, void (*kernel)(Parameters...), int64_t blocks, size_t shared, void* stream,
           Arguments... arguments) {
  if (blocks > 0) launch_shared(op, kernel, dim3((unsigned)blocks), kThreads, shared, stream, arguments...);
}

// use(T()) for the type that a code stands for.
template <class Use>
void with_type(int dtype, Use use) {
  switch (dtype) {
    case kFloat32: return use(float());
    case kBFloat16: return use(__nv_bfloat16());
    default: return use(__half());
  }
}

// use(X(), W(), kRank) for the types of a call, of which W is X or float, and its ranks.
template <class Use>
void with_types(int dtype, int w_dtype, const Ranks& ranks, Use use) {
  with_type(dtype, [&](auto x) {
    auto with_rank = [&](auto w) {
      if (ranks.run <= kSmallRank)
        use(x, w, std::integral_constant<int, kSmallRank>());
      else
        use(x, w, std::integral_constant<int, kLargeRank>());
    };
    if (w_dtype == dtype)
      with_rank(x);
    else
      with_rank(float());
  });
}

// Without dropout one run, and no seed is read.
Ranks split_ranks(int64_t R, int64_t masks, const Dropout& dropout) {
  return dropout.threshold ? Ranks{R / masks, masks} : Ranks{R, 1};
}

}  // namespace

void lora_down(const void* t, const void* w, float* out, int64_t M, int64_t C, int64_t R, int64_t t_row, int64_t w_rank,
               int64_t w_col, int64_t out_row, float factor, double dropout_p, const int64_t* seed, int64_t masks,
               int dtype, int w_dtype, void* stream) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const Ranks ranks = split_ranks(R, masks, dropout);
  with_types(dtype, w_dtype, ranks, [&](auto x, auto y, auto rank) {
    using X = decltype(x);
    using W = decltype(y);
    start("lora_down", down<X, W, rank>, ceil_div(M, kRows) * ranks.blocks<rank>(), sizeof(DownTiles<W, rank>), stream,
          Matrix<const X>{(const X*)t, t_row, M, C}, Adapter<W>::make(w, R, C, w_rank, w_col),
          Matrix<float>{out, out_row, M, R}, ranks, factor * dropout.scale, dropout);
  });
}

void lora_up(const float* t, const void* w, const void* bias, void* out, int64_t M, int64_t C, int64_t R, int64_t t_row,
             int64_t w_rank, int64_t w_col, int64_t out_row, float factor, double dropout_p, const int64_t* seed,
             int64_t masks, bool accumulate, int dtype, int w_dtype, int bias_dtype, void* stream) {
  Dropout dropout = Dropout::make(dropout_p, seed);
  const Ranks ranks = split_ranks(R, masks, dropout);
  with_types(dtype, w_dtype, ranks, [&](auto x, auto y, auto rank) {
    using X = decltype(x);
    using W = decltype(y);
    const auto adapter = Adapter<W>::make(w, R, C, w_rank, w_col);
    for (int64_t mask = 0; mask < ranks.masks; mask++, dropout.seed++)
      start("lora_up", up<X, W, rank>, ceil_div(M, kRows) * ceil_div(C, kCols), sizeof(UpTiles<W, rank>), stream,
            Matrix<const float>{t + mask * ranks.run, t_row, M, ranks.run}, adapter.ranks(mask * ranks.run, ranks.run),
            Bias<X>::make(mask ? nullptr : bias, bias_dtype), Matrix<X>{(X*)out, out_row, M, C}, factor * dropout.scale,
            dropout, accumulate || mask);
  });
}

int64_t lora_outer_workspace(int64_t M, int64_t C, int64_t R, double dropout_p, int64_t masks) {
  return Parts::of(M, C, split_ranks(R, masks, Dropout::make(dropout_p, nullptr))).count * C * R;
}

void lora_outer(const float* t, const void* u, void* out, float* workspace, int64_t M, int64_t C, int64_t R,
                int64_t t_row, int64_t u_row, int64_t out_rank, int64_t out_col, float factor, double dropout_p,
                const int64_t* seed, int64_t masks, int dtype, int dot_dtype, int out_dtype, void* stream) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const Ranks ranks = split_ranks(R, masks, dropout);
  const Parts parts = Parts::of(M, C, ranks);
  const bool by_rank = out_rank >= out_col;  // parts are stored as out is
  with_types(dtype, dot_dtype, ranks, [&](auto x, auto y, auto rank) {
    using X = decltype(x);
    using W = decltype(y);
    start("lora_outer", outer<X, W, rank>, ceil_div(C, kCols) * ranks.blocks<rank>() * parts.count,
          sizeof(OuterTiles<W, rank>), stream, Matrix<const float>{t, t_row, M, R},
          Matrix<const X>{(const X*)u, u_row, M, C},
          by_rank ? Strided<float>{workspace, C, 1} : Strided<float>{workspace, 1, R}, ranks, parts.rows, C * R,
          factor * dropout.scale, dropout);
  });
  with_type(out_dtype, [&](auto z) {
    using Out = decltype(z);
    const Strided<Out> result =
        by_rank ? Strided<Out>{(Out*)out, out_rank, out_col} : Strided<Out>{(Out*)out, out_col, out_rank};
    start("lora_outer", sum<Out>, ceil_div(C * R, kThreads), 0, stream, workspace, result, parts.count, C * R,
          by_rank ? C : R);
  });
}

}  // namespace fusetune::cuda
