"""Mutual information of binned codes with factors and with each other: modularity and mean pairwise information."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops.histogram_mi import cut, histogram_mi
from .labelled import checked_codes, labelled
from .score import WHOLE, Score, centred_interval, sample_weights, whole
from .statistics import resampling_weights

BINS = 20
_SAMPLES = 1 << 16  # whose bootstrap weights are made at once
_WEIGHTS = 1 << 26  # counted at once


@dataclass(frozen=True)
class Modularity(Score):
    """`Score` in [0, 1]. `per_latent` (L,): the modularity of each, 0 for one that tells nothing; `information` (L, K):
    mutual information in nats; `factors`: the names of its columns."""

    per_latent: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    information: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False, compare=False)
    factors: tuple[str, ...] = ()


def modularity(
    codes: Any,
    factors: Any = None,
    *,
    exact: bool = False,
    bins: int = BINS,
    factor_names: Sequence[str] | None = None,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Modularity:
    """Modularity: whether each latent tells of one factor only. Mean over latents, in [0, 1].

        m_i = 1 - sum over k other than the best of I(z_i; v_k)^2 / ((K - 1) max_k I(z_i; v_k)^2)

    `codes` (N, L) numbers and `factors` (N, K) integers, tensors or arrays; latents in `bins` equal-width bins as for
    `mig`. A latent without any information counts 0, as in the reference protocol. The interval is a Poisson bootstrap
    over samples with the bins fixed, centred on the value as `mig`'s; `replicates=0` leaves it out (nan); `exact` says
    that the rows are the whole grid: the interval is then a point.

    Source: Ridgeway & Mozer 2018 (arXiv 1802.05312) as google-research/disentanglement_lib computes it. Raises
    InputError as `mig` does, and for fewer than two factors that vary.
    """
    data = labelled(codes, factors, factor_names)
    bins, replicates = whole("bins", bins, 1), whole("replicates", replicates, 0)
    if len(data.names) < 2:
        raise InputError(f"factors: modularity needs two that vary, got only {', '.join(data.names)}")
    n = len(data.codes)
    binned, levels = cut(torch.from_numpy(data.codes), bins), torch.from_numpy(data.levels)
    information = histogram_mi(binned, levels, bins).information.numpy()
    per_latent = _modularities(information)
    value = float(per_latent.mean())
    facts = {"per_latent": per_latent, "information": information, "factors": data.names, "dropped": data.dropped}
    if exact:
        return Modularity(value, value, value, level, "", WHOLE, n, **facts)
    drawn = np.empty(0)
    if replicates and n > 1:
        parts = (histogram_mi(binned, levels, bins, weights=w) for w in resamples(n, replicates, seed))
        drawn = _modularities(torch.cat([part.information for part in parts]).numpy()).mean(-1)
    low, high = centred_interval(value, drawn, n, level)
    return Modularity(value, max(low, 0.0), min(high, 1.0), level, "", "samples", n, **facts)


def _modularities(information: np.ndarray) -> np.ndarray:
    """(..., L, K) -> (..., L)."""
    square = np.square(information)
    best = square.max(-1)
    rest = (square.sum(-1) - best) / (square.shape[-1] - 1)
    share = np.divide(rest, best, out=np.ones_like(best), where=best > 0)
    return 1 - share


def mean_pairwise_mi(
    codes: Any,
    *,
    exact: bool = False,
    bins: int = BINS,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Score:
    """Mean over pairs of latents of their mutual information, in nats: how much they tell of each other.

    `codes` (N, L >= 2) numbers, tensor or array, in `bins` equal-width bins as for `mig`. Counts of N samples in
    bins^2 cells tell something even of independent latents, about (bins - 1)^2 / 2 N nats. Interval, `replicates` and
    `exact` as for `modularity`. Source: disentanglement_lib, `unsupervised_metrics`, `mutual_info_score`.
    Raises InputError for wrong shapes, no samples, NaN or infinite codes, or a single latent.
    """
    numbers = checked_codes(codes)
    bins, replicates = whole("bins", bins, 1), whole("replicates", replicates, 0)
    n, latents = numbers.shape
    if latents < 2:
        raise InputError("codes: expected at least two latents, to pair them, got 1")
    binned = cut(torch.from_numpy(numbers), bins)
    value = float(_mean_of_pairs(binned, bins, None))
    if exact:
        return Score(value, value, value, level, "nats", WHOLE, n)
    drawn = np.empty(0)
    if replicates and n > 1:
        parts = [_mean_of_pairs(binned, bins, weights) for weights in resamples(n, replicates, seed)]
        drawn = torch.cat(parts).numpy()
    low, high = centred_interval(value, drawn, n, level)
    return Score(value, max(low, 0.0), high, level, "nats", "samples", n)


def _mean_of_pairs(binned: Tensor, bins: int, weights: Tensor | None) -> Tensor:
    """Of each resample (R,), or one number."""
    between = histogram_mi(binned, None, bins, weights=weights, pairs=True).between
    assert between is not None
    first, second = torch.tril_indices(binned.shape[1], binned.shape[1], -1)
    return between[..., first, second].mean(-1)


def resamples(n: int, replicates: int, seed: int) -> Iterator[Tensor]:
    """The weights of `resampling_weights` as `histogram_mi` takes them, uint8 (R, n), so many rows at once."""
    if n <= _SAMPLES:
        weights = sample_weights(replicates, n, seed).astype(np.uint8)
    else:
        starts = range(0, n, _SAMPLES)
        pieces = (resampling_weights(replicates, min(_SAMPLES, n - at), seed, at, n).numpy() for at in starts)
        weights = np.concatenate([piece.astype(np.uint8) for piece in pieces], 1)
    yield from torch.from_numpy(weights).split(max(1, _WEIGHTS // n))
