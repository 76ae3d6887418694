"""Reference of `patch_mix`: effects of patching units of an activation through the layers behind it, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import latent_sweep


def forward(
    base: Tensor,
    source: Tensor,
    owner: Tensor,
    units: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    against_source: bool,
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
    """Effects (B, U, E, G) of base' = where(owner == units[u], source, base), on groups of the network's outputs.

    The effects are those of `effect_reduction` between the outputs for base' and for base, or for source where
    `against_source`. Forms all (B, U, P) outputs.
    """
    mixed = torch.where(owner == units[:, None], source[:, None], base[:, None])  # (B, U, L)
    network = (weights, biases, layout, slopes, shape, precision)
    y0 = latent_sweep.network(source if against_source else base, *network)
    y = latent_sweep.network(mixed.flatten(0, 1), *network)
    y = y.view(len(base), len(units), y0.shape[1])
    return latent_sweep.effects(y0, y, labels, order, offsets, kinds, link, spans)
