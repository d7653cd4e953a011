#include "../dora.h"

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kRows = 48;             // rows of w in flight, or rows of an item
constexpr int64_t kColumns = kMaskGroup;  // columns of w in flight; a block of 48 x 128 floats is 24 KiB
constexpr int64_t kStrip = 512;           // columns whose sums stay in the L1 cache
constexpr int64_t kMaxParts = 64;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Elements i .. i + n of a row, n <= W
template <class Element>
FUSETUNE_INLINE f32v load_at(const void* row, int dtype, int64_t i, int64_t n) {
  const Element* p = (const Element*)row + i;
  if constexpr (sizeof(Element) == 4)
    return n == W ? load(p) : load_first(p, n);
  else
    return load_as_float(p, dtype, n);
}
template <class Element>
FUSETUNE_INLINE void store_at(void* row, int dtype, int64_t i, f32v v, int64_t n) {
  Element* p = (Element*)row + i;
  if constexpr (sizeof(Element) == 4)
    n == W ? store(p, v) : store_first(p, v, n);
  else
    store_from_float(p, v, dtype, n);
}

// body(i, n) for the vectors of `begin .. end`: n is W but for the last one
template <class Body>
FUSETUNE_INLINE void vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, (int64_t)W);
  if (i < end) body(i, end - i);
}

template <class Element>
void forward_row(const void* pre, const float* g, const float* bias, const void* rest, void* y, int64_t N, int dtype) {
  vectors(0, N, [&](int64_t i, int64_t n) {
    f32v sum = bias ? load_at<float>(bias, kFloat32, i, n) : f32v{};
    if (rest) sum += load_at<Element>(rest, dtype, i, n);
    sum += load_at<float>(g, kFloat32, i, n) * load_at<Element>(pre, dtype, i, n);
    store_at<Element>(y, dtype, i, sum, n);
  });
}

template <class Element>
void backward_row(const void* dy, const void* pre, const float* g, void* dpre, float* dg, float* dbias, int64_t begin,
                  int64_t end, int dtype) {
  vectors(begin, end, [&](int64_t i, int64_t n) {
    const f32v d = load_at<Element>(dy, dtype, i, n), p = load_at<Element>(pre, dtype, i, n);
    store_at<Element>(dpre, dtype, i, load_at<float>(g, kFloat32, i, n) * d, n);
    store(dg + i - begin, load(dg + i - begin) + d * p);
    store(dbias + i - begin, load(dbias + i - begin) + d);
  });
}

}  // namespace

void dora_norm(const void* w, const void* a, const void* b, float* norm, int64_t N, int64_t K, int64_t R, int64_t w_row,
               int64_t w_col, float scale, int dtype, int adapter_dtype, int threads) {
  const Buffer<float> a_blocks(blocks(K, kColumns) * R * kColumns);  // of [R, kColumns], zeros beyond K

  auto pack_of = [&](int64_t item, float*) {
    const int64_t c0 = item * kColumns;
    float* rows = a_blocks.p + c0 * R;
    memset(rows, 0, 4 * R * kColumns);
    for (int64_t r = 0; r < R; r++)
      load_row(at(a, adapter_dtype, r * K + c0), adapter_dtype, smaller(kColumns, K - c0), rows + r * kColumns);
  };

  auto rows_of = [&](int64_t item, float* scratch) {
    const int64_t n0 = item * kRows, rows = smaller(kRows, N - n0);
    float* block = scratch;                    // [kRows, kColumns] of w, then of w + scale b a
    float* column = block + kRows * kColumns;  // [kRows]
    float* b_rows = column + kRows;            // [kRows, R]
    float squares[kRows] = {};

    load_row(at(b, adapter_dtype, n0 * R), adapter_dtype, rows * R, b_rows);
    for (int64_t i = 0; i < rows * R; i++) b_rows[i] *= scale;
    for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
      const int64_t cols = smaller(kColumns, K - c0);
      if (cols < kColumns) memset(block, 0, 4 * kRows * kColumns);
      if (w_col == 1)
        for (int64_t i = 0; i < rows; i++)
          load_row(at(w, dtype, (n0 + i) * w_row + c0), dtype, cols, block + i * kColumns);
      else
        for (int64_t c = 0; c < cols; c++) {
          load_row(at(w, dtype, n0 * w_row + (c0 + c) * w_col), dtype, rows, column);
          for (int64_t i = 0; i < rows; i++) block[i * kColumns + c] = column[i];
        }
      gemm(rows, padded(cols), R, {b_rows, R, 1}, plain_rows(a_blocks.p + c0 * R, kColumns), block, kColumns, true);
      for (int64_t i = 0; i < rows; i++) {
        f32v sum{};
        for (int64_t c = 0; c < cols; c += W) sum += load(block + i * kColumns + c) * load(block + i * kColumns + c);
        squares[i] += horizontal_sum(sum);
      }
    }
    for (int64_t i = 0; i < rows; i++) norm[n0 + i] = __builtin_sqrtf(squares[i]);
  };
  parallel(threads, kRows * (kColumns + 1 + R), Phase{blocks(K, kColumns), pack_of}, Phase{blocks(N, kRows), rows_of});
}

