"""Correlations across runs: Pearson, Spearman and partial, with intervals, and permutations of what is exchangeable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import InputError
from .estimate import FEW, Inference, check_level, check_whole, column, few_note, numbers, t_quantile
from .exchange import Blocks, blocks_of, permutations
from .resampling import percentile_interval, poisson_weights

if TYPE_CHECKING:
    import pandas

Method = Literal["pearson", "spearman"]
_COLLINEAR = 1e-8  # share of a covariate's variation that must be its own


def pearson(
    x: Any,
    y: Any,
    *,
    permute: Sequence | None = None,
    within: Sequence | None = None,
    interval: Literal["fisher", "bootstrap"] = "fisher",
    replicates: int = 9999,
    seed: int = 0,
    level: float = 0.95,
    resampled: str = "runs",
) -> Inference:
    """Pearson's correlation of `x` and `y` (n,), n >= 4, with interval and p.

    permute, within: a label for each row; see `partial_correlation`, whose correlation with no covariates this is.
    Without them p is Student's and the interval Fisher's, tanh(atanh r +- z / sqrt(n - 3)), or ("bootstrap", n >= 8)
    the percentiles of a Poisson bootstrap over rows.

    Raises InputError on wrong lengths, NaN, infinity, or numbers that do not vary.
    """
    blocked = _blocked(x, permute, within)
    return _correlation("pearson", x, y, blocked, interval, replicates, seed, level, resampled)


def spearman(
    x: Any,
    y: Any,
    *,
    permute: Sequence | None = None,
    within: Sequence | None = None,
    interval: Literal["fisher", "bootstrap"] = "fisher",
    replicates: int = 9999,
    seed: int = 0,
    level: float = 0.95,
    resampled: str = "runs",
) -> Inference:
    """Spearman's rank correlation, ties at mean ranks; arguments, result and errors as `pearson`.

    The interval is Fisher's with variance (1 + r^2 / 2) / (n - 3) (Bonett & Wright 2000); of ranks in perfect order, at
    r halfway to the next value that n ranks can have. Below 8 rows p goes through all n! orders.
    """
    blocked = _blocked(x, permute, within)
    return _correlation("spearman", x, y, blocked, interval, replicates, seed, level, resampled)


def _blocked(x: Any, permute: Sequence | None, within: Sequence | None) -> Blocks | None:
    return None if permute is None and within is None else blocks_of(len(x), permute, within)


def _correlation(
    method: Method,
    x: Any,
    y: Any,
    blocked: Blocks | None,
    interval: str,
    replicates: int,
    seed: int,
    level: float,
    resampled: str,
) -> Inference:
    check_level(level)
    check_whole("replicates", replicates, low=1)
    check_whole("seed", seed, low=0)
    x, y = numbers("x", x, 4), numbers("y", y, 4)
    if len(x) != len(y):
        raise InputError(f"y: expected as many numbers as x, {len(x)}, got {len(y)}")
    if interval not in ("fisher", "bootstrap"):
        raise InputError(f"interval: expected 'fisher' or 'bootstrap', got {interval!r}")
    for name, v in (("x", x), ("y", y)):
        if v.min() == v.max():
            raise InputError(f"{name}: expected numbers that vary, got {len(v)} times {v[0]:g}; no correlation exists")
    if interval == "bootstrap":
        if blocked is not None:
            raise InputError("interval: 'bootstrap' resamples rows; with permute or within the units are left out")
        if len(x) < FEW:
            raise InputError(f"interval: 'bootstrap' needs at least {FEW} {resampled}, got {len(x)}; use 'fisher'")
    problem = _Problem(method, x, y, np.empty((len(x), 0)), blocked)
    found = _solve(problem, replicates, seed, level, resampled)
    if interval == "fisher":
        return found
    low, high = _bootstrap(method, x, y, replicates, seed, level)
    how = found.method.replace("Fisher's interval", "Poisson-bootstrap interval")
    return Inference(found.value, low, high, level, "", resampled, len(x), found.p, how, found.note)


def _bootstrap(
    method: Method, x: np.ndarray, y: np.ndarray, replicates: int, seed: int, level: float
) -> tuple[float, float]:
    drawn = []
    for weights in poisson_weights(replicates, len(x), seed).long().numpy():
        rows = np.repeat(np.arange(len(x)), weights)
        a, b = (_ranks(v[rows]) if method == "spearman" else v[rows] for v in (x, y))
        if len(rows) and a.min() < a.max() and b.min() < b.max():
            drawn.append(_cosine(a - a.mean(), b - b.mean()))
    return percentile_interval(drawn, level)


@dataclass(frozen=True)
class PartialCorrelation(Inference):
    """`Inference`; `given`: the covariates that were controlled for; `dropped`: those that were not, and why."""

    given: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = f", given {', '.join(self.given)}" if self.given else ""
        dropped = f"; left out: {', '.join(self.dropped)}" if self.dropped else ""
        return f"{super().__str__()}{given}{dropped}"


def partial_correlation(
    data: pandas.DataFrame,
    x: str,
    y: str,
    given: Sequence[str] = (),
    *,
    method: Method = "pearson",
    within: str | Sequence[str] = (),
    permute: str | Sequence[str] = (),
    replicates: int = 9999,
    seed: int = 0,
    level: float = 0.95,
    resampled: str = "",
) -> PartialCorrelation:
    """Correlation across runs of what the covariates leave unexplained of columns `x` and `y`: one row of `data` a run.

    given: columns to control for: numbers, or labels, one indicator for each of which is taken. method: "pearson", the
    linear form, or "spearman", the same of ranks. within: the column or columns whose levels are strata (the data set):
    every stratum has its own mean, and nothing is exchanged between strata. What does not vary inside strata, such as a
    data set's number of factors and resolution, is then explained by them and dropped: such covariates belong to pooled
    correlations, without `within`. Constant covariates, and those that earlier ones determine, are dropped too, each
    named in `dropped`.

    permute: the column or columns whose levels are the units of exchange (the architecture, not the run). The p is then
    of permutations of whole units after Freedman & Lane (1983): the residuals of y move with their units, stratum by
    stratum. Units are only exchanged where they have equally many rows in every stratum; with
    permute=["data", "architecture"] architectures are exchanged in every data set for itself, with "architecture" in
    all alike. All permutations are gone through where there are at most 10,000, else `replicates` are drawn and
    p = (1 + number at least as extreme) / (1 + replicates). The interval leaves out one unit at a time: jackknife of
    atanh r with Student's t.
    With `within` but no `permute` runs are exchanged in their strata. With neither, p is Student's with n - k - 2
    degrees of freedom for k covariates, and runs are taken to be independent; then, as with `within` alone, the
    interval is Fisher's with n - k - 3 (spearman: variance (1 + r^2 / 2) / (n - k - 3)).

    `n` is the number of units and `resampled` what they are. Raises InputError on unknown or incomplete columns, too
    few rows, an x or y that the covariates determine, or nothing to exchange.
    """
    check_level(level)
    check_whole("replicates", replicates, low=1)
    check_whole("seed", seed, low=0)
    if method not in ("pearson", "spearman"):
        raise InputError(f"method: expected 'pearson' or 'spearman', got {method!r}")
    given, within, permute = ([c] if isinstance(c, str) else list(c) for c in (given, within, permute))
    for name in (*within, *permute):
        column(data, name)
    a, b = (numbers(f"data[{name!r}]", _numeric(data, name, method), 4) for name in (x, y))
    n = len(a)
    strata = None if not within else data.groupby(within, sort=False).ngroup().to_numpy()
    units = None if not permute else data.groupby(permute, sort=False).ngroup().to_numpy()
    blocked = None if strata is None and units is None else blocks_of(n, units, strata)
    basis, kept, dropped = _covariates(data, given, strata, " and ".join(within), method)
    for name, v in ((x, a), (y, b)):
        if np.linalg.norm(_residual(v, basis)) <= _COLLINEAR * max(float(np.linalg.norm(v - v.mean())), 1e-300):
            raise InputError(f"data: column {name!r} is constant or wholly determined by {', '.join(given + within)}")
    if not resampled:
        resampled = " x ".join(f"{c}s" for c in permute) if permute else "runs"
    found = _solve(_Problem(method, a, b, basis, blocked), replicates, seed, level, resampled)
    return PartialCorrelation(**found.__dict__, given=tuple(kept), dropped=tuple(dropped))


def _numeric(data: pandas.DataFrame, name: str, method: Method) -> np.ndarray:
    import pandas

    values = column(data, name)
    if not pandas.api.types.is_numeric_dtype(values):
        raise InputError(f"data: expected numbers in column {name!r}, got {values.dtype}")
    values = values.to_numpy(dtype=float)
    return _ranks(values) if method == "spearman" else values


def _covariates(
    data: pandas.DataFrame, given: list[str], strata: np.ndarray | None, of: str, method: Method
) -> tuple[np.ndarray, list[str], list[str]]:
    """An orthonormal basis (n, k) of the centred covariates and of the strata `of` some columns; the names of the
    covariates kept, and of those dropped with the reason."""
    import pandas

    basis = np.empty((len(data), 0))
    if strata is not None:
        basis = _extended(basis, np.eye(int(strata.max()) + 1)[strata])
    by_strata = basis.shape[1]
    kept, dropped = [], []
    for name in given:
        values = column(data, name)
        if pandas.api.types.is_numeric_dtype(values) and not pandas.api.types.is_bool_dtype(values):
            columns = numbers(f"data[{name!r}]", _numeric(data, name, method), 4)[:, None]
        else:
            columns = pandas.get_dummies(values).to_numpy(dtype=float)
        wider = _extended(basis, columns)
        if wider.shape[1] > basis.shape[1]:
            kept.append(name)
        elif _extended(np.empty((len(data), 0)), columns).shape[1] == 0:
            dropped.append(f"{name} (constant)")
        elif _extended(basis[:, :by_strata], columns).shape[1] == by_strata:
            dropped.append(f"{name} (does not vary within {of})")
        else:
            dropped.append(f"{name} (determined by the covariates before it)")
        basis = wider
    return basis, kept, dropped


def _extended(basis: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`basis` and what is new in the centred `columns`, orthonormal."""
    for values in columns.T:
        values = values - values.mean()
        size = float(np.linalg.norm(values))
        if size <= 1e-12 * math.sqrt(len(values)) * float(np.abs(columns).max()):
            continue
        rest = values / size
        for _ in range(2):  # once more, as rounding leaves some of the old directions
            rest = rest - basis @ (basis.T @ rest)
        own = float(np.linalg.norm(rest))
        if own > _COLLINEAR:
            basis = np.column_stack([basis, rest / own])
    return basis


