// csrc/cuda/wgmma.cuh on the host; what each does is in tests/cuda_host/sm90/hopper.cpp.
#pragma once

#include "cuda.h"

namespace cuda_host::hopper {

uint32_t shared_address(const void* shared);
void barrier_init(uint64_t* barrier, uint32_t arrivals, Site site);
void barrier_arrive(uint64_t* barrier, uint32_t bytes, Site site);
void barrier_wait(uint64_t* barrier, uint32_t parity, Site site);
void fence_async();
void named_barrier(int number, int threads, bool wait, Site site);
void load_box(void* shared, const CUtensorMap* map, const int (&at)[4], uint64_t* barrier, Site site);
void store_box(const CUtensorMap* map, const int (&at)[4], const void* shared, Site site);
void wait_stores_read();
void set_registers(int registers, Site site);
void products_fence(Site site);
void products_commit(Site site);
void products_wait(int pending, Site site);

// What a thread gives to a product.
struct Product {
  float* d;           // n / 2 registers
  const uint32_t* a;  // 4 registers, or null:
  uint64_t a_tile, b_tile;
  int n;
  bool bfloat16, add, b_by_columns;
};
void multiply(const Product& product, Site site);

}  // namespace cuda_host::hopper

namespace fusetune::cuda {

namespace hopper = cuda_host::hopper;

inline uint32_t shared_address(const void* shared) { return hopper::shared_address(shared); }

inline void barrier_init(uint64_t* barrier, uint32_t arrivals, CUDA_HOST_CALLER) {
  hopper::barrier_init(barrier, arrivals, {file, line});
}
inline void barrier_arrive(uint64_t* barrier, CUDA_HOST_CALLER) { hopper::barrier_arrive(barrier, 0, {file, line}); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes, CUDA_HOST_CALLER) {
  hopper::barrier_arrive(barrier, bytes, {file, line});
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, CUDA_HOST_CALLER) {
  hopper::barrier_wait(barrier, parity, {file, line});
}
inline void fence_async() { hopper::fence_async(); }
inline void named_barrier_sync(int number, int threads, CUDA_HOST_CALLER) {
  hopper::named_barrier(number, threads, true, {file, line});
}
inline void named_barrier_arrive(int number, int threads, CUDA_HOST_CALLER) {
  hopper::named_barrier(number, threads, false, {file, line});
}

inline void load_box(void* shared, const CUtensorMap* map, int c0, int c1, int c2, int c3, uint64_t* barrier,
                     CUDA_HOST_CALLER) {
  hopper::load_box(shared, map, {c0, c1, c2, c3}, barrier, {file, line});
}
inline void store_box(const CUtensorMap* map, int c0, int c1, int c2, int c3, const void* shared, CUDA_HOST_CALLER) {
  hopper::store_box(map, {c0, c1, c2, c3}, shared, {file, line});
}
inline void wait_stores_read() { hopper::wait_stores_read(); }

template <int kRegisters>
void more_registers(CUDA_HOST_CALLER) {
  hopper::set_registers(kRegisters, {file, line});
}
template <int kRegisters>
void fewer_registers(CUDA_HOST_CALLER) {
  hopper::set_registers(kRegisters, {file, line});
}
inline void products_fence(CUDA_HOST_CALLER) { hopper::products_fence({file, line}); }
inline void products_commit(CUDA_HOST_CALLER) { hopper::products_commit({file, line}); }
template <int pending>
void products_wait(CUDA_HOST_CALLER) {
  hopper::products_wait(pending, {file, line});
}
template <int kCount>
void hold(float (&)[kCount]) {}

template <class T, int N>
void multiply_abt(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, CUDA_HOST_CALLER) {
  hopper::multiply({d, nullptr, a, b, N, std::is_same_v<T, __nv_bfloat16>, add, false}, {file, line});
}
template <class T, int N>
void multiply_ab(float (&d)[N / 2], const uint32_t* a, uint64_t b, CUDA_HOST_CALLER) {
  hopper::multiply({d, a, 0, b, N, std::is_same_v<T, __nv_bfloat16>, true, true}, {file, line});
}

inline float exp2_fast(float x) { return exp2f(x); }

}  // namespace fusetune::cuda
