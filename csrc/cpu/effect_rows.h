// Effects of rows of outputs on groups of their elements: what the kernels `effect_reduction` and `latent_sweep` share.
//
// A row (one perturbed output) is cut into chunks of 16 elements. Chunks with the same 16 labels share a slot: a vector
// accumulator that stays in L1. Images cut into cells have few slots, so the loop is pure vertical additions, and
// labels are looked at only once a row, when lanes are added to their groups. A partition with too many slots (an
// arbitrary one) is scattered element by element instead.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "effect_reduction.h"
#include "vector_math.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t TILE = 1024;      // elements converted at once; a multiple of LANES
constexpr int64_t MAX_SLOTS = 256;  // 16 KB of float accumulators: half of L1
constexpr int64_t PREFETCH = 1024;  // elements ahead: the hardware stops at each 4 KB page

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

// Effects of one row at a time, piece by piece. A row's state is `slots` (slot_elements()) and `sums` (sum_elements()).
template <class T>
struct Reducer {
    const Plan& plan;
    const int32_t* labels;
    int64_t G;
    int mask = 0;      // of Sum
    bool raw = false;  // the squared raw difference is wanted too
    int place[SUMS];   // of each sum that is kept, among those
    int kept = 0;

    Reducer(const Plan& p, const int32_t* l, int64_t groups, const int32_t* kinds, int64_t E)
        : plan(p), labels(l), G(groups) {
        for (int64_t e = 0; e < E; ++e) {
            const int s = sum_of(kinds[e]);
            if (s == 3) raw = true;
            else mask |= 1 << s;
        }
        for (int s = 0; s < SUMS; ++s) place[s] = keeps(s) ? kept++ : 0;
    }

    bool keeps(int s) const { return s == 3 ? raw : mask >> s & 1; }
    int64_t slot_elements() const { return kept * plan.slots * LANES; }
    int64_t sum_elements() const { return kept * G; }

    void clear(T* slots, double* sums) const {
        memset(slots, 0, slot_elements() * sizeof(T));
        memset(sums, 0, sum_elements() * sizeof(double));
    }

    // Adds elements p to p + n of a row: a whole tile, or its last part. Base and row, before and after the link.
    void add(const T* base_raw, const T* base, const T* y_raw, const T* y, int64_t p, int64_t n, T* slots,
             double* sums) const {
        T* of_slots[SUMS];
        double* of_sums[SUMS];
        for (int s = 0; s < SUMS; ++s) {
            of_slots[s] = slots + place[s] * plan.slots * LANES;
            of_sums[s] = sums + place[s] * G;
        }
        T* const raw_slots[3] = {nullptr, of_slots[3], nullptr};
        double* const raw_sums[3] = {nullptr, of_sums[3], nullptr};
        if (plan.slot) {
#define CALL(m) add_tile<T, m>(plan, base, y, p / LANES, n, of_slots)
            FOR_MASK(mask, CALL)
#undef CALL
            if (raw) add_tile<T, SQUARE>(plan, base_raw, y_raw, p / LANES, n, raw_slots);
        } else {
#define CALL(m) scatter<T, m>(labels + p, base, y, n, of_sums)
            FOR_MASK(mask, CALL)
#undef CALL
            if (raw) scatter<T, SQUARE>(labels + p, base_raw, y_raw, n, raw_sums);
        }
    }

    // Adds what the slots hold to the sums.
    void finish(T* slots, double* sums) const {
        for (int s = 0; s < kept && plan.slot; ++s) {
            T* of_slots = slots + s * plan.slots * LANES;
            double* of_sums = sums + s * G;
            fold(of_slots);
            for (int64_t t = 0; t < plan.entries; ++t) of_sums[plan.group[t]] += of_slots[plan.position[t]];
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

    // The effect of kind k on group g, of a row that is finished.
    double effect(int k, int64_t g, const double* sums) const {
        const double s = sums[place[sum_of(k)] * G + g];
        if (k == TV) return s / 2;
        const double mean = s * plan.inverse_size[g];
        return k == RMS ? __builtin_sqrt(mean) : mean;
    }
};

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
