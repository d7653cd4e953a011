// What a tile of attention is made of: which keys a query sees, logits with their biases and masks, and operands of
// products. Included by flash_attention.cpp.
//
// A block is kKeys neighbouring columns. The columns of a sequence are its kept keys: where these are neighbours, as with
// padding at one end, column j is key base + j, base being a multiple of kKeys, so that a block's dropout mask is one
// group of philox.h; otherwise they are numbered from 0 on, and column j is key position[j].
#pragma once

#include "../flash_attention.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kKeys = kMaskGroup;
constexpr int64_t kQueries = 48;             // rows of a tile
constexpr float kLeastLogit = -0x1.6p+127f;  // lesser finite ones count as this, which log2(e) does not make infinite
constexpr float kLog2e = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Tensor {
  const void* p;
  Strides stride;
  Tensor(const void* p, const Strides& stride) : p(p), stride(stride) {}
  void* row(int dtype, int64_t b, int64_t h, int64_t s) const {
    return const_cast<void*>(at(p, dtype, b * stride.b + h * stride.h + s * stride.s));
  }
};

struct Range {
  int64_t begin, end;
};

// One member of a batch or of a pack.
struct Sequence {
  int64_t b, q0, k0;  // where it lies in the tensors
  int64_t Sq, Sk;
  int64_t shift;                     // position of query 0 among the keys
  int64_t left, right;               // what a query sees around its position, -1 for all
  int64_t row_batch;                 // b of its rows in dropout
  int64_t base, begin, end;          // columns begin .. end are the kept keys
  const int32_t *position, *before;  // null, or [Sk] key of a column and [Sk + 1] kept keys before a key

  int64_t key(int64_t column) const { return position ? position[column] : base + column; }
  int64_t column(int64_t key) const {  // the first that is not before key
    return before ? before[larger(0, smaller(key, Sk))] : larger(begin, smaller(key - base, end));
  }
  bool keeps(int64_t key) const { return column(key) < column(key + 1); }
  Range seen(int64_t query) const {
    const int64_t at = query + shift;
    const int64_t first = left < 0 ? begin : column(at - left), last = right < 0 ? end : column(at + right + 1);
    return {first, larger(first, last)};
  }
  int64_t blocks() const { return (end + kKeys - 1) / kKeys; }
  // Distances key - position lie from least_distance() on.
  int64_t least_distance() const { return 1 - Sq - shift; }
  int64_t distances() const { return Sq && Sk ? Sq + Sk - 1 : 0; }
};

// Queries of a tile, and the columns of the block that each of them sees.
struct Row {
  int64_t head, query;
};
struct Tile {
  Row rows[kQueries];
  Range seen[kQueries];
};
// The columns of a block that a tile is computed for.
struct Columns {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// dst[0:padded(n)] = float(src[0:n]), zeros beyond
void load_padded(const void* src, int dtype, int64_t n, float* dst) {
  load_row(src, dtype, n, dst);
  for (int64_t d = n; d < padded(n); d++) dst[d] = 0;
}
void scale_row(float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += W) store(row + d, load(row + d) * factor);
}
void add_row(float* dst, const float* src, int64_t n) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(dst + d, load(dst + d) + load(src + d));
  if (d < n) store_first(dst + d, load_first(dst + d, n - d) + load_first(src + d, n - d), n - d);
}

// The product of two rows, and whether the first has an element other than 0.
struct Product {
  float sum;
  bool nonzero;
};
Product dot_rows(const void* a, const void* b, int dtype, int64_t n) {
  f32v sum{};
  i32v nonzero{};
  for (int64_t d = 0; d < n; d += W) {
    const int64_t width = smaller(W, n - d);
    const f32v x = load_as_float(at(a, dtype, d), dtype, width);
    sum += x * load_as_float(at(b, dtype, d), dtype, width);
    nonzero |= x != 0.0f;
  }
  return {horizontal_sum(sum), any(nonzero)};
}

// A call's arguments in the form that tiles want.
struct Attention {
  const FlashAttention& c;
  const int64_t count;  // of sequences
  const Buffer<Sequence> sequences;
  const Buffer<int32_t> positions, befores;
  const Dropout dropout;
  const bool plain;  // logits are scale q k^T and nothing else

