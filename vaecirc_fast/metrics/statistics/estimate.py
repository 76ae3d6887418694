"""An estimate with its interval, the verdict on a claim, and the checks that all statistics share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ...errors import InputError

FEW = 8  # below this many replicates a percentile interval is too narrow: three cover 72 %, not 95 %


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


@dataclass(frozen=True)
class Inference(Estimate):
    """`Estimate` with the two-sided `p` of the hypothesis that the value is 0, the `method` of interval and p, and a
    `note` of what the data could not support ("" if nothing)."""

    p: float = math.nan
    method: str = ""
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return f"{super().__str__()}, p = {self.p:.3g}, {self.method}{note}"


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


def t_quantile(level: float, freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, freedom))


def as_array(x: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def finite(name: str, x: Any) -> np.ndarray:
    array = as_array(x)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InputError(
            f"{name}: expected at least one finite number, shape (n,), got shape {array.shape}"
            f"{'' if np.isfinite(array).all() else ' with NaN or infinity'}"
        )
    return array


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")


def check_whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")


def numbers(name: str, x: Any, least: int) -> np.ndarray:
    """`x` as finite float64 (n,) with n >= `least`, or InputError."""
    x = finite(name, x)
    if len(x) < least:
        raise InputError(f"{name}: expected at least {least} numbers, got {len(x)}")
    return x


def few_note(n: int, resampled: str) -> str:
    """What to say of an interval that rests on fewer than 8 replicates and on the assumption of normal ones."""
    return f"only {n} {resampled}: the interval rests on their being normally distributed" if n < FEW else ""


def column(data: Any, name: str) -> Any:
    """Column `name` of the table `data`, without missing values; InputError otherwise."""
    import pandas

    if not isinstance(data, pandas.DataFrame):
        raise InputError(f"data: expected a pandas DataFrame, got {type(data).__name__}")
    if name not in data.columns:
        raise InputError(f"data: has no column {name!r}; its columns are {', '.join(map(str, data.columns))}")
    values: pandas.Series = data.loc[:, name]
    missing = int(values.isna().to_numpy().sum())
    if missing or not len(data):
        raise InputError(f"data: column {name!r} misses {missing} of {len(data)} values; leave those rows out first")
    return values
