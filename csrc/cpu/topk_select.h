// Selection of the k largest of one row: what the CPU kernels `topk` and `topk_encode` share; included by them alone.
//
// A row is read twice. First the maxima of many strided groups: the k-th largest of them is a lower bound of the k-th
// largest element, since k groups hold an element that large. Then every element above the bound is written out in
// order: few more than k. Among these the exact cut is found by bisection on integer keys. Where fewer than k elements
// are above the bound, the rest equal it, and the first of them fill up: so masses of ties cost one more reading.
#pragma once

#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of one register
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef float vfu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef int32_t viu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vhu __attribute__((vector_size(2 * W), aligned(2), may_alias));

constexpr int REGISTERS = 8;                 // accumulators of group maxima that stay in registers
constexpr int32_t LOWEST = -2147483647 - 1;  // below every key
constexpr int32_t NAN_KEY = 0x7fffffff;
constexpr int32_t INFINITY_KEY = 0x7f800000;
constexpr int64_t SLACK = 2 * W;  // elements that may be written past the end of a scratch array

struct bf16 {
    uint16_t bits;
};

// --- vectors ---------------------------------------------------------------------------------------------------------

INLINE vi iota() {
    vi v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
}

// Lanes as bits, lane 0 lowest. x > t or NaN; x == t; x <= t; key > t; key == t.
#if defined(__AVX512F__)
INLINE uint32_t above(vf x, vf t) { return _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_NLE_UQ); }
INLINE uint32_t equal(vf x, vf t) { return _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_EQ_OQ); }
INLINE uint32_t at_most(vf x, vf t) { return _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_LE_OQ); }
INLINE uint32_t greater(vi x, vi t) { return _mm512_cmpgt_epi32_mask((__m512i)x, (__m512i)t); }
INLINE uint32_t equal(vi x, vi t) { return _mm512_cmpeq_epi32_mask((__m512i)x, (__m512i)t); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE uint32_t above(vf x, vf t) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)t, _CMP_NLE_UQ)); }
INLINE uint32_t equal(vf x, vf t) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)t, _CMP_EQ_OQ)); }
INLINE uint32_t at_most(vf x, vf t) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)t, _CMP_LE_OQ)); }
INLINE uint32_t greater(vi x, vi t) { return _mm256_movemask_ps((__m256)(x > t)); }
INLINE uint32_t equal(vi x, vi t) { return _mm256_movemask_ps((__m256)(x == t)); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE uint32_t bits_of(vi lanes) {
#if defined(__SSE2__)
    return _mm_movemask_ps((__m128)lanes);
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= (uint32_t)(lanes[i] & 1) << i;
    return bits;
#endif
}
INLINE uint32_t above(vf x, vf t) { return bits_of(~(vi)(x <= t)); }
INLINE uint32_t equal(vf x, vf t) { return bits_of((vi)(x == t)); }
INLINE uint32_t at_most(vf x, vf t) { return bits_of((vi)(x <= t)); }
INLINE uint32_t greater(vi x, vi t) { return bits_of((vi)(x > t)); }
INLINE uint32_t equal(vi x, vi t) { return bits_of((vi)(x == t)); }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
#endif

INLINE int count_bits(uint32_t bits) {
#if defined(__POPCNT__)
    return __builtin_popcount(bits);
#else
    static_assert(W == 4, "four bits");
    return (int)(0x4332322132212110ull >> (4 * bits) & 15);
#endif
}

INLINE int32_t smallest(vi v) {
    int32_t least = v[0];
    for (int i = 1; i < W; ++i) least = v[i] < least ? v[i] : least;
    return least;
}

INLINE int32_t largest(vi v) {
    int32_t most = v[0];
    for (int i = 1; i < W; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

INLINE uint32_t lowest_bits(uint32_t bits, int n) {
    while (count_bits(bits) > n) bits &= ~(1u << (31 - __builtin_clz(bits)));
    return bits;
}

// The lanes in `bits`, packed, at `out`, where a whole register may be written.
#if defined(__AVX512F__)
INLINE void pack(vi v, uint32_t bits, void* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)v));
}
#elif defined(__AVX2__)
// For each set of 8 lanes, their numbers first.
struct Orders {
    uint8_t lane[256][8];
    constexpr Orders() : lane() {
        for (int bits = 0; bits < 256; ++bits) {
            int n = 0;
            for (int i = 0; i < 8; ++i)
                if (bits >> i & 1) lane[bits][n++] = (uint8_t)i;
        }
    }
};
constexpr Orders ORDERS;
INLINE void pack(vi v, uint32_t bits, void* out) {
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)ORDERS.lane[bits]));
    _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32((__m256i)v, order));
}
#else
INLINE void pack(vi v, uint32_t bits, void* out) {
    vi packed = v;
    int n = 0;
    for (int lane = 0; lane < W; ++lane)
        if (bits >> lane & 1) packed[n++] = v[lane];
    *(viu*)out = packed;
}
#endif

