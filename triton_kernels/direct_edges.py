"""Triton kernel of `direct_edges`; the mathematics is vaecirc_fast/reference/direct_edges.py.

A program owns a tile of children and parents, holds their weights, and goes through the pairs; a sum of pairs never
leaves its registers. So that a few children and parents fill a GPU as well, the pairs may be shared out over several
programs, whose sums are added in order afterwards.
"""

import torch
import triton
import triton.language as tl

from .latent_sweep import activate

# Numbers of the kinds; the order of KINDS in the reference.
L1, MSE, RMS, SIGNED = (tl.constexpr(n) for n in range(4))
RELU = tl.constexpr(1)
PROGRAMS = 512  # enough for any GPU
PAIRS = 16  # the fewest that are worth a program of their own


@triton.jit
def _direct_edges_kernel(
    change,  # (B, U)
    weight,  # (V, U)
    pre,  # (B, V)
    out,  # (parts, V, U) sums over pairs
    B,
    U,
    V,
    per_part,
    slope,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = tl.program_id(2).to(tl.int64)
    parents, children = u < U, v < V
    inside = children[:, None] & parents[None, :]
    at = v.to(tl.int64)[:, None] * U + u[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_V, BLOCK_U], tl.float32)
    first = part * per_part
    for b in range(first, tl.minimum(first + per_part, B)):
        d = tl.load(change + b * U + u, mask=parents, other=0.0)
        c = tl.load(pre + b * V + v, mask=children, other=0.0)
        before = activate(c, slope, ACTIVATION)
        if ACTIVATION == RELU:
            # without adding c where it is positive: nothing cancels
            x = w * d[None, :] + (c - before)[:, None]
            x = tl.where(x < -before[:, None], -before[:, None], x)
        else:
            x = activate(w * d[None, :] + c[:, None], slope, ACTIVATION) - before[:, None]
        if KIND == L1:
            total += tl.abs(x)
        elif KIND == SIGNED:
            total += x
        else:
            total += x * x
    tl.store(out + part * U * V + at, total, mask=inside)


def forward(change, weight, pre, activation, slope, kind):
    """change (B, U), weight (V, U), pre (B, V), all float32 -> edges (V, U), for any activation but the identity."""
    change, weight, pre = change.contiguous(), weight.contiguous(), pre.contiguous()
    (pairs, parents), children = change.shape, len(weight)
    interpreted = change.device.type == "cpu"
    block_u = min(64, max(16, triton.next_power_of_2(max(parents, 1))))
    block_v = min(32, triton.next_power_of_2(max(children, 1)))
    across, down = triton.cdiv(parents, block_u), triton.cdiv(children, block_v)
    parts = 1 if interpreted else max(1, min(PROGRAMS // max(across * down, 1), pairs // PAIRS))
    per_part = triton.cdiv(pairs, parts)
    out = torch.empty(parts, children, parents, device=weight.device, dtype=weight.dtype)
    if out.numel():
        _direct_edges_kernel[(across, down, parts)](
            *(change, weight, pre, out, pairs, parents, children, per_part, slope),
            ACTIVATION=activation,
            KIND=kind,
            BLOCK_V=block_v,
            BLOCK_U=block_u,
        )
    mean = out.sum(0).div_(pairs)
    return mean.sqrt_() if kind == 2 else mean


def _operands(pairs=64, parents=256, children=256):
    """Change, weight and pre-activations, for the calls below."""
    shapes = ((pairs, parents), (children, parents), (pairs, children))
    return [torch.empty(shape, device="cuda") for shape in shapes]


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "relu l1": (lambda: forward(*_operands(), 1, 0.0, 0), ("LDG.E", "STG.E", "80:FFMA", "90:FFMA")),
    "elu rms, odd sizes": (
        lambda: forward(*_operands(7, 37, 19), 3, 1.0, 2),
        ("LDG.E", "MUFU.EX2"),
    ),
    "sigmoid mse": (lambda: forward(*_operands(), 4, 0.0, 1), ("MUFU.EX2", "STG.E")),
    "tanh signed": (lambda: forward(*_operands(), 5, 0.0, 3), ("MUFU.EX2", "STG.E")),
    "silu l1": (lambda: forward(*_operands(), 6, 0.0, 0), ("MUFU.EX2", "STG.E")),
}
