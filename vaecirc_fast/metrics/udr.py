"""Unsupervised disentanglement ranking (UDR): a model is disentangled if other models agree with its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import checked_codes
from .score import deviations, moderate
from .statistics import Estimate

METHODS = ("lasso", "spearman")
INFORMATIVE = 0.01  # nats of KL above which a latent takes part
_ALPHA = 0.1  # penalty of the lasso


@dataclass(frozen=True)
class Udr:
    """`scores`: an `Estimate` in [0, 1] for each model, in the order given; `pairwise` (M, M): UDR_ij, the diagonal 0;
    `relations` by (i, j): R (V_i, V_j) of their informative latents; `informative`: the numbers of those latents, for
    each model."""

    scores: tuple[Estimate, ...]
    pairwise: np.ndarray = field(repr=False)
    relations: dict[tuple[int, int], np.ndarray] = field(repr=False)
    informative: tuple[tuple[int, ...], ...] = ()


def udr(codes: Sequence[Any], kl: Sequence[Any] | None = None, *, method: str = "lasso", level: float = 0.95) -> Udr:
    """UDR of each of several models (other seeds of one setting) from their codes of the same inputs; in [0, 1].

    `codes`: M >= 2 arrays or tensors (N, L_m), row n of all of them the codes of one input; N >= 2. `kl`: the
    mean KL of each model's latents from their prior (L_m,), in nats; latents at or below 0.01 are not informative
    and take no part. Without `kl` every latent that varies does. R[a, b] >= 0 relates latents a and b of two models:

        "lasso"     |weight of a| when b is predicted from all a by the lasso (alpha = 0.1), both standardised
        "spearman"  |Spearman's rank correlation|
        UDR_ij = (sum over b of max_a R^2 / sum_a R + sum over a of max_b R^2 / sum_b R) / (d_i + d_j)

    with a of model i, b of model j and d their numbers of informative latents; a latent that nothing answers to adds 0.
    The score of model j is the median of UDR_ij over the other models i: for "lasso" they predict it. Its interval
    resamples those: order statistics of a median, [0, 1] below the 6 others that 95 % takes.

    Source: Duan et al. 2020 (arXiv 1905.12614), its equation for UDR; directions, penalty and threshold as in
    google-research/disentanglement_lib, which averages each of the two sums by its own d instead: the same where both
    models have as many informative latents. Raises InputError for fewer than two models, unequal N, wrong shapes, NaN
    or infinite codes, negative KL, or another method.
    """
    if method not in METHODS:
        raise InputError(f"method: expected 'lasso' or 'spearman', got {method!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")
    arrays = [moderate(checked_codes(c)) for c in codes]
    if len(arrays) < 2 or len({len(a) for a in arrays}) != 1 or len(arrays[0]) < 2:
        raise InputError(
            f"codes: expected at least two models with the codes of the same N >= 2 inputs, got {len(arrays)} models "
            f"with N = {sorted({len(a) for a in arrays})}"
        )
    informative = tuple(_informative(a, kl, m, len(arrays)) for m, a in enumerate(arrays))
    z = [_standardised(a[:, list(kept)], method) for a, kept in zip(arrays, informative, strict=True)]
    models = len(z)
    pairwise, relations = np.zeros((models, models)), {}
    for i in range(models):
        for j in range(models):
            if i != j:
                relations[i, j] = _relation(z[i], z[j], method)
                pairwise[i, j] = relative_strength(relations[i, j])
    scores = tuple(_median(np.delete(pairwise[:, j], j), level) for j in range(models))
    return Udr(scores, pairwise, relations, informative)


def relative_strength(relation: np.ndarray) -> float:
    """How near R (A, B) >= 0 is to one latent for one latent, in [0, 1] where R <= 1; 0 without latents."""
    if 0 in relation.shape:
        return 0.0
    total = 0.0
    for axis in (0, 1):
        largest, whole = relation.max(axis), relation.sum(axis)
        total += float(np.divide(largest * largest, whole, out=np.zeros_like(whole), where=whole > 0).sum())
    return total / sum(relation.shape)


def _informative(codes: np.ndarray, kl: Sequence[Any] | None, m: int, models: int) -> tuple[int, ...]:
    varies = codes.min(0) < codes.max(0)
    if kl is not None:
        if len(kl) != models:
            raise InputError(f"kl: expected one array for each of the {models} models, got {len(kl)}")
        nats = checked_codes(np.atleast_2d(np.asarray(kl[m])))[0]
        if nats.shape != (codes.shape[1],) or (nats < 0).any():
            raise InputError(f"kl: expected {codes.shape[1]} numbers >= 0 for model {m}, got {np.shape(kl[m])}")
        varies &= nats > INFORMATIVE
    return tuple(np.flatnonzero(varies).tolist())


def _standardised(codes: np.ndarray, method: str) -> np.ndarray:
    from scipy import stats

    if method == "spearman":
        codes = stats.rankdata(codes, axis=0)
    return (codes - codes.mean(0)) / (deviations(codes) * (1 - 1 / len(codes)) ** 0.5)


def _relation(x: np.ndarray, y: np.ndarray, method: str) -> np.ndarray:
    """R (V_x, V_y) of two models' standardised informative latents."""
    if 0 in (x.shape[1], y.shape[1]):
        return np.zeros((x.shape[1], y.shape[1]))
    if method == "spearman":
        return np.minimum(np.abs(x.T @ y) / len(x), 1)
    from sklearn.linear_model import Lasso

    return np.abs(Lasso(alpha=_ALPHA, precompute=True).fit(x, y).coef_).reshape(y.shape[1], x.shape[1]).T


def _median(values: np.ndarray, level: float) -> Estimate:
    """Median of the UDR with each other model, and the order statistics that hold the population's with `level`."""
    from scipy import stats

    ordered, n = np.sort(values), len(values)
    # P(at most r of n lie below the median) <= (1 - level) / 2
    outside = int(stats.binom.ppf((1 - level) / 2, n, 0.5)) - 1
    low, high = (ordered[outside], ordered[-1 - outside]) if outside >= 0 else (0.0, max(1.0, ordered[-1]))
    return Estimate(float(np.median(values)), float(low), float(high), level, "", "other models", n)
