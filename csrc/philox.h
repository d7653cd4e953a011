// Dropout masks: a counter-based generator, so that a mask is recomputed instead of stored and does not depend on
// tile, thread count or device.
//
// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3; 7 rounds
// pass BigCrush, table 2). One mask element is 16 bits of its output:
//
//   key      = (seed mod 2^32, seed div 2^32)
//   counter  = (16 (col div 128) + col mod 16,  row mod 2^32,  row div 2^32,  0)
//   bits     = 16-bit piece number (col mod 128) div 16 of the four output words; piece 2i is the low half of word i
//   kept     = bits >= threshold,   threshold = round(65536 p);   kept elements are scaled by 65536/(65536 - threshold)
//
// 16 neighbouring counters thus serve 128 neighbouring columns, and a vector of 4, 8 or 16 counters gives runs of
// neighbouring columns without a shuffle. `row` is 64 bits wide: the token number for LoRA, ((b H + h) << 32 | q) for
// attention; `col` is the input feature or the key position. pyfront/ops/philox.py is the same in plain torch.
#pragma once

#include <cstdint>

namespace fusetune {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments (Weyl sequence)
constexpr int kMaskGroup = 128;                                       // columns served by 16 counters

}  // namespace fusetune