  explicit Attention(const FlashAttention& c)
      : c(c),
        count(c.q_starts ? c.members : c.B),
        sequences(count),
        positions(c.keep ? c.B * c.Sk : 0),
        befores(c.keep ? c.B * (c.Sk + 1) : 0),
        dropout(Dropout::make(c.dropout_p, c.seed)),
        plain(!c.softcap && !c.bias && !c.relative && !c.mask) {
    for (int64_t n = 0; n < count; n++) {
      Sequence& s = sequences[n];
      s = {n, 0, 0, c.Sq, c.Sk, 0, c.left, c.right, n, 0, 0, 0, nullptr, nullptr};
      if (c.q_starts) {
        s.b = 0;
        s.q0 = c.q_starts[n];
        s.k0 = c.k_starts[n];
        s.Sq = c.q_starts[n + 1] - s.q0;
        s.Sk = c.k_starts[n + 1] - s.k0;
      }
      s.shift = c.top_left ? 0 : s.Sk - s.Sq;
      s.end = s.Sk;
      if (c.keep) keep_keys(s, c.keep + n * c.keep_row, positions.p + n * c.Sk, befores.p + n * (c.Sk + 1));
    }
  }

  static void keep_keys(Sequence& s, const uint8_t* keep, int32_t* position, int32_t* before) {
    int32_t kept = 0;
    for (int64_t j = 0; j < s.Sk; j++) {
      before[j] = kept;
      if (keep[j]) position[kept++] = (int32_t)j;
    }
    before[s.Sk] = kept;
    if (kept && position[kept - 1] - position[0] == kept - 1) {  // neighbours
      s.base = position[0] / kKeys * kKeys;
      s.begin = position[0] - s.base;
    } else {
      s.position = position;
      s.before = before;
    }
    s.end = s.begin + kept;
  }

  int64_t chunks(int64_t size) const {
    int64_t sum = 0;
    for (int64_t n = 0; n < count; n++) sum += (sequences[n].Sq + size - 1) / size;
    return sum;
  }

  // Fills in what the rows of a tile see of block j0, in columns of the block, and gives the columns to be computed.
  Columns columns(const Sequence& s, Tile& tile, int64_t rows, int64_t j0, int64_t step) const {
    Range all{kKeys, 0};
    for (int64_t t = 0; t < rows; t++) {
      Range seen = s.seen(tile.rows[t].query);
      seen = {larger(0, seen.begin - j0), smaller(kKeys, seen.end - j0)};
      if (c.mask && c.mask_stride.k == 1 && !s.position && seen.begin < seen.end) {
        const uint8_t* mask = mask_of(s, tile.rows[t]) + s.key(j0);
        const void* first = memchr(mask + seen.begin, 1, seen.end - seen.begin);
        const void* last = first ? memrchr(mask + seen.begin, 1, seen.end - seen.begin) : nullptr;
        seen = first ? Range{(const uint8_t*)first - mask, (const uint8_t*)last - mask + 1} : Range{0, 0};
      }
      tile.seen[t] = seen;
      if (seen.begin >= seen.end) continue;
      all = {smaller(all.begin, seen.begin), larger(all.end, seen.end)};
    }
    return {all.begin / kPanel * kPanel, (all.end + step - 1) / step * step};
  }

  bool is_plain(Range seen, Columns columns) const {
    return plain && seen.begin <= columns.begin && seen.end >= columns.end;
  }

