// Products of small matrices that stay in cache, for the CPU kernel `latent_sweep`; included by it alone.
//
// Activations are blocks of 16 channels: [channel / 16][pixel][channel % 16], where a pixel may be a row of a batch.
// So neighbouring pixels are always one cache line apart, and a tile of pixels is read through one pointer and offsets
// known at compile time. Weights are panels of PANEL output channels, [step][channel], read from first to last. A tile
// of R x PX pixels times a panel is summed in registers, step by step: the same order for every pixel, wherever it
// stands, so results do not depend on how pixels are cut into tiles.
#pragma once

#include <stdint.h>

#include "../common.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int WIDTH = 16;     // lanes of one register
constexpr int MOST = 12;      // pixels of a tile: with two vectors each, what 32 registers hold
constexpr int MOST_ONE = 16;  // with one vector each
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int MOST = 6;
constexpr int MOST_ONE = 6;
#else
constexpr int WIDTH = 4;
constexpr int MOST = 4;
constexpr int MOST_ONE = 4;
#endif
constexpr int PANEL = 2 * WIDTH;
typedef float vf __attribute__((vector_size(4 * WIDTH), may_alias));

// What follows a sum at once; other activations are a pass of their own over what was written.
enum class After : int { nothing, relu, leaky_relu };

// Where the inputs of one output lie: for each tap, so many blocks of 16 channels, the last of which may be partial.
struct Inputs {
    const int64_t* taps;  // (n_taps) from the pixel's own input to the tap's, in floats
    int64_t n_taps, blocks, last;
    int64_t block;       // floats from one block to the next
    int64_t row;         // floats from one row of pixels to the next
    int64_t first_step;  // of the only tap: earlier steps have zero weights
};

// Where the outputs go.
struct Outputs {
    int64_t block;  // floats from one block of 16 channels to the next
    int64_t row;    // ... from one row of pixels to the next
    int64_t pixel;  // ... from one pixel to the next
    After after;
    float slope;
};

// R x PX pixels (R rows) from `a` on, times V vectors of output channels.
template <int R, int PX, int V>
void tile(const Inputs& in, const Outputs& to, const float* a, const float* w, const float* bias, float* out) {
    vf sum[R * PX][V];
#pragma GCC unroll 16
    for (int i = 0; i < R * PX; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i][v] = *(const vf*)(bias + v * WIDTH);
    int64_t block = in.first_step / LANES, k = in.first_step % LANES;
    w += in.first_step * V * WIDTH;
    for (int64_t t = 0; t < in.n_taps; ++t) {
        for (; block < in.blocks; ++block) {
            const float* p = a + in.taps[t] + block * in.block;
            const float* end = p + (block + 1 < in.blocks ? LANES : in.last);
            for (p += k; p < end; ++p) {
                vf b[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) b[v] = *(const vf*)(w + v * WIDTH);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
                    for (int i = 0; i < PX; ++i) {
                        const vf x = p[r * in.row + i * LANES] - vf{};
#pragma GCC unroll 2
                        for (int v = 0; v < V; ++v) sum[r * PX + i][v] += x * b[v];
                    }
                w += V * WIDTH;
            }
            k = 0;
        }
        block = 0;
    }
    const int64_t second = WIDTH == LANES ? to.block : WIDTH;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < PX; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                vf y = sum[r * PX + i][v];
                if (to.after == After::relu) y = y < 0 ? vf{} : y;
                else if (to.after == After::leaky_relu) y = y < 0 ? y * to.slope : y;
                *(vf*)(out + r * to.row + i * to.pixel + v * second) = y;
            }
}

typedef void Tile(const Inputs&, const Outputs&, const float*, const float*, const float*, float*);

template <int V>
Tile* tile_of(int64_t rows, int64_t pixels) {
#define CASE(r, p)                                                                \
    case r * 100 + p:                                                             \
        if constexpr (r * p <= (V == 1 ? MOST_ONE : MOST)) return &tile<r, p, V>; \
        break;
    switch (rows * 100 + pixels) {
        CASE(1, 1)
        CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8) CASE(1, 9) CASE(1, 10) CASE(1, 11)
            CASE(1, 12) CASE(1, 13) CASE(1, 14) CASE(1, 15) CASE(1, 16) CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
                CASE(4, 1) CASE(4, 2)
    }
    return nullptr;
#undef CASE
}

// A grid of rows x pixels outputs times one panel of V vectors, cut into tiles as even as can be. `step` is the
// distance between neighbouring outputs' inputs: always one pixel.
template <int V>
void grid(const Inputs& in, const Outputs& to, int64_t rows, int64_t pixels, const float* a, const float* w,
          const float* bias, float* out) {
    constexpr int64_t most = V == 1 ? MOST_ONE : MOST;
    if (rows <= 0 || pixels <= 0) return;
    const int64_t cuts = (pixels + most - 1) / most;
    int64_t high = 1;  // rows of a tile
    if (cuts == 1) high = 4 * pixels <= most && pixels <= 2 ? 4 : 2 * pixels <= most && pixels <= 4 ? 2 : 1;
    for (int64_t r = 0; r < rows; r += high) {
        while (high > rows - r) high /= 2;
        int64_t from = 0;
        for (int64_t c = 0; c < cuts; ++c) {
            const int64_t to_pixel = pixels * (c + 1) / cuts;
            tile_of<V>(high, to_pixel - from)(in, to, a + r * in.row + from * LANES, w, bias,
                                              out + r * to.row + from * to.pixel);
            from = to_pixel;
        }
    }
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
