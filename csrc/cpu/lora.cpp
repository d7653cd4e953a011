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

// The products take float32, or with kPairs bfloat16: then what is multiplied is made of pairs of neighbours along the
// sum's index (gemm.h), and a matrix has half as many elements in that direction.
template <bool kPairs>
constexpr int64_t kUnit = kPairs ? 2 : 1;

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
void load_b(const Call& call, const Stack& stack, int dtype, int64_t c0, int64_t n, int64_t width, float* rows) {
  for (int64_t i = 0; i < n; i++) {
    float* row = rows + i * width;
    for (int64_t j = stack.first; j < stack.last; j++) {
      const Adapter& adapter = call.adapters[j];
      load_row(at(adapter.b, dtype, (c0 + i) * adapter.R), dtype, adapter.R, row + adapter.column - stack.column);
    }
    for (int64_t r = stack.R; r < width; r++) row[r] = 0;
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

// Of a matrix of floats, in place: neighbours within a row become pairs; rows are `step` elements apart ...
void pair_columns(float* m, int64_t rows, int64_t cols, int64_t step) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < cols; c += 2 * W) {
      const float* from = m + i * step + c;
      // The shuffle of a vector of neighbours a0 b0 a1 b1 ... into two, which the compiler knows.
      f32v first, second;
      for (int j = 0; j < W; j++) first[j] = from[2 * j], second[j] = from[2 * j + 1];
      store((int32_t*)m + i * step + c / 2, (i32v)pair_bfloat16(first, second));
    }
}
// ... or neighbours within a column, so that half of the rows are left; an odd last row is paired with zeros.
void pair_rows(float* m, int64_t rows, int64_t cols, int64_t step) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t c = 0; c < cols; c += W) {
      const f32v first = load(m + i * step + c), second = i + 1 < rows ? load(m + (i + 1) * step + c) : f32v{};
      store((int32_t*)m + i / 2 * step + c, (i32v)pair_bfloat16(first, second));
    }
}

// x or dy, a block of it at a time: `rows` rows from r0, `cols` columns from c0. A block that cannot be read where it is
// is staged in scratch [rows, kColumns], where dropped elements are zeroed if there is a mask, `pairs` [rows, kMaskPairs].
struct Source {
  const void* p;
  int dtype;
  int64_t row;