void dora_forward(const void* pre, const float* g, const float* bias, const void* rest, void* y, int64_t M, int64_t N,
                  int dtype, int threads) {
  auto rows_of = [&](int64_t item, float*) {
    for (int64_t m = item * kRows; m < smaller(M, (item + 1) * kRows); m++) {
      auto row = dtype == kFloat32 ? forward_row<float> : forward_row<uint16_t>;
      row(at(pre, dtype, m * N), g, bias, rest ? at(rest, dtype, m * N) : nullptr, at(y, dtype, m * N), N, dtype);
    }
  };
  parallel(threads, 0, Phase{blocks(M, kRows), rows_of});
}

void dora_backward(const void* dy, const void* pre, const float* g, void* dpre, float* dg, float* dbias, int64_t M,
                   int64_t N, int64_t dy_row, int dtype, int threads) {
  // The sums over rows are made in parts, and the parts added in a fixed order.
  const int64_t parts = smaller(blocks(M, kRows), kMaxParts), part_rows = parts ? blocks(M, parts) : 0;
  const int64_t width = padded(N);
  const Buffer<float> sums(parts * 2 * width);  // [part, dg and dbias, width]

  auto part_of = [&](int64_t item, float*) {
    float* part = sums.p + item * 2 * width;
    memset(part, 0, 4 * 2 * width);
    for (int64_t c0 = 0; c0 < N; c0 += kStrip)
      for (int64_t m = item * part_rows; m < smaller(M, (item + 1) * part_rows); m++) {
        auto row = dtype == kFloat32 ? backward_row<float> : backward_row<uint16_t>;
        row(at(dy, dtype, m * dy_row), at(pre, dtype, m * N), g, at(dpre, dtype, m * N), part + c0, part + width + c0,
            c0, smaller(N, c0 + kStrip), dtype);
      }
  };
  auto strip_of = [&](int64_t item, float*) {
    vectors(item * kStrip, smaller(N, (item + 1) * kStrip), [&](int64_t i, int64_t n) {
      f32v sum_g{}, sum_bias{};
      for (int64_t part = 0; part < parts; part++) {
        sum_g += load(sums.p + part * 2 * width + i);
        sum_bias += load(sums.p + part * 2 * width + width + i);
      }
      store_first(dg + i, sum_g, n);
      store_first(dbias + i, sum_bias, n);
    });
  };
  parallel(threads, 0, Phase{parts, part_of}, Phase{blocks(N, kStrip), strip_of});
}

void dora_dropout(const void* x, void* out, int64_t M, int64_t K, int64_t x_row, double dropout_p, uint64_t seed,
                  int dtype, int threads) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  auto rows_of = [&](int64_t item, float* row) {
    int32_t keep[kMaskGroup];
    for (int64_t m = item * kRows; m < smaller(M, (item + 1) * kRows); m++)
      for (int64_t c0 = 0; c0 < K; c0 += kMaskGroup) {
        const int64_t cols = smaller(kMaskGroup, K - c0);
        load_row(at(x, dtype, m * x_row + c0), dtype, cols, row);
        dropout.keep_mask(m, c0 / kMaskGroup, keep);
        for (int64_t c = 0; c < cols; c += W)
          store(row + c, (f32v)((i32v)(load(row + c) * dropout.scale) & load(keep + c)));
        store_row(at(out, dtype, m * K + c0), dtype, cols, row);
      }
  };
  parallel(threads, kMaskGroup, Phase{blocks(M, kRows), rows_of});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