  // Turns a row of q k^T into logits in powers of 2, -inf where the query does not see the key; in a plain row these are
  // the row times the factor that it gives, and the row stays as it is. slope, if not null, receives the derivative of
  // the softcap.
  float prepare(const Sequence& s, Row row, Range seen, int64_t j0, Columns columns, float* x, float* slope) const {
    if (is_plain(seen, columns)) return c.scale * kLog2e;
    if (c.softcap) {
      const float inverse = c.scale / c.softcap;
      for (int64_t j = columns.begin; j < columns.end; j += W) {
        const f32v t = tanh(load(x + j) * inverse);
        store(x + j, t * c.softcap);
        if (slope) store(slope + j, 1.0f - t * t);
      }
    } else {
      for (int64_t j = columns.begin; j < columns.end; j += W) store(x + j, load(x + j) * c.scale);
    }
    if (c.relative)
      for_runs(s, seen, j0, [&](int64_t j, int64_t key, int64_t n) {
        add_row(x + j, c.relative + row.head * (2 * c.N - 1) + c.N - 1 + key - row.query - s.shift, n);
      });
    if (c.bias) add_bias(s, row, seen, j0, x);
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const i32v column = lane_index() + (int32_t)j;
      const i32v is_seen = (column >= (int32_t)seen.begin) & (column < (int32_t)seen.end);
      const f32v logit = load(x + j), y = max(splat(kLeastLogit), logit) * kLog2e;
      store(x + j, is_seen & (logit != -INFINITY) ? y : splat(-INFINITY));
    }
    if (c.mask) {
      const uint8_t* mask = mask_of(s, row);
      for (int64_t j = seen.begin; j < seen.end; j++)
        if (!mask[s.key(j0 + j) * c.mask_stride.k]) x[j] = -INFINITY;
    }
    return 1;
  }

  // The gradients of the biases from a row of ds; diagonal is the sequence's and head's own drelative, or null.
  void add_bias_gradients(const Sequence& s, Row row, Range seen, int64_t j0, const float* ds, float* diagonal) const {
    for_runs(s, seen, j0, [&](int64_t j, int64_t key, int64_t n) {
      if (diagonal) add_row(diagonal + key - row.query - s.shift - s.least_distance(), ds + j, n);
      if (!c.dbias) return;
      const MaskStrides& stride = c.dbias_stride;
      float* dst = c.dbias + s.b * stride.b + row.head * stride.h + row.query * stride.q + key * stride.k;
      if (stride.k == 1)
        add_row(dst, ds + j, n);
      else
        for (int64_t i = 0; i < n; i++) dst[i * stride.k] += ds[j + i];
    });
  }

  // kept[rows, 64]: the dropout masks of a tile's rows in block j0, as Dropout has them.
  void keep(const Sequence& s, const Tile& tile, int64_t rows, int64_t j0, uint32_t* kept) const {
    auto number = [&](int64_t t) {
      return (uint64_t)(s.row_batch * c.H + tile.rows[t].head) << 32 | (uint64_t)tile.rows[t].query;
    };
    for (int64_t t = 0, n; t < rows; t += n) {
      for (n = 1; t + n < rows && number(t + n) == number(t) + n;) n++;
      if (!s.position)
        dropout.keep_pairs(number(t), n, (s.base + j0) / kMaskGroup, kept + t * kMaskPairs);
      else
        for (int64_t i = 0; i < n; i++) keep_scattered(s, number(t + i), j0, kept + (t + i) * kMaskPairs);
    }
  }

 private:
  const uint8_t* mask_of(const Sequence& s, Row row) const {
    return c.mask + s.b * c.mask_stride.b + row.head * c.mask_stride.h + row.query * c.mask_stride.q;
  }

  // run(column of the block, key, n) for the runs of neighbouring keys among the columns seen
  template <class Run>
  static void for_runs(const Sequence& s, Range seen, int64_t j0, Run run) {
    for (int64_t j = seen.begin, n; j < seen.end; j += n) {
      n = seen.end - j;
      if (s.position)
        for (n = 1; j + n < seen.end && s.key(j0 + j + n) == s.key(j0 + j) + n;) n++;
      run(j, s.key(j0 + j), n);
    }
  }

  void add_bias(const Sequence& s, Row row, Range seen, int64_t j0, float* x) const {
    const MaskStrides& stride = c.bias_stride;
    const void* p = at(c.bias, c.bias_dtype, s.b * stride.b + row.head * stride.h + row.query * stride.q);
    for_runs(s, seen, j0, [&](int64_t j, int64_t key, int64_t n) {
      float values[kKeys];
      if (stride.k == 1)
        load_row(at(p, c.bias_dtype, key), c.bias_dtype, n, values);
      else
        for (int64_t i = 0; i < n; i++)
          load_row(at(p, c.bias_dtype, (key + i) * stride.k), c.bias_dtype, 1, values + i);
      add_row(x + j, values, n);
    });
  }

  void keep_scattered(const Sequence& s, uint64_t row, int64_t j0, uint32_t* kept) const {
    int32_t group_keep[kMaskGroup];
    int64_t group = -1;
    memset(kept, 0, 4 * kMaskPairs);
    for (int64_t j = 0; j < smaller(kKeys, s.end - j0); j++) {
      const int64_t key = s.key(j0 + j);
      if (key / kMaskGroup != group) dropout.keep_mask(row, group = key / kMaskGroup, group_keep);
      ((uint16_t*)kept)[2 * (j / 32 * 16 + j % 16) + j % 32 / 16] = (uint16_t)group_keep[key % kMaskGroup];
    }
  }
};

