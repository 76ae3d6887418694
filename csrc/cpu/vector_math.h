// Functions on vectors of 16 numbers: exponentials, sigmoid, activation functions. For CPU kernels.
#pragma once

#include "../common.h"

namespace vaecirc {

// In the order of vaecirc_fast/reference/latent_sweep.py.
enum class Activation : int { identity = 0, relu, leaky_relu, elu, sigmoid, tanh, silu };

namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef f32x16 type;
    typedef f32x16u unaligned;
    typedef i32x16 bits;
    static constexpr int32_t ABS = 0x7fffffff;
};
typedef int64_t i64x16 __attribute__((vector_size(128)));
template <>
struct Vector<double> {
    typedef f64x16 type;
    typedef f64x16u unaligned;
    typedef i64x16 bits;
    static constexpr int64_t ABS = 0x7fffffffffffffff;
};

template <class T>
INLINE typename Vector<T>::type vabs(typename Vector<T>::type x) {
    typedef typename Vector<T>::bits bits;
    return (typename Vector<T>::type)((bits)x & Vector<T>::ABS);
}

// Floats of any width: f32x16 everywhere, or what one register holds, f32x8 and f32x4.
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
template <class V>
struct Bits;
template <>
struct Bits<f32x16> {
    typedef i32x16 type;
};
template <>
struct Bits<f32x8> {
    typedef i32x8 type;
};
template <>
struct Bits<f32x4> {
    typedef i32x4 type;
};

template <class V>
INLINE V absolute(V x) {
    typedef typename Bits<V>::type bits;
    return (V)((bits)x & 0x7fffffff);
}

// e^-t for t >= 0; 0 beyond the normal range, NaN for NaN. Cody-Waite reduction and Taylor polynomial; < 2 ulp.
template <class V>
INLINE V exp_negative(V t) {
    constexpr float LAST = 87.33654f;  // e^-t is the smallest normal number
    const V x = t > LAST ? V{} - LAST : -t;
    const float round = 12582912.0f;  // 1.5 * 2^23
    const V n = (x * 1.44269504f + round) - round;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const typename Bits<V>::type scale = (__builtin_convertvector(n, typename Bits<V>::type) + 127) << 23;
    const V e = p * (V)scale;
    return t > LAST ? V{} : e;
}

INLINE f64x16 exp_negative(f64x16 t) {
    constexpr double LAST = 708.3964185322641;
    const f64x16 x = t > LAST ? f64x16{} - LAST : -t;
    const double round = 6755399441055744.0;  // 1.5 * 2^52
    const f64x16 n = (x * 1.4426950408889634 + round) - round;
    const f64x16 r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    f64x16 p = f64x16{} + 1.0 / 6227020800.0;
    const double inverse_factorial[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    for (double c : inverse_factorial) p = p * r + c;
    const i64x16 scale = (__builtin_convertvector(n, i64x16) + 1023) << 52;
    const f64x16 e = p * (f64x16)scale;
    return t > LAST ? f64x16{} : e;
}

template <class T>
INLINE typename Vector<T>::type sigmoid(typename Vector<T>::type x) {
    const typename Vector<T>::type e = exp_negative(vabs<T>(x));
    const typename Vector<T>::type s = (T)1 / (e + (T)1);
    return x < (T)0 ? e * s : s;
}

// e^-t - 1 for t >= 0, without cancellation near 0; NaN for NaN. As exp_negative, with 1 taken off before scaling.
template <class V>
INLINE V expm1_negative(V t) {
    constexpr float LAST = 87.33654f;
    const V x = t > LAST ? V{} - LAST : -t;
    const float round = 12582912.0f;  // 1.5 * 2^23
    const V n = (x * 1.44269504f + round) - round;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * (1.0f / 40320) + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    const V scale = (V)((__builtin_convertvector(n, typename Bits<V>::type) + 127) << 23);
    return p * scale + (scale - 1.0f);
}

template <class V>
INLINE V logistic(V x) {
    const V e = exp_negative(absolute(x));
    const V s = 1.0f / (e + 1.0f);
    return x < 0 ? e * s : s;
}

template <class V>
INLINE V activated(V x, Activation kind, float slope) {
    switch (kind) {
        case Activation::identity: return x;
        case Activation::relu: return x < 0 ? V{} : x;
        case Activation::leaky_relu: return x < 0 ? x * slope : x;
        case Activation::elu: {
            const V below = expm1_negative(absolute(x)) * slope;
            return x > 0 ? x : below;
        }
        case Activation::sigmoid: return logistic(x);
        case Activation::tanh: {
            const V m = expm1_negative(2 * absolute(x));
            const V y = m / (m + 2);  // of -|x|
            return x > 0 ? -y : x == 0 ? x : y;
        }
        case Activation::silu: return x * logistic(x);
    }
    return x;
}

}  // namespace
}  // namespace VAECIRC_ISA
}  // namespace vaecirc
