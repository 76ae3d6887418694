"""Estimates with intervals: the Poisson bootstrap, t and hierarchical intervals, verdicts, and seeds needed.

The unit of replication is the seed (or the image, or the subject) and every `Estimate` says which one it resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

FEW = 8  # below this many replicates a percentile interval is too narrow: three cover 72 %, not 95 %

_WORD = (1 << 32) - 1
# Poisson(1) by inversion: the weight is the number of cumulative probabilities, in units of 2^-32, at or below a
# uniform 32-bit integer. P(weight > 12) < 2^-32.
_CUMULATIVE = [round(sum(math.exp(-1) / math.factorial(j) for j in range(k + 1)) * 2.0**32) for k in range(12)]
_BLOCK = 1 << 14  # weights made at once on a CPU, so that the integers they are made of stay in its cache


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    `value`, `low`, `high` in `unit`; `level` the nominal coverage; `resampled` what was resampled ("seeds", "images");
    `n` how many of them. An interval that one replicate cannot bound is (-inf, inf); one not asked for is (nan, nan).
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    unit: str = ""
    resampled: str = "samples"
    n: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{unit} "
            f"({100 * self.level:g} %, over {self.n} {self.resampled})"
        )


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
    _whole("replicates", replicates, low=0)
    _whole("n", n, low=0)
    _whole("offset", offset, low=0)
    _whole("seed", seed, low=-(1 << 63))
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
    _level(level)
    replicates = _array(replicates)
    replicates = replicates[np.isfinite(replicates)]
    if n == 1:
        return -math.inf, math.inf
    if not replicates.size or not math.isfinite(value):
        return math.nan, math.nan
    if n >= FEW:
        return percentile_interval(replicates, level)
    half = _t_quantile(level, n - 1) * math.sqrt((n - 1) / n * float(((replicates - replicates.mean()) ** 2).sum()))
    return value - half, value + half


def resampled_intervals(values: Any, replicates: Any, n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """`resampled_interval` of many statistics at once: values (U,), replicates (R, U); low and high, (U,) each."""
    values, replicates = _array(values), _array(replicates)
    if n >= FEW and replicates.size and bool(np.isfinite(replicates).all() and np.isfinite(values).all()):
        _level(level)
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
    _whole("replicates", replicates, low=1)
    if f is None and len(arrays) > 1:
        raise InputError(f"f: expected a function of {len(arrays)} arrays, got None, the mean of one")
    f = f or (lambda rows: _array(rows).mean())
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
    _level(level)
    replicates = _finite("replicates", replicates)
    shift = 0.0 if centre is None else centre - float(replicates.mean())
    # The usual (R - 1) p + 1 covers a hundredth less at R = 200.
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low) + shift, float(high) + shift


def t_interval(values: Any, level: float = 0.95, unit: str = "", resampled: str = "seeds") -> Estimate:
    """Mean of `values` (R,), one for each independent replicate, with Student's interval mean +- t_{R-1} s / sqrt(R).

    One value gives (-inf, inf). Raises InputError on none, NaN or infinity.
    """
    _level(level)
    values = _finite("values", values)
    n = len(values)
    mean = float(values.mean())
    half = _t_quantile(level, n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, level, unit, resampled, n)


def hierarchical_interval(
    values: Any, within_replicates: Any, level: float = 0.95, unit: str = "", resampled: str = "seeds"
) -> Estimate:
    """Mean of `values` (R,) over seeds, with the uncertainty of the seeds and of the samples all seeds were judged on.

    `within_replicates` (R, n): n bootstrap replicates of each run's value, all runs under the same weights (the same
    seed of `poisson_weights`), so that column b is one resample of the shared samples. With S^2 the variance of
    `values`, w the replicates less their row means,

        V = S^2 / R + C,    C = max(0, Var_b[mean_r w_rb] - mean_b[Var_r w_rb] / R),

    and degrees of freedom by Welch-Satterthwaite, V^2 / ((S^2/R)^2 / (R-1) + C^2 / (n-1)). S^2 already holds what
    differs between runs, a run's own sampling noise included; C adds what it cannot see, the noise that the runs share.
    Runs judged on separate samples give C near 0 and the t interval. One run gives (-inf, inf).
    Raises InputError on wrong shapes, fewer than 20 replicates, NaN or infinity.
    """
    _level(level)
    values = _finite("values", values)
    within = _array(within_replicates)
    if within.ndim != 2 or within.shape[0] != len(values) or within.shape[1] < 20 or not np.isfinite(within).all():
        raise InputError(
            f"within_replicates: expected finite numbers of shape (R = {len(values)}, n >= 20), got {within.shape}"
        )
    runs, n = within.shape
    mean = float(values.mean())
    if runs == 1:
        return Estimate(mean, -math.inf, math.inf, level, unit, resampled, 1)
    within = within - within.mean(1, keepdims=True)
    between = float(values.var(ddof=1)) / runs
    shared = max(0.0, float(within.mean(0).var(ddof=1)) - float(within.var(0, ddof=1).mean()) / runs)
    variance = between + shared
    if variance > 0:
        # shares and not squares of variances, which underflow for tiny effects
        freedom = 1 / ((between / variance) ** 2 / (runs - 1) + (shared / variance) ** 2 / (n - 1))
        half = _t_quantile(level, freedom) * math.sqrt(variance)
    else:
        half = 0.0
    return Estimate(mean, mean - half, mean + half, level, unit, resampled, runs)


Verdict = Literal["holds", "does not hold", "undecided"]


def verdict(
    interval: Estimate | tuple[float, float], side: Literal["above", "below"] = "above", threshold: float = 0.0
) -> Verdict:
    """Whether a claim "the quantity lies above (below) `threshold`" holds, given its interval.

    "holds" if and only if the whole interval lies strictly on the claimed side, "does not hold" if and only if wholly
    on the other, else "undecided" (NaN bounds too). Raises InputError on another `side` or low > high.
    """
    low, high = (interval.low, interval.high) if isinstance(interval, Estimate) else map(float, interval)
    if side not in ("above", "below"):
        raise InputError(f"side: expected 'above' or 'below', got {side!r}")
    if low > high:
        raise InputError(f"interval: expected low <= high, got ({low}, {high})")
    if low > threshold:
        return "holds" if side == "above" else "does not hold"
    if high < threshold:
        return "holds" if side == "below" else "does not hold"
    return "undecided"


def seeds_needed(values: Any, effect: float, level: float = 0.95, power: float = 0.8) -> int:
    """How many seeds a two-sided t test at 1 - `level` needs to find a mean of `effect` with probability `power`.

    `values` (R >= 2,): one number for each seed (for a comparison, the paired differences); their standard deviation
    is taken for the true one, so from three seeds the answer is an order of magnitude. `effect` in their unit.
    Exact power by the noncentral t below 1,000 seeds, the normal approximation above.
    Raises InputError on effect 0, fewer than 2 values, NaN or infinity.
    """
    from scipy import stats

    _level(level)
    if not 0 < power < 1:
        raise InputError(f"power: expected a number between 0 and 1, got {power!r}")
    values = _finite("values", values)
    if len(values) < 2:
        raise InputError("values: expected at least 2 seeds to estimate their spread, got 1")
    if not math.isfinite(effect) or effect == 0:
        raise InputError(f"effect: expected a finite number other than 0, got {effect!r}")
    spread = float(values.std(ddof=1)) / abs(effect)
    z = float(stats.norm.ppf((1 + level) / 2))
    quantiles = z + float(stats.norm.ppf(power))
    normal = (quantiles * spread) * (quantiles * spread) + z**2 / 2  # second term: the t's heavier tails, first order
    if normal > 1e12:
        raise InputError(f"effect: {effect!r} is under a millionth of the spread of the values, no study finds it")
    if normal >= 1000:
        return math.ceil(normal)
    if spread == 0:
        return 2
    n = 2
    while n < 1000:
        critical, shift = stats.t.ppf((1 + level) / 2, n - 1), math.sqrt(n) / spread
        if shift > 30 or stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift) >= power:
            break
        n += 1
    return n


def _t_quantile(level: float, freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, freedom))


def _rows(a: Any, rows: np.ndarray) -> Any:
    return a[torch.from_numpy(rows).to(a.device)] if isinstance(a, Tensor) else a[rows]


def _array(x: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def _finite(name: str, x: Any) -> np.ndarray:
    array = _array(x)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InputError(
            f"{name}: expected at least one finite number, shape (n,), got shape {array.shape}"
            f"{'' if np.isfinite(array).all() else ' with NaN or infinity'}"
        )
    return array


def _level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
