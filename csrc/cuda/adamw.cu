// Two launches a step, whatever the number of tensors: one advances the step counts and computes the scalars of each, one
// updates. The arithmetic is that of csrc/cpu/adamw.cpp operation by operation (compiled with -fmad=false), so that
// devices agree.
#include "../adamw.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "block.cuh"
#include "launch.h"
#include "philox.cuh"

namespace fusetune::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;      // of the update, a multiprocessor
constexpr int kNormBlocks = 6;  // of the norm

// A tensor is cut into chunks, which blocks take in turn: small enough to spread 10 M parameters over an H200 evenly,
// large enough to hide what a chunk begins with. A multiple of what all warps take at a time.
constexpr int64_t kChunk = 16384;

// A warp takes kQuantBlock elements at a time. Those of a lane are two runs of four neighbours: one access takes a run,
// and the warp's lie side by side.
constexpr int kRun = 4;
constexpr int kEach = kQuantBlock / kWarpSize;
constexpr int kRunStride = kQuantBlock / 2;

template <class T>
struct Lane {
  struct alignas(kRun * sizeof(T)) Run {
    T at[kRun];
  };
  Run runs[kEach / kRun];
  __device__ T& operator[](int k) { return runs[k / kRun].at[k % kRun]; }
};

// Where a lane's elements lie in a tensor.
struct Span {
  int64_t first;
  int count;    // of the tensor's elements, up to the warp's last
  bool packed;  // all are there, and runs aligned

  // Element k is this far from the first.
  static __device__ int offset(int k) { return k / kRun * kRunStride + k % kRun; }
  __device__ bool has(int k) const { return offset(k) < count; }
};

// Span of the warp's elements from `begin` on, where `left` remain and `addresses` has the bits of all tensors'.
__device__ Span span_of(int64_t begin, int64_t left, int64_t addresses) {
  const int count = (int)min(left, (int64_t)kQuantBlock), before = kRun * (threadIdx.x % kWarpSize);
  return {begin + before, count - before, count == kQuantBlock && addresses % 16 == 0};
}

// Elements that are not there are 0.
template <class T>
__device__ Lane<T> load(const T* tensor, Span span) {
  Lane<T> x = {};
  const T* const from = tensor + span.first;
  if (span.packed) {
#pragma unroll
    for (int r = 0; r < kEach / kRun; r++) x.runs[r] = *(const typename Lane<T>::Run*)(from + r * kRunStride);
  } else {
#pragma unroll
    for (int k = 0; k < kEach; k++)
      if (span.has(k)) x[k] = from[Span::offset(k)];
  }
  return x;
}

template <class T>
__device__ void store(T* tensor, Lane<T> x, Span span) {
  T* const to = tensor + span.first;
  if (span.packed) {
#pragma unroll
    for (int r = 0; r < kEach / kRun; r++) *(typename Lane<T>::Run*)(to + r * kRunStride) = x.runs[r];
  } else {
#pragma unroll
    for (int k = 0; k < kEach; k++)
      if (span.has(k)) to[Span::offset(k)] = x[k];
  }
}

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float as_float(__half x) { return __half2float(x); }
__device__ void round_to(float& to, float x) { to = x; }
__device__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

template <class T>
__device__ void store_rounded(T* tensor, const float (&x)[kEach], Span span) {
  Lane<T> rounded;
#pragma unroll
  for (int k = 0; k < kEach; k++) round_to(rounded[k], x[k]);
  store(tensor, rounded, span);
}

// bfloat16 of these 32 bits, of which the lower 16 do not count; a NaN where they overflowed from one.
__device__ float upper_half(uint32_t bits, float x) { return x == x ? __uint_as_float(bits & 0xFFFF0000u) : x; }

// Stochastic rounding to bfloat16. The warp makes the 32 counters of its 256 elements, one a lane; element 128 r + 4 l + e
// has piece l div 4 of counter 16 r + 4 (l mod 4) + e. `exchange` has room for one counter's pieces a lane.
__device__ void round_randomly(float (&x)[kEach], uint64_t seed, uint64_t row, int64_t begin, uint4* exchange) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t words[4];
  philox(words, seed, row, (uint32_t)(begin / 8) + lane);
  __syncwarp();
  exchange[lane] = make_uint4(words[0], words[1], words[2], words[3]);
  __syncwarp();
  const uint16_t* const pieces = (const uint16_t*)(exchange + lane % 4 * kRun) + lane / 4;
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    const uint32_t random = pieces[8 * (k / kRun * 16 + k % kRun)];
    x[k] = upper_half(__float_as_uint(x[k]) + random, x[k]);
  }
}

