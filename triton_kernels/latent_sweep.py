"""Triton kernels of `latent_sweep`; the mathematics is vaecirc_fast/reference/latent_sweep.py.

A tile of rows, one an intervention on a sample, goes through the decoder layer by layer; activations that are operands
of a product are rounded when they are written, transposed convolutions are channels-last. The last layer ends in the
link, the difference from the sample's own output and sums over runs: elements are sorted by group, and each group is
filled up to whole runs, so that a run is of one group. Outputs are never written, but for the samples themselves. A
second kernel adds up the runs of each group.

The last transposed convolution is one product of each pixel with all taps at once, which wastes nothing whatever its
kernel and stride; a program keeps those products of its rows in memory of its own, small enough for the L2 cache, and
every output element gathers its few. The layer before it is done by the same program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import effect_reduction
from .effect_reduction import finish

TRANSPOSED, LAYER = 1, 8  # of a layout, see the reference
IDENTITY, RELU, LEAKY_RELU, ELU, SIGMOID, TANH, SILU = (tl.constexpr(n) for n in range(7))  # activations
SUMS = {"ABSOLUTE": (0, 4), "SQUARE": (1, 2), "PLAIN": (5,), "RAW": (3,)}  # the effects that need each sum
# Memory of a call, in bytes; together below 64 MiB. Larger tiles save launches, smaller ones stay in cache. Within a
# tile, 32 bits count every element.
TILE_BYTES = 34 << 20  # activations and sums over runs
BASE_BYTES = 6 << 20  # outputs of the samples themselves
TAP_BYTES = 20 << 20  # products of pixels with taps
ROWS = 1 << 16  # of a tile, at most
WIDEST_RUN = 128
PROGRAMS = 512  # that share the rows of the last layer: several for each multiprocessor of any GPU
BIG_BLOCKS = True  # in the interpreter, which is slow by the program
WORTH_CAPTURING = 8  # tiles alike
MOST_CHANNELS = 128  # between the last two layers, for one program to do both


# --- what the kernels share ------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(x < 0, 0.0, x)  # and NaN stays
    if ACTIVATION == LEAKY_RELU:
        return tl.where(x < 0, slope * x, x)
    if ACTIVATION == ELU:
        # Near zero e^x - 1 would cancel.
        series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
        return tl.where(x > 0, x, slope * tl.where(x > -0.25, series, tl.exp(x) - 1))
    if ACTIVATION == SIGMOID:
        return _sigmoid(x)
    if ACTIVATION == TANH:
        square = x * x
        series = 17 / 315 - square * (62 / 2835 - square * (1382 / 155925))
        series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * series)))
        far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
        return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))
    if ACTIVATION == SILU:
        return x * _sigmoid(x)
    return x


@triton.jit
def _rounded(x, DROPPED: tl.constexpr):
    """x without the last DROPPED bits of its mantissa, to nearest even: by hand, since the interpreter cuts."""
    if DROPPED > 0:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) & -(1 << DROPPED)
        x = tl.where(x - x == 0, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _load(pointer, mask, UPCAST: tl.constexpr):
    x = tl.load(pointer, mask=mask, other=0.0)
    if UPCAST:  # the interpreter's 16-bit products are not the hardware's
        x = x.to(tl.float32)
    return x


@triton.jit
def _add_runs(sums, values, kept, inside, WIDTH: tl.constexpr):
    """Writes the sums of `values` (R, P) over runs of WIDTH columns."""
    if kept is not None:
        values = tl.where(kept[None, :], values, 0.0)
    if WIDTH > 1:
        values = tl.sum(tl.reshape(values, [values.shape[0], values.shape[1] // WIDTH, WIDTH]), 2)
    tl.store(sums, values, mask=inside)


@triton.jit
def _add_effects(
    x,  # (R, P) logits
    at,  # (R, P) where base and raw hold the samples'
    base,
    raw,
    valid,  # (R, P)
    kept,  # (P), or None: all
    sums,  # (R, runs) where to
    stride,  # between one sum and the next
    inside,  # (R, runs)
    LINKED: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SQUARE: tl.constexpr,
    PLAIN: tl.constexpr,
    RAW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if ABSOLUTE or SQUARE or PLAIN:
        y = _sigmoid(x) if LINKED else x
        d = y - tl.load(base + at, mask=valid, other=0.0)
        if ABSOLUTE:
            _add_runs(sums, tl.abs(d), kept, inside, WIDTH)
            sums += stride
        if SQUARE:
            _add_runs(sums, d * d, kept, inside, WIDTH)
            sums += stride
        if PLAIN:
            _add_runs(sums, d, kept, inside, WIDTH)
            sums += stride
    if RAW:
        d = x - tl.load(raw + at, mask=valid, other=0.0)
        _add_runs(sums, d * d, kept, inside, WIDTH)


# --- dense layers ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _first_kernel(
    pre,  # (samples, N) pre-activations of the samples themselves
    columns,  # (L, N)
    latents,  # (J, K)
    shifts,  # (B, J, K)
    out,  # (rows, N)
    place,  # (2): the first row, of B J, and the first sample of pre; in memory, so that a captured launch moves on
    rows,
    J,
    K,
    N,
    slope,
    ACTIVATION: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = r < rows
    inside = valid[:, None] & (n < N)[None, :]
    row = r.to(tl.int64) + tl.load(place)
    of = (row // J - tl.load(place + 1)).to(tl.int32)
    j = row % J
    x = tl.load(pre + of[:, None] * N + n[None, :], mask=inside, other=0.0)
    for k in range(0, K):
        latent = tl.load(latents + j * K + k, mask=valid, other=0)
        shift = tl.load(shifts + row * K + k, mask=valid, other=0.0)
        x += shift[:, None] * tl.load(columns + latent[:, None] * N + n[None, :], mask=inside, other=0.0)
    x = _rounded(activate(x, slope, ACTIVATION), DROPPED)
    tl.store(out + r[:, None] * N + n[None, :], x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x,  # (rows, D)
    w,  # (N, D)
    r,
    n,
    rows,
    N,
    D,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x @ w.T for rows r and columns n."""
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    x += r[:, None] * D
    w += n[None, :] * D
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        xs = _load(x + d[None, :], (r < rows)[:, None] & (d < D)[None, :], UPCAST)
        ws = _load(w + d[:, None], (n < N)[None, :] & (d < D)[:, None], UPCAST)
        total = tl.dot(xs, ws, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["rows"])
