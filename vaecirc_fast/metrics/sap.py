"""Separated attribute predictability (SAP): how much better the best latent predicts a factor than the second best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import checked_codes
from .splits import split_samples
from .statistics import FEW, Estimate, percentile_interval, resampled_interval, resampling_weights

_C = 0.01  # of the support vector machines
_STEPS = 200  # of Newton's method; a dozen are needed
_CELLS = 1 << 22  # decision values held at once


@dataclass(frozen=True)
class Sap(Estimate):
    """`Estimate` of the mean gap, in [0, 1]; `per_factor` the gaps by name; `scores` (L, K) what they are gaps of:
    test accuracies, or squared correlations; `names` the factors, `dropped` those of one value; `split` says which
    samples."""

    per_factor: dict[str, float] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), compare=False)
    names: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    split: str = ""

    def __str__(self) -> str:
        left_out = f"; left out, one value: {', '.join(self.dropped)}" if self.dropped else ""
        return f"{super().__str__()}; {self.split}{left_out}"


def sap(
    codes: Any,
    factors: Any,
    *,
    continuous: bool = False,
    train: int = 10_000,
    test: int = 5_000,
    seed: int = 0,
    factor_names: Sequence[str] | None = None,
    codes_test: Any = None,
    factors_test: Any = None,
    replicates: int = 200,
    level: float = 0.95,
) -> Sap:
    """Mean over factors of (best - second best) score of single latents that predict the factor, in [0, 1].

    `codes` (N, L >= 2) numbers, the encoder means; `factors` (N, K) integers, any ids; tensors or arrays. The score of
    a latent is the accuracy, on test samples, of scikit-learn's LinearSVC(C=.01, class_weight="balanced") fitted to it
    alone: a squared hinge loss with a penalised intercept, one class against the rest, solved exactly here. `train` and
    `test` of the samples are drawn by `seed`; of fewer samples 2/3 and 1/3, which `split` of the result says. Samples
    of one's own to test on: `codes_test`, `factors_test`.

    continuous: factors are numbers, and the score is their squared correlation with the latent over `train` samples.
    One-valued factors are left out and named in `dropped`; a constant latent has correlation 0.

    The interval resamples test samples (continuous: training samples), with the fitted machines as they are:
    `replicates` Poisson bootstraps, centred on the value; below 8 samples the jackknife. 0 leaves it out (nan).

    Source: Kumar, Sattigeri and Balakrishnan 2018; protocol of google-research/disentanglement_lib's `sap_score.py`.
    Raises InputError on wrong shapes, unequal N, fewer than 3 samples or 2 latents, NaN, factors that are not integers
    (unless continuous), names that do not fit, or no factor that varies among the training samples.
    """
    if isinstance(replicates, bool) or not isinstance(replicates, int | np.integer) or replicates < 0:
        raise InputError(f"replicates: expected a whole number >= 0, got {replicates!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")
    if continuous:
        return _continuous(codes, factors, train, seed, factor_names, (codes_test, factors_test), replicates, level)
    data = split_samples(codes, factors, train, test, seed, factor_names, codes_test, factors_test)
    _check_latents(data.codes)
    hits = _hits(data.codes, data.levels, data.codes_test, data.levels_test)
    n, latents, factor_count = hits.shape
    flat = hits.reshape(n, -1)

    def scored(weights: np.ndarray) -> np.ndarray:
        return (weights @ flat / weights.sum(1, keepdims=True)).reshape(-1, latents, factor_count)

    return _result(scored, n, "test samples", data.names, data.dropped, data.text, seed, replicates, level)


def _check_latents(codes: np.ndarray) -> None:
    if codes.shape[1] < 2:
        raise InputError(
            "codes: expected at least 2 latents, of which the best and the second best are compared, got 1"
        )


def _result(
    scored: Any,
    n: int,
    resampled: str,
    names: tuple[str, ...],
    dropped: tuple[str, ...],
    split: str,
    seed: int,
    replicates: int,
    level: float,
) -> Sap:
    """From `scored`: weights (R, n) of samples -> scores (R, L, K)."""
    scores = scored(np.ones((1, n)))[0]
    gaps = _gaps(scores)
    value = float(gaps.mean())
    low = high = math.nan
    if replicates:
        weights = resampling_weights(int(replicates), n, int(seed)).double().numpy()
        drawn = _gaps(scored(weights[weights.sum(1) > 0])).mean(-1)
        if n >= FEW:
            low, high = percentile_interval(drawn, level, centre=value)
        else:
            low, high = resampled_interval(value, drawn, n, level)
    per_factor = dict(zip(names, gaps.tolist(), strict=True))
    return Sap(value, low, high, level, "", resampled, n, per_factor, scores, names, dropped, split)


def _gaps(scores: np.ndarray) -> np.ndarray:
    """Best less second best over latents: (..., L, K) -> (..., K)."""
    ranked = np.partition(scores, -2, axis=-2)
    return ranked[..., -1, :] - ranked[..., -2, :]


# --- continuous factors ----------------------------------------------------------------------------------------------


def _continuous(
    codes: Any,
    factors: Any,
    train: int,
    seed: int,
    factor_names: Sequence[str] | None,
    own_test: tuple[Any, Any],
    replicates: int,
    level: float,
) -> Sap:
    if own_test != (None, None):
        raise InputError("codes_test, factors_test: correlations are of training samples, so there is nothing to test")
    if isinstance(train, bool) or not isinstance(train, int | np.integer) or train < 2:
        raise InputError(f"train: expected a whole number >= 2, got {train!r}")
    x = checked_codes(codes)
    _check_latents(x)
    try:
        y = checked_codes(factors)
    except InputError as error:
        raise InputError(
            str(error).replace("codes:", "factors:").replace("L)", "K)").replace("latent", "factor")
        ) from None
    if len(y) != len(x):
        raise InputError(f"factors: expected as many samples as codes, N = {len(x)}, got {len(y)}")
    names = tuple(f"factor {k}" for k in range(y.shape[1])) if factor_names is None else tuple(factor_names)
    if len(names) != y.shape[1] or len(set(names)) != len(names):
        raise InputError(f"factor_names: expected {y.shape[1]} different names, one for each factor, got {names}")
    n = min(int(train), len(x))
    rows = np.random.default_rng(seed).permutation(len(x))[:n] if n < len(x) else np.arange(n)
    x, y = x[rows], y[rows]
    varies = y.min(0) < y.max(0)
    if not varies.any():
        raise InputError(f"factors: expected one that varies among the {n} samples, got none")
    x, y = _standard(x), _standard(y[:, varies])
    products = (x[:, :, None] * y[:, None, :]).reshape(n, -1)

    def scored(weights: np.ndarray) -> np.ndarray:
        mass = weights.sum(1, keepdims=True)
        mean_x, mean_y, square_x, square_y = (weights @ a / mass for a in (x, y, x**2, y**2))
        covariance = (weights @ products / mass).reshape(-1, x.shape[1], y.shape[1])
        covariance -= mean_x[:, :, None] * mean_y[:, None, :]
        spread = (square_x - mean_x**2)[:, :, None] * (square_y - mean_y**2)[:, None, :]
        # 1e-12 of the variance of all samples: a resample that rounding alone makes vary does not
        return np.where(spread > 1e-12, covariance**2 / np.where(spread > 1e-12, spread, 1), 0)

    text = f"{n:,} samples" + ("" if n == train else f", fewer than {train:,}")
    kept = tuple(name for name, k in zip(names, varies, strict=True) if k)
    dropped = tuple(name for name, k in zip(names, varies, strict=True) if not k)
    return _result(scored, n, "samples", kept, dropped, text, seed, replicates, level)


def _standard(columns: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1; constant ones 0."""
    low, high = columns.min(0), columns.max(0)
    columns = (columns - low) / np.where(high > low, high - low, 1)
    columns = columns - columns.mean(0)
    return np.where(high > low, columns / np.where(high > low, columns.std(0), 1), 0)


