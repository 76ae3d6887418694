// Activation functions and softmax of whole rows, for the CPU kernel `latent_sweep`; included by it alone.
#pragma once

#include "latent_sweep.h"
#include "vector_math.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

template <Activation KIND>
void activate_all(float* x, int64_t n, float slope) {
    for (int64_t i = 0; i < n; i += LANES) *(f32x16*)(x + i) = activated(*(const f32x16*)(x + i), KIND, slope);
}

// In place; x is aligned and n a multiple of LANES.
void activate(float* x, int64_t n, Activation kind, float slope) {
    switch (kind) {
        case Activation::identity: break;
        case Activation::relu: activate_all<Activation::relu>(x, n, slope); break;
        case Activation::leaky_relu: activate_all<Activation::leaky_relu>(x, n, slope); break;
        case Activation::elu: activate_all<Activation::elu>(x, n, slope); break;
        case Activation::sigmoid: activate_all<Activation::sigmoid>(x, n, slope); break;
        case Activation::tanh: activate_all<Activation::tanh>(x, n, slope); break;
        case Activation::silu: activate_all<Activation::silu>(x, n, slope); break;
    }
}

float largest(const float* x, int64_t n) {
    float most = x[0];
    int64_t i = 1;
    if (n >= 2 * LANES) {
        f32x16 of_lanes = *(const f32x16u*)x;
        for (i = LANES; i + LANES <= n; i += LANES) {
            const f32x16 v = *(const f32x16u*)(x + i);
            of_lanes = v > of_lanes ? v : of_lanes;
        }
        for (int k = 0; k < LANES; ++k) most = of_lanes[k] > most ? of_lanes[k] : most;
    }
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

float total(const float* x, int64_t n) {
    float sum = 0;
    int64_t i = 0;
    if (n >= 2 * LANES) {
        f32x16 of_lanes = {};
        for (; i + LANES <= n; i += LANES) of_lanes += *(const f32x16u*)(x + i);
        for (int k = 0; k < LANES; ++k) sum += of_lanes[k];
    }
    for (; i < n; ++i) sum += x[i];
    return sum;
}

// y = softmax of x over each span; NaN spoils its span. x and y are aligned and hold P rounded up to LANES.
void apply_softmax(const float* x, float* y, int64_t P, const int32_t* spans, int64_t n_spans) {
    for (int64_t s = 0; s < n_spans; ++s) {
        const int64_t from = spans[s], to = spans[s + 1];
        if (from == to) continue;
        const float most = largest(x + from, to - from);
        for (int64_t i = from; i < to; ++i) y[i] = most - x[i];
    }
    for (int64_t i = P; i % LANES; ++i) y[i] = 0;
    for (int64_t i = 0; i < P; i += LANES) *(f32x16*)(y + i) = exp_negative(*(const f32x16*)(y + i));
    for (int64_t s = 0; s < n_spans; ++s) {
        const int64_t from = spans[s], to = spans[s + 1];
        const float sum = total(y + from, to - from);
        for (int64_t i = from; i < to; ++i) y[i] /= sum;
    }
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
