// Rows of a tensor in any storage type, to and from float32; dropout masks; transposition. Included by level sources.
#pragma once

#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

FUSETUNE_INLINE f32v load_as_float(const uint16_t* p, int dtype, int64_t n = W) {
  u16v v{};
  memcpy(&v, p, 2 * n);
  return dtype == kBFloat16 ? from_bfloat16(v) : from_float16(v);
}
FUSETUNE_INLINE f32v load_as_float(const void* p, int dtype, int64_t n) {
  if (n == W)  // a constant size is one load
    return dtype == kFloat32 ? load((const float*)p) : load_as_float((const uint16_t*)p, dtype);
  return dtype == kFloat32 ? load_first((const float*)p, n) : load_as_float((const uint16_t*)p, dtype, n);
}
FUSETUNE_INLINE void store_from_float(uint16_t* p, f32v x, int dtype, int64_t n = W) {
  u16v v = dtype == kBFloat16 ? to_bfloat16(x) : to_float16(x);
  memcpy(p, &v, 2 * n);
}

// dst[0:n] = float(src[0:n])
FUSETUNE_INLINE void load_row(const void* src, int dtype, int64_t n, float* dst) {
  if (dtype == kFloat32) {
    memcpy(dst, src, 4 * n);
    return;
  }
  const uint16_t* p = (const uint16_t*)src;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load_as_float(p + i, dtype));
  if (i < n) store_first(dst + i, load_as_float(p + i, dtype, n - i), n - i);
}

// dst[0:n] = src[0:n] rounded to dtype
FUSETUNE_INLINE void store_row(void* dst, int dtype, int64_t n, const float* src) {
  if (dtype == kFloat32) {
    memcpy(dst, src, 4 * n);
    return;
  }
  uint16_t* p = (uint16_t*)dst;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_from_float(p + i, load(src + i), dtype);
  if (i < n) store_from_float(p + i, load_first(src + i, n - i), dtype, n - i);
}

FUSETUNE_INLINE const void* at(const void* p, int dtype, int64_t element) {
  return (const char*)p + element * size_of(dtype);
}
FUSETUNE_INLINE void* at(void* p, int dtype, int64_t element) { return (char*)p + element * size_of(dtype); }

// The pieces of ../philox.h, made for 128 columns at a time: a row of them is 64 pairs, of which pair 16 i + l has the
// piece of column 32 i + l in its lower half and that of column 32 i + 16 + l in its upper one.
constexpr int kMaskPairs = kMaskGroup / 2;

// What the lanes bring to the generator's state after two rounds.
struct LaneRounds {
  u64v c0, c1, c2;

  FUSETUNE_INLINE LaneRounds of(u64v counter, uint32_t k1) {
    const u64v p0 = multiply_low_words(counter, kPhiloxM0);
    const u64v p1 = multiply_low_words((p0 >> 32) ^ k1, kPhiloxM1);
    return {p1 >> 32, p1, p0};
  }
};
FUSETUNE_INLINE void philox_round(u64v (&c)[4], uint32_t k0, uint32_t k1) {
  const u64v p0 = multiply_low_words(c[0], kPhiloxM0), p1 = multiply_low_words(c[2], kPhiloxM1);
  c[0] = (p1 >> 32) ^ c[1] ^ k0;
  c[2] = (p0 >> 32) ^ c[3] ^ k1;
  c[1] = p1;
  c[3] = p0;
}

// pairs[rows, 64] = finish(pieces) of the rows from row0 and the columns from 128 group.
//
// A counter is (lane, low row, high row, 0), so that the products of Philox's first two rounds depend either on the
// lane or on the row alone: only the other rounds are computed for each element.
template <class Finish>
FUSETUNE_INLINE void philox_pairs(uint64_t seed, uint64_t row0, int64_t rows, int64_t group, uint32_t* pairs,
                                  Finish finish) {
  const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int lane = 0; lane < 16; lane += W) {
    // Counters lane .. lane + W: the even ones and the odd ones, each in the lower half of a 64-bit lane, where the
    // multiplier wants it. The upper halves are never read.
    const u32v counter = (u32v)(lane_index() + (int32_t)(16 * group + lane));
    const LaneRounds even = LaneRounds::of((u64v)counter, k1), odd = LaneRounds::of((u64v)counter >> 32, k1);
    for (int64_t r = 0; r < rows; r++) {
      const uint64_t row = row0 + r, high = (row >> 32) * kPhiloxM1;
      const uint64_t low = (uint64_t)((uint32_t)(high >> 32) ^ (uint32_t)row ^ k0) * kPhiloxM0;
      const uint64_t c0 = (uint32_t)high ^ (k0 + kPhiloxW0), c2 = low >> 32 ^ (k1 + kPhiloxW1), c3 = low;
      u64v e[4] = {even.c0 ^ c0, even.c1, even.c2 ^ c2, u64v{} + c3};
      u64v o[4] = {odd.c0 ^ c0, odd.c1, odd.c2 ^ c2, u64v{} + c3};
#pragma GCC unroll 7
      for (int round = 2; round < kPhiloxRounds; round++) {
        philox_round(e, k0 + round * kPhiloxW0, k1 + round * kPhiloxW1);
        philox_round(o, k0 + round * kPhiloxW0, k1 + round * kPhiloxW1);
      }
      for (int i = 0; i < 4; i++) {
        const u32v word = (u32v)((e[i] & 0xFFFFFFFFu) | o[i] << 32);
        store((int32_t*)pairs + r * kMaskPairs + 16 * i + lane, (i32v)finish(word));
      }
    }
  }
}

