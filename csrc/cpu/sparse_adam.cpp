// CPU kernel `sparse_adam`: entries sorted by latent, then for some latents at a time their gradients, which stay in
// cache, and the step of Adam: parameter and moments pass through memory once. See sparse_adam.h.
#include "sparse_adam.h"

#include "../sparse_entries.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#else
    for (int l = 0; l < WIDTH; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
#endif
}

// What a step multiplies with, computed in double as torch.optim.Adam does.
struct Step {
    float decay;         // of the parameter, by decoupled weight decay: 1 - lr * weight_decay
    float weight_decay;  // added to the gradient
    float rise1;         // 1 - beta1
    float beta2, rise2;
    float root;  // 1 / sqrt(1 - beta2^step)
    float eps;
    float size;  // lr / (1 - beta1^step)
};

double power(double x, int64_t n) {
    double result = 1;
    for (; n > 0; n /= 2, x *= x)
        if (n % 2) result *= x;
    return result;
}

Step make_step(const SparseAdam& args) {
    Step s;
    s.decay = args.decoupled ? (float)(1 - args.lr * args.weight_decay) : 1;
    s.weight_decay = args.decoupled ? 0 : (float)args.weight_decay;
    s.rise1 = (float)(1 - args.beta1);
    s.beta2 = (float)args.beta2, s.rise2 = (float)(1 - args.beta2);
    s.root = (float)(1 / __builtin_sqrt(1 - power(args.beta2, args.step)));
    s.eps = (float)args.eps;
    s.size = (float)(args.lr / (1 - power(args.beta1, args.step)));
    return s;
}

INLINE void update(const Step& s, Floats grad, Floats& param, Floats& exp_avg, Floats& exp_avg_sq) {
    param *= s.decay;
    if (s.weight_decay != 0) grad += s.weight_decay * param;  // else an infinite parameter would spoil the gradient
    exp_avg += s.rise1 * (grad - exp_avg);
    exp_avg_sq = s.beta2 * exp_avg_sq + s.rise2 * grad * grad;
    param -= s.size * exp_avg / (square_root(exp_avg_sq) * s.root + s.eps);
}

// A step of n parameters.
template <class T>
INLINE void update_row(const Step& s, const float* grad, T* param, T* exp_avg, T* exp_avg_sq, int64_t n) {
    int64_t d = 0;
    for (; d + WIDTH <= n; d += WIDTH) {
        Floats p = load(param + d), m = load(exp_avg + d), v = load(exp_avg_sq + d);
        update(s, load(grad + d), p, m, v);
        store(p, param + d), store(m, exp_avg + d), store(v, exp_avg_sq + d);
    }
    if (d == n) return;
    Floats last[4] = {};
    for (int64_t l = 0; d + l < n; ++l) {
        last[0][l] = grad[d + l];
        last[1][l] = widen(param[d + l]), last[2][l] = widen(exp_avg[d + l]), last[3][l] = widen(exp_avg_sq[d + l]);
    }
    update(s, last[0], last[1], last[2], last[3]);
    for (int64_t l = 0; d + l < n; ++l) {
        narrow(last[1][l], param + d + l), narrow(last[2][l], exp_avg + d + l), narrow(last[3][l], exp_avg_sq + d + l);
    }
}

// Gradients of so many numbers are formed, then their parameters changed: long runs of each, which is what the memory
// is fast at, and short enough for L2.
constexpr int64_t GRADS = 16384;

template <class T>
int64_t run(const SparseAdam& args) {
    const Rows rows = {args.offsets, args.B, args.K, args.N};
    const int64_t D = args.D;
    const int64_t fitting = GRADS / (D + 1) + 1, shared = args.M / 64 + 1;  // latents: enough blocks for all threads
    const int64_t some = fitting < shared ? fitting : shared, blocks = (args.M + some - 1) / some;
    const int64_t chunk = blocks / (16 * args.threads) + 1;
    const int threads = args.threads;
    const int64_t room = some * D + 16;  // of a thread, with a cache line between two
    // All memory before the first parameter changes: the gradients of each thread's latents, and those of the biases.
    float* totals = (float*)malloc((args.M + 1) * sizeof(float));
    float* grads;
    if (posix_memalign((void**)&grads, 64, threads * room * sizeof(float)) != 0) grads = nullptr;
    Sorted sorted = {};
    int64_t wrong = NO_MEMORY;
    if (grads && totals) wrong = sort_by_latent(sorted, rows, (const T*)args.values, args.indices, args.M, threads);
    if (wrong == NOTHING) {
        const Step step = make_step(args);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
        for (int64_t block = 0; block < blocks; ++block) {
            float* grad = grads + omp_get_thread_num() * room;
            const int64_t first = block * some, last = first + some < args.M ? first + some : args.M;
            for (int64_t m = first; m < last; ++m) {
                const Pairs list = sorted.of(m);
                sum_rows<T>(list, (const T*)args.g, D, nullptr, grad + (m - first) * D);
                float sum = 0;
                for (int64_t i = 0; i < list.n; ++i) sum += list.value(i);
                totals[m] = sum;
            }
            const int64_t at = first * D, n = (last - first) * D;
            update_row(step, grad, (T*)args.param + at, (T*)args.exp_avg + at, (T*)args.exp_avg_sq + at, n);
        }
        if (args.bias) update_row(step, totals, (T*)args.bias, (T*)args.bias_exp_avg, (T*)args.bias_exp_avg_sq, args.M);
    }
    free_sorted(sorted);
    free(grads);
    free(totals);
    return wrong;
}

}  // namespace

int64_t sparse_adam(const SparseAdam& args) { return args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args); }

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
