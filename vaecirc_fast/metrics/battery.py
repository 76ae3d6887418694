"""Every disentanglement metric of one model in one table."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .activity import ACTIVE_SHARE
from .dci import dci
from .encoded import Encoded, encode_grid
from .explicitness import explicitness
from .factor_vae import beta_vae_score, factor_vae_score
from .gaussian import gaussian_total_correlation, wasserstein_correlation
from .information import mean_pairwise_mi, modularity
from .irs import irs
from .labelled import Labelled, checked_codes, labelled
from .mig import mig
from .sap import sap
from .score import TEST, TRAIN, WHOLE, Score, moderate, sample_weights, whole
from .statistics import Estimate, resampled_interval

if TYPE_CHECKING:
    import pandas

Row = tuple[str, Estimate]


@dataclass(frozen=True)
class _Metric:
    """`run` gives the rows (name, estimate); `definitions` by those names; `labels`: whether it needs factors; `exact`:
    whether it has a form over the whole grid."""

    run: Callable[[_Samples], Iterator[Row]]
    definitions: dict[str, str]
    labels: bool = True
    exact: bool = True


@dataclass(frozen=True)
class _Samples:
    """What the metrics of one battery are given."""

    encoded: Encoded
    exact: bool
    train: int
    test: int
    replicates: int
    dci_replicates: int
    seed: int
    level: float

    @cached_property
    def rows(self) -> np.ndarray | None:
        """Rows of the samples to train and to test on, None for all of them as they are."""
        n, wanted = len(self.encoded.codes), self.train + self.test
        rng = np.random.default_rng(self.seed)
        if self.encoded.complete:  # as the protocol draws from the grid: with replacement
            return rng.integers(n, size=wanted)
        return None if n <= wanted else rng.permutation(n)[:wanted]

    @cached_property
    def codes(self) -> np.ndarray:
        """(n, L), of all the grid if `exact`, else of the training samples."""
        if self.exact:
            return self.encoded.codes
        return self.encoded.codes[: self.train] if self.rows is None else self.encoded.codes[self.rows[: self.train]]

    @cached_property
    def logvar(self) -> np.ndarray | None:
        if self.encoded.logvar is None or self.exact:
            return self.encoded.logvar
        return self.encoded.logvar[: self.train] if self.rows is None else self.encoded.logvar[self.rows[: self.train]]

    @cached_property
    def grid(self) -> Labelled:
        """Everything that was encoded, to look up in."""
        data = self.encoded.labelled
        assert data is not None  # metrics that need labels are not run without
        return data

    @cached_property
    def both(self) -> Labelled:
        """The samples to train and to test on."""
        return self._taken(self.train + self.test)

    @cached_property
    def sample(self) -> Labelled:
        """All the grid if `exact`, else the training samples."""
        return self.grid if self.exact else self._taken(self.train)

    def smaller(self, split: str) -> str:
        """A note on a split, where it is not the protocol's."""
        return "" if len(self.both.codes) == self.train + self.test else split

    def _taken(self, size: int) -> Labelled:
        grid = self.grid
        rows = slice(0, size) if self.rows is None else self.rows[:size]
        data = labelled(grid.codes[rows], grid.levels[rows], grid.names)
        return replace(data, dropped=grid.dropped + data.dropped)  # a factor may vary in the grid only


def _active_units(s: _Samples) -> Iterator[Row]:
    """Number of active latents, with the interval of that number over images."""
    mu = moderate(checked_codes(s.codes))
    mu = mu - mu.mean(0)
    noise = np.zeros_like(mu) if s.logvar is None else np.exp(s.logvar.astype(np.float64))
    if not np.isfinite(noise).all():
        raise InputError("logvar: expected log variances below 709, got NaN or an overflow")

    def count(weights: np.ndarray) -> np.ndarray:
        size = np.maximum(weights.sum(1), 1)[:, None]
        variance = weights @ (mu * mu) / size - (weights @ mu / size) ** 2
        return (variance > ACTIVE_SHARE * (variance + weights @ noise / size)).sum(1)

    n = len(mu)
    value = float(count(np.ones((1, n)))[0])
    low = high = value
    if not s.exact:
        drawn = count(sample_weights(s.replicates, n, s.seed).astype(np.float64)) if s.replicates else []
        low, high = resampled_interval(value, drawn, n, s.level)
    note = "" if s.logvar is not None else "the model gives no posterior variance: 0"
    yield "active_units", Score(value, low, high, s.level, "latents", WHOLE if s.exact else "samples", n, note=note)


def _mig(s: _Samples) -> Iterator[Row]:
    found = mig(s.sample, None, replicates=0 if s.exact else s.replicates, seed=s.seed, level=s.level)
    yield "mig", replace(found, low=found.value, high=found.value, resampled=WHOLE) if s.exact else found


