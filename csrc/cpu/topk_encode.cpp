// CPU kernel `topk_encode`: bias, ReLU, selection and counts in one reading of a tile of products. See topk_encode.h.
#include "topk_encode.h"

#include <omp.h>

#include "topk_select.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

INLINE int threads_for(int threads, int64_t rows) { return threads < rows ? threads : rows > 0 ? (int)rows : 1; }

template <class T, bool BIAS>
bool encode(const TopKEncode& args) {
    const int threads = threads_for(args.threads, args.rows);
    const int64_t n_aux = args.k_aux < args.n_dead ? args.k_aux : args.n_dead;
    bool ok = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch s;
        bool mine = make_scratch(s, args.M);
        float* gathered = nullptr;
        if (mine && n_aux > 0) {
            gathered = (float*)malloc((args.n_dead + W) * sizeof(float));
            mine = gathered != nullptr;
        }
        if (!mine) {
#pragma omp atomic write
            ok = false;
        }
        int32_t* const fired = args.fired ? args.fired + omp_get_thread_num() * args.M : nullptr;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < args.rows; ++b) {
            if (!mine) continue;
            const Row<T, BIAS> row = {(const T*)args.pre + b * args.M, args.bias, args.M};
            select_row(row, args.M, args.k, args.relu, s);
            write_selection<T>(s.values, s.index, args.k, args.K, (T*)args.values + b * args.K,
                               args.indices + b * args.K);
            if (fired)
                for (int64_t j = 0; j < args.k; ++j) fired[s.index[j]] += s.values[j] > 0;
            if (args.k_aux == 0) continue;
            if (n_aux > 0) {
                for (int64_t j = 0; j < args.n_dead; ++j) gathered[j] = row.one(args.dead[j]);
                const Row<float, false> alone = {gathered, nullptr, 0};
                select_row(alone, args.n_dead, n_aux, args.relu, s);
                for (int64_t j = 0; j < n_aux; ++j) s.index[j] = args.dead[s.index[j]];
            }
            write_selection<T>(s.values, s.index, n_aux, args.k_aux, (T*)args.aux_values + b * args.k_aux,
                               args.aux_indices + b * args.k_aux);
        }
        free(gathered);
        free(s.memory);
    }
    return ok;
}

template <class ROW>
INLINE int64_t append_row(const ROW& row, int64_t M, int32_t beyond, float* values, int32_t* columns) {
    if (beyond == NAN_KEY) return 0;
    if (beyond != CUT_ALL) return survivors(row, M, value_of(beyond), values, columns);
    for (int64_t j = 0; j < M; ++j) values[j] = row.one(j), columns[j] = (int32_t)j;
    return M;
}

template <class T, bool BIAS>
int64_t append(const BatchAppend& args) {
    const int threads = threads_for(args.threads, args.rows);
    int64_t* const found = (int64_t*)calloc(threads, sizeof(int64_t));
    if (!found) return -1;
    // Each thread's rows lie together, and so do its candidates: first apart, where all would have room, then joined.
    const int64_t share = (args.rows + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t end = (t + 1) * share < args.rows ? (t + 1) * share : args.rows;
        const int64_t room = args.count + t * (share * args.M + 2 * SLACK);
        int64_t n = 0;
        for (int64_t b = t * share; b < end; ++b) {
            const Row<T, BIAS> row = {(const T*)args.pre + b * args.M, args.bias, args.M};
            const int64_t of_row =
                append_row(row, args.M, args.beyond, args.values + room + n, args.columns + room + n);
            args.counts[b] = (int32_t)of_row;
            n += of_row;
        }
        found[t] = n;
    }
    int64_t count = args.count + found[0];
    for (int t = 1; t < threads; ++t) {
        const int64_t room = args.count + t * (share * args.M + 2 * SLACK);
        memmove(args.values + count, args.values + room, found[t] * sizeof(float));
        memmove(args.columns + count, args.columns + room, found[t] * sizeof(int32_t));
        count += found[t];
    }
    free(found);
    return count;
}

constexpr int64_t SAMPLE = 4096;  // values that tell roughly where the cut is
constexpr int64_t MARGIN = 128;   // four standard deviations of a rank among them

struct Bracket {
    int32_t low, high;  // keys, both within
};

// Where the keep-th largest of n values most likely is.
INLINE Bracket likely_bracket(const float* values, int64_t n, int64_t keep) {
    Bracket found = {-INFINITY_KEY, NAN_KEY};
    if (n < 4 * SAMPLE) return found;
    int32_t keys[SAMPLE];
    int32_t low = NAN_KEY, top = LOWEST;
    for (int64_t j = 0; j < SAMPLE; ++j) {
        keys[j] = key_of(values[(int64_t)((double)n / SAMPLE * (double)j)]);
        low = keys[j] < low ? keys[j] : low;
        top = keys[j] > top ? keys[j] : top;
    }
    const int64_t rank = (int64_t)((double)keep / (double)n * SAMPLE);
    if (rank + MARGIN <= SAMPLE) found.low = find_cut(keys, SAMPLE, rank + MARGIN, rank + MARGIN, low, SAMPLE, top).key;
    if (rank - MARGIN >= 1) found.high = find_cut(keys, SAMPLE, rank - MARGIN, rank - MARGIN, low, SAMPLE, top).key;
    return found;
}

