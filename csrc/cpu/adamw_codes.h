// The 8-bit codes of ../adamw.h by its lines, for vectors.
#pragma once

#include "../adamw.h"
#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

// f, to be rounded, of x from 0 to 1; all below 2^-23 are 0
template <int kFirst>
FUSETUNE_INLINE f32v number(const AdamwCodes<kFirst>& t, f32v x) {
  x = max(splat(0x1p-23f), x);
  const f32v next = lookup32(t.next, (i32v)x >> 23);
  const i32v p = (i32v)next - (i32v)(x >= next);
  return min(fma(lookup16(t.inverse_slope, p), x, lookup16(t.inverse_offset, p)), lookup16(t.last, p));
}

FUSETUNE_INLINE f32v with_sign(f32v magnitude, f32v sign) {  // or the other way round, for a negative one
  return (f32v)((i32v)magnitude ^ ((i32v)sign & (int32_t)0x80000000));
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
  // The value that has the sign of f
  __attribute__((always_inline)) f32v value(f32v f) const {
    const i32v exponent = (i32v)f >> 23;
    return fma(lookup16(slope, exponent), f, with_sign(lookup16(offset, exponent), f));
  }
};

struct UnsignedCodes {
  using Tables = AdamwCodes<2>;
  static constexpr int kZero = 0;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) { return d.value(to_float(code + 1)); }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) { return to_nearest(number(t, x)) - 1; }
};
struct SignedCodes {
  using Tables = AdamwCodes<1>;
  static constexpr int kZero = 127;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) {
    const f32v f = to_float(code - kZero);
    return (f32v)((i32v)d.value(f) & (f != 0));
  }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) {
    const f32v f = number(t, (f32v)((i32v)x & 0x7FFFFFFF));
    return max(kZero + to_nearest(with_sign(f, x)), i32v{});  // there is no -1
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
  float scaled = absmax;
  if (absmax < 0x1p-126f) {  // where 1 / absmax is not finite
    scaled *= 0x1p64f;
    for (int i = 0; i < kQuantBlock; i++) x[i] *= 0x1p64f;
  }
  const float inverse = 1 / scaled;
  const typename Codes::Tables t = tables;  // a copy, which no store may change: it stays in registers
  for (int i = 0; i < kQuantBlock; i += W) store_bytes(codes + i, Codes::encode(t, load(x + i) * inverse));
  return absmax;
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
