"""Planted ReLU decoders: a kink that each sample lies on a known side of, and a latent that gates another."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..groups import spans
from .circuit import Planted, dense, rise


def circuits() -> list[Planted]:
    """The ReLU circuits."""
    return [kink(), gate()]


def kink() -> Planted:
    """y = A (max(1 - z0, 0), max(z0 - 1, 0), z1 + 64): latent 0 moves one group left of 1 and another right of it.

    The third unit is on for every code and step used, so latent 1 is linear.
    """
    left, right, other = np.array([1.0, -0.5]), np.array([2.0, 1.0, 0.25]), np.array([0.5, -1.5])
    a = np.zeros((7, 3))
    a[:2, 0], a[2:5, 1], a[5:, 2] = left, right, other

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        x = z[:, i, None]
        units = [rise(-x, -shift, -1.0), rise(x, shift, 1.0), 0 * shift] if i == 0 else [0 * shift, 0 * shift, shift]
        parts = [unit[..., None] * weights for unit, weights in zip(units, (left, right, other), strict=True)]
        return np.concatenate(parts, -1)

    # far left, far right, and on both sides of the kink so near that steps cross it
    z = [[-6.0, 0.5], [-4.5, -2.0], [8.0, 1.0], [7.25, 0.0], [0.5, 3.0], [0.875, -1.0], [1.0, 0.25], [1.5, 0.0]]
    return Planted(
        name="relu_kink",
        shows="What a latent moves depends on the side of a kink: it moves one group left of it and another right.",
        decoder=nn.Sequential(
            dense(np.array([[-1.0, 0], [1, 0], [0, 1]]), np.array([1.0, -1, 64])), nn.ReLU(), dense(a)
        ),
        z=torch.tensor(z, dtype=torch.float64),
        scale=torch.tensor([1.0, 2.0], dtype=torch.float64),
        groups=spans([2, 3, 2], ["left", "right", "other"]),
        change=change,
    )


def gate() -> Planted:
    """y = (B max(max(b, 0) - 4 max(-a, 0), 0), max(-a, 0)): b reaches the first group only as far as a lets it.

    For a >= 0 the gate is open; below it closes, and at a = -b/4 it is shut. So as functions of a, with b > 0, the
    first unit is 4 max(a + b/4, 0) - 4 max(a, 0), and of b it is max(b - 4 max(-a, 0), 0).
    """
    out = np.array([1.0, -0.5, 2.0])

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        a, b = z[:, 0, None], z[:, 1, None]
        if i == 0:
            gated = np.where(b > 0, 4 * rise(a, shift, -b / 4) - 4 * rise(a, shift, 0.0), 0.0)
            closing = rise(-a, -shift, 0.0)
        else:
            gated = rise(b, shift, np.where(a < 0, -4 * a, 0.0))
            closing = 0 * shift
        return np.concatenate([gated[..., None] * out, closing[..., None]], -1)

    def interaction(z: np.ndarray, i: int, j: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        moved_a, moved_b = (first, second) if i == 0 else (second, first)
        a, b = z[:, 0, None], z[:, 1, None]

        def unit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.maximum(np.maximum(b, 0) - 4 * np.maximum(-a, 0), 0)

        more = unit(a + moved_a, b + moved_b) - unit(a + moved_a, b) - unit(a, b + moved_b) + unit(a, b)
        return np.concatenate([more[..., None] * out, 0 * more[..., None]], -1)

    # open, shut, half open, and b below zero where nothing can pass
    z = [[5.0, 2.0], [1.0, 4.0], [-5.0, 2.0], [-3.0, 1.0], [-0.25, 3.0], [-0.5, 2.5], [0.25, -1.0], [-1.0, -6.0]]
    return Planted(
        name="relu_gate",
        shows="One latent gates another: an interaction over two layers, so each effect depends on the other latent.",
        decoder=nn.Sequential(
            dense(np.array([[-1.0, 0], [0, 1]])),
            nn.ReLU(),
            dense(np.array([[-4.0, 1], [1, 0]])),
            nn.ReLU(),
            dense(np.array([[1.0, 0], [-0.5, 0], [2, 0], [0, 1]])),
        ),
        z=torch.tensor(z, dtype=torch.float64),
        scale=torch.tensor([0.5, 1.0], dtype=torch.float64),
        groups=spans([3, 1], ["gated", "gate"]),
        change=change,
        interaction=interaction,
    )
