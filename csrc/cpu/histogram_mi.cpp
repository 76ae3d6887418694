// CPU kernels of `histogram_mi`: joint counts of all pairs in one pass over the samples. See histogram_mi.h.
//
// A task is one code and, of weighted samples, 64 resamples of them: a sample then adds one row of weights to one row
// of counts. Without weights a sample adds one to a table that stays in L1.
#include "histogram_mi.h"

#include <stdlib.h>
#include <string.h>

#include "registers.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t LANE = 64;       // resamples of a task
constexpr int64_t SAMPLES = 2048;  // of a tile: 128 KB of weights
constexpr int64_t CUT_SAMPLES = 256;
constexpr int64_t COPIES = 4;  // of a table without weights: the same cell twice in a row would wait for itself
constexpr int64_t MOST_LOGS = 1 << 16;

// A plain loop: GCC 12 takes a conversion of vectors of bytes apart.
INLINE void add_row(uint32_t* __restrict counts, const uint8_t* __restrict weights) {
    for (int64_t r = 0; r < LANE; ++r) counts[r] += weights[r];
}

// n log n of counts, from a table while they are small.
struct Logs {
    double* table;
    int64_t size;

    double operator()(uint32_t n) const { return n < size ? table[n] : (double)n * __builtin_log((double)n); }
};

// What the counts of one variable or pair sum up to, in each of the lanes.
struct Sums {
    double logs[LANE];                  // of n log n
    uint32_t total[LANE], cells[LANE];  // of n; cells that have any

    void clear() { memset((void*)this, 0, sizeof *this); }

    void add(const uint32_t* counts, int64_t lanes, const Logs& logs_of) {
        for (int64_t r = 0; r < lanes; ++r) {
            logs[r] += logs_of(counts[r]);
            total[r] += counts[r];
            cells[r] += counts[r] > 0;
        }
    }

    double entropy(int64_t r) const {
        if (cells[r] < 2) return 0;
        return __builtin_log((double)total[r]) - logs[r] / total[r];
    }
};

// A partner of the task's code: a factor, or a code before it.
struct Partner {
    const int32_t* column;
    int64_t size;
    uint32_t* counts;  // (bins, size, stride)
};

struct Task {
    const HistogramMi& a;
    const Logs& logs;
    const uint8_t* weights;  // (N, LANE) of this task's resamples, or null
    int64_t code, first, lanes;
    uint32_t* counts;
    Partner* partners;
    Sums *joint, *of_code, *of_partner;

    int64_t stride() const { return weights ? LANE : COPIES; }
    int64_t count() const { return a.K + (a.pairs ? code : 0); }

    void lay_out() {
        uint32_t* next = counts;
        for (int64_t p = 0; p < count(); ++p) {
            const bool factor = p < a.K;
            const int32_t* column = factor ? a.levels + p * a.N : a.codes + (p - a.K) * a.N;
            partners[p] = {column, factor ? a.sizes[p] : a.bins, next};
            next += a.bins * partners[p].size * stride();
        }
        memset(counts, 0, (next - counts) * sizeof(uint32_t));
    }

    void add_samples(const Partner& p, int64_t from, int64_t to) const {
        const int32_t *of_code = a.codes + code * a.N, *other = p.column;
        const int32_t size = (int32_t)p.size;
        if (!weights) {
            for (int64_t n = from; n < to; ++n) p.counts[(of_code[n] * size + other[n]) * COPIES + n % COPIES] += 1;
            return;
        }
        for (int64_t n = from; n < to; ++n) {
            const int32_t cell = of_code[n] * size + other[n];
            add_row(p.counts + cell * LANE, weights + n * LANE);
        }
    }

    // Entropies of the task's code, of partner p and of both; then what they share.
    void reduce(int64_t p) const {
        const Partner& partner = partners[p];
        const int64_t width = stride();
        alignas(64) uint32_t sums[LANE];
        joint->clear(), of_code->clear(), of_partner->clear();
        if (!weights)  // the copies become one
            for (int64_t c = 0; c < a.bins * partner.size; ++c) {
                uint32_t* n = partner.counts + c * COPIES;
                for (int64_t k = 1; k < COPIES; ++k) n[0] += n[k];
            }
        for (int64_t b = 0; b < a.bins; ++b) {
            memset(sums, 0, sizeof sums);
            for (int64_t s = 0; s < partner.size; ++s) {
                const uint32_t* n = partner.counts + (b * partner.size + s) * width;
                for (int64_t r = 0; r < lanes; ++r) sums[r] += n[r];
                joint->add(n, lanes, logs);
            }
            of_code->add(sums, lanes, logs);
        }
        for (int64_t s = 0; s < partner.size; ++s) {
            memset(sums, 0, sizeof sums);
            for (int64_t b = 0; b < a.bins; ++b) {
                const uint32_t* n = partner.counts + (b * partner.size + s) * width;
                for (int64_t r = 0; r < lanes; ++r) sums[r] += n[r];
            }
            of_partner->add(sums, lanes, logs);
        }
        for (int64_t r = 0; r < lanes; ++r) {
            const double one = of_code->entropy(r), other = of_partner->entropy(r);
            double shared = one == 0 || other == 0 ? 0 : one + other - joint->entropy(r);
            if (shared < 0) shared = 0;  // rounding of independent counts
            const int64_t out = first + r, j = p - a.K;
            if (p < a.K) {
                a.information[(out * a.L + code) * a.K + p] = shared;
                if (code == 0) a.of_levels[out * a.K + p] = other;
                if (p == 0) a.of_codes[out * a.L + code] = one;
                if (p == 0 && a.pairs) a.between[(out * a.L + code) * a.L + code] = one;
            } else {
                a.between[(out * a.L + code) * a.L + j] = a.between[(out * a.L + j) * a.L + code] = shared;
            }
        }
    }

