#include "../lora.h"

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kRows = 48;             // rows of x or dy in flight: whole tiles at every level
constexpr int64_t kColumns = kMaskGroup;  // columns in flight; a block of 48 x 128 floats is 24 KiB
constexpr int64_t kPartBlocks = 4;        // row blocks whose share of da and db is summed by itself, or more of them
constexpr int64_t kMaxParts = 64;
constexpr int64_t kBlock = kRows * kColumns;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t column_blocks(int64_t n) { return (n + kColumns - 1) / kColumns; }
int64_t row_blocks(int64_t m) { return (m + kRows - 1) / kRows; }

// A row of the table of adapters.
struct Adapter {
  const void *a, *b;
  void *da, *db;
  int64_t R, column;  // of s: its first
  float scale;
  Dropout dropout;
};

// Adapters first .. last that are computed as one of rank R, because they share a projection or a mask.
struct Stack {
  int64_t first, last;
  int64_t R, width;   // the sum of their ranks, and that in whole vectors
  int64_t column;     // of s: their first
  int64_t at;         // where this stack begins in what is packed, or summed, for each stack
  int64_t scratch;    // and in a row of the scratch of all of them
  const int64_t* to;  // of a projection: its row in their table
  bool wanted;        // whether any of their gradients is
};

// The call's tables, read.
struct Call {
  Buffer<Adapter> adapters;
  Buffer<Stack> projections;  // one each
  Buffer<Stack> masks;        // neighbours without dropout share one; an adapter with dropout has its own
  int64_t adapter_count, projection_count, mask_count = 0;
  int64_t rank = 0;     // columns of s
  int64_t outputs = 0;  // columns of all projections, in whole blocks
  int64_t widest = W;   // padded rank of a stack, at most
  int64_t width = 0;    // of the scratch of all masks
  bool dropout = false, da = false;

  Call(const int64_t* table, const double* factors, int64_t count, const int64_t* projection_table,
       int64_t projection_rows)
      : adapters(count),
        projections(projection_rows),
        masks(count),
        adapter_count(count),
        projection_count(projection_rows) {
    for (int64_t p = 0; p < projection_count; p++) {
      projections[p] = {0, 0, 0, 0, 0, 0, 0, projection_table + p * kLoraProjectionColumns, false};
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t* row = table + i * kLoraAdapterColumns;
      const double* factor = factors + i * kLoraFactors;
      adapters[i] = {(const void*)row[kA],
                     (const void*)row[kB],
                     (void*)row[kDa],
                     (void*)row[kDb],
                     row[kRank],
                     rank,
                     (float)factor[kScale],
                     Dropout::make(factor[kDropout], (uint64_t)row[kSeed])};
      const bool joins = i && !adapters[i].dropout.threshold && !adapters[i - 1].dropout.threshold;
      if (!joins) masks[mask_count++] = {i, i, 0, 0, rank, 0, 0, nullptr, false};
      add(masks[mask_count - 1], i, adapters[i].da);
      Stack& projection = projections[row[kProjection]];
      if (projection.first == projection.last) projection.first = i, projection.column = rank;
      add(projection, i, adapters[i].db);
      dropout |= adapters[i].dropout.threshold > 0;
      da |= adapters[i].da != nullptr;
      rank += row[kRank];
    }
    for (int64_t q = 0; q < mask_count; q++) {
      masks[q].scratch = width;
      width += masks[q].width;
      widest = larger(widest, masks[q].width);
    }
    for (int64_t p = 0; p < projection_count; p++) {
      outputs += column_blocks(projections[p].to[kFeatures]) * kColumns;
      widest = larger(widest, projections[p].width);
    }
  }

  void add(Stack& stack, int64_t i, const void* gradient) {
    stack.last = i + 1;
    stack.R += adapters[i].R;
    stack.width = padded(stack.R);
    stack.wanted |= gradient != nullptr;
  }
  const Dropout& dropout_of(const Stack& stack) const { return adapters[stack.first].dropout; }
};

