// CPU kernel `effect_reduction`: one pass over the perturbed outputs, no temporary of their size. See
// effect_reduction.h.
//
// A row (one perturbed output) is cut into chunks of 16 elements. Chunks with the same 16 labels share a slot: a vector
// accumulator that stays in L1. Images cut into cells have few slots, so the loop is pure vertical additions, and
// labels are looked at only once a row, when lanes are added to their groups. A partition with too many slots (an
// arbitrary one) is scattered element by element instead.
#include "effect_reduction.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t TILE = 1024;        // elements converted at once; a multiple of LANES
constexpr int64_t MAX_SLOTS = 256;    // 16 KB of float accumulators: half of L1
constexpr int64_t PREFETCH = 1024;    // elements ahead: the hardware stops at each 4 KB page
constexpr int64_t SAMPLE_BLOCKS = 8;  // partial sums over samples; fixed, so that threads change nothing
constexpr int64_t BLOCK_I = 16;       // interventions of one task when summing

struct bf16 {
    uint16_t bits;
};

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef f32x16 type;
    typedef f32x16u unaligned;
    typedef i32x16 bits;
    static constexpr int32_t ABS = 0x7fffffff;
};
typedef int64_t i64x16 __attribute__((vector_size(128)));
template <>
struct Vector<double> {
    typedef f64x16 type;
    typedef f64x16u unaligned;
    typedef i64x16 bits;
    static constexpr int64_t ABS = 0x7fffffffffffffff;
};

template <class T>
INLINE typename Vector<T>::type vabs(typename Vector<T>::type x) {
    typedef typename Vector<T>::bits bits;
    return (typename Vector<T>::type)((bits)x & Vector<T>::ABS);
}

// e^-t for t >= 0; 0 beyond the normal range, NaN for NaN. Cody-Waite reduction and Taylor polynomial; < 2 ulp.
INLINE f32x16 exp_negative(f32x16 t) {
    constexpr float LAST = 87.33654f;  // e^-t is the smallest normal number
    const f32x16 x = t > LAST ? f32x16{} - LAST : -t;
    const float round = 12582912.0f;  // 1.5 * 2^23
    const f32x16 n = (x * 1.44269504f + round) - round;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const i32x16 scale = (__builtin_convertvector(n, i32x16) + 127) << 23;
    const f32x16 e = p * (f32x16)scale;
    return t > LAST ? f32x16{} : e;
}

