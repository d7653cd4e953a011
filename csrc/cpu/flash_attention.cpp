#include "../flash_attention.h"

#include "flash_attention_tiles.h"
#include "gemm.h"
#include "parallel.h"

// Forward and backward of one tile are the same with and without kPairs, where products are of bfloat16 pairs: only how
// operands are stored differs (flash_attention_tiles.h).
namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kItemQueries = 240;       // rows of q for which a forward item packs k and v
constexpr int64_t kBackwardItems = 32;      // a backward pass is cut into at least so many items where it can be
constexpr int64_t kScoreRows = 24;          // rows of a tile whose scores are computed at once: they stay in L1
constexpr int64_t kPartialBytes = 1 << 28;  // at most so much is spent on partial sums of dq
constexpr float kSlack = 8;  // a maximum may be exceeded so far, in powers of 2, before a row's sums are rescaled

// What threads take, the longest first.
struct Item {
  int64_t sequence, head, part;
};
struct Items {
  Buffer<Item> items;
  Buffer<float> costs;
  Buffer<int32_t> order;
  int64_t count = 0;
  explicit Items(int64_t most) : items(most), costs(most), order(most) {}
  void add(Item item, float cost) {
    items[count] = item;
    costs[count++] = cost;
  }
  void sort() { longest_first(costs.p, count, order.p); }
  const Item& operator[](int64_t i) const { return items[order[i]]; }
};

// Scratch is laid out by a constructor that takes arrays one after another: once from null for its size.
struct Arena {
  float* p;
  int64_t used = 0;
  float* floats(int64_t n) {
    float* taken = p ? p + used : nullptr;
    used += padded(n);
    return taken;
  }
  uint32_t* words(int64_t n) { return (uint32_t*)floats(n); }
};
template <class Layout, class... Sizes>
int64_t scratch_of(Sizes... sizes) {
  Arena arena{nullptr};
  Layout(arena, sizes...);
  return arena.used;
}

struct Sizes {
  int64_t q_cells, v_cells, q_width, v_width;  // cells of a row of q and of v; elements of a row of dq and of o
  template <bool kPairs>
  static Sizes of(const FlashAttention& c) {
    return {row_cells<kPairs>(c.D), row_cells<kPairs>(c.Dv), padded(c.D), padded(c.Dv)};
  }
};

struct ForwardScratch {
  float *rows, *k_t, *v, *scores, *p, *q, *sums, *largest, *total;
  uint32_t* kept;
  ForwardScratch(Arena& a, Sizes s, int64_t q_rows)
      : rows(a.floats(kKeys * larger(s.q_cells, s.v_cells))),
        k_t(a.floats(kKeys * s.q_cells)),
        v(a.floats(kKeys * panels(s.v_width) * kPanel)),
        scores(a.floats(kQueries * kKeys)),
        p(a.floats(kQueries * kKeys / 2)),
        q(a.floats(q_rows * s.q_cells)),
        sums(a.floats(q_rows * s.v_width)),
        largest(a.floats(q_rows)),
        total(a.floats(q_rows)),
        kept(a.words(kQueries * kMaskPairs)) {}
};

