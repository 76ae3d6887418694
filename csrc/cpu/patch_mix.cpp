// CPU kernel `patch_mix`: rows are activations with one unit's elements of another's. See patch_mix.h, and
// network_rows.cpp for the work.
#include "patch_mix.h"

namespace vaecirc {
namespace VAECIRC_ISA {

bool patch_mix(const PatchMix& a) {
    return network_rows(a.rows, {a.base, a.L, nullptr, nullptr, 0, a.source, a.order, a.starts, a.stops, a.reference});
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
