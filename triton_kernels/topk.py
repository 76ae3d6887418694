"""Triton kernels of `topk`: row-wise selection, exact to the bit; the mathematics is vaecirc_fast/reference/topk.py.

Kernels see the bits of the floats as integers, so every dtype is one kernel and nothing is rounded. A float's key is an
integer of the same order: its magnitude with its sign, so that -0.0 is 0; NaN is the largest. The k-th largest key is
found bit by bit, by counting; then one scan over the row gives each chosen entry its place, ties to the lowest index.
"""

import math

import torch
import triton
import triton.language as tl

ROW = 4096  # rows up to this length are held in registers
TILE = 2048  # longer ones are streamed in tiles of this length; it is also how many survivors a row may have
PROGRAMS = 1024  # of the streaming kernel: enough for any GPU, few enough that their lists of survivors stay in cache
INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of infinity
MASK = {torch.float32: 0x7FFFFFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF}  # of the magnitude: the key of NaN
BITS = {4: torch.int32, 2: torch.int16}
INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.runtime.JITFunction))


@triton.jit
def round_to(x, pointer):
    """x in the type that `pointer` points to. The interpreter cuts float32 to bfloat16 where a GPU rounds it."""
    if INTERPRETED:
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
    return x.to(pointer.dtype.element_ty)


@triton.jit
def load_key(pointer, inside, MASK: tl.constexpr, INFINITE: tl.constexpr, RELU: tl.constexpr = False):
    """The keys of floats of which `pointer` gives the bits; what is outside is below all numbers."""
    bits = tl.load(pointer, mask=inside, other=0).to(tl.int32)
    magnitude = bits & MASK
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude > INFINITE, MASK, key)
    if RELU:
        key = tl.maximum(key, 0)
    return tl.where(inside, key, -MASK - 1)


@triton.jit
def load_k(k_pointer, k_max, limit):
    """How many are wanted: from memory where k is a tensor, so that no k compiles anew and nobody waits for it."""
    k = tl.minimum(k_max, limit)
    if k_pointer is not None:
        k = tl.minimum(tl.maximum(tl.load(k_pointer), 0), k).to(tl.int32)
    return k


