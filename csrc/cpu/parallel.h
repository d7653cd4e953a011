// The only place that opens a parallel region: one per launcher.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
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

// Work items 0 .. count-1, of which thread t of T first takes those from first_of(t, T) on, in order, so that a thread
// meets the same memory in call after call, and then what the next threads have left. An item owns what it writes.
template <class FirstOf, class Body>
struct Shares {
  int64_t count;
  FirstOf first_of;  // first_of(0, T) is 0, first_of(T, T) is count
  Body body;
  static constexpr int kApart = 8;  // counters, one a thread, in cache lines of their own
  const Buffer<int64_t> taken;

  Shares(int threads, int64_t count, FirstOf first_of, Body body)
      : count(count), first_of(first_of), body(body), taken(threads * kApart) {
    memset(taken.p, 0, threads * kApart * sizeof(int64_t));
  }
  void run(float* scratch) {
    const int threads = omp_get_num_threads(), mine = omp_get_thread_num();
    for (int i = 0; i < threads; i++) {
      const int share = (mine + i) % threads;
      const int64_t begin = first_of(share, threads), end = first_of(share + 1, threads);
      for (;;) {
        int64_t item;
        int64_t& next = taken[share * kApart];
#pragma omp atomic capture
        item = next++;
        if (begin + item >= end) break;
        body(begin + item, scratch);
      }
    }
  }
};

// Runs the phases one after another, each finished before the next begins. Scratch is `scratch_floats` floats of the
// thread's own, 64-byte aligned, with one vector readable past the end. The team may be smaller than `threads`.
template <class... Phases>
static void parallel(int threads, int64_t scratch_floats, Phases&&... phases) {
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
