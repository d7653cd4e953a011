// The 8-bit codes of ../adamw.h by formula, for vectors.
//
// Of a code, f = code + 1 (unsigned map) or |code - 127| (signed map) is 2^i + j: its exponent is the decade, its fraction
// the place in it. So value = slope f + offset with two constants of the exponent, and code from value is the same line
// the other way, whose piece (zero, a decade or 1) one comparison finds: between two neighbouring powers of two no two
// pieces begin.
#pragma once

#include "../adamw.h"
#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

constexpr int kDecades = 7;
constexpr int kOne = kDecades + 1;  // the last piece, 1; piece 0 is 0, piece d + 1 is decade d

// kFirst is f of the first code of decade 0: 2 of the unsigned map, 1 of the signed one.
template <int kFirst>
struct CodeTables {
  // value / absmax = slope f + offset, by the lowest 4 bits of f's exponent: 15 for 1, i for 2^(i + 1)
  alignas(64) float slope[16], offset[16];
  // f = min(round(inverse_slope x + inverse_offset), last) of x = value / absmax, by piece;
  alignas(64) float inverse_slope[16], inverse_offset[16], last[16];
  // by the lowest 5 bits of x's exponent, the piece of the power of two itself, and from where on it is the next one
  alignas(64) float next[32];
  alignas(64) int32_t piece[32];

  CodeTables() : slope(), offset(), inverse_slope(), inverse_offset(), last(), next(), piece() {
    double begin[kOne + 1] = {}, last_value = 0;
    double top = 1e-6;  // of the decade
    last[0] = inverse_offset[0] = kFirst - 1;
    for (int p = 1; p <= kDecades; p++, top *= 10) {
      const int count = kFirst << (p - 1), exponent = p - 3 + kFirst;
      slope[exponent & 15] = (float)(0.9 * top / count);
      offset[exponent & 15] = (float)(top * (0.45 / count - 0.8));
      inverse_slope[p] = (float)(count / (0.9 * top));
      inverse_offset[p] = (float)(count * 8 / 9.0 - 0.5);
      last[p] = 2 * count - 1;
      begin[p] = (last_value + top * (0.1 + 0.45 / count)) / 2;
      last_value = top * (1 - 0.45 / count);
    }
    offset[kDecades - 1 + kFirst - 1] = 1;
    begin[kOne] = (last_value + 1) / 2;
    last[kOne] = inverse_offset[kOne] = kFirst << kDecades;
    double power = 1;
    for (int exponent = 127; exponent > 127 - 24; exponent--, power /= 2) {
      int p = 0;
      while (p < kOne && begin[p + 1] <= power) p++;
      piece[exponent & 31] = p;
      next[exponent & 31] = p < kOne ? (float)begin[p + 1] : 2;
    }
  }

  // f, to be rounded, of x from 0 to 1; all below 2^-23 are 0
  __attribute__((always_inline)) f32v number(f32v x) const {
    x = max(splat(0x1p-23f), x);
    const i32v exponent = (i32v)x >> 23;
    const i32v p = (i32v)lookup32((const float*)piece, exponent) - (i32v)(x >= lookup32(next, exponent));
    return min(fma(lookup16(inverse_slope, p), x, lookup16(inverse_offset, p)), lookup16(last, p));
  }
};

FUSETUNE_INLINE f32v with_sign(f32v magnitude, f32v sign) {  // or the other way round, for a negative one
  return (f32v)((i32v)magnitude ^ ((i32v)sign & (int32_t)0x80000000));
}

// slope and offset times absmax: value = slope f + offset
struct Decoder {
  alignas(64) float slope[16], offset[16];

  template <int kFirst>
  Decoder(const CodeTables<kFirst>& t, float absmax) {
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
  using Tables = CodeTables<2>;
  static constexpr int kZero = 0;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) { return d.value(to_float(code + 1)); }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) { return to_nearest(t.number(x)) - 1; }
};
struct SignedCodes {
  using Tables = CodeTables<1>;
  static constexpr int kZero = 127;
  FUSETUNE_INLINE f32v decode(const Decoder& d, i32v code) {
    const f32v f = to_float(code - kZero);
    return (f32v)((i32v)d.value(f) & (f != 0));
  }
  FUSETUNE_INLINE i32v encode(const Tables& t, f32v x) {
    const f32v f = t.number((f32v)((i32v)x & 0x7FFFFFFF));
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
  for (int i = 0; i < kQuantBlock; i += W) store_bytes(codes + i, Codes::encode(tables, load(x + i) * inverse));
  return absmax;
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
