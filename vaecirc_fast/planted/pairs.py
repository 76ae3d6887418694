"""Planted decoders in which two latents act together: a product and an AND, beside latents that act alone."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

from ..groups import spans
from .circuit import Planted, dense, eighths, rise


class Product(nn.Module):
    """(N, L) -> (N, L - 1): the product of the first two columns, then the others as they are."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z[:, :1] * z[:, 1:2], z[:, 2:]], 1)


def circuits() -> list[Planted]:
    """The circuits whose latents interact in pairs."""
    return [product(), both()]


def product() -> Planted:
    """y = W (z0 z1, z2): moving latent 0 by d and latent 1 by e adds W[:, 0] d e to what each does alone."""
    weight = eighths(15, 7, 2)
    weight[3:, 0], weight[:2, 1] = 0, 0

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        moved = shift if i == 2 else shift * z[:, 1 - i, None]
        return moved[..., None] * weight[:, int(i == 2)]

    def interaction(z: np.ndarray, i: int, j: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first * second * (i + j == 1))[..., None] * weight[:, 0]

    return Planted(
        name="product",
        shows="The product of two latents, and a third that acts alone: one pair interacts and no other.",
        decoder=nn.Sequential(OrderedDict(product=Product(), fc=dense(weight, eighths(16, 7)))),
        z=torch.from_numpy(eighths(17, 9, 3)),
        scale=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64),
        groups=spans([2, 2, 3], ["product", "shared", "alone"]),
        change=change,
        interaction=interaction,
    )


def both() -> Planted:
    """y = A (max(z0 + z1 - 1, 0), max(z2, 0)): the first group moves only where latents 0 and 1 together pass 1."""
    weight = np.zeros((4, 2))
    weight[:2, 0], weight[2:, 1] = [1.0, -0.5], [2.0, 0.25]

    def unit(z: np.ndarray, moved: np.ndarray) -> np.ndarray:
        return rise(z[:, 0, None] + z[:, 1, None], moved, 1.0)

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        units = [0 * shift, rise(z[:, 2, None], shift)] if i == 2 else [unit(z, shift), 0 * shift]
        return np.stack(units, -1) @ weight.T

    def interaction(z: np.ndarray, i: int, j: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        more = unit(z, first + second) - unit(z, first) - unit(z, second)
        return (more * (i + j == 1))[..., None] * weight[:, 0]

    # off, on, and at the threshold, each from both sides
    z = [
        [0.0, 0, 1],
        [1, 1, -1],
        [0.5, 0.5, 0.5],
        [-1, 1, 0],
        [2, -0.5, 0.25],
        [-0.5, 2.5, -0.25],
        [3, 3, 4],
        [-3, -3, -4],
    ]
    return Planted(
        name="and",
        shows="An AND of two latents: each alone does little below the threshold, both together pass it.",
        decoder=nn.Sequential(
            OrderedDict(
                fc=dense(np.array([[1.0, 1, 0], [0, 0, 1]]), np.array([-1.0, 0])), relu=nn.ReLU(), out=dense(weight)
            )
        ),
        z=torch.tensor(z, dtype=torch.float64),
        scale=torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64),
        groups=spans([2, 2], ["and", "alone"]),
        change=change,
        interaction=interaction,
    )
