// Changed rows run through a network, straight to effects: the work of `latent_sweep` and `patch_mix`. See
// network_rows.h.
//
// Rows (sample, change) are taken in tiles that stay in L2. Dense layers are products with panels of packed
// weights (panels.h); a wide last one goes piece by piece of TILE outputs, each reduced at once. Transposed
// convolutions run one row at a time over grids with a halo of zeros: outputs of one phase (their position modulo the
// stride) are an ordinary convolution, so a product for each tap. A last convolution with few channels is one product
// with all its taps as columns, whose results are turned and added up shifted. Outputs are kept in the order in which
// they arise, padded to whole vectors; base outputs and labels are brought into the same order. A
// network that begins with a convolution keeps what that convolution makes of each sample; a unit of few lines of the
// input is an update of it. Any other unit is set in the convolution's grid and then put back.
#include "network_rows.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "activations.h"
#include "effect_rows.h"
#include "panels.h"

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int64_t MOST_ROWS = 96;          // of a tile; a multiple of 12, so of MOST
constexpr int64_t MOST_CONVOLVED = 24;     // of a tile with convolutions: more would not run faster
constexpr int64_t TILE_BYTES = 512 << 10;  // that the rows of a tile may take: half of L2
constexpr int64_t HUGE_BYTES = 4 << 20;    // ... if even twelve take more than that
constexpr int64_t BASE_BYTES = 24 << 20;   // of base outputs kept at a time
constexpr int64_t UPDATED = 2;             // a unit of at most 1 / UPDATED of the input's lines is an update
constexpr int64_t COLUMN = LANES;          // floats that a pixel's block of channels takes

INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Everything a call takes, given back at its end.
struct Memory {
    void* last = nullptr;
    bool ok = true;

    template <class T>
    T* take(int64_t n) {
        void* p;
        if (posix_memalign(&p, 128, 128 + n * sizeof(T)) != 0) {
            ok = false;
            return nullptr;
        }
        *(void**)p = last;
        last = p;
        return (T*)((char*)p + 128);
    }

    template <class T>
    T* zeros(int64_t n) {
        T* p = take<T>(n);
        if (p) memset(p, 0, n * sizeof(T));
        return p;
    }

    void give_back() {
        while (last) {
            void* before = *(void**)last;
            free(last);
            last = before;
        }
    }
};

// The panels of `wide` output channels: each is V vectors from channel `from` on. Panel weights follow each other, so
// they start at from * steps.
template <class Body>
INLINE void for_panels(int64_t from, int64_t to, Body body) {
    while (from < to) {
        const int V = WIDTH == LANES && to - from < PANEL ? 1 : 2;
        body(from, V);
        from += V * WIDTH;
    }
}

template <class... Rest>
INLINE void grid_of(int V, Rest... rest) {
    if constexpr (WIDTH == LANES)
        if (V == 1) return grid<1>(rest...);
    grid<2>(rest...);
}

struct Dense {
    const SweepLayer* layer;
    int64_t wide;    // outputs, padded
    float* weights;  // of the first layer (in, wide), else panels
    float* bias;     // (wide)
    int64_t* first;  // (wide / WIDTH), at a panel's first channel: its first step with a weight that is not zero
    bool skips;
    After after;
    bool separately;  // the activation is a pass of its own
};

// Outputs of a convolution that are alike modulo the stride.
struct Phase {
    int64_t row, pixel;                // of the first one
    int64_t rows, pixels;              // how many
    int64_t origin_row, origin_pixel;  // of its tap 0 in the input
    int64_t tap_row, tap_pixel;        // of its tap 0 in the kernel
    int64_t taps_high, taps_wide;
    int64_t* taps;  // (taps_high, taps_wide), as Inputs has them
    int64_t* shifts;
    int64_t* offsets;  // (taps_wide) by taps: where a tap's products lie, from those of the kernel's row on
    float* weights;
};

struct Conv {
    const SweepLayer* layer;
    int64_t h, w;         // of the input
    int64_t H, W;         // of the output
    int64_t left, pitch;  // of the input's grid: halo and whole width, in pixels
    int64_t grid;         // floats of it
    int64_t wide;         // outputs, padded; or columns, in the form of taps
    bool by_taps;
    Phase* phases;   // (sh sw)
    float* bias;     // (wide)
    float* weights;  // of the form by taps
    After after;
    bool separately;
    // Of the form by taps: a ring of input rows, each (wide, plane) with so many zeros before its first pixel; outputs
    // (H, out, sw, group).
    int64_t ring, plane, before, group;
};

// What a change of one line of the input adds to a line of the first convolution's outputs: weights at by[], or from
// `weights` on, times differences from `line` on.
struct Source {
    const float* line;
    const float* weights;
    float by;
};

// A row's sums before the first activation: start + sum_k by[k] * weights of input at[k].
struct Change {
    const float* start;
    const int64_t* at;
    const float* by;
    int64_t count;
};

struct Worker {
    float* x[2];                     // (channels / 16, rows, 16) between dense layers
    float* rows;                     // (rows, piece): of the last dense layer
    float** grids;                   // of each convolution
    float* products;                 // by taps: (pixels, wide)
    float* planes;                   // by taps: (ring, wide, plane)
    const float **lines, **sources;  // by taps: rows of the ring, and what is added up in them
    float* logits;                   // (padded P) of one row of convolutions
    float* natural;                  // (padded P) in the order of the elements, for softmax after convolutions
    float* linked;                   // a piece after the link
    float* slots;                    // (states, slot_elements)
    double* sums;                    // (states, sum_elements)
    float* by;                       // (L) of a Change of its own
    float* changed;                  // (most_lines, plane) differences of lines from the sample's, zeros beside them
    int64_t* numbers;                // (most_lines) which lines (channel, row)
    int64_t *head, *next;            // (h), (most_lines): those of a row of the input, linked; -1 ends
    Source* added;                   // (most_lines, taps)
    int64_t sample, set;             // what the first convolution's grid holds: whose base and, or -1, with which unit
};

struct Sweep {
    const NetworkRows& args;
    const Changes& changes;
    Memory memory;
    int64_t n_dense = 0, n_conv = 0;
    Dense* dense = nullptr;
    Conv* conv = nullptr;
    int64_t entry = 0;   // floats of the grid (C / 16, h, w, 16) that enters the convolutions
    int64_t padded = 0;  // P in the order of the kernel
    int32_t* labels = nullptr;
    int32_t* position =
        nullptr;  // (P) of each element among a row's logits; where softmaxes, or outputs as such, need it
    Plan plan;
    const Reducer<float>* reducer = nullptr;
    bool linked = false;                                         // effects look at what is behind a link
    int64_t piece = 0;                                           // outputs of the last dense layer at a time
    int64_t rows = 0;                                            // of a tile
    int64_t samples = 0;                                         // whose base outputs are kept at a time
    float *pre = nullptr, *base_raw = nullptr, *base = nullptr;  // (samples, ...): first sums, outputs, after the link
    int64_t first_sample = 0;
    Worker* workers = nullptr;

