// CUDA kernels of `effect_reduction`: the perturbed outputs are read once, 16 bytes at a time. See
// effect_reduction.cuh.
//
// Forward: a team of lanes owns one group of R rows (perturbed outputs of one sample). It walks the order table, so
// a base element and its place are read once for R rows, and every sum stays in registers: no atomics, and no limit
// on the number of groups. Where the table runs through consecutive elements, as it does for the rows of an image cell,
// a lane takes 16 bytes; elsewhere it takes them one by one. A row that fits is first copied to shared memory, where
// taking elements in any order is cheap; a longer one is read in place.
//
// Backward: a thread owns 16 bytes of a sample's output and loops over the interventions, so labels and base are read
// once and the gradient of the base is summed in registers.
#include <algorithm>

#include "device.cuh"
#include "effect_reduction.cuh"

namespace vaecirc {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int BLOCKS_WANTED = 2048;         // enough to fill any GPU a few times over
constexpr int64_t STAGED_BYTES = 48 << 10;  // shared memory that every GPU gives a block without being asked
constexpr int64_t MOST_ROWS = 64;           // of a block
constexpr int R = 2;                        // rows that a team reads together: loads in flight, against registers

// Blocks that a multiprocessor holds, by their registers: as many as go without spills.
template <class IN, bool SIGMOID>
constexpr int BLOCKS_HELD = sizeof(IN) == 8 || (SIGMOID && sizeof(IN) == 2) ? 2 : 3;

struct Forward {
    const void* base;
    const void* perturbed;
    const int32_t* order;
    const int32_t* offsets;
    void* out;
    int64_t B, I, outer;
    int64_t row_blocks;  // blocks of the grid along I
    int P, G;            // below 2^29, so that indices within a row, and of its effects, are int
    int group_blocks;    // blocks of the grid along G
    int rows, groups;    // how many each block has
    int staged_rows;     // copied at once
    int staged_stride;   // elements from one copied row to the next: whole 16 bytes
    int lanes;           // of a team: a power of two up to 32, or THREADS
    bool aligned;        // every row starts at a multiple of 16 bytes
    bool sum;
    int E;
    int kinds[N_KINDS];
};

template <class T>
struct Sums {
    T absolute, square, plain, raw;  // of dy, dy, dy and the difference before the link

    template <bool SIGMOID>
    __device__ void add(T base, T linked_base, T perturbed) {
        const T r = perturbed - base;
        const T d = SIGMOID ? sigmoid(perturbed) - linked_base : r;
        absolute += d < 0 ? -d : d;
        square += d * d;
        plain += d;
        raw += r * r;
    }

    __device__ T effect(int kind, T size) const {
        switch (kind) {
            case L1: return absolute / size;
            case MSE: return square / size;
            case RMS: return sqrt(square / size);
            case LOGIT_MSE: return raw / size;
            case TV: return absolute / 2;
            default: return plain / size;
        }
    }
};

// Adds this lane's share of a group, its `size` entries of the order table, for `count` of R rows. `aligned`: rows
// start at multiples of 16 bytes.
template <class IN, bool SIGMOID>
__device__ void add_share(const int32_t* order, int size, int lane, int lanes, const IN* base, const IN* row,
                          int64_t stride, int count, bool aligned, Sums<Working<IN>> (&sums)[R]) {
    typedef Working<IN> T;
    constexpr int V = FULL<IN>;
    const IN* rows[R];  // those beyond `count` repeat the last one; nobody reads their sums
#pragma unroll
    for (int r = 0; r < R; ++r) rows[r] = row + (r < count ? r : count - 1) * stride;
#pragma unroll 1
    for (int k = lane * V; k < size; k += lanes * V) {
        const int p = order[k];
        bool consecutive = aligned && k + V <= size && p % V == 0;
        if (consecutive)
#pragma unroll
            for (int j = 1; j < V; ++j) consecutive &= order[k + j] == p + j;
        if (consecutive) {
            const Vector<IN, V> x0 = load<IN, V>(base + p);
            Vector<IN, V> x1[R];
#pragma unroll
            for (int r = 0; r < R; ++r) x1[r] = load<IN, V>(rows[r] + p);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const T x = widen(x0.at[j]), linked = SIGMOID ? sigmoid(x) : x;
#pragma unroll
                for (int r = 0; r < R; ++r) sums[r].template add<SIGMOID>(x, linked, widen(x1[r].at[j]));
            }
        } else {
            const int last = k + V < size ? k + V : size;
#pragma unroll 2
            for (int j = k; j < last; ++j) {
                const int q = order[j];
                const T x = widen(base[q]), linked = SIGMOID ? sigmoid(x) : x;
#pragma unroll
                for (int r = 0; r < R; ++r) sums[r].template add<SIGMOID>(x, linked, widen(rows[r][q]));
            }
        }
    }
}

