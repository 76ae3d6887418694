"""The interventional robustness score (IRS): how little a latent moves while one factor is held and the rest change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import labelled
from .score import WHOLE, Rows, Score, centred_interval, moderate, rows_by_level, sample_weights, whole

QUANTILE = 0.99


@dataclass(frozen=True)
class Irs(Score):
    """`Score` in [0, 1]. `matrix` (L, K): 1 - deviation while factor k is held, in units of the largest deviation;
    `per_latent` (L,): its largest entries, 0 for a constant latent; `parents` (L,): the factors they belong to, -1 for
    a constant latent; `factors`: names of the columns."""

    matrix: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False, compare=False)
    per_latent: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    parents: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False, compare=False)
    factors: tuple[str, ...] = ()


def irs(
    codes: Any,
    factors: Any = None,
    *,
    exact: bool = False,
    quantile: float = QUANTILE,
    factor_names: Sequence[str] | None = None,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Irs:
    """Interventional robustness score: mean over latents, weighted by their largest deviation, of

        max over k of 1 - (mean over values a of v_k of Q(|z_i - mean of z_i at v_k = a|)) / max |z_i - mean of z_i|

    with Q the `quantile` over the rows at v_k = a (numpy's linear one; 1 is the paper's maximum). `codes` (N, L)
    numbers and `factors` (N, K) integers, tensors or arrays. Constant latents have no weight; if all are constant the
    score is 0. Weights are in the unit of each latent: rescaling one latent changes the score, all alike does not. A
    value that occurs once has a deviation of 0, which flatters; `note` counts them.

    The interval is a Poisson bootstrap over samples, centred on the value; `replicates=0` leaves it out (nan); `exact`
    says that the rows are the whole grid: it is then a point.

    Source: Suter et al. 2019 (arXiv 1811.00007) as google-research/disentanglement_lib computes it, but with factors
    taken as they are and not binned. Raises InputError as `mig` does, and for a quantile outside (0, 1].
    """
    data = labelled(codes, factors, factor_names)
    replicates = whole("replicates", replicates, 0)
    if not 0 < quantile <= 1:
        raise InputError(f"quantile: expected a number in (0, 1], got {quantile!r}")
    n = len(data.codes)
    groups = [rows_by_level(data.levels[:, k], size) for k, size in enumerate(data.sizes)]
    single = sum(int((rows.count == 1).sum()) for rows in groups)
    note = f"{single} factor values occur once and count as robust" if single else ""
    varies = moderate(data.codes).min(0) < data.codes.max(0)
    matrix = np.zeros((len(varies), len(groups)))
    facts = {"matrix": matrix, "factors": data.names, "dropped": data.dropped}
    facts |= {"per_latent": np.zeros(len(varies)), "parents": np.full(len(varies), -1)}
    if not varies.any():
        bound = math.nan if not (exact or replicates) else 0.0
        return Irs(0.0, bound, bound, level, "", WHOLE if exact else "samples", n, note="no latent varies", **facts)
    z = data.codes if varies.all() else data.codes[:, varies]
    z = z - z.mean(0)
    furthest = np.maximum(z.max(0), -z.min(0))
    deviation = np.stack([_deviations(z, rows, quantile) for rows in groups], 1)
    matrix[varies] = 1 - deviation / furthest[:, None]
    facts["per_latent"] = matrix.max(1)
    facts["parents"] = np.where(varies, matrix.argmax(1), -1)
    value = float(_average(deviation, furthest))
    if exact:
        return Irs(value, value, value, level, "", WHOLE, n, note=note, **facts)
    drawn = np.empty(0)
    if replicates and n > 1:
        # in float32 and units of the largest deviation: replicates only say how far the value may be off
        relative = np.ascontiguousarray((z / furthest).T.astype(np.float32))
        drawn = _replicates(relative, furthest, groups, quantile, sample_weights(replicates, n, seed))
    low, high = centred_interval(value, drawn, n, level)
    return Irs(value, max(low, 0.0), min(high, 1.0), level, "", "samples", n, note=note, **facts)


def _average(deviation: np.ndarray, furthest: np.ndarray) -> np.ndarray:
    """Score from mean deviations (..., L, K) and largest ones (..., L); 0 where nothing deviates."""
    # sum of weight (1 - deviation / weight), over the sum of weights: the division of the definition cancels
    kept = (furthest - deviation.min(-1)).sum(-1)
    total = furthest.sum(-1)
    return np.divide(kept, total, out=np.zeros_like(total), where=total > 0)


def _deviations(z: np.ndarray, rows: Rows, quantile: float) -> np.ndarray:
    """Mean over the values of one factor of the quantile of |z - mean at that value|: (L,)."""
    total = np.zeros(z.shape[1])
    for first, count in zip(rows.start, rows.count, strict=True):
        part = z[rows.order[first : first + count]]
        part = np.abs(part - part.mean(0)).T.copy()  # partitioned along memory
        at = (count - 1) * quantile
        low = min(int(at), max(count - 2, 0))
        high = min(low + 1, count - 1)
        part.partition((low, high), axis=1)
        total += part[:, low] + (at - low) * (part[:, high] - part[:, low])
    return total / len(rows.count)


def _replicates(
    z: np.ndarray, scale: np.ndarray, groups: list[Rows], quantile: float, weights: np.ndarray
) -> np.ndarray:
    """The score of each bootstrap replicate: z (L, N) in units of `scale` (L,), `weights` (R, N) -> (R,)."""
    deviation = np.stack([_replicated_deviations(z, rows, quantile, weights) for rows in groups], 2)
    mean = weights @ z.T / weights.sum(1)[:, None]
    low, high = np.empty_like(mean), np.empty_like(mean)
    for i, column in enumerate(z):
        order = column.argsort()
        size = min(len(column), 64)
        while True:
            first, last = weights[:, order[:size]] > 0, weights[:, order[::-1][:size]] > 0
            if (first.any(1) & last.any(1)).all():
                break
            size = min(len(column), 2 * size)
        low[:, i] = column[order[:size][first.argmax(1)]]
        high[:, i] = column[order[::-1][:size][last.argmax(1)]]
    return _average(deviation * scale[:, None], np.maximum(high - mean, mean - low) * scale)


def _replicated_deviations(z: np.ndarray, rows: Rows, quantile: float, weights: np.ndarray) -> np.ndarray:
    """`_deviations` in each replicate: (R, L). A value that a replicate lacks takes no part in its mean."""
    total = np.zeros((len(weights), len(z)))
    present = np.zeros((len(weights), 1))
    by_level, weights = z[:, rows.order], weights[:, rows.order]
    for first, count in zip(rows.start, rows.count, strict=True):
        part, weight = by_level[:, first : first + count], weights[:, first : first + count]
        size = weight.sum(1)
        mean = weight @ part.T / np.maximum(size, 1)[:, None]
        above = np.maximum(size - 1, 0) * (1 - quantile)  # rows of the replicate above the quantile
        deviation, weight = _tails(part, weight, mean, int(above.max()) + 2)
        total += np.where(size[:, None] > 0, _from_the_top(deviation, weight, above), 0)
        present += size[:, None] > 0
    return total / np.maximum(present, 1)


def _tails(part: np.ndarray, weight: np.ndarray, mean: np.ndarray, needed: int) -> tuple[np.ndarray, np.ndarray]:
    """|z - mean| and weights, (R, L, C) each, of the C rows among which the `needed` largest of every replicate are.

    The largest deviations are at both ends of the sorted codes, so only those ends are looked at.
    """
    count = part.shape[1]
    order = part.argsort(1)
    size = 2 * needed + 8
    while 2 * size < count:
        ends = np.concatenate([order[:, :size], order[:, -size:]], 1)
        at_ends = np.take(weight, ends, axis=1)
        if min(at_ends[:, :, :size].sum(2).min(), at_ends[:, :, size:].sum(2).min()) >= needed:
            break
        size *= 2
    else:
        ends, at_ends = order, np.take(weight, order, axis=1)
    return np.abs(np.take_along_axis(part, ends, 1) - mean[:, :, None]), at_ends


def _from_the_top(deviation: np.ndarray, weight: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The value that `above` (R,) rows, a fraction interpolated, lie above; rows counted by weight: (R, L)."""
    # sorted as whole numbers with the weight in the last byte: floats >= 0 have the order of their bits
    key = deviation.view(np.uint32).astype(np.int64) << 8 | weight.astype(np.int64)
    key.sort(axis=2)
    key = key[:, :, ::-1]
    counted = (key & 255).cumsum(2)
    ordered = (key >> 8).astype(np.uint32).view(np.float32)
    first = np.floor(above)
    share = (above - first)[:, None]
    at = [
        np.take_along_axis(ordered, (counted > bound[:, None, None]).argmax(2)[:, :, None], 2)[:, :, 0]
        for bound in (first, first + 1)
    ]
    last = counted[:, :, -1] > first[:, None] + 1  # where there is a next row
    return np.where(last, at[0] + share * (at[1] - at[0]), at[0])
