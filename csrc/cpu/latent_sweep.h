// Contract of the CPU kernel `latent_sweep`; the mathematics is vaecirc_fast/reference/latent_sweep.py.
//
// A decoder is one or more dense layers, then transposed convolutions, then a link. Everything is contiguous and float.
// Memory beyond the packed weights does not grow with J, nor, past a bound, with B: no (B, J, P) tensor is made.
// A convolution multiplies the zeros around its input too: a weight that is not finite spoils outputs at the border
// that it does not reach.
#pragma once

#include "effect_reduction.h"

namespace vaecirc {

// In the order of vaecirc_fast/reference/latent_sweep.py.
enum class SweepLink : int { identity = 0, sigmoid, softmax };

struct SweepLayer {
    int kind;  // 0 dense: weight (out, in); 1 transposed convolution: weight (in, out, kh, kw)
    int activation;
    float slope;  // of leaky_relu; elu's alpha
    const float* weight;
    const float* bias;  // (out)
    int64_t in, out, kh, kw, sh, sw, ph, pw, oph, opw;
};

struct LatentSweep {
    const float* z;          // (B, L)
    const int64_t* latents;  // (J, K) in [0, L): which latents an intervention shifts
    const float* shifts;     // (B, J, K) and by how much
    int64_t B, L, J, K;
    const SweepLayer* layers;  // dense ones first, at least one; the last has no activation
    int64_t n_layers;
    // With convolutions: the last dense layer's output is the grid (C, h, w), and outputs are the top left H x W of the
    // last canvas.
    int64_t C, h, w, H, W;
    int64_t P;              // elements of an output
    const int32_t* labels;  // (P) group in [0, G), or -1
    int64_t G;
    const int32_t* kinds;  // (E) of enum Kind
    int64_t E;
    int link;              // of enum SweepLink
    const int32_t* spans;  // (n_spans + 1) offsets of the softmaxes, from 0 to P
    int64_t n_spans;
    float* out;  // (B, J, E, G)
    int threads;
};

// False when memory ran out. Deterministic: an effect depends on its own sample and intervention alone, not on threads.
#define VAECIRC_DECLARE(set)               \
    namespace set {                        \
    bool latent_sweep(const LatentSweep&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
