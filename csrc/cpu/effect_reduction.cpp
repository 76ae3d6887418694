// CPU kernel `effect_reduction`: one pass over the perturbed outputs, no temporary of their size. See
// effect_reduction.h for the contract and effect_rows.h for how a row is reduced.
#include "effect_reduction.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "effect_rows.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t SAMPLE_BLOCKS = 8;  // partial sums over samples; fixed, so that threads change nothing
constexpr int64_t BLOCK_I = 16;       // interventions of one task when summing

struct bf16 {
    uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(double x, double* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out->bits = x != x ? 0x7fc0 : (uint16_t)rounded;
}

// n inputs as T: themselves where the type agrees, else converted into `scratch`.
template <class IN, class T>
INLINE const T* as_working(const IN* x, T* scratch, int64_t n) {
    if constexpr (sizeof(IN) == sizeof(T)) {
        (void)scratch, (void)n;
        return x;
    } else {
        for (int64_t j = 0; j < n; ++j) scratch[j] = widen(x[j]);
        return scratch;
    }
}

// One thread's memory.
template <class T>
struct Worker {
    T* base_raw;  // (P) the base row as T
    T* base;      // (P) and after the link
    T* tile_raw;  // (TILE) a piece of the perturbed row as T
    T* tile;      // (TILE) and after the link
    T* slots;     // a row's state, for Reducer
    double* sums;
    void* memory;
};

template <class T>
bool make_worker(Worker<T>& w, int64_t P, const Reducer<T>& reducer) {
    const int64_t row = (P + 2 * LANES) / LANES * LANES;
    const int64_t elements = 2 * row + 2 * TILE + reducer.slot_elements();
    const int64_t bytes = elements * sizeof(T) + reducer.sum_elements() * sizeof(double);
    if (posix_memalign(&w.memory, 128, bytes + 128) != 0) {
        w.memory = nullptr;
        return false;
    }
    T* next = (T*)w.memory;
    w.slots = next, next += reducer.slot_elements();
    w.tile_raw = next, next += TILE;
    w.tile = next, next += TILE;
    w.base_raw = next, next += row;
    w.base = next, next += row;
    w.sums = (double*)(((uintptr_t)next + 7) / 8 * 8);
    return true;
}

template <class IN, class T>
struct Forward {
    const EffectReduction& args;
    const Reducer<T>& reducer;
    const T* base_raw = nullptr;
    const T* base = nullptr;

    bool linked() const { return args.link == Link::sigmoid && reducer.mask; }

    void take_base(int64_t b, Worker<T>& w) {
        base_raw = as_working((const IN*)args.base + b * args.P, w.base_raw, args.P);
        base = base_raw;
        if (linked()) {
            apply_sigmoid(base_raw, w.base, args.P);
            base = w.base;
        }
    }

    // Leaves the sums of row (b, i) in w.sums.
    void row(int64_t b, int64_t i, Worker<T>& w) {
        const IN* perturbed = (const IN*)args.perturbed + (b * args.I + i) * args.P;
        reducer.clear(w.slots, w.sums);
        for (int64_t p = 0; p < args.P; p += TILE) {
            const int64_t n = args.P - p < TILE ? args.P - p : TILE;
            const T* y_raw = as_working(perturbed + p, w.tile_raw, n);
            const T* y = y_raw;
            if (linked()) {
                apply_sigmoid(y_raw, w.tile, n);
                y = w.tile;
            }
            reducer.add(base_raw + p, base + p, y_raw, y, p, n, w.slots, w.sums);
        }
        reducer.finish(w.slots, w.sums);
    }

    void rows(int64_t from, int64_t to, Worker<T>& w) {
        T* out = (T*)args.out;
        int64_t current = -1;
        for (int64_t r = from; r < to; ++r) {
            const int64_t b = r / args.I;
            if (b != current) take_base(b, w), current = b;
            row(b, r % args.I, w);
            for (int64_t e = 0; e < args.E; ++e)
                for (int64_t g = 0; g < args.G; ++g)
                    out[(r * args.E + e) * args.G + g] = (T)reducer.effect(args.kinds[e], g, w.sums);
        }
    }

