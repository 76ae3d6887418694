"""Triton kernels of `vq_assign`; the mathematics is vaecirc_fast/reference/vq_assign.py.

A program owns a block of rows and goes through the codes block by block; each row's minimum and where it was are
carried along, so a score never leaves the registers. Products are taken in full float32. Sums go over rows sorted by
their code, a program a code, so nothing is added up across programs and results do not depend on their order.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _nearest_kernel(
    z,  # (N, D)
    codebook,  # (K, D)
    indices,  # (N) int64
    z_q,  # (N, D)
    distance,  # (N)
    N,
    K,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    rows = n < N
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        square = tl.zeros([BLOCK_K], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + channel
            x = tl.load(z + n[:, None] * D + d[None, :], mask=rows[:, None] & (d < D)[None, :], other=0.0)
            e = tl.load(
                codebook + k[None, :].to(tl.int64) * D + d[:, None], mask=(k < K)[None, :] & (d < D)[:, None], other=0.0
            )
            product = tl.dot(x, e, product, input_precision="ieee")
            square += tl.sum(e * e, 0)
        score = 0.5 * square[None, :] - product
        score = tl.where((score != score) | (k >= K)[None, :], float("inf"), score)
        best = tl.min(score, 1)
        first = tl.min(tl.where(score == best[:, None], k[None, :], K), 1)
        nearest = tl.where(best < least, first, nearest)
        least = tl.minimum(best, least)
    probe = tl.zeros([BLOCK_N], tl.float32)  # 0 times the row: 0 where it is finite
    for d0 in range(0, D, BLOCK_D):
        d = d0 + channel
        x = tl.load(z + n[:, None] * D + d[None, :], mask=rows[:, None] & (d < D)[None, :], other=0.0)
        probe += tl.sum(x * 0.0, 1)
    nearest = tl.where(probe == 0.0, nearest, 0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + channel
        inside = rows[:, None] & (d < D)[None, :]
        x = tl.load(z + n[:, None] * D + d[None, :], mask=inside, other=0.0)
        e = tl.load(codebook + nearest[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0)
        tl.store(z_q + n[:, None] * D + d[None, :], e, mask=inside)
        squares += tl.sum((x - e) * (x - e), 1)
    tl.store(indices + n, nearest.to(tl.int64), mask=rows)
    tl.store(distance + n, squares, mask=rows)


@triton.jit
def _sums_kernel(
    z,  # (N, D)
    order,  # (N) int64: rows sorted by code, in their order within one
    starts,  # (K + 1) int64
    sums,  # (K, D)
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + k)
    stop = tl.load(starts + k + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < stop, other=0)
        x = tl.load(z + row[:, None] * D + d[None, :], mask=(place < stop)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(x, 0)
    tl.store(sums + k * D + d, total, mask=d < D)


def forward(z, codebook, with_totals):
    """z (N, D), codebook (K, D), float32 -> z_q, indices, distances, counts, sums; see the reference."""
    z, codebook = z.contiguous(), codebook.contiguous()
    (N, D), K = z.shape, len(codebook)
    indices, z_q, distance = z.new_empty(N, dtype=torch.int64), torch.empty_like(z), z.new_empty(N)
    interpreted = z.device.type == "cpu"  # which wants few, large programs
    if N:
        block = 1024 if interpreted else 64
        _nearest_kernel[(triton.cdiv(N, block),)](
            *(z, codebook, indices, z_q, distance, N, K, D),
            **{"BLOCK_N": block, "BLOCK_K": 32, "BLOCK_D": 16},  # larger ones spill
        )
    if not with_totals:
        return z_q, indices, distance, indices.new_empty(0), z.new_empty(0)
    by_code, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(by_code, torch.arange(K + 1, device=z.device))
    sums = z.new_empty(K, D)
    channels = min(128, triton.next_power_of_2(D))
    _sums_kernel[(K, triton.cdiv(D, channels))](
        z, order, starts, sums, D, **{"BLOCK_N": max(1, 2048 // channels), "BLOCK_D": channels}
    )
    return z_q, indices, distance, starts.diff(), sums


def _call(N, K, D):
    return forward(torch.empty(N, D, device="cuda"), torch.empty(K, D, device="cuda"), True)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "16 channels": (lambda: _call(640, 512, 16), ("LDG.E", "STG.E")),
    "64 channels": (lambda: _call(65536, 512, 64), ("LDG.E", "STG.E")),
    "odd sizes": (lambda: _call(77, 130, 50), ("LDG.E", "STG.E")),
}
