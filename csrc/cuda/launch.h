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

// Starts `kernel` with a grid of `blocks` of `threads` threads; arguments are converted to the kernel's parameters.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace fusetune::cuda
