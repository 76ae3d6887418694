"""What the disentanglement metrics share: their result, rows by factor level, and intervals."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import Labelled
from .statistics import FEW, Estimate, percentile_interval, resampled_interval, resampling_weights

WHOLE = "rows of the whole grid"
TRAIN, TEST = 10_000, 5_000  # samples of the reference protocol
LARGEST = 1e100  # magnitude of codes where squares are added
_KEPT = 1 << 22  # bootstrap weights that are kept for the next metric


@dataclass(frozen=True)
class Score(Estimate):
    """`Estimate` of a disentanglement metric. `dropped`: one-valued factors, which take no part; `note`: where the
    computation departs from the reference protocol, and why; empty where it does not."""

    dropped: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {self.level!r}")


@dataclass(frozen=True)
class Rows:
    """The rows of each level of one factor: `order` (N,) row numbers sorted by level, of which level a has
    `count[a]` from `start[a]` on."""

    order: np.ndarray
    start: np.ndarray
    count: np.ndarray


def rows_by_level(level: np.ndarray, size: int) -> Rows:
    """`level` (N,) in [0, size) -> the rows of each level."""
    # numpy sorts 16 bits by radix, a tenth of the time
    order = np.argsort(level.astype(np.uint16) if size <= 1 << 16 else level, kind="stable")
    count = np.bincount(level, minlength=size)
    return Rows(order, np.cumsum(count) - count, count)


def fixable(data: Labelled) -> tuple[list[tuple[int, Rows]], str]:
    """(factor, rows) of the factors that can be held fixed, and a note on what was left out.

    A level of a single row is left out: a group of one image repeated has no variance. InputError if fewer than two
    factors have a level of two rows: of one factor alone there is nothing to tell.
    """
    kept, out, single = [], [], 0
    for k, name in enumerate(data.names):
        rows = rows_by_level(data.levels[:, k], data.sizes[k])
        alone = int((rows.count < 2).sum())
        if alone == data.sizes[k]:
            out.append(name)
        else:
            kept.append((k, rows))
            single += alone
    if len(kept) < 2:
        raise InputError(
            f"factors: expected two factors that vary and have values which occur twice, to tell which is held fixed; "
            f"of {', '.join(data.names)} {len(kept)} can be, among N = {len(data.codes)}"
        )
    notes = [f"{', '.join(out)} left out: no value occurs twice"] if out else []
    return kept, "; ".join(notes + ([f"{single} factor values that occur once left out"] if single else []))


def moderate(codes: np.ndarray) -> np.ndarray:
    """`codes`; InputError where their squares could overflow."""
    largest = max(float(codes.max()), -float(codes.min()))
    if largest > LARGEST:
        raise InputError(
            f"codes: expected numbers within +-{LARGEST:g}, whose squares float64 can add, got {largest:g}"
        )
    return codes


def deviations(codes: np.ndarray) -> np.ndarray:
    """Standard deviation (dividing by N - 1) of each latent: (L,), 0 of constant ones alone."""
    low, width = codes.min(0), np.ptp(codes, 0)
    # in units of the range, or the squares of tiny codes would be 0
    return ((codes - low) / np.where(width > 0, width, 1)).std(0, ddof=min(1, len(codes) - 1)) * width


def whole(name: str, value: Any, low: int) -> int:
    """`value` if it is a whole number >= low; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
    return int(value)


def share_interval(hits: int, n: int, level: float) -> tuple[float, float]:
    """Wilson's interval of a share of `n` independent draws (E. Wilson, JASA 22, 1927); it is not empty at 0 and 1."""
    from scipy import stats

    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    p = hits / n
    middle, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    # exactly 0 and 1 at the ends, which rounding would miss
    return (middle - half) / (1 + z2 / n) if hits else 0.0, (middle + half) / (1 + z2 / n) if hits < n else 1.0


def sample_weights(replicates: int, n: int, seed: int) -> np.ndarray:
    """`resampling_weights` of n samples, (R, n) float32, not to be written to; the last small ones are kept, as the
    metrics of a battery resample alike. Replicates without any sample are left out: one in e^n."""
    return _kept_weights(replicates, n, seed) if replicates * n <= _KEPT else _weights(replicates, n, seed)


def _weights(replicates: int, n: int, seed: int) -> np.ndarray:
    weights = resampling_weights(replicates, n, seed).numpy()
    weights = weights[weights.sum(1) > 0]
    weights.setflags(write=False)
    return weights


_kept_weights = functools.lru_cache(maxsize=1)(_weights)


def centred_interval(value: float, drawn: np.ndarray, n: int, level: float) -> tuple[float, float]:
    """Interval of a `value` of n samples from replicates that ties bias: shifted to it, from 8 samples on.

    (nan, nan) where none were asked for.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size or not math.isfinite(value):
        return math.nan, math.nan
    if n >= FEW:
        return percentile_interval(drawn, level, centre=value)
    return resampled_interval(value, drawn, n, level)
