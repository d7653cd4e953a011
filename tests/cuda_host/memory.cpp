// Checks what the threads of a block read and write. Kernels are compiled with -fsanitize=thread,alignment,bounds,
// integer-divide-by-zero: the functions that the compiler calls at each access and where a check fails, __tsan_* and
// __ubsan_*, are at the end.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "include/cuda_runtime.h"

namespace fusetune::cuda {
alignas(1024) thread_local uint4 dynamic_shared[cuda_host::kMostShared / sizeof(uint4)];  // launch.h declares it
}

namespace cuda_host {
namespace {

struct Range {
  uintptr_t begin = 0, end = 0;
  bool has(uintptr_t p) const { return p - begin < end - begin; }
};

// Who accessed a byte: a thread, plainly or by an atomic; several threads by atomics; several that read, of one warp or
// not; a cp.async.
enum Kind : uint8_t { kThread, kAtomic, kAtomics, kReadersOfWarp, kReaders, kCopy };
struct Who {
  Kind kind;
  uint16_t number;  // of the thread or warp
  bool is(int thread) const { return (kind == kThread || kind == kAtomic) && number == thread; }
};

// The last accesses to one byte of shared memory. Times are of `now`.
struct Cell {
  uint32_t written = 0, read = 0;
  Who writer, reader;
};
// And where they were: apart, because they are seldom looked at.
struct Sites {
  Site write, read;
};

bool instrumented = false;  // the kernels were compiled with the checks
bool checked = false;
uint32_t now = 1, block_start, last_barrier, last_warp_barrier[kMostThreads / kWarp];

Range shared;  // the module's thread-local variables, which its shared variables are
Range image;   // its code and constants
Range parameters;
size_t dynamic_bytes;
std::vector<Cell> cells;  // of `shared`
std::vector<Sites> sites;

struct Allowed {
  uintptr_t end;
  uint64_t storage;  // that a tensor views
};
std::map<uintptr_t, Allowed> allowed;  // by begin
Range last_allowed;

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes, group;
};
struct Copies {
  std::vector<Copy> started;
  int groups = 0;  // committed
} copies[kMostThreads];

int find_module(dl_phdr_info* info, size_t, void* inside) {
  Range found;
  const dl_phdr_info& module = *info;
  for (int i = 0; i < module.dlpi_phnum; i++) {
    const auto& segment = module.dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t begin = module.dlpi_addr + segment.p_vaddr;
    found.begin = found.end ? std::min(found.begin, begin) : begin;
    found.end = std::max(found.end, begin + segment.p_memsz);
  }
  if (!found.has((uintptr_t)inside)) return 0;
  image = found;
  for (int i = 0; i < module.dlpi_phnum; i++)
    if (module.dlpi_phdr[i].p_type == PT_TLS)
      shared = {(uintptr_t)module.dlpi_tls_data, (uintptr_t)module.dlpi_tls_data + module.dlpi_phdr[i].p_memsz};
  return 1;
}

bool ordered(uint32_t time, Who who) {
  if (time < last_barrier) return true;
  const int warp = thread_number() / kWarp;
  const bool same_warp = who.kind == kThread || who.kind == kAtomic ? who.number / kWarp == warp
                                                                    : who.kind == kReadersOfWarp && who.number == warp;
  return same_warp && time < last_warp_barrier[warp];
}

std::string name_of(Who who) {
  if (who.kind == kThread || who.kind == kAtomic) return thread_name(who.number);
  return "several threads";
}

enum Access { kRead, kWrite, kAtomicUpdate, kStartCopy, kEndCopy };

std::string name_of(Access access, size_t bytes) {
  static const char* const names[] = {"read", "write", "atomic", "cp.async", "cp.async"};
  return std::string(names[access]) + " of " + std::to_string(bytes) + " bytes";
}

// Of a byte of shared memory.
std::string name_of(uintptr_t p) {
  const uintptr_t offset = p - (uintptr_t)fusetune::cuda::dynamic_shared;
  return offset < kMostShared ? "byte " + std::to_string(offset) + " of dynamic shared memory" : "shared memory";
}

void access_shared(uintptr_t p, size_t bytes, Access access, Site site) {
  const uintptr_t offset = p - (uintptr_t)fusetune::cuda::dynamic_shared;
  if (p + bytes > shared.end || (offset < kMostShared && offset + bytes > dynamic_bytes))
    fail(site, name_of(access, bytes) + " out of bounds: " + name_of(p) + ", of which there are " +
                   std::to_string(dynamic_bytes));
  const int self = thread_number();
  for (const uintptr_t end = p + bytes; p < end; p++) {
    Cell& cell = cells[p - shared.begin];
    // Most reads: of what was written before the last barrier, again by the same thread or one of several.
    const bool read_alike = cell.reader.kind == kReaders || cell.reader.is(self) ||
                            (cell.reader.kind == kReadersOfWarp && cell.reader.number == self / kWarp);
    if (access == kRead && cell.read == now && read_alike && cell.written >= block_start &&
        cell.written < last_barrier && cell.writer.kind != kCopy)
      continue;
    Sites& site_of_last = sites[p - shared.begin];
    const bool written = cell.written >= block_start, read = cell.read >= block_start;
    const bool was_atomic = cell.writer.kind == kAtomic || cell.writer.kind == kAtomics;
    const auto race = [&](Who who, const char* did, Site where) {
      fail(site, "race: " + name_of(access, bytes) + " at " + name_of(p) + ", which " + name_of(who) + did +
                     " with no barrier between, at " + name_of(where));
    };

    if (!written && (access == kRead || access == kAtomicUpdate))
      fail(site, name_of(access, bytes) + ": nobody has written " + name_of(p) + " yet");
    const bool copying = written && cell.writer.kind == kCopy;
    if (copying && access != kEndCopy)
      fail(site, name_of(access, bytes) + ": a cp.async to " + name_of(p) + " was not waited for, that of " +
                     name_of(site_of_last.write));
    const bool ours = !written || copying || cell.writer.is(self) || ordered(cell.written, cell.writer);
    if (!ours && !(access == kAtomicUpdate && was_atomic)) race(cell.writer, " wrote", site_of_last.write);
    const bool only_reader = !read || cell.reader.is(self) || ordered(cell.read, cell.reader);
    if (access != kRead && !only_reader) race(cell.reader, " read", site_of_last.read);

    if (access == kRead) {
      const int warp = self / kWarp;
      if (only_reader) {
        cell.reader = {kThread, (uint16_t)self};
      } else {
        const bool same_warp = cell.reader.kind == kThread
                                   ? cell.reader.number / kWarp == warp
                                   : cell.reader.kind == kReadersOfWarp && cell.reader.number == warp;
        cell.reader = {same_warp ? kReadersOfWarp : kReaders, (uint16_t)warp};
      }
      cell.read = now;
      site_of_last.read = site;
    } else {
      // A plain write of this thread since the last barrier still counts after its atomic.
      const bool plain = written && cell.writer.kind == kThread && !ordered(cell.written, cell.writer);
      const Kind atomic = !ours ? kAtomics : plain ? kThread : kAtomic;
      cell.writer = {access == kStartCopy ? kCopy : access == kAtomicUpdate ? atomic : kThread, (uint16_t)self};
      cell.written = now;
      site_of_last.write = site;
    }
  }
}

void access_global(uintptr_t p, size_t bytes, Access access, Site site) {
  if (allowed.empty() || (p >= last_allowed.begin && p + bytes <= last_allowed.end)) return;
  const auto above = allowed.upper_bound(p);
  const bool lowest = above == allowed.begin();
  const Range below = lowest ? Range{} : Range{std::prev(above)->first, std::prev(above)->second.end};
  if (!lowest && p + bytes <= below.end) {
    last_allowed = below;
    return;
  }
  // It is told of the nearer tensor.
  const bool before = lowest || (above != allowed.end() && p > below.end && above->first - p < p - below.end);
  const std::string where =
      before ? std::to_string(above->first - p) + " bytes before a tensor of " +
                   std::to_string(above->second.end - above->first)
             : std::to_string(p - below.begin) + " bytes into a tensor of " + std::to_string(below.end - below.begin);
  fail(site, name_of(access, bytes) + " out of bounds: " + where);
}

void access_memory(const void* address, size_t bytes, Access access, Site site) {
  if (!instrumented) return;
  const uintptr_t p = (uintptr_t)address;
  if (shared.has(p)) return access_shared(p, bytes, access, site);
  if (parameters.has(p)) return;
  if (in_stacks(p)) fail(site, name_of(access, bytes) + " in the local memory of another thread");
  access_global(p, bytes, access, site);
}

[[noreturn]] void misaligned(const char* what, int bytes, int past, Site site) {
  fail(site, std::string("misaligned: ") + what + " that needs a multiple of " + std::to_string(bytes) + " bytes, " +
                 std::to_string(past) + " past one");
}

void check_multiple(const void* p, int bytes, const char* what, Site site) {
  if (const int past = (int)((uintptr_t)p % bytes)) misaligned(what, bytes, past, site);
}

}  // namespace