    float* starts =
        nullptr;  // (samples, start_size): what the first convolution makes of the input, without activation
    int64_t start_size = 0, most_lines = 0;  // of a unit that is an update of it
    int64_t* places = nullptr;               // (L) of each input in the first convolution's grid
    int64_t* everything = nullptr;           // (L) all inputs of a first dense layer, where units are set

    Sweep(const NetworkRows& a, const Changes& c) : args(a), changes(c) { memset(&plan, 0, sizeof plan); }

    ~Sweep() {
        free_plan(plan);
        memory.give_back();
    }

    // --- sizes ---

    void size_dense() {
        dense = memory.take<Dense>(n_dense);
        if (!dense) return;
        for (int64_t l = 0; l < n_dense; ++l) {
            Dense& d = dense[l];
            d.layer = args.layers + l;
            const bool enters = n_conv && l + 1 == n_dense;
            d.wide = enters ? up(args.C, COLUMN) * args.h * args.w : up(d.layer->out, COLUMN);
            d.weights = memory.take<float>(d.wide * d.layer->in);
            d.bias = memory.take<float>(d.wide);
            d.first = memory.zeros<int64_t>(d.wide / WIDTH);
            d.skips = false;
            set_after(*d.layer, d.after, d.separately);
        }
    }

    static void set_after(const SweepLayer& layer, After& after, bool& separately) {
        const Activation kind = (Activation)layer.activation;
        after = kind == Activation::relu         ? After::relu
                : kind == Activation::leaky_relu ? After::leaky_relu
                                                 : After::nothing;
        separately = after == After::nothing && kind != Activation::identity;
    }

    void size_conv() {
        conv = memory.take<Conv>(n_conv);
        if (!conv) return;
        entry = up(args.C, COLUMN) * args.h * args.w;
        int64_t h = args.h, w = args.w;
        for (int64_t l = 0; l < n_conv; ++l) {
            Conv& c = conv[l];
            const SweepLayer& of = args.layers[n_dense + l];
            const bool last = l + 1 == n_conv;
            c.layer = &of;
            c.h = h, c.w = w;
            c.H = last ? args.H : (h - 1) * of.sh - 2 * of.ph + of.kh + of.oph;
            c.W = last ? args.W : (w - 1) * of.sw - 2 * of.pw + of.kw + of.opw;
            h = c.H, w = c.W;
            set_after(of, c.after, c.separately);
            const int64_t columns = up(of.kh * of.kw * of.out, COLUMN);
            c.by_taps = last && 2 * columns * c.h * c.w < c.H * c.W * ((of.kh + of.sh - 1) / of.sh) *
                                                              ((of.kw + of.sw - 1) / of.sw) * up(of.out, COLUMN);
            c.wide = c.by_taps ? columns : up(of.out, COLUMN);
            c.bias = memory.zeros<float>(c.wide);
            c.weights = c.by_taps ? memory.take<float>(c.wide * of.in) : nullptr;
            c.phases = memory.take<Phase>(of.sh * of.sw);
            if (!c.phases) return;
            int64_t right = 0, widest = 0, furthest = 0;
            c.left = c.before = 0;
            for (int64_t p = 0; p < of.sh * of.sw; ++p) {
                Phase& f = c.phases[p];
                f.row = p / of.sw, f.pixel = p % of.sw;
                f.rows = most_of(0, (c.H - f.row + of.sh - 1) / of.sh);
                f.pixels = most_of(0, (c.W - f.pixel + of.sw - 1) / of.sw);
                f.origin_row = (f.row + of.ph) / of.sh, f.tap_row = (f.row + of.ph) % of.sh;
                f.origin_pixel = (f.pixel + of.pw) / of.sw, f.tap_pixel = (f.pixel + of.pw) % of.sw;
                f.taps_high = most_of(0, (of.kh - f.tap_row + of.sh - 1) / of.sh);
                f.taps_wide = most_of(0, (of.kw - f.tap_pixel + of.sw - 1) / of.sw);
                widest = most_of(widest, f.pixels);
                c.before = most_of(c.before, f.taps_wide - 1 - f.origin_pixel);
                furthest = most_of(furthest, f.origin_pixel);
                f.offsets = c.by_taps ? memory.take<int64_t>(f.taps_wide) : nullptr;
                f.taps = f.shifts = nullptr, f.weights = nullptr;
                if (c.by_taps) continue;
                f.taps = memory.take<int64_t>(f.taps_high * f.taps_wide);
                f.shifts = memory.take<int64_t>(f.taps_high * f.taps_wide);
                f.weights = memory.take<float>(f.taps_high * f.taps_wide * of.in * c.wide);
                if (f.pixels == 0 || f.taps_wide == 0) continue;
                c.left = most_of(c.left, f.taps_wide - 1 - f.origin_pixel);
                right = most_of(right, f.origin_pixel + f.pixels - c.w);
            }
            c.pitch = c.left + c.w + right;
            c.grid = up(of.in, COLUMN) * c.h * c.pitch;
            c.before = up(c.before, LANES);
            c.ring = (of.kh + of.sh - 1) / of.sh + 1;
            c.group = up(widest, LANES);
            c.plane = up(c.before + most_of(up(c.w, LANES), furthest + c.group), LANES);
        }
    }

    // Which element of the output each place among a row's logits holds; -1 for padding.
    int64_t element_at(int64_t place) const {
        if (!n_conv) return place < args.P ? place : -1;
        const Conv& c = conv[n_conv - 1];
        int64_t channel, y, x;
        if (c.by_taps) {
            const int64_t phase = place / c.group % c.layer->sw, line = place / c.group / c.layer->sw;
            x = place % c.group * c.layer->sw + phase;
            channel = line % c.layer->out;
            y = line / c.layer->out;
        } else {
            const int64_t pixel = place / COLUMN;
            x = pixel % c.W;
            y = pixel / c.W % c.H;
            channel = pixel / c.W / c.H * COLUMN + place % COLUMN;
        }
        return channel < c.layer->out && x < c.W ? (channel * c.H + y) * c.W + x : -1;
    }

    bool size_outputs() {
        const bool softmax = args.link == (int)SweepLink::softmax;
        int64_t places = up(args.P, LANES);
        if (n_conv) {
            const Conv& c = conv[n_conv - 1];
            places = c.by_taps ? c.H * c.layer->out * c.layer->sw * c.group : c.wide * c.H * c.W;
        }
        padded = softmax ? up(args.P, LANES) : places;
        labels = memory.take<int32_t>(padded);
        if (n_conv && (softmax || (args.outputs && !in_blocks()))) position = memory.take<int32_t>(args.P);
        if (!memory.ok) return false;
        for (int64_t p = 0; p < places; ++p) {
            const int64_t element = element_at(p);
            if (position && element >= 0) position[element] = (int32_t)p;
            if (!softmax) labels[p] = element < 0 ? -1 : args.labels[element];
        }
        for (int64_t p = 0; softmax && p < padded; ++p) labels[p] = p < args.P ? args.labels[p] : -1;
        if (!make_plan(plan, labels, padded, args.G)) return false;
        return true;
    }

