// Contract of the CPU kernel `render_scene`; the mathematics is vaecirc_fast/reference/render_scene.py.
//
// What a solid is to a camera is computed once an image in float64: coefficients of affine functions of the screen's u
// and v. Rays are then cast in float32, a vector of neighbours at a time, within the rectangle that a solid can cover.
#pragma once

#include "../common.h"

namespace vaecirc {

// Kinds of solids, as vaecirc_fast/reference/render_scene.py numbers them; a prism of n sides is prism + n.
enum class SolidKind : int64_t { absent = 0, plane = 1, box = 2, ellipsoid = 3, cone = 4, capsule = 5, prism = 10 };

struct RenderScene {
    const int64_t* kind;      // (B, P), all known
    const float* pose;        // (B, P, 3, 4) world -> solid
    const float* shape;       // (B, P)
    const float* colour;      // (B, P, C)
    const float* camera;      // (B, 4, 3) right, down, forward, position
    const float* light;       // (B, 4) direction, ambient share
    const float* background;  // (B, 2, C) at the top, at the bottom
    int64_t B, P, C, H, W;    // C 1 or 3
    int64_t samples;          // rays of a pixel in each direction, 1 to 4
    float* out;               // (B, C, H, W)
    int threads;
};

// Returns false where memory was lacking, and has then written nothing.
#define VAECIRC_DECLARE(set)               \
    namespace set {                        \
    bool render_scene(const RenderScene&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
