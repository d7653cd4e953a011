#include "../lora.h"

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kRows = 48;             // rows of x or dy in flight: whole tiles at every level
constexpr int64_t kColumns = kMaskGroup;  // columns in flight; a block of 48 x 128 floats is 24 KiB
constexpr int64_t kPartRows = 4 * kRows;  // rows whose share of da and db is summed by itself, or more of them
constexpr int64_t kMaxParts = 64;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t column_blocks(int64_t n) { return (n + kColumns - 1) / kColumns; }
int64_t row_blocks(int64_t m) { return (m + kRows - 1) / kRows; }

// The adapter is packed a block of kColumns columns of a, or rows of b, at a time:
// rows c0 .. c0 + n of b [N, R] as float32 [n, width], zeros beyond R ...
void load_b(const void* b, int dtype, int64_t R, int64_t c0, int64_t n, float* rows) {
  const int64_t width = padded(R);
  for (int64_t i = 0; i < n; i++) {
    load_row(at(b, dtype, (c0 + i) * R), dtype, R, rows + i * width);
    for (int64_t r = R; r < width; r++) rows[i * width + r] = 0;
  }
}
// ... and columns c0 .. c0 + n of a [R, K] as [width, kColumns], zeros elsewhere.
void load_a(const void* a, int dtype, int64_t R, int64_t K, int64_t c0, int64_t n, float* rows) {
  memset(rows, 0, 4 * padded(R) * kColumns);
  for (int64_t r = 0; r < R; r++) load_row(at(a, dtype, r * K + c0), dtype, n, rows + r * kColumns);
}

// A block of x or dy in float32: `rows` rows from r0, `cols` columns from c0.
struct Source {
  const void* p;
  int dtype;
  int64_t row;

  Matrix in_place(int64_t r0, int64_t c0) const { return {(const float*)p + r0 * row + c0, row, 1}; }
  // A block that needs conversion is staged in scratch [rows, kColumns].
  Matrix block(int64_t r0, int64_t rows, int64_t c0, int64_t cols, float* scratch) const {
    if (dtype == kFloat32) return in_place(r0, c0);
    for (int64_t i = 0; i < rows; i++) load_row(at(p, dtype, (r0 + i) * row + c0), dtype, cols, scratch + i * kColumns);
    return {scratch, kColumns, 1};
  }
  // The block with its dropped elements zeroed; `keep` [rows, kColumns] is the mask.
  Matrix block(int64_t r0, int64_t rows, int64_t c0, int64_t cols, float* scratch, const int32_t* keep) const {
    for (int64_t i = 0; i < rows; i++) {
      float* out = scratch + i * kColumns;
      load_row(at(p, dtype, (r0 + i) * row + c0), dtype, cols, out);
      for (int64_t c = 0; c < cols; c += W) store(out + c, (f32v)((i32v)load(out + c) & load(keep + i * kColumns + c)));
    }
    return {scratch, kColumns, 1};
  }
};

void mask_block(const Dropout& dropout, int64_t r0, int64_t rows, int64_t c0, int32_t* keep) {
  for (int64_t i = 0; i < rows; i++) dropout.keep_mask(r0 + i, c0 / kMaskGroup, keep + i * kColumns);
}

// dst [rows, cols] of dst_row = left [rows, depth] right [depth, cols]; written through scratch [rows, kColumns] where
// it is masked, or of another type, or its last vector would reach into the next row.
void product_into(void* dst, int dtype, int64_t dst_row, int64_t r0, int64_t rows, int64_t c0, int64_t cols,
                  int64_t depth, Matrix left, Panels right, const int32_t* keep, float* scratch) {
  if (dtype == kFloat32 && cols % W == 0 && !keep) {
    gemm(rows, cols, depth, left, right, (float*)dst + r0 * dst_row + c0, dst_row, false);
    return;
  }
  gemm(rows, padded(cols), depth, left, right, scratch, kColumns, false);
  for (int64_t i = 0; i < rows; i++) {
    float* row = scratch + i * kColumns;
    for (int64_t c = 0; keep && c < cols; c += W)
      store(row + c, (f32v)((i32v)load(row + c) & load(keep + i * kColumns + c)));
    store_row(at(dst, dtype, (r0 + i) * dst_row + c0), dtype, cols, row);
  }
}

}  // namespace

