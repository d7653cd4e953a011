#include "../flash_attention.h"

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr int64_t kKeys = kMaskGroup;     // keys of a block
constexpr int64_t kQueries = 24;          // queries of a forward tile: its scores, 12 KiB, stay in L1
constexpr int64_t kBackwardQueries = 48;  // of a backward tile
constexpr int64_t kItemQueries = 240;     // rows of q for which a forward item packs k and v
constexpr int64_t kBackwardItems = 32;    // a backward pass is cut into at least so many items where it can be
constexpr float kLog2e = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Tensor {
  const void* p;
  int64_t b, h, s;
  Tensor(const void* p, const Strides& strides) : p(p), b(strides.b), h(strides.h), s(strides.s) {}
  void* row(int dtype, int64_t batch, int64_t head, int64_t position) const {
    return const_cast<void*>(at(p, dtype, batch * b + head * h + position * s));
  }
};

struct Shape {
  int64_t B, H, Hkv, Sq, Sk, D;
  int64_t group() const { return H / Hkv; }
};

// The kept keys of every sequence, in order, and how many of them each query sees.
struct Keys {
  const Shape& shape;
  const bool causal, all;
  const Buffer<int32_t> position, count;  // [B, Sk] positions of kept keys; [B, Sk + 1] kept before a position

  Keys(const Shape& shape, const uint8_t* keep, int64_t keep_row, bool causal)
      : shape(shape),
        causal(causal),
        all(!keep),
        position(all ? 0 : shape.B * shape.Sk),
        count(all ? 0 : shape.B * (shape.Sk + 1)) {
    for (int64_t b = 0; keep && b < shape.B; b++) {
      int32_t kept = 0;
      for (int64_t j = 0; j < shape.Sk; j++) {
        count[b * (shape.Sk + 1) + j] = kept;
        if (keep[b * keep_row + j]) position[b * shape.Sk + kept++] = (int32_t)j;
      }
      count[b * (shape.Sk + 1) + shape.Sk] = kept;
    }
  }
  int64_t kept_before(int64_t b, int64_t j) const { return all ? j : count[b * (shape.Sk + 1) + j]; }
  int64_t kept(int64_t b) const { return kept_before(b, shape.Sk); }
  int64_t key(int64_t b, int64_t j) const { return all ? j : position[b * shape.Sk + j]; }
  // Query i sees the first so many kept keys.
  int64_t seen(int64_t b, int64_t i) const {
    return causal ? kept_before(b, larger(0, smaller(shape.Sk, i + 1 + shape.Sk - shape.Sq))) : kept(b);
  }
};

// Kept keys j0 .. j0 + n of one head as float32 rows of padded(D), zeros beyond D and up to kKeys rows.
void load_keys(const Tensor& t, int dtype, const Keys& keys, int64_t b, int64_t head, int64_t j0, int64_t n,
               float* rows) {
  const int64_t D = keys.shape.D, width = padded(D);
  for (int64_t j = 0; j < n; j++) {
    load_row(t.row(dtype, b, head, keys.key(b, j0 + j)), dtype, D, rows + j * width);
    for (int64_t d = D; d < width; d++) rows[j * width + d] = 0;
  }
  memset(rows + n * width, 0, 4 * (kKeys - n) * width);
}

// rows [kKeys, width] as panels for a product over the keys ...
void pack_rows(const float* rows, int64_t width, float* packed) {
  for (int64_t c = 0; c < width; c += W)
    for (int64_t j = 0; j < kKeys; j++)
      store(packed + c / kPanel * kPanel * kKeys + j * kPanel + c % kPanel, load(rows + j * width + c));
}
// ... and transposed, as panels [width, kKeys] for a product over D.
void pack_transposed(const float* rows, int64_t width, float* packed) {
  for (int64_t j = 0; j < kKeys; j += kPanel)
    transpose(rows + j * width, width, kPanel, width, packed + j * width, kPanel);
}

