// Rows of a tensor in any storage type, to and from float32; dropout masks; transposition. Included by level sources.
#pragma once

#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

FUSETUNE_INLINE f32v load_as_float(const uint16_t* p, int dtype, int64_t n = W) {
  u16v v{};
  memcpy(&v, p, 2 * n);
  return dtype == kBFloat16 ? from_bfloat16(v) : from_float16(v);
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

// A dropout mask as in ../philox.h.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: no dropout
  float scale;         // of kept elements

  FUSETUNE_INLINE Dropout make(double p, uint64_t seed) {
    uint32_t threshold = (uint32_t)(p * 65536.0 + 0.5);
    return {seed, threshold, threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f};
  }

  // keep[0:128] = -1 where column 128 group + i of `row` is kept, 0 where it is dropped
  void keep_mask(uint64_t row, int64_t group, int32_t* keep) const {
    const i32v limit = splat((int32_t)threshold);
    for (int lane = 0; lane < 16; lane += W) {
      // Counters lane .. lane + W: the even ones and the odd ones, each in the lower half of a 64-bit lane, where the
      // multiplier wants it. The upper halves are never read.
      const u32v c0 = (u32v)(lane_index() + (int32_t)(16 * group + lane));
      u64v even[4] = {(u64v)c0, (u64v)splat((uint32_t)row), (u64v)splat((uint32_t)(row >> 32)), u64v{}};
      u64v odd[4] = {(u64v)c0 >> 32, even[1], even[2], even[3]};
      uint64_t k0 = (uint32_t)seed, k1 = seed >> 32;
#pragma GCC unroll 7
      for (int round = 0; round < kPhiloxRounds; round++) {
        philox_round(even, k0, k1);
        philox_round(odd, k0, k1);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      for (int i = 0; i < 4; i++) {
        const u32v word = (u32v)((even[i] & 0xFFFFFFFFu) | odd[i] << 32);
        store(keep + 32 * i + lane, (i32v)(word & 0xFFFFu) >= limit);
        store(keep + 32 * i + 16 + lane, (i32v)(word >> 16) >= limit);
      }
    }
  }

  FUSETUNE_INLINE void philox_round(u64v (&c)[4], uint64_t k0, uint64_t k1) {
    const u64v p0 = multiply_low_words(c[0], kPhiloxM0), p1 = multiply_low_words(c[2], kPhiloxM1);
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[1] = p1;
    c[3] = p0;
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
