// Small kernels for the tests of the harness: most have a bug each, which it must find; the last ones are right.
#include "planted.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.cuh"

namespace {

using Kernel = void(float* out, int size);

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void barrier_of_some(float*, int) {
  if (threadIdx.x != 3) __syncthreads();
}
__global__ void barriers_of_two_branches(float*, int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();  // another one
}
__global__ void shuffle_without_a_lane(float* out, int) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void shuffle_from_an_inactive_lane(float* out, int) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFF, 1.0f, 20);
}
__global__ void shuffle_outside_its_mask(float* out, int) { out[threadIdx.x] = __shfl_sync(0xFFFF, 1.0f, 2); }
__global__ void two_shuffles_at_once(float* out, int) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_sync(kAll, 1.0f, 2);
  else
    out[threadIdx.x] = __shfl_sync(kAll, 2.0f, 2);
}
__global__ void shuffle_of_half_a_warp(float* out, int) { out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1); }

__global__ void misaligned_global(float* out, int) { ((float4*)(out + 1))[threadIdx.x] = {1, 2, 3, 4}; }
__global__ void misaligned_shared(float* out, int) {
  __shared__ __align__(16) float tile[64];
  tile[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 2) out[0] = ((const float4*)(tile + 1))->x;
}
__global__ void index_beyond_a_shared_array(float*, int) {
  __shared__ float tile[16];
  tile[threadIdx.x] = 1;
}
__global__ void row_beyond_a_shared_array(float* out, int size) {
  __shared__ float tile[4][8];
  tile[threadIdx.x / 8][threadIdx.x % 8] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[0][size / 4];  // within the array, but not within the row
}
__global__ void beyond_dynamic_shared(float*, int) { ((float*)fusetune::cuda::dynamic_shared)[threadIdx.x + 1] = 1; }
__global__ void beyond_global(float* out, int) { out[threadIdx.x + 1] = 1; }
__global__ void before_global(float* out, int) { out[(int)threadIdx.x - 1] = 1; }

__global__ void unwritten_shared(float* out, int) {
  __shared__ float tile[64];
  if (threadIdx.x != 7) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void unwritten_in_a_helper(float* out, int) {
  __shared__ float tile[64];
  const auto load = [](const float* p) __attribute__((noinline)) { return *p + 1; };
  out[threadIdx.x] = load(tile + threadIdx.x);
}
__global__ void written_by_another_block(float* out, int) {
  __shared__ float value;
  if (blockIdx.x == 0 && threadIdx.x == 0) value = 1;
  __syncthreads();
  out[threadIdx.x] = value;
}
__global__ void no_barrier_before_a_read(float* out, int) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[max((int)threadIdx.x - 1, 0)];
}
__global__ void no_barrier_before_a_write(float* out, int size) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[(threadIdx.x + 1) % size];
  tile[threadIdx.x] = 2;
}
__global__ void two_writers(float* out, int) {
  __shared__ float value;
  value = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = value;
}
__global__ void no_warp_barrier(float* out, int) {
  __shared__ float tile[32];
  tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[threadIdx.x & ~1];
}
__global__ void warp_barrier_between_warps(float* out, int) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x % 32];
}
__global__ void atomic_beside_a_write(float* out, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  atomicAdd(&count, 1);
  out[threadIdx.x] = 0;
}
__global__ void write_under_a_copy(float* out, int) {
  __shared__ __align__(16) float tile[4];
  if (threadIdx.x == 0) {
    fusetune::cuda::copy_async_16(tile, out);
    tile[1] = 2;
  }
}
__global__ void local_memory_of_another(float* out, int) {
  __shared__ const float* where;
  volatile float mine = threadIdx.x;
  if (threadIdx.x == 0) where = (const float*)&mine;
  __syncthreads();
  out[threadIdx.x] = *where;
  __syncthreads();
}

__global__ void division_by_zero(float* out, int size) { out[threadIdx.x] = threadIdx.x / (size / 128); }

// --- right ones, for what they compute ------------------------------------------------------------------------------

