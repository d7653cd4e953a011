#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "../adamw.h"

namespace fusetune::cpu {

namespace {

// The compiler's check includes whether the operating system saves the wider registers.
bool cpu_has(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool has[] = {true, avx2, avx512, bf16, avx2};
  return has[level];
#else
  return level == 0;
#endif
}

bool built(int level) { return adamw_step[level] != nullptr; }

int best() {
  int best = 0;
  for (int i = 0; i < 4; i++)
    if (built(i) && cpu_has(i)) best = i;
  return best;
}

int& current() {
  static int level = best();
  return level;
}

struct Scratch {
  void* p = nullptr;
  size_t bytes = 0;
  ~Scratch() { free(p); }
};

}  // namespace

std::vector<std::string> isa_built() {
  std::vector<std::string> names;
  for (int i = 0; i < int(std::size(kLevels)); i++)
    if (built(i)) names.push_back(kLevels[i]);
  return names;
}

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (int i = 0; i < int(std::size(kLevels)); i++)
    if (built(i) && cpu_has(i)) names.push_back(kLevels[i]);
  return names;
}

std::string isa() { return kLevels[current()]; }

void set_isa(const std::string& name) {
  for (int i = 0; i < int(std::size(kLevels)); i++)
    if (name == kLevels[i] && built(i) && cpu_has(i)) {
      current() = i;
      return;
    }
  std::string available;
  for (const auto& level : isa_available()) available += (available.empty() ? "" : ", ") + level;
  throw std::invalid_argument("FUSETUNE_ISA: must be one of " + available + " on this CPU, got " + name);
}

int level() { return current(); }

float* thread_scratch(int64_t floats) {
  thread_local Scratch mine;
  size_t bytes = (size_t(floats) * 4 + 64 + 4095) / 4096 * 4096;
  if (bytes > mine.bytes) {
    free(mine.p);
    mine.p = aligned_alloc(4096, bytes);
    mine.bytes = mine.p ? bytes : 0;
  }
  return static_cast<float*>(mine.p);
}

void longest_first(const float* cost, int64_t count, int32_t* order) {
  std::iota(order, order + count, 0);
  std::stable_sort(order, order + count, [cost](int32_t a, int32_t b) { return cost[a] > cost[b]; });
}

}  // namespace fusetune::cpu
