// Contract of the CPU kernels of `histogram_mi`; the mathematics is vaecirc_fast/reference/histogram_mi.py.
//
// Counts are integers, so the results are the same to the bit for any number of threads. Of weighted samples the memory
// asked for is that of the weights again, and 256 bytes a cell of one code's histograms for each thread.
#pragma once

#include "../common.h"

namespace vaecirc {

struct HistogramCut {
    DType dtype;          // f32 or f64, of the codes
    const void* codes;    // (N, L)
    const double* edges;  // (L, bins) ascending; the first is at most the least code
    int64_t N, L, bins;
    int32_t* out;  // (L, N) the last edge that is at most the code
    int threads;
};

struct HistogramMi {
    const int32_t* codes;    // (L, N) in [0, bins)
    const int32_t* levels;   // (K, N) in [0, sizes[k])
    const uint8_t* weights;  // (R, N) how often a sample counts; null: once, with R = 1
    const int64_t* sizes;    // (K); bins * sizes[k] and, of pairs, bins^2 are below 2^31
    int64_t N, L, K, R, bins;
    bool pairs;           // of codes too
    double* information;  // (R, L, K)
    double* of_codes;     // (R, L) entropies
    double* of_levels;    // (R, K)
    double* between;      // (R, L, L) if pairs
    int threads;
};

// The second returns false when memory ran out.
#define VAECIRC_DECLARE(set)                 \
    namespace set {                          \
    void histogram_cut(const HistogramCut&); \
    bool histogram_mi(const HistogramMi&);   \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