# --- support vector machines of one latent ---------------------------------------------------------------------------


def _hits(codes: np.ndarray, levels: np.ndarray, codes_test: np.ndarray, levels_test: np.ndarray) -> np.ndarray:
    """Whether each test sample is predicted rightly, from each latent and of each factor: (T, L, K) float64."""
    machines = _Machines(levels)
    hits = np.zeros((len(codes_test), codes.shape[1], levels.shape[1]))
    block = max(1, _CELLS // len(machines.positive))
    for latent in range(codes.shape[1]):
        scale = max(1.0, float(np.abs(codes[:, latent]).max()))  # or squares of huge codes would overflow
        slopes, intercepts = machines.fit(codes[:, latent] / scale, 1 / scale**2 if scale < 1e150 else 0.0)
        for start in range(0, len(codes_test), block):
            rows = slice(start, start + block)
            x = codes_test[rows, latent, None] / scale
            for k, (lanes, classes) in enumerate(machines.factors):
                decision = x * slopes[lanes] + intercepts[lanes]
                # of two classes one machine, its boundary the first's; of more the largest, the first of equals
                predicted = classes[decision.argmax(1) if len(classes) > 2 else (decision[:, 0] > 0).astype(int)]
                hits[rows, latent, k] = predicted == levels_test[rows, k]
    return hits


class _Machines:
    """LinearSVC(C=.01, class_weight="balanced") of all factors on one latent: minima of

        (r w^2 + b^2) / 2 + sum_i c_i max(0, 1 - s_i (w x_i + b))^2,     s_i = 1 in a class and -1 out of it

    with c_i = C N / (number of classes x size of the class) in it and C out of it; of two classes one machine, with the
    balanced weight on both sides; r = 1, or of codes divided by a number 1 / its square. A machine (w, b) is a lane.
    The samples within its margin lie on one side of a code, so their sums are differences of running sums.
    """

    def __init__(self, levels: np.ndarray) -> None:
        self.n = len(levels)
        self.factors: list[tuple[slice, np.ndarray]] = []
        members, inside, outside = [], [], []
        for column in levels.T:
            classes, sizes = np.unique(column, return_counts=True)
            weights = _C * self.n / (len(classes) * sizes)
            first = len(members)
            chosen = range(len(classes)) if len(classes) > 2 else [1]
            for c in chosen:
                members.append(np.flatnonzero(column == classes[c]))
                inside.append(weights[c])
                outside.append(_C if len(classes) > 2 else weights[0])
            self.factors.append((slice(first, len(members)), classes))
        self.positive, self.negative = np.array(inside), np.array(outside)
        self.sizes = np.array([len(m) for m in members])
        self.starts = np.concatenate([[0], self.sizes.cumsum()])[:-1]
        self.lane = np.repeat(np.arange(len(members)), self.sizes)
        self.samples = np.concatenate(members)

    def fit(self, x: np.ndarray, ridge: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and intercepts of all lanes on one latent's codes (N,); `ridge` is r."""
        self.ridge = ridge
        order = x.argsort(kind="stable")
        rank = np.empty(self.n, dtype=np.int64)
        rank[order] = np.arange(self.n)
        keys = np.sort(self.lane * self.n + rank[self.samples])  # members by lane, and within by code
        self.sorted, self.keys = x[order], keys
        self.all = _running(self.sorted)
        self.own = _running(self.sorted[keys % self.n])
        w, b = np.zeros(len(self.sizes)), np.zeros(len(self.sizes))
        value, gradient, hessian = self._at(w, b)
        scale = np.abs(gradient).max(0) + 1
        for _ in range(_STEPS):
            open_ = np.abs(gradient).max(0) > 1e-11 * scale
            if not open_.any():
                break
            step = _solved(hessian, gradient)
            descent = (step * gradient).sum(0)
            size = np.where(open_, 1.0, 0.0)
            for _ in range(40):
                tried = self._at(w - size * step[0], b - size * step[1])
                # a value that rounding alone makes larger is not larger
                worse = tried[0] > value - 1e-4 * size * descent + 1e-13 * np.abs(value)
                if not worse.any():
                    break
                size = np.where(worse, size / 2, size)
            w, b = w - size * step[0], b - size * step[1]
            value, gradient, hessian = tried
        return w, b

    def _at(self, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, gradient (2, lanes) and Hessian (3: ww, wb, bb; lanes) at slopes and intercepts."""
        count, first, second = self._within(w, b)
        value, gw, gb = (self.ridge * w**2 + b**2) / 2, self.ridge * w, b.copy()
        hww, hwb, hbb = np.full_like(w, self.ridge), np.zeros_like(w), np.ones_like(w)
        for side, weight in ((0, self.positive), (1, self.negative)):
            sign = 1 - 2 * side
            n, sx, sxx = count[side], first[side], second[side]
            short = 1 - sign * b  # what a sample at x = 0 lacks
            value += weight * (short**2 * n - 2 * sign * short * w * sx + w**2 * sxx)
            gw += 2 * weight * (w * sxx - sign * short * sx)
            gb += 2 * weight * (w * sx - sign * short * n)
            hww, hwb, hbb = hww + 2 * weight * sxx, hwb + 2 * weight * sx, hbb + 2 * weight * n
        return value, np.stack([gw, gb]), np.stack([hww, hwb, hbb])

    def _within(self, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number, sum and sum of squares of the codes within the margin: (2: in the class and out of it; lanes)."""
        sums = []
        for sign in (1, -1):
            # in the class: w x + b < 1; out of it: w x + b > -1
            with np.errstate(divide="ignore", invalid="ignore"):
                edge = np.where(w == 0, np.where(sign * b < 1, np.inf, -np.inf), (sign - b) / w)
            place = np.searchsorted(self.sorted, edge)
            lanes = np.arange(len(w))
            own = np.searchsorted(self.keys, lanes * self.n + place)
            below = self.own[:, own] - self.own[:, self.starts]
            whole = self.own[:, self.starts + self.sizes] - self.own[:, self.starts]
            if sign < 0:
                below, whole = self.all[:, place] - below, self.all[:, -1:] - whole
            sums.append(np.where((w * sign >= 0), below, whole - below))
        return tuple(np.stack(parts) for parts in zip(*sums, strict=True))


def _running(x: np.ndarray) -> np.ndarray:
    """Number, sum and sum of squares of the first 0, 1, ..., n of x: (3, n + 1)."""
    out = np.zeros((3, len(x) + 1))
    out[0, 1:] = np.arange(1, len(x) + 1)
    np.cumsum(x, out=out[1, 1:])
    np.cumsum(x * x, out=out[2, 1:])
    return out


def _solved(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    hww, hwb, hbb = hessian
    determinant = hww * hbb - hwb**2
    return np.stack([hbb * gradient[0] - hwb * gradient[1], hww * gradient[1] - hwb * gradient[0]]) / determinant
