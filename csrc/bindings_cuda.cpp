// Python module _C_cuda: the CUDA kernels, one line an op. Takes raw addresses and sizes, so one build serves every
// torch, and imports where there is no GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/effect_reduction.cuh"

namespace py = pybind11;
using namespace vaecirc::cuda;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void checked(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of vaecirc_fast on raw addresses; called through vaecirc_fast._native only.";
    m.attr("architectures") = VAECIRC_CUDA_ARCHITECTURES;
    m.def("device_count", &device_count, "Devices that CUDA sees; 0 where there is no driver or no GPU.");
    m.def("device_error", &device_error, "Why there is none, or an empty string.");

    m.def("effect_reduction",
          [](uintptr_t base, uintptr_t perturbed, uintptr_t order, uintptr_t offsets, int dtype, int link, int64_t B,
             int64_t I, int64_t P, int64_t G, int64_t elements, const std::vector<int>& kinds, bool sum, int64_t outer,
             uintptr_t out, int device, uintptr_t stream) {
              checked(effect_reduction({at<void>(base), at<void>(perturbed), at<int32_t>(order), at<int32_t>(offsets),
                                        DType(dtype), Link(link), B, I, P, G, elements, kinds.data(), int(kinds.size()),
                                        sum, outer, at<void>(out), device, at<void>(stream)}));
          });
    m.def("effect_reduction_backward",
          [](uintptr_t base, uintptr_t perturbed, uintptr_t labels, int dtype, int link, int64_t B, int64_t I,
             int64_t P, int64_t G, uintptr_t factors, int64_t factors_stride, uintptr_t grad_perturbed, int64_t parts,
             uintptr_t grad_base, int device, uintptr_t stream) {
              checked(effect_reduction_backward({at<void>(base), at<void>(perturbed), at<int32_t>(labels), DType(dtype),
                                                 Link(link), B, I, P, G, at<void>(factors), factors_stride,
                                                 at<void>(grad_perturbed), parts, at<void>(grad_base), device,
                                                 at<void>(stream)}));
          });
}
