// Contract of the CPU kernel `render_sprites`; the mathematics is vaecirc_fast/reference/render_sprites.py.
//
// An image is an outline at a horizontal and a vertical position. Coordinates are whole numbers of 1/256 pixel. Where
// an outline at a vertical position crosses the rows of pixel centres does not depend on the horizontal one, so it
// comes as a table; what is left for each image is the column of each crossing.
#pragma once

#include "../common.h"

namespace vaecirc {

// What an image is written as, in the order of vaecirc_fast/reference/render_sprites.py.
enum class ImageFormat : int { f32 = 0, u8 = 1, bits = 2 };

// Edge e of an outline runs from its vertex e to its vertex e + 1.
struct Crossing {
    int16_t row;    // in [0, 64)
    int16_t edge;   // in [0, vertices - 1)
    int16_t along;  // from where the edge starts to the row's centre, in y
    int16_t rise;   // of the edge in y: > 0 where it runs down, on the right of a clockwise outline; never 0
};

struct RenderSprites {
    const int64_t* factors;  // (B, 6) color, shape, scale, orientation, posX, posY
    int64_t B;
    const int64_t* sizes;  // (6) of the factors
    // (shape scale orientation, posX, vertices) abscissas, the first vertex once more at the end. All crossings lie in
    // columns 1 to 63.
    const int16_t* x;
    int64_t vertices;
    const int32_t* first;       // (shape scale orientation posY + 1) where each list of crossings starts
    const Crossing* crossings;  // lists of at most MAX_CROSSINGS
    ImageFormat format;
    void* out;   // (B, 64, 64) float or uint8_t, or (B, 512) bits, the first pixel in the highest bit
    bool fresh;  // nobody has used `out` before: it may be asked for in large pages
    int threads;
};
constexpr int64_t MAX_CROSSINGS = 64;

// Returns -1, or the first image whose factors are out of range and has then written nothing.
#define VAECIRC_DECLARE(set)                      \
    namespace set {                               \
    int64_t render_sprites(const RenderSprites&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
