// The vector types of one ISA level, and the few operations that the compiler's vector extensions lack.
//
// Every source in csrc/cpu/ is compiled once per level with that level's flags and FUSETUNE_LEVEL set, and keeps all
// it defines inside `namespace fusetune::cpu::FUSETUNE_LEVEL`: a function shared between levels could be linked in
// its AVX-512 form and kill the process on a lesser CPU. For the same reason no standard-library templates here.
//
// Arithmetic, comparison and selection (`mask ? a : b`) are the operators of GCC and Clang vectors, so a kernel is one
// text for 4, 8 and 16 lanes. With FUSETUNE_EMULATED the 16-lane kernels are built from plain loops instead of
// AVX-512 instructions: tests run them on any CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../dtype.h"
#include "../philox.h"

#if !defined(FUSETUNE_EMULATED) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#define FUSETUNE_X86 1
#endif

namespace fusetune::cpu::FUSETUNE_LEVEL {

#if defined(FUSETUNE_EMULATED) || defined(__AVX512F__)
constexpr int W = 16;  // lanes of a vector
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kRegisters = 16;
#else
constexpr int W = 4;
constexpr int kRegisters = 16;
#endif

typedef float f32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef uint64_t u64v __attribute__((vector_size(4 * W)));
typedef double f64v __attribute__((vector_size(4 * W)));
typedef uint16_t u16v __attribute__((vector_size(2 * W)));
typedef uint8_t u8v __attribute__((vector_size(W)));
typedef uint16_t u16w __attribute__((vector_size(4 * W)));

#define FUSETUNE_INLINE static inline __attribute__((always_inline))

FUSETUNE_INLINE f32v load(const float* p) {
  f32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
FUSETUNE_INLINE void store(float* p, f32v v) { memcpy(p, &v, sizeof v); }
FUSETUNE_INLINE i32v load(const int32_t* p) {
  i32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
FUSETUNE_INLINE void store(int32_t* p, i32v v) { memcpy(p, &v, sizeof v); }

FUSETUNE_INLINE f32v splat(float x) { return x - f32v{}; }  // x - 0 keeps the sign of -0, 0 + x would not
FUSETUNE_INLINE i32v splat(int32_t x) { return x - i32v{}; }
FUSETUNE_INLINE u32v splat(uint32_t x) { return x - u32v{}; }

// First n < W elements of a row; the other lanes are 0 on load and untouched on store.
FUSETUNE_INLINE f32v load_first(const float* p, int64_t n) {
  f32v v{};
  memcpy(&v, p, 4 * n);
  return v;
}
FUSETUNE_INLINE void store_first(float* p, f32v v, int64_t n) { memcpy(p, &v, 4 * n); }

FUSETUNE_INLINE i32v lane_index() {
  i32v v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// The larger, and the smaller, of a and b per lane; b where either is NaN.
FUSETUNE_INLINE f32v max(f32v a, f32v b) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif FUSETUNE_X86
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FUSETUNE_INLINE f32v min(f32v a, f32v b) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif FUSETUNE_X86
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

FUSETUNE_INLINE f32v sqrt(f32v a) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)a);
#elif FUSETUNE_X86
  return (f32v)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < W; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// a b + c with one rounding, whatever -ffp-contract says.
FUSETUNE_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FUSETUNE_X86
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// Lanes exchanged with those `distance` away, a power of 2.
FUSETUNE_INLINE f32v exchange(f32v v, int distance) { return __builtin_shuffle(v, lane_index() ^ distance); }
FUSETUNE_INLINE float horizontal_sum(f32v v) {
#pragma GCC unroll 4
  for (int distance = W / 2; distance; distance /= 2) v += exchange(v, distance);
  return v[0];
}
FUSETUNE_INLINE float horizontal_max(f32v v) {
#pragma GCC unroll 4
  for (int distance = W / 2; distance; distance /= 2) v = max(v, exchange(v, distance));
  return v[0];
}

// 2^x for x <= 127, 0 below 2^-126; NaN stays NaN. Relative error < 1.2e-7 (swept in tests/test_flash_attention.py).
// x = n + f, n an integer and |f| <= 1/2: 2^f by its minimax polynomial of degree 6 (2.0e-9), 2^n into the exponent.
FUSETUNE_INLINE f32v exp2(f32v x) {
  const f32v least = splat(-126.0f), shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v bounded = max(least, x), shifted = bounded + shift;
  const f32v f = bounded - (shifted - shift);
  f32v p = splat(0x1.41fbbcp-13f);
  p = p * f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const i32v exponent = (i32v)((u32v)shifted << 23);  // the integer is in the lowest bits
#if FUSETUNE_X86 && defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
  return (f32v)_mm512_maskz_add_epi32(normal, (__m512i)p, (__m512i)exponent);
#else
  return (f32v)(((i32v)p + exponent) & ~(x < least));
#endif
}

// tanh(x), relative error < 3e-7. Below 0.625 x + x^3 P(x^2), P fitted to that interval; above, 1 - 2/(1 + e^2x).
FUSETUNE_INLINE f32v tanh(f32v x) {
  const f32v a = (f32v)((i32v)x & 0x7FFFFFFF), z = x * x;
  f32v p = splat(0x1.2c7d78p-9f);
  p = p * z - 0x1.1168b4p-7f;
  p = p * z + 0x1.64a94p-6f;
  p = p * z - 0x1.ba08c2p-5f;
  p = p * z + 0x1.1110eap-3f;
  p = p * z - 0x1.555556p-2f;
  const f32v small = x + x * (z * p);
  const f32v e = exp2(a * -0x1.715476p+1f);  // e^-2a
  const f32v large = (f32v)((i32v)((1.0f - e) / (1.0f + e)) | ((i32v)x & (int32_t)0x80000000));
  return a < 0.625f ? small : large;
}

// The lower 32 bits of each 64-bit lane, times m.
FUSETUNE_INLINE u64v multiply_low_words(u64v a, uint32_t m) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(m));
#elif FUSETUNE_X86
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(m));
#else
  return (a & 0xFFFFFFFFu) * m;
