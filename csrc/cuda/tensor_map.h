// Host code that describes a tensor to the copies of boxes in wgmma.cuh.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace fusetune::cuda {

// [d3, d2, d1, d0] 16-bit elements, neighbours in the last dimension; `strides` in elements of d1, d2, d3.
struct Tensor16 {
  const void* p;
  int64_t sizes[4];    // d0, d1, d2, d3
  int64_t strides[3];  // each a multiple of 8 where its size is not 1; p is a multiple of 16 bytes
  bool bfloat16;
};

// For boxes [1, 1, rows, 64] with 128-byte swizzle. The function is the driver's, asked for at run time: the extension is
// not linked with the driver.
inline CUtensorMap tensor_map(const char* op, const Tensor16& t, uint32_t rows) {
  using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                          const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                          CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  check(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
#else
  check(op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
  if (!found) throw std::runtime_error(std::string(op) + ": the CUDA driver lacks cuTensorMapEncodeTiled");

  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; i++) sizes[i] = (cuuint64_t)t.sizes[i];
  // That of a dimension of size 1 is never taken, but checked.
  for (int i = 0; i < 3; i++) strides[i] = 2 * (cuuint64_t)(t.sizes[i + 1] == 1 ? t.sizes[0] : t.strides[i]);
  const cuuint32_t box[4] = {64, rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = ((Encode*)found)(
      &map, t.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(t.p),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

}  // namespace fusetune::cuda