// The same of values and of their indices; returns how many.
INLINE int pack(vf x, vi i, uint32_t bits, float* values, int32_t* index) {
    pack((vi)x, bits, values);
    pack(i, bits, index);
    return count_bits(bits);
}

// --- keys ------------------------------------------------------------------------------------------------------------

// Integers in the order of the numbers: -0.0 as 0.0, every NaN the same and above all.
INLINE vi key_of(vf x) {
    const vi bits = (vi)x, magnitude = bits & 0x7fffffff, sign = bits >> 31;
    const vi key = (magnitude ^ sign) - sign;
    return magnitude > INFINITY_KEY ? vi{} + NAN_KEY : key;
}

INLINE int32_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    const int32_t magnitude = bits & 0x7fffffff;
    return magnitude > INFINITY_KEY ? NAN_KEY : bits < 0 ? -magnitude : magnitude;
}

INLINE float value_of(int32_t key) {
    const int32_t bits = key < 0 ? -key | LOWEST : key;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// --- rows ------------------------------------------------------------------------------------------------------------

INLINE vf widen(const float* x) { return *(const vfu*)x; }
INLINE vf widen(const bf16* x) {
    const vhu bits = *(const vhu*)x;
    return (vf)(__builtin_convertvector(bits, vi) << 16);
}
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
    // A NaN keeps its bits: it may have come from a bf16, and is copied.
    out->bits = x != x ? (uint16_t)(bits >> 16 | ((bits & 0x007f0000) == 0 ? 0x40 : 0)) : (uint16_t)rounded;
}

// n < W elements, the other lanes 0.
INLINE vf widen_part(const float* x, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
#elif defined(__AVX2__)
    return (vf)_mm256_maskload_ps(x, (__m256i)(iota() < n));
#else
    vf v = {};
    for (int i = 0; i < n; ++i) v[i] = x[i];
    return v;
#endif
}
INLINE vf widen_part(const bf16* x, int n) {
    bf16 part[W] = {};
    for (int i = 0; i < n; ++i) part[i] = x[i];
    return widen(part);
}

// One row as floats, plus a bias if there is one.
template <class T, bool BIAS>
struct Row {
    const T* x;
    const float* bias;
    int64_t next;  // elements to what is read next
    inline __attribute__((always_inline)) vf at(int64_t j) const {
        const vf v = widen(x + j);
        return BIAS ? v + widen(bias + j) : v;
    }
    // The last n < W elements, the other lanes -infinity.
    inline __attribute__((always_inline)) vf part(int64_t j, int n) const {
        vf v = widen_part(x + j, n);
        if (BIAS) v += widen_part(bias + j, n);
        return iota() < n ? v : vf{} - __builtin_inff();
    }
    // Memory works on the next row while this one is in cache.
    inline __attribute__((always_inline)) void prefetch_next(int64_t j) const {
        constexpr int64_t line = 64 / sizeof(T);
        for (int64_t i = 0; i < 4 * W; i += line)
            __builtin_prefetch((const void*)((uintptr_t)x + (uintptr_t)((next + j + i) * (int64_t)sizeof(T))));
    }
    inline __attribute__((always_inline)) float one(int64_t j) const {
        return BIAS ? widen(x[j]) + bias[j] : widen(x[j]);
    }
};

// --- one row's selection ---------------------------------------------------------------------------------------------

