// Activation functions and softmax on vectors, for the CPU kernel `latent_sweep`; included by it alone.
#pragma once

#include "effect_rows.h"
#include "latent_sweep.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

// e^-t - 1 for t >= 0, without cancellation near 0; NaN for NaN. As exp_negative, with 1 taken off before scaling.
INLINE vf expm1_negative(vf t) {
    constexpr float LAST = 87.33654f;
    const vf x = t > LAST ? vf{} - LAST : -t;
    const float round = 12582912.0f;  // 1.5 * 2^23
    const vf n = (x * 1.44269504f + round) - round;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = r * (1.0f / 40320) + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    const vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return p * scale + (scale - 1.0f);
}

INLINE vf activated(vf x, Activation kind, float slope) {
    switch (kind) {
        case Activation::identity: return x;
        case Activation::relu: return x < 0 ? vf{} : x;
        case Activation::leaky_relu: return x < 0 ? x * slope : x;
        case Activation::elu: {
            const vf below = expm1_negative(magnitude(x)) * slope;
            return x > 0 ? x : below;
        }
        case Activation::sigmoid: return sigmoid(x);
        case Activation::tanh: {
            const vf m = expm1_negative(2 * magnitude(x));
            const vf y = m / (m + 2);  // of -|x|
            return x > 0 ? -y : x == 0 ? x : y;
        }
        case Activation::silu: return x * sigmoid(x);
    }
    return x;
}

template <Activation KIND>
void activate_all(float* x, int64_t n, float slope) {
    for (int64_t i = 0; i < n; i += WIDTH) *(vf*)(x + i) = activated(*(const vf*)(x + i), KIND, slope);
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
    if (n >= 2 * WIDTH) {
        vf of_lanes = *(const vfu*)x;
        for (i = WIDTH; i + WIDTH <= n; i += WIDTH) {
            const vf v = *(const vfu*)(x + i);
            of_lanes = v > of_lanes ? v : of_lanes;
        }
        for (int k = 0; k < WIDTH; ++k) most = of_lanes[k] > most ? of_lanes[k] : most;
    }
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

float total(const float* x, int64_t n) {
    float sum = 0;
    int64_t i = 0;
    if (n >= 2 * WIDTH) {
        vf of_lanes = {};
        for (; i + WIDTH <= n; i += WIDTH) of_lanes += *(const vfu*)(x + i);
        for (int k = 0; k < WIDTH; ++k) sum += of_lanes[k];
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
    for (int64_t i = 0; i < P; i += WIDTH) *(vf*)(y + i) = exp_negative(*(const vf*)(y + i));
    for (int64_t s = 0; s < n_spans; ++s) {
        const int64_t from = spans[s], to = spans[s + 1];
        const float sum = total(y + from, to - from);
        for (int64_t i = from; i < to; ++i) y[i] /= sum;
    }
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