// out[10, size]
__global__ void shuffles_and_votes(float* out, int size) {
  const int t = threadIdx.x, lane = t % 32;
  const float value = 100 * t;
  out += t;
  out[0 * size] = __shfl_sync(kAll, value, 3);
  out[1 * size] = __shfl_sync(kAll, value, lane + 1, 8);
  out[2 * size] = __shfl_up_sync(kAll, value, 2);
  out[3 * size] = __shfl_up_sync(kAll, value, 3, 16);
  out[4 * size] = __shfl_down_sync(kAll, value, 5);
  out[5 * size] = __shfl_xor_sync(kAll, value, 17);
  out[6 * size] = __ballot_sync(kAll, lane % 3 == 0) >> 1;  // 31 bits
  out[7 * size] = __any_sync(kAll, t == 40);
  out[8 * size] = __all_sync(kAll, t < 40);
  out[9 * size] = lane < 12 ? __shfl_sync(0xFFF, value, 11) : __shfl_sync(0xFFFFF000, value, 12);
}
// out[7]: sums of each atomic over the threads
__global__ void atomics(float* out, int) {
  const int t = threadIdx.x;
  atomicAdd(out + 0, t);
  __shared__ unsigned bits, all, count;
  __shared__ int largest, least;
  if (t == 0) bits = 0, all = ~0u, count = 7, largest = 0, least = 0;
  __syncthreads();
  atomicMax(&largest, t);
  atomicMin(&least, -t);
  atomicOr(&bits, 1u << t % 5);
  atomicAnd(&all, ~(1u << t % 5));
  for (unsigned seen = 7;;) {  // count += 2
    const unsigned before = atomicCAS(&count, seen, seen + 2);
    if (before == seen) break;
    seen = before;
  }
  __syncthreads();
  if (t == 0) out[1] = largest, out[2] = least;
  if (t == 0) out[3] = bits, out[4] = all & 31, out[5] = count, out[6] = atomicExch(&count, 1u) + count;
}
// out[i] = i for a block of three dimensions
__global__ void indices(float* out, int) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * blockDim.x * blockDim.y * blockDim.z + thread;
}
// Neighbours within a warp, ordered by __syncwarp; a value of all, ordered by __syncthreads, in dynamic shared memory.
__global__ void ordered(float* out, int size) {
  float* tile = (float*)fusetune::cuda::dynamic_shared;
  for (int round = 0; round < 3; round++) {
    tile[threadIdx.x] = threadIdx.x + round;
    __syncwarp();
    const float neighbour = tile[threadIdx.x ^ 1];
    __syncthreads();
    const float first = tile[size - 1 - threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = 1000 * neighbour + first;
  }
}
// out[2, 128, size]: each number of the first half rounded to bfloat16, of the second half to float16
__global__ void roundings(float* out, int size) {
  for (int i = threadIdx.x; i < 128 * size; i += size) {
    out[i] = __bfloat162float(__float2bfloat16_rn(out[i]));
    out[128 * size + i] = __half2float(__float2half_rn(out[128 * size + i]));
  }
}
// out[4, size]: the least and the largest of neighbours, either way round
__global__ void least_and_largest(float* out, int size) {
  const int t = threadIdx.x;
  const float a = out[t], b = out[size + t];
  out[t] = min(a, b), out[size + t] = min(b, a), out[2 * size + t] = max(a, b), out[3 * size + t] = max(b, a);
}
__global__ void twenty_barriers(float* out, int) {
  for (int i = 0; i < 20; i++) __syncthreads();
  out[threadIdx.x] = 20;
}

#define KERNEL(name) {#name, name}
const std::map<std::string, Kernel*> kernels = {
    KERNEL(barrier_of_some),
    KERNEL(barriers_of_two_branches),
    KERNEL(shuffle_without_a_lane),
    KERNEL(shuffle_from_an_inactive_lane),
    KERNEL(shuffle_outside_its_mask),
    KERNEL(two_shuffles_at_once),
    KERNEL(shuffle_of_half_a_warp),
    KERNEL(misaligned_global),
    KERNEL(misaligned_shared),
    KERNEL(index_beyond_a_shared_array),
    KERNEL(row_beyond_a_shared_array),
    KERNEL(beyond_dynamic_shared),
    KERNEL(beyond_global),
    KERNEL(before_global),
    KERNEL(unwritten_shared),
    KERNEL(unwritten_in_a_helper),
    KERNEL(written_by_another_block),
    KERNEL(no_barrier_before_a_read),
    KERNEL(no_barrier_before_a_write),
    KERNEL(two_writers),
    KERNEL(no_warp_barrier),
    KERNEL(warp_barrier_between_warps),
    KERNEL(atomic_beside_a_write),
    KERNEL(write_under_a_copy),
    KERNEL(local_memory_of_another),
    KERNEL(division_by_zero),
    KERNEL(shuffles_and_votes),
    KERNEL(atomics),
    KERNEL(indices),
    KERNEL(ordered),
    KERNEL(roundings),
    KERNEL(least_and_largest),
    KERNEL(twenty_barriers),
};

}  // namespace

void planted(const std::string& name, float* out, int size) {
  using fusetune::cuda::launch_shared;
  const bool several = name == "indices";
  const dim3 blocks = several ? dim3(2, 3, 2) : dim3(name == "written_by_another_block" ? 2 : 1);
  const dim3 threads = several ? dim3(4, 3, 2) : dim3(size);
  launch_shared("planted", kernels.at(name), blocks, threads, sizeof(float) * size, nullptr, out, size);
}