// Rows c0 .. c0 + n of the b [N, R] of a stack, side by side, as float32 [n, width], zeros beyond R ...
void load_b(const Call& call, const Stack& stack, int dtype, int64_t c0, int64_t n, float* rows) {
  for (int64_t i = 0; i < n; i++) {
    float* row = rows + i * stack.width;
    for (int64_t j = stack.first; j < stack.last; j++) {
      const Adapter& adapter = call.adapters[j];
      load_row(at(adapter.b, dtype, (c0 + i) * adapter.R), dtype, adapter.R, row + adapter.column - stack.column);
    }
    for (int64_t r = stack.R; r < stack.width; r++) row[r] = 0;
  }
}
// ... and columns c0 .. c0 + n of the a [R, K], one below the other, as [width, kColumns], zeros elsewhere.
void load_a(const Call& call, const Stack& stack, int dtype, int64_t K, int64_t c0, int64_t n, float* rows) {
  memset(rows, 0, 4 * stack.width * kColumns);
  for (int64_t j = stack.first; j < stack.last; j++) {
    const Adapter& adapter = call.adapters[j];
    float* first = rows + (adapter.column - stack.column) * kColumns;
    for (int64_t r = 0; r < adapter.R; r++) load_row(at(adapter.a, dtype, r * K + c0), dtype, n, first + r * kColumns);
  }
}

// A block of x or dy in float32: `rows` rows from r0, `cols` columns from c0.
struct Source {
  const void* p;
  int dtype;
  int64_t row;

  // Where it needs conversion or has a mask, `pairs` [rows, kMaskPairs], it is staged in scratch [rows, kColumns].
  Matrix block(int64_t r0, int64_t rows, int64_t c0, int64_t cols, const uint32_t* pairs, float* scratch) const {
    if (dtype == kFloat32 && !pairs) return {(const float*)p + r0 * row + c0, row, 1};
    for (int64_t i = 0; i < rows; i++) {
      const void* source = at(p, dtype, (r0 + i) * row + c0);
      float* out = scratch + i * kColumns;
      const bool whole = dtype == kFloat32 && cols == kColumns;
      if (!whole) load_row(source, dtype, cols, out);
      if (pairs) Dropout::apply(pairs + i * kMaskPairs, whole ? (const float*)source : out, out);
    }
    return {scratch, kColumns, 1};
  }
};

// dst[rows, cols] of dst_row = source [rows, kColumns]
void store_block(void* dst, int dtype, int64_t dst_row, int64_t r0, int64_t rows, int64_t c0, int64_t cols,
                 const float* source) {
  for (int64_t i = 0; i < rows; i++)
    store_row(at(dst, dtype, (r0 + i) * dst_row + c0), dtype, cols, source + i * kColumns);
}

// Whether a product may be written to a tensor directly: not where its last vector would reach into the next row.
bool direct(int dtype, int64_t cols) { return dtype == kFloat32 && cols % W == 0; }

}  // namespace

