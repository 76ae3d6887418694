"""Two groups of runs: Welch's t test, permutation tests and equivalence within a margin."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import InputError
from .estimate import Inference, check_level, check_whole, few_note, numbers, t_quantile

EXACT = 20_000  # rearrangements up to which all are gone through


def welch(x: Any, y: Any, level: float = 0.95, unit: str = "", resampled: str = "seeds") -> Inference:
    """mean(x) - mean(y) of two independent groups, with Welch's interval and p (unequal variances).

    `x` (n,), `y` (m,): a number for each seed, at least two each; `n` of the result is n + m. Where neither group
    varies the interval is the difference itself, and p is 1 if it is 0, else 0.

    Source: Welch 1947. Raises InputError on fewer than two numbers, NaN or infinity.
    """
    check_level(level)
    x, y = numbers("x", x, 2), numbers("y", y, 2)
    difference, error, freedom = _welch(x, y)
    note = few_note(min(len(x), len(y)), f"{resampled} in a group")
    if error == 0:
        note = "neither group varies"
    half = t_quantile(level, freedom) * error
    p = _t_tail(difference, error, freedom)
    low, high = difference - half, difference + half
    return Inference(difference, low, high, level, unit, resampled, len(x) + len(y), p, "Welch's t test", note)


def _welch(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Difference of means, its standard error, and Welch-Satterthwaite degrees of freedom."""
    a, b = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    difference = float(x.mean() - y.mean())
    if a + b == 0:
        return difference, 0.0, float(len(x) + len(y) - 2)
    # shares and not squares of variances, which underflow for tiny spreads
    freedom = 1 / ((a / (a + b)) ** 2 / (len(x) - 1) + (b / (a + b)) ** 2 / (len(y) - 1))
    return difference, math.sqrt(a + b), freedom


def _t_tail(value: float, error: float, freedom: float) -> float:
    """Two-sided p of value / error under Student's t; of a value without error, whether it is 0."""
    from scipy import stats

    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value / error), freedom))


def permutation_test(
    x: Any,
    y: Any,
    paired: bool = False,
    replicates: int = 9999,
    seed: int = 0,
    level: float = 0.95,
    unit: str = "",
    resampled: str = "seeds",
) -> Inference:
    """mean(x) - mean(y) with the p and the interval of its permutation test.

    `x` (n,), `y` (m,). Independent groups: which n of the n + m numbers are in the first group. `paired` (n = m, the
    same seeds): the sign of each difference. All rearrangements are gone through where they are at most 20,000; else
    `replicates` are drawn with `seed` and p = (1 + number at least as extreme) / (1 + replicates), which is never 0.
    Two-sided: extreme is |difference|. The interval holds every shift d of x that the test does not reject at
    1 - `level`; it is unbounded where even the most extreme of so few rearrangements would not reject.

    Source: Pitman 1937; Phipson & Smyth 2010 for the 1 +. Raises InputError on no numbers, unequal n if paired.
    """
    check_level(level)
    check_whole("replicates", replicates, low=1)
    check_whole("seed", seed, low=0)
    x, y = numbers("x", x, 1), numbers("y", y, 1)
    if paired:
        if len(x) != len(y):
            raise InputError(f"y: expected as many numbers as x, {len(x)}, for pairs, got {len(y)}")
        weights, exact = _signs(len(x), replicates, seed)
        data, shifted, n = x - y, np.ones(len(x)), len(x)
    else:
        weights, exact = _splits(len(x), len(y), replicates, seed)
        data, n = np.concatenate([x, y]), len(x) + len(y)
        shifted = (np.arange(n) < len(x)).astype(float)
    data = data - data.mean() if not paired else data  # smaller rounding; differences of means do not change
    value = float(x.mean() - y.mean())
    drawn, moved = weights @ data, weights @ shifted
    slack = 1e-12 * float(np.abs(data).max())
    extreme = int((np.abs(drawn) >= abs(value) - slack).sum())
    total = len(drawn) if exact else len(drawn) + 1
    p = (extreme if exact else extreme + 1) / total
    low, high = _inverted(value, drawn, moved, level, total - len(drawn))
    kind = "signs of paired differences" if paired else "group labels"
    how = f"all {total} rearrangements" if exact else f"{replicates} random rearrangements, seed {seed}"
    note = "too few rearrangements to bound the difference" if math.isinf(low) else ""
    return Inference(value, low, high, level, unit, resampled, n, p, f"permutation of {kind}, {how}", note)


