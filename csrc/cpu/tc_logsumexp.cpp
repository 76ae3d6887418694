// CPU kernel `tc_logsumexp`: densities of codes under a minibatch's posteriors, summed as they are made. See
// tc_logsumexp.h.
//
// Lanes are posteriors. Four codes pass over a tile of posteriors at once, so each parameter is read once for four
// densities. Forward, a tile's densities are made twice over: written to L1 while their maximum is found, then read and
// summed. The gradient goes tile by tile over all codes, so that what belongs to posteriors is summed in L1.
#include "tc_logsumexp.h"

#include <stdlib.h>
#include <string.h>

#include "registers.h"
// GCC 12 warns of the registers that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int ROWS = 4;               // codes at once
constexpr int64_t PARTS = 16;         // sums over tiles of posteriors in the gradient; fixed, so threads change nothing
constexpr int64_t TILE_BYTES = 2048;  // of one row of densities, forward
constexpr int64_t BACK_TILE_BYTES = 512;  // and in the gradient, which holds more rows
constexpr double LN2 = 0.69314718055994530942;

// 2^x for x <= 1/2; 0 far below, NaN for NaN. Of float a minimax polynomial, 2e-9 off and exact at 0; of double
// Taylor's.
#if defined(__AVX512F__)
INLINE vf power_of_two(vf x) {
    x = (vf)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // NaN stays
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
    const vf f = x - n;
#else
INLINE vf power_of_two(vf given) {
    constexpr float LAST = -126.0f;
    const vf x = given < LAST ? vf{} + LAST : given;
    const float round = 12582912.0f;  // 1.5 * 2^23
    const vf n = (x + round) - round;
    const vf f = x - n;
#endif
    vf p = f * 0.0001535336206313128f + 0.001339887458851604f;
    p = p * f + 0.009618437358490085f;
    p = p * f + 0.05550332470702084f;
    p = p * f + 0.24022647913611092f;
    p = p * f + 0.6931472028552521f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vf e = p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return given < LAST ? vf{} : e;
#endif
}

INLINE vd power_of_two(vd given) {
    constexpr double LAST = -1022.0;
    const vd x = given < LAST ? vd{} + LAST : given;
    const double round = 6755399441055744.0;  // 1.5 * 2^52
    const vd n = (x + round) - round;
    const vd f = (x - n) * LN2;
    vd p = vd{} + 1.0 / 6227020800.0;
    const double inverse_factorial[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    for (double c : inverse_factorial) p = p * f + c;
    const vd e = p * (vd)((__builtin_convertvector(n, vl) + 1023) << 52);
    return given < LAST ? vd{} : e;
}

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef vf type;
    static constexpr int64_t count = WIDTH;
};
template <>
struct Lanes<double> {
    typedef vd type;
    static constexpr int64_t count = WIDTH / 2;
};

#if defined(__AVX512F__)
INLINE float total(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE double total(vd v) { return _mm512_reduce_add_pd((__m512d)v); }
INLINE float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE double largest(vd v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
template <class V>
INLINE auto total(V v) {
    auto sum = v[0];
    for (uint64_t k = 1; k < sizeof v / sizeof v[0]; ++k) sum += v[k];
    return sum;
}

template <class V>
INLINE auto largest(V v) {
    auto most = v[0];
    for (uint64_t k = 1; k < sizeof v / sizeof v[0]; ++k) most = v[k] > most ? v[k] : most;
    return most;
}
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What to take a row's terms relative to; where all of them are 0, any finite number.
INLINE double shift_of(double most) { return most == -__builtin_inf() ? 0 : most; }

// log2 of a sum of powers of two, tile by tile: sum 2^most.
struct Running {
    double most, sum;

    void rescale(double of_tile) {
        if (!(of_tile > most)) return;
        sum = sum == 0 ? 0 : sum * __builtin_exp2(most - of_tile);
        most = of_tile;
    }
    double natural(double other) const { return LN2 * (shift_of(most) + other) + __builtin_log(sum); }
};

// One tile of n posteriors (whole registers) of which the first is `first`, with four codes.
template <class T>
struct Tile {
    typedef typename Lanes<T>::type V;
    static constexpr int64_t LANE = Lanes<T>::count;

    const TcLogsumexp& a;
    int64_t first, n;

    const T* at(const void* table, int64_t l) const { return (const T*)table + l * a.stride + first; }

    // Where in this tile the posterior of code b is, or -1 where it has no weight of its own.
    int64_t own(int64_t b) const { return a.own != a.other && b >= first && b < first + n && b < a.M ? b - first : -1; }
};

template <class T>
struct ForwardScratch {
    T* density;        // (ROWS, tile)
    T* joint;          // (ROWS, tile)
    Running* running;  // (ROWS, L + 1): of latents, then of all together
    void* memory;
};

template <class T>
bool make(ForwardScratch<T>& s, int64_t L) {
    const int64_t row = TILE_BYTES * ROWS;
    if (posix_memalign(&s.memory, 128, 2 * row + ROWS * (L + 1) * sizeof(Running))) {
        s.memory = nullptr;
        return false;
    }
    s.density = (T*)s.memory;
    s.joint = (T*)((char*)s.memory + row);
    s.running = (Running*)((char*)s.memory + 2 * row);
    return true;
}

// Adds a tile's terms x, (ROWS, stride), to what is running in column l.
template <class T>
INLINE void add_terms(const T* x, int64_t stride, int64_t n, const double* most, Running* running, int64_t columns) {
    typedef typename Lanes<T>::type V;
    V shift[ROWS], sum[ROWS] = {};
    for (int r = 0; r < ROWS; ++r) {
        running[r * columns].rescale(most[r]);
        shift[r] = V{} + (T)shift_of(running[r * columns].most);
    }
    for (int64_t m = 0; m < n; m += Lanes<T>::count)
        for (int r = 0; r < ROWS; ++r) sum[r] += power_of_two(*(const V*)(x + r * stride + m) - shift[r]);
    for (int r = 0; r < ROWS; ++r) running[r * columns].sum += total(sum[r]);
}

// Codes b[0..3] over one tile.
template <class T>
void forward_tile(const Tile<T>& t, const int64_t* b, ForwardScratch<T>& s) {
    typedef typename Lanes<T>::type V;
    constexpr int64_t STRIDE = TILE_BYTES / sizeof(T), LANE = Lanes<T>::count;
    const TcLogsumexp& a = t.a;
    const T delta = (T)(a.own - a.other);
    double most[ROWS];
    for (int64_t l = 0; l < a.L; ++l) {
        const T *mean = t.at(a.mean, l), *scale = t.at(a.scale, l), *constant = t.at(a.constant, l);
        V z[ROWS], top[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            z[r] = V{} + ((const T*)a.z)[b[r] * a.L + l];
            top[r] = V{} - (T)__builtin_inf();
        }
        for (int64_t m = 0; m < t.n; m += LANE) {
            const V mu = *(const V*)(mean + m), k = *(const V*)(scale + m), c = *(const V*)(constant + m);
            for (int r = 0; r < ROWS; ++r) {
                const V u = (z[r] - mu) * k;
                const V d = c - u * u;
                top[r] = d > top[r] ? d : top[r];
                *(V*)(s.density + r * STRIDE + m) = d;
                V* joint = (V*)(s.joint + r * STRIDE + m);
                *joint = l ? *joint + d : d;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            most[r] = largest(top[r]);  // without its weight, which only lowers it
            const int64_t own = t.own(b[r]);
            if (own >= 0) s.density[r * STRIDE + own] += delta;
        }
        add_terms<T>(s.density, STRIDE, t.n, most, s.running + l, a.L + 1);
    }
    for (int r = 0; r < ROWS; ++r) {
        V top = V{} - (T)__builtin_inf();
        for (int64_t m = 0; m < t.n; m += LANE) {
            const V d = *(const V*)(s.joint + r * STRIDE + m);
            top = d > top ? d : top;
        }
        most[r] = largest(top);
        const int64_t own = t.own(b[r]);
        if (own >= 0) s.joint[r * STRIDE + own] += delta;
    }
    add_terms<T>(s.joint, STRIDE, t.n, most, s.running + a.L, a.L + 1);
}

template <class T>
void forward_rows(const TcLogsumexp& a, int64_t row, ForwardScratch<T>& s) {
    constexpr int64_t SIZE = TILE_BYTES / sizeof(T);
    int64_t b[ROWS];
    for (int r = 0; r < ROWS; ++r) b[r] = least(row + r, a.B - 1);
    for (int64_t k = 0; k < ROWS * (a.L + 1); ++k) s.running[k] = {-__builtin_inf(), 0};
    for (int64_t m = 0; m < a.stride; m += SIZE) forward_tile<T>({a, m, least(SIZE, a.stride - m)}, b, s);
    for (int r = 0; r < ROWS && row + r < a.B; ++r) {
        const Running* of_row = s.running + r * (a.L + 1);
        for (int64_t l = 0; l < a.L; ++l) ((T*)a.marginals)[b[r] * a.L + l] = (T)of_row[l].natural(a.other);
        ((T*)a.joint)[b[r]] = (T)of_row[a.L].natural(a.other);
    }
}

template <class T>
bool forward(const TcLogsumexp& a) {
    const int64_t tasks = (a.B + ROWS - 1) / ROWS;
    bool ok = true;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        ForwardScratch<T> s;
        const bool made = make(s, a.L);
        if (!made) {
#pragma omp atomic write
            ok = false;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tasks; ++t)
            if (made) forward_rows<T>(a, t * ROWS, s);
        free(s.memory);
    }
    return ok;
}

// Of one code: what its gradients are, and its results in units of log 2 without the weight of the others.
template <class T>
struct Row {
    T gradient, result;
};

template <class T>
INLINE Row<T> row_of(const void* gradient, const void* result, int64_t k, double other) {
    const double natural = ((const T*)result)[k];
    return {((const T*)gradient)[k], (T)shift_of(natural / LN2 - other)};
}

template <class T>
struct BackwardScratch {
    T* joint;                  // (ROWS, tile) what the joint density's gradient gives each posterior
    T *mean, *square, *plain;  // (L, tile) sums over codes of p u, p u^2 and p
    void* memory;
};

template <class T>
bool make(BackwardScratch<T>& s, int64_t L) {
    constexpr int64_t SIZE = BACK_TILE_BYTES / sizeof(T);
    if (posix_memalign(&s.memory, 128, BACK_TILE_BYTES * (ROWS + 3 * L))) {
        s.memory = nullptr;
        return false;
    }
    s.joint = (T*)s.memory;
    s.mean = s.joint + ROWS * SIZE;
    s.square = s.mean + L * SIZE;
    s.plain = s.square + L * SIZE;
    return true;
}

// s.joint of codes b[0..3].
template <class T>
void joint_shares(const TcLogsumexpBackward& g, const Tile<T>& t, const int64_t* b, BackwardScratch<T>& s) {
    typedef typename Lanes<T>::type V;
    constexpr int64_t STRIDE = BACK_TILE_BYTES / sizeof(T), LANE = Lanes<T>::count;
    const TcLogsumexp& a = t.a;
    for (int64_t l = 0; l < a.L; ++l) {
        const T *mean = t.at(a.mean, l), *scale = t.at(a.scale, l), *constant = t.at(a.constant, l);
        V z[ROWS];
        for (int r = 0; r < ROWS; ++r) z[r] = V{} + ((const T*)a.z)[b[r] * a.L + l];
        for (int64_t m = 0; m < t.n; m += LANE) {
            const V mu = *(const V*)(mean + m), k = *(const V*)(scale + m), c = *(const V*)(constant + m);
            for (int r = 0; r < ROWS; ++r) {
                const V u = (z[r] - mu) * k;
                const V d = c - u * u;
                V* joint = (V*)(s.joint + r * STRIDE + m);
                *joint = l ? *joint + d : d;
            }
        }
    }
    V gradient[ROWS], result[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const Row<T> row = row_of<T>(g.grad_joint, a.joint, b[r], a.other);
        gradient[r] = V{} + row.gradient;
        result[r] = V{} + row.result;
        const int64_t own = t.own(b[r]);
        if (own >= 0) s.joint[r * STRIDE + own] += (T)(a.own - a.other);
    }
    for (int64_t m = 0; m < t.n; m += LANE)
        for (int r = 0; r < ROWS; ++r) {
            V* joint = (V*)(s.joint + r * STRIDE + m);
            *joint = gradient[r] * power_of_two(*joint - result[r]);
        }
}

// The gradients that one tile and codes b[0..3] give each other in latent l; OWN: one of the codes has its posterior in
// this tile. Only the first `valid` codes count.
template <class T, bool OWN>
void backward_latent(const TcLogsumexpBackward& g, const Tile<T>& t, const int64_t* b, int valid, int64_t l,
                     BackwardScratch<T>& s, double* grad_z) {
    typedef typename Lanes<T>::type V;
    constexpr int64_t STRIDE = BACK_TILE_BYTES / sizeof(T), LANE = Lanes<T>::count;
    const TcLogsumexp& a = t.a;
    const T *mean = t.at(a.mean, l), *scale = t.at(a.scale, l), *constant = t.at(a.constant, l);
    V z[ROWS], gradient[ROWS], result[ROWS], of_z[ROWS] = {};
    int64_t own[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        z[r] = V{} + ((const T*)a.z)[b[r] * a.L + l];
        const Row<T> row = row_of<T>(g.grad_marginals, a.marginals, b[r] * a.L + l, a.other);
        gradient[r] = V{} + row.gradient;
        result[r] = V{} + row.result;
        own[r] = t.own(b[r]);
    }
    for (int64_t m = 0; m < t.n; m += LANE) {
        const V mu = *(const V*)(mean + m), k = *(const V*)(scale + m), c = *(const V*)(constant + m);
        V of_mean = *(V*)(s.mean + l * STRIDE + m), square = *(V*)(s.square + l * STRIDE + m);
        V plain = *(V*)(s.plain + l * STRIDE + m);
        for (int r = 0; r < ROWS; ++r) {
            if (OWN && r >= valid) break;
            const V u = (z[r] - mu) * k;
            V d = (c - u * u) - result[r];
            if (OWN && own[r] >= m && own[r] < m + LANE) d[own[r] - m] += (T)(a.own - a.other);
            const V p = gradient[r] * power_of_two(d) + *(const V*)(s.joint + r * STRIDE + m);
            const V seen = p == 0 ? V{} : u;  // a density of 0 adds nothing, however far it is
            const V towards = p * seen;
            of_z[r] += towards * k;
            of_mean += towards;
            square += towards * seen;
            plain += p;
        }
        *(V*)(s.mean + l * STRIDE + m) = of_mean;
        *(V*)(s.square + l * STRIDE + m) = square;
        *(V*)(s.plain + l * STRIDE + m) = plain;
    }
    for (int r = 0; r < valid; ++r) grad_z[b[r] * a.L + l] -= 2 * LN2 * total(of_z[r]);
}

template <class T>
void backward_tile(const TcLogsumexpBackward& g, const Tile<T>& t, BackwardScratch<T>& s, double* grad_z) {
    typedef typename Lanes<T>::type V;
    constexpr int64_t STRIDE = BACK_TILE_BYTES / sizeof(T), LANE = Lanes<T>::count;
    const TcLogsumexp& a = t.a;
    memset(s.mean, 0, 3 * a.L * BACK_TILE_BYTES);
    for (int64_t row = 0; row < a.B; row += ROWS) {
        int64_t b[ROWS];
        bool special = row + ROWS > a.B;
        const int valid = (int)least(ROWS, a.B - row);
        for (int r = 0; r < ROWS; ++r) {
            b[r] = least(row + r, a.B - 1);
            special |= t.own(b[r]) >= 0;
        }
        joint_shares<T>(g, t, b, s);
        for (int64_t l = 0; l < a.L; ++l) {
            if (special) backward_latent<T, true>(g, t, b, valid, l, s, grad_z);
            else backward_latent<T, false>(g, t, b, valid, l, s, grad_z);
        }
    }
    for (int64_t l = 0; l < a.L; ++l)
        for (int64_t m = 0; m < t.n; m += LANE) {
            const int64_t in = l * STRIDE + m, out = l * a.stride + t.first + m;
            const V k = *(const V*)((const T*)a.scale + out);
            const V of_mean = *(const V*)(s.mean + in);
            *(V*)((T*)g.grad_mean + out) = of_mean == 0 ? V{} : of_mean * k * (T)(2 * LN2);
            *(V*)((T*)g.grad_logvar + out) = *(const V*)(s.square + in) * (T)LN2 - *(const V*)(s.plain + in) * (T)0.5;
        }
}

template <class T>
bool backward(const TcLogsumexpBackward& g) {
    constexpr int64_t SIZE = BACK_TILE_BYTES / sizeof(T);
    const TcLogsumexp& a = g.of;
    const int64_t tiles = (a.stride + SIZE - 1) / SIZE, parts = least(tiles, PARTS), codes = a.B * a.L;
    double* grad_z = (double*)calloc(parts * codes + 1, sizeof(double));
    bool ok = grad_z != nullptr;
    if (ok) {
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
        {
            BackwardScratch<T> s;
            const bool made = make(s, a.L);
            if (!made) {
#pragma omp atomic write
                ok = false;
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t k = tiles * part / parts; made && k < tiles * (part + 1) / parts; ++k)
                    backward_tile<T>(g, {a, k * SIZE, least(SIZE, a.stride - k * SIZE)}, s, grad_z + part * codes);
            free(s.memory);
        }
        for (int64_t k = 0; ok && k < codes; ++k) {
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += grad_z[part * codes + k];
            ((T*)g.grad_z)[k] = (T)sum;
        }
    }
    free(grad_z);
    return ok;
}

}  // namespace

bool tc_logsumexp(const TcLogsumexp& a) { return a.dtype == DType::f64 ? forward<double>(a) : forward<float>(a); }

bool tc_logsumexp_backward(const TcLogsumexpBackward& g) {
    return g.of.dtype == DType::f64 ? backward<double>(g) : backward<float>(g);
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