INLINE f64x16 exp_negative(f64x16 t) {
    constexpr double LAST = 708.3964185322641;
    const f64x16 x = t > LAST ? f64x16{} - LAST : -t;
    const double round = 6755399441055744.0;  // 1.5 * 2^52
    const f64x16 n = (x * 1.4426950408889634 + round) - round;
    const f64x16 r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    f64x16 p = f64x16{} + 1.0 / 6227020800.0;
    const double inverse_factorial[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    for (double c : inverse_factorial) p = p * r + c;
    const i64x16 scale = (__builtin_convertvector(n, i64x16) + 1023) << 52;
    const f64x16 e = p * (f64x16)scale;
    return t > LAST ? f64x16{} : e;
}

template <class T>
INLINE typename Vector<T>::type sigmoid(typename Vector<T>::type x) {
    const typename Vector<T>::type e = exp_negative(vabs<T>(x));
    const typename Vector<T>::type s = (T)1 / (e + (T)1);
    return x < (T)0 ? e * s : s;
}

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

template <class T>
void apply_sigmoid(const T* x, T* y, int64_t n) {
    typedef typename Vector<T>::type V;
    typedef typename Vector<T>::unaligned U;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        const V s = sigmoid<T>(*(const U*)(x + j));
        *(U*)(y + j) = s;
    }
    if (j < n) {
        T tail[LANES] = {};
        memcpy(tail, x + j, (n - j) * sizeof(T));
        const V s = sigmoid<T>(*(const U*)tail);
        *(U*)tail = s;
        memcpy(y + j, tail, (n - j) * sizeof(T));
    }
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

// Whole chunks of one tile whose slots repeat with a period of 1, 2 or 4 chunks, as the rows of an image do; 0: no
// period.
struct Segment {
    int64_t chunk, chunks;
    int period;
};

// The partition, prepared for rows: which slot each chunk adds to, and which group each lane of a slot belongs to.
struct Plan {
    int64_t chunks;          // ceil(P / LANES); the last may be partial
    Segment* segments;       // of all tiles, then one that ends the list
    int64_t* first_segment;  // (tiles)
    int32_t* slot;           // (chunks), or null: scatter
    int64_t slots;
    int folds;          // so many times, neighbouring lanes of every slot belong together and can be added up
    int32_t* position;  // (entries) index into a slot accumulator ...
    int32_t* group;     // ... and the group it belongs to
    int64_t entries;
    double* inverse_size;  // (G) 1 / elements of the group
};

void free_plan(Plan& plan) {
    free(plan.segments);
    free(plan.first_segment);
    free(plan.slot);
    free(plan.position);
    free(plan.group);
    free(plan.inverse_size);
}

void find_segments(Plan& plan, int64_t P) {
    const int64_t whole = P / LANES, per_tile = TILE / LANES;
    int64_t count = 0;
    for (int64_t c = 0; c < whole;) {
        const int64_t end = c - c % per_tile + per_tile < whole ? c - c % per_tile + per_tile : whole;
        if (c % per_tile == 0) plan.first_segment[c / per_tile] = count;
        Segment best = {c, 1, 0};
        for (int period = 1; period <= 4; period *= 2) {
            int64_t n = period;
            while (c + n < end && plan.slot[c + n] == plan.slot[c + n - period]) ++n;
            n -= n % period;
            if (c + n <= end && n >= 3 * period && n > best.chunks) best = {c, n, period};
        }
        if (best.period == 0 && count > 0 && plan.segments[count - 1].period == 0 && c % per_tile != 0)
            plan.segments[count - 1].chunks += 1;
        else plan.segments[count++] = best;
        c += best.chunks;
    }
    if (whole % per_tile == 0) plan.first_segment[whole / per_tile] = count;
    plan.segments[count] = {whole + per_tile, 0, 0};
}

bool make_plan(Plan& plan, const int32_t* labels, int64_t P, int64_t G) {
    memset(&plan, 0, sizeof plan);
    plan.chunks = (P + LANES - 1) / LANES;
    constexpr int64_t TABLE = 4 * MAX_SLOTS;
    int32_t table[TABLE];
    memset(table, -1, sizeof table);
    int32_t* pattern = (int32_t*)malloc(MAX_SLOTS * LANES * sizeof(int32_t));
    plan.segments = (Segment*)malloc((plan.chunks + 1) * sizeof(Segment));
    plan.first_segment = (int64_t*)malloc((P / TILE + 1) * sizeof(int64_t));
    plan.slot = (int32_t*)malloc((plan.chunks + 1) * sizeof(int32_t));
    plan.position = (int32_t*)malloc(MAX_SLOTS * LANES * sizeof(int32_t));
    plan.group = (int32_t*)malloc(MAX_SLOTS * LANES * sizeof(int32_t));
    plan.inverse_size = (double*)calloc(G + 1, sizeof(double));
    if (!pattern || !plan.segments || !plan.first_segment || !plan.slot || !plan.position || !plan.group ||
        !plan.inverse_size) {
        free(pattern);
        free_plan(plan);
        return false;
    }
    for (int64_t p = 0; p < P; ++p)
        if (labels[p] >= 0) plan.inverse_size[labels[p]] += 1;
    for (int64_t g = 0; g < G; ++g) plan.inverse_size[g] = 1 / plan.inverse_size[g];

    bool fits = true;
    for (int64_t c = 0; c < plan.chunks && fits; ++c) {
        int32_t lanes[LANES];
        uint32_t hash = 0;
        for (int k = 0; k < LANES; ++k) {
            const int64_t p = c * LANES + k;
            lanes[k] = labels[p < P ? p : P - 1];  // padding differs by 0 and may join any group
            hash = (hash ^ (uint32_t)lanes[k]) * 0x9E3779B1u;
        }
        int64_t h = (hash >> 16) % TABLE;
        while (table[h] >= 0 && memcmp(pattern + table[h] * LANES, lanes, sizeof lanes) != 0) h = (h + 1) % TABLE;
        if (table[h] < 0) {
            if (plan.slots == MAX_SLOTS) {
                fits = false;
                break;
            }
            table[h] = (int32_t)plan.slots;
            memcpy(pattern + plan.slots++ * LANES, lanes, sizeof lanes);
        }
        plan.slot[c] = table[h];
    }
    if (fits) {
        find_segments(plan, P);
        plan.folds = 4;
        for (int64_t s = 0; s < plan.slots; ++s)
            for (int k = 0; k < LANES; ++k)
                while (pattern[s * LANES + k] != pattern[s * LANES + (k >> plan.folds << plan.folds)]) --plan.folds;
        // Lane by lane, so that neighbouring entries seldom add to the same group and do not wait for each other.
        for (int k = 0; k < LANES; k += 1 << plan.folds)
            for (int64_t s = 0; s < plan.slots; ++s)
                if (pattern[s * LANES + k] >= 0) {
                    plan.position[plan.entries] = (int32_t)(s * LANES + k);
                    plan.group[plan.entries++] = pattern[s * LANES + k];
                }
    } else {
        free(plan.slot);
        plan.slot = nullptr;
        plan.slots = 0;
    }
    free(pattern);
    return true;
}

enum Sum : int { ABS = 1, SQUARE = 2, PLAIN = 4 };  // of dy
constexpr int SUMS = 4;                             // the fourth: the squared raw difference

INLINE int sum_of(int kind) {
    const int index[N_KINDS] = {0, 1, 1, 3, 0, 2};
    return index[kind];
}

// Adds the sums in MASK of y - b over the chunks of one segment to their slots. Q > 0: the segment repeats Q slots,
// which stay in registers; Q = 0: any slots, through memory.
template <class T, int MASK, int Q>
INLINE void add_segment(const int32_t* slot, const T* b, const T* y, int64_t chunks, T* const slots[3]) {
    typedef typename Vector<T>::type V;
    typedef typename Vector<T>::unaligned U;
    constexpr int N = Q > 0 ? Q : 1;
    V abs[N] = {}, square[N] = {}, plain[N] = {};
    for (int64_t c = 0; c < chunks; c += N)
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) {
            const T* here = y + (c + q) * LANES;
            __builtin_prefetch(here + PREFETCH);
            const V d = *(const U*)here - *(const U*)(b + (c + q) * LANES);
            if (Q > 0) {
                if (MASK & ABS) abs[q] += vabs<T>(d);
                if (MASK & SQUARE) square[q] += d * d;
                if (MASK & PLAIN) plain[q] += d;
            } else {
                const int64_t s = slot[c] * LANES;
                if (MASK & ABS) *(V*)(slots[0] + s) += vabs<T>(d);
                if (MASK & SQUARE) *(V*)(slots[1] + s) += d * d;
                if (MASK & PLAIN) *(V*)(slots[2] + s) += d;
            }
        }
    if (Q > 0)
        for (int q = 0; q < N; ++q) {
            const int64_t s = slot[q] * LANES;
            if (MASK & ABS) *(V*)(slots[0] + s) += abs[q];
            if (MASK & SQUARE) *(V*)(slots[1] + s) += square[q];
            if (MASK & PLAIN) *(V*)(slots[2] + s) += plain[q];
        }
}

