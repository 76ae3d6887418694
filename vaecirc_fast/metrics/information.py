"""Mutual information of binned codes with factors and with each other: modularity and mean pairwise information."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import checked_codes, labelled
from .score import WHOLE, Score, centred_interval, sample_weights, whole
from .statistics import resampling_weights

BINS = 20
_ROWS = 1 << 14  # samples a chunk of bootstrap weights holds
_CELLS = 1 << 23  # joint counts held at once, over pairs and replicates
_TABLE = 1 << 22  # counts up to which c log c is looked up

Draw = Callable[[int, int], np.ndarray]  # weights (stop - start, R) of samples start..stop-1


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
    columns = np.concatenate([binned(data.codes, bins), data.levels], 1)
    latents = data.codes.shape[1]
    sizes = [bins] * latents + list(data.sizes)
    pairs = [(i, latents + k) for i in range(latents) for k in range(len(data.sizes))]
    information = mutual_information(columns, sizes, pairs, None).reshape(latents, -1)
    per_latent = _modularities(information)
    value = float(per_latent.mean())
    facts = {"per_latent": per_latent, "information": information, "factors": data.names, "dropped": data.dropped}
    if exact:
        return Modularity(value, value, value, level, "", WHOLE, n, **facts)
    drawn = np.empty(0)
    if replicates and n > 1:
        drawn = mutual_information(columns, sizes, pairs, bootstrap_weights(n, replicates, seed))
        drawn = _modularities(drawn.reshape(latents, len(data.sizes), -1)).mean(0)
    low, high = centred_interval(value, drawn, n, level)
    return Modularity(value, max(low, 0.0), min(high, 1.0), level, "", "samples", n, **facts)


def _modularities(information: np.ndarray) -> np.ndarray:
    """(L, K, ...) -> (L, ...)."""
    square = np.square(information)
    best = square.max(1)
    rest = (square.sum(1) - best) / (square.shape[1] - 1)
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
    columns = binned(numbers, bins)
    pairs = [(i, j) for i in range(latents) for j in range(i)]
    value = float(mutual_information(columns, [bins] * latents, pairs, None).mean())
    if exact:
        return Score(value, value, value, level, "nats", WHOLE, n)
    drawn = np.empty(0)
    if replicates and n > 1:
        weights = bootstrap_weights(n, replicates, seed)
        drawn = mutual_information(columns, [bins] * latents, pairs, weights).mean(0)
    low, high = centred_interval(value, drawn, n, level)
    return Score(value, max(low, 0.0), high, level, "nats", "samples", n)


def binned(codes: np.ndarray, bins: int) -> np.ndarray:
    """Equal-width bin of each code, as np.digitize finds it on np.histogram's edges: (N, L) int64 in [0, bins)."""
    cut = np.zeros(codes.shape, dtype=np.int64)
    for i, column in enumerate(codes.T):
        low, high = column.min(), column.max()
        if low < high:  # a constant latent is all in one bin
            edges = np.linspace(low, high, bins + 1)[:-1]
            cut[:, i] = np.searchsorted(edges, column, side="right") - 1
    return cut


def bootstrap_weights(n: int, replicates: int, seed: int) -> Draw:
    """The weights of `resampling_weights`, made in pieces; those of one piece are kept."""

    @functools.lru_cache(maxsize=1)
    def draw(start: int, stop: int) -> np.ndarray:
        if stop - start == n:
            return np.ascontiguousarray(sample_weights(replicates, n, seed).T)
        return np.ascontiguousarray(resampling_weights(replicates, stop - start, seed, start, n).T.numpy())

    return draw


def mutual_information(
    columns: np.ndarray, sizes: Sequence[int], pairs: Sequence[tuple[int, int]], weights: Draw | None
) -> np.ndarray:
    """Mutual information in nats of pairs of columns (N, C) of whole numbers in [0, size): (pairs,).

    With `weights` that of each replicate, (pairs, R); 0 in a replicate without samples.
    """
    n = len(columns)
    found: list[np.ndarray] = []
    replicates = 1 if weights is None else weights(0, min(n, _ROWS)).shape[1]
    at = 0
    while at < len(pairs):
        block, cells = [], 0
        while at < len(pairs) and (not block or cells + _cells(sizes, pairs[at]) * replicates <= _CELLS):
            cells += _cells(sizes, pairs[at]) * replicates
            block.append(pairs[at])
            at += 1
        for (a, b), joint in zip(block, _joint(columns, sizes, block, weights, replicates), strict=True):
            joint = joint.reshape(sizes[a], sizes[b], -1)
            total = joint.sum((0, 1))
            parts = _c_log_c(joint.sum(1)).sum(0) + _c_log_c(joint.sum(0)).sum(0)
            together = _c_log_c(joint).sum((0, 1))
            # rounding can put independent counts at -1e-16
            found.append(((_c_log_c(total) + together - parts) / np.maximum(total, 1)).clip(min=0))
    values = np.stack(found)
    return values[:, 0] if weights is None else values


def _cells(sizes: Sequence[int], pair: tuple[int, int]) -> int:
    return math.prod(sizes[c] for c in pair)


def _joint(
    columns: np.ndarray, sizes: Sequence[int], pairs: list[tuple[int, int]], weights: Draw | None, replicates: int
) -> list[np.ndarray]:
    """Joint counts of each pair, (size_a * size_b, R) int64."""
    from scipy import sparse

    if weights is None:
        return [
            np.bincount(columns[:, a] * sizes[b] + columns[:, b], minlength=sizes[a] * sizes[b])[:, None]
            for a, b in pairs
        ]
    counts = [np.zeros((_cells(sizes, pair), replicates), dtype=np.int64) for pair in pairs]
    for start in range(0, len(columns), _ROWS):
        stop = min(len(columns), start + _ROWS)
        weight = weights(start, stop)
        # float32 holds whole numbers to 2^24 exactly, more than a chunk's weights sum to
        one, sample = np.ones(stop - start, dtype=np.float32), np.arange(stop - start)
        for (a, b), count in zip(pairs, counts, strict=True):
            cell = columns[start:stop, a] * sizes[b] + columns[start:stop, b]
            member = sparse.csr_array((one, (cell, sample)), shape=(len(count), stop - start))
            count += (member @ weight).astype(np.int64)
    return counts


def _c_log_c(counts: np.ndarray) -> np.ndarray:
    """c log c of whole numbers, 0 of 0."""
    from scipy.special import xlogy

    largest = int(counts.max(initial=0))
    if largest > min(_TABLE, counts.size):
        return xlogy(counts, counts)
    whole_numbers = np.arange(largest + 1)
    return xlogy(whole_numbers, whole_numbers)[counts]
