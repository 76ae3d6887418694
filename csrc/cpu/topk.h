// Contract of the CPU kernel `topk`; the mathematics is vaecirc_fast/reference/topk.py.
//
// The k largest of each row of a (B, M), f32 or bf16: the first k of a stable descending sort, in which NaN is above
// every number and -0.0 equals 0.0. 1 <= k <= K, k <= M < 2^31.
#pragma once

#include "../common.h"

namespace vaecirc {

struct TopK {
    const void* a;
    DType dtype;
    int64_t B, M, stride;  // elements from one row to the next; within a row they are neighbours
    int64_t k, K;
    bool sorted;       // by value, descending; else by index, ascending
    void* values;      // (B, K) of the input's type; from entry k on 0
    int32_t* indices;  // (B, K)
    int threads;
};

struct TopKBackward {
    const void* grad;        // (B, K) of elements of `bytes` bytes
    const int32_t* indices;  // (B, K); an entry outside [0, M) gives nothing
    int64_t bytes;           // 2, 4 or 8
    int64_t B, M, k, K;
    void* out;  // (B, M): grad where its entry came from, else 0
    int threads;
};

// False when memory ran out: nothing of use is written then. The same bits for any number of threads.
#define VAECIRC_DECLARE(set)                 \
    namespace set {                          \
    bool topk(const TopK&);                  \
    void topk_backward(const TopKBackward&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
