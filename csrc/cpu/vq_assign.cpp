// CPU kernel `vq_assign`: nearest codes by tiles of rows and codes in registers. See vq_assign.h.
//
// Lanes are codes. A panel, two vectors of codes, stays in L1 while a block of rows passes over it, a tile of ROWS rows
// at a time; each row keeps a running minimum and where it was, lane by lane. Earlier codes win ties in a lane, and the
// lowest code among the lanes at the end.
#include "vq_assign.h"

#include <stdlib.h>
#include <string.h>

#include "registers.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // of a tile: with two vectors each, what 32 registers hold
#elif defined(__AVX2__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 4;
#endif
constexpr int64_t BLOCK = 192;  // rows that pass over a panel; whole tiles

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef vf type;
    typedef vfu loose;
    typedef vi whole;
    typedef int32_t number;
    static constexpr int64_t count = WIDTH;
};
template <>
struct Lanes<double> {
    typedef vd type;
    typedef vdu loose;
    typedef vl whole;
    typedef int64_t number;
    static constexpr int64_t count = WIDTH / 2;
};

// The codebook in panels [panel][1 + D][2 vectors]: half of each code's square, then its channels. Beyond the last code
// the half is infinite.
template <class T>
void pack(const VqAssign& a, T* panels) {
    constexpr int64_t PANEL = 2 * Lanes<T>::count;
    const int64_t count = (a.K + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < count; ++p) {
        T* panel = panels + p * (1 + a.D) * PANEL;
        for (int64_t c = 0; c < PANEL; ++c) {
            const int64_t k = p * PANEL + c;
            const T* e = (const T*)a.codebook + k * a.D;
            double square = k < a.K ? 0 : __builtin_inf();
            for (int64_t d = 0; d < a.D; ++d) {
                const T value = k < a.K ? e[d] : 0;
                square += (double)value * value;
                panel[(1 + d) * PANEL + c] = value;
            }
            panel[c] = (T)(square / 2);
        }
    }
}

// The least of each lane so far, and the number of the vector it was in, of one row.
template <class T>
struct Least {
    typename Lanes<T>::type value;
    typename Lanes<T>::whole vector;
};

// ROWS rows z, (D, ROWS), times one panel, the vectors of which are number 2 p and 2 p + 1.
template <class T>
void tile(const T* z, const T* panel, int64_t D, int64_t p, Least<T>* least) {
    typedef typename Lanes<T>::type V;
    typedef typename Lanes<T>::whole W;
    constexpr int64_t LANE = Lanes<T>::count;
    V score[ROWS][2];
    const V half[2] = {*(const V*)panel, *(const V*)(panel + LANE)};
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) score[r][0] = half[0], score[r][1] = half[1];
    const T* e = panel + 2 * LANE;
    for (int64_t d = 0; d < D; ++d, e += 2 * LANE, z += ROWS) {
        const V first = *(const V*)e, second = *(const V*)(e + LANE);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const V x = z[r] - V{};
            score[r][0] -= x * first;
            score[r][1] -= x * second;
        }
    }
    const W number = W{} + (typename Lanes<T>::number)(2 * p);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        V value = least[r].value;
        W vector = least[r].vector;
        const W sooner = score[r][0] < value;
        value = sooner ? score[r][0] : value;
        vector = sooner ? number : vector;
        const W later = score[r][1] < value;
        least[r].value = later ? score[r][1] : value;
        least[r].vector = later ? number + 1 : vector;
    }
}

template <class T>
INLINE int64_t code_of(const Least<T>& least) {
    T value = (T)__builtin_inf();
    int64_t code = 0;  // where no code is nearer than infinity
    for (int64_t lane = 0; lane < Lanes<T>::count; ++lane) {
        const int64_t k = (int64_t)least.vector[lane] * Lanes<T>::count + lane;
        const bool better = least.value[lane] < value || (least.value[lane] == value && k < code);
        if (better && least.value[lane] < (T)__builtin_inf()) value = least.value[lane], code = k;
    }
    return code;
}

template <class T>
INLINE T total(typename Lanes<T>::type v) {
    T sum = v[0];
    for (int64_t k = 1; k < Lanes<T>::count; ++k) sum += v[k];
    return sum;
}

// Whether a row is finite: 0 times it is 0.
template <class T>
INLINE bool finite(const T* z, int64_t D) {
    typedef typename Lanes<T>::type V;
    typedef typename Lanes<T>::loose U;
    constexpr int64_t LANE = Lanes<T>::count;
    V zeros = {};
    int64_t d = 0;
    for (; d + LANE <= D; d += LANE) zeros += *(const U*)(z + d) * (T)0;
    T rest = total<T>(zeros);
    for (; d < D; ++d) rest += z[d] * 0;
    return rest == 0;
}

