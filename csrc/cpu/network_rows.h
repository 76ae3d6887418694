// What the CPU kernels `latent_sweep` and `patch_mix` share: changed rows run through a network, straight to effects.
//
// A network is dense layers, then transposed convolutions, at least one layer, then a link. Everything is contiguous
// and float. Memory beyond the packed weights does not grow with J, nor, past a bound, with B: no (B, J, P) tensor is
// made. A convolution may multiply zeros beside its input: then a weight that is not finite spoils outputs at the
// border that it does not reach.
#pragma once

#include "effect_reduction.h"

namespace vaecirc {

// In the order of vaecirc_fast/reference/latent_sweep.py.
enum class Activation : int { identity = 0, relu, leaky_relu, elu, sigmoid, tanh, silu };
enum class SweepLink : int { identity = 0, sigmoid, softmax };

struct SweepLayer {
    int kind;  // 0 dense: weight (out, in); 1 transposed convolution: weight (in, out, kh, kw)
    int activation;
    float slope;  // of leaky_relu; elu's alpha
    const float* weight;
    const float* bias;  // (out)
    int64_t in, out, kh, kw, sh, sw, ph, pw, oph, opw;
};

// What rows (b, j) pass, and where their effects go.
struct NetworkRows {
    int64_t B, J;
    const SweepLayer* layers;  // dense ones first; the last has no activation
    int64_t n_layers;
    // With convolutions: the last dense layer's output, or the input, is the grid (C, h, w), and outputs are the top
    // left H x W of the last canvas.
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
    float* outputs;  // (B, P) before the link, of the input's own rows, which then are all that is made; or null
};

// How row (b, j) differs from row b of the input: it takes `source`'s numbers where there is a source, else is shifted.
struct Changes {
    const float* input;  // (B, L)
    int64_t L;
    const int64_t* latents;  // (J, K) in [0, L); the network begins with a dense layer
    const float* shifts;     // (B, J, K)
    int64_t K;
    const float* source;     // (B, L), or null
    const int64_t* order;    // (L) elements, those of a unit side by side
    const int64_t* starts;   // (J) where unit j's begin in it
    const int64_t* stops;    // (J) and end
    const float* reference;  // (B, L): effects are against the outputs for it; null: for `input`
};

#ifdef VAECIRC_ISA  // in kernel files alone
namespace VAECIRC_ISA {
// False when memory ran out. Deterministic: an effect depends on its own sample and change alone, not on threads.
bool network_rows(const NetworkRows& of, const Changes& by);
}  // namespace VAECIRC_ISA
#endif

}  // namespace vaecirc
