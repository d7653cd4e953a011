#include "../lora.h"

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kRows = 48;     // rows of x or dy in flight: a multiple of every kTileRows
constexpr int64_t kColumns = 256;  // columns staged at a time, a multiple of kMaskGroup: 48 KiB of L2
constexpr int64_t kPartRows = 4 * kRows;  // rows whose contribution to da, db is summed before it is stored

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The adapter is packed for the products in blocks of kColumns columns of a, or rows of b:
// float32 rows c0 .. c0 + n of b [N, R] as [n, width], zeros beyond R ...
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

int64_t blocks(int64_t n) { return (n + kColumns - 1) / kColumns; }

// A block of x or dy as float32: rows x cols from column c0, read in place where possible.
Matrix stage(const void* src, int dtype, int64_t src_row, int64_t r0, int64_t rows, int64_t c0, int64_t cols,
             bool in_place, float* scratch) {
  if (in_place) return {(const float*)src + r0 * src_row + c0, src_row, 1};
  for (int64_t i = 0; i < rows; i++)
    load_row(at(src, dtype, (r0 + i) * src_row + c0), dtype, cols, scratch + i * kColumns);
  return {scratch, kColumns, 1};
}

// keep [rows, kColumns] = mask of rows r0.., columns c0..
void stage_mask(const Dropout& dropout, int64_t r0, int64_t rows, int64_t c0, int64_t cols, int32_t* keep) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < cols; c += kMaskGroup)
      dropout.keep_mask(r0 + i, (c0 + c) / kMaskGroup, keep + i * kColumns + c);
}

void apply_mask(float* block, int64_t rows, int64_t cols, const int32_t* keep) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = i * kColumns; c < i * kColumns + cols; c += W)
      store(block + c, (f32v)((i32v)load(block + c) & load(keep + c)));
}

}  // namespace

void lora_forward(const void* x, const void* a, const void* b, const void* bias, void* y0, float* s, int64_t M,
                  int64_t N, int64_t K, int64_t R, int64_t x_row, float scale, double dropout_p, uint64_t seed,
                  int dtype, int adapter_dtype, int y_dtype, int threads) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const int64_t width = padded(R);
  const Buffer<float> a_t(blocks(K) * kColumns * width);    // [K, width]
  const Buffer<float> b_t(blocks(N) * kColumns * width);    // panels [width, N]
  const Buffer<float> bias_row(blocks(N) * kColumns);

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0 = item * kColumns;
    if (item < blocks(K)) {
      load_a(a, adapter_dtype, R, K, c0, smaller(kColumns, K - c0), scratch);
      transpose(scratch, kColumns, width, kColumns, a_t.p + c0 * width, width);
      return;
    }
    c0 -= blocks(K) * kColumns;
    const int64_t n = smaller(kColumns, N - c0);
    memset(scratch, 0, 4 * kColumns * width);
    load_b(b, adapter_dtype, R, c0, n, scratch);
    for (int64_t c = 0; c < kColumns; c += kPanel)
      transpose(scratch + c * width, width, kPanel, width, b_t.p + (c0 + c) * width, kPanel);
    memset(bias_row.p + c0, 0, 4 * kColumns);
    if (bias) load_row(at(bias, dtype, c0), dtype, n, bias_row.p + c0);
  };

  const bool in_place = dtype == kFloat32 && !dropout.threshold;
  auto rows_of = [&](int64_t item, float* scratch) {
    const int64_t r0 = item * kRows, rows = smaller(kRows, M - r0);
    float* x_block = scratch;
    int32_t* keep = (int32_t*)(x_block + kRows * kColumns);
    float* s_block = (float*)keep + kRows * kColumns;
    float* y_block = s_block + kRows * width;

    for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
      const int64_t cols = smaller(kColumns, K - c0);
      const Matrix x_part = stage(x, dtype, x_row, r0, rows, c0, cols, in_place, x_block);
      if (dropout.threshold) {
        stage_mask(dropout, r0, rows, c0, cols, keep);
        apply_mask(x_block, rows, cols, keep);
      }
      gemm(rows, width, cols, x_part, plain_rows(a_t.p + c0 * width, width), s_block, width, c0 > 0);
    }
    const f32v kept = splat(dropout.scale);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t r = 0; r < width; r += W) store(s_block + i * width + r, load(s_block + i * width + r) * kept);
      memcpy(s + (r0 + i) * R, s_block + i * width, 4 * R);
    }
    for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
      const int64_t cols = smaller(kColumns, N - c0);
      gemm(rows, padded(cols), R, {s_block, width, 1}, packed_panels(b_t.p + c0 * width, width), y_block, kColumns,
           false);
      for (int64_t i = 0; i < rows; i++) {
        float* row = y_block + i * kColumns;
        for (int64_t c = 0; c < cols; c += W) store(row + c, load(row + c) * scale + load(bias_row.p + c0 + c));
        store_row(at(y0, y_dtype, (r0 + i) * N + c0), y_dtype, cols, row);
      }
    }
  };
  const int64_t scratch = 3 * kRows * kColumns + kRows * width, pack_scratch = kColumns * width;
  parallel(threads, scratch > pack_scratch ? scratch : pack_scratch, Phase{blocks(K) + blocks(N), pack_of},
           Phase{(M + kRows - 1) / kRows, rows_of});
}

