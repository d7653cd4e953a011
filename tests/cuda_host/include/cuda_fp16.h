// Stand-in for CUDA's header: float16 as storage, with conversions that round to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x) & 0x7FFFFFFF;
  const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000;
  if (x != x) return {0x7FFF};
  if (bits >= 0x477FF000) return {(uint16_t)(sign | 0x7C00)};  // 65520 rounds to infinity
  if (bits < 0x38800000)                                       // below the least normal number, 2^-14
    return {(uint16_t)(sign | (unsigned)nearbyintf(__uint_as_float(bits) * 0x1p24f))};
  const unsigned rounded = (bits + 0xFFF + (bits >> 13 & 1)) >> 13;
  return {(uint16_t)(sign | (rounded - (112 << 10)))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