// Starts copying n elements to shared memory with all threads; `aligned`: both ends are, and n fills whole 16 bytes.
template <class IN>
__device__ void start_copy(IN* to, const IN* from, int64_t n, bool aligned) {
    constexpr int V = FULL<IN>;
    if (aligned)
        for (int k = threadIdx.x * V; k < n; k += THREADS * V) __pipeline_memcpy_async(to + k, from + k, 16);
    else
        for (int k = threadIdx.x; k < n; k += THREADS) to[k] = from[k];
}

// The sums over a team, in all its lanes. `scratch`: a value per warp, sum and row, for a team of the whole block.
template <class T>
__device__ void add_team(Sums<T> (&sums)[R], int lanes, T* scratch) {
    const int within = lanes < WARP ? lanes : WARP;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        sums[r].absolute = sum_over_lanes(sums[r].absolute, within);
        sums[r].square = sum_over_lanes(sums[r].square, within);
        sums[r].plain = sum_over_lanes(sums[r].plain, within);
        sums[r].raw = sum_over_lanes(sums[r].raw, within);
    }
    if (lanes > WARP) {
        const int warp = threadIdx.x / WARP;
        __syncthreads();  // the last group's values have been read
        if (threadIdx.x % WARP == 0)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                scratch[(warp * R + r) * 4] = sums[r].absolute;
                scratch[(warp * R + r) * 4 + 1] = sums[r].square;
                scratch[(warp * R + r) * 4 + 2] = sums[r].plain;
                scratch[(warp * R + r) * 4 + 3] = sums[r].raw;
            }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < R; ++r) {
            sums[r] = {};
#pragma unroll 1
            for (int w = 0; w < WARPS; ++w) {
                sums[r].absolute += scratch[(w * R + r) * 4];
                sums[r].square += scratch[(w * R + r) * 4 + 1];
                sums[r].plain += scratch[(w * R + r) * 4 + 2];
                sums[r].raw += scratch[(w * R + r) * 4 + 3];
            }
        }
    }
}