#endif
}

// Lanes from and to 16 bits. GCC 12 builds the conversions from several shuffles: hence the intrinsics.
FUSETUNE_INLINE u32v widen(u16v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (u32v)_mm512_cvtepu16_epi32((__m256i)v);
#elif FUSETUNE_X86
  return (u32v)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32v);
#endif
}
FUSETUNE_INLINE u16v narrow(u32v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (u16v)_mm512_cvtepi32_epi16((__m512i)v);
#elif FUSETUNE_X86
  return (u16v)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, u16v);
#endif
}

// Lanes from and to 8 bits.
FUSETUNE_INLINE i32v load_bytes(const uint8_t* p) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif FUSETUNE_X86
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  u8v v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, i32v);
#endif
}
FUSETUNE_INLINE void store_bytes(uint8_t* p, i32v x) {  // x from 0 to 255
#if FUSETUNE_X86 && defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif FUSETUNE_X86
  const __m128i half = (__m128i)narrow((u32v)x);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
#else
  const u8v v = __builtin_convertvector(x, u8v);
  memcpy(p, &v, sizeof v);
#endif
}

// table[index] of 16 and of 32 entries, for the lowest 4 or 5 bits of each index.
FUSETUNE_INLINE f32v lookup16(const float* table, i32v index) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif FUSETUNE_X86
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (f32v)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  f32v v;
  for (int i = 0; i < W; i++) v[i] = table[index[i] & 15];
  return v;
#endif
}
FUSETUNE_INLINE f32v lookup32(const float* table, i32v index) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
#elif FUSETUNE_X86
  return (f32v)_mm256_blendv_ps((__m256)lookup16(table, index), (__m256)lookup16(table + 16, index),
                                (__m256)(index << 27));
#else
  f32v v;
  for (int i = 0; i < W; i++) v[i] = table[index[i] & 31];
  return v;
#endif
}

