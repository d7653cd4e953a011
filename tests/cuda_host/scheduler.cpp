// Runs a grid: its blocks one after another, the threads of a block as fibers, which switch where they wait.
#undef _FORTIFY_SOURCE  // some distributions set it, and its longjmp takes another stack for a corrupted one
#include <dlfcn.h>
#include <execinfo.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

uintptr_t own_stack;

namespace {

constexpr size_t kGuard = 4096;  // below each stack

enum State { kReady, kAtBarrier, kInWarp, kPolling, kReturned };

struct Fiber {
  jmp_buf context;
  bool started = false;
  uint3 index;
  State state;
  const char* what;            // where it waits: the primitive,
  Site site;                   // its line,
  unsigned mask;               // the lanes that it waits for,
  void* record;                // and the record that it left
  bool (*ready)(const void*);  // what it polls, with the record
};

Fiber fibers[kMostThreads];
char* stacks;     // [kMostThreads, kStack]
int threads = 0;  // of a block,
int at_barrier;   // and how many of them wait in __syncthreads
int current;      // number of the thread that runs
bool reversed = false;
jmp_buf scheduler;
void (*body)(const void*);
const void* body_context;

std::string failure;  // empty: none

// Back to the scheduler, until it resumes this thread. _setjmp and _longjmp leave signals alone, which swapcontext would
// ask the kernel about.
void leave() {
  if (!_setjmp(fibers[current].context)) _longjmp(scheduler, 1);
}

void run_thread_of_each_block() {
  for (;;) {
    check_accesses(true);
    body(body_context);
    check_accesses(false);
    fibers[current].state = kReturned;
    leave();
  }
}

void resume(int number) {
  current = number;
  Fiber& fiber = fibers[number];
  threadIdx = fiber.index;
  own_stack = (uintptr_t)stacks + number * kStack;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stacks + number * kStack + kGuard;
  start.uc_stack.ss_size = kStack - kGuard;
  start.uc_link = nullptr;
  makecontext(&start, run_thread_of_each_block, 0);
  setcontext(&start);
}

void prepare() {
  prepare_memory();
  if (stacks) return;
  void* memory =
      mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("cuda_host: no memory for the stacks of threads");
  stacks = (char*)memory;
  for (int i = 0; i < kMostThreads; i++) mprotect(stacks + i * kStack, kGuard, PROT_NONE);
}

// The lines that addr2line writes, with these options, of addresses in the code of this module; others are left out.
std::vector<std::string> look_up(const std::vector<const char*>& code, const std::string& options) {
  Dl_info self, module;
  dladdr((const void*)look_up, &self);
  std::string command = "addr2line " + options + " -e '" + self.dli_fname + "'";
  for (const char* address : code) {
    if (!dladdr(address, &module) || module.dli_fbase != self.dli_fbase) continue;
    char offset[32];
    snprintf(offset, sizeof offset, " %#tx", address - (const char*)module.dli_fbase);
    command += offset;
  }
  std::vector<std::string> lines;
  if (FILE* out = popen(command.c_str(), "r")) {
    for (char line[4096]; fgets(line, sizeof line, out);) lines.emplace_back(line, strcspn(line, "\n"));
    pclose(out);
  }
  return lines;
}

// `down<float, 16>` of `void fusetune::cuda::(anonymous namespace)::down<float, 16>(...)`
std::string name_of_kernel(const void* kernel) {
  const auto lines = look_up({(const char*)kernel}, "-f -C");
  std::string name = lines.empty() ? "?" : lines[0];
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  name = name.substr(0, name.find('('));
  const size_t scope = name.substr(0, name.find('<')).find_last_of(": ");
  return scope == std::string::npos ? name : name.substr(scope + 1);
}

std::string name_of(uint3 index) {
  char text[64];
  snprintf(text, sizeof text, "(%u, %u, %u)", index.x, index.y, index.z);
  return text;
}

std::string doing(int number) {
  const Fiber& f = fibers[number];
  return thread_name(number) +
         (f.state == kReturned ? " has returned" : std::string(" is in ") + f.what + " at " + name_of(f.site));
}

// Whether both wait for the same thing.
bool wait_alike(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.line == b.site.line && a.site.file == b.site.file && !strcmp(a.what, b.what) &&
         (a.state != kInWarp || a.mask == b.mask);
}

void arrive(State state, const char* what, Site site) {
  Fiber& f = fibers[current];
  f.state = state;
  f.what = what;
  f.site = site;
}

// No thread can go on, and not all have returned.
void report_deadlock() {
  current = 0;
  while (fibers[current].state == kReturned) current++;
  const Fiber& waiting = fibers[current];
  if (waiting.state == kPolling) {
    failure = name_of(waiting.site) + ": " + waiting.what + " waits for ever";
    return;
  }
  int first = 0, count = threads;
  if (waiting.state == kInWarp) first = current / kWarp * kWarp, count = kWarp;
  int there = 0, missing = -1;
  for (int i = 0; i < count; i++) {
    if (waiting.state == kInWarp && !(waiting.mask >> i & 1)) continue;
    if (first + i < threads && wait_alike(waiting, fibers[first + i]))
      there++;
    else if (missing < 0)
      missing = first + i;
  }
  failure = name_of(waiting.site) + ": " + waiting.what + " is reached by " + std::to_string(there) +
            (there == 1 ? " thread, but " : " threads, but ") +
            (missing < threads ? doing(missing) : "its mask names lanes that the block does not have");
}

void run_block() {
  at_barrier = 0;
  for (int i = 0; i < threads; i++) fibers[i].state = kReady;
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < threads; i++) {
      const int number = reversed ? threads - 1 - i : i;
      Fiber& f = fibers[number];
      if (f.state == kPolling && f.ready(f.record)) f.state = kReady;
      if (f.state != kReady) continue;
      any = true;
      resume(number);
      if (!failure.empty()) return;
    }
  }
  for (int i = 0; i < threads; i++)
    if (fibers[i].state != kReturned) return report_deadlock();
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const void* kernel, void (*thread)(const void*),
              const void* context) {
  prepare();
  gridDim = grid;
  blockDim = block;
  body = thread;
  body_context = context;
  threads = (int)(block.x * block.y * block.z);
  for (unsigned i = 0; i < (unsigned)threads; i++)
    fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t b = reversed ? blocks - 1 - i : i;
    blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
    begin_block(dynamic_shared_bytes, context);
    run_block();
    check_accesses(false);
    if (failure.empty()) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // their stacks are abandoned
    const std::string message =
        failure + "; " + name_of_kernel(kernel) + ", block " + name_of(blockIdx) + ", " + thread_name(current);
    failure.clear();
    throw std::runtime_error(message);
  }
}

