// What the threads of a block compute together.
#pragma once

#include <cuda_runtime.h>

namespace fusetune::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The sum of `value` over this thread and those before it; the last thread's is the block's total. Every thread of the
// block calls it, which has one dimension and whole warps, and `totals` has room for one value a warp. Where it is called
// again with the same `totals`, or they are read elsewhere, a barrier comes between.
template <class T>
__device__ T block_prefix_sum(T value, T* totals) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == kWarpSize - 1) totals[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; w++) value += totals[w];
  return value;
}

}  // namespace fusetune::cuda