void lora_forward(const void* x_, const void* a, const void* b, const void* bias, void* y0, float* s, int64_t M,
                  int64_t N, int64_t K, int64_t R, int64_t x_row, float scale, double dropout_p, uint64_t seed,
                  int dtype, int adapter_dtype, int y_dtype, int threads) {
  const Source x{x_, dtype, x_row};
  const Dropout dropout = Dropout::make(dropout_p, seed);
  // b^T has the bias as one more row, and s a column of ones for it: y0 = [scale s, 1] [b^T; bias].
  const int64_t width = padded(R), depth = padded(R + 1);
  const Buffer<float> a_t(column_blocks(K) * kColumns * width);  // [K, width]
  const Buffer<float> b_t(column_blocks(N) * kColumns * depth);  // panels [depth, N]

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0 = item * kColumns;
    if (item < column_blocks(K)) {
      load_a(a, adapter_dtype, R, K, c0, smaller(kColumns, K - c0), scratch);
      transpose(scratch, kColumns, width, kColumns, a_t.p + c0 * width, width);
      return;
    }
    c0 -= column_blocks(K) * kColumns;
    const int64_t n = smaller(kColumns, N - c0);
    float* rows = scratch + kColumns;
    memset(scratch, 0, 4 * (1 + width) * kColumns);
    load_b(b, adapter_dtype, R, c0, n, rows);
    if (bias) load_row(at(bias, dtype, c0), dtype, n, scratch);
    for (int64_t c = 0; c < kColumns; c += kPanel) {
      float* panel = b_t.p + (c0 + c) * depth;
      transpose(rows + c * width, width, kPanel, width, panel, kPanel);
      memcpy(panel + R * kPanel, scratch + c, 4 * kPanel);
    }
  };

  auto rows_of = [&](int64_t item, float* scratch) {
    const int64_t r0 = item * kRows, rows = smaller(kRows, M - r0);
    float* block = scratch;
    int32_t* keep = (int32_t*)(block + kRows * kColumns);
    float* s_block = (float*)keep + kRows * kColumns;  // [kRows, width]
    float* left = s_block + kRows * width;             // [kRows, depth]

    if (K == 0) memset(s_block, 0, 4 * rows * width);
    for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
      const int64_t cols = smaller(kColumns, K - c0);
      if (dropout.threshold) mask_block(dropout, r0, rows, c0, keep);
      const Matrix x_block =
          dropout.threshold ? x.block(r0, rows, c0, cols, block, keep) : x.block(r0, rows, c0, cols, block);
      gemm(rows, width, cols, x_block, plain_rows(a_t.p + c0 * width, width), s_block, width, c0 > 0);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t r = 0; r < R; r++) {
        const float kept = s_block[i * width + r] * dropout.scale;
        s[(r0 + i) * R + r] = kept;
        left[i * depth + r] = kept * scale;
      }
    for (int64_t i = 0; i < rows; i++) left[i * depth + R] = 1;
    for (int64_t c0 = 0; c0 < N; c0 += kColumns)
      product_into(y0, y_dtype, N, r0, rows, c0, smaller(kColumns, N - c0), bias ? R + 1 : R, {left, depth, 1},
                   packed_panels(b_t.p + c0 * depth, depth), nullptr, block);
  };
  parallel(threads, larger(2 * kRows * kColumns + kRows * (width + depth), (1 + width) * kColumns),
           Phase{column_blocks(K) + column_blocks(N), pack_of}, Phase{row_blocks(M), rows_of});
}

