// Contract of the CUDA kernel `effect_reduction`; the mathematics is vaecirc_fast/reference/effect_reduction.py.
//
// base (B, P) and perturbed (B, I, P) are contiguous and of one element type; all pointers are to memory of `device`.
// 0 < G <= P < 2^29. Sums are float for f32, bf16 and f16 inputs, double for f64. Deterministic: what is added in which
// order follows from the shapes alone. Nothing waits for the device.
#pragma once

#include <stdint.h>

namespace vaecirc {
namespace cuda {

// Element types of tensors, as _native.py numbers them.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
// Kinds in the order of vaecirc_fast/reference/effect_reduction.py.
enum Kind : int { L1 = 0, MSE, RMS, LOGIT_MSE, TV, SIGNED, N_KINDS };
enum class Link : int { identity = 0, sigmoid = 1 };

struct EffectReduction {
    const void* base;
    const void* perturbed;
    const int32_t* order;    // (elements) those in a group, sorted by group
    const int32_t* offsets;  // (G + 1) where each group starts in `order`
    DType dtype;
    Link link;  // applied to both inputs first; logit_mse is taken before it
    int64_t B, I, P, G;
    int64_t elements;  // entries of `order`, at most P
    const int* kinds;  // (E) which effects, in the order of the output; at most N_KINDS; read before the call returns
    int E;
    bool sum;       // sum over samples, in `outer` blocks of samples that the caller adds up
    int64_t outer;  // B unless `sum`; block o holds the samples [o B / outer, (o + 1) B / outer)
    void* out;      // (outer, I, E, G)
    int device;
    void* stream;  // a cudaStream_t
};

struct EffectReductionBackward {
    const void* base;
    const void* perturbed;
    const int32_t* labels;  // (P) each element's group, or -1
    DType dtype;
    Link link;
    int64_t B, I, P, G;
    // (B or 1, I, 4, G): per group the factors of sign(dy), dy, 1 and the raw difference, of the sums' type. A factor
    // of zero adds nothing, even where what it multiplies is NaN or infinite; nor does a gradient of zero before a
    // link.
    const void* factors;
    int64_t factors_stride;  // elements from one sample's factors to the next; 0 when all share them
    void* grad_perturbed;    // (B, I, P), of the inputs' type
    int64_t parts;           // interventions are split in so many parts, for more threads
    void* grad_base;  // parts = 1: (B, P), of the inputs' type; else (parts, B, P) of the sums' type, to be added
    int device;
    void* stream;
};

// Both return null, or what went wrong.
const char* effect_reduction(const EffectReduction&);
const char* effect_reduction_backward(const EffectReductionBackward&);

}  // namespace cuda
}  // namespace vaecirc