void lora_forward(const void* x_, float* s, const int64_t* adapter_table, const double* factors, int64_t adapter_count,
                  const int64_t* projection_table, int64_t projection_count, int64_t M, int64_t K, int64_t x_row,
                  int dtype, int adapter_dtype, int y_dtype, int threads) {
  const Source x{x_, dtype, x_row};
  const Call call(adapter_table, factors, adapter_count, projection_table, projection_count);
  // b^T has the bias as one more row, and s a column of ones for it: y0 = [scale s, 1] [b^T; bias].
  const int64_t x_blocks = column_blocks(K);
  int64_t a_size = 0, b_size = 0, deepest = 1;
  for (int64_t q = 0; q < call.mask_count; q++) {
    call.masks[q].at = a_size;
    a_size += x_blocks * kColumns * call.masks[q].width;
  }
  for (int64_t p = 0; p < projection_count; p++) {
    Stack& stack = call.projections[p];
    const int64_t depth = padded(stack.R + 1);
    stack.at = b_size;
    b_size += column_blocks(stack.to[kFeatures]) * kColumns * depth;
    deepest = larger(deepest, depth);
  }
  const Buffer<float> a_t(a_size);  // of each mask: [K, width]
  const Buffer<float> b_t(b_size);  // of each projection: panels [depth, N]

  auto pack_of = [&](int64_t item, float* scratch) {
    if (item < call.mask_count * x_blocks) {
      const Stack& stack = call.masks[item / x_blocks];
      const int64_t c0 = item % x_blocks * kColumns;
      load_a(call, stack, adapter_dtype, K, c0, smaller(kColumns, K - c0), scratch);
      transpose(scratch, kColumns, stack.width, kColumns, a_t.p + stack.at + c0 * stack.width, stack.width);
      return;
    }
    int64_t c0 = (item - call.mask_count * x_blocks) * kColumns, p = 0;
    while (c0 >= call.projections[p].to[kFeatures]) c0 -= column_blocks(call.projections[p++].to[kFeatures]) * kColumns;
    const Stack& stack = call.projections[p];
    const int64_t n = smaller(kColumns, stack.to[kFeatures] - c0), depth = padded(stack.R + 1);
    float* rows = scratch + kColumns;
    memset(scratch, 0, 4 * (1 + stack.width) * kColumns);
    load_b(call, stack, adapter_dtype, c0, n, rows);
    const void* bias = (const void*)stack.to[kBias];
    const int bias_dtype = (int)stack.to[kBiasDtype];
    if (bias) load_row(at(bias, bias_dtype, c0), bias_dtype, n, scratch);
    for (int64_t c = 0; c < kColumns; c += kPanel) {
      float* panel = b_t.p + stack.at + (c0 + c) * depth;
      transpose(rows + c * stack.width, stack.width, kPanel, stack.width, panel, kPanel);
      memcpy(panel + stack.R * kPanel, scratch + c, 4 * kPanel);
    }
  };

  auto rows_of = [&](int64_t item, float* scratch) {
    const int64_t r0 = item * kRows, rows = smaller(kRows, M - r0);
    float* block = scratch;
    uint32_t* pairs = (uint32_t*)(block + kBlock);
    float* s_block = block + kBlock + kRows * kMaskPairs;  // of all masks [kRows, call.width]
    float* left = s_block + kRows * call.width;            // of one projection [kRows, depth]

    if (K == 0) memset(s_block, 0, 4 * rows * call.width);
    for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
      const int64_t cols = smaller(kColumns, K - c0);
      for (int64_t q = 0; q < call.mask_count; q++) {
        const Stack& stack = call.masks[q];
        const Dropout& dropout = call.dropout_of(stack);
        if (dropout.threshold) dropout.keep_pairs(r0, rows, c0 / kMaskGroup, pairs);
        const Matrix x_block = x.block(r0, rows, c0, cols, dropout.threshold ? pairs : nullptr, block);
        gemm(rows, stack.width, cols, x_block, plain_rows(a_t.p + stack.at + c0 * stack.width, stack.width),
             s_block + stack.scratch, call.width, c0 > 0);
      }
    }
    for (int64_t q = 0; q < call.mask_count; q++) {
      const Stack& stack = call.masks[q];
      const float factor = call.dropout_of(stack).scale;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t r = 0; r < stack.R; r++)
          s[(r0 + i) * call.rank + stack.column + r] = s_block[i * call.width + stack.scratch + r] * factor;
    }
    for (int64_t p = 0; p < projection_count; p++) {
      const Stack& stack = call.projections[p];
      const int64_t N = stack.to[kFeatures], y_row = stack.to[kYRow], depth = padded(stack.R + 1);
      void* y0 = (void*)stack.to[kY];
      for (int64_t i = 0; i < rows; i++) {
        float* row = left + i * depth;
        for (int64_t j = stack.first; j < stack.last; j++) {
          const Adapter& adapter = call.adapters[j];
          for (int64_t r = adapter.column; r < adapter.column + adapter.R; r++)
            row[r - stack.column] = s[(r0 + i) * call.rank + r] * adapter.scale;
        }
        row[stack.R] = 1;
      }
      for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, N - c0), used = stack.to[kBias] ? stack.R + 1 : stack.R;
        const Panels right = packed_panels(b_t.p + stack.at + c0 * depth, depth);
        if (direct(y_dtype, cols)) {
          gemm(rows, cols, used, {left, depth, 1}, right, (float*)y0 + r0 * y_row + c0, y_row, false);
        } else {
          gemm(rows, padded(cols), used, {left, depth, 1}, right, block, kColumns, false);
          store_block(y0, y_dtype, y_row, r0, rows, c0, cols, block);
        }
      }
    }
  };
  parallel(threads, larger(kBlock + kRows * (kMaskPairs + call.width + deepest), (1 + call.widest) * kColumns),
           Phase{call.mask_count * x_blocks + call.outputs / kColumns, pack_of}, Phase{row_blocks(M), rows_of});
}

