// Two launches a step, whatever the number of tensors: one advances the step counts, one updates. The arithmetic is
// that of csrc/cpu/adamw.cpp operation by operation (compiled with -fmad=false), so that devices agree.
#include "../adamw.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "launch.h"

namespace fusetune::cuda {

namespace {

// 512 threads a multiprocessor with four 16-byte loads each keep 32 KiB in flight; an H200 needs some 25 KiB (4.8 TB/s
// times 0.7 us over 132 multiprocessors). More threads would leave fewer than the 96 registers that amsgrad takes.
constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // a multiprocessor

// A tensor is cut into chunks, which blocks take in turn: small enough to spread 10 M parameters over an H200 evenly,
// large enough to hide the scalars. A multiple of 16 bytes in every storage type.
constexpr int kChunk = 16384;

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float as_float(__half x) { return __half2float(x); }
__device__ void store(float* p, float x) { *p = x; }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ void store(__half* p, float x) { *p = __float2half_rn(x); }

// One element of each tensor; max_sq is not touched without amsgrad.
template <bool kAmsgrad, class T>
__device__ void update(const AdamwScalars& s, T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_sq) {
  float g = as_float(*grad) * s.sign;
  if (s.grad_scale != 1) g = g / s.grad_scale;
  const float p = as_float(*param) * s.decay;
  float m = as_float(*exp_avg);
  m = fmaf(s.lerp, g - m, s.lerp_from_grad ? g : m);
  const float v = fmaf(s.beta2_complement * g, g, as_float(*exp_avg_sq) * s.beta2);
  float largest = v;
  if (kAmsgrad) {
    const float before = as_float(*max_sq);
    largest = before > v ? before : v;
    store(max_sq, largest);
  }
  store(param, p + s.negative_step_size * m / (sqrtf(largest) / s.sqrt_bias2 + s.eps));
  store(exp_avg, m);
  store(exp_avg_sq, v);
}

// What one memory access of a thread carries.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Elements 0 .. n-1 of the tensors at these addresses.
template <bool kAmsgrad, class T>
__device__ void update_range(const AdamwScalars& s, T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_sq,
                             int n) {
  const uintptr_t addresses = (uintptr_t)param | (uintptr_t)grad | (uintptr_t)exp_avg | (uintptr_t)exp_avg_sq |
                              (kAmsgrad ? (uintptr_t)max_sq : 0);
  int packed = 0;  // elements that packs take
  if (addresses % sizeof(Pack<T>) == 0) {
    const int packs = n / Pack<T>::kSize;
    packed = packs * Pack<T>::kSize;
#pragma unroll 1
    for (int i = threadIdx.x; i < packs; i += kThreads) {
      Pack<T> p = ((Pack<T>*)param)[i], m = ((Pack<T>*)exp_avg)[i], v = ((Pack<T>*)exp_avg_sq)[i], largest;
      const Pack<T> g = ((const Pack<T>*)grad)[i];
      if (kAmsgrad) largest = ((Pack<T>*)max_sq)[i];
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; j++)
        update<kAmsgrad>(s, p.at + j, g.at + j, m.at + j, v.at + j, largest.at + j);
      ((Pack<T>*)param)[i] = p;
      ((Pack<T>*)exp_avg)[i] = m;
      ((Pack<T>*)exp_avg_sq)[i] = v;
      if (kAmsgrad) ((Pack<T>*)max_sq)[i] = largest;
    }
  }
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < n; i += kThreads)
    update<kAmsgrad>(s, param + i, grad + i, exp_avg + i, exp_avg_sq + i, max_sq + i);
}

template <class T>
__device__ void update_chunk(const AdamwScalars& s, const int64_t* row, int64_t begin) {
  auto tensor = [&](AdamwColumn column) { return (T*)row[column] + begin; };
  T *param = tensor(kParam), *grad = tensor(kGrad), *exp_avg = tensor(kExpAvg), *exp_avg_sq = tensor(kExpAvgSq),
    *max_sq = tensor(kMaxSq);
  const int n = (int)min(row[kNumel] - begin, (int64_t)kChunk);
  if (row[kMaxSq])
    update_range<true>(s, param, grad, exp_avg, exp_avg_sq, max_sq, n);
  else
    update_range<false>(s, param, grad, exp_avg, exp_avg_sq, max_sq, n);
}

// Before the update, in a launch of its own: many blocks read a step count, and it advances once.
__global__ void __launch_bounds__(kThreads) advance_steps(const int64_t* table, int64_t rows, const float* found_inf) {
  if (found_inf && *found_inf != 0) return;
  const int64_t r = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (r < rows) *(float*)table[r * kAdamwColumns + kStep] += 1;
}

// Block b takes the chunks b, b + grid, b + 2 grid, ... of all tensors.
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_tensors(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                   const float* found_inf) {
  if (found_inf && *found_inf != 0) return;
  __shared__ int64_t ends[kThreads];  // one past the last chunk of each of kThreads rows
  __shared__ int64_t totals[kThreads / kWarpSize];
  __shared__ AdamwScalars scalars;
  int64_t group = -1;
  float step = 0;
  int64_t chunk = blockIdx.x;  // counted from the first chunk of row0
  for (int64_t row0 = 0; row0 < rows; row0 += kThreads) {
    const int64_t mine = row0 + threadIdx.x;
    const int64_t count = mine < rows ? (table[mine * kAdamwColumns + kNumel] + kChunk - 1) / kChunk : 0;
    ends[threadIdx.x] = block_prefix_sum(count, totals);
    __syncthreads();

    const int64_t chunks = ends[kThreads - 1];
    for (; chunk < chunks; chunk += gridDim.x) {
      int low = 0, high = kThreads - 1;  // the first row that ends past this chunk
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > chunk)
          high = middle;
        else
          low = middle + 1;
      }
      const int64_t* row = table + (row0 + low) * kAdamwColumns;
      const float row_step = *(const float*)row[kStep];
      if (row[kGroup] != group || row_step != step) {
        group = row[kGroup];
        step = row_step;
        __syncthreads();
        if (threadIdx.x == 0) scalars = adamw_scalars(hypers + group * kAdamwHypers, step, grad_scale);
        __syncthreads();
      }
      const int64_t begin = (chunk - (low ? ends[low - 1] : 0)) * kChunk;
      switch (row[kDtype]) {
        case kFloat32: update_chunk<float>(scalars, row, begin); break;
        case kBFloat16: update_chunk<__nv_bfloat16>(scalars, row, begin); break;
        default: update_chunk<__half>(scalars, row, begin);
      }
    }
    chunk -= chunks;
  }
}

}  // namespace

void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, void* stream) {
  if (rows == 0) return;
  const char* op = "adamw_step";
  launch(op, advance_steps, (unsigned)((rows + kThreads - 1) / kThreads), kThreads, stream, table, rows, found_inf);
  launch(op, update_tensors, kBlocks * multiprocessors(op), kThreads, stream, table, rows, hypers, grad_scale,
         found_inf);
}

}  // namespace fusetune::cuda
