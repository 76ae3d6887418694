"""Planted linear decoders y = W z + b: a shift d of latent i moves the outputs by exactly W[:, i] d."""

from __future__ import annotations

import numpy as np
import torch

from ..groups import Groups, spans
from .circuit import Planted, dense, eighths


def circuits() -> list[Planted]:
    """The linear circuits."""
    block = np.zeros((12, 4))
    for i in range(4):
        block[3 * i : 3 * i + 3, i] = np.array([1.0, -2.0, 0.5]) * (i + 1)
    random = eighths(1, 11, 5)
    half_dead = eighths(2, 8, 3)
    half_dead[:, 1] = 0
    unit = np.array([1.0, 8.0, 1.0])
    pair = np.repeat(eighths(3, 6, 1), 3, axis=1) / unit
    pair[:, 2] = [1.0, 0, 0, 0, 0, -1.0]
    return [
        _linear("block", "Each latent moves one group and no other: specificity 1.", block, spans([3, 3, 3, 3])),
        _linear(
            "equal",
            "Each latent moves every output equally: specificity 0.",
            np.tile([0.25, 0.5, -1.0], (12, 1)),
            spans([3, 3, 3, 3]),
        ),
        _linear(
            "random",
            "Random weights on groups of unequal size: CES weights groups by their size.",
            random,
            spans([1, 2, 5, 3]),
            bias=eighths(4, 11),
        ),
        _linear(
            "units",
            "Latent 1 is latent 0 in a unit eight times as fine: raw CES differs eightfold, posterior CES not at all.",
            pair,
            spans([2, 4]),
            scale=0.75 * unit,
        ),
        _linear(
            "dead",
            "A latent without any weight: CES 0 and no specificity, not specificity 0 or 1.",
            half_dead,
            spans([4, 4]),
        ),
    ]


def _linear(
    name: str,
    shows: str,
    weight: np.ndarray,
    groups: Groups,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Planted:
    latents = weight.shape[1]
    scale = 0.5 + 0.25 * np.arange(latents) if scale is None else scale
    return Planted(
        name=f"linear_{name}",
        shows=shows,
        decoder=dense(weight, bias),
        z=torch.from_numpy(eighths(9, 9, latents) * scale),
        scale=torch.from_numpy(scale),
        groups=groups,
        change=lambda z, i, shift: shift[..., None] * weight[:, i],
    )