template <bool kPairs>
void forward(const FlashAttention& c, int threads) {
  const Attention attention(c);
  const Dropout& dropout = attention.dropout;
  const Sizes sizes = Sizes::of<kPairs>(c);
  const int64_t group = c.H / c.Hkv, q_depth = cells<kPairs>(c.D);
  // An item takes so many queries of each head of its group: about kItemQueries rows, the same in all of a head.
  const int64_t parts = larger(1, c.Sq * group / kItemQueries);
  const int64_t chunk = larger(1, (c.Sq + parts * kQueries - 1) / (parts * kQueries)) * kQueries;
  const Tensor q(c.q, c.q_stride), k(c.k, c.k_stride), v(c.v, c.v_stride), o(c.o, c.o_stride);

  Items items(attention.chunks(chunk) * c.Hkv);
  for (int64_t n = 0; n < attention.count; n++) {
    const Sequence& sequence = attention.sequences[n];
    for (int64_t i0 = 0; i0 < sequence.Sq; i0 += chunk) {
      const int64_t queries = smaller(chunk, sequence.Sq - i0);
      const Range seen = sequence.seen(i0 + queries / 2);
      for (int64_t head = 0; head < c.Hkv; head++)
        items.add({n, head, i0}, (float)queries * (float)(seen.end - seen.begin + kKeys));
    }
  }
  items.sort();

  auto item_of = [&](int64_t number, float* memory) {
    const Item item = items[number];
    const Sequence& sequence = attention.sequences[item.sequence];
    const int64_t i0 = item.part, queries = smaller(chunk, sequence.Sq - i0), rows = group * queries;
    const int64_t tile_rows = queries >= kQueries ? kQueries : kQueries / queries * queries;
    Arena arena{memory};
    const ForwardScratch s(arena, sizes, group * chunk);
    auto head_of = [&](int64_t r) { return item.head * group + r / queries; };
    auto query_of = [&](int64_t r) { return i0 + r % queries; };

    for (int64_t r = 0; r < rows; r++) {
      load_cells<kPairs>(q.row(c.dtype, sequence.b, head_of(r), sequence.q0 + query_of(r)), c.dtype, c.D,
                         s.q + r * sizes.q_cells);
      s.largest[r] = -INFINITY;
      s.total[r] = 0;
    }
    memset(s.sums, 0, 4 * rows * sizes.v_width);

    const int64_t first = sequence.seen(i0).begin, end = sequence.seen(i0 + queries - 1).end;
    for (int64_t j0 = first / kKeys * kKeys; j0 < end; j0 += kKeys) {
      load_keys<kPairs>(k, c.dtype, sequence, item.head, j0, c.D, s.rows);
      pack_transposed(s.rows, sizes.q_cells, s.k_t);
      load_keys<kPairs>(v, c.dtype, sequence, item.head, j0, c.Dv, s.rows);
      pack_depth<kPairs>(s.rows, sizes.v_cells, kKeys, sizes.v_width, s.v, kPanel, cells<kPairs>(kKeys) * kPanel);

      for (int64_t r0 = 0, m; r0 < rows; r0 += m) {
        m = smaller(tile_rows, queries >= kQueries ? queries - r0 % queries : rows - r0);
        Tile tile;
        Row row{head_of(r0), query_of(r0)};
        for (int64_t t = 0; t < m; t++) {
          tile.rows[t] = row;
          if (++row.query == i0 + queries) row = {row.head + 1, i0};
        }
        const Columns columns = attention.columns(sequence, tile, m, j0, kPairs ? 2 * W : W);
        if (columns.empty()) continue;
        const int64_t c0 = columns.begin, c1 = columns.end;
        gemm<kPairs>(m, c1 - c0, q_depth, {s.q + r0 * sizes.q_cells, sizes.q_cells, 1},
                     packed_panels(s.k_t + c0 * sizes.q_cells, sizes.q_cells), s.scores + c0, kKeys, false);
        if (dropout.threshold) attention.keep(sequence, tile, m, j0, s.kept);
        for (int64_t t = 0; t < m; t++) {
          const int64_t r = r0 + t;
          float* x = s.scores + t * kKeys;
          const float factor = attention.prepare(sequence, tile.rows[t], tile.seen[t], j0, columns, x, nullptr);
          f32v row_max = splat(-INFINITY);
          for (int64_t j = c0; j < c1; j += W) row_max = max(row_max, load(x + j) * factor);
          const float block_max = horizontal_max(row_max);
          float rescale = 1;
          if (s.largest[r] == -INFINITY || !(block_max <= s.largest[r] + kSlack)) {
            rescale = s.largest[r] == -INFINITY ? 0.0f : exp2(splat(s.largest[r] - block_max))[0];
            s.largest[r] = block_max;
          }
          const float base = s.largest[r] == -INFINITY ? 0.0f : s.largest[r];  // of a row that sees nothing so far
          const uint32_t* kept = dropout.threshold ? s.kept + t * kMaskPairs : nullptr;
          auto weight = [&](int64_t j, f32v& sum) {
            f32v p = exp2(load(x + j) * factor - base);
            sum += p;
            return kept ? (f32v)((i32v)p & Dropout::mask_of(kept, j)) : p;
          };
          f32v sum{}, other{};
          if constexpr (kPairs)
            for (int64_t j = c0; j < c1; j += 2 * W) {
              const f32v a = weight(j, sum), b = weight(j + W, other);
              store((int32_t*)s.p + (t * kKeys + j) / 2, (i32v)pair_neighbours(a, b));
            }
          else
            for (int64_t j = c0; j < c1; j += W) store(x + j, weight(j, sum));
          s.total[r] = s.total[r] * rescale + horizontal_sum(sum + other);
          if (rescale != 1.0f) scale_row(s.sums + r * sizes.v_width, sizes.v_width, rescale);
        }
        const Matrix p = kPairs ? Matrix{s.p + c0 / 2, kKeys / 2, 1} : Matrix{s.scores + c0, kKeys, 1};
        gemm<kPairs>(m, sizes.v_width, cells<kPairs>(c1 - c0), p,
                     {s.v + cells<kPairs>(c0) * kPanel, kPanel, cells<kPairs>(kKeys) * kPanel},
                     s.sums + r0 * sizes.v_width, sizes.v_width, true);
      }
    }

    for (int64_t r = 0; r < rows; r++) {
      const int64_t h = head_of(r), i = sequence.q0 + query_of(r);
      float factor = 1;
      if (c.sinks) {  // one more term of the sum
        const float sink = c.sinks[h] * kLog2e;
        if (!(sink <= s.largest[r])) {
          factor = s.largest[r] == -INFINITY ? 0.0f : exp2(splat(s.largest[r] - sink))[0];
          s.total[r] *= factor;
          s.largest[r] = sink;
        }
        if (sink != -INFINITY) s.total[r] += exp2(splat(sink - s.largest[r]))[0];
      }
      float* row = s.sums + r * sizes.v_width;
      scale_row(row, sizes.v_width, s.total[r] == 0 ? 0.0f : factor * dropout.scale / s.total[r]);
      store_row(o.row(c.dtype, sequence.b, h, i), c.dtype, c.Dv, row);
      c.lse[(sequence.b * c.H + h) * c.Sq + i] = s.total[r] == 0 ? -INFINITY : s.largest[r] * kLn2 + logf(s.total[r]);
    }
  };
  parallel(threads, scratch_of<ForwardScratch>(sizes, group * chunk), Phase{items.count, item_of});
}

