"""Triton kernels of `sparse_decode`; the mathematics is vaecirc_fast/reference/sparse_decode.py.

A program of the forward pass owns a row and reads its latents' vectors, several at a time. The gradient of the vectors
sorts the entries by latent, in a stable order, and a program owns a latent: no atomics, so always the same bits. An
entry of value 0 adds nothing, even where what it multiplies is not finite; nor does an index that is out of range.
"""

import torch
import triton
import triton.language as tl

from .topk import round_to


@triton.jit
def _span(offsets, row, K):
    """Where the entries of a row start and end; `offsets` None: K a row."""
    if offsets is None:
        start = row * K
        end = start + K
    else:
        start = tl.load(offsets + row).to(tl.int64)
        end = tl.load(offsets + row + 1).to(tl.int64)
    return start, end


@triton.jit
def _sparse_decode_kernel(
    values,
    indices,
    w_dec,  # (M, D)
    b_dec,  # (D), or None
    offsets,  # (B + 1), or None
    target,  # (B, D), or None
    y,  # (B, D)
    error,  # (B)
    K,
    M,
    D,
    BLOCK_J: tl.constexpr,  # entries at a time
    BLOCK_D: tl.constexpr,
    WORKING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = _span(offsets, row, K)
    j = tl.arange(0, BLOCK_J)
    lane = tl.arange(0, BLOCK_D)
    square = tl.zeros([BLOCK_D], WORKING)
    for first in range(0, D, BLOCK_D):
        d = first + lane
        total = tl.zeros([BLOCK_J, BLOCK_D], WORKING)
        for entry in range(start, end, BLOCK_J):
            there = entry + j < end
            m = tl.load(indices + entry + j, mask=there, other=-1)
            v = tl.load(values + entry + j, mask=(m >= 0) & (m < M), other=0.0).to(WORKING)
            there = v != 0
            at = w_dec + m.to(tl.int64)[:, None] * D + d[None, :]
            total += v[:, None] * tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0).to(WORKING)
        out = tl.sum(total, 0)
        if b_dec is not None:
            out += tl.load(b_dec + d, mask=d < D, other=0.0).to(WORKING)
        rounded = round_to(out, y)
        tl.store(y + row * D + d, rounded, mask=d < D)
        if target is not None:
            difference = rounded.to(WORKING) - tl.load(target + row * D + d, mask=d < D, other=0.0).to(WORKING)
            square += tl.where(d < D, difference * difference, 0.0)
    if target is not None:
        tl.store(error + row, round_to(tl.sum(square), error))


@triton.jit
def _values_kernel(
    indices,
    w,  # (M, D)
    g,  # (B, D)
    offsets,
    out,
    K,
    M,
    D,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORKING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = _span(offsets, row, K)
    j = tl.arange(0, BLOCK_J)
    lane = tl.arange(0, BLOCK_D)
    for entry in range(start, end, BLOCK_J):
        m = tl.load(indices + entry + j, mask=entry + j < end, other=-1)
        there = (m >= 0) & (m < M)
        total = tl.zeros([BLOCK_J, BLOCK_D], WORKING)
        for first in range(0, D, BLOCK_D):
            d = first + lane
            at = w + m.to(tl.int64)[:, None] * D + d[None, :]
            x = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0).to(WORKING)
            # Where an entry is skipped, not even a NaN in g counts.
            product = x * tl.load(g + row * D + d, mask=d < D, other=0.0).to(WORKING)[None, :]
            total += tl.where(there[:, None], product, 0.0)
        tl.store(out + entry + j, round_to(tl.sum(total, 1), out), mask=entry + j < end)


