"""Reference of `direct_edges`: effect of each unit of a layer on each unit of the next, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .latent_sweep import activate

# The order is the numbering that the kernels use.
KINDS = ("l1", "mse", "rms", "signed")

TILE_BYTES = 16 << 20  # of changes that are held at once


def reduced(change: Tensor, kind: int, dim: int | tuple[int, ...] = 0) -> Tensor:
    """The mean over pairs of |change|, of its square, the root of that, or of the change itself."""
    match KINDS[kind]:
        case "l1":
            return change.abs().mean(dim)
        case "mse":
            return change.square().mean(dim)
        case "rms":
            return change.square().mean(dim).sqrt()
    return change.mean(dim)


def forward(
    base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, activation: int, slope: float, kind: int
) -> Tensor:
    """base, source (B, U), weight (V, U), pre (B, V) -> (V, U).

    edge[v, u] = reduction over pairs b of f(pre[b, v] + weight[v, u] (source[b, u] - base[b, u])) - f(pre[b, v]): what
    child v does when parent u alone takes the source's value. Tiled over children.
    """
    change, before = source - base, activate(pre, activation, slope)
    rows = max(1, TILE_BYTES // max(1, change.numel() * change.element_size()))
    parts = []
    for v in range(0, len(weight), rows):
        some = slice(v, v + rows)
        moved = pre[:, some, None] + weight[some] * change[:, None]
        parts.append(reduced(activate(moved, activation, slope) - before[:, some, None], kind))
    return torch.cat(parts) if parts else weight.new_empty(weight.shape)
