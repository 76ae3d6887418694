// Contract of the CPU kernel `latent_sweep`; the mathematics is vaecirc_fast/reference/latent_sweep.py.
#pragma once

#include "network_rows.h"

namespace vaecirc {

struct LatentSweep {
    const float* z;          // (B, L)
    const int64_t* latents;  // (J, K) in [0, L): which latents an intervention shifts
    const float* shifts;     // (B, J, K) and by how much
    int64_t L, K;
    NetworkRows rows;  // whose first layer is dense
};

// False when memory ran out.
#define VAECIRC_DECLARE(set)               \
    namespace set {                        \
    bool latent_sweep(const LatentSweep&); \
    }
VAECIRC_FOR_EACH_ISA(VAECIRC_DECLARE)
#undef VAECIRC_DECLARE

}  // namespace vaecirc
