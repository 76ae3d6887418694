// Contract of the CPU kernel `threshold_encode`; the mathematics is vaecirc_fast/reference/threshold_encode.py.
//
// Works on products x w' of a tile of rows, so that activation, penalty, counts and gradients cost one pass.
#pragma once

#include "../common.h"

namespace vaecirc {

// In the order of vaecirc_fast/reference/threshold_encode.py.
enum class Threshold : int { relu = 0, soft = 1, jump = 2 };

struct ThresholdEncode {
    const float* pre;  // (B, M) products
    float* acts;       // (B, M)
    int64_t B, M;
    const float* bias;       // (M) or null
    const float* threshold;  // (M)
    Threshold kind;
    float* penalty;  // (B) sum of |a|
    float* l0;       // (B) number of a that are not 0
    int32_t* fired;  // (M), added to: the rows in which a > 0
    int threads;
};

struct ThresholdEncodeBackward {
    float* pre;         // (B, M): products on entry, of jump; gradients of them on return
    const float* acts;  // (B, M): of the other kinds
    int64_t B, M;
    const float* bias;       // (M) or null
    const float* threshold;  // (M)
    Threshold kind;
    float bandwidth;
    const float* grad_acts;     // (B, M) or null
    const float* grad_penalty;  // (B)
    const float* grad_l0;       // (B)
    float* grad_bias;           // (M), added to
    float* grad_threshold;      // (M), added to
    int threads;
};

// The same to the bit for any number of threads.
#define VAECIRC_DECLARE(set)                                        \
    namespace set {                                                 \
    void threshold_encode(const ThresholdEncode&);                  \
    void threshold_encode_backward(const ThresholdEncodeBackward&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