struct BackwardScratch {
  float *rows, *k_t, *v_t, *k, *dk, *dv, *q, *grad_o, *q_pairs, *grad_o_pairs, *p, *ds, *p_pairs, *ds_pairs, *ds_rows;
  float* slope;
  uint32_t* kept;
  BackwardScratch(Arena& a, Sizes s)
      : rows(a.floats(kKeys * larger(s.q_cells, s.v_cells))),
        k_t(a.floats(kKeys * s.q_cells)),
        v_t(a.floats(kKeys * s.v_cells)),
        k(a.floats(kKeys * panels(s.q_width) * kPanel)),
        dk(a.floats(kKeys * s.q_width)),
        dv(a.floats(kKeys * s.v_width)),
        q(a.floats(kQueries * s.q_cells)),
        grad_o(a.floats(kQueries * s.v_cells)),
        q_pairs(a.floats(kQueries / 2 * s.q_width)),
        grad_o_pairs(a.floats(kQueries / 2 * s.v_width)),
        p(a.floats(kQueries * kKeys)),
        ds(a.floats(kQueries * kKeys)),
        p_pairs(a.floats(kQueries / 2 * kKeys)),
        ds_pairs(a.floats(kQueries / 2 * kKeys)),
        ds_rows(a.floats(kQueries * kKeys / 2)),
        slope(a.floats(kKeys)),
        kept(a.words(kQueries * kMaskPairs)) {}
};