void lora_backward(const void* dy, const void* x, const void* a, const void* b, const float* s, void* dx0, void* da,
                   void* db, int64_t M, int64_t N, int64_t K, int64_t R, int64_t dy_row, int64_t x_row, float scale,
                   double dropout_p, uint64_t seed, int dtype, int adapter_dtype, int dx_dtype, int threads) {
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const int64_t width = padded(R);
  const Buffer<float> a_panels(blocks(K) * kColumns * width);  // panels [width, K]
  const Buffer<float> b_rows(blocks(N) * kColumns * width);    // [N, width]

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0 = item * kColumns;
    if (item < blocks(K)) {
      load_a(a, adapter_dtype, R, K, c0, smaller(kColumns, K - c0), scratch);
      for (int64_t c = 0; c < kColumns; c += W)
        for (int64_t r = 0; r < width; r++)
          store(a_panels.p + (c0 + c / kPanel * kPanel) * width + r * kPanel + c % kPanel,
                load(scratch + r * kColumns + c));
      return;
    }
    c0 -= blocks(K) * kColumns;
    load_b(b, adapter_dtype, R, c0, smaller(kColumns, N - c0), b_rows.p + c0 * width);
  };

  // da^T [K, R] and db [N, R] are summed over parts of the rows, and the parts in a fixed order: the result does not
  // depend on the number of threads.
  const int64_t parts = smaller((M + kPartRows - 1) / kPartRows, 64);
  const int64_t part_blocks = parts ? ((M + kRows - 1) / kRows + parts - 1) / parts : 0;
  const int64_t part_size = (K + N) * width;
  const Buffer<float> sums(parts * part_size);

  auto rows_of = [&](int64_t item, float* scratch) {
    float* da_sum = sums.p + item * part_size;
    float* db_sum = da_sum + K * width;
    memset(da_sum, 0, 4 * part_size);
    float* block = scratch;
    int32_t* keep = (int32_t*)(block + kRows * kColumns);
    float* dx_block = (float*)keep + kRows * kColumns;
    float* ds_block = dx_block + kRows * kColumns;
    float* s_block = ds_block + kRows * width;

    for (int64_t n = item * part_blocks; n < (item + 1) * part_blocks && n * kRows < M; n++) {
      const int64_t r0 = n * kRows, rows = smaller(kRows, M - r0);
      for (int64_t i = 0; i < rows; i++) {
        memcpy(s_block + i * width, s + (r0 + i) * R, 4 * R);
        for (int64_t r = R; r < width; r++) s_block[i * width + r] = 0;
      }
      for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, N - c0);
        const Matrix dy_part = stage(dy, dtype, dy_row, r0, rows, c0, cols, dtype == kFloat32, block);
        gemm(rows, width, cols, dy_part, plain_rows(b_rows.p + c0 * width, width), ds_block, width, c0 > 0);
        if (db) gemm(cols, width, rows, {dy_part.p, 1, dy_part.row}, plain_rows(s_block, width), db_sum + c0 * width, width, true);
      }
      // dx0 and da share the factors scale and 1/(1-p); db takes scale when it is stored.
      const f32v factor = splat(scale * dropout.scale);
      for (int64_t i = 0; i < rows * width; i += W) store(ds_block + i, load(ds_block + i) * factor);

      for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, K - c0);
        if (dropout.threshold) stage_mask(dropout, r0, rows, c0, cols, keep);
        if (da) {
          const bool in_place = dtype == kFloat32 && !dropout.threshold;
          const Matrix x_part = stage(x, dtype, x_row, r0, rows, c0, cols, in_place, block);
          if (dropout.threshold) apply_mask(block, rows, cols, keep);
          gemm(cols, width, rows, {x_part.p, 1, x_part.row}, plain_rows(ds_block, width), da_sum + c0 * width,
               width, true);
        }
        if (dx0) {
          gemm(rows, padded(cols), R, {ds_block, width, 1}, packed_panels(a_panels.p + c0 * width, width), dx_block,
               kColumns, false);
          if (dropout.threshold) apply_mask(dx_block, rows, cols, keep);
          for (int64_t i = 0; i < rows; i++)
            store_row(at(dx0, dx_dtype, (r0 + i) * K + c0), dx_dtype, cols, dx_block + i * kColumns);
        }
      }
    }
  };

  // The parts are summed kSumRows rows of da^T or db at a time.
  constexpr int64_t kSumRows = 64;
  static_assert(kSumRows % kPanel == 0);
  const int64_t da_items = (K + kSumRows - 1) / kSumRows, db_items = (N + kSumRows - 1) / kSumRows;
  auto sum_of = [&](int64_t item, float* scratch) {
    const bool is_da = item < da_items;
    if (!(is_da ? da : db)) return;
    const int64_t first = (is_da ? item : item - da_items) * kSumRows, rows = smaller(kSumRows, (is_da ? K : N) - first);
    const int64_t offset = (is_da ? 0 : K * width) + first * width;
    const f32v factor = splat(is_da ? 1.0f : scale);
    for (int64_t i = 0; i < rows * width; i += W) {
      f32v total{};
      for (int64_t part = 0; part < parts; part++) total += load(sums.p + part * part_size + offset + i);
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
  const int64_t scratch = 3 * kRows * kColumns + 2 * kRows * width, pack_scratch = kColumns * width;
  parallel(threads, scratch > pack_scratch ? scratch : pack_scratch, Phase{blocks(K) + blocks(N), pack_of},
           Phase{parts, rows_of}, Phase{da_items + db_items, sum_of});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
