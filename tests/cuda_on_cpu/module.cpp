// The module _C_cuda on the CPU: the project's own kernels and bindings, compiled against the headers beside this file.
#define VAECIRC_CUDA_ARCHITECTURES "the CPU"
#include "bindings_cuda.cpp"
#include "cuda/device.cu"
#include "cuda/effect_reduction.cu"
