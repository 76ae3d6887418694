"""Planted convolutional decoders: each latent draws a known kernel at a known place of the image."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from ..groups import cells
from .circuit import Planted, dense, eighths, planted_in, rise

GRID, SIDE = 8, 16
KERNELS = eighths(5, 2, 4, 4)  # of the two channels of the grid

# (channel, row, column, weight) of the 8 x 8 grid that each latent writes to. Grid row r reaches image rows
# 2r - 1 ... 2r + 2, so rows 0-2 stay within the upper half, rows 5-7 within the lower.
PLACES = (
    ((0, 1, 1, 1.0), (1, 2, 0, -0.5)),
    ((1, 1, 6, 2.0),),
    ((0, 5, 0, 1.5),),
    ((0, 7, 7, 1.0), (1, 6, 5, 0.25)),
    ((1, 3, 4, 1.0),),  # image rows 5-8 and columns 7-10: all four quadrants
)


def circuits() -> list[Planted]:
    """The convolutional circuits."""
    pictures = np.stack([_picture(places) for places in PLACES])
    scale = np.array([1.0, 0.5, 2.0, 1.0, 0.75])
    bias = -0.5

    def drawn(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        return shift[..., None] * pictures[i]

    def drawn_where_positive(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        x = z[:, i, None]
        return sum(
            rise(weight * x, weight * shift, -bias)[..., None] * _picture([(channel, row, column, 1.0)])
            for channel, row, column, weight in PLACES[i]
        )

    common = dict(
        z=torch.from_numpy(eighths(6, 8, len(PLACES))),
        scale=torch.from_numpy(scale),
        groups=cells(SIDE, SIDE, SIDE // 2),
    )
    return [
        Planted(
            name="conv_quadrants",
            shows="Four latents draw in one quadrant each, some cut by the border; a fifth draws over all four.",
            decoder=_decoder([], 0.0),
            change=drawn,
            **common,
        ),
        Planted(
            name="conv_relu",
            shows="The same through a ReLU on the grid: a latent draws only from a threshold on.",
            decoder=_decoder([("relu", nn.ReLU())], bias),
            change=drawn_where_positive,
            **common,
        ),
    ]


def _picture(places) -> np.ndarray:
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
    return nn.Sequential(
        OrderedDict(
            [
                ("fc", dense(weight, np.full(len(weight), bias))),
                ("grid", nn.Unflatten(1, (2, GRID, GRID))),
                *between,
                ("ct", planted_in(ct, KERNELS[:, None], np.array([0.25]))),
            ]
        )
    )