void reverse_order(bool value) { reversed = value; }

int thread_number() { return current; }

std::string thread_name(int number) { return "thread " + name_of(fibers[number].index); }

std::string name_of(Site site) {
  if (site.line) {
    const std::string file = (const char*)site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
  }
  const auto lines = look_up({(const char*)site.file - 1}, "-s");  // the call, not what follows it
  return lines.empty() ? "?" : lines[0].substr(0, lines[0].find(' '));
}

// The line of the kernel that the present thread is in: the outermost in a .cu file of its calls, inlined ones included.
std::string line_of_kernel() {
  void* returns[64];
  std::vector<const char*> calls;
  for (int i = 0, count = backtrace(returns, 64); i < count; i++) calls.push_back((const char*)returns[i] - 1);
  std::string found;
  for (const std::string& line : look_up(calls, "-i -s"))
    if (line.find(".cu:") != std::string::npos) found = line.substr(0, line.find(' '));
  return found;
}

void fail(Site site, const std::string& what) {
  const std::string line = name_of(site), of_kernel = line_of_kernel();
  failure = line + ": " + what + (of_kernel.empty() || of_kernel == line ? "" : "; called from " + of_kernel);
  _longjmp(scheduler, 1);
}

bool in_stacks(uintptr_t p) { return p - (uintptr_t)stacks < kMostThreads * kStack; }

void act_as_lane(int lane) {
  static int self;
  if (lane >= 0) self = current;
  current = lane >= 0 ? current / kWarp * kWarp + lane : self;
}

void sync_threads(Site site) {
  const Unchecked unchecked;
  arrive(kAtBarrier, "__syncthreads", site);
  if (++at_barrier < threads) return leave();
  for (int i = 0; i < threads; i++)
    if (!wait_alike(fibers[current], fibers[i])) fail(site, "__syncthreads meets another: " + doing(i));
  for (int i = 0; i < threads; i++) fibers[i].state = kReady;
  at_barrier = 0;
  barrier_passed();
}

void warp_collective(const char* what, unsigned mask, void* record, void (*run)(void* const*, Site), Site site) {
  const Unchecked unchecked;
  if (!(mask >> lane() & 1))
    fail(site, std::string(what) + " is called by lane " + std::to_string(lane()) + ", which its mask lacks");
  arrive(kInWarp, what, site);
  fibers[current].mask = mask;
  fibers[current].record = record;
  const int first = current / kWarp * kWarp;
  void* records[kWarp] = {};
  for (int i = 0; i < kWarp; i++) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= threads || !wait_alike(fibers[current], fibers[first + i])) return leave();
    records[i] = fibers[first + i].record;
  }
  run(records, site);
  for (int i = 0; i < kWarp; i++)
    if (mask >> i & 1) fibers[first + i].state = kReady;
}

void wait_until(const char* what, bool (*ready)(const void*), const void* context, Site site) {
  const Unchecked unchecked;
  if (ready(context)) return;
  arrive(kPolling, what, site);
  fibers[current].ready = ready;
  fibers[current].record = const_cast<void*>(context);
  leave();
}

void sync_warp(unsigned mask, Site site) {
  const auto body = [](void* const*, Site) { warp_barrier_passed(current / kWarp); };
  warp_collective("__syncwarp", mask, nullptr, body, site);
}

}  // namespace cuda_host
