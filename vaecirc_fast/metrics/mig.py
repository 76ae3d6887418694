"""Mutual information gap (MIG) of codes and ground-truth factors, with a bootstrap interval over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import labelled
from .statistics import FEW, Estimate, percentile_interval, resampled_interval, resampling_weights

_ROWS = 1 << 14  # samples a chunk of bootstrap weights holds
_CELLS = 1 << 24  # joint counts held at once, over replicates


@dataclass(frozen=True)
class Mig(Estimate):
    """`Estimate` of the mean gap, in [0, 1]; `per_factor` the gaps by name; `dropped` the one-valued factors."""

    per_factor: dict[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def mig(
    codes: Any,
    factors: Any,
    bins: int = 20,
    factor_names: Sequence[str] | None = None,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Mig:
    """Mean over factors k of (I(top_k; v_k) - I(second_k; v_k)) / H(v_k): the mutual information gap, in [0, 1].

    `codes` (N, L) numbers, the encoder means; `factors` (N, K) integers, any ids; tensors or arrays. Each latent is cut
    into `bins` equal-width bins from its least to its greatest value (np.digitize on np.histogram's edges, in float64);
    information and entropy are of the counts, in nats. Top and second are the latents with the most information on the
    factor; with L = 1 the second is 0, and a constant latent has 0. One-valued factors have no entropy: they are left
    out and named in `dropped`.

    The interval resamples samples with the bins fixed (`replicates` Poisson bootstraps; below 8 samples the jackknife).
    Counts of a resample have more ties than a sample, which biases information upward, so replicates are centred on the
    value: the interval is for the protocol's MIG at this N. `replicates=0` leaves it out (nan), as a whole factor
    grid, which has no sampling error, should.

    Source: Chen et al. 2018 (arXiv 1802.04942), binned as google-research/disentanglement_lib's `mig.py` bins it.
    Raises InputError on wrong shapes, unequal N, no samples, NaN or infinite codes, factors that are not integers,
    names that do not fit, or no factor that varies.
    """
    for name, value, low in (("bins", bins, 1), ("replicates", replicates, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
    data = labelled(codes, factors, factor_names)
    cut = _cut(data.codes, bins)

    n, sizes = len(cut), list(data.sizes)
    cells = [cut * size + column[:, None] for size, column in zip(sizes, data.levels.T, strict=True)]
    gaps = _gaps(cells, bins, sizes, lambda start, stop: np.ones((stop - start, 1), dtype=np.float32))[:, 0]
    value = float(gaps.mean())
    low = high = math.nan
    if replicates and n > 1:
        block = max(1, _CELLS // (cut.shape[1] * bins * sum(sizes)))
        drawn = []
        for first in range(0, replicates if n >= FEW else n, block):
            rows = slice(first, first + block)

            def weights(start: int, stop: int, rows: slice = rows) -> np.ndarray:
                return resampling_weights(replicates, stop - start, seed, start, n)[rows].T.numpy()

            drawn.append(_gaps(cells, bins, sizes, weights))
        replicated = np.concatenate(drawn, axis=1)
        # a factor that a small resample left with one value has no gap in it
        defined = np.isfinite(replicated)
        some = defined.any(0)
        replicated = np.where(defined, replicated, 0).sum(0)[some] / defined.sum(0)[some]
        if n >= FEW:
            low, high = percentile_interval(replicated, level, centre=value)
        else:
            low, high = resampled_interval(value, replicated, n, level)
    per_factor = {name: float(gap) for name, gap in zip(data.names, gaps, strict=True)}
    return Mig(value, low, high, level, "", "samples", n, per_factor, data.dropped)


def _cut(codes: np.ndarray, bins: int) -> np.ndarray:
    """Bin index of each code: (N, L) int64 in [0, bins)."""
    cut = np.zeros(codes.shape, dtype=np.int64)
    for i, column in enumerate(codes.T):
        if column.min() < column.max():  # a constant latent is all in one bin
            edges = np.linspace(column.min(), column.max(), bins + 1)[:-1]
            cut[:, i] = np.searchsorted(edges, column, side="right") - 1
    return cut


def _gaps(
    cells: list[np.ndarray], bins: int, sizes: list[int], weights: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """(I(top) - I(second)) / H of each factor in each replicate: (K, R) float64, NaN where the factor has one value.

    `cells`: for each factor (N, L), bin * size + level. `weights(start, stop)`: (stop - start, R), whole numbers.
    Information is H(bin) + H(level) - H(bin, level).
    """
    from scipy import sparse

    n, latents = cells[0].shape
    counts: list[np.ndarray] = []
    for start in range(0, n, _ROWS):
        stop = min(n, start + _ROWS)
        weight = np.ascontiguousarray(weights(start, stop))
        if not counts:
            counts = [np.zeros((latents, bins * size, weight.shape[1])) for size in sizes]
        one, sample = np.ones(stop - start, dtype=np.float32), np.arange(stop - start)
        for cell, count in zip(cells, counts, strict=True):
            for i in range(latents):
                # float32 holds whole numbers to 2^24 exactly, more than a chunk's weights sum to
                member = sparse.csr_array((one, (cell[start:stop, i], sample)), shape=(count.shape[1], stop - start))
                count[i] += member @ weight
    gaps = []
    for count, size in zip(counts, sizes, strict=True):
        joint = count.reshape(latents, bins, size, -1)
        of_level = joint[0].sum(0)
        entropy = _entropy(of_level, 0)
        information = _entropy(joint.sum(2), 1) + entropy - _entropy(count, 1)
        # a second latent of no information where there is one only; rounding can put independent counts at -1e-16
        information = np.concatenate([information.clip(min=0), np.zeros((1, information.shape[1]))])
        second, first = np.partition(information, -2, axis=0)[-2:]
        varies = (of_level > 0).sum(0) > 1
        gaps.append(np.divide(first - second, entropy, out=np.full_like(entropy, np.nan), where=varies))
    return np.stack(gaps)


def _entropy(counts: np.ndarray, axis: int) -> np.ndarray:
    """Entropy in nats of the counts along `axis`; 0 of no counts."""
    from scipy.special import xlogy

    total = np.maximum(counts.sum(axis), 1)
    return np.log(total) - xlogy(counts, counts).sum(axis) / total
