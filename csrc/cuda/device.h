// Contract of csrc/cuda/device.cu: which GPUs CUDA sees, for callers that know nothing of CUDA.
#pragma once

namespace vaecirc {
namespace cuda {

int device_count();          // 0 where there is no driver or no GPU
const char* device_error();  // why there is none; empty where there is one

}  // namespace cuda
}  // namespace vaecirc