@triton.jit
def _accumulate_kernel(
    order,  # (N) entries, sorted by latent
    first_entry,  # (M + 1) where a latent's entries start in `order`
    rows,  # (N) the row of each entry, or None: entry // K
    values,  # (N)
    g,  # (B, D)
    out,  # (M, D)
    sums,  # (M)
    K,
    D,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORKING: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    start = tl.load(first_entry + m)
    end = tl.load(first_entry + m + 1)
    j = tl.arange(0, BLOCK_J)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_J, BLOCK_D], WORKING)
    plain = tl.zeros([BLOCK_J], WORKING)
    for place in range(start, end, BLOCK_J):
        there = place + j < end
        entry = tl.load(order + place + j, mask=there, other=0)
        if rows is None:
            row = entry // K
        else:
            row = tl.load(rows + entry, mask=there, other=0).to(tl.int64)
        v = tl.load(values + entry, mask=there, other=0.0).to(WORKING)
        inside = (v != 0)[:, None] & (d < D)[None, :]
        x = tl.load(g + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(WORKING)
        total += v[:, None] * x
        plain += v
    tl.store(out + m * D + d, round_to(tl.sum(total, 0), out), mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(sums + m, round_to(tl.sum(plain), sums))


def _blocks(D):
    """BLOCK_J, BLOCK_D: tiles of 2048 elements, 16 for each thread of 4 warps."""
    block_d = min(512, max(16, triton.next_power_of_2(D)))
    return {"BLOCK_J": min(32, 2048 // block_d), "BLOCK_D": block_d}


def _working(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _entries(values_or_indices, offsets):
    """Rows, and entries of each where that is one number."""
    if offsets is None:
        return values_or_indices.shape
    return offsets.numel() - 1, 1


def _packed(tensor):
    return None if tensor is None else tensor.contiguous()


def forward(values, indices, w_dec, b_dec, offsets, target):
    """values, indices (B, K), or (N,) with offsets (B + 1,) -> y (B, D) and, with a target, squared errors (B,)."""
    values, indices, w_dec, b_dec, offsets, target = map(_packed, (values, indices, w_dec, b_dec, offsets, target))
    B, K = _entries(values, offsets)
    M, D = w_dec.shape
    y = torch.empty(B, D, dtype=values.dtype, device=w_dec.device)
    error = torch.empty(B if target is not None else 0, dtype=values.dtype, device=w_dec.device)
    if B:
        _sparse_decode_kernel[(B,)](
            *(values, indices, w_dec, b_dec, offsets, target, y, error, K, M, D),
            **_blocks(D),
            WORKING=_working(w_dec.dtype),
        )
    return y, error


def grad_values(indices, w, g, offsets):
    """w[indices] . g[row], of the shape of indices and the dtype of g; 0 where an index is out of range."""
    indices, w, g, offsets = map(_packed, (indices, w, g, offsets))
    B, K = _entries(indices, offsets)
    M, D = w.shape
    out = torch.empty(indices.shape, dtype=g.dtype, device=w.device)
    if out.numel():
        _values_kernel[(B,)](*(indices, w, g, offsets, out, K, M, D), **_blocks(D), WORKING=_working(w.dtype))
    return out


def accumulate(values, indices, g, M, offsets):
    """Sums over the entries of each latent, in row order: value * g[row] (M, D), and value (M,)."""
    values, indices, g, offsets = map(_packed, (values, indices, g, offsets))
    B, K = _entries(values, offsets)
    D = g.shape[1]
    out = torch.empty(M, D, dtype=values.dtype, device=g.device)
    sums = torch.empty(M, dtype=values.dtype, device=g.device)
    if not M:
        return out, sums
    keys = indices.flatten()
    keys = torch.where((keys < 0) | (keys >= M), M, keys)
    # Sorting is by the digits of the keys, so half as long keys take half as long.
    keys, order = torch.sort(keys.to(torch.int16 if M < 2**15 else torch.int32), stable=True)
    latents = torch.arange(M + 1, dtype=torch.int32, device=g.device).to(keys.dtype)
    first_entry = torch.searchsorted(keys, latents, out_int32=True)
    rows = None
    if offsets is not None:
        entries = torch.arange(keys.numel(), dtype=offsets.dtype, device=g.device)
        rows = torch.searchsorted(offsets, entries, right=True, out_int32=True) - 1
    blocks = _blocks(D)
    _accumulate_kernel[(M, max(1, triton.cdiv(D, blocks["BLOCK_D"])))](
        *(order, first_entry, rows, values, g, out, sums, K, D), **blocks, WORKING=_working(g.dtype)
    )
    return out, sums


def _on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _entries_of(B, K, dtype):
    return _on_gpu(B, K, dtype=dtype), _on_gpu(B, K, dtype=torch.int32)


def _flat(N, dtype):
    return _on_gpu(N, dtype=dtype), _on_gpu(N, dtype=torch.int32)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py. Vectors are read 16 bytes at a time where they are aligned.
_BF16 = torch.bfloat16
GATE = {
    "500 latents of 64, float32": (
        lambda: forward(*_entries_of(8192, 50, torch.float32), _on_gpu(500, 64), _on_gpu(64), None, None),
        ("LDG.E.128", "STG.E"),
    ),
    "with its error, bfloat16": (
        lambda: forward(
            *_entries_of(8192, 32, _BF16),
            *(_on_gpu(24576, 768, dtype=_BF16), _on_gpu(768, dtype=_BF16), None, _on_gpu(8192, 768, dtype=_BF16)),
        ),
        ("LDG.E.128",),
    ),
    "rows of any number, odd width, float16": (
        lambda: forward(
            *_flat(4096, torch.float16),
            *(_on_gpu(500, 61, dtype=torch.float16), None, _on_gpu(129, dtype=torch.int32), None),
        ),
        ("LDG.E.U16",),
    ),
    "gradient of values, float32": (
        lambda: grad_values(_on_gpu(8192, 50, dtype=torch.int32), _on_gpu(500, 64), _on_gpu(8192, 64), None),
        ("LDG.E.128",),
    ),
    "gradient of values, rows of any number, bfloat16": (
        lambda: grad_values(
            _on_gpu(4096, dtype=torch.int32),
            *(_on_gpu(24576, 768, dtype=_BF16), _on_gpu(128, 768, dtype=_BF16), _on_gpu(129, dtype=torch.int32)),
        ),
        ("LDG.E.128",),
    ),
    "gradient of vectors, float32": (
        lambda: accumulate(*_entries_of(8192, 50, torch.float32), _on_gpu(8192, 64), 500, None),
        ("LDG.E.128",),
    ),
    "gradient of vectors, rows of any number, bfloat16": (
        lambda: accumulate(
            *_flat(4096, _BF16), _on_gpu(128, 4096, dtype=_BF16), 131072, _on_gpu(129, dtype=torch.int32)
        ),
        ("LDG.E.128",),
    ),
}