void allow(const void* begin, size_t bytes, uint64_t storage) {
  const Range asked{(uintptr_t)begin, (uintptr_t)begin + bytes};
  Range range = asked;
  auto next = allowed.lower_bound(asked.begin);
  if (next != allowed.begin() && std::prev(next)->second.end > asked.begin) --next;
  while (next != allowed.end() && next->first < asked.end) {
    if (next->second.storage == storage)
      range = {std::min(range.begin, next->first), std::max(range.end, next->second.end)};
    next = allowed.erase(next);
  }
  allowed[range.begin] = {range.end, storage};
  last_allowed = {};
}

void forget_allowed() {
  allowed.clear();
  last_allowed = {};
}

void atomic_access(const void* p, size_t bytes, Site site) {
  const Unchecked unchecked;
  check_multiple(p, (int)bytes, "an atomic", site);
  access_memory(p, bytes, kAtomicUpdate, site);
}

void lane_read(int lane, void* to, const void* p, int bytes, Site site) {
  act_as_lane(lane);
  check_multiple(p, bytes, "a read", site);
  if (!shared.has((uintptr_t)p)) fail(site, "read of what is not in shared memory");
  access_memory(p, bytes, kRead, site);
  act_as_lane(-1);
  memcpy(to, p, bytes);
}