@dataclass(frozen=True)
class _Problem:
    """Numbers to correlate, (n,) each (ranks if spearman); `basis` (n, k) of what to control for; what is exchanged."""

    method: Method
    x: np.ndarray
    y: np.ndarray
    basis: np.ndarray
    blocked: Blocks | None

    def rows(self, keep: np.ndarray) -> float:
        """The correlation on the rows `keep` alone; NaN where there is none."""
        basis = _extended(np.empty((int(keep.sum()), 0)), self.basis[keep])
        x, y = (_ranks(v[keep]) if self.method == "spearman" else v[keep] for v in (self.x, self.y))
        a, b = _residual(x, basis), _residual(y, basis)
        small = 1e-12 * math.sqrt(len(x))
        if np.linalg.norm(a) <= small * np.abs(x).max() or np.linalg.norm(b) <= small * np.abs(y).max():
            return math.nan
        return _cosine(a, b)


def _solve(problem: _Problem, replicates: int, seed: int, level: float, resampled: str) -> Inference:
    from scipy import stats

    x, y = problem.x, problem.y
    if problem.method == "spearman":
        x, y = _ranks(x), _ranks(y)
    n, k = len(x), problem.basis.shape[1]
    if n - k - 2 < 1:
        raise InputError(
            f"data: {n} rows cannot support a correlation given {k} covariates; at least {k + 3} are needed"
        )
    a, b = _residual(x, problem.basis), _residual(y, problem.basis)
    r = _cosine(a, b)
    blocked = problem.blocked
    if blocked is None and problem.method == "spearman" and n < FEW and k == 0:
        blocked = blocks_of(n, None, None)
    if blocked is None:
        freedom = n - k - 2
        p = float(2 * stats.t.sf(abs(r) * math.sqrt(freedom / max(1 - r * r, 1e-300)), freedom))
        tested = f"Student's p ({freedom} degrees of freedom)"
    else:
        p, tested = _permuted(a, b, problem.basis, blocked, replicates, seed)
    notes = []
    # Ranks in perfect order would make the interval a point, or a jackknife of atanh r unbounded.
    near = _within_order(r, n) if problem.method == "spearman" else r
    if problem.blocked is not None and problem.blocked.count < n:
        units = problem.blocked.count
        low, high = _jackknife(problem, near, level)
        how = f"jackknife over {resampled}"
        if math.isinf(low):
            notes.append(f"{units} {resampled} cannot bound it")
    else:
        units = n
        error = math.inf if n - k - 3 < 1 else 1 / math.sqrt(n - k - 3)
        error *= math.sqrt(1 + r * r / 2) if problem.method == "spearman" else 1
        low, high = _fisher(near, error * float(stats.norm.ppf((1 + level) / 2)))
        how = "Fisher's interval"
    if units < FEW:
        notes.append(few_note(units, resampled))
    low, high = max(min(low, r), -1.0), min(max(high, r), 1.0)
    name = problem.method.capitalize() + (" partial" if k else "")
    return Inference(r, low, high, level, "", resampled, units, p, f"{name}, {how}, {tested}", "; ".join(notes))


