// The only place that opens a parallel region: one per launcher.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "dispatch.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

// An array for the duration of a launcher.
template <class T>
struct Buffer {
  T* p;
  explicit Buffer(int64_t count) : p((T*)aligned_alloc(64, ((size_t)count * sizeof(T) + 127) / 64 * 64)) {
    if (!p) throw std::bad_alloc();
  }
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) const { return p[i]; }
};

// Work items 0 .. count-1, taken in order by whichever thread is free. An item owns what it writes, so that results
// do not depend on who takes it: put expensive items first. `body(item, scratch)`.
template <class Body>
struct Phase {
  int64_t count;
  Body body;
  int64_t next = 0;

  void run(float* scratch) {
    for (;;) {
      int64_t item;
#pragma omp atomic capture
      item = next++;
      if (item >= count) break;
      body(item, scratch);
    }
  }
};
template <class Body>
Phase(int64_t, Body) -> Phase<Body>;

// Runs the phases one after another, each finished before the next begins. Scratch is `scratch_floats` floats of the
// thread's own, 64-byte aligned, with one vector readable past the end. The team may be smaller than `threads`.
template <class... Body>
static void parallel(int threads, int64_t scratch_floats, Phase<Body>... phases) {
  const int64_t items = (0 + ... + phases.count);
  if (items == 0) return;
  if (threads > items) threads = (int)items;
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1 && !omp_in_parallel())
  {
    float* scratch = thread_scratch(scratch_floats);
    if (!scratch) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp barrier
    auto run = [&](auto& phase) {
      if (!out_of_memory) phase.run(scratch);
#pragma omp barrier
    };
    (run(phases), ...);
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