def _splits(n: int, m: int, replicates: int, seed: int) -> tuple[np.ndarray, bool]:
    """Rows (R, n + m) whose product with the numbers is a difference of means; whether they are all there are."""
    if math.comb(n + m, n) <= EXACT:
        first = np.zeros((math.comb(n + m, n), n + m))
        for row, chosen in zip(first, itertools.combinations(range(n + m), n), strict=True):
            row[list(chosen)] = 1
        return first / n - (1 - first) / m, True
    rng = np.random.default_rng(seed)
    row = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])
    return rng.permuted(np.tile(row, (replicates, 1)), axis=1), False


def _signs(n: int, replicates: int, seed: int) -> tuple[np.ndarray, bool]:
    """Rows (R, n) of signs over n, and whether they are all there are."""
    if 2**n <= EXACT:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n))) / n, True
    return np.random.default_rng(seed).choice((1.0, -1.0), size=(replicates, n)) / n, False


def _inverted(value: float, drawn: np.ndarray, moved: np.ndarray, level: float, extra: int) -> tuple[float, float]:
    """The shifts that the test does not reject.

    A shift d turns the observed difference into value - d and rearrangement r's into A - d B. It counts as extreme for
    d between the two roots of |A - d B| = |value - d|, which lie on either side of `value` as |B| <= 1. So the number
    of extreme ones falls with the distance of d, and the limits are order statistics of the roots.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = np.stack([(value - drawn) / (1 - moved), (value + drawn) / (1 + moved)])
    roots[0, np.isclose(moved, 1)] = -math.inf  # the rearrangement that changes nothing is extreme at every shift
    roots[1, np.isclose(moved, 1)] = math.inf
    roots[1, np.isclose(moved, -1)] = math.inf  # nor does exchanging the groups
    roots[0, np.isclose(moved, -1)] = -math.inf
    low, high = np.sort(roots.min(0)), np.sort(roots.max(0))[::-1]
    spare = (
        math.floor((1 - level) * (len(drawn) + extra) + 1e-9) - extra
    )  # how many may be extreme and d still rejected
    if spare < 0 or spare >= len(drawn):
        return -math.inf, math.inf
    return float(min(low[spare], value)), float(max(high[spare], value))


@dataclass(frozen=True)
class Equivalence(Inference):
    """`Inference` of a difference against `margin`: `p` of the hypothesis that it is at least the margin in size.

    `verdict`: "equivalent" if the whole interval lies within (-margin, margin), "different" if wholly outside, else
    "undecided". The interval is at 1 - 2 alpha, as two one-sided tests at alpha have it.
    """

    margin: float = math.nan
    verdict: Literal["equivalent", "different", "undecided"] = "undecided"

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.verdict} within a margin of {self.margin:.4g}"


def equivalence(
    x: Any, y: Any = None, *, margin: float, alpha: float = 0.05, unit: str = "", resampled: str = "seeds"
) -> Equivalence:
    """Two one-sided tests (TOST) of whether a mean difference is smaller than `margin` in size.

    `x` (n,): paired differences, one for each seed; or, with `y` (m,), two independent groups (Welch). At least two
    numbers each. The value is mean(x) (- mean(y)) with its interval at 1 - 2 `alpha`; p the greater of the two
    one-sided ones. `margin` > 0 in the unit of the numbers: the difference that would not matter.

    Source: Schuirmann 1987. Raises InputError on another margin, fewer than two numbers, NaN or infinity.
    """
    from scipy import stats

    if not 0 < alpha < 0.5:
        raise InputError(f"alpha: expected a number between 0 and 0.5, got {alpha!r}")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
        raise InputError(f"margin: expected a positive number, got {margin!r}")
    x = numbers("x", x, 2)
    if y is None:
        n = fewest = len(x)
        value, error, freedom = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(n), float(n - 1)
    else:
        y = numbers("y", y, 2)
        n, fewest = len(x) + len(y), min(len(x), len(y))
        value, error, freedom = _welch(x, y)
    level = 1 - 2 * alpha
    half = t_quantile(level, freedom) * error
    low, high = value - half, value + half
    if error > 0:
        p = float(stats.t.sf((margin - abs(value)) / error, freedom))
    else:
        p = 0.0 if abs(value) < margin else 1.0
    kind = "two one-sided t tests" if y is None else "two one-sided Welch tests"
    note = few_note(fewest, resampled if y is None else f"{resampled} in a group")
    return Equivalence(
        *(value, low, high, level, unit, resampled, n, p, kind, note),
        margin=float(margin),
        verdict=equivalence_verdict(low, high, margin),
    )


def equivalence_verdict(low: float, high: float, margin: float) -> Literal["equivalent", "different", "undecided"]:
    """Where the interval of a difference lies against (-margin, margin): within, wholly outside, or across."""
    if -margin < low and high < margin:
        return "equivalent"
    return "different" if low > margin or high < -margin else "undecided"
