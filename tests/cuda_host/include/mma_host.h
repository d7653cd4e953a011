// csrc/cuda/mma.cuh on the host; the layouts of the registers are written down there. A warp's lanes meet in each call,
// and the last to arrive does the work of all.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace fusetune::cuda {

namespace host {

struct Load {
  const void* row;
  uint32_t* d;
};

template <int kMatrices, bool kTrans>
void load_matrices(void* const* records, cuda_host::Site site) {
  Load* const* lanes = (Load* const*)records;
  for (int i = 0; i < kMatrices; i++) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; r++) cuda_host::lane_read(8 * i + r, matrix[r], lanes[8 * i + r]->row, 16, site);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTrans ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTrans ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      lanes[lane]->d[i] = high << 16 | low;
    }
  }
}

// The element of type T in the low (0) or high (1) half of a register; tf32 for float, a register of its own.
template <class T>
float element(uint32_t bits, int half) {
  if constexpr (std::is_same_v<T, float>)
    return __uint_as_float(bits & ~0x1FFFu);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float({(uint16_t)(bits >> 16 * half)});
  else
    return __bfloat162float({(uint16_t)(bits >> 16 * half)});
}

struct Multiply {
  float* d;
  const uint32_t *a, *b;
};

// Exact products are added to D one by one in increasing k, and each sum is rounded to float. A tensor core's order and
// rounding are not documented, so results on a device may differ in the last bits.
template <class T>
void multiply_matrices(void* const* records, cuda_host::Site) {
  constexpr int kPack = 4 / sizeof(T);  // elements of a register
  constexpr int kK = 8 * kPack;
  Multiply* const* lanes = (Multiply* const*)records;
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kPack; half++) {
      for (int i = 0; i < 4; i++)
        a[g + i % 2 * 8][kPack * (t + i / 2 * 4) + half] = element<T>(lanes[lane]->a[i], half);
      for (int i = 0; i < 2; i++) b[kPack * (t + i * 4) + half][g] = element<T>(lanes[lane]->b[i], half);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane]->d[i];
      for (int k = 0; k < kK; k++) sum = fmaf(a[row][k], b[k][column], sum);
      lanes[lane]->d[i] = sum;
    }
}

}  // namespace host

inline void ldmatrix_x2(uint32_t (&d)[2], const void* row, CUDA_HOST_CALLER) {
  host::Load load{row, d};
  cuda_host::warp_collective("ldmatrix_x2", cuda_host::kAllLanes, &load, host::load_matrices<2, false>, {file, line});
}

inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row, CUDA_HOST_CALLER) {
  host::Load load{row, d};
  cuda_host::warp_collective("ldmatrix_x2_trans", cuda_host::kAllLanes, &load, host::load_matrices<2, true>,
                             {file, line});
}

inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, CUDA_HOST_CALLER) {
  host::Load load{row, d};
  cuda_host::warp_collective("ldmatrix_x4", cuda_host::kAllLanes, &load, host::load_matrices<4, false>, {file, line});
}

inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, CUDA_HOST_CALLER) {
  host::Load load{row, d};
  cuda_host::warp_collective("ldmatrix_x4_trans", cuda_host::kAllLanes, &load, host::load_matrices<4, true>,
                             {file, line});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_HOST_CALLER) {
  static_assert(sizeof(T) == 2, "T must be __half or __nv_bfloat16");
  const uint32_t b[] = {b0, b1};
  host::Multiply multiply{d, a, b};
  cuda_host::warp_collective("mma_m16n8k16", cuda_host::kAllLanes, &multiply, host::multiply_matrices<T>, {file, line});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_HOST_CALLER) {
  const uint32_t b[] = {b0, b1};
  host::Multiply multiply{d, a, b};
  cuda_host::warp_collective("mma_m16n8k8_tf32", cuda_host::kAllLanes, &multiply, host::multiply_matrices<float>,
                             {file, line});
}

inline uint32_t to_tf32(float x) { return x != x ? 0x7FFFFFFF : (__float_as_uint(x) + 0x1000) & ~0x1FFFu; }

inline void copy_async_16(void* shared, const void* global, int source_bytes = 16, CUDA_HOST_CALLER) {
  cuda_host::copy_async(shared, global, 16, source_bytes, {file, line});
}

inline void copy_async_8(void* shared, const void* global, int source_bytes = 8, CUDA_HOST_CALLER) {
  cuda_host::copy_async(shared, global, 8, source_bytes, {file, line});
}

inline void copy_async_commit() { cuda_host::copy_async_commit(); }

template <int pending>
void copy_async_wait(CUDA_HOST_CALLER) {
  cuda_host::copy_async_wait(pending, {file, line});
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

}  // namespace fusetune::cuda
