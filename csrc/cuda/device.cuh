// What every CUDA kernel file shares: element types, 16-byte vectors, sums over lanes, and the launch.
//
// tests/cuda_on_cpu compiles these files as plain C++ and runs them thread by thread, so they use no `<<<>>>`, no
// inline assembly, and of CUDA's functions only those that are found there too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace vaecirc {
namespace cuda {

constexpr int WARP = 32;

// The type that elements of type IN are computed in.
template <class IN>
struct WorkingOf {
    typedef float type;
};
template <>
struct WorkingOf<double> {
    typedef double type;
};
template <class IN>
using Working = typename WorkingOf<IN>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }

// N consecutive elements; one access of 16 bytes where they fill it. The address is a multiple of the size.
template <class IN, int N>
struct Vector {
    IN at[N];
};

template <class IN>
constexpr int FULL = 16 / sizeof(IN);

template <class IN, int N>
__device__ inline Vector<IN, N> load(const IN* from) {
    Vector<IN, N> v;
    if constexpr (N == FULL<IN>) {
        const uint4 bits = *reinterpret_cast<const uint4*>(from);
        memcpy(&v, &bits, 16);
    } else {
        static_assert(N == 1, "one element or 16 bytes");
        v.at[0] = *from;
    }
    return v;
}

// The same for data that is read once: it leaves the caches first, so that what is read again can stay.
template <class IN, int N>
__device__ inline Vector<IN, N> load_once(const IN* from) {
    Vector<IN, N> v;
    if constexpr (N == FULL<IN>) {
        const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
        memcpy(&v, &bits, 16);
    } else {
        static_assert(N == 1, "one element or 16 bytes");
        v.at[0] = *from;
    }
    return v;
}

template <class IN, int N>
__device__ inline void store(IN* to, const Vector<IN, N>& v) {
    if constexpr (N == FULL<IN>) {
        uint4 bits;
        memcpy(&bits, &v, 16);
        *reinterpret_cast<uint4*>(to) = bits;
    } else {
        *to = v.at[0];
    }
}

// 1 / (1 + e^-x), to a few ulp, without overflow; NaN for NaN.
__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x)), d = 1.0f + e;
    float s = __fdividef(1.0f, d);      // one instruction, 2 ulp ...
    s = fmaf(s, fmaf(-d, s, 1.0f), s);  // ... and a Newton step
    return x < 0 ? e * s : s;
}
__device__ inline double sigmoid(double x) {
    const double e = exp(-fabs(x)), s = 1.0 / (1.0 + e);
    return x < 0 ? e * s : s;
}

// The sum of x over each aligned run of `lanes` lanes of a warp, in all of them; lanes is a power of two up to 32.
// Every lane of the warp must call it.
template <class T>
__device__ inline T sum_over_lanes(T x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// Launches on `stream` of `device`. Returns null, or what went wrong; faults of the kernel itself are reported by a
// later call, as CUDA does.
template <class Parameters>
const char* launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, int device, void* stream,
                   Parameters parameters) {
    if (blocks < 1 || blocks > 0x7fffffff) return "the launch needs more blocks than CUDA allows (2^31 - 1)";
    int previous = 0;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        void* arguments[] = {&parameters};
        error = cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3((unsigned)threads), arguments, shared,
                                 (cudaStream_t)stream);
        const cudaError_t last = cudaGetLastError();  // clears it as well
        if (error == cudaSuccess) error = last;
        if (previous != device) cudaSetDevice(previous);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace vaecirc