template <int kFirst>
__device__ float decoded(const AdamwCodes<kFirst>& t, uint8_t code, float absmax) {
  const float f = (float)(kFirst == 2 ? code + 1 : code - 127);  // with the value's sign
  const int i = __float_as_int(f) >> 23 & 15;
  const float offset = t.offset[i] * absmax;
  return f == 0 ? 0 : fmaf(t.slope[i] * absmax, f, f < 0 ? -offset : offset);
}

// f of x = |value| / absmax; all below 2^-23 are 0.
template <int kFirst>
__device__ int number_of(const AdamwCodes<kFirst>& t, float x) {
  x = max(x, 0x1p-23f);
  const float next = t.next[__float_as_int(x) >> 23 & 31];
  const int p = (__float_as_int(next) & 15) + (x >= next);
  return (int)rintf(min(fmaf(t.inverse_slope[p], x, t.inverse_offset[p]), t.last[p]));
}

template <int kFirst>
__device__ void store_quantized(const AdamwCodes<kFirst>& t, uint8_t* tensor, float* absmax, const float (&x)[kEach],
                                Span span) {
  float largest = 0;
#pragma unroll
  for (int k = 0; k < kEach; k++)
    if (span.has(k) && fabsf(x[k]) < INFINITY) largest = max(largest, fabsf(x[k]));
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2)
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
  if (threadIdx.x % kWarpSize == 0) *absmax = largest;
  const float scale = largest < 0x1p-126f ? 0x1p64f : 1;  // 1 / largest is finite from 2^-126 on
  const float inverse = largest == 0 ? 0 : 1 / (largest * scale);
  Lane<uint8_t> codes;
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    const float magnitude = fabsf(x[k]);
    const int f = number_of(t, magnitude < INFINITY ? magnitude * scale * inverse : 0);
    codes[k] = (uint8_t)(kFirst == 2 ? f - 1 : x[k] < 0 ? max(127 - f, 0) : 127 + f);  // there is no -1
  }
  store(tensor, codes, span);
}

struct Codes {
  AdamwCodes<1> m;
  AdamwCodes<2> v;
};

struct Shared {
  Codes codes;
  uint4 exchange[kThreads];
};

