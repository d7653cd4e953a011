// Compiled with -ffp-contract=off: products and sums round one by one, as in bitsandbytes.
#include "../quantize.h"

#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

constexpr float kNf4[16] = FUSETUNE_NF4;

// An item of work: whole cache lines in and out, and small enough to share out a layer.
constexpr int64_t kItem = 16384;

// W codes of W / 2 bytes, the upper half of a byte first, looked up.
struct Nf4 {
#if FUSETUNE_X86 && defined(__AVX512F__)
  const __m512 table = _mm512_loadu_ps(kNf4);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);

  __attribute__((always_inline)) f32v load(const uint8_t* p) const {
    uint32_t words[2];
    memcpy(words, p, sizeof words);
    const __m512i both = _mm512_inserti64x4(_mm512_set1_epi32(words[0]), _mm256_set1_epi32(words[1]), 1);
    return (f32v)_mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table);  // reads 4 bits of an index
  }
#elif FUSETUNE_X86
  const __m256 low = _mm256_loadu_ps(kNf4), high = _mm256_loadu_ps(kNf4 + 8);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);

  __attribute__((always_inline)) f32v load(const uint8_t* p) const {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
    // Of an index 3 bits are read; the fourth chooses the half.
    return (f32v)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                                  _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
#else
  __attribute__((always_inline)) f32v load(const uint8_t* p) const {
    f32v v;
    for (int i = 0; i < W / 2; i++) {
      v[2 * i] = kNf4[p[i] >> 4];
      v[2 * i + 1] = kNf4[p[i] & 15];
    }
    return v;
  }
#endif
};

FUSETUNE_INLINE f32v load_int8(const int8_t* p) {
#if FUSETUNE_X86 && defined(__AVX512F__)
  return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif FUSETUNE_X86
  return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  f32v v;
  for (int i = 0; i < W; i++) v[i] = p[i];
  return v;
#endif
}

FUSETUNE_INLINE float scale_of(const void* absmax, const float* nested, int64_t block) {
  if (!nested) return ((const float*)absmax)[block];
  const float scaled =
      nested[kNestedMap + ((const uint8_t*)absmax)[block]] * nested[kNestedAbsmax + block / kNestedBlock];
  return scaled + nested[0];
}

FUSETUNE_INLINE void store_as(float* p, f32v x, int64_t n = W) { memcpy(p, &x, 4 * n); }
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
FUSETUNE_INLINE void store_as(BFloat16* p, f32v x, int64_t n = W) { store_from_float((uint16_t*)p, x, kBFloat16, n); }
FUSETUNE_INLINE void store_as(Float16* p, f32v x, int64_t n = W) { store_from_float((uint16_t*)p, x, kFloat16, n); }

// Elements begin .. end of the weight, all of one block.
template <class T>
FUSETUNE_INLINE void dequantize_nf4(const Nf4& table, const uint8_t* codes, float scale, T* out, int64_t begin,
                                    int64_t end) {
  int64_t i = begin;
  if (i % 2 && i < end) {  // rows of an odd K
    store_as(out, splat(kNf4[codes[i / 2] & 15] * scale), 1);
    i++;
  }
  for (; i + W <= end; i += W) store_as(out + (i - begin), table.load(codes + i / 2) * scale);
  if (i < end) {
    uint8_t last[W / 2] = {};
    memcpy(last, codes + i / 2, (end - i + 1) / 2);
    store_as(out + (i - begin), table.load(last) * scale, end - i);
  }
}

template <class T>
FUSETUNE_INLINE void dequantize_int8(const int8_t* codes, float scale, T* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + W <= end; i += W) store_as(out + (i - begin), load_int8(codes + i) * scale * kReciprocal127);
  if (i < end) {
    int8_t last[W] = {};
    memcpy(last, codes + i, end - i);
    store_as(out + (i - begin), load_int8(last) * scale * kReciprocal127, end - i);
  }
}

