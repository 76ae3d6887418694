"""Benchmark of the battery: every disentanglement metric on codes of all dSprites, against the protocols as loops.

The loops are the reference protocols as one writes them (disentanglement_lib's structure, scikit-learn's parts), with
groups looked up in the same codes: without that they would encode 2.9 million images more. Ours give an interval with
each number, which the loops do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vaecirc_fast import metrics
from vaecirc_fast.metrics.battery import METRICS
from vaecirc_fast.metrics.encoded import Encoded

from .harness import measure

SIZES = (1, 3, 6, 40, 32, 32)
NAMES = ("color", "shape", "scale", "orientation", "posX", "posY")
TRAIN, TEST, BATCH = 10_000, 5_000, 64
CASE = "dSprites, 10 latents"


@functools.cache
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Codes (737280, 10) float32 of a half-disentangled encoder, and factors."""
    rng = np.random.default_rng(0)
    factors = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, SIZES), indexing="ij")], 1)
    codes = 0.3 * rng.normal(size=(len(factors), 10))
    scaled = (factors[:, 1:] - factors[:, 1:].mean(0)) / factors[:, 1:].std(0)
    codes[:, :5] += scaled @ (np.eye(5) + 0.2 * rng.normal(size=(5, 5)))
    codes[:, 9] *= 0.05
    return codes.astype(np.float32), factors


@functools.cache
def rows_of() -> list[list[np.ndarray]]:
    """For each factor that varies, the rows of each of its values."""
    _, factors = grid()
    return [[np.flatnonzero(v == a) for a in range(size)] for v, size in zip(factors.T, SIZES, strict=True) if size > 1]


