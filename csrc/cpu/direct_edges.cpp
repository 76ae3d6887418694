// CPU kernel `direct_edges`: what each unit of a layer does to each unit of the next, in registers. See direct_edges.h.
//
// Lanes are parents: a weight row is read as it lies, a pair's child is one number for all lanes. A tile of 64 pairs x
// 64 parents stays in L1 while all children of a tile pass over it.
#include "direct_edges.h"

// The headers hold functions of whole rows that are not needed here.
#pragma GCC diagnostic ignored "-Wunused-function"

#include <string.h>

#include "activations.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t PAIRS = 64, PARENTS = 64, CHILDREN = 64;
// One register of parents, and how many at once: weights and sums stay in registers. at_least: the larger of the two,
// and x where it is NaN.
constexpr int REGISTERS = 4;
#if defined(__AVX512F__)
INLINE vf at_least(vf x, vf least) { return (vf)_mm512_max_ps((__m512)least, (__m512)x); }
#elif defined(__AVX2__)
INLINE vf at_least(vf x, vf least) { return (vf)_mm256_max_ps((__m256)least, (__m256)x); }
#elif defined(__SSE2__)
INLINE vf at_least(vf x, vf least) { return (vf)_mm_max_ps((__m128)least, (__m128)x); }
#else
INLINE vf at_least(vf x, vf least) { return least > x ? least : x; }
#endif

// Of one pair and child: c, f(c); of a ReLU c - f(c), -f(c).
struct State {
    float a, b;
};

// f(c + shift) - f(c). That of a ReLU without adding c where it is positive: nothing cancels.
template <Activation KIND>
INLINE vf difference(vf weight, vf change, State s, float slope) {
    if (KIND == Activation::relu) return at_least(weight * change + s.a, vf{} + s.b);
    return activated(weight * change + s.a, KIND, slope) - s.b;
}

template <EdgeKind OF>
INLINE vf added(vf total, vf d) {
    if (OF == EdgeKind::l1) return total + magnitude(d);
    if (OF == EdgeKind::mse) return total + d * d;
    return total + d;
}

// Sums over `n` pairs of N registers of parents; `change` has rows of PARENTS.
template <Activation KIND, EdgeKind OF, int N>
INLINE void sums(const float* change, const State* states, int64_t n, const vf* weight, float slope, vf* out) {
    vf total[N] = {};
    for (int64_t b = 0; b < n; ++b)
        for (int k = 0; k < N; ++k) {
            const vf d = *(const vf*)(change + b * PARENTS + k * WIDTH);
            total[k] = added<OF>(total[k], difference<KIND>(weight[k], d, states[b], slope));
        }
    for (int k = 0; k < N; ++k) out[k] = total[k];
}

INLINE vf finished(vf total, const DirectEdges& a) {
    total /= (float)a.B;
    if (a.kind == EdgeKind::rms)
        for (int k = 0; k < WIDTH; ++k) total[k] = __builtin_sqrtf(total[k]);
    return total;
}

// One tile of children and parents, over all pairs.
template <Activation KIND, EdgeKind OF>
void tile(const DirectEdges& a, int64_t v0, int64_t u0) {
    const int64_t children = a.V - v0 < CHILDREN ? a.V - v0 : CHILDREN;
    const int64_t parents = a.U - u0 < PARENTS ? a.U - u0 : PARENTS;
    const int64_t registers = (parents + WIDTH - 1) / WIDTH;
    alignas(64) float change[PAIRS * PARENTS];
    alignas(64) float pre[PAIRS], after[PAIRS];
    State states[PAIRS];
    for (int64_t b0 = 0; b0 < a.B; b0 += PAIRS) {
        const int64_t pairs = a.B - b0 < PAIRS ? a.B - b0 : PAIRS;
        const bool first = b0 == 0, last = b0 + PAIRS >= a.B;
        for (int64_t b = 0; b < pairs; ++b) {
            float* row = change + b * PARENTS;
            memcpy(row, a.change + (b0 + b) * a.U + u0, parents * sizeof(float));
            memset(row + parents, 0, (PARENTS - parents) * sizeof(float));
        }
        for (int64_t v = v0; v < v0 + children; ++v) {
            memcpy(pre, a.pre + v * a.B + b0, pairs * sizeof(float));
            memset(pre + pairs, 0, (PAIRS - pairs) * sizeof(float));
            for (int64_t b = 0; b < pairs; b += WIDTH)
                *(vf*)(after + b) = activated(*(const vf*)(pre + b), KIND, a.slope);
            for (int64_t b = 0; b < pairs; ++b) {
                if (KIND == Activation::relu) states[b] = {pre[b] - after[b], -after[b]};
                else states[b] = {pre[b], after[b]};
            }
            const float* weights = a.weight + v * a.U + u0;
            float* out = a.out + v * a.U + u0;
            alignas(64) float row[PARENTS] = {};
            memcpy(row, weights, parents * sizeof(float));
            vf totals[PARENTS / WIDTH];
            int64_t k = 0;
            for (; k + REGISTERS <= registers; k += REGISTERS)
                sums<KIND, OF, REGISTERS>(change + k * WIDTH, states, pairs, (const vf*)row + k, a.slope, totals + k);
            for (; k < registers; ++k)
                sums<KIND, OF, 1>(change + k * WIDTH, states, pairs, (const vf*)row + k, a.slope, totals + k);
            if (!first) {
                memcpy(row, out, parents * sizeof(float));
                for (k = 0; k < registers; ++k) totals[k] += ((const vf*)row)[k];
            }
            if (last)
                for (k = 0; k < registers; ++k) totals[k] = finished(totals[k], a);
            memcpy(out, totals, parents * sizeof(float));
        }
    }
}

template <Activation KIND, EdgeKind OF>
void all_tiles(const DirectEdges& a) {
    const int64_t across = (a.U + PARENTS - 1) / PARENTS, down = (a.V + CHILDREN - 1) / CHILDREN;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t n = 0; n < across * down; ++n) tile<KIND, OF>(a, n / across * CHILDREN, n % across * PARENTS);
}

template <Activation KIND>
void of_kind(const DirectEdges& a) {
    switch (a.kind) {
        case EdgeKind::l1: all_tiles<KIND, EdgeKind::l1>(a); break;
        case EdgeKind::mse:
        case EdgeKind::rms: all_tiles<KIND, EdgeKind::mse>(a); break;
        case EdgeKind::signed_mean: all_tiles<KIND, EdgeKind::signed_mean>(a); break;
    }
}

}  // namespace

void direct_edges(const DirectEdges& a) {
    switch (Activation(a.activation)) {
        case Activation::identity: break;
        case Activation::relu: of_kind<Activation::relu>(a); break;
        case Activation::leaky_relu: of_kind<Activation::leaky_relu>(a); break;
        case Activation::elu: of_kind<Activation::elu>(a); break;
        case Activation::sigmoid: of_kind<Activation::sigmoid>(a); break;
        case Activation::tanh: of_kind<Activation::tanh>(a); break;
        case Activation::silu: of_kind<Activation::silu>(a); break;
    }
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
