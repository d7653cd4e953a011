// Storage types that cross the seam. Python sends the code; all arithmetic is float32.
#pragma once

#ifdef __CUDACC__
#define FUSETUNE_HOST_DEVICE __host__ __device__
#else
#define FUSETUNE_HOST_DEVICE
#endif

namespace fusetune {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace fusetune