@triton.jit
def kth_largest(keys, k, MASK: tl.constexpr):
    """The k-th largest key of each row of keys (R, N), k one number or one a row; MASK for k = 0."""
    t = tl.where(tl.sum((keys >= 0).to(tl.int32), 1) >= k, 0, -MASK - 1)
    bit = tl.full([], MASK // 2 + 1, tl.int32)
    for _ in range(15 if MASK == 0x7FFF else 31):
        candidate = t + bit
        t = tl.where(tl.sum((keys >= candidate[:, None]).to(tl.int32), 1) >= k, candidate, t)
        bit = bit >> 1
    return t


@triton.jit
def first_k(keys, t, k):
    """Which of keys (R, N), N < 2^15, the k largest are where t is the k-th largest, and the place of each of them."""
    above = (keys > t[:, None]).to(tl.int32)
    equal = (keys == t[:, None]).to(tl.int32)
    need = (k - tl.sum(above, 1))[:, None]
    seen = tl.cumsum(above + (equal << 16), 1)  # two counts in one scan
    seen_equal = seen >> 16
    chosen = (above | (equal & (seen_equal <= need).to(tl.int32))) != 0
    return chosen, (seen & 0xFFFF) + tl.minimum(seen_equal, need) - 1


@triton.jit
def pad(values, indices, row, inside, k, k_max):
    """Zeros from place k to the end of rows (R, 1) of the results."""
    for start in range(k, k_max, 64):
        place = start + tl.arange(0, 64)[None, :]
        there = inside & (place < k_max)
        tl.store(values + row * k_max + place, tl.zeros(there.shape, values.dtype.element_ty), mask=there)
        tl.store(indices + row * k_max + place, tl.zeros(there.shape, tl.int32), mask=there)


@triton.jit
def _columns(place, end, M, groups, among, GROUP: tl.constexpr):
    """The columns of places in a row, and whether they are to be seen: of all, or of listed groups; of some, or all."""
    column = place
    if groups is not None:
        column = tl.load(groups + place // GROUP, mask=place < end, other=0) * GROUP + place % GROUP
    inside = (place < end) & (column < M)
    if among is not None:
        inside = inside & (tl.load(among + column, mask=inside, other=0) != 0)
    return column, inside


@triton.jit
def _put(
    values, indices, fired, at, column, place, chosen, MASK: tl.constexpr, INFINITE: tl.constexpr, RELU: tl.constexpr
):
    bits = tl.load(at + column, mask=chosen, other=0)
    key = load_key(at + column, chosen, MASK, INFINITE, RELU)
    if RELU:
        bits = tl.where(key == 0, 0, bits)
    if values.dtype.element_ty.is_floating():
        bits = round_to(bits.to(tl.float32, bitcast=True), values)
    tl.store(values + place, bits, mask=chosen)
    tl.store(indices + place, column, mask=chosen)
    if fired is not None:
        tl.atomic_add(fired + column, 1, mask=chosen & (key > 0) & (key < MASK), sem="relaxed")


@triton.jit
def select_row(
    at,  # (M) bits
    M,
    k,
    values,  # (k) bits, or floats to which float32 is rounded
    indices,  # (k)
    fired,  # (M) counts of chosen positive numbers, or None
    among,  # (M) not 0 for those which may be chosen, or None: all
    maxima,  # keys of the maxima of groups of GROUP columns, or None: they are found here
    groups,  # (groups) memory for a list of them, or None
    survivors,  # (TILE) memory for a list of columns
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The k largest of one long row, which is read twice, if many numbers are not equal."""
    lane = tl.arange(0, TILE)[None, :]
    # The k largest of the maxima of some groups are k entries of the row: the k-th bounds that of the row.
    largest = tl.full([1, TILE], -MASK - 1, tl.int32)
    if maxima is None:
        for start in range(0, M, TILE):
            column, inside = _columns(start + lane, M, M, None, among, GROUP)
            largest = tl.maximum(largest, load_key(at + column, inside, MASK, INFINITE, RELU))
        bound = tl.max(kth_largest(largest, k, MASK))
        end = M
    else:
        n_groups = tl.cdiv(M, GROUP)
        for start in range(0, n_groups, TILE):
            key = tl.load(maxima + start + lane, mask=start + lane < n_groups, other=-MASK - 1)
            largest = tl.maximum(largest, key)
        bound = tl.max(kth_largest(largest, k, MASK))
        listed = 0
        for start in range(0, n_groups, TILE):
            key = tl.load(maxima + start + lane, mask=start + lane < n_groups, other=-MASK - 1)
            kept = ((key >= bound) & (start + lane < n_groups)).to(tl.int32)
            tl.store(groups + listed + tl.cumsum(kept, 1) - 1, start + lane, mask=kept != 0)
            listed += tl.sum(kept)
        tl.debug_barrier()
        end = listed * GROUP
    # Where groups are not in league with the values, few entries reach the bound.
    n_survivors = 0
    n_above = 0
    for start in range(0, end, TILE):
        column, inside = _columns(start + lane, end, M, groups, among, GROUP)
        keys = load_key(at + column, inside, MASK, INFINITE, RELU)
        kept = ((keys >= bound) & inside).to(tl.int32)
        size = tl.sum(kept)
        if size > 0:
            place = n_survivors + tl.cumsum(kept, 1) - 1
            tl.store(survivors + place, column, mask=(kept != 0) & (place < TILE))
            n_above += tl.sum((keys > bound).to(tl.int32))
            n_survivors += size
    tl.debug_barrier()
    if n_survivors <= TILE:
        there = lane < n_survivors
        column = tl.load(survivors + lane, mask=there, other=0)
        keys = load_key(at + column, there, MASK, INFINITE, RELU)
        chosen, place = first_k(keys, kth_largest(keys, k, MASK), k)
        _put(values, indices, fired, at, column, place, chosen & there, MASK, INFINITE, RELU)
    else:
        # Ties by the mass, or values in league: the bound itself is the k-th largest, or the k-th is above it.
        t = bound
        if n_above >= k:
            t += 1
            high = tl.max(largest)
            while t < high:
                middle = (t | high) - ((t ^ high) >> 1)  # rounded up, without overflow
                count = tl.zeros([1, TILE], tl.int32)
                for start in range(0, end, TILE):
                    column, inside = _columns(start + lane, end, M, groups, among, GROUP)
                    count += (load_key(at + column, inside, MASK, INFINITE, RELU) >= middle).to(tl.int32)
                enough = tl.sum(count) >= k
                t = tl.where(enough, middle, t)
                high = tl.where(enough, high, middle - 1)
            count = tl.zeros([1, TILE], tl.int32)
            for start in range(0, end, TILE):
                column, inside = _columns(start + lane, end, M, groups, among, GROUP)
                count += (load_key(at + column, inside, MASK, INFINITE, RELU) > t).to(tl.int32)
            n_above = tl.sum(count)
        done = 0
        n_equal = 0
        for start in range(0, end, TILE):
            column, inside = _columns(start + lane, end, M, groups, among, GROUP)
            keys = load_key(at + column, inside, MASK, INFINITE, RELU)
            above = (keys > t).to(tl.int32)
            equal = ((keys == t) & inside).to(tl.int32)
            if tl.sum(above + equal) > 0:
                rank = n_equal + tl.cumsum(equal, 1)
                chosen = above | (equal & (rank <= k - n_above).to(tl.int32))
                place = done + tl.cumsum(chosen, 1) - 1
                _put(values, indices, fired, at, column, place, chosen != 0, MASK, INFINITE, RELU)
                done += tl.sum(chosen)
                n_equal += tl.sum(equal)
    tl.debug_barrier()  # the next row writes into the same lists


@triton.jit(do_not_specialize=["k_max"])
def _row_kernel(
    a,  # (B, M) bits
    k_pointer,  # one integer, or None: k_max
    values,  # (B, k_max) bits
    indices,  # (B, k_max)
    B,
    units,  # M = units UNIT: so the compiler knows that rows are aligned
    k_max,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    M = units * UNIT
    row = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    inside = (row < B) & (column < M)
    k = load_k(k_pointer, k_max, M)
    keys = load_key(a + row * M + column, inside, MASK, INFINITE)
    chosen, place = first_k(keys, kth_largest(keys, k, MASK), k)
    chosen = chosen & inside
    # Read again, out of cache: it would cost as many registers as the keys.
    tl.store(values + row * k_max + place, tl.load(a + row * M + column, mask=chosen, other=0), mask=chosen)
    tl.store(indices + row * k_max + place, column + tl.zeros([BLOCK_B, 1], tl.int32), mask=chosen)
    pad(values, indices, row, row < B, k, k_max)


@triton.jit(do_not_specialize=["k_max"])
def _stream_kernel(
    a,  # (B, M) bits
    k_pointer,
    values,
    indices,
    survivors,  # (programs, TILE): columns
    B,
    units,
    k_max,
    MASK: tl.constexpr,
    INFINITE: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    M = units * UNIT
    survivors += tl.program_id(0).to(tl.int64) * TILE
    k = load_k(k_pointer, k_max, M)
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        v, i = values + row * k_max, indices + row * k_max
        select_row(a + row * M, M, k, v, i, None, None, None, None, survivors, MASK, INFINITE, False, 1, TILE)
        zero = tl.zeros([1, 1], tl.int32)
        pad(v, i, zero, zero == 0, k, k_max)


@triton.jit(do_not_specialize=["k_max"])
def _backward_kernel(
    grad,  # (B, k_max) bits
    indices,  # (B, k_max)
    k_pointer,
    out,  # (B, M) bits
    B,
    units,
    k_max,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    M = units * UNIT
    row = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    lane = tl.arange(0, BLOCK_M)[None, :]
    for start in range(0, M, BLOCK_M):
        zero = tl.zeros([BLOCK_B, BLOCK_M], out.dtype.element_ty)
        tl.store(out + row * M + start + lane, zero, mask=(row < B) & (start + lane < M))
    tl.debug_barrier()
    k = load_k(k_pointer, k_max, M)
    for start in range(0, k, BLOCK_M):
        inside = (row < B) & (start + lane < k)
        column = tl.load(indices + row * k_max + start + lane, mask=inside, other=0)
        inside = inside & (column >= 0) & (column < M)
        g = tl.load(grad + row * k_max + start + lane, mask=inside, other=0)
        tl.store(out + row * M + column, g, mask=inside)


def rows_per_program(tensor: torch.Tensor, block: int, elements: int) -> int:
    """So many that a program has `elements` elements; the interpreter wants few, big programs."""
    return max(1, elements // block) if tensor.is_cuda else max(1, min(64, triton.next_power_of_2(len(tensor))))


def forward(a, k, k_max, sorted):
    """a (B, M) -> values (B, k_max), indices (B, k_max) int32; k None, or a tensor of one integer."""
    a = a.contiguous()
    B, M = a.shape
    bits = a.view(BITS[a.element_size()])
    values = torch.empty(B, k_max, dtype=bits.dtype, device=a.device)
    indices = torch.empty(B, k_max, dtype=torch.int32, device=a.device)
    unit = math.gcd(M, 8)
    constants = {"MASK": MASK[a.dtype], "INFINITE": INFINITE[a.dtype], "UNIT": unit}
    if values.numel() and M <= ROW:
        block = max(16, triton.next_power_of_2(M))
        rows = rows_per_program(a, block, 512)
        # One warp a row needs no barriers.
        _row_kernel[(triton.cdiv(B, rows),)](
            *(bits, k, values, indices, B, M // unit, k_max),
            **constants,
            BLOCK_B=rows,
            BLOCK_M=block,
            num_warps=1 if block <= 1024 else 4,
        )
    elif values.numel():
        programs = min(B, PROGRAMS)
        survivors = torch.empty(programs, TILE, dtype=torch.int32, device=a.device)
        _stream_kernel[(programs,)](
            *(bits, k, values, indices, survivors, B, M // unit, k_max), **constants, TILE=TILE, num_warps=8
        )
    values = values.view(a.dtype)
    return _sort(values, indices, k, M) if sorted else (values, indices)


def _sort(values, indices, k, M):
    """In descending order of value; padding stays at the end, as ties of -inf keep their order."""
    keys = values
    if k is not None:
        place = torch.arange(values.shape[1], device=values.device)
        keys = values.masked_fill(place >= k.clamp(max=M), -torch.inf)
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices
    return values.gather(1, order), indices.gather(1, order)


def backward(grad, indices, k, M):
    """grad (B, K), indices (B, K) of the forward's results -> (B, M), zero where nothing was selected."""
    grad, indices = grad.contiguous(), indices.contiguous()
    B, k_max = grad.shape
    out = torch.empty(B, M, dtype=grad.dtype, device=grad.device)
    if out.numel():
        block = min(2048, max(16, triton.next_power_of_2(M)))
        rows = rows_per_program(grad, block, 2048)
        bits = BITS[grad.element_size()]
        unit = math.gcd(M, 8)
        _backward_kernel[(triton.cdiv(B, rows),)](
            *(grad.view(bits), indices, k, out.view(bits), B, M // unit, k_max),
            UNIT=unit,
            BLOCK_B=rows,
            BLOCK_M=block,
        )
    return out


def _on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _k():
    return torch.empty((), dtype=torch.int64, device="cuda")


def _gradient(B, k, M, dtype, k_tensor=None):
    return backward(_on_gpu(B, k, dtype=dtype), _on_gpu(B, k, dtype=torch.int32), k_tensor, M)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "500 latents, float32": (lambda: forward(_on_gpu(8192, 500), None, 50, False), ("LDG.E.128", "SHFL", "STG.E")),
    "500 latents, k on the device, bfloat16": (
        lambda: forward(_on_gpu(8192, 500, dtype=torch.bfloat16), _k(), 50, False),
        ("LDG.E.U16", "SHFL", "STG.E.U16"),
    ),
    "odd rows, sorted, float16": (lambda: forward(_on_gpu(64, 61, dtype=torch.float16), _k(), 7, True), ("LDG.E.U16",)),
    "4096 latents": (lambda: forward(_on_gpu(8192, 4096), None, 32, False), ("LDG.E.128",)),
    "streamed, float32": (lambda: forward(_on_gpu(8192, 24576), None, 32, False), ("LDG.E.128", "BAR.SYNC")),
    "streamed, k on the device, bfloat16": (
        lambda: forward(_on_gpu(8192, 131072, dtype=torch.bfloat16), _k(), 64, False),
        ("LDG.E.128", "BAR.SYNC"),
    ),
    "gradient, float32": (lambda: _gradient(8192, 50, 500, torch.float32), ("STG.E.128", "BAR.SYNC")),
    "gradient, k on the device, bfloat16": (lambda: _gradient(64, 32, 24577, torch.bfloat16, _k()), ("STG.E.U16",)),
}