  // As the left operand of a sum along its columns.
  template <bool kPairs>
  Matrix along(int64_t r0, int64_t rows, int64_t c0, int64_t cols, const uint32_t* pairs, float* scratch) const {
    if constexpr (kPairs) {
      const uint16_t* from = (const uint16_t*)p + r0 * row + c0;
      if (!pairs && row % 2 == 0 && cols % 2 == 0) return {(const float*)from, row / 2, 1};
      for (int64_t i = 0; i < rows; i++) {
        uint16_t* out = (uint16_t*)scratch + i * kColumns;
        memcpy(out, from + i * row, 2 * cols);
        out[cols] = 0;
        if (pairs) Dropout::apply(pairs + i * kMaskPairs, out);
      }
      return {scratch, kColumns / 2, 1};
    } else {
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
  }

  // As the left operand of a sum along its rows. What is `staged` by `along` already, in float32, serves here too.
  template <bool kPairs>
  Matrix across(int64_t r0, int64_t rows, int64_t c0, int64_t cols, const uint32_t* pairs, float* scratch,
                const Matrix* staged) const {
    if constexpr (kPairs) {
      for (int64_t i = 0; i < rows; i += 2)
        for (int64_t c = 0; c < cols; c += W) {
          const int64_t n = smaller(W, cols - c);
          u32v element[2] = {};
          for (int64_t j = 0; j < smaller(2, rows - i); j++) {
            u16v v{};
            memcpy(&v, (const uint16_t*)p + (r0 + i + j) * row + c0 + c, 2 * n);
            element[j] = widen(v);
            if (pairs) element[j] &= (u32v)Dropout::mask_of(pairs + (i + j) * kMaskPairs, c);
          }
          store((int32_t*)scratch + i / 2 * kColumns + c, (i32v)(element[0] | element[1] << 16));
        }
      return {scratch, 1, kColumns};
    } else {
      const Matrix block = staged ? *staged : along<false>(r0, rows, c0, cols, pairs, scratch);
      return {block.p, 1, block.row};
    }
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

// Item `item` of the blocks of columns of each mask, then of each projection: its stack and column.
const Stack& stack_of(const Call& call, int64_t item, int64_t K, int64_t& c0) {
  const int64_t x_blocks = column_blocks(K);
  if (item < call.mask_count * x_blocks) {
    c0 = item % x_blocks * kColumns;
    return call.masks[item / x_blocks];
  }
  int64_t p = 0;
  c0 = (item - call.mask_count * x_blocks) * kColumns;
  while (c0 >= call.projections[p].to[kFeatures]) c0 -= column_blocks(call.projections[p++].to[kFeatures]) * kColumns;
  return call.projections[p];
}

template <bool kPairs>
void forward(const Source& x, float* s, const Call& call, int64_t M, int64_t K, int adapter_dtype, int y_dtype,
             int threads) {
  constexpr int64_t U = kUnit<kPairs>;
  // b^T has the bias as one more row, and s a column of ones for it: y0 = [scale s, 1] [b^T; bias]. In bfloat16 it is
  // two rows, what rounding leaves of the bias being the second.
  auto padded_depth = [](const Stack& stack) { return (stack.R + U + U * W - 1) / (U * W) * (U * W); };
  const int64_t x_blocks = column_blocks(K);
  int64_t a_size = 0, b_size = 0, deepest = 1;
  for (int64_t q = 0; q < call.mask_count; q++) {
    call.masks[q].at = a_size;
    a_size += x_blocks * kColumns / U * call.masks[q].width;
  }
  for (int64_t p = 0; p < call.projection_count; p++) {
    Stack& stack = call.projections[p];
    stack.at = b_size;
    b_size += column_blocks(stack.to[kFeatures]) * kColumns * padded_depth(stack) / U;
    deepest = larger(deepest, padded_depth(stack));
  }
  const Buffer<float> a_t(a_size);  // of each mask: [K / U, width]
  const Buffer<float> b_t(b_size);  // of each projection: panels [depth / U, N]

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0;
    const Stack& stack = stack_of(call, item, K, c0);
    if (!stack.to) {
      load_a(call, stack, adapter_dtype, K, c0, smaller(kColumns, K - c0), scratch);
      if (kPairs) pair_columns(scratch, stack.width, kColumns, kColumns);
      transpose(scratch, kColumns, stack.width, kColumns / U, a_t.p + stack.at + c0 / U * stack.width, stack.width);
      return;
    }
    const int64_t n = smaller(kColumns, stack.to[kFeatures] - c0), depth = padded_depth(stack);
    float* biases = scratch;
    float* rows = scratch + kColumns;  // [kColumns, depth]
    memset(scratch, 0, 4 * (1 + depth) * kColumns);
    load_b(call, stack, adapter_dtype, c0, n, depth, rows);
    const void* bias = (const void*)stack.to[kBias];
    const int bias_dtype = (int)stack.to[kBiasDtype];
    if (bias) load_row(at(bias, bias_dtype, c0), bias_dtype, n, biases);
    for (int64_t i = 0; bias && i < n; i++) {
      float* to = rows + i * depth + stack.R;
      to[0] = biases[i];
      if (!kPairs) continue;
      const u32v rounded = pair_bfloat16(splat(biases[i]), f32v{}) << 16;
      memcpy(&to[0], &rounded, 4);
      to[1] = to[0] - to[0] == 0 ? biases[i] - to[0] : 0;  // infinity and NaN leave nothing
    }
    if (kPairs) pair_columns(rows, kColumns, depth, depth);
    for (int64_t c = 0; c < kColumns; c += kPanel)
      transpose(rows + c * depth, depth, kPanel, depth / U, b_t.p + stack.at + (c0 + c) * (depth / U), kPanel);
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
        const Matrix x_block = x.template along<kPairs>(r0, rows, c0, cols, dropout.threshold ? pairs : nullptr, block);
        gemm<kPairs>(rows, stack.width, (cols + U - 1) / U, x_block,
                     plain_rows(a_t.p + stack.at + c0 / U * stack.width, stack.width), s_block + stack.scratch,
                     call.width, c0 > 0);
      }
    }
    for (int64_t q = 0; q < call.mask_count; q++) {
      const Stack& stack = call.masks[q];
      const float factor = call.dropout_of(stack).scale;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t r = 0; r < stack.R; r++)
          s[(r0 + i) * call.rank + stack.column + r] = s_block[i * call.width + stack.scratch + r] * factor;
    }
    for (int64_t p = 0; p < call.projection_count; p++) {
      const Stack& stack = call.projections[p];
      const int64_t N = stack.to[kFeatures], y_row = stack.to[kYRow], depth = padded_depth(stack);
      void* y0 = (void*)stack.to[kY];
      for (int64_t i = 0; i < rows; i++) {
        float* row = left + i * depth;
        for (int64_t j = stack.first; j < stack.last; j++) {
          const Adapter& adapter = call.adapters[j];
          for (int64_t r = adapter.column; r < adapter.column + adapter.R; r++)
            row[r - stack.column] = s[(r0 + i) * call.rank + r] * adapter.scale;
        }
        for (int64_t r = stack.R; r < depth; r++) row[r] = r < stack.R + U ? 1 : 0;
      }
      if (kPairs) pair_columns(left, rows, depth, depth);
      const int64_t used = (stack.to[kBias] ? stack.R + U : stack.R) + U - 1;
      for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
        const int64_t cols = smaller(kColumns, N - c0);
        const Panels right = packed_panels(b_t.p + stack.at + c0 * (depth / U), depth / U);
        if (direct(y_dtype, cols)) {
          gemm<kPairs>(rows, cols, used / U, {left, depth, 1}, right, (float*)y0 + r0 * y_row + c0, y_row, false);
        } else {
          gemm<kPairs>(rows, padded(cols), used / U, {left, depth, 1}, right, block, kColumns, false);
          store_block(y0, y_dtype, y_row, r0, rows, c0, cols, block);
        }
      }
    }
  };
  parallel(threads,
           larger(kBlock + kRows * (kMaskPairs + call.width + deepest), (1 + larger(call.widest, deepest)) * kColumns),
           Phase{call.mask_count * x_blocks + call.outputs / kColumns, pack_of}, Phase{row_blocks(M), rows_of});
}

