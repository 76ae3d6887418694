"""Explicitness: how well linear classifiers tell the values of each factor from the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .score import TEST, TRAIN, Score, deviations, moderate
from .splits import split_samples

_ENTRIES = 1 << 16  # numbers of a chunk of rows, so that it stays in the cache
_STEPS = 100


@dataclass(frozen=True)
class Explicitness(Score):
    """`Score` in [0, 1], chance .5. `per_factor`: the mean AUC by name."""

    per_factor: dict[str, float] = field(default_factory=dict)


def explicitness(
    codes: Any,
    factors: Any = None,
    *,
    train: int = TRAIN,
    test: int = TEST,
    factor_names: Sequence[str] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Explicitness:
    """Mean over factors of the mean over their values of the ROC AUC of one-versus-rest logistic regression.

    `codes` (N, L) numbers and `factors` (N, K) integers, tensors or arrays: `train` random samples to train on and
    `test` others, without replacement; with fewer samples 2/3 and 1/3, said in `note`. Codes are standardised by the
    training samples; each value of a factor has a classifier with balanced class weights and scikit-learn's penalty
    (C = 1, not on the intercept), solved to convergence by Newton's method, all at once. AUC is on the test samples:
    .5 is chance, 1 perfect order. Values without training or test samples on both sides are left out and counted in
    `note`. The interval is DeLong's for the mean, over the test samples with the classifiers fixed.

    Source: Ridgeway & Mozer 2018 (arXiv 1802.05312), with the mean of AUCs as google-research/disentanglement_lib takes
    it; DeLong et al. 1988 (Biometrics 44). Raises InputError as `mig` does, for fewer than 3 samples, counts below 1,
    or where no value can be tested.
    """
    data = split_samples(codes, factors, train, test, seed, factor_names)
    x, x_test, n = moderate(data.codes), moderate(data.codes_test), len(data.codes_test)
    note = "" if (len(x), n) == (train, test) else data.text
    mean, sd = x.mean(0), deviations(x) * (1 - 1 / len(x)) ** 0.5
    varies = x.min(0) < x.max(0)
    x = (x[:, varies] - mean[varies]) / sd[varies]
    x_test = (x_test[:, varies] - mean[varies]) / sd[varies]
    aucs, influence, left_out = {}, np.zeros(n), 0
    for name, v, v_test in zip(data.names, data.levels.T, data.levels_test.T, strict=True):
        values = np.union1d(v, v_test)
        y, y_test = (levels[:, None] == values for levels in (v, v_test))
        usable = np.flatnonzero(y.any(0) & ~y.all(0) & y_test.any(0) & ~y_test.all(0))
        left_out += len(values) - len(usable)
        if not len(usable):
            continue
        weights = one_versus_rest(x, y[:, usable])
        scores = np.ascontiguousarray((with_intercept(x_test) @ weights).T)
        found = [_auc(scores[c], y_test[:, k]) for c, k in enumerate(usable)]
        aucs[name] = float(np.mean([value for value, _ in found]))
        influence += np.mean([part for _, part in found], axis=0)
    if not aucs:
        raise InputError(
            f"factors: expected values that occur in training and in test samples, got none among N = {len(x) + n}"
        )
    value = float(np.mean(list(aucs.values())))
    low, high = _interval(value, influence / len(aucs), level)
    missing = [name for name in data.names if name not in aucs]
    notes = [note, f"{left_out} factor values without train or test samples left out" if left_out else ""]
    notes.append(f"{', '.join(missing)} left out" if missing else "")
    return Explicitness(
        value,
        low,
        high,
        level,
        "",
        "test samples",
        n,
        dropped=data.dropped,
        note="; ".join(filter(None, notes)),
        per_factor=aucs,
    )


def with_intercept(x: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, D + 1), the last column 1."""
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def one_versus_rest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (D + 1, C), the last row intercepts, of balanced logistic regressions, one for each column of y.

    x (N, D) standardised, y (N, C) bool, both values in each column. Each minimises the sum over samples of the class
    weight N / (2 N_class) times the logistic loss, plus |w|^2 / 2 without the intercept, as scikit-learn's
    `LogisticRegression(class_weight="balanced")` does. Newton's method with step halving; strictly convex.
    """
    x = with_intercept(x)
    n, d = x.shape
    positive = y.sum(0)
    weight = np.where(y, n / (2 * positive), n / (2 * (n - positive)))
    penalty = np.ones((d, 1))
    penalty[-1] = 0
    rows, columns = np.tril_indices(d)
    w = np.zeros((d, y.shape[1]))
    value, gradient, hessian = _objective(x, y, weight, penalty, w, rows, columns)
    for _ in range(_STEPS):
        step = np.linalg.solve(hessian, gradient.T[:, :, None])[:, :, 0].T
        decrement = (step * gradient).sum(0)  # twice what a step gains of the objective, about
        if (decrement <= 1e-8 * n).all():  # this near, a step squares the error
            return w - step
        length = np.ones(w.shape[1])
        for _ in range(40):
            tried = _objective(x, y, weight, penalty, w - length * step, rows, columns)
            worse = tried[0] > value - 1e-4 * length * decrement + 1e-12 * n
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        else:
            break
        w = w - length * step
        value, gradient, hessian = tried
    return w


def _objective(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    penalty: np.ndarray,
    w: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objective (C,), gradient (d, C) and Hessian (C, d, d) at w (d, C)."""
    d, classes = w.shape
    value = (penalty * w * w).sum(0) / 2
    gradient = penalty * w
    products = np.zeros((len(rows), classes))
    chunk = max(64, _ENTRIES // max(classes, len(rows)))
    for first in range(0, len(x), chunk):
        part, truth, of_class = (a[first : first + chunk] for a in (x, y, weight))
        margin = part @ w
        margin = np.where(truth, -margin, margin)
        small = np.exp(-np.abs(margin))
        value += (of_class * (np.maximum(margin, 0) + np.log1p(small))).sum(0)
        wrong = np.where(margin > 0, 1.0, small) / (1 + small)  # probability of the other class
        of_class = of_class * wrong
        gradient += part.T @ np.where(truth, -of_class, of_class)
        products += (part[:, rows] * part[:, columns]).T @ (of_class * (1 - wrong))
    hessian = np.empty((classes, d, d))
    hessian[:, rows, columns] = hessian[:, columns, rows] = products.T
    hessian[:, range(d), range(d)] += penalty[:, 0] + 1e-12 * len(x)
    return value, gradient, hessian


def _auc(score: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
    """Area under the ROC curve, ties counted half, and each sample's influence on it (N,)."""
    order = score.argsort()
    ordered, positive = score[order], truth[order]
    new = np.concatenate([[True], ordered[1:] > ordered[:-1]])
    first = np.maximum.accumulate(np.where(new, np.arange(len(score)), 0))  # of the samples that score alike
    last = np.append(np.flatnonzero(new)[1:], len(score))[new.cumsum() - 1]
    up_to = np.concatenate([[0], positive.cumsum()])  # positives among the first samples in order
    total = int(up_to[-1])
    positives_below = (up_to[first] + up_to[last]) / 2
    negatives_below = (first + last) / 2 - positives_below
    # of a positive the share of negatives below it, of a negative the share of positives above it
    placed = np.where(positive, negatives_below / (len(score) - total), 1 - positives_below / total)
    value = float(placed[positive].mean())
    influence = np.empty(len(score))
    influence[order] = (placed - value) * np.where(positive, len(score) / total, len(score) / (len(score) - total))
    return value, influence


def _interval(value: float, influence: np.ndarray, level: float) -> tuple[float, float]:
    from scipy import stats

    n = len(influence)
    if n < 2:
        return 0.0, 1.0
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(influence.std(ddof=1)) / n**0.5
    return max(0.0, value - half), min(1.0, value + half)
