"""DCI: disentanglement, completeness and informativeness, from the importance of latents to boosted trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from .splits import Split, split_samples
from .statistics import FEW, Estimate, percentile_interval, resampled_interval, resampling_weights

if TYPE_CHECKING:
    import pandas


class DisentanglementCompleteness(NamedTuple):
    """Of a matrix latents x factors: both scores in [0, 1], of each latent (L,) and of each factor (K,)."""

    disentanglement: float
    completeness: float
    per_latent: np.ndarray
    per_factor: np.ndarray


@dataclass(frozen=True)
class Dci:
    """The three scores and what they come from.

    `disentanglement`, `completeness` in [0, 1]; `informativeness` the accuracy on test samples, `train_accuracy` that
    on training samples, means over factors. `importance` (L, K): latents x factors, columns of sum 1 (0 where no split
    was found). `per_latent` (L,) and `per_factor` (K,) are what the scores are weighted means of; `accuracy` and
    `accuracy_train` by factor. `names` are the factors, `dropped` those of one value, `split` says which samples.
    `estimates`: the scores with their intervals; informativeness resamples test samples, the others training samples
    (where replicates were asked for).
    """

    disentanglement: float
    completeness: float
    informativeness: float
    train_accuracy: float
    importance: np.ndarray
    per_latent: np.ndarray
    per_factor: np.ndarray
    accuracy: dict[str, float]
    accuracy_train: dict[str, float]
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    split: str
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def to_dataframe(self) -> pandas.DataFrame:
        """The importance, latents x factors."""
        import pandas

        return pandas.DataFrame(self.importance, columns=list(self.names)).rename_axis("latent")

    def __str__(self) -> str:
        lines = [f"{name} {_shown(estimate)}" for name, estimate in self.estimates.items()]
        lines.append(f"accuracy on training samples {self.train_accuracy:.4g}")
        lines.append(self.split)
        if self.dropped:
            lines.append(f"left out, one value: {', '.join(self.dropped)}")
        return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} (no interval asked for)" if math.isnan(estimate.low) else str(estimate)


def dci(
    codes: Any,
    factors: Any,
    *,
    train: int = 10_000,
    test: int = 5_000,
    seed: int = 0,
    factor_names: Sequence[str] | None = None,
    codes_test: Any = None,
    factors_test: Any = None,
    replicates: int = 0,
    level: float = 0.95,
) -> Dci:
    """Disentanglement, completeness, informativeness of codes: how boosted trees predict each factor from them.

    `codes` (N, L) numbers, the encoder means; `factors` (N, K) integers, any ids; tensors or arrays. `train` and `test`
    of the samples are drawn by `seed`; of fewer samples 2/3 and 1/3, which `split` of the result says. Samples of one's
    own to test on: `codes_test`, `factors_test`. One-valued factors are left out and named in `dropped`.

    Trees are those of the op `boosted_importance`, scikit-learn's GradientBoostingClassifier with its defaults. Of the
    importance R, `disentanglement_completeness` gives the scores.

    Intervals: of informativeness over test samples, the trees as they are; of disentanglement and completeness by
    refitting on `replicates` random halves of the training samples, centred on the value (halves, drawn without
    replacement, vary about as much as samples of the full size do, and have no repeated codes). 100 replicates take
    fifty times as long as the value. `replicates=0` leaves those two out (nan).

    Source: Eastwood and Williams 2018; protocol of google-research/disentanglement_lib's `dci.py`.
    Raises InputError on wrong shapes, unequal N, fewer than 3 samples, NaN or codes beyond float32, factors that are
    not integers, names that do not fit, or no factor that varies among the training samples.
    """
    if isinstance(replicates, bool) or not isinstance(replicates, int | np.integer) or replicates < 0:
        raise InputError(f"replicates: expected a whole number >= 0, got {replicates!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")
    data = split_samples(codes, factors, train, test, seed, factor_names, codes_test, factors_test)
    boosted = ops.boosted_importance(*map(torch.from_numpy, (data.codes, data.levels, data.codes_test)), seed=int(seed))
    importance = boosted.importance.numpy()
    scores = disentanglement_completeness(importance)
    hits_train, hits = boosted.fitted.numpy() == data.levels, boosted.predicted.numpy() == data.levels_test

    informativeness = _accuracy(hits, seed, level)
    refitted = np.array([_refitted(data, seed, r) for r in range(replicates)]).reshape(-1, 2)
    estimates = {}
    for name, value, drawn in zip(("disentanglement", "completeness"), scores[:2], refitted.T, strict=True):
        low, high = percentile_interval(drawn, level, centre=value) if len(drawn) else (math.nan, math.nan)
        estimates[name] = Estimate(value, low, high, level, "", "training samples", len(data.codes))
    return Dci(
        *(scores.disentanglement, scores.completeness, informativeness.value, float(hits_train.mean())),
        *(importance, scores.per_latent, scores.per_factor),
        accuracy=dict(zip(data.names, hits.mean(0).tolist(), strict=True)),
        accuracy_train=dict(zip(data.names, hits_train.mean(0).tolist(), strict=True)),
        names=data.names,
        dropped=data.dropped,
        split=data.text,
        estimates={**estimates, "informativeness": informativeness},
    )


def disentanglement_completeness(matrix: Any) -> DisentanglementCompleteness:
    """D and C of a matrix (L, K) of how much latent i has to do with factor k: numbers >= 0, importances or effects.

        D_i = 1 - H(R_i. / sum_k R_ik) / log K,   D = sum_i D_i sum_k R_ik / sum R
        C_k = 1 - H(R_.k / sum_i R_ik) / log L,   C = sum_k C_k sum_i R_ik / sum R

    1 where each latent has to do with one factor only (D), each factor with one latent only (C); 0 where all are alike.
    A row or column of zeros has score 0 and no weight; a matrix of zeros has D = C = 0. With one factor D is 1, with
    one latent C is. Raises InputError on another shape, no entries, and numbers that are negative or not finite.
    """
    array = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
        raise InputError(f"matrix: expected numbers of shape (L, K), got {array.dtype} {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError("matrix: expected finite numbers >= 0")
    largest = array.max()
    if largest > 0:
        array = array / largest  # sums of huge entries would overflow
    (per_latent, d), (per_factor, c) = _scores(array), _scores(array.T)
    return DisentanglementCompleteness(d, c, per_latent, per_factor)


def _scores(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """1 - entropy of each row, base its length, and their mean by the rows' mass."""
    from scipy.special import xlogy

    mass = rows.sum(1)
    shares = rows / np.where(mass > 0, mass, 1)[:, None]
    base = math.log(rows.shape[1]) if rows.shape[1] > 1 else 1.0
    scores = np.where(mass > 0, (1 + xlogy(shares, shares).sum(1) / base).clip(0, 1), 0)
    return scores, float(scores @ mass / mass.sum()) if mass.sum() > 0 else 0.0