// Rows as the first operand of a product, or to be transposed: cells of 32 bits, each an element or, with kPairs, two
// neighbours in bfloat16, as they lie in memory.
template <bool kPairs>
constexpr int64_t cells(int64_t n) {
  return kPairs ? (n + 1) / 2 : n;
}
template <bool kPairs>
int64_t row_cells(int64_t n) {
  return padded(cells<kPairs>(n));
}
template <bool kPairs>
void load_cells(const void* src, int dtype, int64_t n, float* dst) {
  if constexpr (kPairs) {
    const float* from = (const float*)src;
    for (; n >= 2 * W; n -= 2 * W, from += W, dst += W) store(dst, load(from));
    if (n) {
      uint16_t rest[2 * W] = {};
      memcpy(rest, from, 2 * n);
      memcpy(dst, rest, sizeof rest);
    }
  } else {
    load_padded(src, dtype, n, dst);
  }
}

// The keys of a block as rows of cells, zeros where a column is not a kept key.
template <bool kPairs>
void load_keys(const Tensor& t, int dtype, const Sequence& s, int64_t head, int64_t j0, int64_t D, float* rows) {
  const int64_t width = row_cells<kPairs>(D);
  const int64_t first = larger(0, s.begin - j0), end = smaller(kKeys, s.end - j0);
  memset(rows, 0, 4 * first * width);
  for (int64_t j = first; j < end; j++)
    load_cells<kPairs>(t.row(dtype, s.b, head, s.k0 + s.key(j0 + j)), dtype, D, rows + j * width);
  memset(rows + end * width, 0, 4 * (kKeys - end) * width);
}

// Rows of cells [kKeys, width] transposed, as panels of width cells for a product over D.
void pack_transposed(const float* rows, int64_t width, float* packed) {
  for (int64_t j = 0; j < kKeys; j += kPanel)
    transpose(rows + j * width, width, kPanel, width, packed + j * width, kPanel);
}

// Rows of cells [depth, row_cells] for a product over the rows: cell (r, column) at (column / kPanel) dst_panel +
// r dst_row + column % kPanel, where with kPairs r stands for rows 2r and 2r + 1.
template <bool kPairs>
void pack_depth(const float* rows, int64_t width, int64_t depth, int64_t columns, float* dst, int64_t dst_row,
                int64_t dst_panel) {
  for (int64_t r = 0; r < cells<kPairs>(depth); r++)
    for (int64_t column = 0; column < columns; column += W) {
      float* to = dst + column / kPanel * dst_panel + r * dst_row + column % kPanel;
      if constexpr (kPairs) {
        const uint16_t* from = (const uint16_t*)(rows + 2 * r * width) + column;
        u16v even, odd;
        memcpy(&even, from, sizeof even);
        memcpy(&odd, from + 2 * width, sizeof odd);
        store((int32_t*)to, (i32v)(widen(even) | widen(odd) << 16));
      } else {
        store(to, load(rows + r * width + column));
      }
    }
}

// Two rows of a block as bfloat16: pairs of one above the other, and if rows is not null, of neighbours within each.
void pair_rows(Columns columns, const float* x, float* pairs, float* rows) {
  for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
    const f32v a0 = load(x + j), a1 = load(x + j + W), b0 = load(x + kKeys + j), b1 = load(x + kKeys + j + W);
    store((int32_t*)pairs + j, (i32v)pair_bfloat16(a0, b0));
    store((int32_t*)pairs + j + W, (i32v)pair_bfloat16(a1, b1));
    if (!rows) continue;
    store((int32_t*)rows + j / 2, (i32v)pair_neighbours(a0, a1));
    store((int32_t*)rows + (kKeys + j) / 2, (i32v)pair_neighbours(b0, b1));
  }
}

}  // namespace

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