// One thread's memory; `values` and `index` hold the selection, in order of index.
struct Scratch {
    float* values;   // (M)
    int32_t* index;  // (M)
    int32_t* keys;   // (M)
    float* maxima;   // (M)
    void* memory;
};

INLINE bool make_scratch(Scratch& s, int64_t M) {
    const int64_t n = (M + SLACK + W - 1) / W * W;
    if (posix_memalign(&s.memory, 64, 4 * n * sizeof(float)) != 0) {
        s.memory = nullptr;
        return false;
    }
    s.values = (float*)s.memory;
    s.index = (int32_t*)(s.values + n);
    s.keys = s.index + n;
    s.maxima = (float*)(s.keys + n);
    return true;
}

// How many of n keys, a multiple of W, are at least `least`.
INLINE int64_t count_from(const int32_t* keys, int64_t n, int32_t least) {
    const vi t = vi{} + (least - 1);
    int64_t count = 0, j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) count += count_bits(greater(*(const viu*)(keys + j + u * W), t));
    for (; j < n; j += W) count += count_bits(greater(*(const viu*)(keys + j), t));
    return count;
}

// A key such that `count` keys are at least that: the largest with count >= k, or an earlier one with count <= enough.
struct Cut {
    int32_t key;
    int64_t count;
};

// The smallest key from `from` on and the largest below `until`: both are there.
INLINE void shrink(const int32_t* keys, int64_t n, int64_t& from, int64_t& until) {
    const vi least = vi{} + (int32_t)from, most = vi{} + (int32_t)(until - 1);
    vi low = most, high = least;
    for (int64_t j = 0; j < n; j += W) {
        const vi key = *(const viu*)(keys + j);
        low = key >= least && key < low ? key : low;
        high = key <= most && key > high ? key : high;
    }
    from = smallest(low), until = (int64_t)largest(high) + 1;
}

// Among n keys (a multiple of W; LOWEST pads), of which `all` >= k are at least `low`, and none is above `top`.
INLINE Cut find_cut(const int32_t* keys, int64_t n, int64_t k, int64_t enough, int32_t low, int64_t all, int32_t top) {
    int64_t from = low, until = (int64_t)top + 1, beyond = 0;
    bool parted = true;
    for (int step = 0; all > enough && until - from > 1; ++step) {
        if (!parted) {  // among ties or in a gap: on to the keys that are there
            shrink(keys, n, from, until);
            if (until - from <= 1) break;
        }
        int64_t middle = from + (until - from) / 2;
        if (step == 0 && from == 0) {
            middle = 1;  // after a ReLU the cut is often zero itself
        } else if (step < 8) {
            // Halving numbers first: keys are like logarithms, and most lie near zero.
            const int64_t number = key_of(0.5f * value_of((int32_t)from) + 0.5f * value_of((int32_t)(until - 1)));
            if (number > from && number < until) middle = number;
        }
        const int64_t count = count_from(keys, n, (int32_t)middle);
        parted = count != all && count != beyond;
        if (count >= k) from = middle, all = count;
        else until = middle, beyond = count;
    }
    return {(int32_t)from, all};
}

// Groups whose maxima bound the row's k-th largest well, or 0 where looking at every element costs no more.
INLINE int64_t groups_for(int64_t M, int64_t k) {
    int64_t groups = REGISTERS * W;
    while (8 * k > 7 * groups) groups *= 2;
    return 2 * groups <= M ? groups : 0;
}

template <int N, class ROW>
INLINE void group_maxima(const ROW& row, int64_t M, int64_t groups, float least, float* maxima) {
    int64_t j = 0;
    if (N > 0) {
        vf most[N > 0 ? N : 1];
        for (int r = 0; r < N; ++r) most[r] = vf{} + least;
        for (; j + N * W <= M; j += N * W)
#pragma GCC unroll 8
            for (int r = 0; r < N; ++r) most[r] = vmax(most[r], row.at(j + r * W));
        for (int r = 0; r < N; ++r) *(vfu*)(maxima + r * W) = most[r];
    } else {
        for (int64_t g = 0; g < groups; g += W) *(vfu*)(maxima + g) = vf{} + least;
        for (; j + groups <= M; j += groups)
            for (int64_t g = 0; g < groups; g += W) *(vfu*)(maxima + g) = vmax(*(vfu*)(maxima + g), row.at(j + g));
    }
    int64_t g = 0;
    for (; j + W <= M; j += W, g += W) *(vfu*)(maxima + g) = vmax(*(vfu*)(maxima + g), row.at(j));
    if (j < M) *(vfu*)(maxima + g) = vmax(*(vfu*)(maxima + g), row.part(j, (int)(M - j)));
}