def _dense_kernel(
    x,
    w,
    bias,
    out,  # (rows, N)
    rows,
    N,
    D,
    slope,
    ACTIVATION: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs of the same rows are neighbours: these are read once, and all weights stay in cache.
    blocks = tl.cdiv(N, BLOCK_N)
    r = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(x, w, r, n, rows, N, D, UPCAST, PRECISION, BLOCK_R, BLOCK_N, BLOCK_D)
    total += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    total = _rounded(activate(total, slope, ACTIVATION), DROPPED)
    inside = (r < rows)[:, None] & (n < N)[None, :]
    tl.store(out + r[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _dense_tail_kernel(
    x,  # (rows, D)
    w,  # (P, D), sorted by group
    bias,  # (P)
    keep,  # (P) 0 for what fills up a run, or None: no such
    base,  # (samples, P) after the link
    raw,  # (samples, P) before it
    sums,  # (sums, rows, runs)
    place,
    rows,
    J,
    P,
    D,
    LINKED: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SQUARE: tl.constexpr,
    PLAIN: tl.constexpr,
    RAW: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK_N)
    r = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(0) % blocks
    p = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(x, w, r, p, rows, P, D, UPCAST, PRECISION, BLOCK_R, BLOCK_N, BLOCK_D)
    total += tl.load(bias + p, mask=p < P, other=0.0)[None, :]
    kept = None
    if keep is not None:
        kept = tl.load(keep + p, mask=p < P, other=0) != 0
    of = ((r.to(tl.int64) + tl.load(place)) // J - tl.load(place + 1)).to(tl.int32)
    runs = P // WIDTH
    run = block * (BLOCK_N // WIDTH) + tl.arange(0, BLOCK_N // WIDTH)
    at = of[:, None] * P + p[None, :]
    valid = (r < rows)[:, None] & (p < P)[None, :]
    into = sums + r[:, None] * runs + run[None, :]
    inside = (r < rows)[:, None] & (run < runs)[None, :]
    stride = rows * runs
    _add_effects(total, at, base, raw, valid, kept, into, stride, inside, LINKED, ABSOLUTE, SQUARE, PLAIN, RAW, WIDTH)


# --- transposed convolutions -----------------------------------------------------------------------------------------


@triton.jit
def _phase(
    x,  # (rows, height, width, C)
    w,  # (KH, KW, N, C)
    bias,  # (N)
    pixel,  # (M) of rows, height and width: at which an output's window ends
    y,  # (M) its row
    z,  # (M) its column
    valid,  # (M)
    n,  # (N) output channels
    fy,  # which of the SH rows of outputs that belong to a pixel
    fx,
    height,
    width,
    C,
    N,
    slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Outputs (M, N) at row SH y + fy and column SW z + fx, after the activation.

    Output o takes tap k of input i where o + padding = stride i + k: of each axis every stride-th tap.
    """
    ky = (fy + PH) % SH
    kx = (fx + PW) % SW
    dy = (fy + PH) // SH
    dx = (fx + PW) // SW
    rows = (KH - ky + SH - 1) // SH
    columns = (KW - kx + SW - 1) // SW
    blocks = tl.cdiv(C, BLOCK_C)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, rows * columns * blocks):
        tap = step // blocks
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        ty = tap // columns
        tx = tap % columns
        iy = y + (dy - ty)
        ix = z + (dx - tx)
        inside = valid & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        at = pixel + (dy - ty) * width + (dx - tx)
        xs = _load(x + at[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :], UPCAST)
        of_tap = w + ((ky + SH * ty) * KW + kx + SW * tx) * N * C
        ws = _load(of_tap + n[None, :] * C + c[:, None], (n < N)[None, :] & (c < C)[:, None], UPCAST)
        total = tl.dot(xs, ws, total, input_precision=PRECISION)
    total += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    return _rounded(activate(total, slope, ACTIVATION), DROPPED)


@triton.jit(do_not_specialize=["rows"])
def _transposed_kernel(
    x,  # (rows, height, width, C)
    w,  # (KH, KW, N, C)
    bias,  # (N)
    out,  # (rows, out_height, out_width, N)
    rows,
    height,
    width,
    out_height,
    out_width,
    C,
    N,
    slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    phase = tl.program_id(1)
    fy = phase // SW
    fx = phase % SW
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    across = tl.cdiv(out_width, SW)
    q = tl.cdiv(out_height, SH) * across
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // q
    y = m % q // across
    z = m % across
    valid = row < rows
    pixel = (row * height + y) * width + z
    total = _phase(
        x,
        w,
        bias,
        pixel,
        y,
        z,
        valid,
        n,
        fy,
        fx,
        height,
        width,
        C,
        N,
        slope,
        KH,
        KW,
        SH,
        SW,
        PH,
        PW,
        ACTIVATION,
        DROPPED,
        UPCAST,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
    )
    y = SH * y + fy
    z = SW * z + fx
    valid = valid & (y < out_height) & (z < out_width)
    at = (row * out_height + y) * out_width + z
    inside = valid[:, None] & (n < N)[None, :]
    tl.store(out + at[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _transposed_tail_kernel(
    x,  # (rows, height, width, C)
    w,  # (KH, KW, N, C) of the layer before the last, or None: x is what enters the last
    bias,
    taps,  # (T, N) weights of the last layer, N = C without a layer before
    places,  # (PLACES, P) where a program's memory holds what an element adds up, -1 for nothing
    end_bias,  # (P)
    keep,  # (P), or None
    memory,  # (programs, ROWS, T, pixels)
    base,  # (samples, P)
    raw,
    sums,  # (sums, rows, runs), or None
    out,  # (rows, P) if there are no sums: the outputs themselves
    place,
    rows,
    J,
    P,
    height,
    width,
    down,  # pixels of a phase
    across,
    C,
    N,
    T,
    slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PLACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPPED: tl.constexpr,
    LINKED: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SQUARE: tl.constexpr,
    PLAIN: tl.constexpr,
    RAW: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # at once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    q = down * across
    pixels = q * SH * SW
    memory += tl.program_id(0).to(tl.int64) * ROWS * T * pixels
    n = tl.arange(0, BLOCK_N)
    runs = P // WIDTH
    for chunk in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = chunk * ROWS
        for phase in range(0, SH * SW):
            fy = phase // SW
            fx = phase % SW
            for m0 in range(0, ROWS * q, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                of = m // q
                y = m % q // across
                z = m % across
                valid = (of < ROWS) & (first + of < rows)
                pixel = ((first + of) * height + y) * width + z
                into = memory + of * T * pixels + phase * q + m % q
                if w is not None:
                    h = _phase(
                        x,
                        w,
                        bias,
                        pixel,
                        y,
                        z,
                        valid,
                        n,
                        fy,
                        fx,
                        height,
                        width,
                        C,
                        N,
                        slope,
                        KH,
                        KW,
                        SH,
                        SW,
                        PH,
                        PW,
                        ACTIVATION,
                        DROPPED,
                        UPCAST,
                        PRECISION,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_C,
                    )
                    if not UPCAST:
                        h = h.to(taps.dtype.element_ty)
                for t0 in range(0, T, BLOCK_T):
                    t = t0 + tl.arange(0, BLOCK_T)
                    if w is not None:
                        ts = _load(taps + t[None, :] * N + n[:, None], (t < T)[None, :] & (n < N)[:, None], UPCAST)
                        product = tl.dot(h, ts, input_precision=PRECISION)
                    else:
                        product = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
                        for c0 in range(0, C, BLOCK_C):
                            c = c0 + tl.arange(0, BLOCK_C)
                            xs = _load(x + pixel[:, None] * C + c[None, :], valid[:, None] & (c < C)[None, :], UPCAST)
                            ts = _load(taps + t[None, :] * C + c[:, None], (t < T)[None, :] & (c < C)[:, None], UPCAST)
                            product = tl.dot(xs, ts, product, input_precision=PRECISION)
                    tl.store(into[:, None] + t[None, :] * pixels, product, mask=valid[:, None] & (t < T)[None, :])
        tl.debug_barrier()  # other threads of the program read what this one wrote
        own = tl.arange(0, ROWS)
        r = first + own
        in_rows = (r < rows)[:, None]
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            total = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for k in tl.static_range(PLACES):
                held = tl.load(places + k * P + p, mask=p < P, other=-1)
                there = (held >= 0)[None, :] & in_rows
                total += tl.load(memory + own[:, None] * (T * pixels) + held[None, :], mask=there, other=0.0)
            total += tl.load(end_bias + p, mask=p < P, other=0.0)[None, :]
            valid = in_rows & (p < P)[None, :]
            if sums is None:
                if LINKED:
                    total = _sigmoid(total)
                tl.store(out + r[:, None] * P + p[None, :], total, mask=valid)
            else:
                kept = None
                if keep is not None:
                    kept = tl.load(keep + p, mask=p < P, other=0) != 0
                of = ((r.to(tl.int64) + tl.load(place)) // J - tl.load(place + 1)).to(tl.int32)
                run = p0 // WIDTH + tl.arange(0, BLOCK_P // WIDTH)
                at = of[:, None] * P + p[None, :]
                into = sums + r[:, None] * runs + run[None, :]
                stride = rows * runs
                inside = in_rows & (run < runs)[None, :]
                _add_effects(
                    total, at, base, raw, valid, kept, into, stride, inside, LINKED, ABSOLUTE, SQUARE, PLAIN, RAW, WIDTH
                )
        tl.debug_barrier()


# --- what follows the last layer -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _runs_kernel(
    sums,  # (sums, rows, runs)
    offsets,  # (G + 1) of elements
    run_offsets,  # (G + 1) of runs
    out,  # (B J, E, G)
    place,
    rows,
    runs,
    E,
    G,
    kind0: tl.constexpr,  # up to 6 effects, -1 for none
    kind1: tl.constexpr,
    kind2: tl.constexpr,
    kind3: tl.constexpr,
    kind4: tl.constexpr,
    kind5: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SQUARE: tl.constexpr,
    PLAIN: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // G
    g = at % G
    valid = row < rows
    n = (tl.load(offsets + g + 1, mask=valid, other=1) - tl.load(offsets + g, mask=valid, other=0)).to(tl.float32)
    begin = tl.load(run_offsets + g, mask=valid, other=0)
    count = tl.load(run_offsets + g + 1, mask=valid, other=0) - begin
    sums += row * runs + begin
    stride = rows * runs
    absolute = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    raw = tl.zeros([BLOCK], tl.float32)
    for t0 in range(0, tl.max(count), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = valid[:, None] & (t[None, :] < count[:, None])
        here = sums[:, None] + t[None, :]
        if ABSOLUTE:
            absolute += tl.sum(tl.load(here, mask=inside, other=0.0), 1)
            here += stride
        if SQUARE:
            square += tl.sum(tl.load(here, mask=inside, other=0.0), 1)
            here += stride
        if PLAIN:
            plain += tl.sum(tl.load(here, mask=inside, other=0.0), 1)
            here += stride
        if RAW:
            raw += tl.sum(tl.load(here, mask=inside, other=0.0), 1)
    into = out + (row + tl.load(place)) * E * G + g
    tl.store(into, finish(kind0, absolute, square, plain, raw, n), mask=valid)
    if kind1 >= 0:
        tl.store(into + G, finish(kind1, absolute, square, plain, raw, n), mask=valid)
    if kind2 >= 0:
        tl.store(into + 2 * G, finish(kind2, absolute, square, plain, raw, n), mask=valid)
    if kind3 >= 0:
        tl.store(into + 3 * G, finish(kind3, absolute, square, plain, raw, n), mask=valid)
    if kind4 >= 0:
        tl.store(into + 4 * G, finish(kind4, absolute, square, plain, raw, n), mask=valid)
    if kind5 >= 0:
        tl.store(into + 5 * G, finish(kind5, absolute, square, plain, raw, n), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _softmax_kernel(
    x,  # (rows, P)
    spans,  # (n + 1)
    out,  # (rows, P)
    rows,
    P,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.load(spans + tl.program_id(1))
    end = tl.load(spans + tl.program_id(1) + 1)
    row = r[:, None] * P
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_S):
        p = first + tl.arange(0, BLOCK_S)
        inside = (r < rows)[:, None] & (p < end)[None, :]
        part = tl.load(x + row + p[None, :], mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(part, 1))
    largest = tl.where(r < rows, largest, 0.0)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(begin, end, BLOCK_S):
        p = first + tl.arange(0, BLOCK_S)
        inside = (r < rows)[:, None] & (p < end)[None, :]
        part = tl.load(x + row + p[None, :], mask=inside, other=float("-inf"))
        total += tl.sum(tl.exp(part - largest[:, None]), 1)
    total = tl.where(r < rows, total, 1.0)
    for first in range(begin, end, BLOCK_S):
        p = first + tl.arange(0, BLOCK_S)
        inside = (r < rows)[:, None] & (p < end)[None, :]
        part = tl.load(x + row + p[None, :], mask=inside, other=0.0)
        tl.store(out + row + p[None, :], tl.exp(part - largest[:, None]) / total[:, None], mask=inside)


# --- launching -------------------------------------------------------------------------------------------------------


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _packed(x):
    return x.clone(memory_format=torch.contiguous_format)


class _Arithmetic:
    """How operands of products are kept, and the blocks in which products are computed."""

    def __init__(self, precision: int, gpu: bool):
        self.gpu, self.precision = gpu, precision
        self.big = BIG_BLOCKS and not gpu
        self.dtype = torch.bfloat16 if precision == 2 else torch.float32
        # A GPU rounds to bfloat16 when it converts.
        dropped = (0, 13, 0 if gpu else 16)[precision]
        self.rounded = {"DROPPED": dropped}
        self.product = {"UPCAST": not gpu, "PRECISION": "tf32" if precision == 1 and gpu else "ieee"}

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as an operand, rounded to nearest even."""
        weight = _packed(weight)
        if self.precision == 1:
            bits = weight.view(torch.int32)
            near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
            return torch.where(weight.isfinite(), near, weight)
        return weight.to(self.dtype)

    def blocks(self, rows: int, columns: int, depth: int, names: str, exact: bool = False) -> dict[str, int]:
        """Blocks of rows x columns, a product over `depth`; `names` are those of the three. Few, big ones where they
        are interpreted."""
        if self.big:
            sizes, options = (min(256, _power(rows)), min(1024, _power(columns)), min(512, _power(depth))), {}
        elif exact or self.precision == 0:
            sizes = (64, min(64, _power(columns)), 16)
            options = {"num_warps": 4, "num_stages": 2}
        else:
            sizes = (128, min(128, _power(columns)), min(128 // self.dtype.itemsize, _power(depth)))
            options = {"num_warps": 8, "num_stages": 3}
        return dict(zip((f"BLOCK_{name}" for name in names), (max(16, size) for size in sizes), strict=True)) | options


class _Front:
    """The layers but the last, and the memory through which a tile of rows passes them."""

    def __init__(self, weights, biases, layout, slopes, shape, arithmetic, sums: int):
        layers = [layout[LAYER * n : LAYER * (n + 1)] for n in range(len(weights))]
        weights, biases = list(weights), list(biases)
        convolutions = next((n for n, layer in enumerate(layers) if layer[0] == TRANSPOSED), len(layers))
        if convolutions < len(layers):  # channels last
            channels, height, width = shape[:3]
            last = weights[convolutions - 1], biases[convolutions - 1]
            weights[convolutions - 1], biases[convolutions - 1] = (
                _packed(t.unflatten(0, (channels, height * width)).transpose(0, 1).flatten(0, 1)) for t in last
            )
        self.arithmetic, self.layers, self.slopes = arithmetic, layers, slopes
        self.biases = biases
        self.grids = _grids(weights, layers, shape)
        self.first = weights[0]
        self.columns = _packed(weights[0].T)
        # What enters the tail: behind the layer before the last, or two before it, if one program does both.
        self.pair = len(layers) - convolutions > 1 and weights[-1].shape[0] <= MOST_CHANNELS
        self.count = len(layers) - 1 - self.pair
        self.weights = [None] + [
            arithmetic.operand(w if layer[0] != TRANSPOSED else w.permute(2, 3, 1, 0))
            for w, layer in zip(weights[1 : self.count + self.pair], layers[1:], strict=False)
        ]
        self.last = weights[-1]
        widths = [math.prod(self.grids[n]) for n in range(max(self.count, 1))]
        itemsize = arithmetic.dtype.itemsize if self.count else 4
        row = (max(widths[::2]) + max(widths[1::2], default=0)) * itemsize + sums
        self.rows = max(1, min(TILE_BYTES // row, ROWS))
        if self.rows >= 16:
            self.rows -= self.rows % 16
        self.widths = (max(widths[::2]), max(widths[1::2], default=0))
        self.memory = None

    def prepare(self, rows: int) -> None:
        """Memory for tiles of at most that many rows."""
        self.rows = min(self.rows, max(rows, 1))
        dtype = self.arithmetic.dtype if self.count else torch.float32
        self.memory = [torch.empty(self.rows * width, dtype=dtype, device=self.first.device) for width in self.widths]

    def pre(self, z, out):
        """Writes pre-activations (B, N) of the first layer, exact."""
        arguments = (z, self.first, self.biases[0], out, IDENTITY.value, 0.0)
        _product_of(self.arithmetic, *arguments, exact=True, operand=False)

    def run(self, pre, latents, shifts, place, rows):
        """What enters the tail for `rows` rows from `place` on: (rows, ...), in memory that the next call reuses."""
        J, K = latents.shape
        N = len(self.first)
        # The one layer of a linear decoder is not an operand of anything.
        rounded = self.arithmetic.rounded if self.count else {"DROPPED": 0}
        h = self._place(0, rows)
        block_n = min(256, _power(N))
        block_r = min(256, _power(rows)) if self.arithmetic.big else 16
        _first_kernel[(triton.cdiv(rows, block_r), triton.cdiv(N, block_n))](
            *(pre, self.columns, latents, shifts, h, place, rows, J, K, N, self.slopes[0]),
            ACTIVATION=self.layers[0][1],
            **rounded,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
        )
        for n in range(1, self.count):
            x, h = h, self._place(n, rows)
            self.layer(n, x, h)
        return h

    def layer(self, n, x, out):
        """Layer n, not the first: x to out."""
        if self.layers[n][0] == TRANSPOSED:
            self._transposed(n, x, out)
        else:
            _product_of(self.arithmetic, x, self.weights[n], self.biases[n], out, self.layers[n][1], self.slopes[n])

    def _place(self, n, rows):
        return self.memory[n % 2].narrow(0, 0, rows * math.prod(self.grids[n])).view(rows, *self.grids[n])

    def _transposed(self, n, x, out):
        layer, weight = self.layers[n], self.weights[n]
        rows, height, width, channels = x.shape
        _, out_height, out_width, outputs = out.shape
        phases = layer[2] * layer[3]
        pixels = rows * triton.cdiv(out_height, layer[2]) * triton.cdiv(out_width, layer[3])
        blocks = self.arithmetic.blocks(pixels, outputs, channels, "MNC")
        _transposed_kernel[(triton.cdiv(pixels, blocks["BLOCK_M"]), phases, triton.cdiv(outputs, blocks["BLOCK_N"]))](
            *(x, weight, self.biases[n], out, rows, height, width, out_height, out_width, channels, outputs),
            self.slopes[n],
            **_geometry(weight, layer),
            ACTIVATION=layer[1],
            **self.arithmetic.rounded,
            **self.arithmetic.product,
            **blocks,
            **({"maxnreg": 128} if self.arithmetic.gpu and self.arithmetic.precision else {}),  # or sm_100 spills
        )


def _grids(weights, layers, shape):
    """The shape of a row after each layer: (N,), or channels-last (height, width, C)."""
    grids = []
    for n, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if layer[0] != TRANSPOSED:
            before_grid = n + 1 < len(layers) and layers[n + 1][0] == TRANSPOSED
            grids.append((shape[1], shape[2], shape[0]) if before_grid else (len(weight),))
            continue
        sizes = [
            (grids[-1][a] - 1) * layer[2 + a] - 2 * layer[4 + a] + weight.shape[2 + a] + layer[6 + a] for a in (0, 1)
        ]
        grids.append((*sizes, weight.shape[1]))
    return grids


def _geometry(weight, layer):
    """Kernel, stride and padding of a layer whose weight is (KH, KW, N, C)."""
    names = ("KH", "KW", "SH", "SW", "PH", "PW")
    return dict(zip(names, (*weight.shape[:2], *layer[2:6]), strict=True))


def _product_of(arithmetic, x, weight, bias, out, activation, slope, *, exact=False, operand=True):
    """out = activation(x weight' + bias), rounded if it is an operand of the next product."""
    rows, depth, columns = len(x), weight.shape[1], len(weight)
    blocks = arithmetic.blocks(rows, columns, depth, "RND", exact)
    _dense_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]) * triton.cdiv(columns, blocks["BLOCK_N"]),)](
        *(x, weight, bias, out, rows, columns, depth, slope),
        ACTIVATION=activation,
        **(arithmetic.rounded if operand else {"DROPPED": 0}),
        **({**arithmetic.product, "PRECISION": "ieee"} if exact else arithmetic.product),
        **blocks,
    )


class _Elements:
    """Output elements in the order in which the last layer makes them: sorted by group, in runs of one group."""

    def __init__(self, labels, order, offsets):
        sizes = offsets.diff()
        widths = [1 << k for k in range(WIDEST_RUN.bit_length())]
        lengths = torch.stack([(sizes + w - 1) // w * w for w in widths]).sum(1).tolist()
        # What fills up runs is computed in vain; a sum costs about as much as eight elements.
        self.width = min(zip(widths, lengths, strict=True), key=lambda wl: wl[1] * (1 + 8 / wl[0]))[0]
        self.count = lengths[widths.index(self.width)]
        self.runs = self.count // self.width
        runs = (sizes + self.width - 1) // self.width
        self.run_offsets = torch.cat([runs.new_zeros(1), runs.cumsum(0)]).int()
        group = labels[order.long()].long()
        place = torch.arange(len(order), device=order.device) - offsets[group] + self.run_offsets[group] * self.width
        self.order = torch.full((self.count,), -1, device=order.device, dtype=torch.int64)
        self.order[place.long()] = order.long()
        self.keep = None if self.count == len(order) else (self.order >= 0).to(torch.uint8)


class _DenseTail:
    """The last layer, dense: of every output, or sorted."""

    def __init__(self, front, weight, bias, order=None):
        if order is not None:
            weight, bias = (t.index_select(0, order.clamp(min=0)) for t in (weight, bias))
        self.arithmetic, self.weight, self.bias = front.arithmetic, front.arithmetic.operand(weight), bias

    def outputs(self, h, out, linked):
        """Writes outputs or logits (rows, P)."""
        activation = SIGMOID.value if linked else IDENTITY.value
        _product_of(self.arithmetic, h.flatten(1), self.weight, self.bias, out, activation, 0.0, operand=False)

    def effects(self, h, elements, base, raw, sums, place, J, flags):
        """Writes sums over runs."""
        rows, depth = h.shape
        blocks = self.arithmetic.blocks(rows, max(elements.count, elements.width), depth, "RND")
        if not self.arithmetic.big and sum(flags[name] for name in SUMS) > 1:
            blocks["BLOCK_N"] = min(blocks["BLOCK_N"], 64)  # or registers spill
        blocks["BLOCK_N"] = max(blocks["BLOCK_N"], elements.width)
        _dense_tail_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]) * triton.cdiv(elements.count, blocks["BLOCK_N"]),)](
            *(h, self.weight, self.bias, elements.keep, base, raw, sums, place, rows, J, elements.count, depth),
            **flags,
            WIDTH=elements.width,
            **self.arithmetic.product,
            **blocks,
        )


class _TransposedTail:
    """The last layer, a transposed convolution, with the one before it if one program does both."""

    def __init__(self, front, bias, shape, order):
        self.front, self.slope, self.memory = front, front.slopes[-2], None
        layer = front.layers[-1]
        kernel = front.last.permute(2, 3, 1, 0)  # (KH, KW, outputs, C)
        self.taps = front.arithmetic.operand(kernel.flatten(0, 2))
        sources, outputs = front.grids[-2], kernel.shape[2]
        self.input = front.grids[-3] if front.pair else sources
        stride = front.layers[-2][2:4] if front.pair else (1, 1)
        self.down, self.across = (triton.cdiv(sources[a], stride[a]) for a in (0, 1))
        self.pixels = self.down * self.across * stride[0] * stride[1]
        # Where a program's memory, of all taps of all pixels, pixels by phase, holds what each element adds up.
        element = order.clamp(min=0)
        channel, y, x = element // (shape[3] * shape[4]), element // shape[4] % shape[3], element % shape[4]
        places = []
        for ty in range(triton.cdiv(kernel.shape[0], layer[2])):
            for tx in range(triton.cdiv(kernel.shape[1], layer[3])):
                ky, kx = (y + layer[4]) % layer[2] + layer[2] * ty, (x + layer[5]) % layer[3] + layer[3] * tx
                iy, ix = (y + layer[4]) // layer[2] - ty, (x + layer[5]) // layer[3] - tx
                there = (order >= 0) & (ky < kernel.shape[0]) & (kx < kernel.shape[1])
                there &= (iy >= 0) & (iy < sources[0]) & (ix >= 0) & (ix < sources[1])
                phase = iy % stride[0] * stride[1] + ix % stride[1]
                pixel = (phase * self.down + iy // stride[0]) * self.across + ix // stride[1]
                tap = (ky * kernel.shape[1] + kx) * outputs + channel
                places.append(torch.where(there, tap * self.pixels + pixel, -1))
        self.places = torch.stack(places).int()
        self.bias = torch.where(order >= 0, bias.index_select(0, channel), 0.0)

    def outputs(self, h, out, linked):
        """Writes outputs or logits (rows, P)."""
        flags = {"LINKED": linked, **dict.fromkeys(SUMS, False)}
        self._launch(h, None, None, None, None, out, None, 1, flags, 1)

    def effects(self, h, elements, base, raw, sums, place, J, flags):
        """Writes sums over runs."""
        self._launch(h, elements.keep, base, raw, sums, None, place, J, flags, elements.width)

    def _launch(self, h, keep, base, raw, sums, out, place, J, flags, run):
        front, rows = self.front, len(h)
        arithmetic, pair = front.arithmetic, front.pair
        weight, bias = (front.weights[front.count], front.biases[-2]) if pair else (None, None)
        geometry = _geometry(weight, front.layers[-2]) if pair else dict.fromkeys(("KH", "KW", "SH", "SW"), 1)
        height, width, channels = self.input
        between = self.taps.shape[1]
        blocks = arithmetic.blocks(ROWS, between if pair else 16, channels, "MNC")
        blocks["BLOCK_N"] = max(16, _power(between)) if pair else 16
        if not arithmetic.big and arithmetic.precision == 0:
            blocks |= {"num_warps": 8, "maxnreg": 160 if pair else 200}  # or the compiler spills
        own = 4 * len(self.taps) * self.pixels
        q = self.down * self.across
        at_once = max(1, min(blocks["BLOCK_M"] // q, _power(rows), TAP_BYTES // own))
        at_once = 1 << at_once.bit_length() - 1
        chunks = triton.cdiv(rows, at_once)
        programs = max(1, min(PROGRAMS, TAP_BYTES // (own * at_once), chunks))
        size = programs * at_once * own // 4
        if self.memory is None or self.memory.numel() < size:
            self.memory = torch.empty(size, device=h.device)
        blocks["BLOCK_M"] = max(16, min(blocks["BLOCK_M"], _power(q * at_once)))
        P = self.places.shape[1]
        _transposed_tail_kernel[(programs,)](
            *(h, weight, bias, self.taps, self.places, self.bias, keep, self.memory, base, raw, sums, out),
            *(place, rows, J, P, height, width, self.down, self.across, channels, between, len(self.taps)),
            self.slope,
            **{"PH": 0, "PW": 0, **geometry},
            PLACES=len(self.places),
            ACTIVATION=front.layers[-2][1] if pair else IDENTITY.value,
            **arithmetic.rounded,
            **flags,
            WIDTH=run,
            **arithmetic.product,
            ROWS=at_once,
            **blocks,
            BLOCK_T=max(16, min(_power(len(self.taps)), 512 if arithmetic.big else 64 if arithmetic.precision else 16)),
            BLOCK_P=max(run, min(_power(P), 4096 if arithmetic.big else 1024 // at_once)),
        )


def _flags(kinds, link):
    return {"LINKED": link == 1} | {name: any(kind in kinds for kind in needing) for name, needing in SUMS.items()}


def forward(
    z,
    latents,
    shifts,
    weights,
    biases,
    layout,
    slopes,
    shape,
    labels,
    order,
    offsets,
    kinds,
    link,
    spans,
    precision,
):
    """Effects (B, J, E, G) in memory of at most 64 MiB beside them; see the reference."""
    B, J = shifts.shape[:2]
    groups = offsets.numel() - 1
    out = torch.empty(B, J, len(kinds), groups, device=z.device)
    if out.numel() == 0:
        return out
    arithmetic = _Arithmetic(precision, z.is_cuda)
    if link == 2 or len(weights) == 1:
        _formed(
            z,
            latents,
            shifts,
            weights,
            biases,
            layout,
            slopes,
            shape,
            labels,
            order,
            offsets,
            kinds,
            link,
            spans,
            arithmetic,
            out,
        )
        return out
    elements = _Elements(labels, order, offsets)
    flags = _flags(kinds, link)
    n_sums = sum(flags[name] for name in SUMS)
    front = _Front(weights, biases, layout, slopes, shape, arithmetic, 4 * n_sums * elements.runs)
    if front.layers[-1][0] == TRANSPOSED:
        tail = _TransposedTail(front, biases[-1], shape, elements.order)
    else:
        tail = _DenseTail(front, weights[-1], biases[-1], elements.order)
    kept = [n_sums > flags["RAW"], flags["RAW"]]  # of the samples: outputs, logits
    samples = min(B, max(1, BASE_BYTES // (4 * (elements.count * sum(kept) + len(front.first)))))
    front.prepare(samples * J)
    base, raw = (torch.empty(samples, elements.count, device=z.device) if needed else None for needed in kept)
    sums = torch.empty(n_sums * front.rows * elements.runs, device=z.device)
    pre = torch.empty(samples, len(front.first), device=z.device)
    place = torch.zeros(2, dtype=torch.int64, device=z.device)
    zero = torch.zeros_like(place)

    def tile(rows: int) -> None:
        h = front.run(pre, latents, shifts, place, rows)
        tail.effects(h, elements, base, raw, sums, place, J, flags)
        _add_up(sums, elements, offsets, out, place, rows, kinds, flags)
        place.narrow(0, 0, 1).add_(rows)

    full = _Repeated(lambda: tile(front.rows), z.is_cuda)
    for sample in range(0, B, samples):
        n = min(samples, B - sample)
        front.pre(z[sample : sample + n], pre)
        for first in range(0, n, front.rows):
            rows = min(front.rows, n - first)
            h = front.run(pre.narrow(0, first, rows), latents[:1, :0], shifts, zero, rows)
            for memory, linked in ((base, flags["LINKED"]), (raw, False)):
                if memory is not None:
                    tail.outputs(h, memory.narrow(0, first, rows), linked)
        place.copy_(torch.tensor([sample * J, sample]))
        full(n * J // front.rows)
        if n * J % front.rows:
            tile(n * J % front.rows)
    return out


class _Repeated:
    """A call that is made many times alike. A GPU captures it once and replays it: Python would launch the kernels of a
    tile in more time than they run."""

    def __init__(self, call, gpu: bool):
        self.call, self.graph, self.tries = call, None, gpu

    def __call__(self, times: int) -> None:
        for left in range(times, 0, -1):
            if self.graph is not None:
                self.graph.replay()
                continue
            self.call()
            if self.tries and left > WORTH_CAPTURING:
                self.tries = False
                self.graph = self._captured()

    def _captured(self):
        """The graph of one call, which is compiled and has its memory by now; None where the driver refuses."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.call()
                finally:
                    graph.capture_end()
        except RuntimeError:
            return None
        torch.cuda.current_stream().wait_stream(stream)
        return graph


def _add_up(sums, elements, offsets, out, place, rows, kinds, flags):
    """Sums over runs to the effects of groups."""
    groups = offsets.numel() - 1
    block_t = min(64, _power(-(-elements.runs // groups)))
    block = max(1, (1 << 15 if BIG_BLOCKS and not sums.is_cuda else 1024) // block_t)
    _runs_kernel[(triton.cdiv(rows * groups, block),)](
        *(sums, offsets, elements.run_offsets, out, place, rows, elements.runs, len(kinds), groups),
        *(*kinds, *[-1] * (6 - len(kinds))),
        **{name: flags[name] for name in SUMS},
        BLOCK=block,
        BLOCK_T=block_t,
    )


def _softmax(logits, spans, longest, out):
    """Writes softmax over each span, none longer than `longest`, of logits (rows, P)."""
    rows, P = logits.shape
    block_s = min(1024, _power(longest))
    block_r = max(1, (1 << 15 if BIG_BLOCKS and not logits.is_cuda else 2048) // block_s)
    _softmax_kernel[(triton.cdiv(rows, block_r), len(spans) - 1)](
        *(logits, spans, out, rows, P), BLOCK_R=block_r, BLOCK_S=block_s
    )


def _formed(
    z,
    latents,
    shifts,
    weights,
    biases,
    layout,
    slopes,
    shape,
    labels,
    order,
    offsets,
    kinds,
    link,
    spans,
    arithmetic,
    out,
):
    """The effects where outputs are formed, a tile at a time.

    A single layer is a rank-K update, which has no product to hide the outputs behind. Softmax needs the whole span
    before the first output, and spans are of any length: those of tables are short, so a tile stays in cache.
    """
    B, J = shifts.shape[:2]
    P = labels.numel()
    softmax, raw_kind = link == 2, 3
    kinds_of = {True: [k for k in kinds if k == raw_kind], False: [k for k in kinds if k != raw_kind]}
    front = _Front(weights, biases, layout, slopes, shape, arithmetic, 4 * P * (1 + softmax))
    tail = None
    if front.count and front.layers[-1][0] == TRANSPOSED:
        tail = _TransposedTail(front, biases[-1], shape, torch.arange(P, device=z.device))
    elif front.count:
        tail = _DenseTail(front, weights[-1], biases[-1])
    samples = min(B, max(1, BASE_BYTES // (4 * (2 * P + len(front.first)))), max(1, front.rows // J))
    front.prepare(samples * min(J, front.rows))
    longest = int(spans.diff().max()) if softmax else 0
    spans = spans.to(z.device)
    memory = [torch.empty(front.rows, P, device=z.device) for _ in range((tail is not None) + softmax)]

    def outputs(pre, latents, place, rows):
        """Logits and outputs (rows, P), in memory that the next call overwrites."""
        h = front.run(pre, latents, shifts, torch.tensor(place, device=z.device), rows)
        logits = h
        if tail is not None:
            logits = memory[0][:rows]
            tail.outputs(h, logits, False)
        if not softmax:
            return logits, logits
        y = memory[-1][:rows]
        _softmax(logits, spans, longest, y)
        return logits, y

    for sample in range(0, B, samples):
        n = min(samples, B - sample)
        pre = torch.empty(n, len(front.first), device=z.device)
        front.pre(z[sample : sample + n], pre)
        x0, y0 = (t.clone() for t in outputs(pre, latents[:1, :0], (0, 0), n))
        for first in range(0, J, front.rows):
            count = min(front.rows, J - first)  # of all interventions where there is more than one sample
            place = (sample * J + first, sample)
            x, y = (t.view(n, count, P) for t in outputs(pre, latents, place, n * count))
            if not softmax:
                found = effect_reduction.forward(x0, x, labels, order, offsets, kinds, link, False)
                out[sample : sample + n, first : first + count] = found
                continue
            for of_raw, before, after in ((True, x0, x), (False, y0, y)):
                if kinds_of[of_raw]:
                    found = effect_reduction.forward(before, after, labels, order, offsets, kinds_of[of_raw], 0, False)
                    for e, kind in enumerate(kinds_of[of_raw]):
                        out[sample : sample + n, first : first + count, kinds.index(kind)] = found[:, :, e]


def _on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _decoder(*layers):
    """Weights, biases and layout: a number of outputs is a dense layer, (channels, kernel, stride, padding) another."""
    weights, biases, layout, before = [], [], [], 10
    for layer in layers:
        if isinstance(layer, int):
            weights.append(_on_gpu(layer, before))
            layout += [0, 1, 0, 0, 0, 0, 0, 0]
            before = layer
        else:
            channels, kernel, stride, padding = layer
            before = _CHANNELS if layout[-LAYER] == 0 else before
            weights.append(_on_gpu(before, channels, kernel, kernel))
            layout += [1, 1, stride, stride, padding, padding, 0, 0]
            before = channels
        biases.append(_on_gpu(before))
    layout[1 - LAYER] = 0
    return weights, biases, layout, [0.0] * len(weights)


def _launches(layers, sides, P, kinds, link, precision, width, what):
    """The launches of a part of a call. Which elements are of which group is not known where nothing runs."""
    B, J = 64, 100
    weights, biases, layout, slopes = _decoder(*layers)
    shape = [_CHANNELS, 4, 4, *sides] if sides else [0] * 5
    arithmetic, flags = _Arithmetic(precision, True), _flags(kinds, link)
    elements = _Elements.__new__(_Elements)
    elements.width, elements.count, elements.runs = width, P, P // width
    elements.order, elements.keep = _on_gpu(P, dtype=torch.int64), None if width > 8 else _on_gpu(P, dtype=torch.uint8)
    elements.run_offsets = _on_gpu(65, dtype=torch.int32)
    front = _Front(weights, biases, layout, slopes, shape, arithmetic, 4 * elements.runs)
    front.prepare(B * J)
    place, base = _on_gpu(2, dtype=torch.int64), _on_gpu(B, P)
    sums = _on_gpu(4 * front.rows * elements.runs)
    h = [front._place(n, front.rows) for n in range(front.count)]
    if what == "first":
        front.count = 1
        pre = _on_gpu(B, len(front.first))
        front.pre(_on_gpu(B, 10), pre)
        front.run(pre, _on_gpu(J, 2, dtype=torch.int64), _on_gpu(B, J, 2), place, front.rows)
    elif what == "between":
        for n in range(1, front.count):
            front.layer(n, h[n - 1], h[n])
    elif what == "runs":
        offsets, out = _on_gpu(65, dtype=torch.int32), _on_gpu(B, J, len(kinds), 64)
        _add_up(sums, elements, offsets, out, place, front.rows, kinds, flags)
    else:
        tail = _TransposedTail(front, biases[-1], shape, elements.order) if sides else None
        tail = tail or _DenseTail(front, weights[-1], biases[-1], elements.order)
        tail.outputs(h[-1], base, flags["LINKED"])
        tail.effects(h[-1], elements, base, base, sums, place, J, flags)


def _dense(*rest):
    return _launches((256, 256, 4096), (), 4096, *rest)


def _convolutions(*rest):
    return _launches((1024, (64, 4, 2, 1), (32, 4, 2, 1), (32, 4, 2, 1), (1, 4, 2, 1)), (64, 64), 4096, *rest)


def _one_convolution(*rest):
    return _launches((1024, (3, 4, 2, 1)), (8, 8), 192, *rest)


_CHANNELS = 64
_ALL = [0, 1, 2, 3, 4, 5]
_FMA = ("80:FFMA", "90:FFMA", "100:FFMA2")
_TENSOR_CORES = ("80:HMMA", "90:HGMMA", "100:UTCHMMA")
# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "first layer, tf32": (lambda: _dense([0], 1, 1, 64, "first"), _FMA),
    "first layer, bf16": (lambda: _dense([0], 1, 2, 64, "first"), _FMA),
    "dense, float32": (lambda: _dense([0], 1, 0, 64, "between"), (*_FMA, "LDGSTS")),
    "dense, tf32": (lambda: _dense([0], 1, 1, 64, "between"), _TENSOR_CORES),
    "dense, bf16": (lambda: _dense([0], 1, 2, 64, "between"), _TENSOR_CORES),
    "dense tail, float32": (lambda: _dense([0], 1, 0, 64, "tail"), (*_FMA, "LDGSTS")),
    "dense tail, all effects, float32": (lambda: _dense(_ALL, 1, 0, 8, "tail"), (*_FMA, "LDGSTS")),
    "dense tail, tf32": (lambda: _dense([0], 1, 1, 64, "tail"), _TENSOR_CORES),
    "dense tail, wide runs, identity, tf32": (lambda: _dense([2], 0, 1, 128, "tail"), _TENSOR_CORES),
    "dense tail, all effects, bf16": (lambda: _dense(_ALL, 1, 2, 8, "tail"), _TENSOR_CORES),
    "convolutions, float32": (lambda: _convolutions([0], 1, 0, 64, "between"), (*_FMA, "LDGSTS")),
    "convolutions, tf32": (lambda: _convolutions([0], 1, 1, 64, "between"), _TENSOR_CORES),
    "convolutions, bf16": (lambda: _convolutions([0], 1, 2, 64, "between"), _TENSOR_CORES),
    "last two convolutions, float32": (lambda: _convolutions([0], 1, 0, 64, "tail"), (*_FMA, "BAR.SYNC")),
    "last two convolutions, tf32": (lambda: _convolutions([0], 1, 1, 64, "tail"), (*_TENSOR_CORES, "BAR.SYNC")),
    "last two convolutions, all effects, bf16": (lambda: _convolutions(_ALL, 1, 2, 8, "tail"), _TENSOR_CORES),
    "one convolution, float32": (lambda: _one_convolution([3], 1, 0, 1, "tail"), (*_FMA, "BAR.SYNC")),
    "one convolution, bf16": (lambda: _one_convolution([1, 3, 5], 1, 2, 64, "tail"), _TENSOR_CORES),
    "runs": (lambda: _dense(_ALL, 1, 0, 8, "runs"), ("LDG.E",)),
    "softmax": (
        lambda: _softmax(_on_gpu(4096, 300), _on_gpu(9, dtype=torch.int32), 100, _on_gpu(4096, 300)),
        ("MUFU.EX2",),
    ),
}
