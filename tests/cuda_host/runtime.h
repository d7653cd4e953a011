// What the stand-ins of CUDA's headers call: a grid's execution on the host, and its checks. Explained in README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;  // of a block
#ifdef CUDA_HOST_SM90
constexpr size_t kMostShared = 227 * 1024;  // bytes of a block's dynamic shared memory, as on 9.0
#else
constexpr size_t kMostShared = 99 * 1024;  // as on 8.6, 8.9 and 12.0
#endif
constexpr size_t kStack = 128 * 1024;  // bytes of a thread's local memory
extern uintptr_t own_stack;            // where that of the thread that runs begins

// A line of a kernel; or, with line 0, an address in its code.
struct Site {
  const void* file;
  int line;
};
// The last parameters of a primitive: where it is called.
#define CUDA_HOST_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- scheduler.cpp: threads and where they meet ---------------------------------------------------------------------

// Runs thread(context) as every thread of the grid; the kernel's parameters lie within 4 KiB after `context`. Throws
// std::runtime_error with file, line, the name of `kernel`, block and thread at the first thing that a GPU would not do
// as meant.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const void* kernel, void (*thread)(const void*),
              const void* context);

// Blocks and threads run from first to last, or from last to first: results that differ depend on the order.
void reverse_order(bool reversed);

[[noreturn]] void fail(Site site, const std::string& what);

void sync_threads(Site site);

// Every lane of `mask` calls it with the same `what` and site. The last to arrive runs `body`, whose own accesses to
// memory are not checked, on the records of the 32 lanes, null for those that are not in the mask; then all go on.
void warp_collective(const char* what, unsigned mask, void* record, void (*body)(void* const* records, Site),
                     Site site);
void sync_warp(unsigned mask, Site site);
// The thread goes on once ready(context) holds, which is asked between the turns of others.
void wait_until(const char* what, bool (*ready)(const void*), const void* context, Site site);

int thread_number();  // in the block, of the thread that runs
inline int lane() { return thread_number() % kWarp; }
void act_as_lane(int lane);  // of its warp; until -1
std::string thread_name(int number);
std::string name_of(Site site);

// --- memory.cpp: what threads read and write ------------------------------------------------------------------------

// Global memory that kernels may touch; all may be touched while nothing was allowed. Views of one storage may overlap;
// what was allowed of another storage at the same addresses was freed since then, and is no longer.
void allow(const void* begin, size_t bytes, uint64_t storage);
void forget_allowed();

// For primitives that access memory, each on behalf of the thread that calls.
void atomic_access(const void* p, size_t bytes, Site site);
// Reads shared memory at a multiple of `bytes`, as `lane` of the warp of the thread that calls.
void lane_read(int lane, void* to, const void* shared, int bytes, Site site);
// cp.async: `shared` counts as unwritten until a wait of this thread completes the copy's group. Bytes from
// `source_bytes` on are zero.
void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site);
void copy_async_commit();
void copy_async_wait(int groups_left, Site site);

// For the emulation of asynchronous instructions.
struct Write {
  uint32_t time;  // 0: nobody has written in this block
  int thread;
};
Write last_write(const void* shared);  // by a thread, of a byte
void check_global(const void* p, size_t bytes, bool write, Site site);
uint32_t time_passes();              // the time until now
bool before_barrier(uint32_t time);  // whether __syncthreads came since then
uint32_t time_of_block();            // when the present block began
size_t dynamic_shared_size();        // of the present block

// Called by the scheduler. Time passes at barriers: an access is ordered before the present where a barrier of the block,
// or of the one warp that both threads are in, came after it.
void prepare_memory();
void begin_block(size_t dynamic_shared_bytes, const void* parameters);
void barrier_passed();
void warp_barrier_passed(int warp);
void check_accesses(bool on);
bool in_stacks(uintptr_t p);  // of any thread

// The harness's own accesses, until it returns to the kernel.
struct Unchecked {
  Unchecked() { check_accesses(false); }
  ~Unchecked() { check_accesses(true); }
};

}  // namespace cuda_host
