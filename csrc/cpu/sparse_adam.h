// Contract of the CPU kernel `sparse_adam`; the mathematics is vaecirc_fast/reference/sparse_adam.py.
//
// One step of Adam on a matrix (M, D) whose gradient is sparse_decode.h's accumulation of entries: it is formed latent
// by latent and never written. Everything is contiguous and, but for indices, of one element type, f32 or bf16; sums
// and the step are float. B, N and M fit into 31 bits.
#pragma once

#include "../common.h"

namespace vaecirc {

struct SparseAdam {
    void *param, *exp_avg, *exp_avg_sq;           // (M, D)
    void *bias, *bias_exp_avg, *bias_exp_avg_sq;  // (M), gradient: the sum of values; or null
    const void* values;
    const int32_t* indices;
    const void* g;           // (B, D)
    const int32_t* offsets;  // (B + 1), or null: K entries a row
    DType dtype;
    int64_t B, K, N, D, M;
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;    // the number of this step, from 1
    bool decoupled;  // weight decay as AdamW has it
    int threads;
};

// Returns as the kernels of sparse_decode.h; then nothing is changed. The same to the bit for any number of threads.
#define VAECIRC_DECLARE(set)                \
    namespace set {                         \
    int64_t sparse_adam(const SparseAdam&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
