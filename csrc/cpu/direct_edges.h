// Contract of the CPU kernel `direct_edges`; the mathematics is vaecirc_fast/reference/direct_edges.py.
//
// Everything is contiguous and float. Works in tiles of 64 parents, 64 children and 64 pairs, so no (B, U, V) tensor is
// made and no memory is asked for. NaN spoils the edges that it enters.
#pragma once

#include "../common.h"

namespace vaecirc {

// In the order of vaecirc_fast/reference/direct_edges.py.
enum class EdgeKind : int { l1 = 0, mse = 1, rms = 2, signed_mean = 3 };

struct DirectEdges {
    const float* change;  // (B, U) source less base activations of the parents
    const float* weight;  // (V, U)
    const float* pre;     // (V, B) pre-activations of the children
    int64_t B, U, V;      // B > 0
    int activation;       // of enum Activation, other than identity
    float slope;          // of leaky_relu; elu's alpha
    EdgeKind kind;
    float* out;  // (V, U)
    int threads;
};

// The same to the bit for any number of threads.
#define VAECIRC_DECLARE(set)               \
    namespace set {                        \
    void direct_edges(const DirectEdges&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