// Copies a code and returns its squared distance.
template <class T>
INLINE T take(const T* z, const T* e, T* z_q, int64_t D) {
    typedef typename Lanes<T>::type V;
    typedef typename Lanes<T>::loose U;
    constexpr int64_t LANE = Lanes<T>::count;
    V squares = {};
    int64_t d = 0;
    for (; d + LANE <= D; d += LANE) {
        const V code = *(const U*)(e + d), off = *(const U*)(z + d) - code;
        *(U*)(z_q + d) = code;
        squares += off * off;
    }
    T sum = total<T>(squares);
    for (; d < D; ++d) {
        const T off = z[d] - e[d];
        z_q[d] = e[d];
        sum += off * off;
    }
    return sum;
}

// What a thread works on: a block's rows, (tile, D, ROWS), and their running minima.
template <class T>
struct Scratch {
    Least<T>* least;
    T* rows;
    void* memory;
};

template <class T>
bool make(Scratch<T>& s, int64_t D) {
    if (posix_memalign(&s.memory, 128, BLOCK * (sizeof(Least<T>) + D * sizeof(T)))) {
        s.memory = nullptr;
        return false;
    }
    s.least = (Least<T>*)s.memory;
    s.rows = (T*)(s.least + BLOCK);
    return true;
}

template <class T>
void block(const VqAssign& a, const T* panels, int64_t first, const Scratch<T>& s) {
    constexpr int64_t PANEL = 2 * Lanes<T>::count;
    typedef typename Lanes<T>::type V;
    typedef typename Lanes<T>::whole W;
    const int64_t n = first + BLOCK < a.N ? BLOCK : a.N - first, tiles = (n + ROWS - 1) / ROWS;
    const T* z = (const T*)a.z + first * a.D;
    for (int64_t r = 0; r < tiles * ROWS; ++r) {
        s.least[r] = Least<T>{V{} + (T)__builtin_inf(), W{}};
        const T* row = z + (r < n ? r : n - 1) * a.D;
        T* to = s.rows + r / ROWS * a.D * ROWS + r % ROWS;
        for (int64_t d = 0; d < a.D; ++d) to[d * ROWS] = row[d];
    }
    for (int64_t p = 0; p * PANEL < a.K; ++p)
        for (int64_t t = 0; t < tiles; ++t)
            tile<T>(s.rows + t * a.D * ROWS, panels + p * (1 + a.D) * PANEL, a.D, p, s.least + t * ROWS);
    for (int64_t r = 0; r < n; ++r) {
        const int64_t k = finite(z + r * a.D, a.D) ? code_of(s.least[r]) : 0;
        a.indices[first + r] = k;
        ((T*)a.distance)[first + r] =
            take(z + r * a.D, (const T*)a.codebook + k * a.D, (T*)a.z_q + (first + r) * a.D, a.D);
    }
}

// Rows are added to their code in their order, whoever adds them: of so many parts, part i has every so-many-th code.
template <class T>
void add_up(const VqAssign& a, int64_t part, int64_t parts) {
    for (int64_t k = part; k < a.K; k += parts) {
        a.counts[k] = 0;
        memset((T*)a.sums + k * a.D, 0, a.D * sizeof(T));
    }
    for (int64_t n = 0; n < a.N; ++n) {
        const int64_t k = a.indices[n];
        if (k % parts != part) continue;
        ++a.counts[k];
        const T* z = (const T*)a.z + n * a.D;
        T* sum = (T*)a.sums + k * a.D;
        for (int64_t d = 0; d < a.D; ++d) sum[d] += z[d];
    }
}

template <class T>
bool assign(const VqAssign& a) {
    constexpr int64_t PANEL = 2 * Lanes<T>::count;
    const int64_t panels = (a.K + PANEL - 1) / PANEL, tasks = (a.N + BLOCK - 1) / BLOCK;
    void* packed;
    if (posix_memalign(&packed, 128, panels * (1 + a.D) * PANEL * sizeof(T))) return false;
    pack<T>(a, (T*)packed);
    bool ok = true;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        Scratch<T> s;
        const bool made = make(s, a.D);
        if (!made) {
#pragma omp atomic write
            ok = false;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tasks; ++t)
            if (made) block<T>(a, (const T*)packed, t * BLOCK, s);
        free(s.memory);
    }
    free(packed);
    if (!ok || !a.counts) return ok;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static, 1)
    for (int part = 0; part < a.threads; ++part) add_up<T>(a, part, a.threads);
    return true;
}

}  // namespace

bool vq_assign(const VqAssign& a) { return a.dtype == DType::f64 ? assign<double>(a) : assign<float>(a); }

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
