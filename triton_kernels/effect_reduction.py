"""Triton kernels of `effect_reduction`; the mathematics is vaecirc_fast/reference/effect_reduction.py.

A program owns one row (one perturbed output) and a block of groups, and reads the elements group by group through the
order table. The sectors of a row that a group uses in part are used by its neighbours out of L1, so device memory is
read once.
"""

import torch
import triton
import triton.language as tl

# Numbers of the effects; the order of KINDS in the reference.
L1, MSE, RMS, LOGIT_MSE, TV, SIGNED = (tl.constexpr(n) for n in range(6))
SAMPLE_BLOCKS = 8  # partial sums over samples; fixed, so results do not depend on the device


@triton.jit
def _load(pointer, mask, WORKING: tl.constexpr):
    # Converted at once: the interpreter's 16-bit arithmetic is not the hardware's.
    return tl.load(pointer, mask=mask, other=0.0).to(WORKING)


@triton.jit
def _link(x, SIGMOID: tl.constexpr):
    if SIGMOID:
        e = tl.exp(-tl.abs(x))
        s = 1.0 / (1.0 + e)
        return tl.where(x < 0, e * s, s)
    return x


@triton.jit
def _effect_reduction_kernel(
    base,  # (B, P)
    perturbed,  # (B, I, P)
    order,  # (n) elements sorted by group
    offsets,  # (G + 1)
    out,  # (B or sample blocks, I, E, G)
    B,
    I,
    P,
    G,
    E,
    kind0: tl.constexpr,  # up to 6 effects, -1 for none
    kind1: tl.constexpr,
    kind2: tl.constexpr,
    kind3: tl.constexpr,
    kind4: tl.constexpr,
    kind5: tl.constexpr,
    SIGMOID: tl.constexpr,
    SUM: tl.constexpr,
    SAMPLE_BLOCKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WORKING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = g < G
    start = tl.load(offsets + g, mask=valid, other=0)
    size = tl.load(offsets + g + 1, mask=valid, other=0) - start
    longest = tl.max(size)
    outer = row // I
    i = row % I
    if SUM:
        first = outer * B // SAMPLE_BLOCKS
        last = (outer + 1) * B // SAMPLE_BLOCKS
    else:
        first = outer
        last = outer + 1
    o = out + (row * E) * G + g
    n = tl.where(valid, size, 1).to(WORKING)
    total0 = tl.zeros([BLOCK_G], WORKING)
    total1 = tl.zeros([BLOCK_G], WORKING)
    total2 = tl.zeros([BLOCK_G], WORKING)
    total3 = tl.zeros([BLOCK_G], WORKING)
    total4 = tl.zeros([BLOCK_G], WORKING)
    total5 = tl.zeros([BLOCK_G], WORKING)
    for b in range(first, last):
        absolute = tl.zeros([BLOCK_G], WORKING)
        square = tl.zeros([BLOCK_G], WORKING)
        plain = tl.zeros([BLOCK_G], WORKING)
        raw = tl.zeros([BLOCK_G], WORKING)
        for t0 in range(0, longest, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            inside = t[None, :] < size[:, None]
            p = tl.load(order + start[:, None] + t[None, :], mask=inside, other=0)
            x0 = _load(base + b * P + p, inside, WORKING)
            x1 = _load(perturbed + (b * I + i) * P + p, inside, WORKING)
            d = _link(x1, SIGMOID) - _link(x0, SIGMOID)
            absolute += tl.sum(tl.abs(d), 1)
            square += tl.sum(d * d, 1)
            plain += tl.sum(d, 1)
            raw += tl.sum((x1 - x0) * (x1 - x0), 1)
        total0 += finish(kind0, absolute, square, plain, raw, n)
        total1 += finish(kind1, absolute, square, plain, raw, n)
        total2 += finish(kind2, absolute, square, plain, raw, n)
        total3 += finish(kind3, absolute, square, plain, raw, n)
        total4 += finish(kind4, absolute, square, plain, raw, n)
        total5 += finish(kind5, absolute, square, plain, raw, n)
    tl.store(o, total0, mask=valid)
    if kind1 >= 0:
        tl.store(o + G, total1, mask=valid)
    if kind2 >= 0:
        tl.store(o + 2 * G, total2, mask=valid)
    if kind3 >= 0:
        tl.store(o + 3 * G, total3, mask=valid)
    if kind4 >= 0:
        tl.store(o + 4 * G, total4, mask=valid)
    if kind5 >= 0:
        tl.store(o + 5 * G, total5, mask=valid)


@triton.jit
def finish(kind: tl.constexpr, absolute, square, plain, raw, n):
    if kind == L1:
        return absolute / n
    if kind == MSE:
        return square / n
    if kind == RMS:
        return tl.sqrt(square / n)
    if kind == LOGIT_MSE:
        return raw / n
    if kind == TV:
        return absolute / 2
    return plain / n


@triton.jit
def _product(factor, value, mask, WORKING: tl.constexpr):
    # A factor of zero adds nothing, even where the value is NaN or infinite.
    f = _load(factor, mask, WORKING)
    return tl.where(f == 0, 0.0, f * value)


@triton.jit
def _effect_reduction_backward_kernel(
    base,  # (B, P)
    perturbed,  # (B, I, P)
    labels,  # (P)
    factors,  # (B or 1, I, 4, G)
    factors_stride,
    grad_base,  # (B, P)
    grad_perturbed,  # (B, I, P)
    I,
    P,
    G,
    SIGMOID: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WORKING: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    group = tl.load(labels + p, mask=inside, other=-1)
    kept = group >= 0
    x0 = _load(base + b * P + p, inside, WORKING)
    y0 = _link(x0, SIGMOID)
    through = tl.zeros([BLOCK_P], WORKING)
    direct = tl.zeros([BLOCK_P], WORKING)
    f = factors + b * factors_stride  # of intervention i; a scalar: a pointer per element would cost registers
    for i in range(0, I):
        row = (b * I + i) * P
        x1 = _load(perturbed + row + p, inside, WORKING)
        y1 = _link(x1, SIGMOID)
        d = y1 - y0
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0)).to(WORKING)
        g = _product(f + group, sign, kept, WORKING) + _product(f + G + group, d, kept, WORKING)
        g += _load(f + 2 * G + group, kept, WORKING)
        r = _product(f + 3 * G + group, x1 - x0, kept, WORKING)
        g = tl.where(kept, g, 0.0)
        r = tl.where(kept, r, 0.0)
        through += g
        direct += r
        if SIGMOID:
            g = tl.where(g == 0, 0.0, g * y1 * (1.0 - y1))
        tl.store(grad_perturbed + row + p, (g + r).to(grad_perturbed.dtype.element_ty), mask=inside)
        f += 4 * G
    if SIGMOID:
        through = tl.where(through == 0, 0.0, through * y0 * (1.0 - y0))
    tl.store(grad_base + b * P + p, (-through - direct).to(grad_base.dtype.element_ty), mask=inside)


def _working(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(base, perturbed, labels, order, offsets, kinds, link, sum_samples):
    """base (B, P), perturbed (B, I, P) -> (B, I, E, G), or (I, E, G) summed over samples, deterministically."""
    base, perturbed = base.contiguous(), perturbed.contiguous()
    samples, interventions, elements = perturbed.shape
    groups = offsets.numel() - 1
    outer = min(samples, SAMPLE_BLOCKS) if sum_samples else samples
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    out = torch.empty(outer, interventions, len(kinds), groups, device=base.device, dtype=dtype)
    if out.numel():
        block_t = min(1024, triton.next_power_of_2(-(-order.numel() // groups)))
        block_g = max(1, min(triton.next_power_of_2(groups), 2048 // block_t))
        padded = [*kinds, *[-1] * (6 - len(kinds))]
        _effect_reduction_kernel[(outer * interventions, triton.cdiv(groups, block_g))](
            *(base, perturbed, order, offsets, out, samples, interventions, elements, groups, len(kinds)),
            *padded,
            SIGMOID=link == 1,
            SUM=sum_samples,
            SAMPLE_BLOCKS=outer if sum_samples else 1,
            BLOCK_G=block_g,
            BLOCK_T=block_t,
            WORKING=_working(base.dtype),
            num_warps=8,
        )
    return out.sum(0) if sum_samples else out


def backward(base, perturbed, labels, order, offsets, factors, link):
    """Gradients (B, P) and (B, I, P) from factors (B or 1, I, 4, G); see the reference."""
    base, perturbed = base.contiguous(), perturbed.contiguous()
    factors = factors.to(torch.float64 if base.dtype == torch.float64 else torch.float32).contiguous()
    samples, interventions, elements = perturbed.shape
    groups = offsets.numel() - 1
    grad_base, grad_perturbed = torch.empty_like(base), torch.empty_like(perturbed)
    if base.numel():
        block = min(2048 // base.element_size(), triton.next_power_of_2(elements))  # 16 bytes a thread, of 4 warps
        _effect_reduction_backward_kernel[(samples, triton.cdiv(elements, block))](
            *(base, perturbed, labels, factors, interventions * 4 * groups if factors.shape[0] > 1 else 0),
            *(grad_base, grad_perturbed, interventions, elements, groups),
            SIGMOID=link == 1,
            BLOCK_P=block,
            WORKING=_working(base.dtype),
        )
    return grad_base, grad_perturbed


def _outputs(dtype, elements=4096, groups=64):
    """Base, perturbed, labels, order and offsets, for the calls below."""
    sizes = {"base": (64, elements), "perturbed": (64, 100, elements)}
    outputs = [torch.empty(size, dtype=dtype, device="cuda") for size in sizes.values()]
    tables = [torch.empty(n, dtype=torch.int32, device="cuda") for n in (elements, elements, groups + 1)]
    return *outputs, *tables


def _factors(samples, groups=64):
    return torch.empty(samples, 100, 4, groups, device="cuda")


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py. A backward pass reads its rows in order, so its loads are 16 bytes wide where rows are aligned.
GATE = {
    "l1 on cells, float32": (lambda: forward(*_outputs(torch.float32), [0], 0, False), ("LDG.E", "STG.E")),
    "all effects from logits, bfloat16": (
        lambda: forward(*_outputs(torch.bfloat16), [0, 1, 2, 3, 4, 5], 1, False),
        ("LDG.E.U16", "MUFU.EX2", "MUFU.RCP"),
    ),
    "summed over samples, whole output, float16": (
        lambda: forward(*_outputs(torch.float16, 12288, 1), [0, 5], 0, True),
        ("LDG.E.U16",),
    ),
    "odd rows, float64": (lambda: forward(*_outputs(torch.float64, 4095), [2], 1, False), ("LDG.E.64", "DFMA")),
    "gradient, float32": (
        lambda: backward(*_outputs(torch.float32), _factors(64), 0),
        ("LDG.E.128", "STG.E.128"),
    ),
    "gradient through logits, shared factors, bfloat16": (
        lambda: backward(*_outputs(torch.bfloat16), _factors(1), 1),
        ("LDG.E.128", "STG.E.128", "MUFU.EX2"),
    ),
    "gradient, odd rows, float64": (lambda: backward(*_outputs(torch.float64, 4095), _factors(64), 1), ("LDG.E.64",)),
}