// keep[0:128] for query (b, h, i) and kept keys j0 .. j0 + n
void block_mask(const Dropout& dropout, const Keys& keys, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n,
                int32_t* keep) {
  const uint64_t row = (uint64_t)(b * keys.shape.H + h) << 32 | (uint64_t)i;
  if (keys.all) {
    dropout.keep_mask(row, j0 / kMaskGroup, keep);
    return;
  }
  int32_t group_keep[kMaskGroup];
  int64_t group = -1;
  for (int64_t j = 0; j < n; j++) {
    const int64_t key = keys.key(b, j0 + j);
    if (key / kMaskGroup != group) dropout.keep_mask(row, group = key / kMaskGroup, group_keep);
    keep[j] = group_keep[key % kMaskGroup];
  }
}

}  // namespace

void flash_attention_forward(const FlashAttention& c, int threads) {
  const Tensor q(c.q, c.q_stride), k(c.k, c.k_stride), v(c.v, c.v_stride), o(c.o, c.o_stride);
  const int64_t B = c.B, H = c.H, Hkv = c.Hkv, Sq = c.Sq, Sk = c.Sk, D = c.D, keep_row = c.keep_row;
  const uint8_t* keep = c.keep;
  const float scale = c.scale;
  const bool causal = c.right == 0;
  const double dropout_p = c.dropout_p;
  const uint64_t seed = c.seed;
  const int dtype = c.dtype;
  float* lse = c.lse;
  const Shape shape{B, H, Hkv, Sq, Sk, D};
  const Keys keys(shape, keep, keep_row, causal);
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const int64_t width = padded(D), group = shape.group();
  const int64_t chunk = larger(1, kItemQueries / group / kQueries) * kQueries;  // queries per head of an item
  const int64_t chunks = (Sq + chunk - 1) / chunk;
  const int64_t rows = group * smaller(chunk, Sq), block = kKeys * panels(D) * kPanel;

  auto item_of = [&](int64_t item, float* scratch) {
    // With causal the last queries see the most keys: they come first.
    const int64_t b = item % B, head = item / B % Hkv, i0 = (chunks - 1 - item / (B * Hkv)) * chunk;
    const int64_t queries = smaller(chunk, Sq - i0);
    float* key_rows = scratch;
    float* k_t = key_rows + kKeys * width;
    float* v_panels = k_t + kKeys * width;
    float* scores = v_panels + block;
    float* q_rows = scores + kQueries * kKeys;  // [group, queries, width], times scale log2(e)
    float* sums = q_rows + rows * width;        // [group, queries, width]
    float* largest = sums + rows * width;       // [group, queries] row maxima
    float* total = largest + rows;              // [group, queries] row sums

    for (int64_t r = 0; r < group * queries; r++) {
      float* row = q_rows + r * width;
      load_row(q.row(dtype, b, head * group + r / queries, i0 + r % queries), dtype, D, row);
      for (int64_t d = 0; d < D; d++) row[d] *= scale * kLog2e;
      memset(sums + r * width, 0, 4 * width);
      largest[r] = -INFINITY;
      total[r] = 0;
    }

    const int64_t seen_by_last = keys.seen(b, i0 + queries - 1);
    for (int64_t j0 = 0; j0 < seen_by_last; j0 += kKeys) {
      const int64_t n = smaller(kKeys, seen_by_last - j0);
      load_keys(k, dtype, keys, b, head, j0, n, key_rows);
      pack_transposed(key_rows, width, k_t);
      load_keys(v, dtype, keys, b, head, j0, n, key_rows);
      pack_rows(key_rows, width, v_panels);

      for (int64_t r0 = 0; r0 < group * queries;) {
        const int64_t first = r0 % queries, tile = smaller(kQueries, queries - first);  // within one head
        const int64_t h = head * group + r0 / queries;
        const int64_t tile_keys = smaller(n, keys.seen(b, i0 + first + tile - 1) - j0);
        if (tile_keys > 0) {
          gemm(tile, padded(tile_keys), D, {q_rows + r0 * width, width, 1}, packed_panels(k_t, width), scores, kKeys,
               false);
          for (int64_t t = 0; t < tile; t++) {
            const int64_t r = r0 + t, i = i0 + first + t, row_keys = smaller(n, keys.seen(b, i) - j0);
            float* s = scores + t * kKeys;
            for (int64_t j = larger(0, row_keys); j < padded(tile_keys); j++) s[j] = -INFINITY;
            f32v row_max = splat(-INFINITY);
            for (int64_t j = 0; j < tile_keys; j += W) row_max = max(row_max, load(s + j));
            const float block_max = horizontal_max(row_max);
            const float new_max = block_max > largest[r] || block_max != block_max ? block_max : largest[r];
            if (new_max == -INFINITY) {  // the row sees nothing so far
              for (int64_t j = 0; j < padded(tile_keys); j++) s[j] = 0;
              continue;
            }
            f32v row_sum{};
            for (int64_t j = 0; j < tile_keys; j += W) {
              f32v p = exp2(load(s + j) - new_max);
              p = j + W <= row_keys ? p : (f32v)((i32v)p & (lane_index() + (int32_t)j < (int32_t)row_keys));
              row_sum += p;
              store(s + j, p);
            }
            const float rescale = largest[r] == new_max ? 1.0f : exp2(splat(largest[r] - new_max))[0];
            total[r] = total[r] * rescale + horizontal_sum(row_sum);
            if (rescale != 1.0f)
              for (int64_t d = 0; d < width; d += W) store(sums + r * width + d, load(sums + r * width + d) * rescale);
            largest[r] = new_max;
            if (dropout.threshold) {
              int32_t kept[kMaskGroup];
              block_mask(dropout, keys, b, h, i, j0, tile_keys, kept);
              for (int64_t j = 0; j < tile_keys; j += W) store(s + j, (f32v)((i32v)load(s + j) & load(kept + j)));
            }
          }
          gemm(tile, width, tile_keys, {scores, kKeys, 1}, packed_panels(v_panels, kKeys), sums + r0 * width, width,
               true);
        }
        r0 += tile;
      }
    }

    for (int64_t r = 0; r < group * queries; r++) {
      const int64_t h = head * group + r / queries, i = i0 + r % queries;
      float* row = sums + r * width;
      const float inverse = total[r] == 0 ? 0.0f : dropout.scale / total[r];
      for (int64_t d = 0; d < width; d += W) store(row + d, load(row + d) * inverse);
      store_row(o.row(dtype, b, h, i), dtype, D, row);
      lse[(b * H + h) * Sq + i] = total[r] == 0 ? -INFINITY : largest[r] * kLn2 + logf(total[r]);
    }
  };
  const int64_t scratch = 2 * kKeys * width + block + kQueries * kKeys + rows * (2 * width + 2);
  parallel(threads, scratch, Phase{B * Hkv * chunks, item_of});
}

