"""A planted decoder of categorical columns: shifts of logits tilt probabilities, p_j -> p_j e^(w_j d) / sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..groups import spans
from .circuit import Planted, dense, eighths

SIZES = (3, 4)


class SoftmaxSpans(nn.Module):
    """Softmax over each of the consecutive spans of the last axis."""

    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self.sizes = sizes

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (..., sum of sizes) to probabilities of the same shape."""
        return torch.cat([part.softmax(-1) for part in logits.split(self.sizes, -1)], -1)


def circuits() -> list[Planted]:
    """The categorical circuit."""
    weight = np.array(
        [
            [0.0, 0.0, 1.0, 0.5],
            [2.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 1.0, -1.0],
            [0.0, 1.0, 0.0, 0.0],
            [0.0, -1.0, 0.0, 0.0],
            [0.0, 0.5, 0.0, 0.0],
            [0.0, 0.0, 0.0, 1.5],
        ]
    )
    bias = eighths(7, 7, span=1)

    def change(z: np.ndarray, i: int, shift: np.ndarray) -> np.ndarray:
        odds = np.exp(z @ weight.T + bias)
        parts = []
        for span in (slice(0, 3), slice(3, 7)):
            p = (odds[:, span] / odds[:, span].sum(-1, keepdims=True))[:, None]
            w = weight[span, i]
            # relative to the first category, so that a shift of the whole span is exactly no tilt
            tilt = np.exp((w - w[0]) * shift[..., None])
            parts.append(p * (tilt / (p * tilt).sum(-1, keepdims=True) - 1) if (w != w[0]).any() else 0 * p * tilt)
        return np.concatenate(parts, -1)

    def interaction(z: np.ndarray, i: int, j: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        parts = []
        for span in (slice(0, 3), slice(3, 7)):
            odds = np.exp(z @ weight[span].T + bias[span])[:, None]
            tilts = [np.exp(weight[span, k] * shift[..., None]) for k, shift in ((i, first), (j, second))]

            def shares(tilt: np.ndarray | float, odds: np.ndarray = odds) -> np.ndarray:
                return odds * tilt / (odds * tilt).sum(-1, keepdims=True)

            parts.append(shares(tilts[0] * tilts[1]) - shares(tilts[0]) - shares(tilts[1]) + shares(1.0))
        return np.concatenate(parts, -1)

    return [
        Planted(
            name="softmax_spans",
            shows="Two categorical columns: latents tilt one or both; one adds the same to all logits of one: nothing.",
            decoder=nn.Sequential(dense(weight, bias), SoftmaxSpans(SIZES)),
            z=torch.from_numpy(eighths(8, 8, 4, span=1)),
            scale=torch.tensor([0.5, 1.0, 1.0, 0.25], dtype=torch.float64),
            groups=spans(SIZES),
            change=change,
            effect="tv",
            interaction=interaction,
        )
    ]
