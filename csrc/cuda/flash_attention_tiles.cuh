// Matrices in shared memory and their products by the tensor cores, for the attention kernels: blocks of four warps, of
// which each has whole rows of the results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "flash_attention.cuh"
#include "mma.cuh"

namespace fusetune::cuda {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;

__device__ inline uint32_t bits_of(const __half2& pair) { return *(const uint32_t*)&pair; }
__device__ inline uint32_t bits_of(const __nv_bfloat162& pair) { return *(const uint32_t*)&pair; }

// Two numbers in a register, the first in its low half.
template <class T>
__device__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>)
    return bits_of(__floats2half2_rn(x, y));
  else
    return bits_of(__floats2bfloat162_rn(x, y));
}
template <class T>
__device__ float2 unpack(const uint32_t& pair) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*(const __half2*)&pair);
  else
    return __bfloat1622float2(*(const __nv_bfloat162*)&pair);
}

// Rows of one head of one sequence in global memory, each at a multiple of 16 bytes.
template <class T>
struct Matrix {
  T* p;
  int64_t row;     // elements from one row to the next
  int rows, cols;  // cols is a multiple of 8
};

// A matrix in shared memory. From row to row it is an odd multiple of 16 bytes, so that eight rows of an ldmatrix lie in
// different banks. Rows of kD alone, their pieces permuted, would do that too, but take a register for each of four
// addresses where this takes one, and the forward kernel has none to spare.
template <class T, int kRows, int kD>
struct Tile {
  alignas(16) T at[kRows][kD + 8];

  // The 16 x 16 elements from [r, c] on, as ldmatrix takes its four matrices: from top to bottom, then from left to right.
  __device__ const T* sixteen(int r, int c) const {
    const int lane = threadIdx.x % kWarpSize;
    return &at[r + lane % 16][c + lane / 16 * 8];
  }

  // Starts to copy rows from r0 on, of which those that are not inside(r), r counted in the tile, become zeros.
  template <class Inside>
  __device__ void copy(const Matrix<const T>& m, int r0, Inside inside) {
    constexpr int kEights = kD / 8, kStep = kThreads / kEights;
    static_assert(kRows % kStep == 0);
    const int r = threadIdx.x / kEights, c = threadIdx.x % kEights * 8;
    const T* from = m.p + (r0 + r) * m.row + c;
#pragma unroll
    for (int step = 0; step < kRows; step += kStep, from += kStep * m.row) {
      const bool there = c < m.cols && inside(step + r);
      copy_async_16(&at[step + r][c], there ? from : m.p, there ? 16 : 0);
    }
  }
  __device__ void copy(const Matrix<const T>& m, int r0) {
    copy(m, r0, [&](int r) { return r0 + r < m.rows; });
  }

  // Rows of m from r0 on = sums, those of [e][.][2 h .. 2 h + 2) times factor(e, h), or zeros, whatever they are, where
  // that is 0. They go by way of this tile's rows from `first` on, which no other warp reads.
  template <int kE, class Factor>
  __device__ void store(float (&sums)[kE][kD / 8][4], int first, const Matrix<T>& m, int r0, Factor factor) {
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = 16 * e + 8 * h + lane / 4;
        const float by = factor(e, h);
        const auto times = [by](float x) { return by == 0 ? 0 : by * x; };
#pragma unroll
        for (int f = 0; f < kD / 8; f++)
          *(uint32_t*)&at[first + r][8 * f + lane % 4 * 2] =
              pack<T>(times(sums[e][f][2 * h]), times(sums[e][f][2 * h + 1]));
      }
    __syncwarp();
    for (int i = lane; i < 16 * kE * kD / 8; i += kWarpSize) {
      const int r = i / (kD / 8), c = i % (kD / 8) * 8;
      if (r0 + r < m.rows && c < m.cols) *(uint4*)(m.p + (r0 + r) * m.row + c) = *(uint4*)&at[first + r][c];
    }
  }
};

// The left operand of a product: 16 kE rows of a tile from `first` on. load(): those 16 from 16 e on and 16 columns.
template <class T, int kRows, int kD>
struct RowsOfTile {
  const Tile<T, kRows, kD>& tile;
  int first;

  __device__ void load(uint32_t (&a)[4], int e, int k) const { ldmatrix_x4(a, tile.sixteen(first + 16 * e, k)); }
};

// The same of 16 rows, in registers.
template <int kD>
struct RowsInRegisters {
  uint32_t at[kD / 16][4];

  template <class Rows>
  __device__ RowsInRegisters(const Rows& rows) {
#pragma unroll
    for (int k = 0; k < kD; k += 16) rows.load(at[k / 16], 0, k);
  }
  __device__ void load(uint32_t (&a)[4], int, int k) const {
#pragma unroll
    for (int n = 0; n < 4; n++) a[n] = at[k / 16][n];
  }
};

// sums = left right^T
template <int kE, int kF, class Left, class T, int kRows, int kD>
__device__ void multiply_rows(float (&sums)[kE][kF][4], const Left& left, const Tile<T, kRows, kD>& right) {
  static_assert(kRows == 8 * kF);
  each(sums, [](int, int, float& x) { x = 0; });
#pragma unroll
  for (int k = 0; k < kD; k += 16) {
    uint32_t a[kE][4];
#pragma unroll
    for (int e = 0; e < kE; e++) left.load(a[e], e, k);
#pragma unroll
    for (int f = 0; f < kF; f += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, right.sixteen(8 * f, k));
#pragma unroll
      for (int e = 0; e < kE; e++) {
        mma_m16n8k16<T>(sums[e][f], a[e], b[0], b[2]);
        mma_m16n8k16<T>(sums[e][f + 1], a[e], b[1], b[3]);
      }
    }
  }
}

// The result of a product, rounded to T, as the left operand of another.
template <class T, int kE, int kF>
struct Rounded {
  uint32_t at[kE][kF / 2][4];

  __device__ explicit Rounded(const float (&sums)[kE][kF][4]) {
#pragma unroll
    for (int e = 0; e < kE; e++)
#pragma unroll
      for (int f = 0; f < kF; f++)
#pragma unroll
        for (int h = 0; h < 2; h++) at[e][f / 2][f % 2 * 2 + h] = pack<T>(sums[e][f][2 * h], sums[e][f][2 * h + 1]);
  }
};

// sums += left right
template <int kE, int kF, class T, int kRows, int kD>
__device__ void multiply_columns(float (&sums)[kE][kD / 8][4], const Rounded<T, kE, kF>& left,
                                 const Tile<T, kRows, kD>& right) {
  static_assert(kRows == 8 * kF);
#pragma unroll
  for (int f = 0; f < kF; f += 2) {
#pragma unroll
    for (int d = 0; d < kD; d += 16) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, right.sixteen(8 * f, d));
#pragma unroll
      for (int e = 0; e < kE; e++) {
        mma_m16n8k16<T>(sums[e][d / 8], left.at[e][f / 2], b[0], b[1]);
        mma_m16n8k16<T>(sums[e][d / 8 + 1], left.at[e][f / 2], b[2], b[3]);
      }
    }
  }
}

}  // namespace fusetune::cuda
