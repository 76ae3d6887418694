// CPU kernels of `sparse_decode`: weighted sums of rows in registers, a block of columns at a time; of latents' rows
// for the output, of samples' rows for the weights' gradient. See sparse_decode.h.
#include "sparse_decode.h"

#include "../sparse_entries.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

// The sum of all lanes.
INLINE float total(Floats x) {
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 4
    for (int h = WIDTH / 2; h > 0; h /= 2) x += __builtin_shuffle(x, lane ^ h);
    return x[0];
}

// The sum over D of (y - target)^2.
template <class T>
INLINE float squared_distance(const T* y, const T* target, int64_t D) {
    Floats sum = {};
    int64_t d = 0;
    for (; d + WIDTH <= D; d += WIDTH) {
        const Floats difference = load(y + d) - load(target + d);
        sum += difference * difference;
    }
    float rest = 0;
    for (; d < D; ++d) {
        const float difference = widen(y[d]) - widen(target[d]);
        rest += difference * difference;
    }
    return total(sum) + rest;
}

// Whether one of n values is 0.
template <class T>
INLINE bool has_zero(const T* values, int64_t n) {
    Ints zero = {};
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) zero |= load(values + j) == 0;
    bool found = any(zero);
    for (; j < n; ++j) found |= widen(values[j]) == 0;
    return found;
}

// The entries of one row as kernels of sums take them: in place where that is possible, else copied without zeros.
template <class T>
INLINE Columns list_of(const T* values, const int32_t* indices, int64_t n, bool in_place, int32_t* ats,
                       float* scratch) {
    if (in_place && sizeof(T) == sizeof(float)) return {indices, (const float*)values, n};
    if (in_place) {
        for (int64_t j = 0; j < n; ++j) scratch[j] = widen(values[j]);
        return {indices, scratch, n};
    }
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
        ats[kept] = indices[j], scratch[kept] = widen(values[j]);
        kept += scratch[kept] != 0;
    }
    memset(ats + kept, 0, AHEAD * sizeof(int32_t));
    return {ats, scratch, kept};
}

constexpr int64_t CHECKED = 1024;  // entries that are looked at, at once, before their rows are added up

template <class T>
int64_t forward(const SparseDecode& args) {
    const Rows rows = {args.offsets, args.B, args.K, args.N};
    if (!rows.are_right()) return OFFSETS;
    const int64_t longest = rows.longest(), D = args.D;
    const T *w = (const T*)args.w, *bias = (const T*)args.bias;
    const int threads = args.threads < args.B ? args.threads : (args.B > 0 ? (int)args.B : 1);
    int64_t wrong = NOTHING;
    bool ok = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t* ats = (int32_t*)malloc((longest + AHEAD) * sizeof(int32_t));
        float* scratch = (float*)malloc((longest + 1) * sizeof(float));
        float* sums = (float*)malloc((D + 1) * sizeof(float));
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t from = args.B * me / n, to = args.B * (me + 1) / n;
        if (!ats || !scratch || !sums) {
#pragma omp atomic write
            ok = false;
        } else
            for (int64_t first = from, last; first < to; first = last) {
                const int64_t begin = rows.begin(first);
                for (last = first + 1; last < to && rows.begin(last + 1) <= begin + CHECKED;) ++last;
                const int64_t end = rows.begin(last);
                const int64_t bad = first_wrong(args.indices + begin, end - begin, args.M);
                if (bad < end - begin) {
                    keep_first(wrong, begin + bad);
                    break;
                }
                const T* values = (const T*)args.values;
                const bool in_place = !has_zero(values + begin, end - begin) && end + AHEAD <= args.N;
                for (int64_t b = first; b < last; ++b) {
                    const int64_t at = rows.begin(b), length = rows.begin(b + 1) - at;
                    const Columns list = list_of(values + at, args.indices + at, length, in_place, ats, scratch);
                    T* y = (T*)args.y + b * D;
                    if constexpr (sizeof(T) == sizeof(float)) sum_rows(list, w, D, bias, y);
                    else {
                        sum_rows(list, w, D, bias, sums);
                        copy(sums, y, D);
                    }
                    if (args.squared_error)
                        narrow(squared_distance(y, (const T*)args.target + b * D, D), (T*)args.squared_error + b);
                }
            }
        free(ats);
        free(scratch);
        free(sums);
    }
    return ok ? wrong : (int64_t)NO_MEMORY;
}

// Lane l of the result is the sum of two lanes, H apart: of a where l has no bit H, else of b.
template <int H>
INLINE Floats fold_two(Floats a, Floats b) {
    const Ints lane = LANE_NUMBERS;
    const Ints of_b = (lane & H) != 0;
    const Ints low = (lane & ~H) + (of_b & WIDTH);
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + H);
}