def sample(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = grid()
    rows = np.random.default_rng(seed).integers(len(codes), size=n)
    return codes[rows].astype(np.float64), factors[rows][:, 1:]


def factor_vae_loop() -> float:
    codes, factors = grid()
    rng, rows = np.random.default_rng(0), rows_of()
    variance = codes[rng.integers(len(codes), size=TRAIN)].var(0, ddof=1)
    active = np.flatnonzero(np.sqrt(variance) >= 0.05)

    def votes(n: int) -> np.ndarray:
        table = np.zeros((len(rows), len(active)))
        for _ in range(n):
            k = rng.integers(len(rows))
            same = rows[k][rng.integers(len(rows[k]))]
            z = codes[same[rng.integers(len(same), size=BATCH)]][:, active]
            table[k, (z.var(0, ddof=1) / variance[active]).argmin()] += 1
        return table

    classifier = votes(TRAIN).argmax(0)
    return votes(TEST)[classifier, np.arange(len(active))].sum() / TEST


def beta_vae_loop() -> float:
    from sklearn.linear_model import LogisticRegression

    codes, factors = grid()
    rng, rows = np.random.default_rng(0), rows_of()

    def points(n: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = np.zeros((n, codes.shape[1])), np.zeros(n, dtype=int)
        for i in range(n):
            y[i] = k = rng.integers(len(rows))
            first = rng.integers(len(codes), size=BATCH)
            values = factors[first, k + 1]
            second = np.array([rows[k][a][rng.integers(len(rows[k][a]))] for a in values])
            x[i] = np.abs(codes[first] - codes[second]).mean(0)
        return x, y

    return LogisticRegression(max_iter=1000).fit(*points(TRAIN)).score(*points(TEST))


def _information(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    from sklearn.metrics import mutual_info_score

    cut = np.stack([np.digitize(z, np.histogram(z, 20)[1][:-1]) for z in codes.T], 1)
    others = cut if others is codes else others
    return np.array([[mutual_info_score(v, z) for v in others.T] for z in cut.T])


def mig_loop() -> float:
    from sklearn.metrics import mutual_info_score

    codes, factors = sample(0, TRAIN)
    ordered = np.sort(_information(codes, factors), 0)
    return float(np.mean((ordered[-1] - ordered[-2]) / [mutual_info_score(v, v) for v in factors.T]))


def modularity_loop() -> float:
    squared = _information(*sample(0, TRAIN)) ** 2
    best = squared.max(1)
    return float((1 - (squared.sum(1) - best) / (best * (squared.shape[1] - 1))).mean())


def pairwise_loop() -> float:
    codes, _ = sample(0, TRAIN)
    information = _information(codes, codes)
    return float((information.sum() - np.trace(information)) / (len(information) ** 2 - len(information)))


def explicitness_loop() -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    codes, factors = sample(0, TRAIN + TEST)
    x, x_test = codes[:TRAIN], codes[TRAIN:]
    x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    found = []
    for v in factors.T:
        aucs = []
        for a in np.unique(v):
            model = LogisticRegression(class_weight="balanced").fit(x, v[:TRAIN] == a)
            aucs.append(roc_auc_score(v[TRAIN:] == a, model.decision_function(x_test)))
        found.append(np.mean(aucs))
    return float(np.mean(found))


def irs_loop() -> float:
    codes, factors = sample(0, TRAIN)
    furthest = np.abs(codes - codes.mean(0)).max(0)
    deviation = np.zeros((codes.shape[1], factors.shape[1]))
    for k, v in enumerate(factors.T):
        for a in np.unique(v):
            z = codes[v == a]
            deviation[:, k] += np.quantile(np.abs(z - z.mean(0)), 0.99, axis=0)
        deviation[:, k] /= len(np.unique(v))
    return float(np.average((1 - deviation / furthest[:, None]).max(1), weights=furthest))


def gaussian_loop() -> float:
    covariance = np.cov(sample(0, TRAIN)[0].T)
    return float(np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]) / 2


LOOPS: dict[str, Callable[[], float]] = {
    "mig": mig_loop,
    "factor_vae_score": factor_vae_loop,
    "beta_vae_score": beta_vae_loop,
    "modularity": modularity_loop,
    "explicitness": explicitness_loop,
    "irs": irs_loop,
    "gaussian_total_correlation": gaussian_loop,
    "mean_pairwise_mi": pairwise_loop,
}


def battery(only: list[str]) -> Any:
    codes, factors = grid()
    return metrics.battery(None, None, encoded=Encoded(codes, factors, NAMES, True), only=only)


@pytest.mark.parametrize("metric", LOOPS)
@pytest.mark.parametrize("form", ["battery", "loop"])
def test_metric(benchmark, metric: str, form: str) -> None:
    if form == "loop":
        rows_of()
        slow = metric in ("beta_vae_score", "explicitness", "factor_vae_score")
        measure(benchmark, LOOPS[metric], case=f"{metric}, {CASE}", form="protocol loop", rounds=3 if slow else 7)
        return
    codes, factors = grid()
    data = Encoded(codes, factors, NAMES, True)
    assert data.labelled is not None  # checked once, as in a whole battery

    def call() -> Any:
        return metrics.battery(None, None, encoded=data, only=[metric])

    value, loop = call().value[0], LOOPS[metric]()
    assert abs(value - loop) < 0.05, f"{metric}: {value} and the loop's {loop} are not one metric"
    measure(benchmark, call, case=f"{metric}, {CASE}", form="battery, with interval", ours=True, rounds=7)


TREES = ("dci", "sap")  # the classifiers have rows of their own


@pytest.mark.parametrize("form", ["battery", "loops"])
def test_whole_battery(benchmark, form: str) -> None:
    """From the codes of the grid; encoding is not in it. Loops for those metrics that have one here."""
    case = f"whole battery without {' and '.join(TREES)}, {CASE}"
    if form == "loops":
        rows_of()
        measure(benchmark, lambda: [loop() for loop in LOOPS.values()], case=case, form="protocol loops", rounds=3)
        return
    names = [name for name in METRICS if name not in TREES]
    measure(benchmark, lambda: battery(names), case=case, form="battery, with intervals", ours=True, rounds=7)
