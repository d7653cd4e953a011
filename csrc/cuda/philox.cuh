// The generator of philox.h on the device, and its dropout masks.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace fusetune::cuda {

// What a kernel needs to make a mask.
struct Dropout {
  const int64_t* seed;  // on the device; not read without dropout
  uint32_t threshold;   // 0: no dropout
  float scale;          // of kept elements

  static Dropout make(double p, const int64_t* seed) {
    const uint32_t threshold = (uint32_t)(p * 65536.0 + 0.5);
    return {seed, threshold, threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f};
  }
  static Dropout none() { return {nullptr, 0, 1}; }
};

// Words of the generator at (counter, row mod 2^32, row div 2^32, 0): of the 16-bit pieces, 2 i is the low half of word i.
__device__ inline void philox(uint32_t (&c)[4], uint64_t seed, uint64_t row, uint32_t counter) {
  c[0] = counter;
  c[1] = (uint32_t)row;
  c[2] = (uint32_t)(row >> 32);
  c[3] = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; round++) {
    const uint32_t high0 = __umulhi(kPhiloxM0, c[0]), high1 = __umulhi(kPhiloxM1, c[2]);
    const uint32_t low0 = kPhiloxM0 * c[0], low1 = kPhiloxM1 * c[2];
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// Of one row, what one counter decides: bit j says whether column 128 (counter div 16) + counter mod 16 + 16 j is kept.
__device__ inline uint8_t keep_bits(uint64_t seed, uint64_t row, uint32_t counter, uint32_t threshold) {
  uint32_t c[4];
  philox(c, seed, row, counter);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    bits |= (uint32_t)((c[i] & 0xFFFFu) >= threshold) << (2 * i) | (uint32_t)((c[i] >> 16) >= threshold) << (2 * i + 1);
  return (uint8_t)bits;
}

}  // namespace fusetune::cuda
