"""Triton kernels of `topk_encode`; the mathematics is vaecirc_fast/reference/topk_encode.py.

Few latents: one kernel, in which a program holds all activations of its rows in registers and selects among them. Many:
activations of a part of the rows go through memory, with the maxima of groups of them, which bound what the selection
must read. Activations are float32; their keys and the selection are those of topk.py.
"""

import math

import torch
import triton
import triton.language as tl

from .topk import (
    INFINITE,
    MASK,
    PROGRAMS,
    ROW,
    first_k,
    kth_largest,
    load_k,
    load_key,
    pad,
    round_to,
    rows_per_program,
    select_row,
)

LATENTS, WIDTH = 512, 256  # up to which a program has its activations in registers alone
ENTRIES = 1 << 24  # activations in memory at once, of more latents
TILE = 1024  # in which long rows are read; fewer registers are live than with topk's
GROUP = 64  # latents whose largest activation is noted
FLOAT32 = {"MASK": MASK[torch.float32], "INFINITE": INFINITE[torch.float32]}


@triton.jit
def _key(x, MASK: tl.constexpr, INFINITE: tl.constexpr, RELU: tl.constexpr):
    """The key of float32 numbers, after the activation."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & MASK
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude > INFINITE, MASK, key)
    return tl.maximum(key, 0) if RELU else key


@triton.jit
def _number(key):
    """The float32 number of a key."""
    return tl.where(key < 0, (-key) | -0x80000000, key).to(tl.float32, bitcast=True)


@triton.jit
def linear_tile(
    x,
    w,
    b,
    row,
    m,
    B,
    M,
    D,
    w_m,
    w_d,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x @ w.T + b of a block of rows (R,) and latents m (N,)."""
    total = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at_x = x + row.to(tl.int64)[:, None] * D + d[None, :]
        at_w = w + m.to(tl.int64)[None, :] * w_m + d.to(tl.int64)[:, None] * w_d
        xs = tl.load(at_x, mask=(row < B)[:, None] & (d < D)[None, :], other=0.0)
        ws = tl.load(at_w, mask=(m < M)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:  # the interpreter's 16-bit products are not the hardware's
            xs, ws = xs.to(tl.float32), ws.to(tl.float32)
        total = tl.dot(xs, ws, total, input_precision=PRECISION)
    if b is not None:
        total += tl.load(b + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _select_tile(keys, row, m, k, k_max, values, indices, B, MASK: tl.constexpr):
    """Writes the k largest of each row of keys; returns which they are."""
    chosen, place = first_k(keys, kth_largest(keys, k, MASK), k)
    chosen = chosen & (row < B)[:, None]
    row = row.to(tl.int64)[:, None]
    tl.store((values + row * k_max) + place, round_to(_number(keys), values), mask=chosen)
    tl.store((indices + row * k_max) + place, m[None, :] + tl.zeros(keys.shape, tl.int32), mask=chosen)
    pad(values, indices, row, row < B, k, k_max)
    return chosen


@triton.jit
def _count(fired, keys, chosen, m, MASK: tl.constexpr):
    n = tl.sum((chosen & (keys > 0) & (keys < MASK)).to(tl.int32), 0)
    tl.atomic_add(fired + m, n, mask=n > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k_max", "k_aux"])
def _rows_kernel(
    x,  # (B, D)
    w,  # (M, D), of any strides
    b,  # (M), or None
    k_pointer,  # one integer, or None: k_max
    dead,  # (M), or None
    values,  # (B, k_max)
    indices,
    fired,  # (M) counts, or None
    aux_values,  # (B, k_aux)
    aux_indices,
    B,
    M,
    D,
    w_m,
    w_d,
    k_max,
    k_aux,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    total = linear_tile(x, w, b, row, m, B, M, D, w_m, w_d, UPCAST, PRECISION, BLOCK_B, BLOCK_M, BLOCK_D)
    keys = tl.where((m < M)[None, :], _key(total, MASK, INFINITE, RELU), -MASK - 1)
    chosen = _select_tile(keys, row, m, load_k(k_pointer, k_max, M), k_max, values, indices, B, MASK)
    if fired is not None:
        _count(fired, keys, chosen, m, MASK)
    if dead is not None:
        candidate = tl.load(dead + m, mask=m < M, other=0) != 0
        k = tl.minimum(k_aux, tl.sum(candidate.to(tl.int32)))
        keys = tl.where(candidate[None, :], keys, -MASK - 1)
        _select_tile(keys, row, m, k, k_aux, aux_values, aux_indices, B, MASK)


@triton.jit
def _activations_kernel(
    x,  # (B, D)
    w,
    b,
    out,  # (B, M) float32, before the activation
    maxima,  # (B, groups) keys
    B,
    M,
    D,
    w_m,
    w_d,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs of the same latents are neighbours, so w is read once; all rows of x stay in cache.
    blocks = tl.cdiv(B, BLOCK_B)
    row = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    block_m = tl.program_id(0) // blocks
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    total = linear_tile(x, w, b, row, m, B, M, D, w_m, w_d, UPCAST, "ieee", BLOCK_B, BLOCK_M, BLOCK_D)
    at = row.to(tl.int64)[:, None]
    tl.store(out + at * M + m[None, :], total, mask=(row < B)[:, None] & (m < M)[None, :])
    keys = tl.where((m < M)[None, :], _key(total, MASK, INFINITE, RELU), -MASK - 1)
    largest = tl.max(tl.reshape(keys, [BLOCK_B, BLOCK_M // GROUP, GROUP]), 2)
    groups = tl.cdiv(M, GROUP)
    group = block_m * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
    tl.store(maxima + at * groups + group[None, :], largest, mask=(row < B)[:, None] & (group < groups)[None, :])


@triton.jit(do_not_specialize=["k_max"])
def _select_rows_kernel(
    a,  # (B, M) bits
    k_pointer,
    among,  # (M) not 0 for those which may be chosen, or None: all
    values,  # (B, k_max)
    indices,
    fired,  # (M), or None
    B,
    units,  # M = units UNIT: so the compiler knows that rows are aligned
    k_max,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    M = units * UNIT
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    inside = (row < B)[:, None] & (m < M)[None, :]
    if among is not None:
        inside = inside & (tl.load(among + m, mask=m < M, other=0) != 0)[None, :]
    keys = load_key(a + row.to(tl.int64)[:, None] * M + m[None, :], inside, MASK, INFINITE, RELU)
    chosen = _select_tile(keys, row, m, load_k(k_pointer, k_max, M), k_max, values, indices, B, MASK)
    if fired is not None:
        _count(fired, keys, chosen, m, MASK)


@triton.jit(do_not_specialize=["k_max"])
def _select_kernel(
    a,  # (B, M) bits
    maxima,  # (B, groups), or None
    k_pointer,
    among,  # (M), or None
    values,  # (B, k_max)
    indices,
    fired,  # (M), or None
    groups,  # (programs, groups) memory, or None
    survivors,  # (programs, TILE) memory
    B,
    M,
    k_max,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    survivors += program * TILE
    n_groups = tl.cdiv(M, GROUP)
    if groups is not None:
        groups += program * n_groups
    k = load_k(k_pointer, k_max, M)
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        at, v, i = a + row * M, values + row * k_max, indices + row * k_max
        if maxima is None:
            select_row(at, M, k, v, i, fired, among, None, None, survivors, MASK, INFINITE, RELU, GROUP, TILE)
        else:
            largest = maxima + row * n_groups
            select_row(at, M, k, v, i, fired, among, largest, groups, survivors, MASK, INFINITE, RELU, GROUP, TILE)
        zero = tl.zeros([1, 1], tl.int32)
        pad(v, i, zero, zero == 0, k, k_max)


@triton.jit(do_not_specialize=["shift", "seen"])
def _histogram_kernel(
    a,  # (N) bits
    state,  # (2 + 256): the bits found of the threshold, how many are wanted below it, counts of the next digit
    N,
    segment,  # of a program
    shift,
    seen,  # the bits that are found
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * segment
    t = tl.load(state)
    n = tl.zeros([256], tl.int32)
    for start in range(0, segment, TILE):
        place = first + start + tl.arange(0, TILE)
        ordered = load_key(a + place, place < N, MASK, INFINITE, RELU) ^ -0x80000000
        n += tl.histogram((ordered >> shift) & 255, 256, mask=(place < N) & (((ordered ^ t) & seen) == 0))
    tl.atomic_add(state + 2 + tl.arange(0, 256), n, mask=n > 0, sem="relaxed")


@triton.jit(do_not_specialize=["wanted", "shift"])
def _digit_kernel(state, wanted, shift):
    """Finds the next digit of the threshold: the largest from which on as many are left as wanted."""
    digits = tl.arange(0, 256)
    n = tl.load(state + 2 + digits)
    need = tl.load(state + 1)
    need = tl.where(shift == 24, wanted, need)
    left = tl.sum(n) - tl.cumsum(n) + n
    digit = tl.sum((left >= need).to(tl.int32)) - 1
    tl.store(state, tl.load(state) | (digit << shift))
    tl.store(state + 1, need - tl.sum(tl.where(digits > digit, n, 0)))
    tl.store(state + 2 + digits, tl.zeros([256], tl.int32))


@triton.jit
def _count_kernel(
    a,  # (N) bits
    state,
    counts,  # (programs, 2): above the threshold, equal to it
    N,
    segment,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * segment
    t = tl.load(state) ^ -0x80000000
    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for start in range(0, segment, TILE):
        place = first + start + tl.arange(0, TILE)
        key = load_key(a + place, place < N, MASK, INFINITE, RELU)
        above += (key > t).to(tl.int32)
        equal += ((key == t) & (place < N)).to(tl.int32)
    tl.store(counts + 2 * tl.program_id(0), tl.sum(above))
    tl.store(counts + 2 * tl.program_id(0) + 1, tl.sum(equal))


@triton.jit
def _compress_kernel(
    a,  # (N) bits
    index,  # (N), or None: base + place
    base,
    state,
    before,  # (programs, 2): how many are above and equal in the segments before
    numbers,
    indices,
    N,
    segment,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * segment
    t = tl.load(state) ^ -0x80000000
    need = tl.load(state + 1)
    n_above = tl.load(before + 2 * tl.program_id(0))
    n_equal = tl.load(before + 2 * tl.program_id(0) + 1)
    for start in range(0, segment, TILE):
        place = first + start + tl.arange(0, TILE)
        key = load_key(a + place, place < N, MASK, INFINITE, RELU)
        above = (key > t).to(tl.int32)
        equal = ((key == t) & (place < N)).to(tl.int32)
        both = tl.cumsum(above + (equal << 16))
        rank = n_equal + (both >> 16)
        chosen = (above | (equal & (rank <= need).to(tl.int32))) != 0
        out = n_above + (both & 0xFFFF) + tl.minimum(rank, need) - 1
        tl.store(numbers + out, _number(key), mask=chosen)
        if index is None:
            tl.store(indices + out, base + place, mask=chosen)
        else:
            tl.store(indices + out, tl.load(index + place, mask=chosen, other=0), mask=chosen)
        n_above += tl.sum(above)
        n_equal += tl.sum(equal)


def _precision() -> str:
    """Of float32 products, as torch is set."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def aligned(x, w):
    """Whether the compiler can know that rows of x and w start at whole 16 bytes, so that loads are that wide."""
    (w_m, w_d), D = w.stride(), x.shape[1]
    return D % 16 == 0 and (w_d == 1 and w_m % 16 == 0 or w_m == 1 and w_d % 16 == 0)


def product_blocks(x, w):
    """Blocks of a product of 16 bits with 128 latents; with an address for each element, smaller ones."""
    if not aligned(x, w):
        return {"BLOCK_B": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
    rows = 128 if len(x) > 64 else 64
    return {"BLOCK_B": rows, "BLOCK_D": 64, "num_warps": rows // 16, "num_stages": 3}


def _small(x, w_enc, b_enc, k, k_max, relu, fired, dead, k_aux, values, indices, aux_values, aux_indices):
    B, D = x.shape
    M = len(w_enc)
    rows = 16 if x.is_cuda else 64  # 16 fill the registers of 8 warps; the interpreter wants few, big programs
    block_m = max(16, triton.next_power_of_2(M))
    block_d = min(triton.next_power_of_2(D), max(16, 32768 // (block_m * x.element_size())))
    _rows_kernel[(triton.cdiv(B, rows),)](
        *(x, w_enc, b_enc, k, dead, values, indices, fired, aux_values, aux_indices),
        *(B, M, D, *w_enc.stride(), k_max, k_aux),
        **FLOAT32,
        RELU=relu,
        UPCAST=not x.is_cuda,
        PRECISION=_precision() if x.dtype == torch.float32 else "ieee",
        BLOCK_B=rows,
        BLOCK_M=block_m,
        BLOCK_D=max(16, block_d),
        num_warps=8,
        num_stages=2,
    )


def _activations(x, w_enc, b_enc, relu, out):
    """Writes x @ w_enc.T + b_enc to out, and returns the keys of the maxima of groups, where the kernel is ours."""
    if x.dtype == torch.float32:
        # The library's products of float32 are faster than Triton's.
        torch.mm(x, w_enc.T, out=out)
        if b_enc is not None:
            out += b_enc
        return None
    B, D = x.shape
    M = len(w_enc)
    maxima = torch.empty(B, triton.cdiv(M, GROUP), dtype=torch.int32, device=x.device)
    blocks = product_blocks(x, w_enc)
    _activations_kernel[(triton.cdiv(B, blocks["BLOCK_B"]) * triton.cdiv(M, 128),)](
        *(x, w_enc, b_enc, out, maxima, B, M, D, *w_enc.stride()),
        **FLOAT32,
        RELU=relu,
        GROUP=GROUP,
        UPCAST=not x.is_cuda,
        BLOCK_M=128,
        **blocks,
    )
    return maxima


def _select(a, maxima, k, among, relu, values, indices, fired):
    """The selection of a part of the rows of activations a (B, M)."""
    B, M = a.shape
    a = a.view(torch.int32)
    if M <= ROW:
        block, unit = max(16, triton.next_power_of_2(M)), math.gcd(M, 8)
        rows = rows_per_program(a, block, 512)
        _select_rows_kernel[(triton.cdiv(B, rows),)](
            *(a, k, among, values, indices, fired, B, M // unit, values.shape[1]),
            **FLOAT32,
            RELU=relu,
            UNIT=unit,
            BLOCK_B=rows,
            BLOCK_M=block,
            num_warps=1 if block <= 1024 else 4,
        )
        return
    programs = min(B, PROGRAMS)
    groups = None
    if maxima is not None:
        groups = torch.empty(programs, maxima.shape[1], dtype=torch.int32, device=a.device)
    survivors = torch.empty(programs, TILE, dtype=torch.int32, device=a.device)
    _select_kernel[(programs,)](
        *(a, maxima, k, among, values, indices, fired, groups, survivors, B, M, values.shape[1]),
        **FLOAT32,
        RELU=relu,
        GROUP=GROUP,
        TILE=TILE,
        num_warps=4,
        maxnreg=168,  # or the compiler spills, to have a fourth program in a multiprocessor
    )


def _rows_at_once(M):
    rows = max(1, ENTRIES // M)
    return rows if rows < 128 else rows // 128 * 128


def forward(x, w_enc, b_enc, k, k_max, activation, count, dead, k_aux):
    """x (B, D), w_enc (M, D) of any strides; see the reference."""
    x, b_enc = x.contiguous(), None if b_enc is None else b_enc.contiguous()
    B, D = x.shape
    M = len(w_enc)
    relu = activation == 0
    k_aux = 0 if dead is None else k_aux
    values = torch.empty(B, k_max, dtype=x.dtype, device=x.device)
    indices = torch.empty(B, k_max, dtype=torch.int32, device=x.device)
    aux_values = torch.empty(B, k_aux, dtype=x.dtype, device=x.device)
    aux_indices = torch.empty(B, k_aux, dtype=torch.int32, device=x.device)
    fired = torch.zeros(M if count else 0, dtype=torch.int32, device=x.device)
    counts = fired if count else None
    among = None if dead is None else dead.contiguous().view(torch.uint8)
    if M <= LATENTS and D <= WIDTH:
        if B:
            results = (values, indices, aux_values, aux_indices)
            _small(x, w_enc, b_enc, k, k_max, relu, counts, among, k_aux, *results)
        return values, indices, fired, aux_values, aux_indices
    size = _rows_at_once(M)
    memory = torch.empty(min(B, size), M, device=x.device)
    n_dead = None if dead is None else dead.sum()
    for start in range(0, B, size):
        rows = min(size, B - start)
        a, *part = (memory.narrow(0, 0, rows), *(t.narrow(0, start, rows) for t in (x, values, indices)))
        maxima = _activations(part[0], w_enc, b_enc, relu, a)
        _select(a, maxima, k, None, relu, part[1], part[2], counts)
        if dead is not None:
            aux = (t.narrow(0, start, rows) for t in (aux_values, aux_indices))
            _select(a, None, n_dead, among, relu, *aux, None)
    return values, indices, fired, aux_values, aux_indices


def _select_flat(sources, n, relu):
    """The n largest numbers of all sources, in their order, and their indices: both (n,).

    A source is numbers (N,) with indices (N,), or with the index of the first and the others following.
    """
    device = sources[0][0].device
    sizes = [len(numbers) for numbers, _ in sources]
    segments = [TILE * triton.cdiv(size, TILE * PROGRAMS) for size in sizes]
    programs = [triton.cdiv(size, segment) for size, segment in zip(sizes, segments, strict=True)]
    bits = [numbers.view(torch.int32) for numbers, _ in sources]
    launches = list(zip(bits, sizes, segments, programs, strict=True))
    constants = {**FLOAT32, "RELU": relu, "TILE": TILE}
    state = torch.zeros(2 + 256, dtype=torch.int32, device=device)
    if n < sum(sizes):  # else the threshold is below all
        for shift in (24, 16, 8, 0):
            seen = 0 if shift == 24 else -(1 << shift + 8)
            for a, size, segment, grid in launches:
                _histogram_kernel[(grid,)](a, state, size, segment, shift, seen, **constants)
            _digit_kernel[(1,)](state, n, shift)
    counts = torch.empty(sum(programs), 2, dtype=torch.int32, device=device)
    start = 0
    for a, size, segment, grid in launches:
        _count_kernel[(grid,)](a, state, counts.narrow(0, start, grid), size, segment, **constants)
        start += grid
    before = counts.cumsum(0, dtype=torch.int32) - counts
    out = torch.empty(n, device=device)
    out_indices = torch.empty(n, dtype=torch.int64, device=device)
    start = 0
    for (a, size, segment, grid), (_, index) in zip(launches, sources, strict=True):
        index, base = (index, 0) if isinstance(index, torch.Tensor) else (None, index)
        part = before.narrow(0, start, grid)
        _compress_kernel[(grid,)](a, index, base, state, part, out, out_indices, size, segment, **constants)
        start += grid
    return out, out_indices


def batch(x, w_enc, b_enc, k, activation):
    """The k B largest of all rows -> values, indices (k B,), offsets (B + 1,); a part of the rows at a time."""
    x, b_enc = x.contiguous(), None if b_enc is None else b_enc.contiguous()
    B = len(x)
    M = len(w_enc)
    n = k * B
    numbers = torch.empty(0, device=x.device)
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    size = _rows_at_once(M)
    memory = torch.empty(min(B, size), M, device=x.device)
    for start in range(0, B if n else 0, size):
        rows = min(size, B - start)
        a = memory.narrow(0, 0, rows)
        _activations(x.narrow(0, start, rows), w_enc, b_enc, activation == 0, a)
        sources = [(a.flatten(), start * M)]
        if start:  # the largest so far, which come first
            sources.insert(0, (numbers, places))
        numbers, places = _select_flat(sources, min(n, (start + rows) * M), activation == 0)
    rows = torch.arange(B + 1, device=x.device)
    offsets = torch.searchsorted(places // M, rows, out_int32=True)
    return numbers.to(x.dtype), (places % M).to(torch.int32), offsets


def _on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _of(B, D, M, dtype, transposed=False):
    w = _on_gpu(D, M, dtype=dtype).T if transposed else _on_gpu(M, D, dtype=dtype)
    return _on_gpu(B, D, dtype=dtype), w, _on_gpu(M, dtype=dtype)


def _encode(B, D, M, k, dtype, *, transposed=False, k_tensor=None, bias=True, k_aux=0, relu=True):
    x, w, b = _of(B, D, M, dtype, transposed)
    dead = _on_gpu(M, dtype=torch.bool) if k_aux else None
    return forward(x, w, b if bias else None, k_tensor, k, 0 if relu else 1, k_aux > 0, dead, k_aux)


def _k():
    return torch.empty((), dtype=torch.int64, device="cuda")


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
_BF16 = torch.bfloat16
_TENSOR_CORES = ("80:HMMA", "90:HGMMA", "100:UTCHMMA")
GATE = {
    "500 latents, bfloat16": (lambda: _encode(8192, 64, 500, 50, _BF16), ("HMMA", "BAR.SYNC")),
    "500 latents, all asked for, k on the device, bfloat16": (
        lambda: _encode(8192, 64, 500, 50, _BF16, transposed=True, k_tensor=_k(), k_aux=32),
        ("HMMA", "80:RED.E", "90:REDG.E"),
    ),
    "500 latents, odd width, bfloat16": (lambda: _encode(8192, 61, 500, 50, _BF16), ("HMMA",)),
    "500 latents, odd width, transposed, float32": (
        lambda: _encode(8192, 61, 501, 50, torch.float32, transposed=True, k_aux=3),
        ("FFMA",),
    ),
    "500 latents, float32": (lambda: _encode(8192, 64, 500, 50, torch.float32), ("FFMA",)),
    "1000 latents, identity, all asked for, float32": (
        lambda: _encode(512, 64, 1000, 50, torch.float32, relu=False, k_aux=20),
        ("SHFL",),
    ),
    "4096 latents, float32": (lambda: _encode(512, 64, 4096, 50, torch.float32), ("LDG.E.128", "SHFL")),
    "24576 latents, bfloat16": (
        lambda: _activations(*_of(512, 768, 24576, _BF16), True, _on_gpu(512, 24576)),
        _TENSOR_CORES,
    ),
    "odd sizes, bfloat16": (
        lambda: _activations(*_of(512, 765, 24577, _BF16), True, _on_gpu(512, 24577)),
        _TENSOR_CORES,
    ),
    "24576 latents, transposed, few rows, float16": (
        lambda: _activations(*_of(40, 768, 24576, torch.float16, True), False, _on_gpu(40, 24576)),
        _TENSOR_CORES,
    ),
    "24576 latents, all asked for, k on the device, bfloat16": (
        lambda: _encode(512, 768, 24576, 32, _BF16, k_tensor=_k(), k_aux=512),
        ("BAR.SYNC",),
    ),
    "131072 latents, float32": (lambda: _encode(128, 4096, 131072, 64, torch.float32), ("LDG.E.128",)),
    "all rows": (lambda: _select_flat([(_on_gpu(1 << 24), 0)], 1 << 18, True), ()),
    "all rows, second part": (
        lambda: _select_flat(
            [(_on_gpu(1 << 18), _on_gpu(1 << 18, dtype=torch.int64)), (_on_gpu(1000000), 1 << 24)], 1 << 18, False
        ),
        (),
    ),
}