    void run() {
        lay_out();
        for (int64_t from = 0; from < a.N; from += SAMPLES) {
            const int64_t to = from + SAMPLES < a.N ? from + SAMPLES : a.N;
            for (int64_t p = 0; p < count(); ++p) add_samples(partners[p], from, to);
        }
        for (int64_t p = 0; p < count(); ++p) reduce(p);
    }
};

// Memory whose rows of LANE counts or weights are whole cache lines.
void* allocated(int64_t bytes) {
    void* memory;
    return posix_memalign(&memory, 64, bytes + 64) ? nullptr : memory;
}

// Weights (R, N) as (blocks of LANE, N, LANE), 0 beyond R.
void interleave(const HistogramMi& a, int64_t blocks, uint8_t* out) {
    const int64_t tiles = (a.N + SAMPLES - 1) / SAMPLES;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t t = 0; t < blocks * tiles; ++t) {
        const int64_t block = t / tiles, from = t % tiles * SAMPLES;
        const int64_t to = from + SAMPLES < a.N ? from + SAMPLES : a.N;
        uint8_t* rows = out + (block * a.N + from) * LANE;
        memset(rows, 0, (to - from) * LANE);
        for (int64_t r = 0; r < LANE && block * LANE + r < a.R; ++r) {
            const uint8_t* w = a.weights + (block * LANE + r) * a.N + from;
            for (int64_t n = 0; n < to - from; ++n) rows[n * LANE + r] = w[n];
        }
    }
}

// Tile by tile, since a row holds all codes of a sample.
template <class T>
void cut(const HistogramCut& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t from = 0; from < a.N; from += CUT_SAMPLES) {
        const int64_t to = from + CUT_SAMPLES < a.N ? from + CUT_SAMPLES : a.N;
        for (int64_t l = 0; l < a.L; ++l) {
            const double* edges = a.edges + l * a.bins;
            const double least = edges[0], per_bin = a.bins > 1 ? 1 / (edges[1] - edges[0]) : 0;
            for (int64_t n = from; n < to; ++n) {
                const double x = ((const T*)a.codes)[n * a.L + l], guess = (x - least) * per_bin;
                // near enough: the edges themselves decide
                int64_t k = guess >= a.bins ? a.bins - 1 : guess > 0 ? (int64_t)guess : 0;
                while (k + 1 < a.bins && x >= edges[k + 1]) ++k;
                while (k > 0 && x < edges[k]) --k;
                a.out[l * a.N + n] = (int32_t)k;
            }
        }
    }
}

}  // namespace

void histogram_cut(const HistogramCut& a) {
    if (a.dtype == DType::f64) cut<double>(a);
    else cut<float>(a);
}

bool histogram_mi(const HistogramMi& a) {
    const int64_t blocks = a.weights ? (a.R + LANE - 1) / LANE : 1, tasks = blocks * a.L;
    const int threads = a.threads < tasks ? a.threads : tasks > 0 ? (int)tasks : 1;
    int64_t cells = a.pairs ? a.L * a.bins : 0;
    for (int64_t k = 0; k < a.K; ++k) cells += a.sizes[k];
    cells *= a.bins * (a.weights ? LANE : COPIES);
    Logs logs = {nullptr, 4 * a.N + LANE < MOST_LOGS ? 4 * a.N + LANE : MOST_LOGS};
    logs.table = (double*)malloc(logs.size * sizeof(double));
    uint8_t* weights = a.weights ? (uint8_t*)allocated(blocks * a.N * LANE) : nullptr;
    bool ok = logs.table && (weights || !a.weights);
    if (ok) {
        logs.table[0] = 0;
        for (int64_t n = 1; n < logs.size; ++n) logs.table[n] = (double)n * __builtin_log((double)n);
        if (weights) interleave(a, blocks, weights);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            uint32_t* counts = (uint32_t*)allocated(cells * sizeof(uint32_t));
            Partner* partners = (Partner*)malloc((a.K + a.L) * sizeof(Partner));
            Sums* sums = (Sums*)malloc(3 * sizeof(Sums));
            const bool made = counts && partners && sums;
            if (!made) {
#pragma omp atomic write
                ok = false;
            }
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < tasks; ++t) {
                const int64_t block = t / a.L, first = block * LANE;
                const int64_t lanes = !weights ? 1 : a.R - first < LANE ? a.R - first : LANE;
                const uint8_t* of_block = weights ? weights + block * a.N * LANE : nullptr;
                Task task = {a, logs, of_block, t % a.L, first, lanes, counts, partners, sums, sums + 1, sums + 2};
                if (made) task.run();
            }
            free(counts);
            free(partners);
            free(sums);
        }
    }
    free(weights);
    free(logs.table);
    return ok;
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