    bool take_scratch(int threads) {
        const Reducer<float>& r = *reducer;
        linked = args.link != (int)SweepLink::identity && r.mask;
        int64_t widest = COLUMN;
        for (int64_t l = 0; l + 1 < n_dense; ++l) widest = most_of(widest, dense[l].wide);
        const bool softmax = args.link == (int)SweepLink::softmax;
        piece = n_conv ? entry : softmax ? padded : least(padded, TILE);
        const int64_t state = r.slot_elements() * sizeof(float) + r.sum_elements() * sizeof(double);
        const int64_t row_bytes = (2 * widest + piece) * sizeof(float) + (n_conv ? 0 : state);
        const int64_t first_wide = n_dense ? dense[0].wide : 0;
        if (!n_dense) {
            const Conv& c = conv[0];
            start_size = c.by_taps ? c.H * c.layer->out * c.layer->sw * c.group : c.wide * c.H * c.W;
            most_lines = c.layer->in * c.h / UPDATED;
        }
        const int64_t per_sample = (first_wide + start_size + (linked ? 2 : 1) * padded) * sizeof(float);
        samples = least(args.B, most_of(1, BASE_BYTES / per_sample));
        // As many rows as stay in L2, but a tile a thread at least, and of huge rows few, whatever that costs.
        rows = least(n_conv ? MOST_CONVOLVED : MOST_ROWS, TILE_BYTES / row_bytes / 12 * 12);
        rows = least(rows, up((samples * most_of(1, args.J) + threads - 1) / threads, 12));
        if (rows < 12) rows = most_of(1, least(12, HUGE_BYTES / row_bytes));
        if (!n_dense) rows = least(MOST_CONVOLVED, up((samples * args.J + threads - 1) / threads, 12));
        pre = memory.take<float>(samples * first_wide);
        base_raw = memory.take<float>(samples * padded);
        base = linked ? memory.take<float>(samples * padded) : base_raw;
        starts = n_dense ? nullptr : memory.take<float>(samples * start_size);
        workers = memory.take<Worker>(threads);
        if (!memory.ok) return false;
        for (int t = 0; t < threads; ++t) {
            Worker& w = workers[t];
            for (float*& x : w.x) x = memory.take<float>(widest * rows);
            w.rows = memory.take<float>(n_dense ? piece * rows : 0);
            w.by = memory.take<float>(changes.source ? changes.L : 0);
            w.sample = w.set = -1;
            w.linked = memory.take<float>(softmax ? padded : TILE);
            const int64_t states = n_conv ? 1 : rows;
            w.slots = memory.take<float>(states * r.slot_elements());
            w.sums = memory.take<double>(states * r.sum_elements());
            if (!n_conv) continue;
            const Conv& c = conv[n_conv - 1];
            w.grids = memory.take<float*>(n_conv);
            w.natural = position ? memory.zeros<float>(padded) : nullptr;
            w.logits = memory.take<float>(c.by_taps ? c.H * c.layer->out * c.layer->sw * c.group : c.wide * c.H * c.W);
            w.products = c.by_taps ? memory.zeros<float>(up(c.w, LANES) * c.wide) : nullptr;
            w.planes = c.by_taps ? memory.zeros<float>(c.ring * c.wide * c.plane) : nullptr;
            w.lines = memory.take<const float*>(c.layer->kh);
            w.sources = memory.take<const float*>(c.layer->kh * c.layer->kw);
            if (!memory.ok) return false;
            for (int64_t l = 0; l < n_conv; ++l) w.grids[l] = memory.zeros<float>(conv[l].grid);
            if (n_dense) continue;
            const Conv& entered = conv[0];
            w.changed = memory.zeros<float>(most_lines * entered.plane);
            w.numbers = memory.take<int64_t>(most_lines);
            w.next = memory.take<int64_t>(most_lines);
            w.head = memory.take<int64_t>(entered.h);
            w.added = memory.take<Source>(most_lines * entered.layer->kw);
        }
        return memory.ok;
    }

    // --- weights ---

    void pack_places() {
        const Conv& c = conv[0];
        for (int64_t e = 0; e < changes.L; ++e) {
            const int64_t channel = e / (c.h * c.w), y = e / c.w % c.h, x = e % c.w;
            places[e] = ((channel / COLUMN * c.h + y) * c.pitch + c.left + x) * COLUMN + channel % COLUMN;
        }
    }

    // The row of a dense layer's weights that gives padded output n, or -1.
    int64_t output_of(int64_t l, int64_t n) const {
        if (!n_conv || l + 1 < n_dense) return n < dense[l].layer->out ? n : -1;
        const int64_t pixels = args.h * args.w, channel = n / COLUMN / pixels * COLUMN + n % COLUMN;
        return channel < args.C ? channel * pixels + n / COLUMN % pixels : -1;
    }

