"""The FactorVAE and BetaVAE scores: which factor was held fixed, told from a batch of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import Labelled, labelled
from .score import TEST, TRAIN, WHOLE, Rows, Score, deviations, fixable, moderate, share_interval, whole

PRUNED = 0.05  # standard deviation below which a latent takes no part in the FactorVAE score
BATCH = 64
_BLOCK = 256  # batches looked up at once, so that they stay in the cache


@dataclass(frozen=True)
class FactorVaeScore(Score):
    """`Score` in [0, 1]. `train`: the same on the training votes; `active`: latents that were not pruned; `factors`:
    names of the factors held fixed; `votes` (K, L): training votes (`exact`: shares), 0 for pruned latents."""

    train: float = 0.0
    active: tuple[int, ...] = ()
    factors: tuple[str, ...] = ()
    votes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False, compare=False)


def factor_vae_score(
    codes: Any,
    factors: Any = None,
    *,
    exact: bool = False,
    train: int = TRAIN,
    test: int = TEST,
    batch: int = BATCH,
    variance_samples: int = TRAIN,
    threshold: float = PRUNED,
    factor_names: Sequence[str] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> FactorVaeScore:
    """The FactorVAE score: how often a majority vote tells the fixed factor from the latent that varies least.

    `codes` (N, L) numbers and `factors` (N, K) integers: a whole grid or a sample of it, tensors or arrays. One vote:
    a factor k drawn uniformly, a value of it (as often as it occurs), `batch` rows with that value, looked up with
    replacement; the vote is the latent whose variance over the batch, in units of its variance over
    `variance_samples` rows, is least. Each latent is given the factor that `train` votes mostly held fixed when it won;
    the score is the share of `test` more votes that this gets right. Latents whose standard deviation is below
    `threshold` are pruned; with none left the score is 0. The interval is Wilson's, for the test votes.

    `exact`: every value of every factor votes once with all of its rows, weighted by how often it occurs, factors
    equally; the limit of the score for infinite batches and votes. Nothing is drawn then, and the interval is a point.

    Source: Kim & Mnih 2018 (arXiv 1802.05983) as google-research/disentanglement_lib computes it; `active` is counted
    from the mask, which that library does not. Raises InputError as `mig` does, for numbers of draws below 1 (batch and
    variance_samples: 2), a negative threshold, or where fewer than two factors have two rows of a value.
    """
    data = labelled(codes, factors, factor_names)
    train, test = whole("train", train, 1), whole("test", test, 1)
    batch, drawn = whole("batch", batch, 2), whole("variance_samples", variance_samples, 2)
    if not 0 <= threshold < np.inf:
        raise InputError(f"threshold: expected a finite number >= 0, got {threshold!r}")
    groups, note = fixable(data)
    names = tuple(data.names[k] for k, _ in groups)
    moderate(data.codes)
    n = len(data.codes)
    rng = np.random.default_rng(seed)
    taken = data.codes if exact or n <= drawn else data.codes[rng.integers(n, size=drawn)]
    sd = deviations(taken)
    active = np.flatnonzero((sd >= threshold) & (sd > 0))
    facts = {"active": tuple(active.tolist()), "factors": names, "dropped": data.dropped}
    votes = np.zeros((len(groups), data.codes.shape[1]))
    if not len(active):
        nothing = f"no latent has a standard deviation of {threshold:g} or more" if threshold else "no latent varies"
        note = "; ".join(filter(None, [note, nothing]))
        size, drawn_from = (n, WHOLE) if exact else (test, "votes")
        return FactorVaeScore(0.0, 0.0, 0.0, level, "", drawn_from, size, note=note, votes=votes, **facts)
    # variances are divided by this and not codes by sd: the grid stays as it is; pruned latents never win
    unit = np.full(len(sd), 0.0)
    unit[active] = 1 / sd[active]
    if exact:
        votes = _limit_votes(data.codes, unit, groups)
        value = float(votes.max(0).sum() / votes.sum())
        return FactorVaeScore(value, value, value, level, "", WHOLE, n, note=note, train=value, votes=votes, **facts)
    if n < drawn:
        note = "; ".join(filter(None, [note, f"variances from all {n} rows, fewer than {drawn}"]))
    votes = _drawn_votes(data.codes, unit, groups, train, batch, rng)
    seen = _drawn_votes(data.codes, unit, groups, test, batch, rng)
    hits = int(seen[votes.argmax(0), np.arange(seen.shape[1])].sum())
    right = float(votes.max(0).sum() / train)
    low, high = share_interval(hits, test, level)
    return FactorVaeScore(
        hits / test, low, high, level, "", "votes", test, note=note, train=right, votes=votes, **facts
    )


def _drawn_votes(
    codes: np.ndarray,
    unit: np.ndarray,
    groups: list[tuple[int, Rows]],
    votes: int,
    batch: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Votes (K, L), whole numbers, of that many random batches; `unit` (L,): 1 / sd, 0 for a pruned latent."""
    won = np.zeros((len(groups), codes.shape[1]))
    factor = rng.integers(len(groups), size=votes)
    for k, (_, rows) in enumerate(groups):
        mine = int((factor == k).sum())
        for first in range(0, mine, _BLOCK):
            size = min(_BLOCK, mine - first)
            level = drawn_levels(rows, size, rng)
            z = np.take(codes, rows_of_levels(rows, np.repeat(level, batch), rng), axis=0).reshape(size, batch, -1)
            won[k] += np.bincount(_steadiest(z, unit), minlength=won.shape[1])
    return won


