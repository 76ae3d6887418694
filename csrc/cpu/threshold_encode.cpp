// CPU kernel `threshold_encode`: activation and counts, and their gradients, in one pass over a tile of products. See
// threshold_encode.h.
//
// Where sums over rows are made, threads share the latents and not the rows: they are then added in the order of rows.
#include "threshold_encode.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t BLOCK = 512;  // latents whose bias, threshold and sums stay in L1

INLINE f32x16 load(const float* p) { return *(const f32x16u*)p; }
INLINE void store(float* p, f32x16 v) { *(f32x16u*)p = v; }
INLINE f32x16 vabs(f32x16 x) { return (f32x16)((i32x16)x & 0x7fffffff); }
INLINE f32x16 select(i32x16 mask, f32x16 x) { return (f32x16)(mask & (i32x16)x); }

INLINE float sum(f32x16 v) {
    float s = 0;
    for (int k = 0; k < LANES; ++k) s += v[k];
    return s;
}

// Lanes where the activation is not 0 or is NaN: `pre <= limit` is false for NaN.
template <Threshold KIND>
INLINE i32x16 active(f32x16 pre, f32x16 limit) {
    return ~((KIND == Threshold::soft ? vabs(pre) : pre) <= limit) & (pre != 0);
}

template <Threshold KIND>
INLINE f32x16 activation(f32x16 pre, f32x16 limit, i32x16 on) {
    if (KIND == Threshold::soft) pre -= (f32x16)((i32x16)limit | ((i32x16)pre & (int32_t)0x80000000));
    return select(on, pre);
}

template <Threshold KIND>
INLINE f32x16 limit_of(f32x16 threshold) {
    if (KIND == Threshold::relu) return select(threshold > 0, threshold);
    return threshold;
}

// The last columns of a row, fewer than LANES, in a vector; the others are 0.
INLINE f32x16 load_part(const float* p, int64_t n) {
    f32x16 v = {};
    for (int64_t k = 0; k < n; ++k) v[k] = p[k];
    return v;
}
INLINE void store_part(float* p, f32x16 v, int64_t n) {
    for (int64_t k = 0; k < n; ++k) p[k] = v[k];
}

template <Threshold KIND>
void forward(const ThresholdEncode& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t r = 0; r < a.B; ++r) {
        const float* products = a.pre + r * a.M;
        float* acts = a.acts + r * a.M;
        f32x16 penalty = {};
        i32x16 count = {};
        for (int64_t m = 0; m < a.M; m += LANES) {
            const int64_t n = a.M - m < LANES ? a.M - m : LANES;
            const bool whole = n == LANES;
            f32x16 pre = whole ? load(products + m) : load_part(products + m, n);
            if (a.bias) pre += whole ? load(a.bias + m) : load_part(a.bias + m, n);
            const f32x16 limit = limit_of<KIND>(whole ? load(a.threshold + m) : load_part(a.threshold + m, n));
            const i32x16 on = active<KIND>(pre, limit);
            const f32x16 act = activation<KIND>(pre, limit, on);
            penalty += vabs(act);
            count -= on;
            if (whole) store(acts + m, act);
            else store_part(acts + m, act, n);
        }
        a.penalty[r] = sum(penalty);
        int32_t total = 0;
        for (int k = 0; k < LANES; ++k) total += count[k];
        a.l0[r] = (float)total;
    }
    const int64_t blocks = (a.M + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * BLOCK, to = from + BLOCK < a.M ? from + BLOCK : a.M;
        for (int64_t r = 0; r < a.B; ++r) {
            const float* acts = a.acts + r * a.M;
            for (int64_t m = from; m < to; ++m) a.fired[m] += acts[m] > 0;
        }
    }
}

template <Threshold KIND>
void backward(const ThresholdEncodeBackward& a) {
    const int64_t blocks = (a.M + BLOCK - 1) / BLOCK;
    const float inverse = 1 / a.bandwidth;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * BLOCK, to = from + BLOCK < a.M ? from + BLOCK : a.M;
        for (int64_t r = 0; r < a.B; ++r) {
            float* row = a.pre + r * a.M;
            const float* from_row = KIND == Threshold::jump ? row : a.acts + r * a.M;
            const float* grad = a.grad_acts ? a.grad_acts + r * a.M : nullptr;
            const f32x16 of_penalty = f32x16{} + a.grad_penalty[r], of_l0 = f32x16{} + a.grad_l0[r];
            for (int64_t m = from; m < to; m += LANES) {
                const int64_t n = to - m < LANES ? to - m : LANES;
                const bool whole = n == LANES;
                // The pre-activation, or the activation, whose sign is the same.
                f32x16 value = whole ? load(from_row + m) : load_part(from_row + m, n);
                f32x16 threshold = {};
                if (KIND == Threshold::jump) {
                    if (a.bias) value += whole ? load(a.bias + m) : load_part(a.bias + m, n);
                    threshold = whole ? load(a.threshold + m) : load_part(a.threshold + m, n);
                }
                i32x16 on = value != 0;
                if (KIND == Threshold::jump) on &= ~(value <= threshold);
                const f32x16 sign = select(value != 0, (f32x16)(((i32x16)value & (int32_t)0x80000000) | 0x3f800000));
                f32x16 through = of_penalty * sign;
                if (grad) through += whole ? load(grad + m) : load_part(grad + m, n);
                const f32x16 of_pre = select(on, through);
                f32x16 of_threshold = {};
                if (KIND == Threshold::soft) of_threshold = -of_pre * sign;
                if (KIND == Threshold::jump)
                    of_threshold = select(vabs((value - threshold) / a.bandwidth) < 0.5f,
                                          (threshold * through + of_l0) * -inverse);
                if (whole) {
                    store(row + m, of_pre);
                    store(a.grad_bias + m, load(a.grad_bias + m) + of_pre);
                    if (KIND != Threshold::relu) store(a.grad_threshold + m, load(a.grad_threshold + m) + of_threshold);
                } else {
                    store_part(row + m, of_pre, n);
                    store_part(a.grad_bias + m, load_part(a.grad_bias + m, n) + of_pre, n);
                    store_part(a.grad_threshold + m, load_part(a.grad_threshold + m, n) + of_threshold, n);
                }
            }
        }
    }
}

}  // namespace

void threshold_encode(const ThresholdEncode& a) {
    switch (a.kind) {
        case Threshold::relu: forward<Threshold::relu>(a); break;
        case Threshold::soft: forward<Threshold::soft>(a); break;
        case Threshold::jump: forward<Threshold::jump>(a); break;
    }
}

void threshold_encode_backward(const ThresholdEncodeBackward& a) {
    switch (a.kind) {
        case Threshold::relu: backward<Threshold::relu>(a); break;
        case Threshold::soft: backward<Threshold::soft>(a); break;
        case Threshold::jump: backward<Threshold::jump>(a); break;
    }
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
