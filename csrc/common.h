// What every CPU kernel file shares: element types, vectors, and the rule for names per instruction set.
//
// A kernel file is compiled once per instruction set with VAECIRC_ISA set to its name, and puts its functions into
// namespace vaecirc::<set>. Such a file includes no C++ library header: an inline function of one would be emitted with
// this file's instructions and the linker could pick that copy for a processor that lacks them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace vaecirc {

// Element types of tensors, as _native.py numbers them.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2 };

// One vector of LANES elements; GCC and Clang lower it to whatever registers the instruction set has.
constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x16u __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16u __attribute__((vector_size(32), aligned(2)));
typedef double f64x16 __attribute__((vector_size(128)));
typedef double f64x16u __attribute__((vector_size(128), aligned(8)));

}  // namespace vaecirc

// VAECIRC_FOR_EACH_ISA(X) expands X(set) for every set this build holds.
#if defined(VAECIRC_AVX512)
#define VAECIRC_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#else
#define VAECIRC_FOR_EACH_ISA(X) X(baseline)
#endif