template <class T>
void dequantize_range(const void* codes, const void* absmax, const float* nested, T* out, int64_t begin, int64_t end,
                      int64_t block, int bits) {
  const Nf4 table;
  for (int64_t b = begin / block, i = begin; i < end; b++) {
    const int64_t stop = (b + 1) * block < end ? (b + 1) * block : end;
    const float scale = scale_of(absmax, nested, b);
    if (bits == 4)
      dequantize_nf4(table, (const uint8_t*)codes, scale, out + (i - begin), i, stop);
    else
      dequantize_int8((const int8_t*)codes, scale, out + (i - begin), i, stop);
    i = stop;
  }
}

}  // namespace

void dequantize(const void* codes, const void* absmax, const float* nested, void* out, int64_t n0, int64_t n1,
                int64_t k0, int64_t k1, int64_t K, int64_t block, int bits, int dtype, int threads) {
  const bool whole = k0 == 0 && k1 == K;  // then one row of all elements
  const int64_t rows = whole ? 1 : n1 - n0, width = whole ? (n1 - n0) * K : k1 - k0;
  if (rows <= 0 || width <= 0) return;
  const int64_t items_a_row = (width + kItem - 1) / kItem;
  auto body = [&](int64_t item, float*) {
    const int64_t row = item / items_a_row, offset = item % items_a_row * kItem;
    const int64_t begin = (n0 + row) * K + k0 + offset, count = width - offset < kItem ? width - offset : kItem;
    void* to = at(out, dtype, row * width + offset);
    switch (dtype) {
      case kFloat32: dequantize_range(codes, absmax, nested, (float*)to, begin, begin + count, block, bits); break;
      case kBFloat16: dequantize_range(codes, absmax, nested, (BFloat16*)to, begin, begin + count, block, bits); break;
      default: dequantize_range(codes, absmax, nested, (Float16*)to, begin, begin + count, block, bits);
    }
  };
  parallel(rows * width < 32768 ? 1 : threads, 0, Phase{rows * items_a_row, body});
}

void quantize_nf4(const void* w, uint8_t* codes, float* absmax, int64_t count, int64_t block, int dtype, int threads) {
  const int64_t blocks = (count + block - 1) / block, blocks_an_item = block < kItem ? kItem / block : 1;
  float midpoints[15];
  for (int i = 0; i < 15; i++) midpoints[i] = (kNf4[i] + kNf4[i + 1]) / 2;

  auto quantize_block = [&](int64_t b, float* x) {
    const int64_t begin = b * block, n = count - begin < block ? count - begin : block;
    load_row(at(w, dtype, begin), dtype, n, x);
    for (int64_t i = n; i < n + W; i++) x[i] = 0;
    f32v largest{};
    bool nan = false;
    for (int64_t i = 0; i < n; i += W) {
      const f32v v = load(x + i);
      largest = max(largest, (f32v)((i32v)v & 0x7FFFFFFF));
      nan |= any_nan(v);
    }
    const float m = nan ? NAN : horizontal_max(largest), divisor = m < kLeastAbsmax ? kLeastAbsmax : m;
    absmax[b] = n < block ? divisor : m;

    const float reciprocal = 1 / divisor;
    for (int64_t i = 0; i < n; i += W) {
      const f32v v = n < block ? load(x + i) / divisor : load(x + i) * reciprocal;
      i32v code = splat(15);
      for (int t = 0; t < 15; t++) code += v <= midpoints[t];  // -1 where it is; a NaN keeps 15
      int32_t lanes[W];
      store(lanes, code);
      const int64_t valid = n - i < W ? n - i : W;
      for (int64_t j = 0; j < valid; j += 2) {
        const int second = j + 1 < valid ? lanes[j + 1] : 7;
        codes[(begin + i + j) / 2] = (uint8_t)(lanes[j] << 4 | second);
      }
    }
  };
  auto body = [&](int64_t item, float* x) {
    const int64_t end = (item + 1) * blocks_an_item < blocks ? (item + 1) * blocks_an_item : blocks;
    for (int64_t b = item * blocks_an_item; b < end; b++) quantize_block(b, x);
  };
  parallel(count < 32768 ? 1 : threads, block + W, Phase{(blocks + blocks_an_item - 1) / blocks_an_item, body});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