// A number that at least k elements reach, all of which are at least `least`. It is the value of an element or `least`.
template <class ROW>
INLINE float lower_bound(const ROW& row, int64_t M, int64_t k, int64_t groups, float least, Scratch& s) {
    if (groups == REGISTERS * W) group_maxima<REGISTERS>(row, M, groups, least, s.maxima);
    else group_maxima<0>(row, M, groups, least, s.maxima);
    vi low = vi{} + NAN_KEY, top = vi{} + LOWEST;
    for (int64_t g = 0; g < groups; g += W) {
        vi key = key_of(*(const vfu*)(s.maxima + g));
        key = key > INFINITY_KEY ? vi{} + INFINITY_KEY : key;  // a bound of NaN could not be compared with
        low = key < low ? key : low;
        top = key > top ? key : top;
        *(viu*)(s.keys + g) = key;
    }
    const Cut cut = find_cut(s.keys, groups, k, k + k / 8, smallest(low), groups, largest(top));
    // Up to the smallest maximum that counts: with ties it is the tied value, and they are not above it.
    vi next = vi{} + NAN_KEY;
    for (int64_t g = 0; g < groups; g += W) {
        const vi key = *(const viu*)(s.keys + g);
        next = key >= cut.key && key < next ? key : next;
    }
    return value_of(smallest(next));
}

// Writes the elements above `bound`, in order; returns how many.
template <class ROW>
INLINE int64_t survivors(const ROW& row, int64_t M, float bound, float* values, int32_t* index) {
    const vf t = vf{} + bound;
    int64_t n = 0, j = 0;
    for (; j + 4 * W <= M; j += 4 * W) {
        vf x[4];
        uint32_t bits[4];
        row.prefetch_next(j);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) x[u] = row.at(j + u * W), bits[u] = above(x[u], t);
        if ((bits[0] | bits[1] | bits[2] | bits[3]) == 0) continue;
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) n += pack(x[u], iota() + (int32_t)(j + u * W), bits[u], values + n, index + n);
    }
    for (; j + W <= M; j += W) {
        const vf x = row.at(j);
        n += pack(x, iota() + (int32_t)j, above(x, t), values + n, index + n);
    }
    if (j < M) {
        const vf x = row.part(j, (int)(M - j));  // the rest is -infinity, and that is above nothing
        n += pack(x, iota() + (int32_t)j, above(x, t), values + n, index + n);
    }
    return n;
}

// The fewer than k elements above `bound` and, of those that equal it, the first `ties`.
template <class ROW>
INLINE void fill_with_ties(const ROW& row, int64_t M, float bound, int64_t ties, bool relu, Scratch& s) {
    const vf t = vf{} + bound;
    const bool zeros = relu && bound == 0;
    int64_t n = 0;
    for (int64_t j = 0; j < M; j += W) {
        const bool whole = j + W <= M;
        vf x = whole ? row.at(j) : row.part(j, (int)(M - j));
        const uint32_t valid = whole ? (uint32_t)((1ull << W) - 1) : (1u << (M - j)) - 1;
        const uint32_t over = above(x, t);
        uint32_t tied = 0;
        if (ties > 0) {
            tied = (zeros ? at_most(x, t) : equal(x, t)) & valid;
            if (count_bits(tied) > ties) tied = lowest_bits(tied, (int)ties);
            ties -= count_bits(tied);
        }
        if ((over | tied) == 0) continue;
        if (zeros) x = x <= 0.0f ? vf{} : x;
        n += pack(x, iota() + (int32_t)j, over | tied, s.values + n, s.index + n);
    }
}

