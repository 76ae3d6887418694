// CPU kernel `boosted_importance`: a lane is a tree. See boosted_importance.h.
//
// Each latent's samples are walked once a level, in the order of its codes, for all nodes of the level and all eight
// trees: sums and counts of the left side stand in registers, one vector a node, and a sample's lanes add to that of
// the node they are in. Residuals are centred in their node, so a sum to the left is all that a gain needs.
#include "boosted_importance.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int TREES = 8;  // grown at once
constexpr int DEPTH = 3, LEAVES = 8;
constexpr int64_t BLOCK = 256;  // samples of one task
constexpr double LEARNING_RATE = 0.1;
constexpr double PURE = 0x1p-52;  // a node of no more variance is a leaf
constexpr float EQUAL = 1e-7f;    // codes no further apart are not split
constexpr double TIE = 0x1p-30;   // gains that differ by less, relatively, are equal

typedef double V __attribute__((vector_size(64)));
typedef int64_t I __attribute__((vector_size(64)));

// Lanes on which something holds.
#if defined(__AVX512F__)
typedef __mmask8 M;
INLINE M mask_of(uint8_t bits) { return bits; }
INLINE uint8_t bits_of(M m) { return m; }
INLINE M both(M a, M b) { return a & b; }
INLINE M without(M a, M b) { return a & (M)~b; }
INLINE M greater(V a, V b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
INLINE M greater(M where, V a, V b) { return _mm512_mask_cmp_pd_mask(where, (__m512d)a, (__m512d)b, _CMP_GT_OQ); }
INLINE M equal(V a, V b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ); }
INLINE V choose(M m, V yes, V no) { return (V)_mm512_mask_blend_pd(m, (__m512d)no, (__m512d)yes); }
INLINE V add_where(M m, V a, V b) { return (V)_mm512_mask_add_pd((__m512d)a, m, (__m512d)a, (__m512d)b); }
// The second where one of them is NaN.
INLINE V larger(V a, V b) { return (V)_mm512_maskz_max_pd(255, (__m512d)a, (__m512d)b); }
INLINE V larger_where(M m, V a, V b) { return (V)_mm512_mask_max_pd((__m512d)b, m, (__m512d)a, (__m512d)b); }
#else
typedef I M;
INLINE M mask_of(uint8_t bits) {
    const I place = {1, 2, 4, 8, 16, 32, 64, 128};
    return ((I{} + (int64_t)bits) & place) != 0;
}
INLINE uint8_t bits_of(M m) {
    int bits = 0;
    for (int c = 0; c < TREES; ++c) bits |= (int)(m[c] & 1) << c;
    return (uint8_t)bits;
}
INLINE M both(M a, M b) { return a & b; }
INLINE M without(M a, M b) { return a & ~b; }
INLINE M greater(V a, V b) { return a > b; }
INLINE M greater(M where, V a, V b) { return where & (a > b); }
INLINE M equal(V a, V b) { return a == b; }
INLINE V choose(M m, V yes, V no) { return m ? yes : no; }
INLINE V add_where(M m, V a, V b) { return a + (V)(m & (I)b); }
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V larger_where(M m, V a, V b) { return (m & (a > b)) ? a : b; }
#endif

INLINE V magnitude(V x) { return (V)((I)x & INT64_MAX); }
INLINE V all(double x) { return V{} + x; }

