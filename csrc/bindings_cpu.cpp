// Python module _C: the CPU kernels, one line an op. Takes raw addresses and sizes, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/boosted_importance.h"
#include "cpu/direct_edges.h"
#include "cpu/effect_reduction.h"
#include "cpu/histogram_mi.h"
#include "cpu/latent_sweep.h"
#include "cpu/patch_mix.h"
#include "cpu/render_scene.h"
#include "cpu/render_sprites.h"
#include "cpu/sparse_adam.h"
#include "cpu/sparse_decode.h"
#include "cpu/tc_logsumexp.h"
#include "cpu/threshold_encode.h"
#include "cpu/topk.h"
#include "cpu/topk_encode.h"
#include "cpu/vq_assign.h"

namespace py = pybind11;
using namespace vaecirc;

namespace {

struct Kernels {
    const char* set;
    bool (*boosted_importance)(const BoostedImportance&);
    void (*direct_edges)(const DirectEdges&);
    bool (*effect_reduction)(const EffectReduction&);
    bool (*effect_reduction_backward)(const EffectReductionBackward&);
    void (*histogram_cut)(const HistogramCut&);
    bool (*histogram_mi)(const HistogramMi&);
    bool (*latent_sweep)(const LatentSweep&);
    bool (*patch_mix)(const PatchMix&);
    bool (*render_scene)(const RenderScene&);
    int64_t (*render_sprites)(const RenderSprites&);
    bool (*tc_logsumexp)(const TcLogsumexp&);
    bool (*tc_logsumexp_backward)(const TcLogsumexpBackward&);
    void (*threshold_encode)(const ThresholdEncode&);
    void (*threshold_encode_backward)(const ThresholdEncodeBackward&);
    bool (*topk)(const TopK&);
    void (*topk_backward)(const TopKBackward&);
    bool (*topk_encode)(const TopKEncode&);
    int64_t (*batch_append)(const BatchAppend&);
    int64_t (*batch_cut)(const BatchCut&);
    void (*batch_fill)(const BatchFill&);
    int64_t (*sparse_decode)(const SparseDecode&);
    int64_t (*sparse_decode_values)(const SparseDecodeValues&);
    int64_t (*sparse_accumulate)(const SparseAccumulate&);
    int64_t (*sparse_adam)(const SparseAdam&);
    bool (*vq_assign)(const VqAssign&);
};

#define VAECIRC_KERNELS(set)         \
    {#set,                           \
     set::boosted_importance,        \
     set::direct_edges,              \
     set::effect_reduction,          \
     set::effect_reduction_backward, \
     set::histogram_cut,             \
     set::histogram_mi,              \
     set::latent_sweep,              \
     set::patch_mix,                 \
     set::render_scene,              \
     set::render_sprites,            \
     set::tc_logsumexp,              \
     set::tc_logsumexp_backward,     \
     set::threshold_encode,          \
     set::threshold_encode_backward, \
     set::topk,                      \
     set::topk_backward,             \
     set::topk_encode,               \
     set::batch_append,              \
     set::batch_cut,                 \
     set::batch_fill,                \
     set::sparse_decode,             \
     set::sparse_decode_values,      \
     set::sparse_accumulate,         \
     set::sparse_adam,               \
     set::vq_assign},
const Kernels BUILT[] = {VAECIRC_FOR_EACH_ISA(VAECIRC_KERNELS)};
const Kernels* chosen = &BUILT[0];

bool runs_here(const std::string& set) {
#if defined(__x86_64__)
    if (set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (set == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512cd") && runs_here("avx2");
#endif
    return set == "baseline";
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels& kernels : BUILT)
        if (runs_here(kernels.set)) names.push_back(kernels.set);
    return names;
}

void set_instruction_set(const std::string& name) {
    for (const Kernels& kernels : BUILT)
        if (name == kernels.set && runs_here(name)) {
            chosen = &kernels;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' was not built or does not run on this processor");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void checked(bool ok) {
    if (!ok) throw std::bad_alloc();
}

// Of kernels over sparse rows: memory is asked for again, whatever else was wrong is for the caller to say.
int64_t what_was_wrong(int64_t wrong) {
    checked(wrong != -2);
    return wrong;
}

// Of kernels over the rows of a network: sizes B, J, P, G; weights, biases, layers and slopes, one a layer; the shape
// C, h, w, H, W; labels, kinds, link, spans and their number, out, threads.
typedef std::tuple<std::array<int64_t, 4>, std::vector<uintptr_t>, std::vector<uintptr_t>,
                   std::vector<std::array<int64_t, 12>>, std::vector<float>, std::array<int64_t, 5>, uintptr_t,
                   std::vector<int32_t>, int, uintptr_t, int64_t, uintptr_t, int>
    NetworkArguments;

// `all` holds the layers that the result points to.
NetworkRows rows_of(const char* op, const NetworkArguments& given, std::vector<SweepLayer>& all) {
    const auto& [sizes, weights, biases, layers, slopes, shape, labels, kinds, link, spans, n_spans, out, threads] =
        given;
    if (weights.size() != layers.size() || biases.size() != layers.size() || slopes.size() != layers.size())
        throw std::invalid_argument(std::string(op) + ": each layer has a weight, a bias and a slope");
    for (size_t n = 0; n < layers.size(); ++n) {
        const auto [kind, activation, in, out, kh, kw, sh, sw, ph, pw, oph, opw] = layers[n];
        all.push_back({int(kind), int(activation), slopes[n], at<float>(weights[n]), at<float>(biases[n]), in, out, kh,
                       kw, sh, sw, ph, pw, oph, opw});
    }
    const auto [B, J, P, G] = sizes;
    const auto [C, h, w, H, W] = shape;
    const int64_t count = all.size(), E = kinds.size();
    return {B,
            J,
            all.data(),
            count,
            C,
            h,
            w,
            H,
            W,
            P,
            at<int32_t>(labels),
            G,
            kinds.data(),
            E,
            link,
            at<int32_t>(spans),
            n_spans,
            at<float>(out),
            threads,
            nullptr};
}

// Of tc_logsumexp: type, z, mean, scale, constant; sizes B, M, L, stride; weights; threads.
typedef std::tuple<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, std::array<int64_t, 4>, std::array<double, 2>, int>
    TcArguments;

TcLogsumexp tc_of(const TcArguments& given, uintptr_t joint, uintptr_t marginals) {
    const auto& [dtype, z, mean, scale, constant, sizes, weights, threads] = given;
    const auto [B, M, L, stride] = sizes;
    return {DType(dtype), at<void>(z), at<void>(mean), at<void>(scale), at<void>(constant),  B,      M, L,
            stride,       weights[0],  weights[1],     at<void>(joint), at<void>(marginals), threads};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of vaecirc_fast on raw addresses; called through vaecirc_fast._native only.";
    m.def("instruction_sets", &instruction_sets, "Sets that were built and run here, narrowest first.");
    m.def("set_instruction_set", &set_instruction_set);
    m.def("instruction_set", [] { return chosen->set; });

    m.def("boosted_importance", [](const std::array<uintptr_t, 7>& in, const std::array<int64_t, 5>& sizes,
                                   const std::array<uintptr_t, 3>& out, int threads) {
        py::gil_scoped_release release;
        const auto [x, order, labels, classes, keys, prior, x_test] = in;
        const auto [N, L, K, T, rounds] = sizes;
        checked(chosen->boosted_importance({at<float>(x), at<int32_t>(order), N, L, at<int32_t>(labels),
                                            at<int64_t>(classes), K, at<uint64_t>(keys), at<double>(prior),
                                            at<float>(x_test), T, rounds, at<double>(out[0]), at<int32_t>(out[1]),
                                            at<int32_t>(out[2]), threads}));
    });
    m.def("direct_edges", [](uintptr_t change, uintptr_t weight, uintptr_t pre, int64_t B, int64_t U, int64_t V,
                             int activation, float slope, int kind, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        chosen->direct_edges({at<float>(change), at<float>(weight), at<float>(pre), B, U, V, activation, slope,
                              EdgeKind(kind), at<float>(out), threads});
    });
    m.def("effect_reduction",
          [](uintptr_t base, uintptr_t perturbed, uintptr_t labels, int dtype, int link, int64_t B, int64_t I,
             int64_t P, int64_t G, const std::vector<int32_t>& kinds, bool sum, uintptr_t out, int threads) {
              py::gil_scoped_release release;
              checked(chosen->effect_reduction({at<void>(base), at<void>(perturbed), at<int32_t>(labels), DType(dtype),
                                                Link(link), B, I, P, G, kinds.data(), int64_t(kinds.size()), sum,
                                                at<void>(out), threads}));
          });
    m.def("effect_reduction_backward",
          [](uintptr_t base, uintptr_t perturbed, uintptr_t labels, int dtype, int link, int64_t B, int64_t I,
             int64_t P, int64_t G, uintptr_t factors, int64_t factors_stride, uintptr_t grad_base,
             uintptr_t grad_perturbed, int threads) {
              py::gil_scoped_release release;
              checked(chosen->effect_reduction_backward(
                  {at<void>(base), at<void>(perturbed), at<int32_t>(labels), DType(dtype), Link(link), B, I, P, G,
                   at<void>(factors), factors_stride, at<void>(grad_base), at<void>(grad_perturbed), threads}));
          });
    // sizes: N, L, bins.
    m.def("histogram_cut", [](int dtype, uintptr_t codes, uintptr_t edges, const std::array<int64_t, 3>& sizes,
                              uintptr_t out, int threads) {
        py::gil_scoped_release release;
        const auto [N, L, bins] = sizes;
        chosen->histogram_cut(
            {DType(dtype), at<void>(codes), at<double>(edges), N, L, bins, at<int32_t>(out), threads});
    });
    // sizes: N, L, K, R, bins. out: information, entropies of codes and levels, information between codes.
    m.def("histogram_mi",
          [](uintptr_t codes, uintptr_t levels, uintptr_t weights, const std::vector<int64_t>& counts,
             const std::array<int64_t, 5>& sizes, bool pairs, const std::array<uintptr_t, 4>& out, int threads) {
              py::gil_scoped_release release;
              const auto [N, L, K, R, bins] = sizes;
              checked(chosen->histogram_mi({at<int32_t>(codes), at<int32_t>(levels), at<uint8_t>(weights),
                                            counts.data(), N, L, K, R, bins, pairs, at<double>(out[0]),
                                            at<double>(out[1]), at<double>(out[2]), at<double>(out[3]), threads}));
          });
    // sizes: B, L, J, K, P, G. layers: 12 numbers each, those of SweepLayer after its pointers, led by kind and
    // activation.
    m.def("latent_sweep",
          [](uintptr_t z, uintptr_t latents, uintptr_t shifts, int64_t L, int64_t K, const NetworkArguments& network) {
              py::gil_scoped_release release;
              std::vector<SweepLayer> layers;
              checked(chosen->latent_sweep({at<float>(z), at<int64_t>(latents), at<float>(shifts), L, K,
                                            rows_of("latent_sweep", network, layers)}));
          });
    // Outputs (B, P) of z before the link, of a network that begins with a dense layer.
    m.def("network_outputs", [](uintptr_t z, int64_t L, uintptr_t outputs, const NetworkArguments& network) {
        py::gil_scoped_release release;
        std::vector<SweepLayer> layers;
        NetworkRows rows = rows_of("network_outputs", network, layers);
        rows.J = 0, rows.outputs = at<float>(outputs);
        checked(chosen->latent_sweep({at<float>(z), nullptr, nullptr, L, 0, rows}));
    });
    m.def("patch_mix", [](uintptr_t base, uintptr_t source, uintptr_t order, uintptr_t starts, uintptr_t stops,
                          uintptr_t reference, int64_t L, const NetworkArguments& network) {
        py::gil_scoped_release release;
        std::vector<SweepLayer> layers;
        checked(
            chosen->patch_mix({at<float>(base), at<float>(source), at<int64_t>(order), at<int64_t>(starts),
                               at<int64_t>(stops), at<float>(reference), L, rows_of("patch_mix", network, layers)}));
    });
    m.def("render_scene",
          [](const std::array<uintptr_t, 7>& in, const std::array<int64_t, 6>& sizes, uintptr_t out, int threads) {
              py::gil_scoped_release release;
              const auto [kind, pose, shape, colour, camera, light, background] = in;
              const auto [B, P, C, H, W, samples] = sizes;
              checked(chosen->render_scene({at<int64_t>(kind), at<float>(pose), at<float>(shape), at<float>(colour),
                                            at<float>(camera), at<float>(light), at<float>(background), B, P, C, H, W,
                                            samples, at<float>(out), threads}));
          });
    m.def("render_sprites",
          [](uintptr_t factors, int64_t B, const std::array<int64_t, 6>& sizes, uintptr_t x, int64_t vertices,
             uintptr_t first, uintptr_t crossings, int format, uintptr_t out, bool fresh, int threads) {
              py::gil_scoped_release release;
              return chosen->render_sprites({at<int64_t>(factors), B, sizes.data(), at<int16_t>(x), vertices,
                                             at<int32_t>(first), at<Crossing>(crossings), ImageFormat(format),
                                             at<void>(out), fresh, threads});
          });
    m.def("tc_logsumexp", [](const TcArguments& given, uintptr_t joint, uintptr_t marginals) {
        py::gil_scoped_release release;
        checked(chosen->tc_logsumexp(tc_of(given, joint, marginals)));
    });
    // read: joint, marginals and their gradients; written: gradients of z, the means and the log variances.
    m.def("tc_logsumexp_backward", [](const TcArguments& given, const std::array<uintptr_t, 4>& read,
                                      const std::array<uintptr_t, 3>& written) {
        py::gil_scoped_release release;
        checked(chosen->tc_logsumexp_backward({tc_of(given, read[0], read[1]), at<void>(read[2]), at<void>(read[3]),
                                               at<void>(written[0]), at<void>(written[1]), at<void>(written[2])}));
    });
    m.def(
        "threshold_encode", [](uintptr_t pre, uintptr_t acts, int64_t B, int64_t M, uintptr_t bias, uintptr_t threshold,
                               int kind, uintptr_t penalty, uintptr_t l0, uintptr_t fired, int threads) {
            py::gil_scoped_release release;
            chosen->threshold_encode({at<float>(pre), at<float>(acts), B, M, at<float>(bias), at<float>(threshold),
                                      Threshold(kind), at<float>(penalty), at<float>(l0), at<int32_t>(fired), threads});
        });
    m.def("threshold_encode_backward",
          [](uintptr_t pre, uintptr_t acts, int64_t B, int64_t M, uintptr_t bias, uintptr_t threshold, int kind,
             float bandwidth, uintptr_t grad_acts, uintptr_t grad_penalty, uintptr_t grad_l0, uintptr_t grad_bias,
             uintptr_t grad_threshold, int threads) {
              py::gil_scoped_release release;
              chosen->threshold_encode_backward({at<float>(pre), at<float>(acts), B, M, at<float>(bias),
                                                 at<float>(threshold), Threshold(kind), bandwidth, at<float>(grad_acts),
                                                 at<float>(grad_penalty), at<float>(grad_l0), at<float>(grad_bias),
                                                 at<float>(grad_threshold), threads});
          });
    m.def("topk", [](uintptr_t a, int dtype, int64_t B, int64_t M, int64_t stride, int64_t k, int64_t K, bool sorted,
                     uintptr_t values, uintptr_t indices, int threads) {
        py::gil_scoped_release release;
        checked(chosen->topk(
            {at<void>(a), DType(dtype), B, M, stride, k, K, sorted, at<void>(values), at<int32_t>(indices), threads}));
    });
    m.def("topk_backward", [](uintptr_t grad, uintptr_t indices, int64_t bytes, int64_t B, int64_t M, int64_t k,
                              int64_t K, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        chosen->topk_backward({at<void>(grad), at<int32_t>(indices), bytes, B, M, k, K, at<void>(out), threads});
    });
    m.def("topk_encode", [](uintptr_t pre, int dtype, int64_t rows, int64_t M, uintptr_t bias, bool relu, int64_t k,
                            int64_t K, uintptr_t values, uintptr_t indices, uintptr_t fired, uintptr_t dead,
                            int64_t n_dead, int64_t k_aux, uintptr_t aux_values, uintptr_t aux_indices, int threads) {
        py::gil_scoped_release release;
        checked(chosen->topk_encode({at<void>(pre), DType(dtype), rows, M, at<float>(bias), relu, k, K,
                                     at<void>(values), at<int32_t>(indices), at<int32_t>(fired), at<int32_t>(dead),
                                     n_dead, k_aux, at<void>(aux_values), at<int32_t>(aux_indices), threads}));
    });
    m.attr("CUT_ALL") = CUT_ALL;
    m.attr("CUT_ZERO") = CUT_ZERO;
    m.def("batch_append", [](uintptr_t pre, int dtype, int64_t rows, int64_t M, uintptr_t bias, int64_t beyond,
                             uintptr_t values, uintptr_t columns, int64_t count, uintptr_t counts, int threads) {
        py::gil_scoped_release release;
        const int64_t found =
            chosen->batch_append({at<void>(pre), DType(dtype), rows, M, at<float>(bias), int32_t(beyond),
                                  at<float>(values), at<int32_t>(columns), count, at<int32_t>(counts), threads});
        checked(found >= 0);
        return found;
    });
    m.def("batch_cut",
          [](uintptr_t values, uintptr_t columns, int64_t count, int64_t keep, uintptr_t counts, int64_t rows) {
              py::gil_scoped_release release;
              const int64_t cut =
                  chosen->batch_cut({at<float>(values), at<int32_t>(columns), count, keep, at<int32_t>(counts), rows});
              checked(cut != INT64_MIN);
              return cut;
          });
    m.def("batch_fill", [](uintptr_t values, uintptr_t columns, uintptr_t counts, int64_t rows, int64_t M,
                           int64_t count, int64_t keep, uintptr_t out_values, uintptr_t out_columns) {
        py::gil_scoped_release release;
        chosen->batch_fill({at<float>(values), at<int32_t>(columns), at<int32_t>(counts), rows, M, count, keep,
                            at<float>(out_values), at<int32_t>(out_columns)});
    });
    m.def("sparse_decode",
          [](uintptr_t values, uintptr_t indices, uintptr_t w, uintptr_t bias, uintptr_t offsets, uintptr_t target,
             int dtype, const std::array<int64_t, 5>& sizes, uintptr_t y, uintptr_t squared_error, int threads) {
              py::gil_scoped_release release;
              const auto [B, K, N, D, M] = sizes;
              return what_was_wrong(chosen->sparse_decode(
                  {at<void>(values), at<int32_t>(indices), at<void>(w), at<void>(bias), at<int32_t>(offsets),
                   at<void>(target), DType(dtype), B, K, N, D, M, at<void>(y), at<void>(squared_error), threads}));
          });
    m.def("sparse_decode_values", [](uintptr_t indices, uintptr_t w, uintptr_t g, uintptr_t offsets, int dtype,
                                     const std::array<int64_t, 5>& sizes, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        const auto [B, K, N, D, M] = sizes;
        return what_was_wrong(
            chosen->sparse_decode_values({at<int32_t>(indices), at<void>(w), at<void>(g), at<int32_t>(offsets),
                                          DType(dtype), B, K, N, D, M, at<void>(out), threads}));
    });
    m.def("sparse_accumulate", [](uintptr_t values, uintptr_t indices, uintptr_t g, uintptr_t offsets, int dtype,
                                  const std::array<int64_t, 5>& sizes, uintptr_t out, uintptr_t totals, int threads) {
        py::gil_scoped_release release;
        const auto [B, K, N, D, M] = sizes;
        return what_was_wrong(
            chosen->sparse_accumulate({at<void>(values), at<int32_t>(indices), at<void>(g), at<int32_t>(offsets),
                                       DType(dtype), B, K, N, D, M, at<void>(out), at<void>(totals), threads}));
    });
    m.def("sparse_adam",
          [](const std::array<uintptr_t, 3>& weight, const std::array<uintptr_t, 3>& bias, uintptr_t values,
             uintptr_t indices, uintptr_t g, uintptr_t offsets, int dtype, const std::array<int64_t, 5>& sizes,
             const std::array<double, 5>& options, int64_t step, bool decoupled, int threads) {
              py::gil_scoped_release release;
              const auto [B, K, N, D, M] = sizes;
              const auto [lr, beta1, beta2, eps, weight_decay] = options;
              return what_was_wrong(chosen->sparse_adam({at<void>(weight[0]),
                                                         at<void>(weight[1]),
                                                         at<void>(weight[2]),
                                                         at<void>(bias[0]),
                                                         at<void>(bias[1]),
                                                         at<void>(bias[2]),
                                                         at<void>(values),
                                                         at<int32_t>(indices),
                                                         at<void>(g),
                                                         at<int32_t>(offsets),
                                                         DType(dtype),
                                                         B,
                                                         K,
                                                         N,
                                                         D,
                                                         M,
                                                         lr,
                                                         beta1,
                                                         beta2,
                                                         eps,
                                                         weight_decay,
                                                         step,
                                                         decoupled,
                                                         threads}));
          });
    // sizes: N, K, D. out: indices, z_q, distances, counts, sums.
    m.def("vq_assign", [](int dtype, uintptr_t z, uintptr_t codebook, const std::array<int64_t, 3>& sizes,
                          const std::array<uintptr_t, 5>& out, int threads) {
        py::gil_scoped_release release;
        checked(chosen->vq_assign({DType(dtype), at<void>(z), at<void>(codebook), sizes[0], sizes[1], sizes[2],
                                   at<int64_t>(out[0]), at<void>(out[1]), at<void>(out[2]), at<int64_t>(out[3]),
                                   at<void>(out[4]), threads}));
    });
}