void flash_attention_backward(const FlashAttention& c, int threads) {
  const Tensor q(c.q, c.q_stride), k(c.k, c.k_stride), v(c.v, c.v_stride), o(c.o, c.o_stride),
      grad_o(c.grad_o, c.grad_o_stride), dq(c.dq, c.dq_stride), dk(c.dk, c.dk_stride), dv(c.dv, c.dv_stride);
  const int64_t B = c.B, H = c.H, Hkv = c.Hkv, Sq = c.Sq, Sk = c.Sk, D = c.D, keep_row = c.keep_row;
  const uint8_t* keep = c.keep;
  const float scale = c.scale;
  const bool causal = c.right == 0;
  const double dropout_p = c.dropout_p;
  const uint64_t seed = c.seed;
  const int dtype = c.dtype;
  float* lse = c.lse;
  const Shape shape{B, H, Hkv, Sq, Sk, D};
  const Keys keys(shape, keep, keep_row, causal);
  const Dropout dropout = Dropout::make(dropout_p, seed);
  const int64_t width = padded(D), group = shape.group(), blocks = (Sk + kKeys - 1) / kKeys;
  // Key blocks of a head are cut into `splits` items, by shape alone so that results do not depend on the threads. Each
  // sums dq over its own blocks; the sums are added up in order at the end.
  const int64_t heads = B * Hkv;
  const int64_t splits = heads ? larger(1, smaller(blocks, (kBackwardItems + heads - 1) / heads)) : 1;
  const int64_t split_blocks = (blocks + splits - 1) / splits;
  const int64_t dq_size = B * H * Sq * width;
  const Buffer<float> dq_sums(splits * dq_size), delta(B * H * Sq);

  auto delta_of = [&](int64_t item, float* scratch) {
    const int64_t b = item / H, h = item % H;
    for (int64_t i = 0; i < Sq; i++) {
      load_row(grad_o.row(dtype, b, h, i), dtype, D, scratch);
      load_row(o.row(dtype, b, h, i), dtype, D, scratch + width);
      f32v sum{};
      for (int64_t d = D; d < width; d++) scratch[d] = scratch[width + d] = 0;
      for (int64_t d = 0; d < width; d += W) sum += load(scratch + d) * load(scratch + width + d);
      delta[item * Sq + i] = horizontal_sum(sum);
    }
  };

  const int64_t block = kKeys * panels(D) * kPanel;
  auto item_of = [&](int64_t item, float* scratch) {
    // With causal the first keys are seen by the most queries: they come first.
    const int64_t b = item % B, head = item / B % Hkv, split = item / heads;
    float* key_rows = scratch;
    float* k_t = key_rows + kKeys * width;
    float* v_t = k_t + kKeys * width;
    float* k_panels = v_t + kKeys * width;
    float* dk_rows = k_panels + block;
    float* dv_rows = dk_rows + kKeys * width;
    float* q_rows = dv_rows + kKeys * width;  // times scale log2(e)
    float* do_rows = q_rows + kBackwardQueries * width;
    float* p = do_rows + kBackwardQueries * width;
    float* ds = p + kBackwardQueries * kKeys;
    float* dq_sum = dq_sums.p + split * dq_size;
    memset(dq_sum + (b * H + head * group) * Sq * width, 0, 4 * group * Sq * width);

    const int64_t kept = keys.kept(b);
    for (int64_t j0 = split * split_blocks * kKeys; j0 < smaller(kept, (split + 1) * split_blocks * kKeys);
         j0 += kKeys) {
      const int64_t n = smaller(kKeys, kept - j0);
      load_keys(v, dtype, keys, b, head, j0, n, key_rows);
      pack_transposed(key_rows, width, v_t);
      load_keys(k, dtype, keys, b, head, j0, n, key_rows);
      pack_transposed(key_rows, width, k_t);
      pack_rows(key_rows, width, k_panels);
      memset(dk_rows, 0, 4 * kKeys * width);
      memset(dv_rows, 0, 4 * kKeys * width);

      for (int64_t h = head * group; h < (head + 1) * group; h++)
        for (int64_t i0 = 0; i0 < Sq; i0 += kBackwardQueries) {
          const int64_t tile = smaller(kBackwardQueries, Sq - i0);
          const int64_t tile_keys = smaller(n, keys.seen(b, i0 + tile - 1) - j0);
          if (tile_keys <= 0) continue;
          for (int64_t t = 0; t < tile; t++) {
            float* q_row = q_rows + t * width;
            float* do_row = do_rows + t * width;
            load_row(q.row(dtype, b, h, i0 + t), dtype, D, q_row);
            load_row(grad_o.row(dtype, b, h, i0 + t), dtype, D, do_row);
            for (int64_t d = 0; d < D; d++) q_row[d] *= scale * kLog2e;
            for (int64_t d = D; d < width; d++) q_row[d] = do_row[d] = 0;
          }
          gemm(tile, padded(tile_keys), D, {q_rows, width, 1}, packed_panels(k_t, width), p, kKeys, false);
          gemm(tile, padded(tile_keys), D, {do_rows, width, 1}, packed_panels(v_t, width), ds, kKeys, false);
          for (int64_t t = 0; t < tile; t++) {
            const int64_t i = i0 + t, row_keys = smaller(tile_keys, keys.seen(b, i) - j0);
            const float row_lse = lse[(b * H + h) * Sq + i] * kLog2e, row_delta = delta[(b * H + h) * Sq + i];
            int32_t row_keep[kMaskGroup];
            if (dropout.threshold && row_keys > 0) block_mask(dropout, keys, b, h, i, j0, row_keys, row_keep);
            for (int64_t j = 0; j < padded(tile_keys); j += W) {
              float* pj = p + t * kKeys + j;
              float* dsj = ds + t * kKeys + j;
              if (j >= row_keys) {
                store(pj, f32v{});
                store(dsj, f32v{});
                continue;
              }
              f32v prob = exp2(load(pj) - row_lse), dp = load(dsj);
              if (j + W > row_keys) {
                const i32v seen = lane_index() + (int32_t)j < (int32_t)row_keys;
                prob = (f32v)((i32v)prob & seen);
                dp = (f32v)((i32v)dp & seen);
              }
              f32v dropped = prob;
              if (dropout.threshold) {
                const i32v kept_lanes = load(row_keep + j);
                dropped = (f32v)((i32v)prob & kept_lanes);
                dp = (f32v)((i32v)dp & kept_lanes) * dropout.scale;
              }
              store(pj, dropped);
              store(dsj, prob * (dp - row_delta));
            }
          }
          gemm(tile_keys, width, tile, {p, 1, kKeys}, plain_rows(do_rows, width), dv_rows, width, true);
          gemm(tile_keys, width, tile, {ds, 1, kKeys}, plain_rows(q_rows, width), dk_rows, width, true);
          gemm(tile, width, tile_keys, {ds, kKeys, 1}, packed_panels(k_panels, kKeys),
               dq_sum + ((b * H + h) * Sq + i0) * width, width, true);
        }

      // q_rows carry scale log2(e), of which dk wants scale only.
      for (int64_t j = 0; j < n; j++) {
        for (int64_t d = j * width; d < (j + 1) * width; d += W) {
          store(dk_rows + d, load(dk_rows + d) * kLn2);
          store(dv_rows + d, load(dv_rows + d) * dropout.scale);
        }
        store_row(dk.row(dtype, b, head, keys.key(b, j0 + j)), dtype, D, dk_rows + j * width);
        store_row(dv.row(dtype, b, head, keys.key(b, j0 + j)), dtype, D, dv_rows + j * width);
      }
    }
    // Keys that are not kept have no gradient.
    if (split == 0 && !keys.all) {
      memset(dk_rows, 0, 4 * width);
      for (int64_t j = 0; j < Sk; j++)
        if (keys.kept_before(b, j) == keys.kept_before(b, j + 1)) {
          store_row(dk.row(dtype, b, head, j), dtype, D, dk_rows);
          store_row(dv.row(dtype, b, head, j), dtype, D, dk_rows);
        }
    }
  };

  auto dq_of = [&](int64_t item, float* scratch) {
    for (int64_t i = 0; i < Sq; i++) {
      for (int64_t d = 0; d < width; d += W) {
        f32v sum{};
        for (int64_t split = 0; split < splits; split++)
          sum += load(dq_sums.p + split * dq_size + (item * Sq + i) * width + d);
        store(scratch + d, sum * scale);
      }
      store_row(dq.row(dtype, item / H, item % H, i), dtype, D, scratch);
    }
  };
  const int64_t scratch = 5 * kKeys * width + block + kBackwardQueries * (2 * width + 2 * kKeys);
  parallel(threads, scratch, Phase{B * H, delta_of}, Phase{heads * splits, item_of}, Phase{B * H, dq_of});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