// e^x for x <= 0, to one unit in the last place; below -708 as there.
INLINE V exp_negative(V x) {
    x = choose(greater(all(-708), x), all(-708), x);
    const V shifted = x * 1.4426950408889634 + 0x1.8p52;
    const V n = shifted - 0x1.8p52;
    const V r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    V p = all(1.0 / 6227020800);
    const double of[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    for (double c : of) p = p * r + c;
    return (V)((I)p + ((I)shifted << 52));
}

INLINE uint64_t mixed(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Which node of its level each lane of a sample is in: of four, 2 first + second.
struct Path {
    uint8_t bits[DEPTH];  // of the levels so far, a lane a bit: 1 is right
};

struct Where {
    M first, second, third;
};

template <int NODES>
INLINE Where where(const Path& path) {
    return {mask_of(NODES > 1 ? path.bits[0] : 0), mask_of(NODES > 2 ? path.bits[1] : 0),
            mask_of(NODES > 4 ? path.bits[2] : 0)};
}

template <int NODES>
INLINE void node_masks(const Where& at, M m[NODES]) {
    if constexpr (NODES == 1) {
        m[0] = mask_of(255);
    } else if constexpr (NODES == 2) {
        m[0] = without(mask_of(255), at.first), m[1] = at.first;
    } else if constexpr (NODES == 4) {
        const M left = without(mask_of(255), at.first);
        m[0] = without(left, at.second), m[1] = both(left, at.second);
        m[2] = without(at.first, at.second), m[3] = both(at.first, at.second);
    } else {
        M four[4];
        node_masks<4>(at, four);
        for (int j = 0; j < 4; ++j) m[2 * j] = without(four[j], at.third), m[2 * j + 1] = both(four[j], at.third);
    }
}

// What `of` holds for each lane's own node.
template <int NODES>
INLINE V own(const Where& at, const V* of) {
    if constexpr (NODES == 1) return of[0];
    if constexpr (NODES == 2) return choose(at.first, of[1], of[0]);
    if constexpr (NODES == 4) return choose(at.first, choose(at.second, of[3], of[2]), choose(at.second, of[1], of[0]));
    if constexpr (NODES == 8) {
        V four[4];
        for (int j = 0; j < 4; ++j) four[j] = choose(at.third, of[2 * j + 1], of[2 * j]);
        return own<4>(at, four);
    }
}

// The codes of one sample, for lanes to ask for: in a register where they fit.
struct Codes {
    const float* x;
#if defined(__AVX512F__)
    bool fit;
    __m512 all;
#endif
};

INLINE Codes codes_of(const float* x, int64_t L) {
#if defined(__AVX512F__)
    return {x, L <= 16, _mm512_maskz_loadu_ps((__mmask16)((1u << (L < 16 ? L : 16)) - 1), x)};
#else
    return {x};
#endif
}

INLINE V at(const Codes& codes, V latent) {
#if defined(__AVX512F__)
    const __m256i index = _mm512_maskz_cvtpd_epi32(255, (__m512d)latent);
    const __m256 asked =
        codes.fit ? _mm512_castps512_ps256(_mm512_maskz_permutexvar_ps(255, _mm512_castsi256_si512(index), codes.all))
                  : _mm256_i32gather_ps(codes.x, index, 4);
    return (V)_mm512_maskz_cvtps_pd(255, asked);
#else
    V asked;
    for (int c = 0; c < TREES; ++c) asked[c] = codes.x[(int)latent[c]];
    return asked;
#endif
}

struct Split {
    V latent, threshold;  // above it is right; a leaf has an infinite one
};

struct Tree {
    Split splits[LEAVES - 1];  // the root, its two children, their four
    V values[LEAVES];          // what is added to the raw prediction
};

// Eight trees of a round: their residuals, and what of them a level needs.
struct Level {
    V size[LEAVES], mean[LEAVES], spread[LEAVES];  // samples, mean residual, sum of squares about it
};

struct Best {
    V gain[4];   // of a node, over one latent; negative where no split is possible
    V first[4];  // the place, in the order of codes, of the first sample on the right
};

struct Scratch {
    V* centred;  // (N) residuals less the mean of their node
    Path* path;  // (N)
    Best* best;  // (L)
};

// How many codes of a latent equal the one before.
enum class Ties : uint8_t { few, many, all };

// What the latents have in common for all trees.
struct Latents {
    const float* sorted;   // (L, N) codes
    const double* reach;   // (L, N) up to where the next code counts as equal
    const double* weight;  // (N) 1 / (n (N - n)); of n = 0 NaN
    const Ties* ties;      // (L)
};

template <int NODES>
INLINE uint8_t same_node(const Path& a, const Path& b) {
    uint8_t differ = 0;
    if (NODES > 1) differ |= a.bits[0] ^ b.bits[0];
    if (NODES > 2) differ |= a.bits[1] ^ b.bits[1];
    return (uint8_t)~differ;
}

// The lanes in whose node the sample at place p of an order follows one of an equal code.
template <int NODES>
uint8_t follows_equal(const int32_t* order, const float* sorted, const double* reach, const Path* path, int64_t p) {
    uint8_t lanes = 0;
    for (int64_t q = p - 1; q >= 0 && lanes != 255 && sorted[p] <= reach[q]; --q)
        lanes |= same_node<NODES>(path[order[p]], path[order[q]]);
    return lanes;
}

// Best splits on one latent of all nodes of a level. `lift` is how much more than a gain a later one must be to replace
// it: 1 + TIE where the first of equal ones wins, 1 - TIE where the last does.
template <int NODES, Ties TIES>
void scan(const int32_t* order, const float* sorted, const double* reach, const double* weight, const Scratch& s,
          const Level& level, int64_t N, V lift, Best& out) {
    V sum[NODES], count[NODES], bar[NODES], first[NODES], last[NODES], size[NODES];
    for (int j = 0; j < NODES; ++j) {
        sum[j] = count[j] = V{};
        bar[j] = first[j] = all(-1);
        last[j] = all(-__builtin_inf());
        size[j] = level.size[j];
    }
    for (int64_t p = 0; p < N; ++p) {
        const int64_t i = order[p];
        const V residual = s.centred[i], place = all((double)p);
        const bool near = p > 0 && sorted[p] <= reach[p - 1];
        if constexpr (NODES == 1) {
            if (!near) {
                const V gain = sum[0] * sum[0] * weight[p];
                first[0] = choose(greater(gain, bar[0]), place, first[0]);
                bar[0] = larger(gain * lift, bar[0]);
            }
            sum[0] += residual;
        } else {
            const Where at = where<NODES>(s.path[i]);
            M in[NODES];
            node_masks<NODES>(at, in);
            const V left = own<NODES>(at, sum), n = own<NODES>(at, count);
            V gain = left * left / (n * (own<NODES>(at, size) - n));  // NaN where nothing is on the left
            if constexpr (TIES == Ties::many) {
                gain = choose(greater(all(sorted[p]), own<NODES>(at, last)), gain, all(-1));
                for (int j = 0; j < NODES; ++j) last[j] = choose(in[j], all(reach[p]), last[j]);
            } else if (__builtin_expect(near, 0)) {
                gain = choose(mask_of(follows_equal<NODES>(order, sorted, reach, s.path, p)), all(-1), gain);
            }
            const V raised = gain * lift;
            for (int j = 0; j < NODES; ++j) {
                first[j] = choose(greater(in[j], gain, bar[j]), place, first[j]);
                bar[j] = larger_where(in[j], raised, bar[j]);
                sum[j] = add_where(in[j], sum[j], residual);
                count[j] = add_where(in[j], count[j], all(1));
            }
        }
    }
    for (int j = 0; j < NODES; ++j) out.gain[j] = bar[j] / lift, out.first[j] = first[j];
}

// Sizes, sums and then the means of the nodes; spreads and centred residuals in a second pass.
template <int NODES>
void centre(const V* residuals, const Scratch& s, int64_t N, Level& level) {
    V sum[NODES], size[NODES], mean[NODES], spread[NODES];
    for (int j = 0; j < NODES; ++j) sum[j] = size[j] = spread[j] = V{};
    for (int64_t i = 0; i < N; ++i) {
        M in[NODES];
        node_masks<NODES>(where<NODES>(s.path[i]), in);
        for (int j = 0; j < NODES; ++j) {
            sum[j] = add_where(in[j], sum[j], residuals[i]);
            size[j] = add_where(in[j], size[j], all(1));
        }
    }
    for (int j = 0; j < NODES; ++j) mean[j] = sum[j] / choose(greater(size[j], V{}), size[j], all(1));
    for (int64_t i = 0; i < N; ++i) {
        const Where at = where<NODES>(s.path[i]);
        M in[NODES];
        node_masks<NODES>(at, in);
        const V centred = residuals[i] - own<NODES>(at, mean);
        s.centred[i] = centred;
        for (int j = 0; j < NODES; ++j) spread[j] = add_where(in[j], spread[j], centred * centred);
    }
    for (int j = 0; j < NODES; ++j) level.size[j] = size[j], level.mean[j] = mean[j], level.spread[j] = spread[j];
}

// The latent that splits a node of one tree, of equally good ones that whose number is largest; -1 for a leaf. All
// equally good ones share in what the split takes away.
int64_t winner(const Best* best, int64_t L, int node, int tree, uint64_t key, double size, V* reduction) {
    double most = -1;
    for (int64_t f = 0; f < L; ++f)
        if (best[f].gain[node][tree] > most) most = best[f].gain[node][tree];
    if (most < 0) return -1;
    const double least = most * (1 - TIE);
    int64_t won = -1, tied = 0;
    uint64_t highest = 0;
    for (int64_t f = 0; f < L; ++f) {
        if (best[f].gain[node][tree] < least) continue;
        const uint64_t number = mixed(key + (uint64_t)f);
        if (won < 0 || number > highest) won = f, highest = number;
        ++tied;
    }
    for (int64_t f = 0; f < L; ++f)
        if (best[f].gain[node][tree] >= least) reduction[f][tree] += most * size / (double)tied;
    return won;
}

// The splits of one level, and what they take away of the squared error: (L) of each tree.
template <int NODES>
void split(const BoostedImportance& args, const Latents& latents, const V* residuals, const Scratch& s,
           const uint64_t* keys, Tree& tree, V* reduction) {
    const int64_t N = args.N, L = args.L;
    Level level;
    centre<NODES>(residuals, s, N, level);
    bool open[NODES][TREES], any = false;
    for (int j = 0; j < NODES; ++j)
        for (int c = 0; c < TREES; ++c) any |= open[j][c] = level.spread[j][c] > PURE * level.size[j][c];
    for (int64_t f = 0; any && f < L; ++f) {
        const float* const sorted = latents.sorted + f * N;
        const double* const reach = latents.reach + f * N;
        V lift;
        for (int c = 0; c < TREES; ++c)
            lift[c] = mixed(keys[c] + (uint64_t)(LEAVES + NODES * L + f)) & 1 ? 1 + TIE : 1 - TIE;
        if (latents.ties[f] == Ties::all) {
            for (int j = 0; j < NODES; ++j) s.best[f].gain[j] = all(-1);
        } else {
            (latents.ties[f] == Ties::few ? scan<NODES, Ties::few>
                                          : scan<NODES, Ties::many>)(args.order + f * N, sorted, reach, latents.weight,
                                                                     s, level, N, lift, s.best[f]);
        }
    }
    for (int j = 0; j < NODES; ++j) {
        Split& chosen = tree.splits[NODES - 1 + j];
        chosen.latent = V{}, chosen.threshold = all(__builtin_inf());
        for (int c = 0; c < TREES; ++c) {
            if (!open[j][c]) continue;
            const uint64_t key = mixed(keys[c] + (uint64_t)(NODES - 1 + j));
            const int64_t f = winner(s.best, L, j, c, key, level.size[j][c], reduction);
            if (f < 0) continue;
            const int32_t* const order = args.order + f * N;
            const int64_t first = (int64_t)s.best[f].first[j][c];
            int64_t last = first - 1;  // on the left
            while (!(same_node<NODES>(s.path[order[last]], s.path[order[first]]) >> c & 1)) --last;
            const float* const sorted = latents.sorted + f * N;
            chosen.latent[c] = (double)f;
            chosen.threshold[c] = sorted[last] / 2.0 + sorted[first] / 2.0;
        }
    }
}

// Where a level's splits send a sample.
template <int NODES>
INLINE M right_of(const Codes& codes, const Where& place, const Split* splits) {
    V latent[NODES], threshold[NODES];
    for (int j = 0; j < NODES; ++j) latent[j] = splits[j].latent, threshold[j] = splits[j].threshold;
    return greater(at(codes, own<NODES>(place, latent)), own<NODES>(place, threshold));
}

template <int NODES>
void send(const BoostedImportance& args, const Split* splits, Path* path) {
    constexpr int LEVEL = NODES == 1 ? 0 : NODES == 2 ? 1 : 2;
    for (int64_t i = 0; i < args.N; ++i) {
        const Codes codes = codes_of(args.x + i * args.L, args.L);
        path[i].bits[LEVEL] = bits_of(right_of<NODES>(codes, where<NODES>(path[i]), splits));
    }
}

INLINE Where leaf_of(const Codes& codes, const Tree& tree) {
    Where place = {mask_of(0), mask_of(0), mask_of(0)};
    place.first = right_of<1>(codes, place, tree.splits);
    place.second = right_of<2>(codes, place, tree.splits + 1);
    place.third = right_of<4>(codes, place, tree.splits + 3);
    return place;
}

// What a leaf adds: one Newton step. With p the probability, p (1 - p) = |y - p| (1 - |y - p|).
void value_leaves(const V* residuals, const Path* path, int64_t N, V shrink, V* values) {
    V sum[LEAVES], curvature[LEAVES], size[LEAVES];
    for (int j = 0; j < LEAVES; ++j) sum[j] = curvature[j] = size[j] = V{};
    for (int64_t i = 0; i < N; ++i) {
        M in[LEAVES];
        node_masks<LEAVES>(where<LEAVES>(path[i]), in);
        const V residual = residuals[i], off = magnitude(residual), bend = off * (1 - off);
        for (int j = 0; j < LEAVES; ++j) {
            sum[j] = add_where(in[j], sum[j], residual);
            curvature[j] = add_where(in[j], curvature[j], bend);
            size[j] = add_where(in[j], size[j], all(1));
        }
    }
    for (int j = 0; j < LEAVES; ++j) {
        const M flat = greater(size[j] * 1e-150, curvature[j]);
        const V step = LEARNING_RATE * shrink * sum[j] / curvature[j];
        values[j] = choose(flat, V{}, choose(greater(size[j], V{}), step, V{}));
    }
}

// One round of eight trees. `shrink` is (K - 1) / K of a lane's factor, 1 where that has two classes.
void grow(const BoostedImportance& args, const Latents& latents, const V* residuals, const Scratch& s,
          const uint64_t* keys, V shrink, V* raw, V* raw_test, V* reduction) {
    Tree tree;
    split<1>(args, latents, residuals, s, keys, tree, reduction);
    send<1>(args, tree.splits, s.path);
    split<2>(args, latents, residuals, s, keys, tree, reduction);
    send<2>(args, tree.splits + 1, s.path);
    split<4>(args, latents, residuals, s, keys, tree, reduction);
    send<4>(args, tree.splits + 3, s.path);
    value_leaves(residuals, s.path, args.N, shrink, tree.values);
    for (int64_t i = 0; i < args.N; ++i) raw[i] += own<LEAVES>(where<LEAVES>(s.path[i]), tree.values);
    for (int64_t i = 0; i < args.T; ++i)
        raw_test[i] += own<LEAVES>(leaf_of(codes_of(args.x_test + i * args.L, args.L), tree), tree.values);
}

// The trees of a factor among all of a round: lanes begin..end, and what they stand for.
struct Factor {
    int64_t begin, end;
    bool binary;  // one tree, of class 1, against a raw prediction of 0
};

INLINE Factor factor_of(const BoostedImportance& args, const int64_t* begin, int64_t k) {
    return {begin[k], begin[k + 1], args.classes[k] == 2};
}

INLINE double largest(V v) {
    double m = v[0];
    for (int c = 1; c < TREES; ++c) m = v[c] > m ? v[c] : m;
    return m;
}

INLINE double total(V v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// The lanes of one vector that belong to a factor, and the classes they stand for.
struct Lanes {
    M mine;
    V classes;
};

INLINE Lanes lanes_of(const Factor& f, int64_t group) {
    const V lane = V{0, 1, 2, 3, 4, 5, 6, 7} + (double)(group * TREES);
    const M mine = both(greater(lane, all((double)f.begin - 0.5)), greater(all((double)f.end - 0.5), lane));
    return {mine, lane - (double)(f.begin - f.binary)};
}

// Residuals y - p of the samples of a block, softmax over a factor's classes. Arrays are (groups, N).
void residuals_of(const BoostedImportance& args, const Factor& f, const int32_t* labels, int64_t start, int64_t stop,
                  const V* raw, V* residuals) {
    const int64_t low = f.begin / TREES, high = (f.end - 1) / TREES;
    double most[BLOCK], sum[BLOCK];
    V of[BLOCK];
    for (int64_t i = 0; i < stop - start; ++i) of[i] = all(f.binary ? 0 : -__builtin_inf());
    for (int64_t g = low; g <= high; ++g) {
        const Lanes lanes = lanes_of(f, g);
        for (int64_t i = 0; i < stop - start; ++i) {
            const V x = raw[g * args.N + start + i];
            of[i] = choose(both(lanes.mine, greater(x, of[i])), x, of[i]);
        }
    }
    for (int64_t i = 0; i < stop - start; ++i) most[i] = largest(of[i]), of[i] = V{};
    for (int64_t g = low; g <= high; ++g) {
        const Lanes lanes = lanes_of(f, g);
        for (int64_t i = 0; i < stop - start; ++i) {
            V& out = residuals[g * args.N + start + i];
            const V e = exp_negative(choose(lanes.mine, raw[g * args.N + start + i] - most[i], V{}));
            of[i] = add_where(lanes.mine, of[i], e);
            out = choose(lanes.mine, e, out);
        }
    }
    for (int64_t i = 0; i < stop - start; ++i) {
        sum[i] = total(of[i]);
        if (f.binary) sum[i] += exp_negative(all(-most[i]))[0];
    }
    for (int64_t g = low; g <= high; ++g) {
        const Lanes lanes = lanes_of(f, g);
        for (int64_t i = 0; i < stop - start; ++i) {
            V& out = residuals[g * args.N + start + i];
            const V y = choose(equal(lanes.classes, all((double)labels[start + i])), all(1), V{});
            out = choose(lanes.mine, y - out / sum[i], out);
        }
    }
}

// The class of the largest raw prediction, the first of equal ones; of two classes, 1 from 0 on.
void decide(const Factor& f, const V* raw, int64_t n, int32_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        double most = f.binary ? 0 : -__builtin_inf();
        int32_t best = 0;
        for (int64_t lane = f.begin; lane < f.end; ++lane) {
            const double x = ((const double*)(raw + lane / TREES * n + i))[lane % TREES];
            if (f.binary ? x >= most : x > most) most = x, best = (int32_t)(lane - f.begin + f.binary);
        }
        out[i] = best;
    }
}

// One allocation in parts, each aligned to a vector; null where there is no memory.
struct Memory {
    char* base = nullptr;
    int64_t used = 0;
    template <class T>
    T* part(int64_t n) {
        T* const at = (T*)(base + used);
        used += (n * (int64_t)sizeof(T) + 63) / 64 * 64;
        return at;
    }
    bool take() {
        void* memory = nullptr;
        const bool ok = used == 0 || posix_memalign(&memory, 64, (size_t)used) == 0;
        base = (char*)memory, used = 0;
        return ok;
    }
    ~Memory() { free(base); }
};

// Codes in their order, how far they reach, and whether some are equal.
void lay_out(const BoostedImportance& args, int64_t f, float* sorted, double* reach, Ties* ties) {
    int64_t steps = 0;
    for (int64_t p = 0; p < args.N; ++p) {
        sorted[p] = args.x[args.order[f * args.N + p] * args.L + f];
        reach[p] = sorted[p] + EQUAL;  // in float, as the codes are compared
        steps += p > 0 && sorted[p] > reach[p - 1];
    }
    const bool constant = sorted[args.N - 1] <= reach[0];
    *ties = constant ? Ties::all : args.N - 1 - steps > args.N / 16 ? Ties::many : Ties::few;
}

}  // namespace

bool boosted_importance(const BoostedImportance& args) {
    const int64_t N = args.N, L = args.L, K = args.K, T = args.T, threads = args.threads;
    int64_t trees = 0;
    for (int64_t k = 0; k < K; ++k) trees += args.classes[k] == 2 ? 1 : args.classes[k];
    const int64_t groups = (trees + TREES - 1) / TREES, lanes = groups * TREES;

    Memory memory;
    int64_t* begin;
    uint64_t* keys;
    double *weight, *reach;
    float* sorted;
    Ties* ties;
    V *raw, *raw_test, *residuals, *reduction, *shrink;
    Scratch* scratch;
    for (int pass = 0; pass < 2; ++pass) {  // sizes first, then addresses
        begin = memory.part<int64_t>(K + 1);
        keys = memory.part<uint64_t>(lanes);
        weight = memory.part<double>(N);
        reach = memory.part<double>(L * N);
        sorted = memory.part<float>(L * N);
        ties = memory.part<Ties>(L);
        raw = memory.part<V>(groups * N);
        raw_test = memory.part<V>(groups * T);
        residuals = memory.part<V>(groups * N);
        reduction = memory.part<V>(groups * L);
        shrink = memory.part<V>(groups);
        scratch = memory.part<Scratch>(threads);
        for (int64_t t = 0; t < threads; ++t) {
            const Scratch own = {memory.part<V>(N), memory.part<Path>(N), memory.part<Best>(L)};
            if (pass) scratch[t] = own;
        }
        if (!pass && !memory.take()) return false;
    }

    begin[0] = 0;
    for (int64_t k = 0; k < K; ++k) begin[k + 1] = begin[k] + (args.classes[k] == 2 ? 1 : args.classes[k]);
    memset(keys, 0, (size_t)lanes * sizeof(uint64_t));
    memset(raw, 0, (size_t)(groups * N) * sizeof(V));
    memset(raw_test, 0, (size_t)(groups * T) * sizeof(V));
    memset(residuals, 0, (size_t)(groups * N) * sizeof(V));
    memset(reduction, 0, (size_t)(groups * L) * sizeof(V));
    for (int64_t g = 0; g < groups; ++g) shrink[g] = all(1);
    for (int64_t k = 0; k < K; ++k) {
        const Factor f = factor_of(args, begin, k);
        for (int64_t lane = f.begin; lane < f.end; ++lane) {
            const int64_t g = lane / TREES, c = lane % TREES;
            keys[lane] = mixed(args.keys[k] + (uint64_t)(lane - f.begin));
            if (!f.binary) shrink[g][c] = (double)(args.classes[k] - 1) / (double)args.classes[k];
            for (int64_t i = 0; i < N; ++i) raw[g * N + i][c] = args.prior[lane];
            for (int64_t i = 0; i < T; ++i) raw_test[g * T + i][c] = args.prior[lane];
        }
    }
    weight[0] = __builtin_nan("");
    for (int64_t n = 1; n < N; ++n) weight[n] = 1 / ((double)n * (double)(N - n));
    for (int64_t f = 0; f < L; ++f) lay_out(args, f, sorted + f * N, reach + f * N, ties + f);
    const Latents latents = {sorted, reach, weight, ties};

#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t round = 0; round < args.rounds; ++round) {
#pragma omp for schedule(static)
        for (int64_t start = 0; start < N; start += BLOCK)
            for (int64_t k = 0; k < K; ++k)
                residuals_of(args, factor_of(args, begin, k), args.labels + k * N, start,
                             start + BLOCK < N ? start + BLOCK : N, raw, residuals);
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < groups; ++g) {
            uint64_t of_round[TREES];
            for (int c = 0; c < TREES; ++c) of_round[c] = mixed(keys[g * TREES + c] + (uint64_t)round);
            grow(args, latents, residuals + g * N, scratch[omp_get_thread_num()], of_round, shrink[g], raw + g * N,
                 raw_test + g * T, reduction + g * L);
        }
    }

    for (int64_t k = 0; k < K; ++k) {
        const Factor f = factor_of(args, begin, k);
        for (int64_t l = 0; l < L; ++l) {
            double sum = 0;
            for (int64_t lane = f.begin; lane < f.end; ++lane) sum += reduction[lane / TREES * L + l][lane % TREES];
            args.reduction[k * L + l] = sum;
        }
        decide(f, raw, N, args.fitted + k * N);
        decide(f, raw_test, T, args.predicted + k * T);
    }
    return true;
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
