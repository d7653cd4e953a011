// Launchers of the kernels that try csrc/cuda/mma.cuh: a whole product, and each primitive alone.
#pragma once

#include <cstdint>

namespace fusetune::cuda {

// C = A B with A [M, K] and B [K, N] in rows of a_row and b_row elements, and C [M, N] of float32 in rows of c_row.
// dtype: float32 is rounded to tf32.
void product(const void* a, const void* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row, int64_t b_row,
             int64_t c_row, int dtype, void* stream);

// ldmatrix of 2 or 4 matrices by one warp.
void load_fragments(const uint16_t* elements,  // [1024], copied to shared memory
                    const int* offsets,        // [32] of the row whose address the lane gives, in elements
                    uint32_t* registers,       // [32, matrices] out
                    int matrices, bool trans,
                    bool barrier,  // before it: false is an error
                    void* stream);

// mma by each of `warps` warps: m16n8k16 of float16 or bfloat16, m16n8k8 of tf32 for float32.
void multiply_fragments(const uint32_t* a,  // [warps, 32, 4]
                        const uint32_t* b,  // [warps, 32, 2]
                        float* d,           // [warps, 32, 4] in and out
                        int64_t warps,
                        int lanes,  // that take part: any but 32 is an error
                        int dtype, void* stream);

void round_to_tf32(const float* x, uint32_t* y, int64_t n, void* stream);

void exponentials(const float* x, float* y, int64_t n, void* stream);

// cp.async in two groups of 32 copies, one of each a thread's, each read by the thread's neighbour.
void copy_groups(const void* from,         // [2, 32] times 16 bytes
                 void* to,                 // likewise, out
                 const int* source_bytes,  // [2, 32]
                 bool halves,              // each copy as two of 8 bytes
                 int complete,             // groups that are waited for
                 int read,                 // groups that are read: more than `complete` is an error
                 bool barrier,             // between the wait and the reads: false is an error
                 void* stream);

}  // namespace fusetune::cuda
