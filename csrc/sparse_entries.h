// What the CPU kernels over sparse rows share: vectors as wide as the instruction set's registers, rows of float or
// bfloat16, weighted sums of such rows, and entries sorted by latent.
//
// Included by kernel files only: everything is in namespace vaecirc::<set>, unnamed.
#pragma once

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // floats of a register
constexpr int SUMS = 16;   // registers that hold sums
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int SUMS = 8;
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#else
constexpr int WIDTH = 4;
constexpr int SUMS = 8;
#define LANE_NUMBERS {0, 1, 2, 3}
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef float FloatsAnywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct bf16 {
    uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out->bits = x != x ? 0x7fc0 : (uint16_t)rounded;
}

INLINE Floats load(const float* x) { return *(const FloatsAnywhere*)x; }
INLINE Floats load(const bf16* x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store(Floats x, float* out) { *(FloatsAnywhere*)out = x; }
INLINE void store(Floats x, bf16* out) {
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits nan = Bits{} + 0x7fc0;
    const Halves halves = __builtin_convertvector(x != x ? nan : rounded, Halves);
    memcpy(out, &halves, sizeof halves);
}

// n floats as T.
INLINE void copy(const float* x, bf16* out, int64_t n) {
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) store(load(x + j), out + j);
    for (; j < n; ++j) narrow(x[j], out + j);
}

// A list of entries: which row of a matrix, and what it is multiplied with.
struct Entry {
    int32_t at;
    float value;
};
struct Pairs {
    const Entry* entries;
    int64_t n;
    int64_t at(int64_t i) const { return entries[i].at; }
    float value(int64_t i) const { return entries[i].value; }
};
struct Columns {
    const int32_t* ats;
    const float* values;
    int64_t n;
    int64_t at(int64_t i) const { return ats[i]; }
    float value(int64_t i) const { return values[i]; }
};

constexpr int64_t AHEAD = 8;  // how far prefetching looks: so many ats lie, readable, behind every list's end

// N vectors of the sum of value * rows[at]. WAYS sums run side by side, since one would wait for each of its additions.
template <class T, int N, int WAYS, class List>
INLINE void sum_block(const List& list, const T* rows, int64_t D, const T* start, float* out) {
    Floats sum[WAYS][N] = {};
    if (start)
        for (int v = 0; v < N; ++v) sum[0][v] = load(start + v * WIDTH);
    int64_t i = 0;
    for (; i + WAYS <= list.n; i += WAYS)
#pragma GCC unroll 16
        for (int way = 0; way < WAYS; ++way) {
            const float value = list.value(i + way);
            const T* row = rows + list.at(i + way) * D;
            // Its first quarter, which sets the processor's own prefetching going.
            const char* ahead = (const char*)(rows + list.at(i + way + AHEAD) * D);
#pragma GCC unroll 16
            for (int line = 0; line < N * WIDTH * (int)sizeof(T) / 4; line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 16
            for (int v = 0; v < N; ++v) sum[way][v] += value * load(row + v * WIDTH);
        }
    for (; i < list.n; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) sum[0][v] += list.value(i) * load(rows + list.at(i) * D + v * WIDTH);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
        for (int way = 1; way < WAYS; ++way) sum[0][v] += sum[way][v];
        store(sum[0][v], out + v * WIDTH);
    }
}

// sum_block for as many blocks of N vectors as there are from element d on, then of fewer.
template <class T, int N, class List>
INLINE int64_t sum_blocks(const List& list, const T* rows, int64_t D, const T* start, float* out, int64_t d) {
    constexpr int WAYS = SUMS / N < 4 ? SUMS / N : 4;
    for (; d + N * WIDTH <= D; d += N * WIDTH)
        sum_block<T, N, WAYS>(list, rows + d, D, start ? start + d : nullptr, out + d);
    if constexpr (N > 1) return sum_blocks<T, N / 2>(list, rows, D, start, out, d);
    else return d;
}

// out (D) = start, or 0, + the sum over a list of value * rows[at] (D), in the order of the list up to WAYS.
template <class T, class List>
INLINE void sum_rows(const List& list, const T* rows, int64_t D, const T* start, float* out) {
    int64_t d = sum_blocks<T, SUMS>(list, rows, D, start, out, 0);
    if (d < D && D >= WIDTH) {  // the last vector once more, further back
        sum_blocks<T, 1>(list, rows, D, start, out, D - WIDTH);
        return;
    }
    for (; d < D; ++d) {
        float sum = start ? widen(start[d]) : 0;
        for (int64_t i = 0; i < list.n; ++i) sum += list.value(i) * widen(rows[list.at(i) * D + d]);
        out[d] = sum;
    }
}

