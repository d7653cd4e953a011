// A tiled matrix product through csrc/cuda/mma.cuh: the primitives in use, at a size that can be read. A block of 2 x 2
// warps computes a tile of 64 x 64, each warp 32 x 32 of it, from tiles of 32 elements of K: the next ones are copied
// while these are multiplied.
#include "products.h"

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.cuh"
#include "../../csrc/dtype.h"

namespace fusetune::cuda {

namespace {

constexpr int kTileM = 64, kTileN = 64, kTileK = 32;
constexpr int kWarp = 32;  // lanes, and rows and columns of a warp's part
constexpr int kThreads = 4 * kWarp;
constexpr int kMmaM = 16, kMmaN = 8;
constexpr int kPartsM = kWarp / kMmaM, kPartsN = kWarp / kMmaN;

// Row pitches free of bank conflicts. 16-bit types: the eight rows that ldmatrix reads at once lie in different 16-byte
// groups of the 32 banks, as a pitch is an odd number of them (A 5, B 9). tf32: the addresses g pitch + t of A and
// t pitch + g of B (g < 8, t < 4) fall into 32 different banks (A 36 g + t, B 72 t + g, modulo 32).
template <class T>
constexpr int kPitchA = kTileK + 16 / (int)sizeof(T);
constexpr int kPitchB = kTileN + 8;

template <class T>
using TileA = T[kTileM][kPitchA<T>];
template <class T>
using TileB = T[kTileK][kPitchB];

// The rows x columns elements at `from` that lie in a tile of kRows x kColumns, and zeros in the rest of it.
template <int kColumns, class T, int kRows, int kPitch>
__device__ void copy_tile(T (&tile)[kRows][kPitch], const T* from, int64_t row_stride, int64_t rows, int64_t columns) {
  constexpr int kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
  if (((uintptr_t)from | (uintptr_t)(row_stride * sizeof(T))) % 16 == 0) {
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kPacks; i += kThreads) {
      const int row = i / kPacks, column = i % kPacks * kPack;
      const int elements = row < rows ? (int)max(min(columns - column, (int64_t)kPack), (int64_t)0) : 0;
      copy_async_16(&tile[row][column], elements ? from + row * row_stride + column : from, elements * sizeof(T));
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      tile[row][column] = row < rows && column < columns ? from[row * row_stride + column] : T();
    }
  }
}

// sums += A B of the warp's 32 rows of A and 32 columns of B.
template <class T>
__device__ void multiply_tiles(float (&sums)[kPartsM][kPartsN][4], const TileA<T>& a_tile, const TileB<T>& b_tile,
                               int warp_m, int warp_n) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a[kPartsM][4], b[kPartsN / 2][4];
#pragma unroll
    for (int i = 0; i < kPartsM; i++) ldmatrix_x4(a[i], &a_tile[warp_m + i * kMmaM + lane % 16][k + lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < kPartsN / 2; j++)  // B's registers for two neighbours
      ldmatrix_x4_trans(b[j], &b_tile[k + lane % 16][warp_n + j * 2 * kMmaN + lane / 16 * 8]);
#pragma unroll
    for (int i = 0; i < kPartsM; i++)
#pragma unroll
      for (int j = 0; j < kPartsN; j++) mma_m16n8k16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

template <>
__device__ void multiply_tiles<float>(float (&sums)[kPartsM][kPartsN][4], const TileA<float>& a_tile,
                                      const TileB<float>& b_tile, int warp_m, int warp_n) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < kTileK; k += 8) {
    uint32_t a[kPartsM][4], b[kPartsN][2];
#pragma unroll
    for (int i = 0; i < kPartsM; i++)
#pragma unroll
      for (int r = 0; r < 4; r++) a[i][r] = to_tf32(a_tile[warp_m + i * kMmaM + g + r % 2 * 8][k + t + r / 2 * 4]);
#pragma unroll
    for (int j = 0; j < kPartsN; j++)
#pragma unroll
      for (int r = 0; r < 2; r++) b[j][r] = to_tf32(b_tile[k + t + r * 4][warp_n + j * kMmaN + g]);
#pragma unroll
    for (int i = 0; i < kPartsM; i++)
#pragma unroll
      for (int j = 0; j < kPartsN; j++) mma_m16n8k8_tf32(sums[i][j], a[i], b[j][0], b[j][1]);
  }
}

// Block b computes tile b % tiles_n of row b / tiles_n of tiles.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply(const T* a, const T* b, float* c, int64_t M, int64_t N, int64_t K,
                                                     int64_t a_row, int64_t b_row, int64_t c_row, int64_t tiles_n) {
  alignas(16) __shared__ TileA<T> a_tiles[2];
  alignas(16) __shared__ TileB<T> b_tiles[2];
  const int64_t m0 = blockIdx.x / tiles_n * kTileM, n0 = blockIdx.x % tiles_n * kTileN;
  const int warp = threadIdx.x / kWarp, warp_m = warp / 2 * kWarp, warp_n = warp % 2 * kWarp;
  float sums[kPartsM][kPartsN][4] = {};

  auto copy = [&](int into, int64_t k) {
    copy_tile<kTileK>(a_tiles[into], a + m0 * a_row + k, a_row, M - m0, K - k);
    copy_tile<kTileN>(b_tiles[into], b + k * b_row + n0, b_row, K - k, N - n0);
    copy_async_commit();
  };
  if (K > 0) copy(0, 0);
  int now = 0;
  for (int64_t k = 0; k < K; k += kTileK, now ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // all have copied `now`, and none still reads the other
    if (k + kTileK < K) copy(now ^ 1, k + kTileK);
    multiply_tiles<T>(sums, a_tiles[now], b_tiles[now], warp_m, warp_n);
  }

  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kPartsM; i++)
#pragma unroll
    for (int j = 0; j < kPartsN; j++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int64_t row = m0 + warp_m + i * kMmaM + g + r / 2 * 8, column = n0 + warp_n + j * kMmaN + t * 2 + r % 2;
        if (row < M && column < N) c[row * c_row + column] = sums[i][j][r];
      }
}

template <class T>
void launch_multiply(const void* a, const void* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row,
                     int64_t b_row, int64_t c_row, void* stream) {
  const int64_t tiles_m = (M + kTileM - 1) / kTileM, tiles_n = (N + kTileN - 1) / kTileN;
  launch("product", multiply<T>, (unsigned)(tiles_m * tiles_n), kThreads, stream, (const T*)a, (const T*)b, c, M, N, K,
         a_row, b_row, c_row, tiles_n);
}

}  // namespace

void product(const void* a, const void* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row, int64_t b_row,
             int64_t c_row, int dtype, void* stream) {
  if (M == 0 || N == 0) return;
  switch (dtype) {
    case kFloat32: return launch_multiply<float>(a, b, c, M, N, K, a_row, b_row, c_row, stream);
    case kBFloat16: return launch_multiply<__nv_bfloat16>(a, b, c, M, N, K, a_row, b_row, c_row, stream);
    default: return launch_multiply<__half>(a, b, c, M, N, K, a_row, b_row, c_row, stream);
  }
}

}  // namespace fusetune::cuda
