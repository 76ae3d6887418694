"""Effect sizes of two groups: Cohen's d, Hedges' g and Cliff's delta, each with its interval."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import InputError
from .estimate import Estimate, check_level, numbers, t_quantile


def cohens_d(x: Any, y: Any, level: float = 0.95, resampled: str = "seeds") -> Estimate:
    """(mean(x) - mean(y)) / pooled standard deviation of two independent groups, in sd.

    `x` (n,), `y` (m,), at least two numbers each. The interval inverts the noncentral t distribution of
    d sqrt(n m / (n + m)): exact for normal groups of equal variance. Upward biased for few seeds: see `hedges_g`.

    Source: Cohen 1988; Steiger & Fouladi 1997 for the interval. Raises InputError where neither group varies.
    """
    check_level(level)
    x, y = numbers("x", x, 2), numbers("y", y, 2)
    n, m = len(x), len(y)
    variance = ((n - 1) * float(x.var(ddof=1)) + (m - 1) * float(y.var(ddof=1))) / (n + m - 2)
    if variance == 0:
        raise InputError("x, y: expected numbers that vary within a group; without a spread a difference has no size")
    value = float(x.mean() - y.mean()) / math.sqrt(variance)
    scale = math.sqrt(n * m / (n + m))
    t, freedom = value * scale, n + m - 2
    low = _noncentrality(t, freedom, (1 + level) / 2) / scale
    high = _noncentrality(t, freedom, (1 - level) / 2) / scale
    return Estimate(value, low, high, level, "sd", resampled, n + m)


def hedges_g(x: Any, y: Any, level: float = 0.95, resampled: str = "seeds") -> Estimate:
    """Cohen's d times Gamma(f/2) / (sqrt(f/2) Gamma((f-1)/2)), f = n + m - 2: unbiased for normal groups.

    Arguments, unit and errors as `cohens_d`; the interval is that of d times the same factor. Source: Hedges 1981.
    """
    d = cohens_d(x, y, level, resampled)
    freedom = d.n - 2
    factor = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return Estimate(factor * d.value, factor * d.low, factor * d.high, level, "sd", resampled, d.n)


def cliffs_delta(x: Any, y: Any, level: float = 0.95, resampled: str = "seeds") -> Estimate:
    """P(x > y) - P(x < y) over all pairs of the two groups, in [-1, 1]; it needs no unit and no normal distribution.

    `x` (n,), `y` (m,), at least two numbers each. The interval is Cliff's asymmetric one with the consistent variance
    and Student's t of n + m - 2; where every x is above (below) every y, whose variance is 0, it ends at +-1 and begins
    at (k - t^2) / (k + t^2), k = min(n, m).

    Source: Cliff 1996; Feng & Cliff 2004. Raises InputError on fewer than two numbers, NaN or infinity.
    """
    check_level(level)
    x, y = numbers("x", x, 2), numbers("y", y, 2)
    n, m = len(x), len(y)
    signs = np.sign(x[:, None] - y)
    value = float(signs.mean())
    t2 = t_quantile(level, n + m - 2) ** 2
    if abs(value) == 1:
        bound = (min(n, m) - t2) / (min(n, m) + t2)
        low, high = (bound, 1.0) if value > 0 else (-1.0, -bound)
        return Estimate(value, low, high, level, "", resampled, n + m)
    rows = float(((signs.mean(1) - value) ** 2).sum())
    columns = float(((signs.mean(0) - value) ** 2).sum())
    cells = float(((signs - value) ** 2).sum())
    unbiased = (m**2 * rows + n**2 * columns - cells) / (n * m * (n - 1) * (m - 1))
    variance = max(unbiased, (1 - value**2) / (n * m - 1))  # the estimate can fall below the least that is possible
    centre, half = value - value**3, math.sqrt(t2 * variance * ((1 - value**2) ** 2 + t2 * variance))
    scale = 1 - value**2 + t2 * variance
    low, high = max(-1.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return Estimate(value, low, high, level, "", resampled, n + m)


def _noncentrality(t: float, freedom: int, probability: float) -> float:
    """The noncentrality at which `t` is the `probability` quantile of the noncentral t distribution."""
    from scipy import optimize, stats

    def excess(shift: float) -> float:
        return float(stats.nct.cdf(t, freedom, shift)) - probability

    reach = 4 + abs(t)
    while excess(t - reach) < 0 or excess(t + reach) > 0:
        reach *= 2
    root: Any = optimize.brentq(excess, t - reach, t + reach, xtol=1e-10)
    return float(root)
