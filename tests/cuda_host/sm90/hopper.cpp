// Hopper's asynchronous instructions on the host, as the PTX ISA describes them: mbarriers ("mbarrier"), copies of boxes
// ("cp.async.bulk.tensor", "Swizzling modes"), named barriers ("barrier"), and products of a warpgroup ("wgmma").
//
// Copies to shared memory are done at once, the soonest that they may be; products and copies from shared memory when
// they are waited for, the latest. What is then read is checked: it was written, by a thread that made its writes visible
// to such reads or by a copy, and the reader knows. Who knows what is a clock for each warp (Lamport, CACM 21 (1978) 7;
// Mattern, "Virtual time and global states of distributed systems", 1988): barriers of both kinds hand it on.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"
#include "../include/wgmma_host.h"

namespace fusetune::cuda {
extern thread_local uint4 dynamic_shared[];
}

namespace cuda_host::hopper {
namespace {

constexpr int kWarps = kMostThreads / kWarp, kGroupThreads = 128;
constexpr int kMostBarriers = 32;
constexpr uint32_t kBase = 4096;  // the shared address of dynamic_shared
constexpr int kPiece = 16;        // bytes of shared memory that have one record

// How much a warp knows of the accesses of each warp, and of the copies that each barrier counts.
using Clock = std::array<uint32_t, kWarps + kMostBarriers>;
void learn(Clock& mine, const Clock& other) {
  for (size_t i = 0; i < mine.size(); i++) mine[i] = std::max(mine[i], other[i]);
}

struct Barrier {
  int agent = 0;  // of the copies, among those of Clock
  uint32_t arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // announced and not yet copied
  uint32_t made = 0;  // when, and by whom
  int maker = 0;
  Clock arriving{}, over{};  // known to those who have arrived, and to those who wait
};

struct Named {
  int threads = 0;
  std::vector<int> arrived;
  uint32_t generation = 0;
  Clock arriving{}, over{};
};

// The last copy to 16 bytes of shared memory, and the last read of them by each warp's products or copies.
struct Piece {
  int writer = -1;
  uint32_t written = 0, time = 0;
  Site site{};
  std::array<uint32_t, kWarps> read{};
};

// Products of a warpgroup: of all its threads.
struct Products {
  std::array<Product, kGroupThreads> of;
  Clock known;
  Site site;
};

struct Group {
  int there = 0;  // threads in the present call
  uint32_t calls = 0;
  Site site{};
  bool fenced = false;
  Products next;
  std::vector<Products> open;
  std::vector<std::vector<Products>> committed;
};

struct Store {
  CUtensorMap map;
  std::array<int, 4> at;
  uint32_t from;
  Clock known;
  Site site;
};

struct Fence {
  uint32_t time, clock;
};

// Of the present block.
uint32_t block = 0;
std::map<uint64_t*, Barrier> barriers;
std::map<int, Named> named;
Clock clocks[kWarps];
Fence fences[kMostThreads];
std::vector<Piece> pieces;
Group groups[kMostThreads / kGroupThreads];
std::vector<Store> stores[kMostThreads];

int warp() { return thread_number() / kWarp; }
Group& group() { return groups[thread_number() / kGroupThreads]; }

void enter() {
  if (block == time_of_block()) return;
  block = time_of_block();
  barriers.clear();
  named.clear();
  for (Clock& clock : clocks) clock = {};
  for (int i = 0; i < kWarps; i++) clocks[i][i] = 1;
  for (Fence& fence : fences) fence = {};
  pieces.assign(kMostShared / kPiece, {});
  for (Group& g : groups) g = {};
  for (auto& of_thread : stores) of_thread.clear();
}

// The present warp tells what it knows, and what it does from now on is later.
void tell(Clock& to) {
  learn(to, clocks[warp()]);
  clocks[warp()][warp()]++;
}

char* at_address(uint32_t address) { return (char*)fusetune::cuda::dynamic_shared + (address - kBase); }
std::string name_of_byte(uint32_t address) {
  return "byte " + std::to_string(address - kBase) + " of dynamic shared memory";
}

Piece& piece(uint32_t address, Site site) {
  if (address < kBase || address + kPiece > kBase + dynamic_shared_size())
    fail(site, "out of bounds: " + name_of_byte(address));
  return pieces[(address - kBase) / kPiece];
}

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// That what products or copies read is there for one who knows `known`; warps first .. first + count - 1 then have read.
void check_read(uint32_t address, const Clock& known, int first, int count, Site site) {
  Piece& p = piece(address, site);
  const Write plain = last_write(at_address(address));
  const auto cannot = [&](const std::string& what) { fail(site, "read of " + name_of_byte(address) + what); };
  if (p.writer < 0 && plain.time == 0) cannot(", which nobody has written yet");
  if (p.writer >= 0 && p.time > plain.time) {
    if (known[p.writer] < p.written) cannot(" was not told that the copy is there, that of " + name_of(p.site));
  } else {
    const Fence fence = fences[plain.thread];
    if (fence.time <= plain.time) cannot(", which " + thread_name(plain.thread) + " wrote with no fence_async since");
    if (known[plain.thread / kWarp] < fence.clock)
      cannot(", which " + thread_name(plain.thread) + " wrote with no barrier between");
  }
  for (int w = first; w < first + count; w++) p.read[w] = clocks[w][w];
}

void check_write(uint32_t address, Site site) {
  const Piece& p = piece(address, site);
  const Clock& known = clocks[warp()];
  if (p.writer >= 0 && known[p.writer] < p.written)
    fail(site,
         "race: copy to " + name_of_byte(address) + ", to which that of " + name_of(p.site) + " may be under way");
  for (int w = 0; w < kWarps; w++)
    if (p.read[w] > known[w])
      fail(site, "race: copy to " + name_of_byte(address) + ", which " + thread_name(w * kWarp) +
                     "'s warp read with no barrier between");
}

Barrier& found(uint64_t* barrier, Site site) {
  const auto it = barriers.find(barrier);
  if (it == barriers.end()) fail(site, "no barrier was made there");
  const Barrier& b = it->second;
  if (b.maker != thread_number() && !before_barrier(b.made))
    fail(site, "the barrier was made with no __syncthreads since");
  return it->second;
}

void end_phase_if_over(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.arrivals;
  b.phase++;
  learn(b.over, b.arriving);
}

// All threads of the warpgroup come with the same call; the last runs `body`.
template <class Body>
void together(const char* what, Site site, Body body) {
  const Unchecked unchecked;
  enter();
  Group& g = group();
  if (g.there == 0) g.site = site;
  if (g.site.line != site.line || g.site.file != site.file)
    fail(site, std::string(what) + " meets another call of the warpgroup, at " + name_of(g.site));
  if (++g.there == kGroupThreads) {
    g.there = 0;
    g.calls++;
    body(g);
    return;
  }
  struct Call {
    const Group* g;
    uint32_t number;
  } call{&g, g.calls};
  wait_until(what, [](const void* c) { return ((const Call*)c)->g->calls != ((const Call*)c)->number; }, &call, site);
}

float element(const char* p, bool bfloat16) {
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// The address of element (row, k) of an operand, rows being those of the product's result. Layouts are those of the PTX
// ISA's "Canonical Layouts" for 128-byte swizzling and 16-bit elements.
uint32_t address_of(uint64_t descriptor, int row, int k, bool by_columns, Site site) {
  const auto field = [&](int bit, int bits) { return (uint32_t)(descriptor >> bit & ((1u << bits) - 1)); };
  const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4, stride = field(32, 14) << 4;
  if (field(62, 2) != 1 || field(49, 3) || field(14, 2) || field(30, 2) || field(46, 3) || field(52, 10))
    fail(site, "the descriptor is not one of a 128-byte swizzle from a multiple of 1024 bytes");
  if (by_columns) return swizzled(start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128);
  return swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
}

// Exact products are added one by one in increasing k, each sum rounded to float; a tensor core's order and rounding are
// not documented.
void run(const Products& products, int first_warp) {
  const Product& p = products.of[0];
  const int n = p.n;
  static float a[64][16], b[16][256], d[64][256];
  const auto operand = [&](uint64_t tile, int row, int k, bool by_columns) {
    const uint32_t address = address_of(tile, row, k, by_columns, products.site);
    check_read(address / kPiece * kPiece, products.known, first_warp, 4, products.site);
    return element(at_address(address), p.bfloat16);
  };
  const auto of_registers = [&](auto visit) {
    for (int thread = 0; thread < kGroupThreads; thread++)
      for (int i = 0; i < n / 2; i++)
        visit(products.of[thread].d[i], thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8,
              i / 4 * 8 + thread % 4 * 2 + i % 2);
  };
  for (int k = 0; k < 16; k++)
    for (int column = 0; column < n; column++) b[k][column] = operand(p.b_tile, column, k, p.b_by_columns);
  if (p.a) {
    for (int thread = 0; thread < kGroupThreads; thread++)
      for (int i = 0; i < 8; i++)
        a[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2] =
            element((const char*)products.of[thread].a + 2 * i, p.bfloat16);
  } else {
    for (int row = 0; row < 64; row++)
      for (int k = 0; k < 16; k++) a[row][k] = operand(p.a_tile, row, k, false);
  }
  of_registers([&](float& value, int row, int column) { d[row][column] = p.add ? value : 0; });
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < n; column++) d[row][column] += a[row][k] * b[k][column];
  of_registers([&](float& value, int row, int column) { value = d[row][column]; });
}

// --- Tensor maps ----------------------------------------------------------------------------------------------------

struct Map {
  uint64_t magic;
  char* p;
  uint64_t sizes[4], strides[3];  // bytes
  uint32_t box[4];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x746D6170;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* p, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool good = rank == 4 && (uintptr_t)p % 16 == 0 && (uintptr_t)map % 64 == 0 &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
  for (int i = 0; i < 4; i++)
    good = good && sizes[i] && sizes[i] <= 1ull << 32 && box[i] && box[i] <= 256 && steps[i] == 1;
  for (int i = 0; i < 3; i++) good = good && strides[i] && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  Map encoded{kMagic, (char*)p, {}, {}, {}};
  std::copy_n(sizes, 4, encoded.sizes);
  std::copy_n(strides, 3, encoded.strides);
  std::copy_n(box, 4, encoded.box);
  *map = {};
  memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

// visit(shared address, pieces's place in global memory or null) for each 16 bytes of a box of rows of 128 bytes.
template <class Visit>
int64_t each_piece(const CUtensorMap& encoded, const int* at, uint32_t shared, Site site, Visit visit) {
  Map map;
  memcpy(&map, &encoded, sizeof map);
  if (map.magic != kMagic) fail(site, "no tensor map is there");
  if (shared % 1024) fail(site, "a swizzled box needs a multiple of 1024 bytes of shared memory");
  if (map.box[0] != 64 || map.box[2] != 1 || map.box[3] != 1) fail(site, "boxes are emulated of rows of 64 elements");
  const auto inside = [&](int i, int64_t c) { return c >= 0 && c < (int64_t)map.sizes[i]; };
  for (uint32_t r = 0; r < map.box[1]; r++)
    for (int c = 0; c < 8; c++) {
      const int64_t column = at[0] + 8 * c, row = (int64_t)at[1] + r;
      const bool there = inside(0, column) && inside(1, row) && inside(2, at[2]) && inside(3, at[3]);
      if (there && !inside(0, column + 7)) fail(site, "boxes are emulated of tensors with rows of a multiple of 8");
      char* const p =
          there ? map.p + 2 * column + row * map.strides[0] + at[2] * map.strides[1] + at[3] * map.strides[2] : nullptr;
      visit(swizzled(shared + 128 * r + 16 * c), p);
    }
  return 128 * (int64_t)map.box[1];
}

}  // namespace

uint32_t shared_address(const void* p) {
  return (uint32_t)((const char*)p - (const char*)fusetune::cuda::dynamic_shared) + kBase;
}

void barrier_init(uint64_t* barrier, uint32_t arrivals, Site site) {
  const Unchecked unchecked;
  enter();
  piece(shared_address(barrier) / kPiece * kPiece, site);
  if ((uintptr_t)barrier % 8) fail(site, "a barrier needs a multiple of 8 bytes");
  if (barriers.count(barrier)) fail(site, "the barrier was made before");
  Barrier& b = barriers[barrier];
  if (barriers.size() > kMostBarriers) fail(site, "more barriers than are emulated");
  b.agent = kWarps + (int)barriers.size() - 1;
  b.arrivals = b.pending = arrivals;
  b.made = time_passes();
  b.maker = thread_number();
}

void barrier_arrive(uint64_t* barrier, uint32_t bytes, Site site) {
  const Unchecked unchecked;
  enter();
  Barrier& b = found(barrier, site);
  if (b.pending == 0) fail(site, "more threads arrive than the barrier was made for");
  b.bytes += bytes;
  b.pending--;
  tell(b.arriving);
  end_phase_if_over(b);
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  const Unchecked unchecked;
  enter();
  struct Wait {
    const Barrier* b;
    uint32_t parity;
  } wait{&found(barrier, site), parity};
  wait_until(
      "barrier_wait", [](const void* w) { return ((const Wait*)w)->b->phase % 2 != ((const Wait*)w)->parity; }, &wait,
      site);
  learn(clocks[warp()], wait.b->over);
}

void fence_async() {
  const Unchecked unchecked;
  enter();
  fences[thread_number()] = {time_passes() + 1, clocks[warp()][warp()]};
}

void named_barrier(int number, int threads, bool wait, Site site) {
  const Unchecked unchecked;
  enter();
  Named& b = named[number];
  if (b.arrived.empty()) b.threads = threads;
  if (number < 1 || number > 15 || threads % kWarp) fail(site, "no such barrier");
  if (b.threads != threads) fail(site, "the barrier is for " + std::to_string(b.threads) + " threads");
  if (std::count(b.arrived.begin(), b.arrived.end(), thread_number()))
    fail(site, "the thread has arrived at the barrier before");
  b.arrived.push_back(thread_number());
  tell(b.arriving);
  struct Wait {
    const Named* b;
    uint32_t generation;
  } waiting{&b, b.generation};
  if ((int)b.arrived.size() == threads) {
    b.over = b.arriving;
    b.arrived.clear();
    b.generation++;
  }
  if (!wait) return;
  wait_until(
      "named_barrier_sync",
      [](const void* w) { return ((const Wait*)w)->b->generation != ((const Wait*)w)->generation; }, &waiting, site);
  learn(clocks[warp()], b.over);
}

void load_box(void* shared, const CUtensorMap* map, const int (&at)[4], uint64_t* barrier, Site site) {
  const Unchecked unchecked;
  enter();
  Barrier& b = found(barrier, site);
  if (fences[b.maker].time <= b.made) fail(site, "the barrier was made with no fence_async since");
  const uint32_t epoch = b.phase + 1;
  const int64_t bytes = each_piece(*map, at, shared_address(shared), site, [&](uint32_t address, const char* from) {
    check_write(address, site);
    Piece& p = piece(address, site);
    p.writer = b.agent;
    p.written = epoch;
    p.time = time_passes();
    p.site = site;
    if (from) {
      check_global(from, kPiece, false, site);
      memcpy(at_address(address), from, kPiece);
    } else {
      memset(at_address(address), 0, kPiece);
    }
  });
  b.arriving[b.agent] = epoch;
  b.bytes -= bytes;
  end_phase_if_over(b);
}

void store_box(const CUtensorMap* map, const int (&at)[4], const void* shared, Site site) {
  const Unchecked unchecked;
  enter();
  stores[thread_number()].push_back({*map, {at[0], at[1], at[2], at[3]}, shared_address(shared), clocks[warp()], site});
}

void wait_stores_read() {
  const Unchecked unchecked;
  enter();
  for (const Store& store : stores[thread_number()])
    each_piece(store.map, store.at.data(), store.from, store.site, [&](uint32_t address, char* to) {
      check_read(address, store.known, warp(), 1, store.site);
      if (!to) return;
      check_global(to, kPiece, true, store.site);
      memcpy(to, at_address(address), kPiece);
    });
  stores[thread_number()].clear();
}

void set_registers(int registers, Site site) {
  if (registers % 8 || registers < 24 || registers > 256) fail(site, "setmaxnreg needs a multiple of 8 from 24 to 256");
  together("setmaxnreg", site, [](Group&) {});
}

void products_fence(Site site) {
  together("products_fence", site, [](Group& g) { g.fenced = true; });
}

void products_commit(Site site) {
  together("products_commit", site, [](Group& g) {
    g.committed.push_back(std::move(g.open));
    g.open.clear();
  });
}

void products_wait(int pending, Site site) {
  const int first_warp = thread_number() / kGroupThreads * 4;
  together("products_wait", site, [&](Group& g) {
    while ((int)g.committed.size() > pending) {
      for (const Products& products : g.committed.front()) run(products, first_warp);
      g.committed.erase(g.committed.begin());
    }
    g.fenced = false;
  });
}

void multiply(const Product& product, Site site) {
  enter();
  group().next.of[thread_number() % kGroupThreads] = product;
  const int first_warp = thread_number() / kGroupThreads * 4;
  together("a product", site, [&](Group& g) {
    if (!g.fenced) fail(site, "a product with no products_fence since the last wait");
    g.next.known = clocks[first_warp];  // what all four warps know
    for (int w = first_warp + 1; w < first_warp + 4; w++)
      for (size_t i = 0; i < g.next.known.size(); i++) g.next.known[i] = std::min(g.next.known[i], clocks[w][i]);
    g.next.site = site;
    for (const Product& of_thread : g.next.of)
      if (of_thread.a_tile != product.a_tile || of_thread.b_tile != product.b_tile || of_thread.add != product.add)
        fail(site, "the threads' descriptors differ");
    g.open.push_back(g.next);
  });
}

}  // namespace cuda_host::hopper

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  *function = strcmp(symbol, "cuTensorMapEncodeTiled") ? nullptr : (void*)cuda_host::hopper::encode;
  return cudaSuccess;
}