def _permuted(
    a: np.ndarray, b: np.ndarray, basis: np.ndarray, blocked: Blocks, replicates: int, seed: int
) -> tuple[float, str]:
    """Two-sided p of the residuals `a` and `b` under exchanges of units (Freedman & Lane), and how it was got."""
    orders, exact = permutations(blocked, replicates, seed)
    drawn = b[orders]
    drawn = drawn - drawn.mean(1, keepdims=True)
    drawn = drawn - (drawn @ basis) @ basis.T
    size = np.linalg.norm(drawn, axis=1) * np.linalg.norm(a)
    correlations = np.divide(drawn @ a, size, out=np.zeros(len(drawn)), where=size > 0)
    extreme = int((np.abs(correlations) >= abs(_cosine(a, b)) - 1e-12).sum())
    if exact:
        return extreme / len(orders), f"p of all {len(orders)} permutations"
    return (extreme + 1) / (len(orders) + 1), f"p of {len(orders)} random permutations, seed {seed}"


def _jackknife(problem: _Problem, r: float, level: float) -> tuple[float, float]:
    """Interval of r from leaving out one unit at a time, on the scale of atanh; unbounded if one cannot be left out."""
    assert problem.blocked is not None
    units, count = problem.blocked.units, problem.blocked.count
    if count < 3:
        return -math.inf, math.inf
    left = np.array([problem.rows(units != unit) for unit in range(count)])
    if not np.isfinite(left).all():
        return -math.inf, math.inf
    if problem.method == "spearman":
        left = np.array([_within_order(v, int((units != unit).sum())) for unit, v in enumerate(left)])
    z = np.arctanh(np.clip(left, -1 + 1e-15, 1 - 1e-15))
    error = math.sqrt((count - 1) / count * float(((z - z.mean()) ** 2).sum()))
    return _fisher(r, t_quantile(level, count - 1) * error)


def _within_order(r: float, n: int) -> float:
    """r no nearer to +-1 than halfway to the next value that a correlation of n ranks can have."""
    most = 1 - 6 / (n * (n * n - 1))
    return max(-most, min(most, r))


def _fisher(r: float, half: float) -> tuple[float, float]:
    if math.isinf(half):
        return -math.inf, math.inf
    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    return math.tanh(z - half), math.tanh(z + half)


def _residual(v: np.ndarray, basis: np.ndarray) -> np.ndarray:
    v = v - v.mean()
    return v - basis @ (basis.T @ v)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    r = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return math.copysign(1.0, r) if abs(r) > 1 - 1e-14 else r


def _ranks(v: np.ndarray) -> np.ndarray:
    from scipy import stats

    return stats.rankdata(v)