// The same over n elements, a whole tile or the row's last part, the first of which starts chunk `chunk`.
template <class T, int MASK>
void add_tile(const Plan& plan, const T* b, const T* y, int64_t chunk, int64_t n, T* const slots[3]) {
    typedef typename Vector<T>::type V;
    const int64_t whole = n / LANES;
    for (const Segment* s = plan.segments + plan.first_segment[chunk * LANES / TILE]; s->chunk < chunk + whole; ++s) {
        const int64_t at = (s->chunk - chunk) * LANES;
        const int32_t* slot = plan.slot + s->chunk;
        switch (s->period) {
            case 1: add_segment<T, MASK, 1>(slot, b + at, y + at, s->chunks, slots); break;
            case 2: add_segment<T, MASK, 2>(slot, b + at, y + at, s->chunks, slots); break;
            case 4: add_segment<T, MASK, 4>(slot, b + at, y + at, s->chunks, slots); break;
            default: add_segment<T, MASK, 0>(slot, b + at, y + at, s->chunks, slots);
        }
    }
    if (whole * LANES < n) {
        alignas(128) T tail_b[LANES] = {}, tail_y[LANES] = {};
        memcpy(tail_b, b + whole * LANES, (n - whole * LANES) * sizeof(T));
        memcpy(tail_y, y + whole * LANES, (n - whole * LANES) * sizeof(T));
        const V d = *(const V*)tail_y - *(const V*)tail_b;
        const int64_t s = plan.slot[chunk + whole] * LANES;
        if (MASK & ABS) *(V*)(slots[0] + s) += vabs<T>(d);
        if (MASK & SQUARE) *(V*)(slots[1] + s) += d * d;
        if (MASK & PLAIN) *(V*)(slots[2] + s) += d;
    }
}