// What a kernel found wrong, besides the position of an entry whose index is not in [0, M).
enum Wrong : int64_t { NOTHING = -1, NO_MEMORY = -2, OFFSETS = -3 };

// Where rows have their entries: row b has those of [begin(b), begin(b + 1)).
struct Rows {
    const int32_t* offsets;  // (B + 1), or null: K each
    int64_t B, K, N;

    int64_t begin(int64_t b) const { return offsets ? offsets[b] : b * K; }

    bool are_right() const {
        if (!offsets) return true;
        bool right = offsets[0] == 0 && offsets[B] == N;
        for (int64_t b = 0; b < B; ++b) right &= offsets[b] <= offsets[b + 1];
        return right;
    }

    int64_t longest() const {
        int64_t most = offsets ? 0 : K;
        for (int64_t b = 0; offsets && b < B; ++b)
            if (most < offsets[b + 1] - offsets[b]) most = offsets[b + 1] - offsets[b];
        return most;
    }
};

INLINE bool any(Ints flags) {
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 4
    for (int h = WIDTH / 2; h > 0; h /= 2) flags |= __builtin_shuffle(flags, lane ^ h);
    return flags[0] != 0;
}

// The first of n indices that is not in [0, M), or n.
INLINE int64_t first_wrong(const int32_t* indices, int64_t n, int64_t M) {
    const uint32_t latents = (uint32_t)M;
    Ints wrong = {};
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) {
        Bits here;
        memcpy(&here, indices + j, sizeof here);
        wrong |= here >= latents;
    }
    j = any(wrong) ? 0 : j;
    while (j < n && (uint32_t)indices[j] < latents) ++j;
    return j;
}

INLINE void keep_first(int64_t& wrong, int64_t position) {
#pragma omp critical
    if (wrong < 0 || position < wrong) wrong = position;
}

// Entries by latent, of each latent in the order of rows: latent m has those of [start[m], start[m + 1]). Entries of
// value 0 are left out.
struct Sorted {
    Entry* entries;
    int64_t* start;
    Pairs of(int64_t m) const { return {entries + start[m], start[m + 1] - start[m]}; }
};

void free_sorted(Sorted& s) {
    free(s.entries);
    free(s.start);
}

// A counting sort. Each thread counts and places the entries of its own rows, behind those of earlier rows: the result
// does not depend on how many there are.
template <class T>
int64_t sort_by_latent(Sorted& s, const Rows& rows, const T* values, const int32_t* indices, int64_t M, int threads) {
    s.entries = nullptr, s.start = nullptr;
    if (!rows.are_right()) return OFFSETS;
    // Counters of latents, per thread: no more of them than entries.
    int64_t parts = rows.N / (M + 1);
    parts = parts < 1 ? 1 : parts > threads ? threads : parts;
    int64_t* counts = (int64_t*)calloc(parts * M + 1, sizeof(int64_t));
    s.entries = (Entry*)malloc((rows.N + AHEAD) * sizeof(Entry));
    s.start = (int64_t*)malloc((M + 1) * sizeof(int64_t));
    int64_t wrong = counts && s.entries && s.start ? NOTHING : NO_MEMORY;
    if (wrong == NOTHING) {
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
        for (int64_t part = 0; part < parts; ++part) {
            int64_t* count = counts + part * M;
            const int64_t from = rows.begin(rows.B * part / parts), to = rows.begin(rows.B * (part + 1) / parts);
            const int64_t bad = first_wrong(indices + from, to - from, M);
            if (bad < to - from) keep_first(wrong, from + bad);
            else
                for (int64_t j = from; j < to; ++j) count[indices[j]] += widen(values[j]) != 0;
        }
    }
    if (wrong == NOTHING) {
        int64_t total = 0;
        for (int64_t m = 0; m < M; ++m) {
            s.start[m] = total;
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t count = counts[part * M + m];
                counts[part * M + m] = total;
                total += count;
            }
        }
        s.start[M] = total;
        memset(s.entries + total, 0, AHEAD * sizeof(Entry));
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
        for (int64_t part = 0; part < parts; ++part) {
            int64_t* next = counts + part * M;
            for (int64_t b = rows.B * part / parts; b < rows.B * (part + 1) / parts; ++b)
                for (int64_t j = rows.begin(b); j < rows.begin(b + 1); ++j)
                    if (widen(values[j]) != 0) s.entries[next[indices[j]]++] = {(int32_t)b, widen(values[j])};
        }
    }
    free(counts);
    return wrong;
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
