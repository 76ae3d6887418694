"""How far codes are from independent latents if they were Gaussian: total correlation and Wasserstein correlation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import checked_codes
from .score import WHOLE, Score, centred_interval, deviations, moderate, sample_weights, whole

SINGULAR = 1e-13  # smallest eigenvalue of a correlation matrix, for each latent, that rounding does not make


def gaussian_total_correlation(
    codes: Any, *, exact: bool = False, replicates: int = 200, seed: int = 0, level: float = 0.95
) -> Score:
    """Total correlation in nats of a Gaussian with the covariance C of the codes: (sum log C_ii - log det C) / 2.

    `codes` (N >= 2, L) numbers, tensor or array. 0 is uncorrelated; any rescaling of a latent leaves it. Constant
    latents add 0 and are left out. Latents that are linear functions of each other, such as a duplicate, give infinity,
    said in `note`; so do fewer samples than latents. The interval is a Poisson bootstrap over samples, centred on the
    value; `replicates=0` leaves it out (nan); `exact` says that the rows are the whole grid: it is then a point.

    Source: Locatello et al. 2019 (arXiv 1811.12359), google-research/disentanglement_lib's `unsupervised_metrics`.
    Raises InputError for wrong shapes, fewer than 2 samples, NaN or infinite codes.
    """
    z, total, drawn = _covariances(codes, exact, replicates, seed)
    note = _constant_note(z)
    value = float(_total_correlation(total[None])[0])
    if math.isinf(value):
        why = "latents are linear functions of each other" if len(z) > z.shape[1] else "fewer samples than latents"
        drawn = drawn[:0]
        note = "; ".join(filter(None, [note, f"infinite: {why}"]))
        low = high = value
    elif exact:
        low = high = value
    else:
        low, high = centred_interval(value, _total_correlation(drawn), len(z), level)
    return _score(value, max(low, 0.0), high, level, "nats", exact, len(z), note)


def wasserstein_correlation(
    codes: Any,
    *,
    normalised: bool = False,
    exact: bool = False,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Score:
    """Squared 2-Wasserstein distance of a Gaussian with the codes' covariance C from the product of its marginals.

        W = 2 tr C - 2 tr (D^1/2 C D^1/2)^1/2,     D = diag C

    in units of the codes, squared; with `normalised` W / tr C, which has none. `codes` (N >= 2, L) numbers. 0 is
    uncorrelated; a duplicated latent of variance v adds (4 - 2 sqrt 2) v. Constant latents add 0. Interval, `exact`,
    source and errors as for `gaussian_total_correlation`.
    """
    z, total, drawn = _covariances(codes, exact, replicates, seed)
    # in units of the largest variance, or tiny codes would have a trace of 0
    square = float(np.diagonal(total).max(initial=0)) or 1.0
    scale = 1.0 if normalised else square
    value = scale * float(_wasserstein(total[None] / square, normalised)[0])
    low = high = value
    if not exact:
        low, high = centred_interval(value, scale * _wasserstein(drawn / square, normalised), len(z), level)
    unit = "" if normalised else "of codes, squared"
    return _score(value, max(low, 0.0), high, level, unit, exact, len(z), _constant_note(z))


def _score(value: float, low: float, high: float, level: float, unit: str, exact: bool, n: int, note: str) -> Score:
    return Score(value, low, high, level, unit, WHOLE if exact else "samples", n, note=note)


def _constant_note(z: np.ndarray) -> str:
    constant = int((z.min(0) == z.max(0)).sum())
    return f"{constant} constant latents add 0" if constant else ""


def _covariances(codes: Any, exact: bool, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes, the covariance (V, V) of those that vary, and that of each bootstrap replicate (R, V, V)."""
    z = moderate(checked_codes(codes))
    replicates = whole("replicates", replicates, 0)
    n = len(z)
    if n < 2:
        raise InputError("codes: expected at least 2 samples, to have a covariance, got 1")
    varying = z[:, z.min(0) < z.max(0)]
    centred = varying - varying.mean(0)
    sd = deviations(varying)
    scaled = centred / sd
    scale: np.ndarray = np.outer(sd, sd)
    total = scaled.T @ scaled / (n - 1) * scale
    if exact or not replicates or not varying.shape[1]:
        return z, total, np.empty((0, *total.shape))
    rows, columns = np.tril_indices(varying.shape[1])
    moments = np.concatenate([scaled, scaled[:, rows] * scaled[:, columns]], 1)
    weights = sample_weights(replicates, n, seed).astype(np.float64)
    weights = weights[weights.sum(1) > 1]
    size = weights.sum(1)[:, None]
    sums = weights @ moments
    mean, second = sums[:, : len(sd)] / size, sums[:, len(sd) :]
    products = (second - size * mean[:, rows] * mean[:, columns]) / (size - 1)
    drawn = np.empty((len(weights), *total.shape))
    drawn[:, rows, columns] = drawn[:, columns, rows] = products * scale[rows, columns]
    return z, total, drawn


def _total_correlation(covariance: np.ndarray) -> np.ndarray:
    """(R, V, V) -> (R,); infinity where a latent is a linear function of others, 0 of no latents."""
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    varies = (sd > 0).all(1)
    sd = np.where(sd > 0, sd, 1)
    roots = np.linalg.eigvalsh(covariance / sd[:, :, None] / sd[:, None, :])
    regular: np.ndarray = varies & (roots > SINGULAR * max(1, roots.shape[1])).all(1)
    logs = np.log(np.where(regular[:, None], roots, 1)).sum(1)
    return np.where(regular, np.maximum(-logs / 2, 0), np.inf)


def _wasserstein(covariance: np.ndarray, normalised: bool) -> np.ndarray:
    """(R, V, V) -> (R,), 0 of no latents."""
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    sd = np.sqrt(variance)
    roots = np.linalg.eigvalsh(covariance * sd[:, :, None] * sd[:, None, :])
    trace = variance.sum(1)
    distance = np.maximum(2 * trace - 2 * np.sqrt(np.maximum(roots, 0)).sum(1), 0)
    if not normalised:
        return distance
    return np.divide(distance, trace, out=np.zeros_like(distance), where=trace > 0)