def _accuracy(hits: np.ndarray, seed: int, level: float, replicates: int = 200) -> Estimate:
    """Mean over factors of the accuracy, `hits` (T, K), with its interval over test samples."""
    n, value = len(hits), float(hits.mean())
    weights = resampling_weights(replicates, n, int(seed)).double().numpy()
    mass = weights.sum(1)
    drawn = (weights @ hits.mean(1))[mass > 0] / mass[mass > 0]
    if n >= FEW:
        low, high = percentile_interval(drawn, level)
    else:
        low, high = resampled_interval(value, drawn, n, level)
    return Estimate(value, low, high, level, "", "test samples", n)


def _refitted(data: Split, seed: int, replicate: int) -> tuple[float, float]:
    """D and C of trees fitted to a random half of the training samples."""
    n = len(data.codes)
    half = np.random.default_rng((int(seed), replicate)).permutation(n)[: max(2, n // 2)]
    codes, levels = data.codes[half], data.levels[half]
    importance = np.zeros((codes.shape[1], levels.shape[1]))
    varies = (levels != levels[:1]).any(0)
    if varies.any():
        trees = ops.boosted_importance(torch.from_numpy(codes), torch.from_numpy(levels[:, varies]), seed=replicate)
        importance[:, varies] = trees.importance.numpy()
    scores = disentanglement_completeness(importance)
    return scores.disentanglement, scores.completeness
