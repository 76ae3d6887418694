"""The slope of one quantity on another across runs, with the data set as a random effect."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from .estimate import Inference, check_level, column, numbers, t_quantile

if TYPE_CHECKING:
    import pandas

OPTIMIZERS = ("lbfgs", "bfgs", "powell")
_SINGULAR = 1e-6  # share of the residual variance below which a variance between groups counts as 0


@dataclass(frozen=True)
class MixedSlope(Inference):
    """`Inference` slope; `groups`: how many data sets; `between`: sd of their intercepts, in units of y, `residual`: sd
    around their lines; `converged`: whether the likelihood was maximised; `singular`: whether a variance between data
    sets came out as 0."""

    groups: int = 0
    between: float = math.nan
    residual: float = math.nan
    converged: bool = False
    singular: bool = False


def mixed_slope(
    data: pandas.DataFrame,
    y: str,
    x: str,
    group: str = "data",
    random_slope: bool = False,
    level: float = 0.95,
    unit: str = "",
) -> MixedSlope:
    """Slope of column `y` on column `x` with a random intercept for each level of `group`, by restricted likelihood.

        y = a + b x + u_group + e,    u ~ N(0, between^2), e ~ N(0, residual^2)     # + v_group x with random_slope

    `data`: one row a run. The interval is b +- t times its standard error, with n - groups - 1 degrees of freedom,
    those of the slope within data sets; with `random_slope` groups - 1, as the slope is then replicated by data sets.
    Where the optimizers do not converge the interval is (-inf, inf) and p is 1; where a variance between data sets
    comes out as 0 the fit is that of least squares. `note` says so, and warns of fewer than 8 data sets.

    Computed by statsmodels' MixedLM. Raises InputError on unknown or incomplete columns, fewer than two data sets,
    fewer than 2 rows more than data sets, or a column that does not vary (x: within any data set).
    """
    check_level(level)
    b, a = (numbers(f"data[{name!r}]", column(data, name), 4) for name in (y, x))
    labels = data.groupby(column(data, group), sort=False).ngroup().to_numpy()
    groups, n = int(labels.max()) + 1, len(a)
    if groups < 2:
        raise InputError(f"group: expected at least two levels of {group!r}, got {groups}; use pearson for one")
    if n - groups < 2:
        raise InputError(f"data: expected at least {groups + 2} rows for {groups} levels of {group!r}, got {n}")
    means = np.bincount(labels, a) / np.bincount(labels)
    if np.abs(a - means[labels]).max() <= 1e-12 * np.abs(a).max() or b.min() == b.max():
        raise InputError(f"data: expected {x!r} to vary within levels of {group!r}, and {y!r} to vary")
    scale_a, scale_b = float(a.std()), float(b.std())
    result, converged = _fit((b - b.mean()) / scale_b, (a - a.mean()) / scale_a, labels, random_slope)
    freedom = groups - 1 if random_slope else n - groups - 1
    factor = scale_b / scale_a
    notes, value = [], factor * float(result.fe_params[1])
    spread = np.diag(np.atleast_2d(result.cov_re))  # in units of the scaled y, as the residual variance is
    # a correlation of +-1 between intercepts and slopes is singular as well
    least = float(np.linalg.eigvalsh(np.atleast_2d(result.cov_re))[0])
    singular = least <= _SINGULAR * max(float(result.scale), 1e-300)
    error = factor * float(result.bse_fe[1])
    if converged and math.isfinite(error):
        from scipy import stats

        half = t_quantile(level, freedom) * error
        p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error > 0 else float(value == 0)
    else:
        half, p, converged = math.inf, 1.0, False
        notes.append("the likelihood was not maximised, so the slope has no interval")
    if singular:
        notes.append("a variance between data sets is estimated as 0")
    if groups < 8:
        notes.append(f"only {groups} data sets: their variance is hardly known")
    kind = "random intercepts and slopes" if random_slope else "random intercepts"
    return MixedSlope(
        value,
        value - half,
        value + half,
        level,
        unit,
        f"runs in {groups} levels of {group}",
        n,
        p,
        f"mixed model, {kind}, restricted likelihood, t with {freedom} degrees of freedom",
        "; ".join(notes),
        groups=groups,
        between=scale_b * math.sqrt(max(float(spread[0]), 0.0)),
        residual=scale_b * math.sqrt(float(result.scale)),
        converged=converged,
        singular=singular,
    )


def _fit(b: np.ndarray, a: np.ndarray, labels: np.ndarray, random_slope: bool) -> tuple[Any, bool]:
    """statsmodels' result, and whether any of its optimizers converged."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    fixed = np.column_stack([np.ones_like(a), a])
    result: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by the caller, from what came out
        for optimizer in OPTIMIZERS:
            model = MixedLM(b, fixed, groups=labels, exog_re=fixed if random_slope else None)
            try:
                result = model.fit(reml=True, method=optimizer)
            except np.linalg.LinAlgError:
                continue
            if result.converged and np.isfinite(result.bse_fe).all():
                return result, True
    if result is None:
        raise InputError("data: the mixed model cannot be fitted, its matrices are singular")
    return result, False