template <bool kPairs>
void backward(const FlashAttention& c, int threads) {
  const Attention attention(c);
  const Dropout& dropout = attention.dropout;
  const Sizes sizes = Sizes::of<kPairs>(c);
  const int64_t group = c.H / c.Hkv, count = attention.count;
  const Tensor q(c.q, c.q_stride), k(c.k, c.k_stride), v(c.v, c.v_stride), o(c.o, c.o_stride),
      grad_o(c.grad_o, c.grad_o_stride), dq(c.dq, c.dq_stride), dk(c.dk, c.dk_stride), dv(c.dv, c.dv_stride);
  auto row_of = [&](const Sequence& sequence, int64_t h, int64_t i) {  // of what is [B, H, Sq]
    return (sequence.b * c.H + h) * c.Sq + sequence.q0 + i;
  };

  // Key blocks of a head are cut into `splits` items, by sizes alone so that results do not depend on the threads. Each
  // sums dq over its own blocks; the sums are added up in order at the end. An item of a bias' gradient owns what it
  // adds to: all batches, heads or keys over which the bias is broadcast, which it takes one after another.
  int64_t blocks = 0;
  for (int64_t n = 0; n < count; n++) blocks = larger(blocks, attention.sequences[n].blocks());
  const int64_t rows = c.B * c.H * c.Sq;
  const bool all_batches = c.dbias && c.dbias_stride.b == 0, all_heads = c.dbias && c.dbias_stride.h == 0;
  const bool all_keys = c.dbias && (c.dbias_stride.k == 0 || (all_batches && c.keep));
  const int64_t heads = (all_batches ? 1 : count) * (all_heads ? 1 : c.Hkv);
  int64_t splits = heads && !all_keys ? (kBackwardItems + heads - 1) / heads : 1;
  splits = smaller(splits, kPartialBytes / larger(1, rows * sizes.q_width * 4));
  splits = larger(1, smaller(splits, blocks));

  const Buffer<float> dq_sums(splits * rows * sizes.q_width), delta(rows);
  const Buffer<int32_t> active(rows);  // the queries of a head that take part, in order ...
  const Buffer<int64_t> actives(count * c.H), diagonals(count + 1);  // ... and how many they are
  diagonals[0] = 0;
  for (int64_t n = 0; n < count; n++)
    diagonals[n + 1] = diagonals[n] + (c.drelative ? attention.sequences[n].distances() : 0);
  const Buffer<float> drelative(diagonals[count] * c.H * splits);
  auto diagonals_of = [&](int64_t n, int64_t h, int64_t split) {
    return drelative.p + diagonals[n] * c.H * splits + (h * splits + split) * (diagonals[n + 1] - diagonals[n]);
  };

  auto delta_of = [&](int64_t item, float*) {
    const Sequence& sequence = attention.sequences[item / c.H];
    const int64_t h = item % c.H;
    int64_t found = 0;
    for (int64_t i = 0; i < sequence.Sq; i++) {
      const int64_t row = row_of(sequence, h, i);
      const void* grad = grad_o.row(c.dtype, sequence.b, h, sequence.q0 + i);
      const Product product = dot_rows(grad, o.row(c.dtype, sequence.b, h, sequence.q0 + i), c.dtype, c.Dv);
      const float grad_lse = c.grad_lse ? c.grad_lse[row] : 0.0f;
      delta[row] = product.sum - grad_lse;
      if (!(c.lse[row] < kHidden) && (product.nonzero || grad_lse != 0))
        active[row_of(sequence, h, found++)] = (int32_t)i;
    }
    actives[item] = found;
  };

  // Turns row t of a tile's q k^T and do v^T into P . Z and dt.
  auto gradients_of_row = [&](const Item& item, const Tile& tile, int64_t t, int64_t j0, Columns columns,
                              const BackwardScratch& s, float* p, float* ds) {
    const Sequence& sequence = attention.sequences[item.sequence];
    const Row at = tile.rows[t];
    const int64_t row = row_of(sequence, at.head, at.query);
    const float factor = attention.prepare(sequence, at, tile.seen[t], j0, columns, p, s.slope);
    const bool plain = attention.is_plain(tile.seen[t], columns);
    const float lse = c.lse[row] * kLog2e, row_delta = delta[row];
    const uint32_t* kept = dropout.threshold ? s.kept + t * kMaskPairs : nullptr;
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const f32v weight = exp2(load(p + j) * factor - lse);
      f32v dropped = weight, dp = load(ds + j);
      if (kept) {
        const i32v mask = Dropout::mask_of(kept, j);
        dropped = (f32v)((i32v)weight & mask);
        dp = (f32v)((i32v)dp & mask) * dropout.scale;
      }
      f32v dj = weight * (dp - row_delta);
      if (!plain) dj = (f32v)((i32v)dj & (weight != 0.0f));  // NaN of a row reaches no key that it does not see
      store(p + j, dropped);
      store(ds + j, dj);
    }
    if (c.dbias || c.drelative) {
      float* diagonal = c.drelative ? diagonals_of(item.sequence, at.head, item.part) : nullptr;
      attention.add_bias_gradients(sequence, at, tile.seen[t], j0, ds, diagonal);
    }
    if (c.softcap)
      for (int64_t j = columns.begin; j < columns.end; j += W) store(ds + j, load(ds + j) * load(s.slope + j));
  };

  // One key block against the queries of its heads.
  auto block_of = [&](const Item& item, int64_t j0, const BackwardScratch& s) {
    const Sequence& sequence = attention.sequences[item.sequence];
    memset(s.dk, 0, 4 * kKeys * sizes.q_width);
    memset(s.dv, 0, 4 * kKeys * sizes.v_width);
    bool packed = false;
    for (int64_t h = item.head * group; h < (item.head + 1) * group; h++) {
      const int64_t queries = actives[item.sequence * c.H + h];
      const int32_t* query = active.p + row_of(sequence, h, 0);
      float* dq_rows = dq_sums.p + (item.part * rows + row_of(sequence, h, 0)) * sizes.q_width;
      for (int64_t a0 = 0; a0 < queries; a0 += kQueries) {
        const int64_t m = smaller(kQueries, queries - a0);
        Tile tile;
        for (int64_t t = 0; t < m; t++) tile.rows[t] = {h, query[a0 + t]};
        const Columns columns = attention.columns(sequence, tile, m, j0, kPairs ? 2 * W : W);
        if (columns.empty()) continue;
        if (!packed) {
          load_keys<kPairs>(v, c.dtype, sequence, item.head, j0, c.Dv, s.rows);
          pack_transposed(s.rows, sizes.v_cells, s.v_t);
          load_keys<kPairs>(k, c.dtype, sequence, item.head, j0, c.D, s.rows);
          pack_transposed(s.rows, sizes.q_cells, s.k_t);
          pack_depth<kPairs>(s.rows, sizes.q_cells, kKeys, sizes.q_width, s.k, kPanel, cells<kPairs>(kKeys) * kPanel);
          packed = true;
        }
        const int64_t c0 = columns.begin, c1 = columns.end, depth = cells<kPairs>(m);
        for (int64_t t = 0; t < m; t++) {
          const int64_t i = sequence.q0 + query[a0 + t];
          load_cells<kPairs>(q.row(c.dtype, sequence.b, h, i), c.dtype, c.D, s.q + t * sizes.q_cells);
          load_cells<kPairs>(grad_o.row(c.dtype, sequence.b, h, i), c.dtype, c.Dv, s.grad_o + t * sizes.v_cells);
        }
        if (dropout.threshold) attention.keep(sequence, tile, m, j0, s.kept);
        if (kPairs && m % 2) {  // a row of zeros completes the last pair
          memset(s.q + m * sizes.q_cells, 0, 4 * sizes.q_cells);
          memset(s.grad_o + m * sizes.v_cells, 0, 4 * sizes.v_cells);
        }
        for (int64_t t0 = 0; t0 < m; t0 += kScoreRows) {
          const int64_t t1 = smaller(m, t0 + kScoreRows);
          float* p = s.p + (kPairs ? 0 : t0 * kKeys);  // as pairs they are kept below
          float* ds = s.ds + (kPairs ? 0 : t0 * kKeys);
          gemm<kPairs>(t1 - t0, c1 - c0, cells<kPairs>(c.D), {s.q + t0 * sizes.q_cells, sizes.q_cells, 1},
                       packed_panels(s.k_t + c0 * sizes.q_cells, sizes.q_cells), p + c0, kKeys, false);
          gemm<kPairs>(t1 - t0, c1 - c0, cells<kPairs>(c.Dv), {s.grad_o + t0 * sizes.v_cells, sizes.v_cells, 1},
                       packed_panels(s.v_t + c0 * sizes.v_cells, sizes.v_cells), ds + c0, kKeys, false);
          for (int64_t t = t0; t < t1; t++, p += kKeys, ds += kKeys) {
            gradients_of_row(item, tile, t, j0, columns, s, p, ds);
            if constexpr (kPairs) {
              if (t % 2 == 0 && t + 1 < m) continue;
              const int64_t even = t / 2 * 2;
              if (even == t)
                for (float* row : {p, ds}) memset(row + kKeys, 0, 4 * kKeys);
              pair_rows(columns, p - (t - even) * kKeys, s.p_pairs + even / 2 * kKeys, nullptr);
              pair_rows(columns, ds - (t - even) * kKeys, s.ds_pairs + even / 2 * kKeys, s.ds_rows + even * kKeys / 2);
            }
          }
        }
        if constexpr (kPairs) {
          pack_depth<kPairs>(s.q, sizes.q_cells, 2 * depth, sizes.q_width, s.q_pairs, sizes.q_width, kPanel);
          pack_depth<kPairs>(s.grad_o, sizes.v_cells, 2 * depth, sizes.v_width, s.grad_o_pairs, sizes.v_width, kPanel);
        }
        const int64_t n = smaller(c1, sequence.end - j0) - c0;
        gemm<kPairs>(n, sizes.v_width, depth, {(kPairs ? s.p_pairs : s.p) + c0, 1, kKeys},
                     plain_rows(kPairs ? s.grad_o_pairs : s.grad_o, sizes.v_width), s.dv + c0 * sizes.v_width,
                     sizes.v_width, true);
        gemm<kPairs>(n, sizes.q_width, depth, {(kPairs ? s.ds_pairs : s.ds) + c0, 1, kKeys},
                     plain_rows(kPairs ? s.q_pairs : s.q, sizes.q_width), s.dk + c0 * sizes.q_width, sizes.q_width,
                     true);
        const Matrix ds = kPairs ? Matrix{s.ds_rows + c0 / 2, kKeys / 2, 1} : Matrix{s.ds + c0, kKeys, 1};
        gemm<kPairs>(m, sizes.q_width, cells<kPairs>(c1 - c0), ds,
                     {s.k + cells<kPairs>(c0) * kPanel, kPanel, cells<kPairs>(kKeys) * kPanel},
                     dq_rows + a0 * sizes.q_width, sizes.q_width, true);
      }
    }
    for (int64_t j = larger(j0, sequence.begin); j < smaller(j0 + kKeys, sequence.end); j++) {
      const int64_t key = sequence.k0 + sequence.key(j);
      scale_row(s.dk + (j - j0) * sizes.q_width, sizes.q_width, c.scale);
      scale_row(s.dv + (j - j0) * sizes.v_width, sizes.v_width, dropout.scale);
      store_row(dk.row(c.dtype, sequence.b, item.head, key), c.dtype, c.D, s.dk + (j - j0) * sizes.q_width);
      store_row(dv.row(c.dtype, sequence.b, item.head, key), c.dtype, c.Dv, s.dv + (j - j0) * sizes.v_width);
    }
  };

  auto head_of = [&](const Item& item, const BackwardScratch& s) {
    const Sequence& sequence = attention.sequences[item.sequence];
    for (int64_t h = item.head * group; h < (item.head + 1) * group; h++) {
      memset(dq_sums.p + (item.part * rows + row_of(sequence, h, 0)) * sizes.q_width, 0,
             4 * actives[item.sequence * c.H + h] * sizes.q_width);
      memset(diagonals_of(item.sequence, h, item.part), 0,
             4 * (diagonals[item.sequence + 1] - diagonals[item.sequence]));
    }
    const int64_t split_blocks = (sequence.blocks() + splits - 1) / splits;
    const int64_t first = item.part * split_blocks * kKeys;
    for (int64_t j0 = first; j0 < smaller(sequence.end, first + split_blocks * kKeys); j0 += kKeys)
      block_of(item, j0, s);
    if (item.part > 0) return;
    memset(s.dk, 0, 4 * larger(sizes.q_width, sizes.v_width));  // keys that are not kept have no gradient
    for (int64_t j = 0; j < sequence.Sk; j++)
      if (!sequence.keeps(j)) {
        store_row(dk.row(c.dtype, sequence.b, item.head, sequence.k0 + j), c.dtype, c.D, s.dk);
        store_row(dv.row(c.dtype, sequence.b, item.head, sequence.k0 + j), c.dtype, c.Dv, s.dk);
      }
  };

  Items items(larger(1, heads * splits));
  for (int64_t n = 0; n < (all_batches ? smaller(count, 1) : count); n++)
    for (int64_t split = 0; split < splits; split++)
      for (int64_t head = 0; head < (all_heads ? 1 : c.Hkv); head++) {
        // With causal the first keys are seen by the most queries.
        const Sequence& sequence = attention.sequences[n];
        const float share = c.right >= 0 ? 1 - (split + 0.5f) / splits : 1;
        items.add({n, head, split}, share * (float)sequence.Sq * (float)(sequence.end - sequence.begin));
      }
  items.sort();

  auto item_of = [&](int64_t number, float* memory) {
    Arena arena{memory};
    const BackwardScratch s(arena, sizes);
    Item item = items[number];
    for (int64_t n = item.sequence; n < (all_batches ? count : item.sequence + 1); n++)
      for (int64_t head = item.head; head < (all_heads ? c.Hkv : item.head + 1); head++)
        head_of({n, head, item.part}, s);
  };

  auto dq_of = [&](int64_t item, float* memory) {
    const Sequence& sequence = attention.sequences[item / c.H];
    const int64_t h = item % c.H;
    for (int64_t i = 0, a = 0; i < sequence.Sq; i++) {
      const int64_t row = row_of(sequence, h, a);
      const bool is_active = a < actives[item] && active[row] == i;
      for (int64_t d = 0; d < sizes.q_width; d += W) {
        f32v sum{};
        if (is_active)
          for (int64_t split = 0; split < splits; split++)
            sum += load(dq_sums.p + (split * rows + row) * sizes.q_width + d);
        store(memory + d, sum * c.scale);
      }
      a += is_active;
      store_row(dq.row(c.dtype, sequence.b, h, sequence.q0 + i), c.dtype, c.D, memory);
    }
  };

  auto small_of = [&](int64_t h, float*) {
    for (int64_t n = 0; n < count; n++) {
      const Sequence& sequence = attention.sequences[n];
      const int64_t length = diagonals[n + 1] - diagonals[n];
      for (int64_t split = 0; split < splits && length; split++)
        add_row(c.drelative + h * (2 * c.N - 1) + c.N - 1 + sequence.least_distance(), diagonals_of(n, h, split),
                length);
      if (!c.dsinks) continue;
      for (int64_t i = 0; i < sequence.Sq; i++) {
        const int64_t row = row_of(sequence, h, i);
        if (c.lse[row] != -INFINITY) c.dsinks[h] -= exp2(splat((c.sinks[h] - c.lse[row]) * kLog2e))[0] * delta[row];
      }
    }
  };

  parallel(threads, scratch_of<BackwardScratch>(sizes), Phase{count * c.H, delta_of}, Phase{items.count, item_of},
           Phase{count * c.H, dq_of}, Phase{c.drelative || c.dsinks ? c.H : 0, small_of});
}

}  // namespace

void flash_attention_forward(const FlashAttention& call, int threads) {
  (kDotBFloat16 && call.dtype == kBFloat16 ? forward<true> : forward<false>)(call, threads);
}

void flash_attention_backward(const FlashAttention& call, int threads) {
  (kDotBFloat16 && call.dtype == kBFloat16 ? backward<true> : backward<false>)(call, threads);
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