// Collects the keys within the bracket, padded; returns how many, and in `over` how many values are above it.
INLINE int64_t collect(const float* values, int64_t n, Bracket bracket, int32_t* keys, int64_t& over) {
    const vi low = vi{} + (bracket.low - 1), high = vi{} + bracket.high;
    int64_t found = 0;
    over = 0;
    for (int64_t j = 0; j < n; j += W) {
        const vi key = key_of(j + W <= n ? widen(values + j) : widen_part(values + j, (int)(n - j)));
        const uint32_t valid = j + W <= n ? (uint32_t)((1ull << W) - 1) : (1u << (n - j)) - 1;
        const uint32_t above_high = greater(key, high) & valid;
        over += count_bits(above_high);
        const uint32_t within = greater(key, low) & ~above_high & valid;
        if (within == 0) continue;
        pack(key, within, keys + found);
        found += count_bits(within);
    }
    for (int64_t j = found; j < found + W; ++j) keys[j] = LOWEST;
    return found;
}

}  // namespace

bool topk_encode(const TopKEncode& args) {
    if (args.dtype == DType::bf16) return args.bias ? encode<bf16, true>(args) : encode<bf16, false>(args);
    return args.bias ? encode<float, true>(args) : encode<float, false>(args);
}

int64_t batch_append(const BatchAppend& args) {
    if (args.dtype == DType::bf16) return args.bias ? append<bf16, true>(args) : append<bf16, false>(args);
    return args.bias ? append<float, true>(args) : append<float, false>(args);
}

int64_t batch_cut(const BatchCut& args) {
    int32_t* const keys = (int32_t*)malloc((args.count + 2 * W) * sizeof(int32_t));
    if (!keys) return INT64_MIN;
    Bracket bracket = likely_bracket(args.values, args.count, args.keep);
    int64_t over = 0, n = collect(args.values, args.count, bracket, keys, over);
    if (over >= args.keep || over + n < args.keep) {
        bracket = {-INFINITY_KEY, NAN_KEY};
        n = collect(args.values, args.count, bracket, keys, over);
    }
    const int64_t rank = args.keep - over, padded = (n + W - 1) / W * W;
    const Cut cut = find_cut(keys, padded, rank, rank, bracket.low, n, bracket.high);
    int64_t ties = ties_to_take(keys, padded, cut, rank), from = 0, kept = 0;
    free(keys);
    for (int64_t b = 0; b < args.rows; ++b) {
        const int64_t end = from + args.counts[b], start = kept;
        for (int64_t j = from; j < end; j += W) {
            const bool whole = j + W <= end;
            const vf x = whole ? widen(args.values + j) : widen_part(args.values + j, (int)(end - j));
            vi column = {};
            memcpy(&column, args.columns + j, (whole ? W : end - j) * sizeof(int32_t));
            vi key = key_of(x);
            if (!whole) key = iota() < (int32_t)(end - j) ? key : vi{} + LOWEST;
            const uint32_t bits = taken(key, cut, rank, ties);
            if (bits == 0) continue;
            // A whole register would run over the next row's candidates where nothing has been dropped yet.
            float values[W];
            int32_t columns[W];
            const bool room = kept + W <= j + (whole ? W : end - j);
            const int taking =
                pack(x, column, bits, room ? args.values + kept : values, room ? args.columns + kept : columns);
            if (!room) {
                memcpy(args.values + kept, values, taking * sizeof(float));
                memcpy(args.columns + kept, columns, taking * sizeof(int32_t));
            }
            kept += taking;
        }
        args.counts[b] = (int32_t)(kept - start);
        from = end;
    }
    return cut.key;
}

void batch_fill(const BatchFill& args) {
    int64_t from = 0, out = 0, zeros = args.keep - args.count;
    for (int64_t b = 0; b < args.rows; ++b) {
        const int64_t end = from + args.counts[b], start = out;
        for (int32_t column = 0; zeros > 0 && column < args.M; ++column) {
            if (from < end && args.columns[from] == column) {
                args.out_values[out] = args.values[from];
                args.out_columns[out++] = args.columns[from++];
            } else {
                args.out_values[out] = 0;
                args.out_columns[out++] = column;
                --zeros;
            }
        }
        memcpy(args.out_values + out, args.values + from, (end - from) * sizeof(float));
        memcpy(args.out_columns + out, args.columns + from, (end - from) * sizeof(int32_t));
        out += end - from;
        from = end;
        args.counts[b] = (int32_t)(out - start);
    }
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