def _limit_votes(codes: np.ndarray, unit: np.ndarray, groups: list[tuple[int, Rows]]) -> np.ndarray:
    """Shares (K, L) of the votes of all values, each with all of its rows; every factor has the same share."""
    won = np.zeros((len(groups), codes.shape[1]))
    for k, (_, rows) in enumerate(groups):
        for first, count in zip(rows.start, rows.count, strict=True):
            if count > 1:
                won[k, _steadiest(codes[rows.order[first : first + count]][None], unit)[0]] += count
        won[k] /= won[k].sum()
    return won


def _steadiest(z: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Which latent varies least over the rows of each group, in its unit, of those with a unit: (G, n, L) -> (G,)."""
    z = z - z[:, :1]  # a latent that nothing but the fixed factor moves then has a variance of exactly 0
    z *= unit
    mean = z.mean(1)
    variance = np.einsum("gnl,gnl->gl", z, z) / z.shape[1] - mean * mean
    return np.where(unit > 0, variance, np.inf).argmin(1)


def drawn_levels(rows: Rows, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` values of a factor, each as often as it occurs among the rows; values that occur once are not drawn."""
    weight = np.where(rows.count > 1, rows.count, 0)
    return np.searchsorted(np.cumsum(weight), rng.integers(weight.sum(), size=size), side="right")


def rows_of_levels(rows: Rows, level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of `level` (n,) a random row with that value of the factor: (n,)."""
    # rng.integers with an array of bounds takes ten times as long; the product rounds up to a count never
    return rows.order[rows.start[level] + (rng.random(len(level)) * rows.count[level]).astype(np.int64)]


@dataclass(frozen=True)
class BetaVaeScore(Score):
    """`Score` in [0, 1]. `train`: the accuracy on the training points; `factors`: names of the factors held fixed."""

    train: float = 0.0
    factors: tuple[str, ...] = ()


def beta_vae_score(
    codes: Any,
    factors: Any = None,
    *,
    train: int = TRAIN,
    test: int = TEST,
    batch: int = BATCH,
    factor_names: Sequence[str] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> BetaVaeScore:
    """The BetaVAE score: accuracy of a linear classifier that tells which factor two images share.

    `codes` (N, L) numbers and `factors` (N, K) integers: a whole grid or a sample of it, tensors or arrays. One point:
    a factor k drawn uniformly and the mean of |z - z'| over `batch` pairs of rows that share their value of k, looked
    up. Logistic regression (scikit-learn's, C = 1) is trained on `train` points; the score is its accuracy on `test`
    others, with Wilson's interval for those. Chance is 1 / K. It has no exact form: with infinite batches any two
    factors would be told apart.

    Source: Higgins et al. 2017 (beta-VAE) as google-research/disentanglement_lib computes it.
    Raises InputError as `mig` does, for numbers of draws below 1, or where fewer than two factors have two rows of a
    value.
    """
    data = labelled(codes, factors, factor_names)
    train, test, batch = whole("train", train, 1), whole("test", test, 1), whole("batch", batch, 1)
    groups, note = fixable(data)
    moderate(data.codes)
    names = tuple(data.names[k] for k, _ in groups)
    rng = np.random.default_rng(seed)
    x, y = _points(data, groups, train, batch, rng)
    x_test, y_test = _points(data, groups, test, batch, rng)
    if len(set(y.tolist())) == 1:
        guess, guess_train = np.full(test, y[0]), y
    else:
        classifier = _logistic_regression(x, y)
        guess, guess_train = classifier.predict(x_test), classifier.predict(x)
    hits = int((guess == y_test).sum())
    low, high = share_interval(hits, test, level)
    right = float((guess_train == y).mean())
    return BetaVaeScore(
        hits / test, low, high, level, "", "points", test, note=note, dropped=data.dropped, train=right, factors=names
    )


def _logistic_regression(x: np.ndarray, y: np.ndarray) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # codes of a huge scale: the last iterate stands
        return LogisticRegression(max_iter=1000).fit(x, y)


def _points(
    data: Labelled, groups: list[tuple[int, Rows]], points: int, batch: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute differences (points, L) of pairs that share a factor's value, and which factor it was (points,)."""
    factor = rng.integers(len(groups), size=points)
    x = np.empty((points, data.codes.shape[1]))
    for k, (_, rows) in enumerate(groups):
        mine = np.flatnonzero(factor == k)
        for first in range(0, len(mine), _BLOCK):
            chosen = mine[first : first + _BLOCK]
            level = drawn_levels(rows, len(chosen) * batch, rng)
            z = np.take(data.codes, rows_of_levels(rows, level, rng), axis=0)
            z -= np.take(data.codes, rows_of_levels(rows, level, rng), axis=0)
            x[chosen] = np.abs(z, out=z).reshape(len(chosen), batch, -1).mean(1)
    return x, factor
