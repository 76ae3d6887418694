"""The Poisson bootstrap over samples: its weights, and the intervals that replicates give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .estimate import FEW, Estimate, as_array, check_level, check_whole, finite, t_quantile

_WORD = (1 << 32) - 1
# Poisson(1) by inversion: the weight is the number of cumulative probabilities, in units of 2^-32, at or below a
# uniform 32-bit integer. P(weight > 12) < 2^-32.
_CUMULATIVE = [round(sum(math.exp(-1) / math.factorial(j) for j in range(k + 1)) * 2.0**32) for k in range(12)]
_BLOCK = 1 << 14  # weights made at once on a CPU, so that the integers they are made of stay in its cache


def poisson_weights(
    replicates: int,
    n: int,
    seed: int = 0,
    offset: int = 0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Poisson(1) bootstrap weights of samples offset..offset+n-1: (replicates, n), whole numbers in `dtype`.

    The weight of (replicate r, sample i) depends on seed, r and i only, so statistics summed over chunks, in any
    chunking and on any device, are those of the whole: a 32-bit integer hash (lowbias32 of C. Wellons, "Prospecting
    for Hash Functions", 2018, in integer arithmetic that is exact everywhere), then the inverse of Poisson's
    distribution function. Raises InputError for negative counts or more than 2^32 samples or replicates.
    """
    check_whole("replicates", replicates, low=0)
    check_whole("n", n, low=0)
    check_whole("offset", offset, low=0)
    check_whole("seed", seed, low=-(1 << 63))
    if offset + n > _WORD or replicates > _WORD:
        raise InputError(f"offset + n: expected at most 2^32 samples and replicates, got {offset + n} and {replicates}")
    row = torch.arange(replicates, device=device, dtype=torch.int64)
    first = _mix(row ^ _mix_word(seed & _WORD))
    second = _mix(first ^ _mix_word(seed >> 32 & _WORD) ^ 0x5BD1E995)
    column = torch.arange(offset, offset + n, device=device, dtype=torch.int64)
    weights = torch.empty(replicates, n, device=device, dtype=dtype)
    step = max(1, _BLOCK // max(n, 1)) if weights.device.type == "cpu" else max(1, replicates)
    for start in range(0, replicates, step):
        rows = slice(start, start + step)
        # Two keys a row, one added before and one exclusive-ored after the first mixing: rows are then not
        # rearrangements of one another, as they would be under a single key.
        uniform = _mix(_mix((first[rows, None] + column) & _WORD) ^ second[rows, None])
        weights[rows] = _poisson_quantile(uniform)
    return weights


def _poisson_quantile(uniform: Tensor) -> Tensor:
    """The number of cumulative probabilities at or below each of `uniform`, int64 in [0, 2^32): uint8.

    Twelve comparisons and not torch.bucketize, which opens a parallel region for any size and then waits for the other
    threads: ten times slower where other processes share the cores.
    """
    uniform = (uniform - (1 << 31)).int()
    count = torch.zeros_like(uniform, dtype=torch.uint8)
    for bound in _CUMULATIVE:
        count += (uniform >= bound - (1 << 31)).view(torch.uint8)
    return count


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of each element of `x`, an int64 tensor of values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = x.mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    # 0x846CA68B less 2^32: the same low 32 bits of the product, which then stays inside int64
    x.mul_(0x846CA68B - (1 << 32)).bitwise_and_(_WORD)
    x ^= x >> 16
    return x


def _mix_word(word: int) -> int:
    return int(_mix(torch.tensor(word, dtype=torch.int64)))


def resampling_weights(replicates: int, n: int, seed: int = 0, offset: int = 0, total: int | None = None) -> Tensor:
    """Weights (R, n) float32 of samples offset..offset+n-1 out of `total` (default n), for `resampled_interval`.

    Poisson bootstrap weights with R = `replicates`; below 8 samples in all the jackknife's, R = total, row r leaving
    out sample r.
    """
    total = offset + n if total is None else total
    if total >= FEW:
        return poisson_weights(replicates, n, seed, offset)
    weights = torch.ones(total, n)
    weights[torch.arange(offset, offset + n), torch.arange(n)] = 0
    return weights


def resampled_interval(value: float, replicates: Any, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a statistic `value` from its `replicates` (R,) under `resampling_weights` of n samples.

    From 8 samples on: bootstrap percentiles. Below: Tukey's jackknife with t_{n-1}, which for a mean is the t interval
    exactly. One sample bounds nothing: (-inf, inf). Replicates where the statistic is undefined (NaN) are left out;
    with none left, or none asked for, (nan, nan).
    """
    check_level(level)
    replicates = as_array(replicates)
    replicates = replicates[np.isfinite(replicates)]
    if n == 1:
        return -math.inf, math.inf
    if not replicates.size or not math.isfinite(value):
        return math.nan, math.nan
    if n >= FEW:
        return percentile_interval(replicates, level)
    half = t_quantile(level, n - 1) * math.sqrt((n - 1) / n * float(((replicates - replicates.mean()) ** 2).sum()))
    return value - half, value + half


def resampled_intervals(values: Any, replicates: Any, n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """`resampled_interval` of many statistics at once: values (U,), replicates (R, U); low and high, (U,) each."""
    values, replicates = as_array(values), as_array(replicates)
    if n >= FEW and replicates.size and bool(np.isfinite(replicates).all() and np.isfinite(values).all()):
        check_level(level)
        low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
        return low, high
    bounds = [resampled_interval(float(v), replicates[:, u], n, level) for u, v in enumerate(values)]
    return np.array([low for low, _ in bounds]), np.array([high for _, high in bounds])


def bootstrap(
    x: Any,
    f: Callable[..., Any] | None = None,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    unit: str = "",
    resampled: str = "samples",
) -> Estimate:
    """The statistic `f` of `x` (None: the mean) with its Poisson-bootstrap interval.

    `x`: array or tensor (n, ...), or a tuple of such of equal n, resampled together; `f` gets the resampled rows (one
    argument for each array) and returns a number. Sample i enters replicate r `poisson_weights(...)[r, i]` times.
    Below 8 samples the interval is the jackknife's with t. Resamples on which `f` is not finite are left out.
    Raises InputError on no samples, unequal n, or an `f` that is not finite on `x` itself.
    """
    arrays = x if isinstance(x, tuple) else (x,)
    arrays = tuple(a if isinstance(a, Tensor) else np.asarray(a) for a in arrays)
    if not arrays or any(a.ndim == 0 for a in arrays):
        raise InputError("x: expected an array (n, ...) or a tuple of such, got a number")
    sizes = {len(a) for a in arrays}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"x: expected one number n >= 1 of samples in every array, got {sorted(sizes)}")
    n = sizes.pop()
    check_whole("replicates", replicates, low=1)
    if f is None and len(arrays) > 1:
        raise InputError(f"f: expected a function of {len(arrays)} arrays, got None, the mean of one")
    f = f or (lambda rows: as_array(rows).mean())
    value = float(f(*arrays))
    if not math.isfinite(value):
        raise InputError(f"f: expected a finite number on x, got {value}")
    draws = []
    for weights in resampling_weights(replicates, n, seed).long().numpy():
        rows = np.repeat(np.arange(n), weights)
        if len(rows):  # all weights are zero once in e^n replicates
            draws.append(float(f(*(_rows(a, rows) for a in arrays))))
    low, high = resampled_interval(value, draws, n, level)
    return Estimate(value, low, high, level, unit, resampled, n)


def percentile_interval(replicates: Any, level: float = 0.95, centre: float | None = None) -> tuple[float, float]:
    """The central `level` of bootstrap `replicates` (R,): the p-quantile of R is their (R + 1) p-th smallest.

    With `centre` the replicates are shifted to have that mean: for statistics that are biased upward by ties, as
    mutual information is, the raw percentiles may not even contain the estimate. Raises InputError on none or NaN.
    """
    check_level(level)
    replicates = finite("replicates", replicates)
    shift = 0.0 if centre is None else centre - float(replicates.mean())
    # The usual (R - 1) p + 1 covers a hundredth less at R = 200.
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low) + shift, float(high) + shift


def _rows(a: Any, rows: np.ndarray) -> Any:
    return a[torch.from_numpy(rows).to(a.device)] if isinstance(a, Tensor) else a[rows]
