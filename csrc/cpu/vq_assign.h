// Contract of the CPU kernel `vq_assign`; the mathematics is vaecirc_fast/reference/vq_assign.py.
//
// The nearest code of each row is the lowest k of least |e_k|^2 / 2 - z . e_k. No (N, K) array is made: the memory
// asked for is the codebook once more, in panels, and some rows' running minima a thread.
#pragma once

#include "../common.h"

namespace vaecirc {

struct VqAssign {
    DType dtype;           // f32 or f64, of all arrays but indices and counts
    const void* z;         // (N, D)
    const void* codebook;  // (K, D), K >= 1, D >= 1
    int64_t N, K, D;
    int64_t* indices;  // (N)
    void* z_q;         // (N, D)
    void* distance;    // (N)
    int64_t* counts;   // (K), or null
    void* sums;        // (K, D), or null with counts
    int threads;
};

// Returns false when memory ran out. The same to the bit for any number of threads.
#define VAECIRC_DECLARE(set)         \
    namespace set {                  \
    bool vq_assign(const VqAssign&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
