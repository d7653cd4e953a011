// Tensor-core, copy and exponential instructions of sm_80 and later behind names: inline PTX on the device, and for the tests that
// run kernels on the host the same functions in tests/cuda_host/include/mma_host.h.
//
// How the lanes of a warp hold matrices (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix
// Fragments for mma.m16n8k8" and "Warp-level matrix load instruction: ldmatrix"). With g = lane / 4 and t = lane % 4, a
// register holds these elements, [row, column], the first in the low half:
//
//   m16n8k16, fp16 and bf16                  m16n8k8, tf32
//   A  16 x 16  a[0]  [g,     2t], [g,     2t + 1]    16 x 8  a[0]  [g,     t]
//               a[1]  [g + 8, 2t], [g + 8, 2t + 1]            a[1]  [g + 8, t]
//               a[2]  [g,     2t + 8], [g,     2t + 9]        a[2]  [g,     t + 4]
//               a[3]  [g + 8, 2t + 8], [g + 8, 2t + 9]        a[3]  [g + 8, t + 4]
//   B  16 x 8   b0    [2t,     g], [2t + 1, g]        8 x 8   b0    [t,     g]
//               b1    [2t + 8, g], [2t + 9, g]                b1    [t + 4, g]
//   D  16 x 8   d[0]  [g,     2t]                     16 x 8  as for m16n8k16
//               d[1]  [g,     2t + 1]
//               d[2]  [g + 8, 2t]
//               d[3]  [g + 8, 2t + 1]
//
//   ldmatrix, 8 x 8 matrices of 16-bit elements: lane 8i + r gives the address of row r of matrix i, and register i of
//   a lane becomes [g, 2t], [g, 2t + 1] of matrix i; with .trans [2t, g], [2t + 1, g]. Plain loads thus suit A stored
//   as [m, k] and B stored as [n, k]; .trans suits A stored as [k, m] and B stored as [k, n].
//
// ldmatrix and mma are for whole warps: every lane must reach the same call.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__

namespace fusetune::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}

// Two or four 8 x 8 matrices from shared memory. row: a multiple of 16 bytes, of lanes 0-15 (x2, which ignores those of
// the other lanes) or of all lanes (x4).
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// D += A B for T = __half or __nv_bfloat16, with float accumulators. Volatile, as the next, because it is for the whole
// warp: the compiler must not move it into a branch.
template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) = delete;

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D += A B of tf32 operands: the bits of floats, whose low 13 are ignored. to_tf32 rounds; without it they are cut off.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To 10 bits of mantissa: to nearest, halves away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Starts a copy of 16 bytes from global to shared memory past the first-level cache: source_bytes of them are read, the
// rest becomes zero. Both addresses are 16-byte aligned, and `global` is a valid one even where nothing is read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
               : "memory");
}

// The same of 8 bytes, through that cache.
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, int source_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's last groups are under way. Other threads see the rest after a barrier.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 2^x to 2^-22 of it; 0 for -inf and where it would be subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fusetune::cuda

#else
#include "mma_host.h"
#endif