def _dci(s: _Samples) -> Iterator[Row]:
    found = dci(s.both, None, train=s.train, test=s.test, replicates=s.dci_replicates, seed=s.seed, level=s.level)
    for name, estimate in found.estimates.items():
        missing = "no interval: dci_replicates=0" if math.isnan(estimate.low) else ""
        note = "; ".join(filter(None, [s.smaller(found.split), missing]))
        yield f"dci_{name}", _score(estimate, found.dropped, note)


def _sap(s: _Samples) -> Iterator[Row]:
    found = sap(s.both, None, train=s.train, test=s.test, replicates=s.replicates, seed=s.seed, level=s.level)
    yield "sap", _score(found, found.dropped, s.smaller(found.split))


def _score(found: Estimate, dropped: tuple[str, ...], note: str) -> Score:
    of = (found.value, found.low, found.high, found.level, found.unit, found.resampled, found.n)
    return Score(*of, dropped=dropped, note=note)


def _factor_vae(s: _Samples) -> Iterator[Row]:
    yield (
        "factor_vae_score",
        factor_vae_score(
            s.grid, exact=s.exact, train=s.train, test=s.test, variance_samples=s.train, seed=s.seed, level=s.level
        ),
    )


def _beta_vae(s: _Samples) -> Iterator[Row]:
    yield "beta_vae_score", beta_vae_score(s.grid, train=s.train, test=s.test, seed=s.seed, level=s.level)


def _explicitness(s: _Samples) -> Iterator[Row]:
    yield "explicitness", explicitness(s.both, train=s.train, test=s.test, seed=s.seed, level=s.level)


def _resampled(metric: Callable[..., Estimate], name: str, labels: bool, **options: Any) -> Callable:
    """A metric that resamples the samples it is given, or takes the whole grid."""

    def run(s: _Samples) -> Iterator[Row]:
        shared = {"exact": s.exact, "replicates": s.replicates, "seed": s.seed, "level": s.level}
        yield name, metric(s.sample if labels else s.codes, **options, **shared)

    return run


METRICS: dict[str, _Metric] = {
    "active_units": _Metric(
        _active_units, {"active_units": "latents with Var[mu_i] / (Var[mu_i] + E[sigma_i^2]) > 0.05"}, labels=False
    ),
    "mig": _Metric(
        _mig, {"mig": "mean over factors v of (greatest - second I(z_i; v)) / H(v), latents in 20 equal-width bins"}
    ),
    "dci": _Metric(
        _dci,
        {
            "dci_disentanglement": "mean over latents of 1 - entropy of a latent's importance for factors, by mass",
            "dci_completeness": "mean over factors of 1 - entropy of a factor's importance of latents, by mass",
            "dci_informativeness": "mean over factors of the accuracy of boosted trees on test samples",
        },
        exact=False,
    ),
    "sap": _Metric(
        _sap,
        {"sap": "mean over factors of best - second accuracy of a linear SVM on one latent"},
        exact=False,
    ),
    "factor_vae_score": _Metric(
        _factor_vae,
        {"factor_vae_score": "share of votes of the least varying latent that tell the factor held fixed"},
    ),
    "beta_vae_score": _Metric(
        _beta_vae,
        {"beta_vae_score": "accuracy of a linear classifier of mean |z - z'| that tells the factor two images share"},
        exact=False,
    ),
    "modularity": _Metric(
        _resampled(modularity, "modularity", labels=True),
        {"modularity": "mean over latents of 1 - sum of other I(z_i; v)^2 / ((K - 1) greatest I(z_i; v)^2)"},
    ),
    "explicitness": _Metric(
        _explicitness,
        {"explicitness": "mean ROC AUC of one-versus-rest logistic regression over values, then factors; chance 0.5"},
        exact=False,
    ),
    "irs": _Metric(
        _resampled(irs, "irs", labels=True),
        {"irs": "mean over latents of 1 - 99 % quantile of the deviation while its best factor is held / largest"},
    ),
    "gaussian_total_correlation": _Metric(
        _resampled(gaussian_total_correlation, "gaussian_total_correlation", labels=False),
        {"gaussian_total_correlation": "(sum log C_ii - log det C) / 2, C the covariance of the codes"},
        labels=False,
    ),
    "wasserstein_correlation": _Metric(
        _resampled(wasserstein_correlation, "wasserstein_correlation", labels=False),
        {"wasserstein_correlation": "W = squared 2-Wasserstein distance of N(0, C) from its product of marginals"},
        labels=False,
    ),
    "wasserstein_correlation_normalised": _Metric(
        _resampled(wasserstein_correlation, "wasserstein_correlation_normalised", labels=False, normalised=True),
        {"wasserstein_correlation_normalised": "W / tr C of the Wasserstein correlation W"},
        labels=False,
    ),
    "mean_pairwise_mi": _Metric(
        _resampled(mean_pairwise_mi, "mean_pairwise_mi", labels=False),
        {"mean_pairwise_mi": "mean over pairs of latents of I(z_i; z_j), latents in 20 equal-width bins"},
        labels=False,
    ),
}


