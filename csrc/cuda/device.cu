// Which GPUs CUDA sees.
#include <cuda_runtime.h>

#include "device.h"

namespace vaecirc {
namespace cuda {

int device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) cudaGetLastError();  // so that no later launch reports it
    return error == cudaSuccess ? count : 0;
}

const char* device_error() {
    if (device_count() > 0) return "";
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver is installed";
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();
    return error == cudaSuccess ? "the CUDA driver sees no GPU" : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace vaecirc