    // Task t of (sample blocks) x (intervention blocks): adds effects over its samples into partial (SAMPLE_BLOCKS, I,
    // E, G).
    void sum_task(int64_t t, int64_t blocks, double* partial, Worker<T>& w) {
        const int64_t block = t % blocks, first = t / blocks * BLOCK_I;
        const int64_t last = first + BLOCK_I < args.I ? first + BLOCK_I : args.I;
        for (int64_t b = args.B * block / blocks; b < args.B * (block + 1) / blocks; ++b) {
            take_base(b, w);
            for (int64_t i = first; i < last; ++i) {
                row(b, i, w);
                double* out = partial + (block * args.I + i) * args.E * args.G;
                for (int64_t e = 0; e < args.E; ++e)
                    for (int64_t g = 0; g < args.G; ++g)
                        out[e * args.G + g] += reducer.effect(args.kinds[e], g, w.sums);
            }
        }
    }
};

template <class IN, class T>
bool forward(const EffectReduction& args) {
    Plan plan;
    if (!make_plan(plan, args.labels, args.P, args.G)) return false;
    const Reducer<T> reducer(plan, args.labels, args.G, args.kinds, args.E);
    const int64_t blocks = args.B < SAMPLE_BLOCKS ? args.B : SAMPLE_BLOCKS;
    const int64_t outputs = args.I * args.E * args.G;
    double* partial = nullptr;
    bool ok = true;
    if (args.sum) {
        partial = (double*)calloc(blocks * outputs + 1, sizeof(double));
        ok = partial != nullptr;
    }
    const int64_t tasks = args.sum ? blocks * ((args.I + BLOCK_I - 1) / BLOCK_I) : args.B * args.I;
    const int threads = args.threads < tasks ? args.threads : (tasks > 0 ? (int)tasks : 1);
    if (ok) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
            Worker<T> worker;
            if (!make_worker(worker, args.P, reducer)) {
#pragma omp atomic write
                ok = false;
            } else {
                Forward<IN, T> job{args, reducer};
                const int64_t from = tasks * me / n, to = tasks * (me + 1) / n;
                if (args.sum)
                    for (int64_t t = from; t < to; ++t) job.sum_task(t, blocks, partial, worker);
                else job.rows(from, to, worker);
            }
            free(worker.memory);
        }
    }
    if (ok && args.sum)
        for (int64_t o = 0; o < outputs; ++o) {
            double total = 0;
            for (int64_t block = 0; block < blocks; ++block) total += partial[block * outputs + o];
            ((T*)args.out)[o] = (T)total;
        }
    free(partial);
    free_plan(plan);
    return ok;
}

// Adds factor[label] * value to gradient, for one kind of factor over a tile. A factor of zero adds nothing, whatever
// the value: the kind is not wanted there, and its NaN or infinity must not reach the gradient of another.
#define ADD_FACTOR(k, value)                             \
    if (used[k]) {                                       \
        const T* f = factors + k * args.G;               \
        for (int64_t j = 0; j < n; ++j) {                \
            const T factor = f[group[j]];                \
            const T product = factor * (value);          \
            gradient[j] += factor == 0 ? (T)0 : product; \
        }                                                \
    }

// A gradient of the sigmoid y taken back to its logit; of zero it is zero, also where y is NaN.
template <class T>
INLINE T through_link(T gradient, T y) {
    const T product = gradient * y * (1 - y);
    return gradient == 0 ? (T)0 : product;
}

