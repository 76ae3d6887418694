// CPU kernel `topk`: row after row by topk_select.h; sorting by ranks and merging. See topk.h.
#include "topk.h"

#include <omp.h>

#include "topk_select.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t RUN = 64;  // entries whose ranks are counted, all against all

// A key and, for ties, the place before: greater means earlier in the result, and none are equal.
INLINE uint64_t order_of(float value, int64_t place) {
    return (uint64_t)((uint32_t)key_of(value) ^ 0x80000000u) << 32 | (uint32_t)~(uint32_t)place;
}

// Sorts the k entries of s, which come in order of index, by value, descending, ties by index. The arrays are working
// memory, each for k.
INLINE void sort_selection(Scratch& s, int64_t k, uint64_t* orders, uint64_t* other, float* values, int32_t* index) {
    for (int64_t start = 0; start < k; start += RUN) {
        const int64_t n = k - start < RUN ? k - start : RUN;
        uint64_t run[RUN];
        for (int64_t j = 0; j < n; ++j) run[j] = order_of(s.values[start + j], start + j);
        for (int64_t j = 0; j < n; ++j) {
            int64_t rank = 0;
            for (int64_t i = 0; i < n; ++i) rank += run[i] > run[j];
            orders[start + rank] = run[j];
        }
    }
    for (int64_t width = RUN; width < k; width *= 2) {
        for (int64_t start = 0; start < k; start += 2 * width) {
            const int64_t middle = start + width < k ? start + width : k;
            const int64_t end = start + 2 * width < k ? start + 2 * width : k;
            int64_t a = start, b = middle, out = start;
            while (a < middle && b < end) {
                const bool first = orders[a] > orders[b];
                other[out++] = first ? orders[a] : orders[b];
                a += first, b += !first;
            }
            while (a < middle) other[out++] = orders[a++];
            while (b < end) other[out++] = orders[b++];
        }
        uint64_t* const swapped = orders;
        orders = other;
        other = swapped;
    }
    for (int64_t j = 0; j < k; ++j) {
        const int64_t place = (uint32_t)~(uint32_t)orders[j];
        values[j] = s.values[place];
        index[j] = s.index[place];
    }
    memcpy(s.values, values, k * sizeof(float));
    memcpy(s.index, index, k * sizeof(int32_t));
}

template <class T>
bool run(const TopK& args) {
    const int threads = args.threads < args.B ? args.threads : (int)(args.B > 0 ? args.B : 1);
    bool ok = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch s;
        bool mine = make_scratch(s, args.M);
        uint64_t* orders = nullptr;
        if (mine && args.sorted) {
            orders = (uint64_t*)malloc(args.k * (2 * sizeof(uint64_t) + 2 * sizeof(float)));
            mine = orders != nullptr;
        }
        if (!mine) {
#pragma omp atomic write
            ok = false;
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < args.B; ++b) {
            if (!mine) continue;
            const Row<T, false> row = {(const T*)args.a + b * args.stride, nullptr, args.stride};
            select_row(row, args.M, args.k, false, s);
            if (args.sorted) {
                float* const spare = (float*)(orders + 2 * args.k);
                sort_selection(s, args.k, orders, orders + args.k, spare, (int32_t*)(spare + args.k));
            }
            write_selection<T>(s.values, s.index, args.k, args.K, (T*)args.values + b * args.K,
                               args.indices + b * args.K);
        }
        free(orders);
        free(s.memory);
    }
    return ok;
}

template <class T>
void scatter(const TopKBackward& args) {
    const int threads = args.threads < args.B ? args.threads : (int)(args.B > 0 ? args.B : 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < args.B; ++b) {
        const T* grad = (const T*)args.grad + b * args.K;
        const int32_t* indices = args.indices + b * args.K;
        T* out = (T*)args.out + b * args.M;
        memset(out, 0, args.M * sizeof(T));
        for (int64_t j = 0; j < args.k; ++j)
            if (indices[j] >= 0 && indices[j] < args.M) out[indices[j]] = grad[j];
    }
}

}  // namespace

bool topk(const TopK& args) { return args.dtype == DType::bf16 ? run<bf16>(args) : run<float>(args); }

void topk_backward(const TopKBackward& args) {
    switch (args.bytes) {
        case 2: return scatter<uint16_t>(args);
        case 4: return scatter<uint32_t>(args);
        case 8: return scatter<uint64_t>(args);
    }
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
