// Vectors of one register of the instruction set at hand: GCC takes wider ones apart through memory.
#pragma once

#include "../common.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // floats of one register
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float vf __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float vfu __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH), may_alias));
typedef double vd __attribute__((vector_size(4 * WIDTH), may_alias));
typedef double vdu __attribute__((vector_size(4 * WIDTH), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(4 * WIDTH), may_alias));

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