    void pack_first(int threads) {
        const Dense& d = dense[0];
        const int64_t L = d.layer->in;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t n = 0; n < d.wide; n += COLUMN) {
            int64_t from[COLUMN];
            bool every = true;
            for (int64_t i = 0; i < COLUMN; ++i) {
                from[i] = output_of(0, n + i);
                every &= from[i] >= 0 && from[i] == from[0] + i;
                d.bias[n + i] = from[i] < 0 ? 0 : d.layer->bias[from[i]];
            }
            int64_t k = 0;
            for (; every && k + LANES <= L; k += LANES)
                transpose(d.layer->weight + from[0] * L + k, L, d.weights + k * d.wide + n, d.wide);
            for (; k < L; ++k)
                for (int64_t i = 0; i < COLUMN; ++i)
                    d.weights[k * d.wide + n + i] = from[i] < 0 ? 0 : d.layer->weight[from[i] * L + k];
        }
    }

    void pack_panel(int64_t l, int64_t from, int V) {
        Dense& d = dense[l];
        const int64_t K = d.layer->in, columns = V * WIDTH;
        float* to = d.weights + from * K;
        int64_t rows_of[PANEL];
        for (int64_t c = 0; c < columns; ++c) {
            rows_of[c] = output_of(l, from + c);
            d.bias[from + c] = rows_of[c] < 0 ? 0 : d.layer->bias[rows_of[c]];
        }
        int64_t first = K - 1;
        bool every = columns % LANES == 0;
        for (int64_t c = 0; c < columns; ++c) every &= rows_of[c] == rows_of[0] + c;
        for (int64_t block = 0; block < K; block += LANES) {
            if (every && block + LANES <= K) {
                for (int64_t c = 0; c < columns; c += LANES)
                    transpose(d.layer->weight + rows_of[c] * K + block, K, to + block * columns + c, columns);
                for (int64_t i = block * columns; first == K - 1 && i < (block + LANES) * columns; ++i)
                    if (to[i] != 0) first = least(first, i / columns);
                continue;
            }
            for (int64_t c = 0; c < columns; ++c) {
                const float* row = d.layer->weight + rows_of[c] * K;
                for (int64_t k = block; k < least(block + LANES, K); ++k) {
                    const float weight = rows_of[c] < 0 ? 0 : row[k];
                    to[k * columns + c] = weight;
                    if (weight != 0 && k < first) first = k;
                }
            }
        }
        d.first[from / WIDTH] = first;
    }

    void pack_phase(const Conv& c, Phase& f) {
        const SweepLayer& of = *c.layer;
        for (int64_t t = 0; t < f.taps_high * f.taps_wide; ++t) {
            const int64_t ty = t / f.taps_wide, tx = t % f.taps_wide;
            f.taps[t] = -(ty * c.pitch + tx) * COLUMN;
            f.shifts[t] = f.origin_pixel - tx;
        }
        const int64_t taps = f.taps_high * f.taps_wide, steps = taps * of.in;
        for_panels(0, c.wide, [&](int64_t from, int V) {
            float* to = f.weights + from * steps;
            for (int64_t t = 0; t < taps; ++t) {
                const int64_t ky = f.tap_row + t / f.taps_wide * of.sh, kx = f.tap_pixel + t % f.taps_wide * of.sw;
                for (int64_t k = 0; k < of.in; ++k)
                    for (int64_t n = from; n < from + V * WIDTH; ++n)
                        *to++ = n < of.out ? of.weight[((k * of.out + n) * of.kh + ky) * of.kw + kx] : 0;
            }
        });
    }

    // Column (ky, kx, channel) of the form by taps.
    void pack_taps(Conv& c) {
        const SweepLayer& of = *c.layer;
        for_panels(0, c.wide, [&](int64_t from, int V) {
            float* to = c.weights + from * of.in;
            for (int64_t k = 0; k < of.in; ++k)
                for (int64_t n = from; n < from + V * WIDTH; ++n) {
                    const int64_t tap = n / of.out;
                    *to++ = tap < of.kh * of.kw ? of.weight[(k * of.out + n % of.out) * of.kh * of.kw + tap] : 0;
                }
        });
        for (int64_t p = 0; p < of.sw; ++p) {
            Phase& f = c.phases[p];
            for (int64_t t = 0; t < f.taps_wide; ++t)
                f.offsets[t] = (f.tap_pixel + t * of.sw) * of.out * c.plane + c.before + f.origin_pixel - t;
        }
    }

    void pack(int threads) {
        if (n_dense) pack_first(threads);
        else pack_places();
        for (int64_t e = 0; everything && e < changes.L; ++e) everything[e] = e;
        for (int64_t l = 1; l < n_dense; ++l) {
            Dense& d = dense[l];
            const int64_t panels = (d.wide + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
            for (int64_t p = 0; p < panels; ++p)
                for_panels(p * PANEL, least((p + 1) * PANEL, d.wide),
                           [&](int64_t from, int V) { pack_panel(l, from, V); });
            for (int64_t p = 0; p < panels; ++p) d.skips |= d.first[p * PANEL / WIDTH] > 0;
        }
        for (int64_t l = 0; l < n_conv; ++l) {
            Conv& c = conv[l];
            if (c.by_taps) {
                pack_taps(c);
                continue;
            }
            memcpy(c.bias, c.layer->bias, c.layer->out * sizeof(float));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
            for (int64_t p = 0; p < c.layer->sh * c.layer->sw; ++p) pack_phase(c, c.phases[p]);
        }
    }

    // --- dense layers ---

    // W1 z + b1 of n samples, two vectors of outputs from column c on. Some samples at a time: weights are read for
    // all.
    void take_pre(int64_t n, int64_t c) const {
        int64_t sample = 0;
        for (; sample + 4 <= n; sample += 4) take_pre_of<4>(sample, c);
        for (; sample < n; ++sample) take_pre_of<1>(sample, c);
    }

    template <int N>
    void take_pre_of(int64_t sample, int64_t c) const {
        const Dense& d = dense[0];
        const float* z = changes.input + (first_sample + sample) * changes.L;
        const float* w = d.weights + c;
        vf sum[N][2];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum[i][0] = *(const vf*)(d.bias + c);
        const int64_t second = c + WIDTH < d.wide ? WIDTH : 0;
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum[i][1] = *(const vf*)(d.bias + c + second);
        for (int64_t k = 0; k < changes.L; ++k, w += d.wide) {
            const vf a = *(const vf*)w, b = *(const vf*)(w + second);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
                const float by = z[i * changes.L + k];
                sum[i][0] += by * a;
                sum[i][1] += by * b;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            float* to = pre + (sample + i) * d.wide + c;
            *(vf*)to = sum[i][0];
            if (second) *(vf*)(to + WIDTH) = sum[i][1];
        }
    }

    // Row `row` counts samples' base outputs if `is_base`, else pairs (sample, intervention).
    static int64_t sample_of(int64_t row, bool is_base, int64_t J) { return is_base ? row : row / J; }

    Change change_of(Worker& w, int64_t row, bool is_base) const {
        const int64_t sample = sample_of(row, is_base, args.J), j = row % args.J;
        const float* of_sample = pre + sample * dense[0].wide;
        if (is_base && changes.reference)
            return {dense[0].bias, everything, changes.reference + (first_sample + sample) * changes.L, changes.L};
        if (is_base) return {of_sample, nullptr, nullptr, 0};
        if (!changes.source)
            return {of_sample, changes.latents + j * changes.K,
                    changes.shifts + ((first_sample + sample) * args.J + j) * changes.K, changes.K};
        const float* old = changes.input + (first_sample + sample) * changes.L;
        const float* given = changes.source + (first_sample + sample) * changes.L;
        const int64_t* at = changes.order + changes.starts[j];
        const int64_t count = changes.stops[j] - changes.starts[j];
        float sum = 0;
        for (int64_t k = 0; k < count; ++k) {
            w.by[k] = given[at[k]] - old[at[k]];
            sum += w.by[k] * 0.0f;
        }
        if (sum == 0) return {of_sample, at, w.by, count};
        // Adding a difference does not take back what is not finite.
        memcpy(w.by, old, changes.L * sizeof(float));
        for (int64_t k = 0; k < count; ++k) w.by[at[k]] = given[at[k]];
        return {dense[0].bias, everything, w.by, changes.L};
    }

    // The first layer for n rows: columns [from, to), column block c of row r at x + c * block + r * row.
    void first_layer(Worker& worker, int64_t start, int64_t n, bool is_base, int64_t from, int64_t to, float* x,
                     int64_t block, int64_t row) const {
        const Dense& d = dense[0];
        const Activation kind = (Activation)d.layer->activation;
        for (int64_t r = 0; r < n; ++r) {
            const Change change = change_of(worker, start + r, is_base);
            const bool alone = change.count == 1;
            const float by = alone ? change.by[0] : 0, *of = alone ? d.weights + change.at[0] * d.wide : nullptr;
            for (int64_t c = from; c < to; c += COLUMN) {
                float* here = x + (c - from) / COLUMN * block + r * row;
                for (int64_t i = 0; i < COLUMN; i += WIDTH) {
                    vf v = *(const vf*)(change.start + c + i);
                    if (alone) v += by * *(const vf*)(of + c + i);
                    else
                        for (int64_t k = 0; k < change.count; ++k)
                            v += change.by[k] * *(const vf*)(d.weights + c + i + change.at[k] * d.wide);
                    *(vf*)(here + i) = d.after == After::relu ? (v < 0 ? vf{} : v) : v;
                }
                if (d.after == After::leaky_relu || d.separately) activate(here, COLUMN, kind, d.layer->slope);
            }
        }
    }

    // Whether all of n rows between dense layers are finite: only then may steps with zero weights be left out.
    bool all_finite(const float* x, int64_t wide, int64_t n) const {
        vf sum = {};
        for (int64_t c = 0; c < wide; c += COLUMN)
            for (int64_t i = 0; i < n * COLUMN; i += WIDTH) sum += *(const vf*)(x + c * rows + i) * 0.0f;
        for (int k = 0; k < WIDTH; ++k)
            if (sum[k] != 0) return false;
        return true;
    }

    // Layer l for n rows: columns [from, to) as in first_layer.
    void dense_layer(int64_t l, const float* x, int64_t n, bool finite, int64_t from, int64_t to, float* y,
                     int64_t block, int64_t row) const {
        const Dense& d = dense[l];
        const int64_t K = d.layer->in, blocks = up(K, COLUMN) / COLUMN, here = 0;
        Inputs in = {&here, &here, 1, blocks, K - (blocks - 1) * COLUMN, rows * COLUMN, 0, n, 0};
        const Outputs out = {block, 0, row, d.after, d.layer->slope};
        for_panels(from, to, [&](int64_t c, int V) {
            in.first_step = d.skips && finite ? d.first[c / WIDTH] : 0;
            float* start = y + (c - from) / COLUMN * block + c % COLUMN;
            grid_of(V, in, out, (int64_t)1, n, x, (const float*)d.weights + c * K, (const float*)d.bias + c, start);
        });
        if (!d.separately) return;
        const Activation kind = (Activation)d.layer->activation;
        if (row == COLUMN)
            for (int64_t c = 0; c < to - from; c += COLUMN)
                activate(y + c / COLUMN * block, n * COLUMN, kind, d.layer->slope);
        else
            for (int64_t r = 0; r < n; ++r) activate(y + r * row, to - from, kind, d.layer->slope);
    }

    // --- transposed convolutions, one row at a time ---

    // The taps, of those above each other, that row y of a phase finds inside the input.
    static int64_t first_tap(const Conv& c, const Phase& f, int64_t y) {
        return least(f.taps_high, most_of(0, f.origin_row + y - c.h + 1));
    }
    static int64_t last_tap(const Phase& f, int64_t y) { return least(f.taps_high, f.origin_row + y + 1); }

    // activated: with what follows the layer.
    void direct(const Conv& c, const float* from, float* to, int64_t block, int64_t to_pitch, bool activated) const {
        const SweepLayer& of = *c.layer;
        const int64_t blocks = up(of.in, COLUMN) / COLUMN;
        const Outputs out = {block, of.sh * to_pitch * COLUMN, of.sw * COLUMN, activated ? c.after : After::nothing,
                             of.slope};
        for_panels(0, c.wide, [&](int64_t n, int V) {
            for (int64_t p = 0; p < of.sh * of.sw; ++p) {
                const Phase& f = c.phases[p];
                const float* weights = f.weights + n * f.taps_high * f.taps_wide * of.in;
                // Bands of rows with the same taps inside the input.
                for (int64_t y = 0, end; y < f.rows; y = end) {
                    const int64_t first = first_tap(c, f, y), last = last_tap(f, y);
                    for (end = y + 1; end < f.rows && first_tap(c, f, end) == first && last_tap(f, end) == last;) ++end;
                    const int64_t skipped = first * f.taps_wide, taps = most_of(0, last - first) * f.taps_wide;
                    const Inputs in = {
                        f.taps + skipped,       f.shifts + skipped, taps, blocks, of.in - (blocks - 1) * COLUMN,
                        c.h * c.pitch * COLUMN, c.pitch * COLUMN,   c.w,  0};
                    grid_of(V, in, out, end - y, f.pixels,
                            from + ((f.origin_row + y) * c.pitch + c.left + f.origin_pixel) * COLUMN,
                            weights + skipped * of.in * V * WIDTH, (const float*)c.bias + n,
                            to + n / COLUMN * block + n % COLUMN + ((f.row + y * of.sh) * to_pitch + f.pixel) * COLUMN);
                }
            }
        });
        if (activated) separate_activation(c, to, block, to_pitch);
    }

    static void separate_activation(const Conv& c, float* to, int64_t block, int64_t to_pitch) {
        const SweepLayer& of = *c.layer;
        for (int64_t b = 0; c.separately && b < c.wide / COLUMN; ++b)
            for (int64_t y = 0; y < c.H; ++y)
                activate(to + b * block + y * to_pitch * COLUMN, c.W * COLUMN, (Activation)of.activation, of.slope);
    }

    // Products of one line of the input with all taps, turned: (wide, pixels).
    void multiply_taps(const Conv& c, Worker& w, const float* line, float* plane) const {
        const SweepLayer& of = *c.layer;
        const int64_t blocks = up(of.in, COLUMN) / COLUMN, here = 0;
        const Inputs in = {&here, &here, 1, blocks, of.in - (blocks - 1) * COLUMN, c.h * c.pitch * COLUMN, 0, c.w, 0};
        const Outputs out = {COLUMN, 0, c.wide, After::nothing, 0};
        for_panels(0, c.wide, [&](int64_t n, int V) {
            grid_of(V, in, out, (int64_t)1, c.w, line, (const float*)c.weights + n * of.in, (const float*)c.bias + n,
                    w.products + n);
        });
        for (int64_t x = 0; x < c.w; x += LANES)
            for (int64_t n = 0; n < c.wide; n += LANES)
                transpose(w.products + x * c.wide + n, c.wide, plane + n * c.plane + x, c.plane);
    }

    // 16 x 16 floats.
    static void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
        typedef i32x16 I;
        f32x16 a[LANES], b[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) a[i] = *(const f32x16u*)(from + i * from_row);
        const I low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
        const I high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 2) {
            b[i] = __builtin_shuffle(a[i], a[i + 1], low);
            b[i + 1] = __builtin_shuffle(a[i], a[i + 1], high);
        }
        const I low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
        const I high2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