FUSETUNE_INLINE f64v load_as_double(const float* p) {  // of W / 2
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif FUSETUNE_X86
  return (f64v)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  f64v v;
  for (int i = 0; i < W / 2; i++) v[i] = p[i];
  return v;
#endif
}
FUSETUNE_INLINE f32v to_float(i32v v) { return __builtin_convertvector(v, f32v); }
// To the nearest integer, ties to even; |v| < 2^22.
FUSETUNE_INLINE i32v to_nearest(f32v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (i32v)_mm512_cvtps_epi32((__m512)v);
#elif FUSETUNE_X86
  return (i32v)_mm256_cvtps_epi32((__m256)v);
#else
  return (i32v)(v + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23
#endif
}
FUSETUNE_INLINE i32v max(i32v a, i32v b) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (i32v)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif FUSETUNE_X86
  return (i32v)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}
FUSETUNE_INLINE u32v max(u32v a, u32v b) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (u32v)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif FUSETUNE_X86
  return (u32v)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

FUSETUNE_INLINE bool any(i32v mask) {  // of 0 and -1
  i32v zero{};
  return memcmp(&mask, &zero, sizeof zero) != 0;
}
FUSETUNE_INLINE bool any_nan(f32v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
#elif FUSETUNE_X86
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
#else
  bool any = false;
  for (int i = 0; i < W; i++) any |= v[i] != v[i];
  return any;
#endif
}

// bfloat16 is the upper half of a float32; rounding is to nearest, ties to even, and NaN stays NaN.
FUSETUNE_INLINE f32v from_bfloat16(u16v v) { return (f32v)(widen(v) << 16); }
FUSETUNE_INLINE u32v rounded_to_bfloat16(f32v v) {  // in the upper half of each lane; v not NaN
  return (u32v)v + 0x7FFFu + (((u32v)v >> 16) & 1u);
}
FUSETUNE_INLINE u16v to_bfloat16(f32v v) {
  u32v quiet = (u32v)(v != v) & 0x7FC00000u;  // the carry of a NaN's rounding may have left its exponent
  return narrow((rounded_to_bfloat16(v) | quiet) >> 16);
}

// Two neighbours of a sum's terms as bfloat16, the first in the lower half of each lane: acc + a0 b0 + a1 b1.
#if FUSETUNE_X86 && defined(__AVX512BF16__)
constexpr bool kDotBFloat16 = true;
FUSETUNE_INLINE f32v dot_bfloat16(f32v acc, u32v a, u32v b) {
  return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
#ifdef FUSETUNE_EMULATED
constexpr bool kDotBFloat16 = true;
#else
constexpr bool kDotBFloat16 = false;  // two products of float32 are no slower
#endif
FUSETUNE_INLINE f32v dot_bfloat16(f32v acc, u32v a, u32v b) {
  acc += (f32v)(a << 16) * (f32v)(b << 16);
  return acc + (f32v)(a & 0xFFFF0000u) * (f32v)(b & 0xFFFF0000u);
}
#endif
FUSETUNE_INLINE u32v pair_bfloat16(f32v first, f32v second) {
#if FUSETUNE_X86 && defined(__AVX512BF16__)
  const i32v lane = lane_index(), interleaved = lane | (lane + W) << 16;  // 0, 16, 1, 17, ...
  return (u32v)_mm512_permutexvar_epi16((__m512i)interleaved,
                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  const u32v a = rounded_to_bfloat16(first) | ((u32v)(first != first) & 0x7FC00000u);
  const u32v b = rounded_to_bfloat16(second) | ((u32v)(second != second) & 0x7FC00000u);
  return a >> 16 | (b & 0xFFFF0000u);
#endif
}
// The same of 2 W neighbours in a row, x and then y: pairs (x0, x1), (x2, x3), ...
FUSETUNE_INLINE u32v pair_neighbours(f32v x, f32v y) {
#if FUSETUNE_X86 && defined(__AVX512BF16__)
  return (u32v)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
#else
  u16v halves[2] = {to_bfloat16(x), to_bfloat16(y)};
  u32v pairs;
  memcpy(&pairs, halves, sizeof pairs);
  return pairs;
#endif
}

FUSETUNE_INLINE f32v from_float16(u16v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps((__m256i)v);
#elif FUSETUNE_X86
  return (f32v)_mm256_cvtph_ps((__m128i)v);
#else
  // Shift exponent and fraction into place and rescale by 2^112: this is exact for subnormals too.
  u32v bits = widen(v);
  u32v magnitude = (bits & 0x7FFFu) << 13;
  f32v scaled = (f32v)magnitude * 0x1p112f;
  u32v special = (u32v)(magnitude >= splat(0x7C00u << 13)) & 0x7F800000u;  // infinity and NaN
  return (f32v)((u32v)scaled | special | (bits & 0x8000u) << 16);
#endif
}
FUSETUNE_INLINE u16v to_float16(f32v v) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FUSETUNE_X86
  return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  // Normal results: round the fraction to 10 bits, ties to even. Subnormal results: let an addition at 2^-14 round.
  u32v sign = (u32v)v & 0x80000000u, magnitude = (u32v)v ^ sign;
  u32v normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  u32v tiny = (u32v)((f32v)magnitude + 0.5f) - 0x3F000000u;
  u32v nan = magnitude > splat(0x7F800000u) ? splat(0x7E00u) : splat(0x7C00u);
  u32v half = magnitude < splat(113u << 23) ? tiny : magnitude >= splat(143u << 23) ? nan : normal;
  return narrow(half | sign >> 16);
#endif
}

// 2 W neighbouring elements. Which lane holds which is the same for all tensors of a storage type, and no more: the
// widening and narrowing instructions work within 128-bit lanes.
struct Pair {
  f32v a, b;
};
FUSETUNE_INLINE bool any_nan(Pair x) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x.a, (__m512)x.b, _CMP_UNORD_Q);
#elif FUSETUNE_X86
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.a, (__m256)x.b, _CMP_UNORD_Q));
#else
  return any_nan(x.a) || any_nan(x.b);
