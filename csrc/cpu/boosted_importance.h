// Contract of the CPU kernel `boosted_importance`; the mathematics is vaecirc_fast/reference/boosted_importance.py.
//
// Gradient-boosted trees of depth 3, `rounds` of them for each class of each factor (one a round where there are two
// classes). Trees of a round do not depend on one another, so eight of them, of any factors, are grown at once: the
// lanes of a vector.
#pragma once

#include "../common.h"

namespace vaecirc {

struct BoostedImportance {
    const float* x;        // (N, L) codes, finite
    const int32_t* order;  // (L, N) samples by rising code
    int64_t N, L;
    const int32_t* labels;   // (K, N) in [0, classes[k])
    const int64_t* classes;  // (K) at least 2, each of which occurs
    int64_t K;
    const uint64_t* keys;  // (K) of the order in which latents win ties
    const double* prior;  // (trees) of the first round, log of a class's share, of two classes log(share / other share)
    const float* x_test;  // (T, L) codes, finite
    int64_t T;
    int64_t rounds;
    double* reduction;   // (K, L) sum over trees of how much squared error the splits on a latent take away
    int32_t* fitted;     // (K, N) predicted classes
    int32_t* predicted;  // (K, T)
    int threads;
};

// False where memory is missing: 128 (N + T / 2) bytes for eight trees of a round and 67 N for each thread.
#define VAECIRC_DECLARE(set)                           \
    namespace set {                                    \
    bool boosted_importance(const BoostedImportance&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