// A dropout mask: pieces that are all ones where kept and 0 where dropped.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: no dropout
  float scale;         // of kept elements

  FUSETUNE_INLINE Dropout make(double p, uint64_t seed) {
    uint32_t threshold = (uint32_t)(p * 65536.0 + 0.5);
    return {seed, threshold, threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f};
  }

  // pairs[rows, 64] of the rows from row0 and the columns from 128 group.
  void keep_pairs(uint64_t row0, int64_t rows, int64_t group, uint32_t* pairs) const {
    if (threshold > 65535) {
      memset(pairs, 0, 4 * rows * kMaskPairs);
      return;
    }
    const u16w limit = (u16w)splat(threshold << 16 | threshold);
    philox_pairs(seed, row0, rows, group, pairs, [&](u32v word) { return (u16w)word >= limit; });
  }

  // keep[0:128] = -1 where column 128 group + i of `row` is kept, 0 where it is dropped
  void keep_mask(uint64_t row, int64_t group, int32_t* keep) const {
    uint32_t pairs[kMaskPairs];
    keep_pairs(row, 1, group, pairs);
    for (int i = 0; i < kMaskPairs; i += 16)
      for (int lane = 0; lane < 16; lane += W) {
        const u32v pair = (u32v)load((int32_t*)pairs + i + lane);
        store(keep + 2 * i + lane, lower_mask(pair));
        store(keep + 2 * i + 16 + lane, upper_mask(pair));
      }
  }

  FUSETUNE_INLINE i32v lower_mask(u32v pair) { return (i32v)(pair << 16) >> 16; }
  FUSETUNE_INLINE i32v upper_mask(u32v pair) { return (i32v)pair >> 16; }

  // Of a row's mask, -1 or 0 for the columns c .. c + W.
  FUSETUNE_INLINE i32v mask_of(const uint32_t* pairs, int64_t c) {
    const u32v pair = (u32v)load((const int32_t*)pairs + c / 32 * 16 + c % 16);
    return c % 32 < 16 ? lower_mask(pair) : upper_mask(pair);
  }

  // row[0:128] = 0 where dropped.
  FUSETUNE_INLINE void apply(const uint32_t* pairs, uint16_t* row) {
    for (int64_t c = 0; c < kMaskGroup; c += W) {
      u16v v;
      memcpy(&v, row + c, sizeof v);
      v &= narrow((u32v)mask_of(pairs, c) & 0xFFFFu);
      memcpy(row + c, &v, sizeof v);
    }
  }

  // dst[0:128] = src[0:128] where kept, 0 where dropped; src may be dst.
  FUSETUNE_INLINE void apply(const uint32_t* pairs, const float* src, float* dst) {
    for (int i = 0; i < kMaskPairs; i += 16)
      for (int lane = 0; lane < 16; lane += W) {
        const u32v pair = (u32v)load((const int32_t*)pairs + i + lane);
        const int at = 2 * i + lane;
        store(dst + at, (f32v)((i32v)load(src + at) & lower_mask(pair)));
        store(dst + at + 16, (f32v)((i32v)load(src + at + 16) & upper_mask(pair)));
      }
  }
};

// dst[c, r] = src[r, c] for a W x W block; a row is src_step or dst_step elements apart.
FUSETUNE_INLINE void transpose_block(const float* src, int64_t src_step, float* dst, int64_t dst_step) {
  f32v v[W];
  for (int i = 0; i < W; i++) v[i] = load(src + i * src_step);
  i32v low, high;  // perfect shuffle of two vectors, first and second half; log2(W) of them transpose
  for (int i = 0; i < W; i++) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = W / 2 + i / 2 + (i % 2) * W;
  }
  for (int step = 1; step < W; step *= 2) {
    f32v t[W];
    for (int i = 0; i < W / 2; i++) {
      t[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
      t[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
    }
    for (int i = 0; i < W; i++) v[i] = t[i];
  }
  for (int i = 0; i < W; i++) store(dst + i * dst_step, v[i]);
}

// dst[c, r] = src[r, c], rows x cols, both multiples of W
FUSETUNE_INLINE void transpose(const float* src, int64_t src_step, int64_t rows, int64_t cols, float* dst,
                               int64_t dst_step) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W)
      transpose_block(src + r * src_step + c, src_step, dst + c * dst_step + r, dst_step);
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