#endif
}
FUSETUNE_INLINE Pair load_pair(const float* p) { return {load(p), load(p + W)}; }
FUSETUNE_INLINE void store_pair(float* p, Pair x) {
  store(p, x.a);
  store(p + W, x.b);
}
FUSETUNE_INLINE Pair load_pair_bfloat16(const uint16_t* p) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  __m512i x = _mm512_loadu_si512(p);
  return {(f32v)_mm512_unpacklo_epi16(__m512i{}, x), (f32v)_mm512_unpackhi_epi16(__m512i{}, x)};
#elif FUSETUNE_X86
  __m256i x = _mm256_loadu_si256((const __m256i*)p);
  return {(f32v)_mm256_unpacklo_epi16(__m256i{}, x), (f32v)_mm256_unpackhi_epi16(__m256i{}, x)};
#else
  u16v a, b;
  memcpy(&a, p, sizeof a);
  memcpy(&b, p + W, sizeof b);
  return {from_bfloat16(a), from_bfloat16(b)};
#endif
}
FUSETUNE_INLINE void store_pair_bfloat16(uint16_t* p, Pair x, bool may_be_nan) {
  u32v a = rounded_to_bfloat16(x.a), b = rounded_to_bfloat16(x.b);
  if (may_be_nan) {
    a |= (u32v)(x.a != x.a) & 0x7FC00000u;
    b |= (u32v)(x.b != x.b) & 0x7FC00000u;
  }
#if FUSETUNE_X86 && defined(__AVX512F__)
  // The upper halves, four of a and four of b in turn.
  alignas(64) static constexpr uint16_t kUpper[] = {1,  3,  5,  7,  33, 35, 37, 39, 9,  11, 13, 15, 41, 43, 45, 47,
                                                    17, 19, 21, 23, 49, 51, 53, 55, 25, 27, 29, 31, 57, 59, 61, 63};
  const __m512i words = _mm512_load_si512(kUpper);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, words, (__m512i)b));
#elif FUSETUNE_X86
  _mm256_storeu_si256((__m256i*)p, _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16)));
#else
  u16v low = narrow(a >> 16), high = narrow(b >> 16);
  memcpy(p, &low, sizeof low);
  memcpy(p + W, &high, sizeof high);
#endif
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
