"""Triton kernels of `tc_logsumexp`; the mathematics is vaecirc_fast/reference/tc_logsumexp.py.

A program owns a block of codes (of the parameters' gradients: of posteriors) and a block of latents, and goes through
the other side block by block; maximum and sum are carried along, so a log density never leaves the registers. The
density of all latents together needs them all: it has a kernel of its own in the forward pass, and is made anew by
every block of latents in the gradients. Nothing is added up across programs, so results do not depend on their order.
"""

import math

import torch
import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _densities(z, mu, logvar, b, m, l, B, M, L):
    """u = (z - mu) / sigma, 1 / sigma and log densities of codes b, posteriors m and latents l, in three dimensions.

    Outside the arrays the density is 1 for latents (its logarithm adds nothing) and 0 for posteriors.
    """
    latents = (l < L)[None, :]
    x = tl.load(z + b[:, None] * L + l[None, :], mask=(b < B)[:, None] & latents, other=0.0)
    at, inside = m[:, None] * L + l[None, :], (m < M)[:, None] & latents
    mean = tl.load(mu + at, mask=inside, other=0.0)
    width = tl.load(logvar + at, mask=inside, other=0.0)
    scale = tl.exp(-0.5 * width)
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    u = (x[:, None, :] - mean[None, :, :]) * scale[None, :, :]
    density = -0.5 * (u * u) - (0.5 * width + HALF_LOG_2PI)[None, :, :]
    density = tl.where(latents[:, None, :], density, 0.0)
    return u, scale, tl.where((m < M)[None, :, None], density, float("-inf"))


@triton.jit
def _together(z, mu, logvar, b, m, B, M, L, delta, BLOCK_L: tl.constexpr):
    """Log densities of all latents, plus delta where the posterior is the code's own: (codes, posteriors)."""
    first = tl.arange(0, BLOCK_L)
    _, _, density = _densities(z, mu, logvar, b, m, first, B, M, L)
    total = tl.sum(density, 2)
    for l0 in range(BLOCK_L, L, BLOCK_L):
        _, _, density = _densities(z, mu, logvar, b, m, l0 + first, B, M, L)
        total += tl.sum(density, 2)
    return total + tl.where(b[:, None] == m[None, :], delta, 0.0)


