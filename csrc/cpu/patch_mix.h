// Contract of the CPU kernel `patch_mix`; the mathematics is vaecirc_fast/reference/patch_mix.py.
#pragma once

#include "network_rows.h"

namespace vaecirc {

struct PatchMix {
    const float* base;       // (B, L)
    const float* source;     // (B, L)
    const int64_t* order;    // (L) elements, those of a unit side by side
    const int64_t* starts;   // (J) where unit j's begin in it
    const int64_t* stops;    // (J) and end
    const float* reference;  // (B, L), whose outputs effects are against, or null: base's
    int64_t L;
    NetworkRows rows;
};

// False when memory ran out.
#define VAECIRC_DECLARE(set)         \
    namespace set {                  \
    bool patch_mix(const PatchMix&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