// Of the lanes whose key reaches the cut; `ties` says how many of those that equal it are left to take.
INLINE uint32_t taken(vi key, const Cut& cut, int64_t k, int64_t& ties) {
    if (cut.count == k) return greater(key, vi{} + (cut.key - 1));
    const uint32_t over = greater(key, vi{} + cut.key);
    if (ties == 0) return over;
    uint32_t tied = equal(key, vi{} + cut.key);
    if (count_bits(tied) > ties) tied = lowest_bits(tied, (int)ties);
    ties -= count_bits(tied);
    return over | tied;
}

INLINE int64_t ties_to_take(const int32_t* keys, int64_t n, const Cut& cut, int64_t k) {
    if (cut.count == k || cut.key == NAN_KEY) return k;
    return k - count_from(keys, n, cut.key + 1);
}

// Every element is looked at: short rows, and large parts of a row.
template <class ROW>
INLINE void select_directly(const ROW& row, int64_t M, int64_t k, bool relu, Scratch& s) {
    vi low = vi{} + NAN_KEY, top = vi{} + LOWEST;
    const vi least = vi{} + (relu ? 0 : LOWEST);
    for (int64_t j = 0; j < M; j += W) {
        const bool whole = j + W <= M;
        vi key = key_of(whole ? row.at(j) : row.part(j, (int)(M - j)));
        key = key < least ? least : key;
        const vi valid = whole ? ~vi{} : (vi)(iota() < (int32_t)(M - j));
        low = (key < low) & valid ? key : low;
        key = valid ? key : vi{} + LOWEST;
        top = key > top ? key : top;
        *(viu*)(s.keys + j) = key;
    }
    const int64_t padded = (M + W - 1) / W * W;
    const Cut cut = find_cut(s.keys, padded, k, k, smallest(low), M, largest(top));
    int64_t ties = ties_to_take(s.keys, padded, cut, k), n = 0;
    for (int64_t j = 0; j < M && n < k; j += W) {
        const uint32_t bits = taken(*(const viu*)(s.keys + j), cut, k, ties);
        if (bits == 0) continue;
        vf x = j + W <= M ? row.at(j) : row.part(j, (int)(M - j));
        if (relu) x = x <= 0.0f ? vf{} : x;
        n += pack(x, iota() + (int32_t)j, bits, s.values + n, s.index + n);
    }
}

// The first k of a stable descending sort of the row, after a ReLU if asked for: in s.values and s.index, in order of
// index.
template <class ROW>
INLINE void select_row(const ROW& row, int64_t M, int64_t k, bool relu, Scratch& s) {
    const int64_t groups = groups_for(M, k);
    if (groups == 0) return select_directly(row, M, k, relu, s);
    const float bound = lower_bound(row, M, k, groups, relu ? 0.0f : -__builtin_inff(), s);
    const int64_t n = survivors(row, M, bound, s.values, s.index);
    if (n < k) return fill_with_ties(row, M, bound, k - n, relu, s);
    if (n == k) return;
    vi low = vi{} + NAN_KEY, top = vi{} + LOWEST;
    const int64_t padded = (n + W - 1) / W * W;
    for (int64_t j = 0; j < n; j += W) {
        vi key = key_of(*(const vfu*)(s.values + j));
        const vi valid = iota() < (int32_t)(n - j);
        low = (key < low) & valid ? key : low;
        key = valid ? key : vi{} + LOWEST;
        top = key > top ? key : top;
        *(viu*)(s.keys + j) = key;
    }
    const Cut cut = find_cut(s.keys, padded, k, k, smallest(low), n, largest(top));
    int64_t ties = ties_to_take(s.keys, padded, cut, k), kept = 0;
    for (int64_t j = 0; j < n && kept < k; j += W) {
        const vf x = *(const vfu*)(s.values + j);
        const vi i = *(const viu*)(s.index + j);
        kept += pack(x, i, taken(*(const viu*)(s.keys + j), cut, k, ties), s.values + kept, s.index + kept);
    }
}

// Copies a selection of k to a row of K entries, of which the rest becomes 0.
template <class T>
INLINE void write_selection(const float* values, const int32_t* index, int64_t k, int64_t K, T* out, int32_t* indices) {
    for (int64_t j = 0; j < k; ++j) narrow(values[j], out + j);
    memcpy(indices, index, k * sizeof(int32_t));
    memset(out + k, 0, (K - k) * sizeof(T));
    memset(indices + k, 0, (K - k) * sizeof(int32_t));
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
