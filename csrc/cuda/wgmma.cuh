// Hopper's asynchronous instructions (sm_90a) behind names: products of a warpgroup, copies of boxes of tensors, and the
// barriers that order them. Inline PTX on the device; for the tests that run kernels on the host the same functions in
// tests/cuda_host/include/wgmma_host.h, which follow the PTX ISA. They were compiled and run there, on no device.
//
// Tiles. A copy brings boxes of rows of 64 16-bit elements, 128 bytes, to shared memory at a multiple of 1024 bytes, row
// after row, swizzled: the 16-byte piece c of row r lies in place c ^ (r % 8) (PTX ISA, "Swizzling modes"). Products
// read tiles in that layout, which has no bank conflicts in either direction. Wider matrices are several boxes.
//
// Products, D[64, N] += A[64, 16] B[16, N], by a warpgroup: four warps from a multiple of four on. Warp w holds rows
// 16 w .. 16 w + 15; with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16")
//
//   d[4 i],     d[4 i + 1]   rows g,     columns 8 i + 2 t, + 1            a[0]  [g,     2t], [g,     2t + 1]
//   d[4 i + 2], d[4 i + 3]   rows g + 8, the same columns                  a[1]  [g + 8, 2t], [g + 8, 2t + 1]
//                                                                          a[2]  [g,     2t + 8], [g,     2t + 9]
//                                                                          a[3]  [g + 8, 2t + 8], [g + 8, 2t + 9]
//
// so that sums of one product are operands a of the next. They run on after the call: between it and the wait for its
// group nobody touches d or a, nor writes what the descriptors name.
#pragma once

#include "mma.cuh"

namespace fusetune::cuda {

constexpr int kWarpgroup = 128;
constexpr int kBoxColumns = 64;  // elements of a box's rows
constexpr int kBoxRow = 128;     // their bytes
constexpr int kSwizzled = 1024;  // bytes from which on the layout repeats: what tiles are aligned to

}  // namespace fusetune::cuda

#ifdef __CUDACC__

#include <cuda.h>

namespace fusetune::cuda {

// --- Barriers in shared memory --------------------------------------------------------------------------------------
// A phase is over when as many threads have arrived as the barrier was made for, and the bytes that they announced have
// been copied; the next begins at once. Phases are told by their parity, and the first is 0.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes of copies.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over; before the first, that of parity 1 counts as over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

// Makes this thread's writes to shared memory, and its barriers, visible to copies and products that come after.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The block's numbered barriers, of which __syncthreads is 0: the last of `threads` to come lets all go on, and those
// that only arrive do not wait. Whole warps call them.
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- Copies of boxes, each by one thread ----------------------------------------------------------------------------

// Starts to bring the box at these coordinates to `shared`, zeros where it is outside of the tensor; the barrier counts
// the bytes of the whole box.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier))
      : "memory");
}

// Starts to bring a box back, but for what is outside of the tensor.
__device__ __forceinline__ void store_box(const CUtensorMap* map, int c0, int c1, int c2, int c3, const void* shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(shared))
               : "memory");
}

// Waits until the boxes that this thread stores have been read from shared memory, which may then go.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- Products -------------------------------------------------------------------------------------------------------

// Gives a warpgroup registers, or takes them; the whole warpgroup calls it.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and after registers of products have been touched.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products since the last.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups are under way.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving a use of a product's registers across this point.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// D = A B^T, or added to D: A [64, 16] and B [N, 16] from tiles, their rows those of the boxes.
template <class T, int N>
__device__ void multiply_abt(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) = delete;
// D += A B, A from registers, B [16, N] from a tile with rows of N.
template <class T, int N>
__device__ void multiply_ab(float (&d)[N / 2], const uint32_t* a, uint64_t b) = delete;

#define FUSETUNE_D8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FUSETUNE_D32 FUSETUNE_D8(0), FUSETUNE_D8(8), FUSETUNE_D8(16), FUSETUNE_D8(24)
#define FUSETUNE_D64 FUSETUNE_D32, FUSETUNE_D8(32), FUSETUNE_D8(40), FUSETUNE_D8(48), FUSETUNE_D8(56)
#define FUSETUNE_N32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FUSETUNE_N64                                                                                  \
  FUSETUNE_N32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// n, the sums' registers, and the numbers of the operands behind them.
#define FUSETUNE_PRODUCTS(T, type, n, names, sums, p0, p1, p2, p3, p4)                                          \
  template <>                                                                                                   \
  __device__ __forceinline__ void multiply_abt<T, n>(float (&d)[n / 2], uint64_t a, uint64_t b, bool add) {     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" p2                                                    \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, %" p0 ", %" p1  \
                 ", add, 1, 1, 0, 0;\n}"                                                                        \
                 : sums                                                                                         \
                 : "l"(a), "l"(b), "r"((int)add));                                                              \
  }                                                                                                             \
  template <>                                                                                                   \
  __device__ __forceinline__ void multiply_ab<T, n>(float (&d)[n / 2], const uint32_t* a, uint64_t b) {         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, {%" p0 ", %" p1 \
                 ", %" p2 ", %" p3 "}, %" p4 ", 1, 1, 1, 1;"                                                    \
                 : sums                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }
FUSETUNE_PRODUCTS(__half, "f16", 64, FUSETUNE_N32, FUSETUNE_D32, "32", "33", "34", "35", "36")
FUSETUNE_PRODUCTS(__half, "f16", 128, FUSETUNE_N64, FUSETUNE_D64, "64", "65", "66", "67", "68")
FUSETUNE_PRODUCTS(__nv_bfloat16, "bf16", 64, FUSETUNE_N32, FUSETUNE_D32, "32", "33", "34", "35", "36")
FUSETUNE_PRODUCTS(__nv_bfloat16, "bf16", 128, FUSETUNE_N64, FUSETUNE_D64, "64", "65", "66", "67", "68")
#undef FUSETUNE_PRODUCTS
#undef FUSETUNE_N64
#undef FUSETUNE_N32
#undef FUSETUNE_D64
#undef FUSETUNE_D32
#undef FUSETUNE_D8

// 2^x in the precision of the special function unit, denormal results being 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fusetune::cuda

#else
#include "wgmma_host.h"
#endif

namespace fusetune::cuda {

// The descriptor of an operand in swizzled tiles from `tile` on (PTX ISA, "Matrix Descriptor Format"): groups of eight rows
// follow one another. `box` is the distance in bytes of one box of 64 columns from the next, and matters to multiply_ab,
// whose B may have more columns.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, uint32_t box = kSwizzled) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | (uint64_t)(kSwizzled >> 4) << 32 | (uint64_t)(box >> 4) << 16 | shared_address(tile) >> 4;
}
// Of what lies `bytes` further on: 32 are 16 columns of a box, 2048 are 16 rows.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace fusetune::cuda