// The gradients of one tile of P for one sample: all interventions, summed into the base's.
template <class IN, class T>
void backward_tile(const EffectReductionBackward& args, const bool used[4], int64_t b, int64_t p) {
    const int64_t n = args.P - p < TILE ? args.P - p : TILE;
    const bool linked = args.link == Link::sigmoid;
    alignas(128) T base_raw_scratch[TILE], base_linked[TILE], raw_scratch[TILE], linked_scratch[TILE];
    alignas(128) T gradient[TILE], raw_gradient[TILE], base_gradient[TILE], base_raw_gradient[TILE];
    int32_t group[TILE];
    for (int64_t j = 0; j < n; ++j) group[j] = args.labels[p + j] < 0 ? 0 : args.labels[p + j];
    const T* base_raw = as_working((const IN*)args.base + b * args.P + p, base_raw_scratch, n);
    const T* base = base_raw;
    if (linked) apply_sigmoid(base_raw, base_linked, n), base = base_linked;
    memset(base_gradient, 0, sizeof base_gradient);
    memset(base_raw_gradient, 0, sizeof base_raw_gradient);
    for (int64_t i = 0; i < args.I; ++i) {
        const int64_t row = (b * args.I + i) * args.P + p;
        const T* raw = as_working((const IN*)args.perturbed + row, raw_scratch, n);
        const T* y = raw;
        if (linked) apply_sigmoid(raw, linked_scratch, n), y = linked_scratch;
        const T* factors = (const T*)args.factors + b * args.factors_stride + i * 4 * args.G;
        memset(gradient, 0, sizeof gradient);
        ADD_FACTOR(0, y[j] > base[j] ? (T)1 : y[j] < base[j] ? (T)-1 : (y[j] - base[j]) * 0)
        ADD_FACTOR(1, y[j] - base[j])
        ADD_FACTOR(2, (T)1)
        memset(raw_gradient, 0, sizeof raw_gradient);
        {
            T* const gradient = raw_gradient;
            ADD_FACTOR(3, raw[j] - base_raw[j])
        }
        IN* out = (IN*)args.grad_perturbed + row;
        for (int64_t j = 0; j < n; ++j) {
            const bool in = args.labels[p + j] >= 0;
            const T g = in ? gradient[j] : 0, r = in ? raw_gradient[j] : 0;
            base_gradient[j] += g;
            base_raw_gradient[j] += r;
            narrow(r + (linked ? through_link(g, y[j]) : g), out + j);
        }
    }
    IN* out = (IN*)args.grad_base + b * args.P + p;
    for (int64_t j = 0; j < n; ++j) {
        const T g = linked ? through_link(base_gradient[j], base[j]) : base_gradient[j];
        narrow(-g - base_raw_gradient[j], out + j);
    }
}

template <class IN, class T>
bool backward(const EffectReductionBackward& args) {
    if (args.B == 0) return true;  // without samples there may be no factors to look at
    // A kind whose factors are all zero is skipped: usually three of the four.
    bool used[4] = {};
    const int64_t samples = args.factors_stride ? args.B : 1;
    for (int64_t r = 0; r < samples * args.I; ++r)
        for (int k = 0; k < 4; ++k) {
            const T* f = (const T*)args.factors + (r * 4 + k) * args.G;
            for (int64_t g = 0; g < args.G && !used[k]; ++g) used[k] = !(f[g] == 0);
        }
    const int64_t tiles = (args.P + TILE - 1) / TILE, tasks = args.B * tiles;
    const int threads = args.threads < tasks ? args.threads : (tasks > 0 ? (int)tasks : 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tasks; ++t) backward_tile<IN, T>(args, used, t / tiles, t % tiles * TILE);
    return true;
}

}  // namespace

bool effect_reduction(const EffectReduction& args) {
    switch (args.dtype) {
        case DType::f32: return forward<float, float>(args);
        case DType::f64: return forward<double, double>(args);
        case DType::bf16: return forward<bf16, float>(args);
    }
    return false;
}

bool effect_reduction_backward(const EffectReductionBackward& args) {
    switch (args.dtype) {
        case DType::f32: return backward<float, float>(args);
        case DType::f64: return backward<double, double>(args);
        case DType::bf16: return backward<bf16, float>(args);
    }
    return false;
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