// A block: some rows of sample `outer`, or of each sample of that block of samples, and some groups.
template <class IN, bool SIGMOID, bool STAGED>
__global__ void __launch_bounds__(THREADS, BLOCKS_HELD<IN, SIGMOID>) forward_kernel(const __grid_constant__ Forward f) {
    typedef Working<IN> T;
    T* const scratch = reinterpret_cast<T*>(shared_memory());
    IN* const staged_base = reinterpret_cast<IN*>(scratch + WARPS * R * 4);
    IN* const staged = staged_base + f.staged_stride;

    const int64_t index = blockIdx.x / f.group_blocks;
    const int64_t outer = index / f.row_blocks;
    const int64_t i_begin = index % f.row_blocks * f.rows;
    const int64_t i_end = i_begin + f.rows < f.I ? i_begin + f.rows : f.I;
    const int g_begin = static_cast<int>(blockIdx.x % f.group_blocks) * f.groups;
    const int groups = f.G - g_begin < f.groups ? f.G - g_begin : f.groups;
    const int64_t b_begin = f.sum ? outer * f.B / f.outer : outer;
    const int64_t b_end = f.sum ? (outer + 1) * f.B / f.outer : outer + 1;
    const int teams = THREADS / f.lanes, team = threadIdx.x / f.lanes, lane = threadIdx.x % f.lanes;
    const int step = STAGED ? f.staged_rows : R;

#pragma unroll 1
    for (int64_t b = b_begin; b < b_end; ++b) {
        const IN* const base = static_cast<const IN*>(f.base) + b * f.P;
#pragma unroll 1
        for (int64_t i = i_begin; i < i_end; i += step) {
            const int rows = i_end - i < step ? static_cast<int>(i_end - i) : step;
            const IN* const perturbed = static_cast<const IN*>(f.perturbed) + (b * f.I + i) * f.P;
            if constexpr (STAGED) {
                __syncthreads();  // the last rows have been read
                if (i == i_begin) start_copy(staged_base, base, f.P, f.aligned);
#pragma unroll 1
                for (int r = 0; r < rows; ++r)
                    start_copy(staged + r * f.staged_stride, perturbed + static_cast<int64_t>(r) * f.P, f.P, f.aligned);
                __pipeline_commit();
                __pipeline_wait_prior(0);
                __syncthreads();
            }
            // An item is one group of R rows. All threads go round together, for add_team; some rounds leave teams
            // idle.
            const int items = (rows + R - 1) / R * groups;
#pragma unroll 1
            for (int round = 0; round < items; round += teams) {
                const int item = round + team;
                const bool busy = item < items;
                const int first = STAGED && busy ? item / groups * R : 0;
                const int g = g_begin + (busy ? item - first / R * groups : 0);
                const int count = rows - first < R ? rows - first : R;
                const int start = f.offsets[g], size = f.offsets[g + 1] - start;
                Sums<T> sums[R] = {};
                if (busy) {
                    if constexpr (STAGED)
                        add_share<IN, SIGMOID>(f.order + start, size, lane, f.lanes, staged_base,
                                               staged + first * f.staged_stride, f.staged_stride, count, true, sums);
                    else
                        add_share<IN, SIGMOID>(f.order + start, size, lane, f.lanes, base, perturbed, f.P, count,
                                               f.aligned, sums);
                }
                add_team(sums, f.lanes, scratch);
                // Lane r writes row r, as far as there are lanes.
#pragma unroll
                for (int r = 0; r < R; ++r)
                    if (busy && r < count && lane == r % f.lanes)
#pragma unroll 1
                        for (int e = 0; e < f.E; ++e) {
                            T* const to = static_cast<T*>(f.out) + ((outer * f.I + i + first + r) * f.E + e) * f.G + g;
                            const T effect = sums[r].effect(f.kinds[e], static_cast<T>(size));
                            *to = b == b_begin ? effect : *to + effect;  // always by this thread
                        }
            }
        }
    }
}

template <class IN, bool SIGMOID, bool STAGED>
const char* launch_forward(const EffectReduction& a, Forward f) {
    constexpr int V = FULL<IN>;
    const int64_t scratch = WARPS * R * 4 * sizeof(Working<IN>);
    const int64_t row = (a.P + V - 1) / V * V * sizeof(IN);
    int64_t shared = scratch;
    f.staged_stride = 0, f.staged_rows = 0;
    // The more rows a block has, the less often base is read; but there should be BLOCKS_WANTED blocks.
    const int64_t rows = std::min({a.outer * a.I / BLOCKS_WANTED, MOST_ROWS, a.I});
    f.rows = static_cast<int>(std::max<int64_t>(rows / R * R, R));
    if (STAGED) {
        const int64_t fit = (STAGED_BYTES - scratch) / row - 1;  // R at least: see forward
        f.staged_rows = static_cast<int>(std::min<int64_t>(fit / R * R, f.rows));
        f.staged_stride = static_cast<int>(row / sizeof(IN));
        shared += (1 + f.staged_rows) * row;
    }
    f.row_blocks = (a.I + f.rows - 1) / f.rows;

    // A lane should find some 16 bytes of a group to read, and a block's teams should all have a group.
    const int64_t vectors = a.elements / a.G / V;
    const int64_t items = a.G * (STAGED ? f.staged_rows / R : 1);
    f.lanes = 1;
    while (f.lanes < WARP && f.lanes * 4 <= vectors) f.lanes *= 2;
    if (f.lanes == WARP && items < WARPS) f.lanes = THREADS;
    f.group_blocks = 1;
    if (!STAGED) {
        const int64_t teams = THREADS / f.lanes, rounds = (a.G + teams - 1) / teams;
        const int64_t wanted = BLOCKS_WANTED / (a.outer * f.row_blocks) + 1;
        f.group_blocks = static_cast<int>(std::min(wanted, rounds));
    }
    f.groups = (f.G + f.group_blocks - 1) / f.group_blocks;
    f.group_blocks = (f.G + f.groups - 1) / f.groups;
    return launch(forward_kernel<IN, SIGMOID, STAGED>, a.outer * f.row_blocks * f.group_blocks, THREADS, shared,
                  a.device, a.stream, f);
}

