// Contract of the CPU kernel `tc_logsumexp`; the mathematics is vaecirc_fast/reference/tc_logsumexp.py.
//
// Works in units of log 2 on parameters that lie latent by latent: with K = sqrt(log2(e) / 2), the log density of code
// b under posterior m in latent l is constant[l, m] - ((z[b, l] - mean[l, m]) scale[l, m])^2. Rows of M posteriors are
// padded to `stride`, a multiple of LANES, with mean 0, scale 0 and constant -infinity. No (B, M) array is made: the
// memory asked for is some tiles a thread and, in the gradient, PARTS (B, L) sums.
#pragma once

#include "../common.h"

namespace vaecirc {

struct TcLogsumexp {
    DType dtype;           // f32 or f64, of all arrays
    const void* z;         // (B, L)
    const void* mean;      // (L, stride)
    const void* scale;     // (L, stride) K / sigma
    const void* constant;  // (L, stride) -log2(e) (logvar + log(2 pi)) / 2
    int64_t B, M, L, stride;
    double own, other;  // log2 of the weights: of posterior b for code b, and of all others; own <= other
    void* joint;        // (B) natural logarithms
    void* marginals;    // (B, L)
    int threads;
};

struct TcLogsumexpBackward {
    TcLogsumexp of;              // joint and marginals are read
    const void* grad_joint;      // (B)
    const void* grad_marginals;  // (B, L)
    void* grad_z;                // (B, L)
    void* grad_mean;             // (L, stride) of the means
    void* grad_logvar;           // (L, stride)
};

// Both return false when memory ran out. The same to the bit for any number of threads.
#define VAECIRC_DECLARE(set)                                \
    namespace set {                                         \
    bool tc_logsumexp(const TcLogsumexp&);                  \
    bool tc_logsumexp_backward(const TcLogsumexpBackward&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