@triton.jit
def _shift(most):
    # What to take exponents relative to; where all terms are 0, any finite number.
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _joint_kernel(
    z,  # (B, L)
    mu,  # (M, L)
    logvar,  # (M, L)
    out,  # (B)
    B,
    M,
    L,
    delta,  # log weight of the code's own posterior less that of the others
    log_other,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    most = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        x = _together(z, mu, logvar, b, m, B, M, L, delta, BLOCK_L)
        larger = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp(most - _shift(larger)) + tl.sum(tl.exp(x - _shift(larger)[:, None]), 1)
        most = larger
    tl.store(out + b, _shift(most) + tl.log(total) + log_other, mask=b < B)


@triton.jit
def _marginals_kernel(
    z,
    mu,
    logvar,
    out,  # (B, L)
    B,
    M,
    L,
    delta,
    log_other,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    most = tl.full([BLOCK_B, BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        _, _, x = _densities(z, mu, logvar, b, m, l, B, M, L)
        x += tl.where(b[:, None] == m[None, :], delta, 0.0)[:, :, None]
        larger = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp(most - _shift(larger)) + tl.sum(tl.exp(x - _shift(larger)[:, None, :]), 1)
        most = larger
    mask = (b < B)[:, None] & (l < L)[None, :]
    tl.store(out + b[:, None] * L + l[None, :], _shift(most) + tl.log(total) + log_other, mask=mask)


@triton.jit
def _shares(
    z,
    mu,
    logvar,
    joint,
    marginals,
    grad_joint,
    grad_marginals,
    b,
    m,
    l,
    B,
    M,
    L,
    delta,
    log_other,
    BLOCK_L: tl.constexpr,
):
    """p, the gradient of each log density, and u where p is not 0: (codes, posteriors, latents); 1 / sigma."""
    codes = b < B
    together = _together(z, mu, logvar, b, m, B, M, L, delta, BLOCK_L)
    result = _shift(tl.load(joint + b, mask=codes, other=0.0)) - log_other
    p = tl.load(grad_joint + b, mask=codes, other=0.0)[:, None] * tl.exp(together - result[:, None])
    u, scale, x = _densities(z, mu, logvar, b, m, l, B, M, L)
    x += tl.where(b[:, None] == m[None, :], delta, 0.0)[:, :, None]
    at, inside = b[:, None] * L + l[None, :], codes[:, None] & (l < L)[None, :]
    result = _shift(tl.load(marginals + at, mask=inside, other=0.0)) - log_other
    weight = tl.load(grad_marginals + at, mask=inside, other=0.0)
    share = p[:, :, None] + weight[:, None, :] * tl.exp(x - result[:, None, :])
    share = tl.where(inside[:, None, :] & (m < M)[None, :, None], share, 0.0)
    return share, tl.where(share == 0, 0.0, u), scale  # a density of 0 adds nothing, however far its mean is


@triton.jit
def _codes_backward_kernel(
    z,
    mu,
    logvar,
    joint,
    marginals,
    grad_joint,
    grad_marginals,
    grad_z,
    B,
    M,
    L,
    delta,
    log_other,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        p, u, scale = _shares(
            *(z, mu, logvar, joint, marginals, grad_joint, grad_marginals, b, m, l, B, M, L, delta, log_other, BLOCK_L)
        )
        total += tl.sum(p * u * scale[None, :, :], 1)
    tl.store(grad_z + b[:, None] * L + l[None, :], -total, mask=(b < B)[:, None] & (l < L)[None, :])


@triton.jit
def _posteriors_backward_kernel(
    z,
    mu,
    logvar,
    joint,
    marginals,
    grad_joint,
    grad_marginals,
    grad_mu,
    grad_logvar,
    B,
    M,
    L,
    delta,
    log_other,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    of_mu = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    of_logvar = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        p, u, scale = _shares(
            *(z, mu, logvar, joint, marginals, grad_joint, grad_marginals, b, m, l, B, M, L, delta, log_other, BLOCK_L)
        )
        of_mu += tl.sum(p * u, 0) * scale
        of_logvar += tl.sum(p * u * u - p, 0)
    at, mask = m[:, None] * L + l[None, :], (m < M)[:, None] & (l < L)[None, :]
    tl.store(grad_mu + at, of_mu, mask=mask)
    tl.store(grad_logvar + at, 0.5 * of_logvar, mask=mask)


# Elements of a program's block: a few registers a thread and array. The interpreter wants few, large programs.
ELEMENTS, INTERPRETED_ELEMENTS = 2048, 1 << 16


def _blocks(owned: int, others: int, z: torch.Tensor) -> tuple[int, int, int]:
    """Sizes of the blocks of what a program owns, of what it goes through, and of latents."""
    elements, L = INTERPRETED_ELEMENTS if z.device.type == "cpu" else ELEMENTS, z.shape[1]
    latents = min(16, triton.next_power_of_2(L))
    other = min(32, triton.next_power_of_2(max(others, 1)))
    own = max(1, min(triton.next_power_of_2(max(owned, 1)), elements // (latents * other)))
    return own, other, latents


def forward(z, mu, logvar, log_own, log_other):
    """z (B, L), mu and logvar (M, L), all float32 -> log densities (B,) and (B, L); see the reference."""
    z, mu, logvar = z.contiguous(), mu.contiguous(), logvar.contiguous()
    (B, L), M = z.shape, len(mu)
    joint, marginals = z.new_empty(B), z.new_empty(B, L)
    delta = log_own - log_other
    own, other, latents = _blocks(B, M, z)
    if B:
        blocks = {"BLOCK_B": own, "BLOCK_M": other, "BLOCK_L": latents}
        rows = triton.cdiv(B, own)
        _joint_kernel[(rows,)](z, mu, logvar, joint, B, M, L, delta, log_other, **blocks)
        _marginals_kernel[(rows, triton.cdiv(L, latents))](
            z, mu, logvar, marginals, B, M, L, delta, log_other, **blocks
        )
    return joint, marginals


def backward(z, mu, logvar, joint, marginals, grad_joint, grad_marginals, log_own, log_other):
    """Gradients for z (B, L), mu and logvar (M, L)."""
    read = [t.contiguous() for t in (z, mu, logvar, joint, marginals, grad_joint, grad_marginals)]
    (B, L), M = z.shape, len(mu)
    grad_z, grad_mu, grad_logvar = (torch.empty_like(t) for t in read[:3])
    delta = log_own - log_other
    own, other, latents = _blocks(B, M, z)
    across = triton.cdiv(L, latents)
    if B:
        _codes_backward_kernel[(triton.cdiv(B, own), across)](
            *(*read, grad_z, B, M, L, delta, log_other),
            **{"BLOCK_B": own, "BLOCK_M": other, "BLOCK_L": latents},
        )
    own, other, latents = _blocks(M, B, z)
    _posteriors_backward_kernel[(triton.cdiv(M, own), across)](
        *(*read, grad_mu, grad_logvar, B, M, L, delta, log_other),
        **{"BLOCK_B": other, "BLOCK_M": own, "BLOCK_L": latents},
    )
    return grad_z, grad_mu, grad_logvar


def _operands(B=2048, M=2048, L=10):
    """Codes, means and log variances, for the calls below."""
    return [torch.empty(shape, device="cuda") for shape in ((B, L), (M, L), (M, L))]


def _gradient(*sizes):
    z, mu, logvar = _operands(*sizes)
    of_codes = [z.new_empty(len(z)), torch.empty_like(z)]
    return backward(z, mu, logvar, *of_codes, *of_codes, -11.0, -9.0)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "float32": (lambda: forward(*_operands(), -11.0, -9.0), ("LDG.E", "STG.E", "MUFU.EX2")),
    "odd sizes, many latents": (lambda: forward(*_operands(77, 130, 50), -11.0, -9.0), ("LDG.E", "MUFU.EX2")),
    "gradient, float32": (lambda: _gradient(), ("LDG.E", "STG.E", "MUFU.EX2")),
    "gradient, odd sizes, many latents": (lambda: _gradient(77, 130, 50), ("LDG.E", "MUFU.EX2")),
}
