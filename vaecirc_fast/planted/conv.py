"""Planted convolutional decoders: each latent draws a known kernel at a known place of the image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..groups import cells
from .circuit import Planted, dense, eighths, plant, rise

GRID, SIDE = 8, 16
KERNELS = eighths(5, 2, 4, 4)  # of the two channels of the grid

# (channel, row, column, weight) of the 8 x 8 grid that each latent writes to. Grid row r reaches image rows
# 2r - 1 ... 2r + 2, so rows 0-2 stay within the upper half, rows 5-7 within the lower.
PLACES = (
    ((0, 1, 1, 1.0), (1, 2, 0, -0.5)),
    ((1, 0, 6, 2.0),),
    ((0, 5, 0, 1.5),),
    ((0, 7, 7, 1.0), (1, 6, 5, 0.25)),
    ((1, 3, 4, 1.0),),  # image rows 5-8 and columns 7-10: all four quadrants
)


def circuits() -> list[Planted]:
    """The convolutional circuits."""
    return [quadrants(), thresholds()]


def quadrants() -> Planted:
    """A linear decoder: a shift d of a latent adds d times its picture."""
    pictures = np.stack([_picture(places) for places in PLACES])

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        return shift[..., None] * pictures[i]

    return _planted(
        "conv_quadrants",
        "Four latents draw in one quadrant each, some cut by the border; a fifth draws over all four.",
        _decoder([], 0.0),
        change,
    )


def thresholds() -> Planted:
    """A ReLU on the grid: a place of weight w holds max(w z - 1/2, 0)."""

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        x = z[:, i, None]
        drawn = [
            rise(weight * x, weight * shift, 0.5)[..., None] * _picture([(channel, row, column, 1.0)])
            for channel, row, column, weight in PLACES[i]
        ]
        return np.sum(drawn, axis=0)

    return _planted(
        "conv_relu",
        "The same through a ReLU on the grid: a latent draws only from a threshold on.",
        _decoder([("relu", nn.ReLU())], -0.5),
        change,
    )


def _planted(name: str, shows: str, decoder: nn.Module, change: Callable[..., np.ndarray]) -> Planted:
    return Planted(
        name=name,
        shows=shows,
        decoder=decoder,
        z=torch.from_numpy(eighths(6, 8, len(PLACES))),
        scale=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.75], dtype=torch.float64),
        groups=cells(SIDE, SIDE, SIDE // 2),
        change=change,
    )


def _picture(places: Sequence[tuple[int, int, int, float]]) -> np.ndarray:
    """What the kernels, transposed-convolved with stride 2 and padding 1, draw for `places`: (256,), row-major."""
    image = np.zeros((SIDE, SIDE))
    for channel, row, column, weight in places:
        for r in range(4):
            for c in range(4):
                y, x = 2 * row - 1 + r, 2 * column - 1 + c
                if 0 <= y < SIDE and 0 <= x < SIDE:
                    image[y, x] += weight * KERNELS[channel, r, c]
    return image.ravel()


def _decoder(between: list[tuple[str, nn.Module]], bias: float) -> nn.Sequential:
    weight = np.zeros((2, GRID, GRID, len(PLACES)))
    for i, places in enumerate(PLACES):
        for channel, row, column, value in places:
            weight[channel, row, column, i] = value
    weight = weight.reshape(-1, len(PLACES))
    ct = nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1, dtype=torch.float64)
    plant(ct, KERNELS[:, None], np.array([0.25]))
    return nn.Sequential(
        OrderedDict(
            [
                ("fc", dense(weight, np.full(len(weight), bias))),
                ("grid", nn.Unflatten(1, (2, GRID, GRID))),
                *between,
                ("ct", ct),
            ]
        )
    )
