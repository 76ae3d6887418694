"""Triton kernels of `threshold_encode`; the mathematics is vaecirc_fast/reference/threshold_encode.py.

A program makes a block of pre-activations and finishes it in registers: activation, what it adds to the sums of its
rows, counts of its latents. Sums of rows are added up in the order of the blocks, so results are always the same bits.
"""

import torch
import triton
import triton.language as tl

from .topk import round_to
from .topk_encode import linear_tile, product_blocks

# Numbers of the kinds; the order of KINDS in the reference.
RELU, SOFT, JUMP = (tl.constexpr(n) for n in range(3))
BLOCK = 128  # latents of a program


@triton.jit
def _finish(pre, threshold, acts, penalty, l0, fired, row, m, block, B, M, KIND: tl.constexpr):
    """Activates pre (R, N), stores it, and adds it up."""
    t = tl.load(threshold + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    if KIND == SOFT:
        a = tl.where(tl.abs(pre) <= t, 0.0, tl.where(pre < 0, pre + t, pre - t))
    elif KIND == RELU:
        a = tl.where(pre <= tl.where(t < 0, 0.0, t), 0.0, pre)
    else:
        a = tl.where(pre <= t, 0.0, pre)
    inside = (row < B)[:, None] & (m < M)[None, :]
    a = round_to(tl.where(inside, a, 0.0), acts)
    tl.store(acts + row.to(tl.int64)[:, None] * M + m[None, :], a, mask=inside)
    a = a.to(tl.float32)  # what is counted is what was stored
    at = block.to(tl.int64) * B + row
    tl.store(penalty + at, tl.sum(tl.abs(a), 1), mask=row < B)
    tl.store(l0 + at, tl.sum((a != 0).to(tl.int32), 1), mask=row < B)
    n = tl.sum((a > 0).to(tl.int32), 0)
    tl.atomic_add(fired + m, n, mask=n > 0, sem="relaxed")


@triton.jit
def _place(B, M, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows, the latents and the number of the latents' block of this program."""
    # Eight blocks of rows take turns, so that what they read of w is still in cache.
    blocks_b, blocks_m = tl.cdiv(B, BLOCK_B), tl.cdiv(M, BLOCK_M)
    group = tl.program_id(0) // (8 * blocks_m)
    size = tl.minimum(8, blocks_b - 8 * group)
    within = tl.program_id(0) % (8 * blocks_m)
    block = within // size
    row = (8 * group + within % size) * BLOCK_B + tl.arange(0, BLOCK_B)
    return row, block * BLOCK_M + tl.arange(0, BLOCK_M), block


@triton.jit
def _encode_kernel(
    x,  # (B, D)
    w,  # (M, D), of any strides
    b,  # (M), or None
    threshold,  # (M)
    acts,  # (B, M)
    penalty,  # (blocks of latents, B) float32
    l0,  # (blocks of latents, B) int32
    fired,  # (M) int32
    B,
    M,
    D,
    w_m,
    w_d,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, m, block = _place(B, M, BLOCK_B, BLOCK_M)
    pre = linear_tile(x, w, b, row, m, B, M, D, w_m, w_d, UPCAST, "ieee", BLOCK_B, BLOCK_M, BLOCK_D)
    _finish(pre, threshold, acts, penalty, l0, fired, row, m, block, B, M, KIND)


@triton.jit
def _activate_kernel(
    b,
    threshold,
    acts,  # (B, M) products, which become activations
    penalty,
    l0,
    fired,
    B,
    M,
    KIND: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row, m, block = _place(B, M, BLOCK_B, BLOCK_M)
    inside = (row < B)[:, None] & (m < M)[None, :]
    pre = tl.load(acts + row.to(tl.int64)[:, None] * M + m[None, :], mask=inside, other=0.0).to(tl.float32)
    if b is not None:
        pre += tl.load(b + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    _finish(pre, threshold, acts, penalty, l0, fired, row, m, block, B, M, KIND)


def forward(x, w_enc, b_enc, threshold, kind):
    """x (B, D), w_enc (M, D) of any strides, threshold (M,) or one number -> activations (B, M), penalty and number of
    activations that are not 0 (B,) float32, and in how many rows each is positive, (M,) int32."""
    B, D = x.shape
    M = len(w_enc)
    x, threshold = x.contiguous(), threshold.expand(M).contiguous()
    b_enc = None if b_enc is None else b_enc.contiguous()
    blocks = triton.cdiv(M, BLOCK)
    acts = torch.empty(B, M, dtype=x.dtype, device=x.device)
    penalty = torch.empty(blocks, B, device=x.device)
    l0 = torch.empty(blocks, B, dtype=torch.int32, device=x.device)
    fired = torch.zeros(M, dtype=torch.int32, device=x.device)
    if B and x.dtype == torch.float32:
        # The library's products of float32 are faster than Triton's.
        torch.mm(x, w_enc.T, out=acts)
        rows = 32
        _activate_kernel[(triton.cdiv(B, rows) * blocks,)](
            *(b_enc, threshold, acts, penalty, l0, fired, B, M), KIND=kind, BLOCK_B=rows, BLOCK_M=BLOCK
        )
    elif B:
        sizes = product_blocks(x, w_enc)
        _encode_kernel[(triton.cdiv(B, sizes["BLOCK_B"]) * blocks,)](
            *(x, w_enc, b_enc, threshold, acts, penalty, l0, fired, B, M, D, *w_enc.stride()),
            KIND=kind,
            UPCAST=not x.is_cuda,
            BLOCK_M=BLOCK,
            **sizes,
        )
    return acts, penalty.sum(0), l0.sum(0, dtype=torch.int32).to(torch.float32), fired


def _encode(B, D, M, dtype, kind, *, transposed=False, bias=True):
    def on_gpu(*shape):
        return torch.empty(shape, dtype=dtype, device="cuda")

    w = on_gpu(D, M).T if transposed else on_gpu(M, D)
    return forward(on_gpu(B, D), w, on_gpu(M) if bias else None, on_gpu(M), kind)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
_TENSOR_CORES = ("80:HMMA", "90:HGMMA", "100:UTCHMMA")
GATE = {
    "relu, bfloat16": (lambda: _encode(8192, 768, 24576, torch.bfloat16, 0), _TENSOR_CORES),
    "soft, transposed, float16": (
        lambda: _encode(8192, 768, 24576, torch.float16, 1, transposed=True, bias=False),
        _TENSOR_CORES,
    ),
    "jump, few rows, odd sizes, bfloat16": (lambda: _encode(40, 61, 501, torch.bfloat16, 2), _TENSOR_CORES),
    "soft, odd rows, transposed, float16": (
        lambda: _encode(400, 61, 501, torch.float16, 1, transposed=True),
        _TENSOR_CORES,
    ),
    "jump, float32": (lambda: _encode(8192, 64, 512, torch.float32, 2), ("LDG.E.128", "STG.E.128")),
}
