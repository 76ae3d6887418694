// Contract of the CPU kernel `effect_reduction`; the mathematics is vaecirc_fast/reference/effect_reduction.py.
//
// base (B, P) and perturbed (B, I, P) are contiguous and of one element type. labels (P) gives each element's group in
// [0, G), or -1 for an element in no group. Results are float for f32 and bf16 inputs, double for f64.
#pragma once

#include "../common.h"

namespace vaecirc {

// Kinds in the order of vaecirc_fast/reference/effect_reduction.py.
enum Kind : int { L1 = 0, MSE, RMS, LOGIT_MSE, TV, SIGNED, N_KINDS };
enum class Link : int { identity = 0, sigmoid = 1 };

struct EffectReduction {
    const void* base;
    const void* perturbed;
    const int32_t* labels;
    DType dtype;
    Link link;  // applied to both inputs first; logit_mse is taken before it
    int64_t B, I, P, G;
    const int32_t* kinds;  // (E) which effects, in the order of the output
    int64_t E;
    bool sum;   // sum over samples
    void* out;  // (B, I, E, G), or (I, E, G) if sum
    int threads;
};

struct EffectReductionBackward {
    const void* base;
    const void* perturbed;
    const int32_t* labels;
    DType dtype;
    Link link;
    int64_t B, I, P, G;
    // (B or 1, I, 4, G): per group the factors of sign(dy), dy, 1 and the raw difference, of the results' type.
    const void* factors;
    int64_t factors_stride;  // elements from one sample's factors to the next; 0 when all share them
    void* grad_base;         // (B, P), of the inputs' type
    void* grad_perturbed;    // (B, I, P), of the inputs' type
    int threads;
};

// Both return false when memory ran out and have then written nothing of use. Deterministic for any number of threads.
#define VAECIRC_DECLARE(set)                                        \
    namespace set {                                                 \
    bool effect_reduction(const EffectReduction&);                  \
    bool effect_reduction_backward(const EffectReductionBackward&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
