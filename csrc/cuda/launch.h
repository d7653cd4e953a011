// How host code starts a kernel: on the caller's stream, without synchronising, and with every status checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fusetune::cuda {

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// Multiprocessors of the current device.
inline int multiprocessors(const char* op) {
  int device, count;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Shared memory whose size the launch gives.
extern __shared__ uint4 dynamic_shared[];

// Starts `kernel` with a grid of `blocks` of `threads` threads and `shared` bytes of dynamic shared memory; arguments are
// converted to the kernel's parameters.
template <class... Parameters, class... Arguments>
void launch_shared(const char* op, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared,
                   void* stream, Arguments... arguments) {
  if (shared > 48 * 1024)  // more must be asked for; a kernel's static shared arrays, had it any, would count too
    check(op, cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream,
            Arguments... arguments) {
  launch_shared(op, kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace fusetune::cuda