void lora_backward(const void* x_, const float* s, void* dx0, const int64_t* adapter_table, const double* factors,
                   int64_t adapter_count, const int64_t* projection_table, int64_t projection_count, int64_t M,
                   int64_t K, int64_t x_row, int dtype, int adapter_dtype, int dx_dtype, int threads) {
  const Source x{x_, dtype, x_row};
  const Call call(adapter_table, factors, adapter_count, projection_table, projection_count);
  const int64_t x_blocks = column_blocks(K);
  // da^T [K, width] and db [N, width] of each stack are summed over parts of the rows, and the parts in a fixed order:
  // the result does not depend on the number of threads.
  const int64_t parts = smaller((row_blocks(M) + kPartBlocks - 1) / kPartBlocks, kMaxParts);
  int64_t a_size = 0, b_size = 0, part_size = 0, s_width = 0;
  for (int64_t q = 0; q < call.mask_count; q++) {
    call.masks[q].at = a_size;
    a_size += x_blocks * kColumns * call.masks[q].width;
  }
  for (int64_t p = 0; p < projection_count; p++) {
    Stack& stack = call.projections[p];
    stack.at = b_size;
    stack.scratch = s_width;
    b_size += column_blocks(stack.to[kFeatures]) * kColumns * stack.width;
    s_width += stack.width;
  }
  part_size = a_size + b_size;
  const Buffer<float> a_panels(a_size);  // of each mask: [width, K]
  const Buffer<float> b_rows(b_size);    // of each projection: [N, width]
  const Buffer<float> sums(parts * part_size);

  // Item `item` of x_blocks blocks of columns of each mask, then of those of each projection: its stack and column.
  auto stack_of = [&](int64_t item, int64_t& c0) -> const Stack& {
    if (item < call.mask_count * x_blocks) {
      c0 = item % x_blocks * kColumns;
      return call.masks[item / x_blocks];
    }
    int64_t p = 0;
    c0 = (item - call.mask_count * x_blocks) * kColumns;
    while (c0 >= call.projections[p].to[kFeatures]) c0 -= column_blocks(call.projections[p++].to[kFeatures]) * kColumns;
    return call.projections[p];
  };

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0;
    const Stack& stack = stack_of(item, c0);
    if (stack.to) {
      load_b(call, stack, adapter_dtype, c0, smaller(kColumns, stack.to[kFeatures] - c0),
             b_rows.p + stack.at + c0 * stack.width);
      return;
    }
    load_a(call, stack, adapter_dtype, K, c0, smaller(kColumns, K - c0), scratch);
    for (int64_t c = 0; c < kColumns; c += kPanel)
      for (int64_t r = 0; r < stack.width; r++)
        memcpy(a_panels.p + stack.at + (c0 + c) * stack.width + r * kPanel, scratch + r * kColumns + c, 4 * kPanel);
  };

  auto rows_of = [&](int64_t item, float* scratch) {
    float* da_sum = sums.p + item * part_size;
    float* db_sum = da_sum + a_size;
    float* block = scratch;
    float* masked = block + kBlock;
    uint32_t* pairs = (uint32_t*)(masked + kBlock);
    float* ds_block = masked + kBlock + kRows * kMaskPairs;  // of all masks [kRows, call.width]
    float* ds_sums = ds_block + kRows * call.width;          // of one projection [kRows, widest]
    float* s_block = ds_sums + kRows * call.widest;          // of one projection [kRows, widest]
    const int64_t first = row_blocks(M) * item / parts, last = row_blocks(M) * (item + 1) / parts;

    for (int64_t r0 = first * kRows; r0 < smaller(M, last * kRows); r0 += kRows) {
      const int64_t rows = smaller(kRows, M - r0);
      const bool adds = r0 > first * kRows;  // to the sums
      memset(ds_block, 0, 4 * rows * call.width);
      for (int64_t p = 0; p < projection_count; p++) {
        const Stack& stack = call.projections[p];
        const int64_t N = stack.to[kFeatures], width = stack.width;
        const Source dy{(const void*)stack.to[kY], dtype, stack.to[kYRow]};
        for (int64_t i = 0; i < rows; i++) {
          memcpy(s_block + i * width, s + (r0 + i) * call.rank + stack.column, 4 * stack.R);
          for (int64_t r = stack.R; r < width; r++) s_block[i * width + r] = 0;
        }
        if (N == 0) memset(ds_sums, 0, 4 * rows * width);
        for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
          const int64_t cols = smaller(kColumns, N - c0);
          const Matrix dy_block = dy.block(r0, rows, c0, cols, nullptr, block);
          gemm(rows, width, cols, dy_block, plain_rows(b_rows.p + stack.at + c0 * width, width), ds_sums, width,
               c0 > 0);
          if (stack.wanted)
            gemm(cols, width, rows, {dy_block.p, 1, dy_block.row}, plain_rows(s_block, width),
                 db_sum + stack.at + c0 * width, width, adds);
        }
        // dx0 and da share the factors scale and 1/(1-p); db takes scale when the parts are summed.
        for (int64_t q = 0; q < call.mask_count; q++) {
          const Stack& mask = call.masks[q];
          for (int64_t j = larger(stack.first, mask.first); j < smaller(stack.last, mask.last); j++) {
            const Adapter& adapter = call.adapters[j];
            const float factor = adapter.scale * adapter.dropout.scale;
            const float* from = ds_sums + adapter.column - stack.column;
            float* to = ds_block + mask.scratch + adapter.column - mask.column;
            for (int64_t i = 0; i < rows; i++)
              for (int64_t r = 0; r < adapter.R; r++) to[i * call.width + r] = from[i * width + r] * factor;
          }
        }
      }
      for (int64_t c0 = 0; c0 < K; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, K - c0);
        for (int64_t q = 0; q < call.mask_count; q++) {
          const Stack& stack = call.masks[q];
          const Dropout& dropout = call.dropout_of(stack);
          const uint32_t* kept = nullptr;
          if (dropout.threshold) {
            dropout.keep_pairs(r0, rows, c0 / kMaskGroup, pairs);
            kept = pairs;
          }
          if (stack.wanted) {
            const Matrix x_block = x.block(r0, rows, c0, cols, kept, masked);
            gemm(cols, stack.width, rows, {x_block.p, 1, x_block.row}, plain_rows(ds_block + stack.scratch, call.width),
                 da_sum + stack.at + c0 * stack.width, stack.width, adds);
          }
          if (!dx0) continue;
          const Matrix left{ds_block + stack.scratch, call.width, 1};
          const Panels right = packed_panels(a_panels.p + stack.at + c0 * stack.width, stack.width);
          if (call.mask_count == 1 && !kept && direct(dx_dtype, cols)) {
            gemm(rows, cols, stack.R, left, right, (float*)dx0 + r0 * K + c0, K, false);
            continue;
          }
          // The sum over the masks is in `block`; the product of a mask that is not the first passes through `masked`.
          float* product = kept && q ? masked : block;
          gemm(rows, padded(cols), stack.R, left, right, product, kColumns, q && !kept);
          const bool last_direct = q + 1 == call.mask_count && direct(dx_dtype, cols) && cols == kColumns;
          for (int64_t i = 0; kept && i < rows; i++) {
            float* row = product + i * kColumns;
            float* to = last_direct && !q ? (float*)dx0 + (r0 + i) * K + c0 : row;
            Dropout::apply(pairs + i * kMaskPairs, row, to);
            if (q)
              for (int64_t c = 0; c < kColumns; c += W)
                store(block + i * kColumns + c, load(block + i * kColumns + c) + load(row + c));
          }
          if (q + 1 == call.mask_count && !(kept && last_direct && !q))
            store_block(dx0, dx_dtype, K, r0, rows, c0, cols, block);
        }
      }
    }
  };

  // The parts of kColumns rows of da^T or db at a time.
  auto sum_of = [&](int64_t item, float* scratch) {
    int64_t first;
    const Stack& stack = stack_of(item, first);
    if (!stack.wanted) return;
    const int64_t width = stack.width;
    const int64_t rows = smaller(kColumns, (stack.to ? stack.to[kFeatures] : K) - first);
    const float* part = sums.p + (stack.to ? a_size : 0) + stack.at + first * width;
    for (int64_t i = 0; i < rows * width; i += W) {
      f32v total{};
      for (int64_t p = 0; p < parts; p++) total += load(part + p * part_size + i);
      store(scratch + i, total);
    }
    float* columns = scratch + kColumns * width;
    if (!stack.to) transpose(scratch, width, kColumns, width, columns, kColumns);
    for (int64_t j = stack.first; j < stack.last; j++) {
      const Adapter& adapter = call.adapters[j];
      const int64_t column = adapter.column - stack.column;
      if (!stack.to && adapter.da)
        for (int64_t r = 0; r < adapter.R; r++)
          store_row(at(adapter.da, adapter_dtype, r * K + first), adapter_dtype, rows,
                    columns + (column + r) * kColumns);
      for (int64_t i = 0; stack.to && adapter.db && i < rows; i++) {
        float* row = scratch + i * width + column;
        for (int64_t r = 0; r < adapter.R; r++) row[r] *= adapter.scale;
        store_row(at(adapter.db, adapter_dtype, (first + i) * adapter.R), adapter_dtype, adapter.R, row);
      }
    }
  };
  const int64_t items = call.mask_count * x_blocks + call.outputs / kColumns;
  parallel(threads,
           larger(2 * kBlock + kRows * (kMaskPairs + call.width + 2 * call.widest), 2 * call.widest * kColumns),
           Phase{items, pack_of}, Phase{parts, rows_of}, Phase{items, sum_of});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
