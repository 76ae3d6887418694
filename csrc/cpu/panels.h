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
    const int64_t* taps;    // (n_taps) from the pixel's own input to the tap's, in floats
    const int64_t* shifts;  // (n_taps) in pixels along the row: pixel x takes pixel x + shift of the input
    int64_t n_taps, blocks, last;
    int64_t block;       // floats from one block to the next
    int64_t row;         // floats from one row of pixels to the next
    int64_t pixels;      // of the input's row: beyond are zeros, which may be left out
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

template <int N>
struct Number {
    static constexpr int value = N;
};

// R x PX pixels (R rows) from `a` on, the first of which is number x of its row, times V vectors of output channels.
template <int R, int PX, int V>
void tile(const Inputs& in, const Outputs& to, int64_t x, const float* a, const float* w, const float* bias,
          float* out) {
    vf sum[R * PX][V];
#pragma GCC unroll 16
    for (int i = 0; i < R * PX; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i][v] = *(const vf*)(bias + v * WIDTH);
    // One step of pixels [FROM, TO) of each row.
    const auto step = [&](auto FROM, auto TO, const float* p, const float* w) __attribute__((always_inline)) {
        vf b[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) b[v] = *(const vf*)(w + v * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int i = FROM.value; i < TO.value; ++i) {
                const vf y = p[r * in.row + i * LANES] - vf{};
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) sum[r * PX + i][v] += y * b[v];
            }
    };
    const auto whole_block = [&](auto FROM, auto TO, const float* p) __attribute__((always_inline)) {
        for (const float* stop = p + LANES; p < stop; p += 2, w += 2 * V * WIDTH) {
            step(FROM, TO, p, w);
            step(FROM, TO, p + 1, w + V * WIDTH);
        }
    };
    int64_t block = in.first_step / LANES, k = in.first_step % LANES;
    w += in.first_step * V * WIDTH;
    for (int64_t t = 0; t < in.n_taps; ++t) {
        const int64_t shifted = x + in.shifts[t];
        for (; block < in.blocks; ++block) {
            const float* p = a + in.taps[t] + block * in.block;
            const int64_t end = block + 1 < in.blocks ? LANES : in.last;
            if (end - k == LANES) {
                if (PX > 1 && shifted < 0) whole_block(Number<(PX > 1)>(), Number<PX>(), p);
                else if (PX > 1 && shifted + PX > in.pixels) whole_block(Number<0>(), Number<PX - 1>(), p);
                else whole_block(Number<0>(), Number<PX>(), p);
            } else {
                for (; k < end; ++k, w += V * WIDTH) step(Number<0>(), Number<PX>(), p + k, w);
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

typedef void Tile(const Inputs&, const Outputs&, int64_t, const float*, const float*, const float*, float*);

constexpr int MOST_HIGH = 4;  // rows of a tile

template <int R, int PX, int V>
constexpr Tile* tile_if_it_fits() {
    if constexpr (R * PX <= (V == 1 ? MOST_ONE : MOST)) return &tile<R, PX, V>;
    return nullptr;
}

template <int V>
Tile* tile_of(int64_t rows, int64_t pixels) {
#define FOUR(r, p)                                                                              \
    tile_if_it_fits<r, p, V>(), tile_if_it_fits<r, p + 1, V>(), tile_if_it_fits<r, p + 2, V>(), \
        tile_if_it_fits<r, p + 3, V>()
#define ROW(r)                                          \
    {                                                   \
        FOUR(r, 1), FOUR(r, 5), FOUR(r, 9), FOUR(r, 13) \
    }
    static constexpr Tile* tiles[MOST_HIGH][16] = {ROW(1), ROW(2), ROW(3), ROW(4)};
#undef ROW
#undef FOUR
    return tiles[rows - 1][pixels - 1];
}

// n cut into parts of at most `most`, as even as can be: the first `more` have one element more than the rest.
struct Cuts {
    int count, least, more;
    Cuts(int n, int most) : count((n + most - 1) / most), least(n / count), more(n % count) {}
    int size(int64_t part) const { return least + (part < more); }
};

// A grid of rows x pixels outputs times one panel of V vectors, cut into tiles as even as can be. `a` is where the
// first output's own input lies.
template <int V>
void grid(const Inputs& in, const Outputs& to, int64_t rows, int64_t pixels, const float* a, const float* w,
          const float* bias, float* out) {
    constexpr int64_t most = V == 1 ? MOST_ONE : MOST;
    if (rows <= 0 || pixels <= 0) return;
    const int64_t high = pixels > most ? 1 : most / pixels < MOST_HIGH ? most / pixels : MOST_HIGH;
    const Cuts along((int)pixels, (int)most), down((int)rows, (int)high);
    for (int64_t b = 0, y = 0; b < down.count; ++b) {
        const int64_t next = y + down.size(b);
        for (int64_t c = 0, x = 0; c < along.count; ++c) {
            const int64_t stop = x + along.size(c);
            tile_of<V>(next - y, stop - x)(in, to, x, a + y * in.row + x * LANES, w, bias,
                                           out + y * to.row + x * to.pixel);
            x = stop;
        }
        y = next;
    }
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
