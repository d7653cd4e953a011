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
      u32v c0 = (u32v)(lane_index() + (int32_t)(16 * group + lane));
      u32v c1 = splat((uint32_t)row), c2 = splat((uint32_t)(row >> 32)), c3{};
      uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
      for (int round = 0; round < kPhiloxRounds; round++) {
        u32v high0, low0, high1, low1;
        multiply_wide(c0, kPhiloxM0, high0, low0);
        multiply_wide(c2, kPhiloxM1, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      const u32v words[4] = {c0, c1, c2, c3};
      for (int i = 0; i < 4; i++) {
        store(keep + 32 * i + lane, (i32v)(words[i] & 0xFFFFu) >= limit);
        store(keep + 32 * i + 16 + lane, (i32v)(words[i] >> 16) >= limit);
      }
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
    for (int64_t c = 0; c < cols; c += W) transpose_block(src + r * src_step + c, src_step, dst + c * dst_step + r, dst_step);
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