template <class IN>
const char* forward(const EffectReduction& a) {
    constexpr int V = FULL<IN>;
    if (a.E > N_KINDS) return "more effects than there are kinds";
    Forward f = {};
    f.base = a.base, f.perturbed = a.perturbed, f.order = a.order, f.offsets = a.offsets, f.out = a.out;
    f.B = a.B, f.I = a.I, f.outer = a.outer, f.sum = a.sum, f.E = a.E;
    f.P = static_cast<int>(a.P), f.G = static_cast<int>(a.G);
    for (int e = 0; e < a.E; ++e) f.kinds[e] = a.kinds[e];
    f.aligned = a.P % V == 0 && reinterpret_cast<uintptr_t>(a.base) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(a.perturbed) % 16 == 0;
    const int64_t scratch = WARPS * R * 4 * sizeof(Working<IN>);
    const bool staged = (a.P + V - 1) / V * V * int64_t(sizeof(IN)) * (1 + R) + scratch <= STAGED_BYTES;
    if (a.link == Link::sigmoid)
        return staged ? launch_forward<IN, true, true>(a, f) : launch_forward<IN, true, false>(a, f);
    return staged ? launch_forward<IN, false, true>(a, f) : launch_forward<IN, false, false>(a, f);
}

struct Backward {
    const void* base;
    const void* perturbed;
    const int32_t* labels;
    const void* factors;
    void* grad_base;
    void* grad_perturbed;
    int64_t B, I, factors_stride, parts;
    int P, G;
};

// Zero times anything, NaN too, is zero: see the contract.
template <class T>
__device__ T product(T factor, T value) {
    return factor == 0 ? 0 : factor * value;
}

// A thread: V elements of one sample, and one part of the interventions.
template <class IN, bool SIGMOID, int V>
__global__ void __launch_bounds__(THREADS, 2) backward_kernel(const __grid_constant__ Backward f) {
    typedef Working<IN> T;
    constexpr int R = sizeof(IN) == 4 ? 4 : 2;  // rows read together
    const int vectors = f.P / V;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= f.parts * f.B * vectors) return;
    const int64_t row = index / vectors, b = row % f.B, part = row / f.B;
    const int p = static_cast<int>(index % vectors) * V;
    const int64_t i_begin = part * f.I / f.parts, i_end = (part + 1) * f.I / f.parts;

    int group[V];  // or -1
    bool same = true;
    T x0[V], y0[V], through[V], direct[V];  // the last two: the gradient of the base, after and before the link
    const Vector<IN, V> base = load<IN, V>(static_cast<const IN*>(f.base) + b * f.P + p);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        group[j] = f.labels[p + j];
        same &= group[j] == group[0];
        x0[j] = widen(base.at[j]);
        y0[j] = SIGMOID ? sigmoid(x0[j]) : x0[j];
        through[j] = direct[j] = 0;
    }
    const T* factors = static_cast<const T*>(f.factors) + b * f.factors_stride + i_begin * 4 * f.G;
    const int64_t at = (b * f.I + i_begin) * f.P + p;
    const IN* perturbed = static_cast<const IN*>(f.perturbed) + at;
    IN* gradient = static_cast<IN*>(f.grad_perturbed) + at;