// Elements begin .. begin + kChunk - 1 of a row, whose column c is row[c rows], or those that there are.
template <class P, class S>
__device__ void update_chunk(const int64_t* row, int64_t rows, const AdamwScalars& s, int64_t begin, Shared& shared) {
  constexpr bool kQuantized = sizeof(S) == 1, kNarrow = sizeof(P) == 2;
  constexpr bool kBFloat16P = std::is_same_v<P, __nv_bfloat16>;
  constexpr bool kDivides = std::is_same_v<P, float> && std::is_same_v<S, float>;
  const auto column = [&](AdamwColumn c) { return row[c * rows]; };
  P* const param = (P*)column(kParam);
  const P* const grad = (const P*)column(kGrad);
  S *const exp_avg = (S*)column(kExpAvg), *const exp_avg_sq = (S*)column(kExpAvgSq), *const max_sq = (S*)column(kMaxSq);
  const int64_t wide = column(kWide), weights = column(kFormat) >> 8;
  float *const absmax = (float*)column(kAbsmax), *const absmax_sq = (float*)column(kAbsmaxSq);
  const int64_t addresses =
      column(kParam) | column(kGrad) | column(kExpAvg) | column(kExpAvgSq) | column(kMaxSq) | wide;
  const int64_t end = min(column(kNumel), begin + kChunk);

  const int warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int64_t i = begin + warp * kQuantBlock; i < end; i += kThreads / kWarpSize * kQuantBlock) {
    const Span span = span_of(i, end - i, addresses);
    Lane<P> p_stored = load(param, span), g_stored = load(grad, span);
    Lane<S> m_stored = load(exp_avg, span), v_stored = load(exp_avg_sq, span), largest_stored = {};
    Lane<float> master = {};
    Lane<uint16_t> low = {};
    if (!kQuantized && max_sq) largest_stored = load(max_sq, span);
    if (kNarrow && weights == kMaster) master = load((const float*)wide, span);
    if (kBFloat16P && weights == kSplit) low = load((const uint16_t*)wide, span);

    float p[kEach], m[kEach], v[kEach], largest[kEach];
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      p[k] = as_float(p_stored[k]);
      if (kNarrow && weights == kMaster) p[k] = master[k];
      if (kBFloat16P) p[k] = __uint_as_float(__float_as_uint(p[k]) + (int16_t)low[k]);
      float before = 0;
      if constexpr (kQuantized) {
        m[k] = decoded(shared.codes.m, m_stored[k], absmax[i / kQuantBlock]);
        v[k] = decoded(shared.codes.v, v_stored[k], absmax_sq[i / kQuantBlock]);
      } else {
        m[k] = as_float(m_stored[k]);
        v[k] = as_float(v_stored[k]);
        before = as_float(largest_stored[k]);
      }
      float g = as_float(g_stored[k]);
      if (s.grad_scale != 1) g = g / s.grad_scale;
      g = g * s.clip * s.sign;
      m[k] = fmaf(s.lerp, g - m[k], s.lerp_from_grad ? g : m[k]);
      v[k] = fmaf(s.beta2_complement * g, g, v[k] * s.beta2);
      largest[k] = before > v[k] ? before : v[k];
      const float root = sqrtf(largest[k]);
      const float denominator = (kDivides ? root / s.sqrt_bias2 : root * s.inverse_sqrt_bias2) + s.eps;
      p[k] = p[k] * s.decay + s.negative_step_size * m[k] / denominator;
    }

    if (kBFloat16P && weights == kStochastic) {
      const uint64_t key = column(kKey), step = (uint64_t)*(const float*)column(kStep);
      const auto rounded = [&](float (&x)[kEach], uint64_t kind) {
        round_randomly(x, key, kind << 56 | step, i, shared.exchange + warp * kWarpSize);
      };
      rounded(p, 0);
      if (std::is_same_v<S, __nv_bfloat16>) {
        rounded(m, 1);
        rounded(v, 2);
        if (max_sq) rounded(largest, 3);
      }
    }
    if (kNarrow && weights == kMaster) store_rounded((float*)wide, p, span);
    if (kBFloat16P && weights == kSplit) {
#pragma unroll
      for (int k = 0; k < kEach; k++) {
        const uint32_t bits = __float_as_uint(p[k]);
        low[k] = p[k] == p[k] ? (uint16_t)bits : 0;
        p[k] = upper_half(bits + 0x8000, p[k]);
      }
      store((uint16_t*)wide, low, span);
    }
    store_rounded(param, p, span);
    if constexpr (kQuantized) {
      store_quantized(shared.codes.m, exp_avg, absmax + i / kQuantBlock, m, span);
      store_quantized(shared.codes.v, exp_avg_sq, absmax_sq + i / kQuantBlock, v, span);
    } else {
      store_rounded(exp_avg, m, span);
      store_rounded(exp_avg_sq, v, span);
      if (max_sq) store_rounded(max_sq, largest, span);
    }
  }
}

// Calls act(row, begin) for the chunks b, b + grid, b + 2 grid, ... of all tensors, b this block.
template <class Act>
__device__ void for_chunks(const int64_t* table, int64_t rows, Act act) {
  __shared__ int64_t ends[kThreads];  // one past the last chunk of each of kThreads rows
  __shared__ int64_t totals[kThreads / kWarpSize];
  int64_t chunk = blockIdx.x;  // counted from the first chunk of row0
  for (int64_t row0 = 0; row0 < rows; row0 += kThreads) {
    const int64_t mine = row0 + threadIdx.x;
    const int64_t count = mine < rows ? (table[kNumel * rows + mine] + kChunk - 1) / kChunk : 0;
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
      act(row0 + low, (chunk - (low ? ends[low - 1] : 0)) * kChunk);
    }
    chunk -= chunks;
  }
}