// Products of w[at[i]] and g for i in [0, N), added up so that lane l belongs to i = l mod N.
template <class T, int N>
INLINE Floats products(const int32_t* at, const T* w, const T* g, int64_t D, Ints last) {
    if constexpr (N == 1) {
        const T* row = w + *at * D;
        Floats sum[2] = {};
        int64_t d = 0;
        for (; d + 2 * WIDTH <= D; d += 2 * WIDTH) {
            sum[0] += load(row + d) * load(g + d);
            sum[1] += load(row + d + WIDTH) * load(g + d + WIDTH);
        }
        for (; d + WIDTH <= D; d += WIDTH) sum[0] += load(row + d) * load(g + d);
        if (d < D) sum[1] += (Floats)((Ints)(load(row + D - WIDTH) * load(g + D - WIDTH)) & last);
        return sum[0] + sum[1];
    } else {
        const Floats a = products<T, N / 2>(at, w, g, D, last);
        return fold_two<N / 2>(a, products<T, N / 2>(at + N / 2, w, g, D, last));
    }
}

template <class T, int N>
INLINE void write_products(const int32_t* at, const T* w, const T* g, int64_t D, Ints last, T* out) {
    Floats sums = products<T, N>(at, w, g, D, last);
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 4
    for (int h = WIDTH / 2; h >= N; h /= 2) sums += __builtin_shuffle(sums, lane ^ h);
    if constexpr (N == WIDTH) store(sums, out);
    else
        for (int i = 0; i < N; ++i) narrow(sums[i], out + i);
}

template <class T>
int64_t grad_values(const SparseDecodeValues& args) {
    const Rows rows = {args.offsets, args.B, args.K, args.N};
    if (!rows.are_right()) return OFFSETS;
    const int threads = args.threads < args.B ? args.threads : (args.B > 0 ? (int)args.B : 1);
    const int64_t D = args.D;
    const Ints lane = LANE_NUMBERS;
    const Ints last = lane >= (int32_t)(WIDTH - D % WIDTH);  // lanes of the last vector that no other has
    int64_t wrong = NOTHING;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < args.B; ++b) {
        const int64_t begin = rows.begin(b), length = rows.begin(b + 1) - begin;
        const int32_t* indices = args.indices + begin;
        const T *w = (const T*)args.w, *g = (const T*)args.g + b * D;
        T* out = (T*)args.out + begin;
        const int64_t bad = first_wrong(indices, length, args.M);
        if (bad < length) {
            keep_first(wrong, begin + bad);
            continue;
        }
        int64_t j = 0;
        if (D >= WIDTH) {
            for (; j + WIDTH <= length; j += WIDTH) write_products<T, WIDTH>(indices + j, w, g, D, last, out + j);
            for (; j + 4 <= length; j += 4) write_products<T, 4>(indices + j, w, g, D, last, out + j);
            for (; j < length; ++j) write_products<T, 1>(indices + j, w, g, D, last, out + j);
        }
        for (; j < length; ++j) {
            float sum = 0;
            for (int64_t d = 0; d < D; ++d) sum += widen(w[indices[j] * D + d]) * widen(g[d]);
            narrow(sum, out + j);
        }
    }
    return wrong;
}

template <class T>
int64_t accumulate(const SparseAccumulate& args) {
    const Rows rows = {args.offsets, args.B, args.K, args.N};
    Sorted sorted;
    int64_t wrong = sort_by_latent(sorted, rows, (const T*)args.values, args.indices, args.M, args.threads);
    if (wrong == NOTHING) {
        const int64_t D = args.D, chunk = args.M / (16 * args.threads) + 1;
        bool ok = true;
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
        {
            float* scratch = (float*)malloc((D + 1) * sizeof(float));
            if (!scratch) {
#pragma omp atomic write
                ok = false;
            }
#pragma omp for schedule(dynamic, chunk)
            for (int64_t m = 0; m < args.M; ++m) {
                if (!scratch) continue;
                const Pairs list = sorted.of(m);
                T* out = (T*)args.out + m * D;
                if constexpr (sizeof(T) == sizeof(float)) sum_rows<T>(list, (const T*)args.g, D, nullptr, out);
                else {
                    sum_rows<T>(list, (const T*)args.g, D, nullptr, scratch);
                    copy(scratch, out, D);
                }
                float sum = 0;
                for (int64_t i = 0; i < list.n; ++i) sum += list.value(i);
                narrow(sum, (T*)args.totals + m);
            }
            free(scratch);
        }
        if (!ok) wrong = NO_MEMORY;
    }
    free_sorted(sorted);
    return wrong;
}

}  // namespace

int64_t sparse_decode(const SparseDecode& args) {
    return args.dtype == DType::f32 ? forward<float>(args) : forward<bf16>(args);
}

int64_t sparse_decode_values(const SparseDecodeValues& args) {
    return args.dtype == DType::f32 ? grad_values<float>(args) : grad_values<bf16>(args);
}

int64_t sparse_accumulate(const SparseAccumulate& args) {
    return args.dtype == DType::f32 ? accumulate<float>(args) : accumulate<bf16>(args);
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