void copy_async(void* to, const void* from, int bytes, int source_bytes, Site site) {
  const Unchecked unchecked;
  check_multiple(to, bytes, "cp.async", site);
  check_multiple(from, bytes, "cp.async", site);
  if (!shared.has((uintptr_t)to)) fail(site, "cp.async to what is not in shared memory");
  if (source_bytes < 0 || source_bytes > bytes)
    fail(site, "cp.async of " + std::to_string(bytes) + " bytes reads " + std::to_string(source_bytes));
  access_memory(to, bytes, kStartCopy, site);
  if (source_bytes) access_memory(from, source_bytes, kRead, site);
  Copies& mine = copies[thread_number()];
  mine.started.push_back({to, from, bytes, source_bytes, mine.groups});
}

void copy_async_commit() { copies[thread_number()].groups++; }

void copy_async_wait(int groups_left, Site site) {
  const Unchecked unchecked;
  Copies& mine = copies[thread_number()];
  size_t done = 0;
  for (; done < mine.started.size() && mine.started[done].group < mine.groups - groups_left; done++) {
    const Copy& copy = mine.started[done];
    access_memory(copy.to, copy.bytes, kEndCopy, site);
    memcpy(copy.to, copy.from, copy.source_bytes);
    memset((char*)copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  mine.started.erase(mine.started.begin(), mine.started.begin() + done);
}

Write last_write(const void* p) {
  const Cell& cell = cells[(uintptr_t)p - shared.begin];
  return cell.written >= block_start ? Write{cell.written, cell.writer.number} : Write{0, 0};
}
void check_global(const void* p, size_t bytes, bool write, Site site) {
  access_memory(p, bytes, write ? kWrite : kRead, site);
}
uint32_t time_passes() { return now++; }
bool before_barrier(uint32_t time) { return time < last_barrier; }
uint32_t time_of_block() { return block_start; }
size_t dynamic_shared_size() { return dynamic_bytes; }

void prepare_memory() {
  fusetune::cuda::dynamic_shared[0] = {};  // gives this OS thread its copy
  if (shared.has((uintptr_t)fusetune::cuda::dynamic_shared)) return;
  dl_iterate_phdr(find_module, (void*)prepare_memory);
  cells.resize(shared.end - shared.begin);
  sites.resize(cells.size());
}

void begin_block(size_t dynamic_shared_bytes, const void* kernel_parameters) {
  dynamic_bytes = dynamic_shared_bytes;
  parameters = {(uintptr_t)kernel_parameters, (uintptr_t)kernel_parameters + 4096};
  block_start = last_barrier = ++now;
  for (Copies& of_thread : copies) of_thread = {};
}

void barrier_passed() { last_barrier = ++now; }
void warp_barrier_passed(int warp) { last_warp_barrier[warp] = ++now; }
void check_accesses(bool on) { checked = on; }

}  // namespace cuda_host

using namespace cuda_host;

// The kernel's code that calls one of these functions.
#define CALLER Site{__builtin_return_address(0), 0}

static inline void accessed(const void* p, size_t bytes, Access access, Site site) {
  // Most accesses: to local memory, and to counters of lines executed.
  if ((uintptr_t)p - own_stack < kStack || image.has((uintptr_t)p) || !checked) return;
  const Unchecked unchecked;
  access_memory(p, bytes, access, site);
}

extern "C" {

void __tsan_init() { instrumented = true; }  // called as an object that was compiled so is loaded
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESSES(bytes)                                                   \
  void __tsan_read##bytes(void* p) { accessed(p, bytes, kRead, CALLER); } \
  void __tsan_write##bytes(void* p) { accessed(p, bytes, kWrite, CALLER); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { accessed(p, bytes, kRead, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { accessed(p, bytes, kWrite, CALLER); }

// The beginnings of the records that describe a check.
struct SourceLine {
  const char* file;
  uint32_t line, column;
};
struct AlignmentCheck {
  SourceLine at;
  const void* type;
  unsigned char log_alignment;
};
// Host code is not checked.
void __ubsan_handle_type_mismatch_v1(AlignmentCheck* check, uintptr_t p) {
  if (!checked) return;
  const Unchecked unchecked;
  const int bytes = 1 << check->log_alignment;
  misaligned("an access", bytes, (int)(p % bytes), {check->at.file, (int)check->at.line});
}
void __ubsan_handle_out_of_bounds(SourceLine* at, uintptr_t index) {
  if (!checked) return;
  const Unchecked unchecked;
  fail({at->file, (int)at->line}, "out of bounds: index " + std::to_string((int)index));
}
void __ubsan_handle_divrem_overflow(SourceLine* at, uintptr_t, uintptr_t) {
  if (!checked) return;
  const Unchecked unchecked;
  fail({at->file, (int)at->line}, "division by zero");
}
}