template <class T, int MASK>
void scatter(const int32_t* labels, const T* b, const T* y, int64_t n, double* const sums[3]) {
    for (int64_t j = 0; j < n; ++j) {
        const int32_t g = labels[j];
        if (g < 0) continue;
        const double d = (double)(y[j] - b[j]);
        if (MASK & ABS) sums[0][g] += d < 0 ? -d : d;
        if (MASK & SQUARE) sums[1][g] += d * d;
        if (MASK & PLAIN) sums[2][g] += d;
    }
}

#define FOR_MASK(mask, call)    \
    switch (mask) {             \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
    }

// One thread's memory.
template <class T>
struct Worker {
    T* base_raw;   // (P) the base row as T
    T* base;       // (P) and after the link
    T* tile_raw;   // (TILE) a piece of the perturbed row as T
    T* tile;       // (TILE) and after the link
    T* slots;      // (SUMS, slots, LANES)
    double* sums;  // (SUMS, G)
    void* memory;
};

template <class T>
bool make_worker(Worker<T>& w, int64_t P, int64_t slots, int64_t G) {
    const int64_t row = (P + 2 * LANES) / LANES * LANES;
    const int64_t elements = 2 * row + 2 * TILE + SUMS * slots * LANES;
    const int64_t bytes = elements * sizeof(T) + SUMS * G * sizeof(double);
    if (posix_memalign(&w.memory, 128, bytes + 128) != 0) {
        w.memory = nullptr;
        return false;
    }
    T* next = (T*)w.memory;
    w.slots = next, next += SUMS * slots * LANES;
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
    const Plan& plan;
    int mask;  // of Sum
    bool raw;  // the squared raw difference is wanted too

    Forward(const EffectReduction& a, const Plan& p) : args(a), plan(p), mask(0), raw(false) {
        for (int64_t e = 0; e < a.E; ++e) {
            const int s = sum_of(a.kinds[e]);
            if (s == 3) raw = true;
            else mask |= 1 << s;
        }
    }

    const T* base_raw = nullptr;
    const T* base = nullptr;

    void take_base(int64_t b, Worker<T>& w) {
        base_raw = as_working((const IN*)args.base + b * args.P, w.base_raw, args.P);
        base = base_raw;
        if (args.link == Link::sigmoid && mask) {
            apply_sigmoid(base_raw, w.base, args.P);
            base = w.base;
        }
    }

    // Leaves the sums of row (b, i) in w.sums.
    void row(int64_t b, int64_t i, Worker<T>& w) {
        const IN* perturbed = (const IN*)args.perturbed + (b * args.I + i) * args.P;
        memset(w.slots, 0, SUMS * plan.slots * LANES * sizeof(T));
        memset(w.sums, 0, SUMS * args.G * sizeof(double));
        T* slots[SUMS];
        double* sums[SUMS];
        for (int s = 0; s < SUMS; ++s) {
            slots[s] = w.slots + s * plan.slots * LANES;
            sums[s] = w.sums + s * args.G;
        }
        T* const raw_slots[3] = {nullptr, slots[3], nullptr};
        double* const raw_sums[3] = {nullptr, sums[3], nullptr};
        for (int64_t p = 0; p < args.P; p += TILE) {
            const int64_t n = args.P - p < TILE ? args.P - p : TILE;
            const T* y_raw = as_working(perturbed + p, w.tile_raw, n);
            const T* y = y_raw;
            if (args.link == Link::sigmoid && mask) {
                apply_sigmoid(y_raw, w.tile, n);
                y = w.tile;
            }
            if (plan.slot) {
#define CALL(m) add_tile<T, m>(plan, base + p, y, p / LANES, n, slots)
                FOR_MASK(mask, CALL)
#undef CALL
                if (raw) add_tile<T, SQUARE>(plan, base_raw + p, y_raw, p / LANES, n, raw_slots);
            } else {
#define CALL(m) scatter<T, m>(args.labels + p, base + p, y, n, sums)
                FOR_MASK(mask, CALL)
#undef CALL
                if (raw) scatter<T, SQUARE>(args.labels + p, base_raw + p, y_raw, n, raw_sums);
            }
        }
        if (plan.slot)
            for (int s = 0; s < SUMS; ++s)
                if ((mask >> s & 1) || (s == 3 && raw)) {
                    fold(slots[s]);
                    for (int64_t t = 0; t < plan.entries; ++t) sums[s][plan.group[t]] += slots[s][plan.position[t]];
                }
    }

    // Adds up 2^folds neighbouring lanes of every slot, in each of them.
    void fold(T* slots) const {
        typedef typename Vector<T>::type V;
        typedef typename Vector<T>::bits I;
        const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (V *slot = (V*)slots, *end = slot + plan.slots; slot < end; ++slot) {
            V v = *slot;
            if (plan.folds > 0) v += __builtin_shuffle(v, lane ^ 1);
            if (plan.folds > 1) v += __builtin_shuffle(v, lane ^ 2);
            if (plan.folds > 2) v += __builtin_shuffle(v, lane ^ 4);
            if (plan.folds > 3) v += __builtin_shuffle(v, lane ^ 8);
            *slot = v;
        }
    }

    // The effect of kind k on group g, from w.sums.
    double effect(int k, int64_t g, const Worker<T>& w) const {
        const double s = w.sums[sum_of(k) * args.G + g];
        if (k == TV) return s / 2;
        const double mean = s * plan.inverse_size[g];
        return k == RMS ? __builtin_sqrt(mean) : mean;
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
                    out[(r * args.E + e) * args.G + g] = (T)effect(args.kinds[e], g, w);
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
                    for (int64_t g = 0; g < args.G; ++g) out[e * args.G + g] += effect(args.kinds[e], g, w);
            }
        }
    }
};

template <class IN, class T>
bool forward(const EffectReduction& args) {
    Plan plan;
    if (!make_plan(plan, args.labels, args.P, args.G)) return false;
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
            if (!make_worker(worker, args.P, plan.slots, args.G)) {
#pragma omp atomic write
                ok = false;
            } else {
                Forward<IN, T> job(args, plan);
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