// Before the update, in a launch of its own: many blocks read a step count, and it advances once.
__global__ void __launch_bounds__(kThreads)
    prepare(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale, const float* found_inf,
            const float* grad_norm, float max_grad_norm, AdamwScalars* scalars) {
  if (found_inf && *found_inf != 0) return;
  const int64_t r = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (r >= rows) return;
  const double* const hyper = hypers + table[kGroup * rows + r] * kAdamwHypers;
  const float* const lr = (const float*)table[kLr * rows + r];
  const float step = *(float*)table[kStep * rows + r] += 1;
  scalars[r] = adamw_scalars(hyper, lr ? *lr : hyper[kLearningRate], step, grad_scale, grad_norm, max_grad_norm);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    update_tensors(const int64_t* table, int64_t rows, const float* found_inf, const AdamwScalars* scalars,
                   const __grid_constant__ Codes codes) {
  if (found_inf && *found_inf != 0) return;
  __shared__ Shared shared;
  for (size_t i = threadIdx.x; i < sizeof codes / 4; i += kThreads)
    ((uint32_t*)&shared.codes)[i] = ((const uint32_t*)&codes)[i];
  for_chunks(table, rows, [&](int64_t r, int64_t begin) {
    const AdamwScalars s = scalars[r];
    const auto update = [&](auto param, auto state) {
      update_chunk<decltype(param), decltype(state)>(table + r, rows, s, begin, shared);
    };
    switch (table[kFormat * rows + r] & 0xFF) {
      case adamw_format(kFloat32, kFloat32, 0): update(float{}, float{}); break;
      case adamw_format(kFloat32, kBFloat16, 0): update(float{}, __nv_bfloat16{}); break;
      case adamw_format(kFloat32, kInt8, 0): update(float{}, uint8_t{}); break;
      case adamw_format(kBFloat16, kFloat32, 0): update(__nv_bfloat16{}, float{}); break;
      case adamw_format(kBFloat16, kBFloat16, 0): update(__nv_bfloat16{}, __nv_bfloat16{}); break;
      case adamw_format(kBFloat16, kInt8, 0): update(__nv_bfloat16{}, uint8_t{}); break;
      case adamw_format(kFloat16, kFloat32, 0): update(__half{}, float{}); break;
      case adamw_format(kFloat16, kBFloat16, 0): update(__half{}, __nv_bfloat16{}); break;
      case adamw_format(kFloat16, kInt8, 0): update(__half{}, uint8_t{}); break;
      default: update(__half{}, __half{});
    }
  });
}

template <class T>
__device__ double chunk_squares(const int64_t* row, int64_t rows, int64_t begin) {
  const int64_t grad = row[kGrad * rows], end = min(row[kNumel * rows], begin + kChunk);
  double sum = 0;
  for (int64_t i = begin + threadIdx.x / kWarpSize * kQuantBlock; i < end; i += kThreads / kWarpSize * kQuantBlock) {
    Lane<T> g = load((const T*)grad, span_of(i, end - i, grad));
#pragma unroll
    for (int k = 0; k < kEach; k++) sum += (double)as_float(g[k]) * (double)as_float(g[k]);
  }
  return sum;
}

// The sum of squares of each block's chunks.
__global__ void __launch_bounds__(kThreads, kNormBlocks) sum_squares(const int64_t* table, int64_t rows, double* sums) {
  double sum = 0;
  for_chunks(table, rows, [&](int64_t r, int64_t begin) {
    switch (table[kFormat * rows + r] & 0xF) {
      case kFloat32: sum += chunk_squares<float>(table + r, rows, begin); break;
      case kBFloat16: sum += chunk_squares<__nv_bfloat16>(table + r, rows, begin); break;
      default: sum += chunk_squares<__half>(table + r, rows, begin);
    }
  });
  __shared__ double totals[kThreads / kWarpSize];
  sum = block_prefix_sum(sum, totals);
  if (threadIdx.x == kThreads - 1) sums[blockIdx.x] = sum;
}

// In one block.
__global__ void __launch_bounds__(kThreads)
    finish_norm(const double* sums, int64_t count, const float* grad_scale, float* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  __shared__ double totals[kThreads / kWarpSize];
  sum = block_prefix_sum(sum, totals);
  if (threadIdx.x == kThreads - 1) *norm = (float)(sqrt(sum) / (grad_scale ? *grad_scale : 1));
}

}  // namespace

void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, const float* grad_norm, float max_grad_norm, AdamwScalars* workspace,
                void* stream) {
  if (rows == 0) return;
  const char* op = "adamw_step";
  launch(op, prepare, (unsigned)((rows + kThreads - 1) / kThreads), kThreads, stream, table, rows, hypers, grad_scale,
         found_inf, grad_norm, max_grad_norm, workspace);
  const Codes codes = {AdamwCodes<1>::make(), AdamwCodes<2>::make()};
  launch(op, update_tensors, kBlocks * multiprocessors(op), kThreads, stream, table, rows, found_inf, workspace, codes);
}

void adamw_grad_norm(const int64_t* table, int64_t rows, const float* grad_scale, float* norm, double* workspace,
                     void* stream) {
  const char* op = "adamw_grad_norm";
  const int64_t blocks = adamw_grad_norm_workspace();
  launch(op, sum_squares, (unsigned)blocks, kThreads, stream, table, rows, workspace);
  launch(op, finish_norm, 1, kThreads, stream, workspace, blocks, grad_scale, norm);
}

int64_t adamw_grad_norm_workspace() { return kNormBlocks * multiprocessors("adamw_grad_norm"); }

}  // namespace fusetune::cuda
