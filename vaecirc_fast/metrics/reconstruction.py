"""Whether a model reconstructs: its error an image against the error of drawing the mean image every time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .statistics import Estimate, resampled_interval, resampling_weights

TRAINED_RATIO = 0.5
TRAINED_LATENTS = 3
_CLAMP = 1e-7  # keeps log finite where a float32 probability saturates: at most 16.1 nats a pixel
_ROWS = 1 << 16

Likelihood = Literal["bernoulli", "squared_error"]


@dataclass(frozen=True)
class ReconstructionReport:
    """What `reconstruction_report` found.

    `loss`, `mean_image_loss`: means over images, in the loss's unit (nats for Bernoulli); `floor` the mean loss of a
    perfect reconstruction; `ratio` = (loss - floor) / (mean_image_loss - floor), which decides; `raw_ratio` without the
    floor; `active` the number of active latents, None when not given; `trained` the verdict.
    """

    loss: Estimate
    mean_image_loss: Estimate
    floor: float
    ratio: Estimate
    raw_ratio: Estimate
    active: int | None
    trained: bool

    def __str__(self) -> str:
        active = "" if self.active is None else f", {self.active} active latents"
        return (
            f"reconstruction {self.loss.value:.4g} against {self.mean_image_loss.value:.4g} of the mean image "
            f"(floor {self.floor:.4g}): {self.ratio.value:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}] of the "
            f"reducible loss, raw {self.raw_ratio.value:.3f}{active}: {'trained' if self.trained else 'not trained'}"
        )


def reconstruction_loss(
    x: Tensor, reconstruction: Tensor, likelihood: Likelihood = "bernoulli", logits: bool = False
) -> Tensor:
    """Loss of each image, summed over its elements: (N,) float64.

    `x` (N, ...) with values in [0, 1] for "bernoulli"; `reconstruction` the same shape, or one image's (...) for all N.
    "bernoulli": -sum x log p + (1 - x) log(1 - p) in nats, from probabilities p, clamped to [1e-7, 1 - 1e-7], or from
    `logits` exactly; "squared_error": sum (x - y)^2. Raises InputError on other shapes, values outside, or NaN.
    """
    x, y = torch.as_tensor(x).detach(), torch.as_tensor(reconstruction).detach()
    if x.ndim < 2 or x.is_complex() or (y.shape != x.shape and y.shape != x.shape[1:]):
        raise InputError(
            f"reconstruction: expected the shape of x, {tuple(x.shape)}, or of one image of it, got {tuple(y.shape)}"
        )
    if likelihood not in ("bernoulli", "squared_error"):
        raise InputError(f"likelihood: expected 'bernoulli' or 'squared_error', got {likelihood!r}")
    if logits and likelihood != "bernoulli":
        raise InputError("logits: only the Bernoulli likelihood has them")
    x, y = x.double(), y.double().to(x.device)
    if likelihood == "bernoulli":
        _within_unit("x", x)
        if logits:
            y = y.expand_as(x)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(y, x, reduction="none")
        else:
            _within_unit("reconstruction", y)
            y = y.clamp(_CLAMP, 1 - _CLAMP)
            loss = -(torch.xlogy(x, y) + torch.xlogy(1 - x, 1 - y))
    else:
        loss = (x - y).square()
    loss = loss.flatten(1).sum(1)
    if not loss.isfinite().all():
        raise InputError("reconstruction: expected finite numbers, got NaN or infinity (in x or in it)")
    return loss


def mean_image_loss(x: Tensor, mean_image: Tensor | None = None, likelihood: Likelihood = "bernoulli") -> Tensor:
    """Loss (N,) float64 of answering every image of `x` (N, ...) with `mean_image` (...), by default x's own mean.

    The mean image is the best constant answer under both likelihoods. Errors as `reconstruction_loss`.
    """
    return reconstruction_loss(x, torch.as_tensor(x).double().mean(0) if mean_image is None else mean_image, likelihood)


def loss_floor(x: Tensor, likelihood: Likelihood = "bernoulli") -> Tensor:
    """Loss (N,) float64 of a perfect reconstruction of `x` (N, ...), which no model goes below.

    0 for squared error and for binary images; for grey ones the Bernoulli loss of p = x, the pixels' binary entropy.
    """
    if likelihood == "bernoulli":
        x = torch.as_tensor(x).detach().double()
        _within_unit("x", x)
        return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).flatten(1).sum(1)
    return reconstruction_loss(x, x, likelihood)


def reconstruction_report(
    loss_per_image: Any,
    mean_image_loss_per_image: Any,
    floor_per_image: Any = None,
    active: int | None = None,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> ReconstructionReport:
    """Compare a model's loss with the mean image's and say whether the model has been trained.

    `loss_per_image`, `mean_image_loss_per_image`, `floor_per_image` (N,) numbers in one unit; floor None is 0 (binary
    images, squared error). `active`: number of active latents, if known. The intervals resample images (Poisson
    bootstrap), all losses together, as the images are the same.

    Trained: ratio <= 1/2 and, where `active` is given, at least 3 active latents. The ratio is that of reducible
    losses, (loss - floor) / (mean image's - floor), and not of the losses themselves: the Bernoulli loss of grey images
    contains the entropy of their pixel values, which no reconstruction removes. Where that floor is most of the loss, a
    perfect model would stay above one half of the mean image's raw loss for ever. What remains is the Kullback-Leibler
    divergence from the image to its reconstruction. For binary images the two ratios are the same.
    Where the mean image leaves nothing to reduce (all images equal) the ratio is undefined (nan): not trained.
    Raises InputError on shapes, NaN or infinity, or a mean-image loss below the floor.
    """
    per_image = _losses("loss_per_image", loss_per_image)
    n = len(per_image)
    mean_image = _losses("mean_image_loss_per_image", mean_image_loss_per_image, n)
    floors = np.zeros(n) if floor_per_image is None else _losses("floor_per_image", floor_per_image, n)
    table = np.stack([per_image, mean_image, floors], 1)
    loss, constant, floor = (float(m) for m in table.mean(0))
    # the floor of equal images is their mean image's loss, up to rounding
    slack = 1e-9 * max(abs(constant), abs(floor))
    if constant < floor - slack:
        raise InputError(
            f"floor_per_image: expected at most the mean image's loss, got {floor:.6g} against {constant:.6g}"
        )
    drawn = _resampled_means(table, replicates, seed)

    def estimate(value: float, replicated: np.ndarray) -> Estimate:
        return Estimate(value, *resampled_interval(value, replicated, n, level), level, resampled="images", n=n)

    reducible = constant - floor > slack
    ratio = (loss - floor) / (constant - floor) if reducible else math.nan
    raw = loss / constant if constant else math.nan
    return ReconstructionReport(
        loss=estimate(loss, drawn[:, 0]),
        mean_image_loss=estimate(constant, drawn[:, 1]),
        floor=floor,
        ratio=estimate(ratio, _quotient(drawn[:, 0] - drawn[:, 2], drawn[:, 1] - drawn[:, 2])),
        raw_ratio=estimate(raw, _quotient(drawn[:, 0], drawn[:, 1])),
        active=active,
        trained=ratio <= TRAINED_RATIO and (active is None or active >= TRAINED_LATENTS),
    )


def _resampled_means(table: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Weighted column means of `table` (N, C) in each replicate: (R, C)."""
    n = len(table)
    sums = weight = 0.0
    for start in range(0, n, _ROWS):
        part = table[start : start + _ROWS]
        weights = resampling_weights(replicates, len(part), seed, start, n).double().numpy()
        sums, weight = sums + weights @ part, weight + weights.sum(1, keepdims=True)
    return _quotient(sums, weight)


def _quotient(a: Any, b: Any) -> np.ndarray:
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def _losses(name: str, x: Any, n: int | None = None) -> np.ndarray:
    array = np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or len(array) != (n or len(array)) or not np.isfinite(array).all():
        expected = f"({n},), as many as losses" if n else "(N,), N >= 1"
        raise InputError(f"{name}: expected finite numbers of shape {expected}, got shape {array.shape}")
    return array


def _within_unit(name: str, x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError(f"{name}: expected values in [0, 1], got {float(x.min()):.4g} to {float(x.max()):.4g}")