template <bool kPairs>
void backward(const Source& x, const float* s, void* dx0, const Call& call, int64_t M, int64_t K, int adapter_dtype,
              int dx_dtype, int threads) {
  constexpr int64_t U = kUnit<kPairs>;
  const int64_t x_blocks = column_blocks(K);
  // da^T [K, width] and db [N, width] of each stack are summed over parts of the rows, and the parts in a fixed order:
  // the result does not depend on the number of threads.
  const int64_t parts = smaller((row_blocks(M) + kPartBlocks - 1) / kPartBlocks, kMaxParts);
  int64_t a_size = 0, b_size = 0;
  for (int64_t q = 0; q < call.mask_count; q++) {
    call.masks[q].at = a_size;
    a_size += x_blocks * kColumns * call.masks[q].width;
  }
  for (int64_t p = 0; p < call.projection_count; p++) {
    Stack& stack = call.projections[p];
    stack.at = b_size;
    b_size += column_blocks(stack.to[kFeatures]) * kColumns * stack.width;
  }
  const int64_t part_size = a_size + b_size;
  const Buffer<float> a_panels(a_size);  // of each mask: [width / U, K]
  const Buffer<float> b_rows(b_size);    // of each projection: [N / U, width]
  const Buffer<float> sums(parts * part_size);

  auto pack_of = [&](int64_t item, float* scratch) {
    int64_t c0;
    const Stack& stack = stack_of(call, item, K, c0);
    if (stack.to) {
      const int64_t n = smaller(kColumns, stack.to[kFeatures] - c0);
      float* rows = kPairs ? scratch : b_rows.p + stack.at + c0 * stack.width;
      load_b(call, stack, adapter_dtype, c0, n, stack.width, rows);
      if (!kPairs) return;
      pair_rows(rows, n, stack.width, stack.width);
      memcpy(b_rows.p + stack.at + c0 / U * stack.width, rows, 4 * ((n + U - 1) / U) * stack.width);
      return;
    }
    load_a(call, stack, adapter_dtype, K, c0, smaller(kColumns, K - c0), scratch);
    const int64_t depth = stack.width / U;
    if (kPairs) pair_rows(scratch, stack.width, kColumns, kColumns);
    for (int64_t c = 0; c < kColumns; c += kPanel)
      for (int64_t r = 0; r < depth; r++)
        memcpy(a_panels.p + stack.at + (c0 + c) * depth + r * kPanel, scratch + r * kColumns + c, 4 * kPanel);
  };

  auto rows_of = [&](int64_t item, float* scratch) {
    float* da_sum = sums.p + item * part_size;
    float* db_sum = da_sum + a_size;
    float* block = scratch;
    float* masked = block + kBlock;
    uint32_t* pairs = (uint32_t*)(masked + kBlock);
    float* ds_block = masked + kBlock + kRows * kMaskPairs;  // of all masks [kRows, call.width]
    float* ds_pairs = ds_block + kRows * call.width;         // the same, paired along the ranks
    float* ds_sums = ds_pairs + kRows * call.width;          // of one projection [kRows, widest]
    float* s_block = ds_sums + kRows * call.widest;          // of one projection [kRows, widest]
    const int64_t first = row_blocks(M) * item / parts, last = row_blocks(M) * (item + 1) / parts;

    for (int64_t r0 = first * kRows; r0 < smaller(M, last * kRows); r0 += kRows) {
      const int64_t rows = smaller(kRows, M - r0);
      const int64_t deep = (rows + U - 1) / U;  // of sums along the rows
      const bool adds = r0 > first * kRows;     // to the sums
      memset(ds_block, 0, 4 * rows * call.width);
      for (int64_t p = 0; p < call.projection_count; p++) {
        const Stack& stack = call.projections[p];
        const int64_t N = stack.to[kFeatures], width = stack.width;
        const Source dy{(const void*)stack.to[kY], x.dtype, stack.to[kYRow]};
        for (int64_t i = 0; i < rows; i++) {
          memcpy(s_block + i * width, s + (r0 + i) * call.rank + stack.column, 4 * stack.R);
          for (int64_t r = stack.R; r < width; r++) s_block[i * width + r] = 0;
        }
        if (kPairs) pair_rows(s_block, rows, width, width);
        if (N == 0) memset(ds_sums, 0, 4 * rows * width);
        for (int64_t c0 = 0; c0 < N; c0 += kColumns) {
          const int64_t cols = smaller(kColumns, N - c0);
          const Matrix dy_block = dy.template along<kPairs>(r0, rows, c0, cols, nullptr, block);
          gemm<kPairs>(rows, width, (cols + U - 1) / U, dy_block,
                       plain_rows(b_rows.p + stack.at + c0 / U * width, width), ds_sums, width, c0 > 0);
          if (stack.wanted)
            gemm<kPairs>(cols, width, deep, dy.template across<kPairs>(r0, rows, c0, cols, nullptr, masked, &dy_block),
                         plain_rows(s_block, width), db_sum + stack.at + c0 * width, width, adds);
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
      const float* ds_left = ds_block;  // of dx0's product, rows call.width elements apart
      if (kPairs) {
        memcpy(ds_pairs, ds_block, 4 * rows * call.width);
        for (int64_t q = 0; q < call.mask_count; q++)
          pair_columns(ds_pairs + call.masks[q].scratch, rows, call.masks[q].width, call.width);
        pair_rows(ds_block, rows, call.width, call.width);
        ds_left = ds_pairs;
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
          if (stack.wanted)
            gemm<kPairs>(cols, stack.width, deep, x.template across<kPairs>(r0, rows, c0, cols, kept, masked, nullptr),
                         plain_rows(ds_block + stack.scratch, call.width), da_sum + stack.at + c0 * stack.width,
                         stack.width, adds);
          if (!dx0) continue;
          const int64_t depth = stack.width / U, used = (stack.R + U - 1) / U;
          const Matrix left{ds_left + stack.scratch, call.width, 1};
          const Panels right = packed_panels(a_panels.p + stack.at + c0 * depth, depth);
          const bool only = call.mask_count == 1;
          if (only && !kept && direct(dx_dtype, cols)) {
            gemm<kPairs>(rows, cols, used, left, right, (float*)dx0 + r0 * K + c0, K, false);
            continue;
          }
          // The sum over the masks is in `block`; the product of a mask that is not the first passes through `masked`.
          float* product = kept && q ? masked : block;
          gemm<kPairs>(rows, padded(cols), used, left, right, product, kColumns, q && !kept);
          const bool in_place = only && kept && dx_dtype == kFloat32 && cols == kColumns;
          for (int64_t i = 0; kept && i < rows; i++) {
            float* row = product + i * kColumns;
            Dropout::apply(pairs + i * kMaskPairs, row, in_place ? (float*)dx0 + (r0 + i) * K + c0 : row);
            for (int64_t c = 0; q && c < kColumns; c += W)
              store(block + i * kColumns + c, load(block + i * kColumns + c) + load(row + c));
          }
          if (q + 1 == call.mask_count && !in_place) store_block(dx0, dx_dtype, K, r0, rows, c0, cols, block);
        }
      }
    }
  };

  // The parts of kColumns rows of da^T or db at a time.
  auto sum_of = [&](int64_t item, float* scratch) {
    int64_t first;
    const Stack& stack = stack_of(call, item, K, first);
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
           larger(2 * kBlock + kRows * (kMaskPairs + 2 * call.width + 2 * call.widest), 2 * call.widest * kColumns),
           Phase{items, pack_of}, Phase{parts, rows_of}, Phase{items, sum_of});
}

// Whether bfloat16 products give what is asked for: of bfloat16 adapters, or of such as may be rounded.
bool takes_pairs(int dtype, int adapter_dtype, bool fast) {
  return kDotBFloat16 && dtype == kBFloat16 && (fast || adapter_dtype == kBFloat16);
}

}  // namespace

void lora_forward(const void* x, float* s, const int64_t* adapters, const double* factors, int64_t adapter_count,
                  const int64_t* projections, int64_t projection_count, int64_t M, int64_t K, int64_t x_row, int dtype,
                  int adapter_dtype, int y_dtype, bool fast, int threads) {
  const Call call(adapters, factors, adapter_count, projections, projection_count);
  const auto run = takes_pairs(dtype, adapter_dtype, fast) ? forward<true> : forward<false>;
  run({x, dtype, x_row}, s, call, M, K, adapter_dtype, y_dtype, threads);
}

void lora_backward(const void* x, const float* s, void* dx0, const int64_t* adapters, const double* factors,
                   int64_t adapter_count, const int64_t* projections, int64_t projection_count, int64_t M, int64_t K,
                   int64_t x_row, int dtype, int adapter_dtype, int dx_dtype, bool fast, int threads) {
  const Call call(adapters, factors, adapter_count, projections, projection_count);
  const auto run = takes_pairs(dtype, adapter_dtype, fast) ? backward<true> : backward<false>;
  run({x, dtype, x_row}, s, dx0, call, M, K, adapter_dtype, dx_dtype, threads);
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
