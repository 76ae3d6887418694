// CPU kernel `latent_sweep`: rows are codes with shifted latents. See latent_sweep.h, and network_rows.cpp for the
// work.
#include "latent_sweep.h"

namespace vaecirc {
namespace VAECIRC_ISA {

bool latent_sweep(const LatentSweep& a) {
    return network_rows(a.rows, {a.z, a.L, a.latents, a.shifts, a.K, nullptr, nullptr, nullptr, nullptr, nullptr});
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