void lora_backward(const void* dy_, const void* x_, const void* a, const void* b, const float* s, void* dx0, void* da,
                   void* db, int64_t M, int64_t N, int64_t K, int64_t R, int64_t dy_row, int64_t x_row, float scale,
                   double dropout_p, uint64_t seed, int dtype, int adapter_dtype, int dx_dtype, int threads) {
  const Source dy{dy_, dtype, dy_row}, x{x_, dtype, x_row};
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const int64_t width = padded(R);
  const Buffer<float> a_panels(column_blocks(K) * kColumns * width);  // [width, K]
  const Buffer<float> b_rows(column_blocks(N) * kColumns * width);    // [N, width]

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0 = item * kColumns;
    if (item < column_blocks(K)) {
      load_a(a, adapter_dtype, R, K, c0, smaller(kColumns, K - c0), scratch);
      for (int64_t c = 0; c < kColumns; c += kPanel)
        for (int64_t r = 0; r < width; r++)
          memcpy(a_panels.p + (c0 + c) * width + r * kPanel, scratch + r * kColumns + c, 4 * kPanel);
      return;
    }
    c0 -= column_blocks(K) * kColumns;
    load_b(b, adapter_dtype, R, c0, smaller(kColumns, N - c0), b_rows.p + c0 * width);
  };

  // da^T [K, R] and db [N, R] are summed over parts of the rows, and the parts in a fixed order: the result does not
  // depend on the number of threads.
  const int64_t parts = smaller((M + kPartRows - 1) / kPartRows, kMaxParts);
  const int64_t part_blocks = parts ? (row_blocks(M) + parts - 1) / parts : 0;
  const int64_t part_size = (K + N) * width;
  const Buffer<float> sums(parts * part_size);

  auto rows_of = [&](int64_t item, float* scratch) {
    float* da_sum = sums.p + item * part_size;
    float* db_sum = da_sum + K * width;
    float* block = scratch;
    int32_t* keep = (int32_t*)(block + kRows * kColumns);
    float* ds_block = (float*)keep + kRows * kColumns;
    float* s_block = ds_block + kRows * width;
    const int64_t first = item * part_blocks * kRows, last = smaller(M, first + part_blocks * kRows);
    if (first >= last) memset(da_sum, 0, 4 * part_size);

    for (int64_t r0 = first; r0 < last; r0 += kRows) {
      const int64_t rows = smaller(kRows, last - r0);
      for (int64_t i = 0; i < rows; i++) {
        memcpy(s_block + i * width, s + (r0 + i) * R, 4 * R);
        for (int64_t r = R; r < width; r++) s_block[i * width + r] = 0;
      }
      if (N == 0) memset(ds_block, 0, 4 * rows * width);
      for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, N - c0);
        const Matrix dy_block = dy.block(r0, rows, c0, cols, block);
        gemm(rows, width, cols, dy_block, plain_rows(b_rows.p + c0 * width, width), ds_block, width, c0 > 0);
        if (db)
          gemm(cols, width, rows, {dy_block.p, 1, dy_block.row}, plain_rows(s_block, width), db_sum + c0 * width, width,
               r0 > first);
      }
      // dx0 and da share the factors scale and 1/(1-p); db takes scale when the parts are summed.
      const f32v factor = splat(scale * dropout.scale);
      for (int64_t i = 0; i < rows * width; i += W) store(ds_block + i, load(ds_block + i) * factor);

      for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, K - c0);
        if (dropout.threshold) mask_block(dropout, r0, rows, c0, keep);
        if (da) {
          const Matrix x_block =
              dropout.threshold ? x.block(r0, rows, c0, cols, block, keep) : x.block(r0, rows, c0, cols, block);
          gemm(cols, width, rows, {x_block.p, 1, x_block.row}, plain_rows(ds_block, width), da_sum + c0 * width, width,
               r0 > first);
        }
        if (dx0)
          product_into(dx0, dx_dtype, K, r0, rows, c0, cols, R, {ds_block, width, 1},
                       packed_panels(a_panels.p + c0 * width, width), dropout.threshold ? keep : nullptr, block);
      }
    }
  };

  // The parts are summed kSumRows rows of da^T or db at a time.
  constexpr int64_t kSumRows = 64;
  const int64_t da_items = (K + kSumRows - 1) / kSumRows, db_items = (N + kSumRows - 1) / kSumRows;
  auto sum_of = [&](int64_t item, float* scratch) {
    const bool is_da = item < da_items;
    if (!(is_da ? da : db)) return;
    const int64_t first = (is_da ? item : item - da_items) * kSumRows;
    const int64_t rows = smaller(kSumRows, (is_da ? K : N) - first);
    const float* part = sums.p + ((is_da ? 0 : K) + first) * width;
    const f32v factor = splat(is_da ? 1.0f : scale);
    for (int64_t i = 0; i < rows * width; i += W) {
      f32v total{};
      for (int64_t p = 0; p < parts; p++) total += load(part + p * part_size + i);
      store(scratch + i, total * factor);
    }
    if (is_da) {
      float* columns = scratch + kSumRows * width;
      transpose(scratch, width, kSumRows, width, columns, kSumRows);
      for (int64_t r = 0; r < R; r++)
        store_row(at(da, adapter_dtype, r * K + first), adapter_dtype, rows, columns + r * kSumRows);
    } else {
      for (int64_t i = 0; i < rows; i++)
        store_row(at(db, adapter_dtype, (first + i) * R), adapter_dtype, R, scratch + i * width);
    }
  };
  parallel(threads, larger(2 * kRows * (kColumns + width), width * kColumns),
           Phase{column_blocks(K) + column_blocks(N), pack_of}, Phase{parts, rows_of},
           Phase{da_items + db_items, sum_of});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