#pragma unroll 1
    for (int64_t left = i_end - i_begin; left > 0; left -= R) {
        Vector<IN, V> x1[R];
#pragma unroll
        for (int r = 0; r < R; ++r)
            if (r < left) x1[r] = load_once<IN, V>(perturbed + static_cast<int64_t>(r) * f.P);
        perturbed += static_cast<int64_t>(R) * f.P;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r >= left) break;
            T sign = 0, linear = 0, one = 0, raw = 0;
            Vector<IN, V> out;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (j == 0 || !same) {
                    const T* const factor = factors + (group[j] < 0 ? 0 : group[j]);
                    sign = factor[0], linear = factor[f.G], one = factor[2 * f.G], raw = factor[3 * f.G];
                }
                const T x = widen(x1[r].at[j]), y = SIGMOID ? sigmoid(x) : x;
                const T d = y - y0[j];
                const T direction = d > 0 ? T(1) : d < 0 ? T(-1) : d * 0;  // NaN stays NaN
                T g = product(sign, direction) + product(linear, d) + one;
                T u = product(raw, x - x0[j]);
                if (group[j] < 0) g = u = 0;
                through[j] += g;
                direct[j] += u;
                narrow((SIGMOID ? product(g, y * (1 - y)) : g) + u, out.at[j]);
            }
            store<IN, V>(gradient, out);
            gradient += f.P;
            factors += 4 * f.G;
        }
    }
    const int64_t to = row * f.P + p;
    T total[V];
#pragma unroll
    for (int j = 0; j < V; ++j)
        total[j] = -(SIGMOID ? product(through[j], y0[j] * (1 - y0[j])) : through[j]) - direct[j];
    if (f.parts == 1) {
        Vector<IN, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) narrow(total[j], out.at[j]);
        store<IN, V>(static_cast<IN*>(f.grad_base) + to, out);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) static_cast<T*>(f.grad_base)[to + j] = total[j];
    }
}

template <class IN, bool SIGMOID, int V>
const char* launch_backward(const EffectReductionBackward& a, const Backward& f) {
    const int64_t threads = a.parts * a.B * (a.P / V);
    return launch(backward_kernel<IN, SIGMOID, V>, (threads + THREADS - 1) / THREADS, THREADS, 0, a.device, a.stream,
                  f);
}

template <class IN>
const char* backward(const EffectReductionBackward& a) {
    constexpr int V = FULL<IN>;
    Backward f = {};
    f.base = a.base, f.perturbed = a.perturbed, f.labels = a.labels, f.factors = a.factors;
    f.grad_base = a.grad_base, f.grad_perturbed = a.grad_perturbed;
    f.B = a.B, f.I = a.I, f.factors_stride = a.factors_stride, f.parts = a.parts;
    f.P = static_cast<int>(a.P), f.G = static_cast<int>(a.G);
    bool aligned = a.P % V == 0;
    for (const void* tensor : {a.base, a.perturbed, (const void*)a.grad_perturbed, (const void*)a.grad_base})
        aligned &= reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
    if (a.link == Link::sigmoid)
        return aligned ? launch_backward<IN, true, V>(a, f) : launch_backward<IN, true, 1>(a, f);
    return aligned ? launch_backward<IN, false, V>(a, f) : launch_backward<IN, false, 1>(a, f);
}

// What the kernels cannot do, or null.
template <class Arguments>
const char* refusal(const Arguments& a) {
    if (a.P >= 1 << 29) return "an output has 2^29 elements or more";
    if (a.G > a.P) return "there are more groups than elements";
    return nullptr;
}

}  // namespace

const char* effect_reduction(const EffectReduction& a) {
    if (const char* why = refusal(a)) return why;
    switch (a.dtype) {
        case DType::f32: return forward<float>(a);
        case DType::f64: return forward<double>(a);
        case DType::bf16: return forward<__nv_bfloat16>(a);
        case DType::f16: return forward<__half>(a);
    }
    return "unknown element type";
}

const char* effect_reduction_backward(const EffectReductionBackward& a) {
    if (const char* why = refusal(a)) return why;
    switch (a.dtype) {
        case DType::f32: return backward<float>(a);
        case DType::f64: return backward<double>(a);
        case DType::bf16: return backward<__nv_bfloat16>(a);
        case DType::f16: return backward<__half>(a);
    }
    return "unknown element type";
}

}  // namespace cuda
}  // namespace vaecirc