def battery(
    model: Any,
    ds: Any,
    exact: bool = False,
    *,
    samples: int = TRAIN,
    test_samples: int = TEST,
    replicates: int = 200,
    dci_replicates: int = 0,
    seed: int = 0,
    only: str | Sequence[str] | None = None,
    encoded: Encoded | None = None,
    images: int | None = None,
    batch: int = 250,
    level: float = 0.95,
    progress: bool = True,
) -> pandas.DataFrame:
    """Every disentanglement metric of a model on a data set: a pandas.DataFrame with one row for each number.

    model, ds: as for `encode_grid`, which encodes the data set once; or give what it returned as `encoded`, and model
    and ds are not looked at. Columns: metric, value, low, high (coverage `level`), unit, definition, resampled (what
    the interval resamples), n (how many), dropped (one-valued factors), note (where it departs from the reference
    protocol) and seconds. `table.attrs` has encoding_seconds, images, and left_out: metric -> why it has no row; a
    warning says so too. Deterministic for a seed, but for seconds. DCI's D and C have intervals only with
    `dci_replicates`, which refit its trees, two for the time of one: without, low and high are nan and `note` says so.

    The reference protocol: `samples` drawn from the grid with replacement, as many votes or points to train on and
    `test_samples` more to test on, every group of images that share a factor looked up. Where factors do not determine
    the image (`ds.complete` is false, or `images` of them were encoded) the same on the labelled samples, and `note`
    says so. `exact`: whole-grid values, without sampling error, of all that have such a form; the others stay sampled
    and say so. Without labels, or with `only` names, the metrics that need none, or those.

    Raises InputError for NaN or infinite codes, unknown names, a metric in `only` that cannot be computed here, numbers
    out of range, and `exact` without the whole grid.
    """
    import pandas

    for name, value, least in (
        ("samples", samples, 2),
        ("test_samples", test_samples, 1),
        ("replicates", replicates, 0),
        ("dci_replicates", dci_replicates, 0),
    ):
        whole(name, value, least)
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")
    only = [only] if isinstance(only, str) else only
    unknown = sorted(set(only or ()) - METRICS.keys())
    if unknown:
        raise InputError(f"only: unknown {', '.join(unknown)}; known are {', '.join(METRICS)}")
    if encoded is None:
        encoded = encode_grid(model, ds, batch=batch, images=images, seed=seed, progress=progress)
    if exact and not encoded.complete:
        raise InputError("exact: needs the whole factor grid, and these images are not one; leave it out")
    import scipy.stats  # noqa: F401  here, so that no metric's seconds are those of its imports
    import sklearn.linear_model  # noqa: F401

    s = _Samples(encoded, exact, samples, test_samples, replicates, dci_replicates, seed, level)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in METRICS if only is None else [name for name in METRICS if name in only]:
        metric = METRICS[name]
        began = time.perf_counter()
        try:
            if metric.labels and encoded.labelled is None:
                raise InputError("needs labels, and no factor of this data set varies")
            found = list(metric.run(s))
        except InputError as error:
            # bad codes are the fault of all metrics, and a metric that was asked for by name is missed
            if only is not None or str(error).startswith(
                ("codes: expected finite", "codes: expected latents", "logvar")
            ):
                raise InputError(f"{name}: {error}") from error
            left_out[name] = str(error)
            continue
        seconds = (time.perf_counter() - began) / len(found)
        rows += [_row(key, value, metric, s, seconds) for key, value in found]
    if left_out:
        reasons = "; ".join(f"{name} ({why})" for name, why in left_out.items())
        warnings.warn(f"battery: left out {reasons}", stacklevel=2)
    table = pandas.DataFrame(rows, columns=COLUMNS)
    table.attrs.update(encoding_seconds=encoded.seconds, images=len(encoded.codes), left_out=left_out)
    return table


COLUMNS = ["metric", "value", "low", "high", "unit", "definition", "resampled", "n", "dropped", "note", "seconds"]


def _row(key: str, found: Estimate, metric: _Metric, s: _Samples, seconds: float) -> dict[str, Any]:
    notes = [getattr(found, "note", "")]
    if s.exact and not metric.exact:
        notes.append("sampled: it has no exact form")
    if not s.encoded.complete:
        notes.append(f"on {len(s.encoded.codes)} labelled samples, no whole factor grid")
    return {
        "metric": key,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "unit": found.unit,
        "definition": metric.definitions[key],
        "resampled": found.resampled,
        "n": found.n,
        "dropped": ", ".join(getattr(found, "dropped", ())),
        "note": "; ".join(filter(None, notes)),
        "seconds": seconds,
    }