#pragma GCC unroll 4
        for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                a[i + 2 * k] = __builtin_shuffle(b[i + k], b[i + k + 2], low2);
                a[i + 2 * k + 1] = __builtin_shuffle(b[i + k], b[i + k + 2], high2);
            }
        // a[4 i + k] holds column k of each quarter of rows 4 i to 4 i + 3.
        const I even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
        const I odd = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const f32x16 p = __builtin_shuffle(a[k], a[4 + k], even), q = __builtin_shuffle(a[k], a[4 + k], odd);
            const f32x16 r = __builtin_shuffle(a[8 + k], a[12 + k], even),
                         s = __builtin_shuffle(a[8 + k], a[12 + k], odd);
            *(f32x16u*)(to + k * to_row) = __builtin_shuffle(p, r, even);
            *(f32x16u*)(to + (4 + k) * to_row) = __builtin_shuffle(q, s, even);
            *(f32x16u*)(to + (8 + k) * to_row) = __builtin_shuffle(p, r, odd);
            *(f32x16u*)(to + (12 + k) * to_row) = __builtin_shuffle(q, s, odd);
        }
    }

    // to[x] = start + the sum of sources[s][x].
    __attribute__((noinline)) static void add_sources(const float* const* sources, int64_t count, float start,
                                                      float* to, int64_t n) {
        const auto add = [&](auto COUNT, const float* const* at, bool begins) __attribute__((always_inline)) {
            const float* source[COUNT.value + 1];
#pragma GCC unroll 4
            for (int s = 0; s < COUNT.value; ++s) source[s] = at[s];
            for (int64_t x = 0; x < n; x += WIDTH) {
                vf v = begins ? vf{} + start : *(const vf*)(to + x);
#pragma GCC unroll 4
                for (int s = 0; s < COUNT.value; ++s) v += *(const vfu*)(source[s] + x);
                *(vf*)(to + x) = v;
            }
        };
        int64_t s = 0;
        for (; count - s >= 4; s += 4) add(Number<4>(), sources + s, s == 0);
        if (count - s >= 2) add(Number<2>(), sources + s, s == 0), s += 2;
        if (count - s == 1) add(Number<1>(), sources + s, s == 0);
        if (count == 0) add(Number<0>(), sources, true);
    }

    void by_taps(const Conv& c, Worker& w, const float* grid_, float* to) const {
        const SweepLayer& of = *c.layer;
        const int64_t size = c.wide * c.plane;
        float* const last = w.planes + (c.ring - 1) * size;
        int64_t origin = of.ph / of.sh, tap_row = of.ph % of.sh;
        const float* first = w.planes + origin % c.ring * size;  // the origin's
        float* to_ring = w.planes;                               // where the next input row's products go
        int64_t done = 0;                                        // input rows multiplied
        for (int64_t y = 0; y < c.H; ++y, ++tap_row) {
            if (tap_row == of.sh) {
                tap_row = 0, ++origin;
                first = first == last ? w.planes : first + size;
            }
            // One row ahead: what was stored just now is slow to read back shifted.
            for (; done <= origin + 1 && done < c.h; ++done) {
                multiply_taps(c, w, grid_ + done * c.pitch * COLUMN, to_ring + c.before);
                to_ring = to_ring == last ? w.planes : to_ring + size;
            }
            int64_t lines = 0, ky = tap_row;  // input rows that reach this one, the origin's first
            const float* line = first;
            for (int64_t row = origin; ky < of.kh && row >= 0; --row, ky += of.sh) {
                if (row < c.h) w.lines[lines++] = line + ky * of.kw * of.out * c.plane;
                line = line == w.planes ? last : line - size;
            }
            for (int64_t n = 0; n < of.out; ++n)
                for (int64_t phase = 0; phase < of.sw; ++phase, to += c.group) {
                    const int64_t* offsets = c.phases[phase].offsets;
                    int64_t sources = 0;
                    for (int64_t i = 0; i < lines; ++i)
                        for (int64_t t = 0; t < c.phases[phase].taps_wide; ++t)
                            w.sources[sources++] = w.lines[i] + n * c.plane + offsets[t];
                    add_sources(w.sources, sources, of.bias[n], to, c.group);
                }
        }
    }

    // What a dense layer made, into the first convolution's grid.
    void enter(Worker& w, const float* x) const {
        const Conv& in = conv[0];
        const int64_t line = in.w * COLUMN;
        for (int64_t r = 0; r < entry / line; ++r)
            memcpy(w.grids[0] + (r * in.pitch + in.left) * COLUMN, x + r * line, line * sizeof(float));
    }

    // Unit j's elements of `from` (L), into the first convolution's grid.
    void set_unit(Worker& w, const float* from, int64_t j) const {
        for (int64_t k = changes.starts[j]; k < changes.stops[j]; ++k)
            w.grids[0][places[changes.order[k]]] = from[changes.order[k]];
    }

    // Row b of `rows` (B, L), or that row with unit j of the source (j >= 0), into the first convolution's grid.
    void set_row(Worker& w, const float* rows, int64_t sample, int64_t j) const {
        const float* from = rows + sample * changes.L;
        if (rows != changes.input || w.sample != sample)
            for (int64_t e = 0; e < changes.L; ++e) w.grids[0][places[e]] = from[e];
        else if (w.set >= 0) set_unit(w, from, w.set);
        w.sample = rows == changes.input ? sample : -1, w.set = j;
        if (j >= 0) set_unit(w, changes.source + sample * changes.L, j);
    }

    // Where the outputs of convolution l go: {to, floats from block to block, pixels of a line}.
    struct Place {
        float* to;
        int64_t block, pitch;
    };
    Place place_behind(const Worker& w, int64_t l) const {
        const Conv& c = conv[l];
        if (l + 1 == n_conv) return {w.logits, c.H * c.W * COLUMN, c.W};
        const Conv& next = conv[l + 1];
        return {w.grids[l + 1] + next.left * COLUMN, next.h * next.pitch * COLUMN, next.pitch};
    }

    // The logits of one row, from the grid of convolution l.
    void convolve(Worker& w, int64_t l) const {
        for (; l < n_conv; ++l) {
            const Place to = place_behind(w, l);
            if (conv[l].by_taps) by_taps(conv[l], w, w.grids[l], w.logits);
            else direct(conv[l], w.grids[l], to.to, to.block, to.pitch, true);
        }
    }

    // --- a unit as an update of what the first convolution made ---

    // What the first convolution makes of the row in its grid, kept for updates.
    void keep_start(Worker& w, int64_t sample) const {
        const Conv& c = conv[0];
        float* to = starts + sample * start_size;
        if (c.by_taps) by_taps(c, w, w.grids[0], to);
        else direct(c, w.grids[0], to, c.H * c.W * COLUMN, c.W, false);
    }

    // The lines of the input that unit j changes, as differences; how many, or -1: too many, or not finite, and what is
    // not finite cannot be taken back by adding.
    int64_t changed_lines(Worker& w, int64_t sample, int64_t j) const {
        const Conv& c = conv[0];
        const float* old = changes.input + (first_sample + sample) * changes.L;
        const float* given = changes.source + (first_sample + sample) * changes.L;
        const int64_t* const order = changes.order;
        int64_t n = 0, bad = 0;
        for (int64_t y = 0; y < c.h; ++y) w.head[y] = -1;
        for (int64_t k = changes.starts[j], stop = changes.stops[j]; k < stop; ++n) {
            if (n == most_lines) return -1;
            const int64_t number = order[k] / c.w, first = number * c.w;
            float* to = w.changed + n * c.plane + c.before;
            // Elements of a unit ascend: the first and the last of a line mean all of it.
            if (order[k] == first && k + c.w <= stop && order[k + c.w - 1] == first + c.w - 1) {
                for (int64_t x = 0; x < c.w; ++x) to[x] = given[first + x] - old[first + x];
                k += c.w;
            } else {
                memset(to, 0, c.w * sizeof(float));
                for (; k < stop && order[k] < first + c.w; ++k) to[order[k] - first] = given[order[k]] - old[order[k]];
            }
            int here = 0;
            for (int64_t x = 0; x < c.w; ++x) here |= to[x] - to[x] != 0;
            bad |= here;
            w.numbers[n] = number;
            w.next[n] = w.head[number % c.h];
            w.head[number % c.h] = n;
        }
        return bad ? -1 : n;
    }

    // Body(line of differences, its channel, ty) for the changed lines that reach row y of a phase, ty the tap.
    template <class Body>
    __attribute__((always_inline)) void for_lines(const Worker& w, const Phase& f, int64_t y, Body body) const {
        const Conv& c = conv[0];
        for (int64_t ty = first_tap(c, f, y); ty < last_tap(f, y); ++ty)
            for (int64_t n = w.head[f.origin_row + y - ty]; n >= 0; n = w.next[n])
                body(w.changed + n * c.plane + c.before, w.numbers[n] / c.h, ty);
    }

    // The first convolution's outputs for a sample's row with what changed lines add.
    void update(Worker& w, int64_t sample) const {
        const Conv& c = conv[0];
        const float* start = starts + sample * start_size;
        if (c.by_taps) return update_by_taps(c, w, start);
        const Place to = place_behind(w, 0);
        for_panels(0, c.wide, [&](int64_t n, int V) {
            if (WIDTH == LANES && V == 1) update_panel<1>(c, w, start, n, to);
            else update_panel<2>(c, w, start, n, to);
        });
        separate_activation(c, to.to, to.block, to.pitch);
    }

    void update_by_taps(const Conv& c, Worker& w, const float* start) const {
        const SweepLayer& of = *c.layer;
        float* to = w.logits;
        for (int64_t row = 0; row < c.H; ++row)
            for (int64_t o = 0; o < of.out; ++o)
                for (int64_t p = 0; p < of.sw; ++p, to += c.group, start += c.group) {
                    const Phase& f = c.phases[row % of.sh * of.sw + p];
                    int64_t count = 0;
                    for_lines(w, f, row / of.sh, [&](const float* line, int64_t channel, int64_t ty) {
                        const int64_t ky = f.tap_row + ty * of.sh;
                        const float* weights = of.weight + ((channel * of.out + o) * of.kh + ky) * of.kw + f.tap_pixel;
                        for (int64_t t = 0; t < f.taps_wide; ++t)
                            w.added[count++] = {line + f.origin_pixel - t, nullptr, weights[t * of.sw]};
                    });
                    add_lines(w.added, count, start, to, c.group);
                }
    }

    // to[x] = start[x] + the sum of by * line[x].
    static void add_lines(const Source* added, int64_t count, const float* start, float* to, int64_t n) {
        for (int64_t x = 0; x < n; x += WIDTH) {
            vf v = *(const vf*)(start + x);
            for (int64_t s = 0; s < count; ++s) v += added[s].by * *(const vfu*)(added[s].line + x);
            *(vf*)(to + x) = v;
        }
    }

    template <int V>
    void update_panel(const Conv& c, Worker& w, const float* start, int64_t n, const Place& to) const {
        const SweepLayer& of = *c.layer;
        const int64_t size = c.H * c.W * COLUMN, at = n % COLUMN;
        const float* from = start + n / COLUMN * size + at;
        float* out = to.to + n / COLUMN * to.block + at;
        const int64_t from_second = WIDTH == LANES ? size : WIDTH, to_second = WIDTH == LANES ? to.block : WIDTH;
        for (int64_t p = 0; p < of.sh * of.sw; ++p) {
            const Phase& f = c.phases[p];
            const float* weights = f.weights + n * f.taps_high * f.taps_wide * of.in;
            for (int64_t y = 0; y < f.rows; ++y) {
                int64_t count = 0;
                for_lines(w, f, y, [&](const float* line, int64_t channel, int64_t ty) {
                    for (int64_t t = 0; t < f.taps_wide; ++t) {
                        const int64_t step = (ty * f.taps_wide + t) * of.in + channel;
                        w.added[count++] = {line + f.origin_pixel - t, weights + step * V * WIDTH, 0};
                    }
                });
                const int64_t row = f.row + y * of.sh, step = of.sw * COLUMN;
                const float* here = from + (row * c.W + f.pixel) * COLUMN;
                float* there = out + (row * to.pitch + f.pixel) * COLUMN;
                int64_t x = 0;
                for (; x + 4 <= f.pixels; x += 4)
                    add_pixels<4, V>(c, w.added, count, x, here, from_second, there, to_second, step);
                for (; x < f.pixels; ++x)
                    add_pixels<1, V>(c, w.added, count, x, here, from_second, there, to_second, step);
            }
        }
    }

    // PX pixels from x on of a line of one phase, `step` floats apart, times V vectors of channels.
    template <int PX, int V>
    __attribute__((always_inline)) static void add_pixels(const Conv& c, const Source* added, int64_t count, int64_t x,
                                                          const float* from, int64_t from_second, float* to,
                                                          int64_t to_second, int64_t step) {
        vf sum[PX][V];
#pragma GCC unroll 4
        for (int i = 0; i < PX; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[i][v] = *(const vf*)(from + (x + i) * step + v * from_second);
        for (int64_t s = 0; s < count; ++s) {
            vf b[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) b[v] = *(const vf*)(added[s].weights + v * WIDTH);
#pragma GCC unroll 4
            for (int i = 0; i < PX; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) sum[i][v] += added[s].line[x + i] * b[v];
        }
#pragma GCC unroll 4
        for (int i = 0; i < PX; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                vf y = sum[i][v];
                if (c.after == After::relu) y = y < 0 ? vf{} : y;
                else if (c.after == After::leaky_relu) y = y < 0 ? y * c.layer->slope : y;
                *(vf*)(to + (x + i) * step + v * to_second) = y;
            }
    }

    // The logits of a row of a network that begins with a convolution.
    void row_of_convolutions(Worker& w, int64_t row, bool is_base) const {
        const int64_t sample = sample_of(row, is_base, args.J), number = first_sample + sample;
        if (is_base) {
            set_row(w, changes.input, number, -1);
            keep_start(w, sample);
            if (changes.reference) {
                set_row(w, changes.reference, number, -1);
                return convolve(w, 0);
            }
            for (int64_t y = 0; y < conv[0].h; ++y) w.head[y] = -1;
        } else if (changed_lines(w, sample, row % args.J) < 0) {
            set_row(w, changes.input, number, row % args.J);
            return convolve(w, 0);
        }
        update(w, sample);
        convolve(w, 1);
    }

    // --- effects ---

    // Whether a row's logits are whole blocks of 16 pixels times 16 channels.
    bool in_blocks() const {
        const Conv& c = conv[n_conv - 1];
        return !c.by_taps && c.layer->out % COLUMN == 0 && c.H * c.W % COLUMN == 0;
    }

    // n outputs from p on of a row, as they are.
    void give(const float* y, int64_t sample, int64_t p, int64_t n) const {
        float* to = args.outputs + (first_sample + sample) * args.P + p;
        if (!n_conv || position) {
            memcpy(to, y, least(n, args.P - p) * sizeof(float));
            return;
        }
        const int64_t pixels = conv[n_conv - 1].H * conv[n_conv - 1].W;
        for (int64_t at = 0; at < args.P; at += COLUMN * pixels)
            for (int64_t x = 0; x < pixels; x += COLUMN) transpose(y + at + x * COLUMN, COLUMN, to + at + x, pixels);
    }

    // Takes n outputs from p on of a row: into the base of its sample, or as differences from it into state `state`.
    void take(Worker& w, int64_t row, bool is_base, const float* y_raw, int64_t p, int64_t n, int64_t state) const {
        const int64_t sample = sample_of(row, is_base, args.J);
        float *of_raw = base_raw + sample * padded + p, *of_base = base + sample * padded + p;
        if (position) {
            for (int64_t e = 0; e < args.P; ++e) w.natural[e] = y_raw[position[e]];
            y_raw = w.natural;
        }
        if (args.outputs) return give(y_raw, sample, p, n);
        const bool softmax = args.link == (int)SweepLink::softmax;
        if (is_base) memcpy(of_raw, y_raw, n * sizeof(float));
        if (linked && softmax) apply_softmax(y_raw, is_base ? of_base : w.linked, args.P, args.spans, args.n_spans);
        if (is_base) {
            if (linked && !softmax) apply_sigmoid(y_raw, of_base, n);
            return;
        }
        for (int64_t q = 0; q < n; q += TILE) {
            const int64_t here = least(n - q, TILE);
            const float* y = y_raw + q;
            if (linked && softmax) y = w.linked + q;
            else if (linked) apply_sigmoid(y_raw + q, w.linked, here), y = w.linked;
            reducer->add(of_raw + q, of_base + q, y_raw + q, y, p + q, here, w.slots + state * reducer->slot_elements(),
                         w.sums + state * reducer->sum_elements());
        }
    }

    void clear(Worker& w, int64_t state) const {
        reducer->clear(w.slots + state * reducer->slot_elements(), w.sums + state * reducer->sum_elements());
    }

    void write(Worker& w, int64_t row, int64_t state) const {
        double* sums = w.sums + state * reducer->sum_elements();
        reducer->finish(w.slots + state * reducer->slot_elements(), sums);
        float* out = args.out + (first_sample * args.J + row) * args.E * args.G;
        for (int64_t e = 0; e < args.E; ++e)
            for (int64_t g = 0; g < args.G; ++g) *out++ = (float)reducer->effect(args.kinds[e], g, sums);
    }

    // n rows from `start` on: base outputs, or effects.
    void tile_of_rows(Worker& w, int64_t start, int64_t n, bool is_base) const {
        if (n_dense) dense_layers(w, start, n, is_base);
        for (int64_t r = 0; r < n; ++r) {
            if (n_conv) {
                if (n_dense) enter(w, w.rows + r * piece), convolve(w, 0);
                else row_of_convolutions(w, start + r, is_base);
                if (!is_base) clear(w, 0);
                take(w, start + r, is_base, w.logits, 0, padded, 0);
            }
            if (!is_base) write(w, start + r, n_conv ? 0 : r);
        }
    }

    // Those of a tile; without convolutions also what follows them, but for the writing of effects.
    void dense_layers(Worker& w, int64_t start, int64_t n, bool is_base) const {
        const int64_t last = n_dense - 1;
        const float* x = w.x[0];
        if (last > 0) first_layer(w, start, n, is_base, 0, dense[0].wide, w.x[0], rows * COLUMN, COLUMN);
        for (int64_t l = 1; l < last; ++l) {
            const bool finite = !dense[l].skips || all_finite(x, dense[l - 1].wide, n);
            dense_layer(l, x, n, finite, 0, dense[l].wide, w.x[l % 2], rows * COLUMN, COLUMN);
            x = w.x[l % 2];
        }
        const bool finite = last == 0 || !dense[last].skips || all_finite(x, dense[last - 1].wide, n);
        if (!n_conv && !is_base)
            for (int64_t r = 0; r < n; ++r) clear(w, r);
        for (int64_t p = 0; p < dense[last].wide; p += piece) {
            const int64_t here = least(piece, dense[last].wide - p);
            if (last == 0) first_layer(w, start, n, is_base, p, p + here, w.rows, COLUMN, piece);
            else dense_layer(last, x, n, finite, p, p + here, w.rows, COLUMN, piece);
            if (!n_conv)
                for (int64_t r = 0; r < n; ++r) take(w, start + r, is_base, w.rows + r * piece, p, here, r);
        }
    }

    // All rows of the samples kept at a time.
    void block_of_samples(int64_t n, int threads) {
        const int64_t bases = most_of(1, least(rows, (n + threads - 1) / threads)), pairs = n * args.J;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Worker& w = workers[omp_get_thread_num()];
            const int64_t columns = n_dense ? dense[0].wide : 0;
#pragma omp for schedule(static)
            for (int64_t c = 0; c < columns; c += 2 * WIDTH) take_pre(n, c);
#pragma omp for schedule(dynamic)
            for (int64_t start = 0; start < n; start += bases) {
                const int64_t here = least(bases, n - start);
                tile_of_rows(w, start, here, true);
            }
#pragma omp for schedule(dynamic)
            for (int64_t start = 0; start < pairs; start += rows)
                tile_of_rows(w, start, least(rows, pairs - start), false);
        }
    }

    bool run() {
        for (int64_t l = 0; l < args.n_layers; ++l) (args.layers[l].kind == 0 ? n_dense : n_conv) += 1;
        size_dense();
        if (memory.ok && n_conv) size_conv();
        if (!n_dense) places = memory.take<int64_t>(changes.L);
        else if (changes.source) everything = memory.take<int64_t>(changes.L);
        if (!memory.ok || !size_outputs()) return false;
        const Reducer<float> of_rows(plan, labels, args.G, args.kinds, args.E);
        reducer = &of_rows;
        const int threads = args.threads > 1 ? args.threads : 1;
        if (!take_scratch(threads)) return false;
        pack(threads);
        for (first_sample = 0; first_sample < args.B; first_sample += samples)
            block_of_samples(least(samples, args.B - first_sample), threads);
        return true;
    }
};

}  // namespace

bool network_rows(const NetworkRows& of, const Changes& by) {
    if (of.B == 0 || (!of.outputs && (of.J == 0 || of.E == 0 || of.G == 0))) return true;
    return Sweep(of, by).run();
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
