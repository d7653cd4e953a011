// The 8-bit codes of ../adamw.h by its lines, for vectors.
#pragma once

#include "../adamw.h"
#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

// f of x from 0 to 1; all below 2^-23 are 0
template <int kFirst>
FUSETUNE_INLINE i32v number(const AdamwCodes<kFirst>& t, f32v x) {
  x = max(splat(0x1p-23f), x);
  const i32v exponent = (i32v)x >> 23;
  const i32v p = (i32v)lookup32((const float*)t.piece, exponent) - (i32v)(x >= lookup32(t.next, exponent));
  const f32v f = fma(lookup16(t.inverse_slope, p), x, lookup16(t.inverse_offset, p));
  return to_nearest(min(f, lookup16(t.last, p)));
}

// slope and offset times absmax: value = slope f + offset
struct Decoder {
  alignas(64) float slope[16], offset[16];

  template <int kFirst>
  Decoder(const AdamwCodes<kFirst>& t, float absmax) {
    for (int i = 0; i < 16; i += W) {
      store(slope + i, load(t.slope + i) * absmax);
      store(offset + i, load(t.offset + i) * absmax);
    }
  }
  __attribute__((always_inline)) f32v value(f32v f) const {
    const i32v exponent = (i32v)f >> 23;
    return fma(lookup16(slope, exponent), f, lookup16(offset, exponent));
  }
};

struct UnsignedCodes {
  using Tables = AdamwCodes<2>;
  static constexpr int kZero = 0;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) { return d.value(to_float(code + 1)); }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) { return number(t, x) - 1; }
};
struct SignedCodes {
  using Tables = AdamwCodes<1>;
  static constexpr int kZero = 127;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) {
    const f32v f = to_float(code - kZero), magnitude = (f32v)((i32v)f & 0x7FFFFFFF);
    const i32v value = (i32v)d.value(magnitude) | ((i32v)f & (int32_t)0x80000000);
    return (f32v)(value & (code != kZero));
  }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) {
    const i32v f = number(t, (f32v)((i32v)x & 0x7FFFFFFF)), negative = (i32v)x >> 31;
    const i32v code = kZero + ((f ^ negative) - negative);
    return code < 0 ? splat(0) : code;  // there is no -1
  }
};

// codes[256] of x[256]; `bits` has the bits of all x, shifted left by 1, or larger ones, lane by lane. Returns absmax.
template <class Codes>
float encode_block(const typename Codes::Tables& tables, float* x, u32v bits, uint8_t* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < W; i++) largest = bits[i] > largest ? bits[i] : largest;
  if (largest >= 0xFF000000u) {  // something is not finite
    largest = 0;
    for (int i = 0; i < kQuantBlock; i++) {
      uint32_t b;
      memcpy(&b, x + i, 4);
      if (b << 1 >= 0xFF000000u)
        x[i] = 0;
      else if (b << 1 > largest)
        largest = b << 1;
    }
  }
  if (largest == 0) {
    memset(codes, Codes::kZero, kQuantBlock);
    return 0;
  }
  float absmax;
  largest >>= 1;
  memcpy(&absmax, &largest, 4);
  const float scale = absmax < 0x1p-126f ? 0x1p64f : 1.0f;  // 1 / absmax is finite from 2^-126 on
  const float inverse = 1 / (absmax * scale);
  for (int i = 0; i < kQuantBlock; i += W) store_bytes(codes + i, Codes::encode(tables, load(x + i) * scale * inverse));
  return absmax;
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
