// Stand-in for CUDA's header: the part of CUDA C++ that fusetune's kernels use, on the host. What is missing does not
// compile; add it here, with a test in tests/test_cuda_host.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../runtime.h"

using std::size_t;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __align__(n) __attribute__((aligned(n)))
// One copy for each OS thread that runs blocks. `extern __shared__` thus declares a variable, csrc/cuda/launch.h's.
#define __shared__ thread_local
#define asm inline_PTX_belongs_in_csrc_cuda_mma_cuh

// Vector types, with the alignment that makes them one access.
#define CUDA_HOST_VECTORS(T, name)                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(float, float)
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(unsigned, uint)
#undef CUDA_HOST_VECTORS

// --- Synchronisation ------------------------------------------------------------------------------------------------

namespace cuda_host {
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
}

inline void __syncthreads(CUDA_HOST_CALLER) { cuda_host::sync_threads({file, line}); }
inline void __syncwarp(unsigned mask = cuda_host::kAllLanes, CUDA_HOST_CALLER) {
  cuda_host::sync_warp(mask, {file, line});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- Warp shuffles and votes ----------------------------------------------------------------------------------------

namespace cuda_host {

template <class T>
struct Shuffle {
  T value;
  int source;
  T result;
};

// The value of lane `source`.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2));
  Shuffle<T> record{value, source, value};
  const auto body = [](void* const* records, Site site) {
    for (int lane = 0; lane < 32; lane++) {
      if (!records[lane]) continue;
      auto& mine = *(Shuffle<T>*)records[lane];
      if (!records[mine.source])
        fail(site, "lane " + std::to_string(lane) + " shuffles from inactive lane " + std::to_string(mine.source));
      mine.result = ((Shuffle<T>*)records[mine.source])->value;
    }
  };
  warp_collective(what, mask, &record, body, site);
  return record.result;
}

// The predicates of the lanes in `mask`, as bits.
inline unsigned ballot(const char* what, unsigned mask, int predicate, Site site) {
  struct Vote {
    int predicate;
    unsigned result;
  } record{predicate, 0};
  const auto body = [](void* const* records, Site) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++)
      if (records[lane] && ((Vote*)records[lane])->predicate) bits |= 1u << lane;
    for (int lane = 0; lane < 32; lane++)
      if (records[lane]) ((Vote*)records[lane])->result = bits;
  };
  warp_collective(what, mask, &record, body, site);
  return record.result;
}

}  // namespace cuda_host

// Lanes form segments of `width`, a power of two.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_CALLER) {
  const int lane = cuda_host::lane();
  return cuda_host::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_CALLER) {
  const int lane = cuda_host::lane(), source = lane - (int)delta;
  return cuda_host::shuffle("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_CALLER) {
  const int lane = cuda_host::lane(), source = lane + (int)delta;
  return cuda_host::shuffle("__shfl_down_sync", mask, value, source >= (lane & -width) + width ? lane : source,
                            {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_HOST_CALLER) {
  const int lane = cuda_host::lane(), source = lane ^ bits;
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, source >= (lane & -width) + width ? lane : source,
                            {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_CALLER) {
  return cuda_host::ballot("__ballot_sync", mask, predicate, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_CALLER) {
  return cuda_host::ballot("__any_sync", mask, predicate, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_CALLER) {
  return cuda_host::ballot("__all_sync", mask, predicate, {file, line}) == mask;
}

// --- Atomics: each gives the value from before ----------------------------------------------------------------------

namespace cuda_host {
// CUDA has no atomics of int64_t, which is long.
template <class T, class... Types>
constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);
template <class T>
constexpr bool has_logic = is_one_of<T, int, unsigned, unsigned long long>;
template <class T>
constexpr bool has_order = has_logic<T> || std::is_same_v<T, long long>;
}  // namespace cuda_host

#define CUDA_HOST_ATOMIC(name, types, expression)                                                      \
  template <class T>                                                                                   \
  __attribute__((no_sanitize("thread"))) T name(T* p, std::common_type_t<T> value, CUDA_HOST_CALLER) { \
    static_assert(types, "CUDA has no " #name " of this type");                                        \
    cuda_host::atomic_access(p, sizeof(T), {file, line});                                              \
    const T old = *p;                                                                                  \
    *p = expression;                                                                                   \
    return old;                                                                                        \
  }
CUDA_HOST_ATOMIC(atomicAdd, (cuda_host::has_logic<T> || std::is_floating_point_v<T>), old + value)
CUDA_HOST_ATOMIC(atomicMax, cuda_host::has_order<T>, old > value ? old : value)
CUDA_HOST_ATOMIC(atomicMin, cuda_host::has_order<T>, old < value ? old : value)
CUDA_HOST_ATOMIC(atomicExch, (cuda_host::has_logic<T> || std::is_same_v<T, float>), value)
CUDA_HOST_ATOMIC(atomicOr, cuda_host::has_logic<T>, old | value)
CUDA_HOST_ATOMIC(atomicAnd, cuda_host::has_logic<T>, old& value)
#undef CUDA_HOST_ATOMIC
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value,
                                                   CUDA_HOST_CALLER) {
  static_assert(cuda_host::has_logic<T> || std::is_same_v<T, unsigned short>, "CUDA has no atomicCAS of this type");
  cuda_host::atomic_access(p, sizeof(T), {file, line});
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------

// Of floats the one that is not NaN.
template <class T>
constexpr T min(T a, T b) {
  return b < a || a != a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b || a != a ? b : a;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

namespace cuda_host {
template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
}  // namespace cuda_host
inline unsigned __float_as_uint(float x) { return cuda_host::bits_of<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_host::bits_of<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host::bits_of<float>(x); }
inline float __int_as_float(int x) { return cuda_host::bits_of<float>(x); }

// Loads and stores with hints for caches.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// --- The runtime's part ---------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) {
  static const char* const texts[] = {"no error", "invalid argument", "invalid configuration argument"};
  return texts[error];
}

using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // so that grids of a size of the device's have several blocks
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return (size_t)bytes <= cuda_host::kMostShared ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               std::common_type_t<Parameters>... arguments) {
  const auto thread = [kernel, arguments...] { kernel(arguments...); };
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > cuda_host::kMostShared) return cudaErrorInvalidValue;
  using Thread = decltype(thread);
  cuda_host::run_grid(
      grid, block, config->dynamicSmemBytes, (const void*)kernel, [](const void* context) { (*(Thread*)context)(); },
      &thread);
  return cudaSuccess;
}
