// Which instruction set a launcher runs with: the best that the CPU has, unless FUSETUNE_ISA or a test says otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusetune::cpu {

// From least to most capable. "emulated" is the 16-lane code of avx512 without its instructions, built for tests.
constexpr const char* kLevels[] = {"generic", "avx2", "avx512", "avx512_bf16", "emulated"};

std::vector<std::string> isa_built();
std::vector<std::string> isa_available();  // built, and this CPU has it
std::string isa();                         // in use
void set_isa(const std::string& level);    // throws std::invalid_argument where it is not available
int level();                               // index into kLevels of the level in use

// At least `floats` floats, 64-byte aligned, kept by the calling thread for its next call; null when out of memory.
float* thread_scratch(int64_t floats);

// order[0:count]: the items by falling cost, those of equal cost in order.
void longest_first(const float* cost, int64_t count, int32_t* order);

// Declares the launcher `name` of function type `type` at every level, and the table cpu::name of its addresses in the
// order of kLevels. A level that was not built has no definition and, being weak, a null address.
#define FUSETUNE_LAUNCHER(type, name) \
  namespace generic {                 \
  type name __attribute__((weak));    \
  }                                   \
  namespace avx2 {                    \
  type name __attribute__((weak));    \
  }                                   \
  namespace avx512 {                  \
  type name __attribute__((weak));    \
  }                                   \
  namespace avx512_bf16 {             \
  type name __attribute__((weak));    \
  }                                   \
  namespace emulated {                \
  type name __attribute__((weak));    \
  }                                   \
  inline type* const name[] = {&generic::name, &avx2::name, &avx512::name, &avx512_bf16::name, &emulated::name};

}  // namespace fusetune::cpu
