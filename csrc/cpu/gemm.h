// Small matrix products held in registers: the inner loop of LoRA and of attention.
//
//   c[i, j] (+)= sum_k a(i, k) b(k, j)       a(i, k) = a[i a_row + k a_col],   b(k, j) = b[k b_row + j]
//
// The elements of a and b are float32 or, with kPairs, two neighbours along k as bfloat16 in 32 bits (simd.h).
//
// One tile is kTileRows x (NV W) accumulators: per k, NV vectors of b and kTileRows broadcasts of a. b and c are padded
// by the caller to whole vectors (n a multiple of W). b streams from L2 and a block of c is 12 x 32 at AVX-512 (24 of 32
// registers), 6 x 16 at AVX2 (12 of 16).
#pragma once

#include "simd.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

constexpr int kTileRows = kRegisters == 32 ? 12 : 6;

template <bool kPairs>
FUSETUNE_INLINE f32v multiply_add(f32v acc, const float* a, f32v b) {
  if constexpr (kPairs) {
    int32_t pair;
    memcpy(&pair, a, 4);
    return dot_bfloat16(acc, (u32v)splat(pair), (u32v)b);
  } else {
    return acc + splat(*a) * b;
  }
}

template <int ROWS, int NV, bool kPairs>
static void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                      float* c, int64_t c_row, bool accumulate) {
  f32v acc[ROWS][NV];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? load(c + i * c_row + j * W) : f32v{};
  for (int64_t k = 0; k < depth; k++) {
    f32v bk[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) bk[j] = load(b + k * b_row + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) acc[i][j] = multiply_add<kPairs>(acc[i][j], a + i * a_row + k * a_col, bk[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) store(c + i * c_row + j * W, acc[i][j]);
}

// The same for any number of rows up to ROWS.
template <int ROWS, int NV, bool kPairs>
FUSETUNE_INLINE void gemm_tile_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                                    const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  if (rows >= ROWS)
    gemm_tile<ROWS, NV, kPairs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
  else if constexpr (ROWS > 1)
    gemm_tile_rows<ROWS - 1, NV, kPairs>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
}

struct Matrix {
  const float* p;
  int64_t row, col;
};

constexpr int64_t kPanel = 2 * W;  // columns of b that a tile takes

FUSETUNE_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
FUSETUNE_INLINE int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// b as panels: element (k, j) at p[(j / kPanel) panel + k row + j % kPanel]. Packed panels keep what a tile reads
// together; plain rows are panels kPanel elements apart.
struct Panels {
  const float* p;
  int64_t row, panel;
};
FUSETUNE_INLINE Panels packed_panels(const float* p, int64_t depth) { return {p, kPanel, depth * kPanel}; }
FUSETUNE_INLINE Panels plain_rows(const float* p, int64_t row) { return {p, row, kPanel}; }

// c [m, n] (+)= a [m, depth] b [depth, n], n a multiple of W
template <bool kPairs = false>
FUSETUNE_INLINE void gemm(int64_t m, int64_t n, int64_t depth, Matrix a, Panels b, float* c, int64_t c_row,
                          bool accumulate) {
  for (int64_t j = 0; j < n; j += kPanel, b.p += b.panel)
    for (int64_t i = 0; i < m; i += kTileRows) {
      if (n - j >= kPanel)
        gemm_tile_rows<kTileRows, 2, kPairs>(m - i, depth, a.p + i * a.row, a.row, a.col, b.p, b.row, c + i * c_row + j,
                                             c_row, accumulate);
      else
        gemm_tile_rows<kTileRows, 1, kPairs>(m - i, depth, a.p + i * a.row, a.row, a.col, b.p, b.row, c + i * c_row + j,
                                             c_row, accumulate);
    }
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
