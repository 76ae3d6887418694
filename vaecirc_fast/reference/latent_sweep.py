"""Reference of `latent_sweep`: effects of latent interventions through a layered decoder, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import effect_reduction

# The orders are the numberings that the kernels use.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "sigmoid", "tanh", "silu")
LINKS = ("identity", "sigmoid", "softmax")
PRECISIONS = ("float32", "tf32", "bf16")
DENSE, TRANSPOSED = 0, 1
LAYER = 8  # numbers of one layer in a layout: kind, activation, stride, padding, output padding (height, width each)

BACKWARD_BYTES = 32 << 20  # of activations that the gradient holds at once


def activate(x: Tensor, activation: int, slope: float) -> Tensor:
    """The activation of that number."""
    match ACTIVATIONS[activation]:
        case "relu":
            return F.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, slope)
        case "elu":
            return F.elu(x, slope)
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
        case "silu":
            return F.silu(x)
    return x


def linked(x: Tensor, link: int, spans: Tensor) -> Tensor:
    """Logits (..., P) through the link."""
    match LINKS[link]:
        case "sigmoid":
            return torch.sigmoid(x)
        case "softmax":
            return torch.cat([torch.softmax(part, -1) for part in x.split(spans.diff().tolist(), -1)], -1)
    return x


def rounded(x: Tensor, precision: int) -> Tensor:
    """x with the mantissa that operands of a product keep: all, 10 bits (tf32) or 7 (bf16), to nearest even."""
    match PRECISIONS[precision]:
        case "float32":
            return x
        case "bf16":
            near = x.detach().bfloat16().to(x.dtype)
        case _:
            bits = x.detach().float().contiguous().view(torch.int32)
            near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).to(x.dtype)
            near = torch.where(torch.isfinite(x.detach()), near, x.detach())
    return x + (near - x.detach()) if x.requires_grad else near


def first_layer(z: Tensor, latents: Tensor, shifts: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations of the first layer: (B, H) without, and (B, J, H) with intervention, as a rank-K update."""
    base = F.linear(z, weight, bias)
    return base, base[:, None] + torch.einsum("bjk,jkh->bjh", shifts, weight.T[latents])


def logits(
    pre: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    precision: int = 0,
) -> Tensor:
    """First pre-activations (R, H) -> outputs before the link (R, P)."""
    h = activate(pre, layout[1], slopes[0])
    for n in range(1, len(weights)):
        h = _layer(h, n, weights, biases, layout, slopes, shape, precision)
    return _cropped(h, shape)


def network(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    precision: int = 0,
) -> Tensor:
    """Inputs (R, L) of the first layer, which is exact -> outputs before the link (R, P)."""
    for n in range(len(weights)):
        x = _layer(x, n, weights, biases, layout, slopes, shape, precision if n else 0)
    return _cropped(x, shape)


def _layer(
    h: Tensor,
    n: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    precision: int,
) -> Tensor:
    kind, activation, *geometry = layout[LAYER * n : LAYER * (n + 1)]
    if kind == TRANSPOSED and h.ndim == 2:
        h = h.unflatten(1, tuple(shape[:3]))
    h, weight = rounded(h, precision), rounded(weights[n], precision)
    if kind == DENSE:
        h = F.linear(h, weight, biases[n])
    else:
        stride, padding, output_padding = geometry[:2], geometry[2:4], geometry[4:]
        h = F.conv_transpose2d(h, weight, biases[n], stride, padding, output_padding)
    return activate(h, activation, slopes[n])


def _cropped(h: Tensor, shape: Sequence[int]) -> Tensor:
    return h[..., : shape[3], : shape[4]].flatten(1) if h.ndim == 4 else h


def forward(
    z: Tensor,
    latents: Tensor,
    shifts: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    spans: Tensor,
    precision: int,
) -> Tensor:
    """Effects (B, J, E, G) of z'[latents[j, k]] = z[latents[j, k]] + shifts[b, j, k] for all k, on groups of outputs.

    The effects are those of `effect_reduction` between the outputs for z' and for z. Forms all (B, J, P) outputs.
    """
    base, moved = first_layer(z, latents, shifts, weights[0], biases[0])
    base = logits(base, weights, biases, layout, slopes, shape, precision)
    elements = base.shape[1]
    moved = logits(moved.flatten(0, 1), weights, biases, layout, slopes, shape, precision)
    moved = moved.view(*shifts.shape[:2], elements)
    return effects(base, moved, labels, order, offsets, kinds, link, spans)


def effects(
    base: Tensor,
    moved: Tensor,
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    spans: Tensor,
) -> Tensor:
    """Effects (B, J, E, G) between outputs before the link: of moved (B, J, P) against base (B, P)."""
    raw = effect_reduction.KINDS.index("logit_mse")
    y0, y = (base, moved) if set(kinds) == {raw} else (linked(base, link, spans), linked(moved, link, spans))
    found = []
    for kind in kinds:
        pair = (base, moved) if kind == raw else (y0, y)
        found.append(effect_reduction.forward(*pair, labels, order, offsets, [kind], 0, False))
    return torch.cat(found, 2)


def backward(
    grad: Tensor,
    z: Tensor,
    latents: Tensor,
    shifts: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    *rest,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of z, shifts, weights and biases from `grad` (B, J, E, G): each tile is computed anew, so that memory
    does not grow with B or J."""
    leaves = [t.detach().requires_grad_() for t in (*weights, *biases)]
    count = len(weights)
    totals = [torch.zeros_like(t) for t in leaves]
    grad_z, grad_shifts = torch.zeros_like(z), torch.zeros_like(shifts)
    rows = max(1, BACKWARD_BYTES // (8 * z.element_size() * _width(leaves[:count], layout, rest[1])))
    samples, interventions = shifts.shape[:2]
    deep = max(1, min(rows, interventions))
    broad = max(1, rows // deep)
    for b in range(0, samples, broad):
        for j in range(0, interventions, deep):
            tile = (slice(b, b + broad), slice(j, j + deep))
            z_tile, shift_tile = z[tile[0]].detach().requires_grad_(), shifts[tile].detach().requires_grad_()
            with torch.enable_grad():
                out = forward(z_tile, latents[tile[1]], shift_tile, leaves[:count], leaves[count:], layout, *rest)
            inputs = [z_tile, shift_tile, *leaves]
            found = torch.autograd.grad(out, inputs, grad[tile], allow_unused=True)
            into = [grad_z[tile[0]], grad_shifts[tile], *totals]
            for total, part in zip(into, found, strict=True):
                if part is not None:
                    total += part
    return grad_z, grad_shifts, totals[:count], totals[count:]


def _width(weights: Sequence[Tensor], layout: Sequence[int], shape: Sequence[int]) -> int:
    """Activations of one row, over all layers."""
    total, grid = 0, list(shape[1:3])
    for n, weight in enumerate(weights):
        if layout[LAYER * n] == DENSE:
            total += weight.shape[0]
        else:
            grid = output_grid(grid, weight.shape[2:], layout[LAYER * n + 2 : LAYER * (n + 1)])
            total += weight.shape[1] * grid[0] * grid[1]
    return max(total, 1)


def output_grid(grid: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]) -> list[int]:
    """Height and width after a transposed convolution with (stride, padding, output padding) `geometry`."""
    return [(grid[a] - 1) * geometry[a] - 2 * geometry[2 + a] + kernel[a] + geometry[4 + a] for a in (0, 1)]
