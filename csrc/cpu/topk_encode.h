// Contract of the CPU kernel `topk_encode`; the mathematics is vaecirc_fast/reference/topk_encode.py.
//
// It takes the products x @ w_enc.T a tile of rows at a time: pre (rows, M), contiguous, f32 or bf16. A row's
// activations are act(pre + bias) in float; act is the identity or a ReLU that leaves NaN. M < 2^31.
#pragma once

#include "../common.h"

namespace vaecirc {

struct TopKEncode {
    const void* pre;
    DType dtype;
    int64_t rows, M;
    const float* bias;  // (M) or null
    bool relu;
    int64_t k, K;      // 1 <= k <= K, k <= M
    void* values;      // (rows, K) of the type of pre; from entry k on 0
    int32_t* indices;  // (rows, K), ascending in a row
    int32_t* fired;    // (threads, M) or null: each thread adds 1 for every value > 0 that it chose
    const int32_t* dead;
    int64_t n_dead;    // dead (n_dead): latents, ascending
    int64_t k_aux;     // entries of the second list, of the dead alone; 0: there is none
    void* aux_values;  // (rows, k_aux); from entry min(k_aux, n_dead) on 0
    int32_t* aux_indices;
    int threads;
};

// The largest of all rows together. Candidates are kept in order, row by row: floats, their columns, and how many there
// are in each row; `batch_append` adds those of a tile, `batch_cut` keeps the largest.
struct BatchAppend {
    const void* pre;
    DType dtype;
    int64_t rows, M;
    const float* bias;  // (M) or null
    int32_t beyond;     // the cut so far, as `batch_cut` returns it: only what is above may matter
    float* values;      // candidates; room for count + rows * M + 64 * threads
    int32_t* columns;
    int64_t count;    // of candidates so far
    int32_t* counts;  // (rows) of this tile: written
    int threads;
};

struct BatchCut {
    float* values;
    int32_t* columns;
    int64_t count, keep;  // count > keep > 0
    int32_t* counts;      // (rows) of all rows so far
    int64_t rows;
};

// Every zero counts as the value of an element that is no candidate: they fill up from the first on.
struct BatchFill {
    const float* values;
    const int32_t* columns;
    int32_t* counts;  // (rows), updated
    int64_t rows, M, count, keep;
    float* out_values;  // (keep)
    int32_t* out_columns;
};

constexpr int32_t CUT_ALL = -2147483647 - 1;  // `beyond` under which every element is a candidate
constexpr int32_t CUT_ZERO = 0;               // and every element above zero

// topk_encode is false, batch_append -1 and batch_cut -2^63 when memory ran out: nothing of use is written then.
// batch_append returns the new count. The same bits for any number of threads.
#define VAECIRC_DECLARE(set)                  \
    namespace set {                           \
    bool topk_encode(const TopKEncode&);      \
    int64_t batch_append(const BatchAppend&); \
    int64_t batch_cut(const BatchCut&);       \
    void batch_fill(const BatchFill&);        \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
