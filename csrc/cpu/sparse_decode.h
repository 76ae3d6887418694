// Contract of the CPU kernels of `sparse_decode`; the mathematics is vaecirc_fast/reference/sparse_decode.py.
//
// B rows have entries: a value and an index in [0, M). Without offsets each has K, values and indices are (B, K); with
// offsets (B + 1) row b has those of [offsets[b], offsets[b + 1]) of N = offsets[B]. Everything is contiguous; values
// and matrices are of one element type, f32 or bf16, and sums are float. B, N and M fit into 31 bits.
#pragma once

#include "../common.h"

namespace vaecirc {

struct SparseDecode {
    const void* values;
    const int32_t* indices;
    const void* w;           // (M, D)
    const void* bias;        // (D), or null
    const int32_t* offsets;  // or null
    const void* target;      // (B, D), where a squared error is wanted
    DType dtype;
    int64_t B, K, N, D, M;
    void* y;              // (B, D)
    void* squared_error;  // (B) with a target, else null
    int threads;
};

struct SparseDecodeValues {
    const int32_t* indices;
    const void* w;  // (M, D)
    const void* g;  // (B, D)
    const int32_t* offsets;
    DType dtype;
    int64_t B, K, N, D, M;
    void* out;  // as indices: w[index] . g[row]
    int threads;
};

struct SparseAccumulate {
    const void* values;
    const int32_t* indices;
    const void* g;  // (B, D)
    const int32_t* offsets;
    DType dtype;
    int64_t B, K, N, D, M;
    void* out;     // (M, D): of each latent the sum of value * g[row], in the order of rows
    void* totals;  // (M): the sum of values
    int threads;
};

// Each returns -1, or the position of the first entry whose index is not in [0, M), or -2 when memory ran out, or -3
// when offsets do not ascend from 0 to N; then nothing of use is written, and nothing outside the outputs. The same to
// the bit for any number of threads.
#define VAECIRC_DECLARE(set)                                 \
    namespace set {                                          \
    int64_t sparse_decode(const SparseDecode&);              \
    int64_t sparse_decode_values(const SparseDecodeValues&); \
    int64_t sparse_accumulate(const SparseAccumulate&);      \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
