"""Disentanglement and completeness of causal effects: whether each latent moves one thing, and one latent each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from .causal import _check, _normalised
from .dci import disentanglement_completeness
from .score import centred_interval
from .statistics import Estimate


@dataclass(frozen=True)
class EffectDisentanglement:
    """`disentanglement` of the rows (latents, units) and `completeness` of the columns (groups, factors), in [0, 1]."""

    disentanglement: Estimate
    completeness: Estimate


def effect_disentanglement(effects: Any, level: float = 0.95) -> EffectDisentanglement:
    """DCI's D and C with causal effects in the place of a classifier's importances.

    `effects`: a result of `vf.latent_sweep` (rows: latents, columns: output groups, step-normalised as for CES); one of
    `input_effects` (rows: units, columns: manipulations of the input; units that have no unit of measurement are left
    out); or numbers >= 0 (L, G), array or tensor. With R the matrix,

        D = sum_i (sum_g R_ig / sum R) (1 - H(R_i. / sum_g R_ig) / log G),    C the same with rows and columns exchanged

    A row or column of zeros has no weight. Intervals are from the result's own replicates over samples, centred on the
    value; a plain matrix has none (nan). Source: Eastwood & Williams 2018, on effects by docs/definitions.md.
    Raises InputError for fewer than two rows or columns, negative or non-finite numbers, no effect at all, and effects
    that cannot be strengths.
    """
    matrix, replicates, n, resampled = _matrices(effects)
    if matrix.ndim != 2 or min(matrix.shape) < 2:
        raise InputError(f"effects: expected at least two rows and two columns, got shape {matrix.shape}")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise InputError("effects: expected finite numbers >= 0, got others")
    if matrix.max() == 0:
        raise InputError("effects: expected some effect, got zeros only")
    values = disentanglement_completeness(matrix)[:2]
    drawn = np.array([disentanglement_completeness(r)[:2] for r in replicates if r.max() > 0]).reshape(-1, 2)
    estimates = []
    for value, replicated in zip(values, drawn.T, strict=True):
        low, high = centred_interval(value, replicated, n, level)
        estimates.append(Estimate(value, max(low, 0.0), min(high, 1.0), level, "", resampled, n))
    return EffectDisentanglement(*estimates)


def _matrices(effects: Any) -> tuple[np.ndarray, np.ndarray, int, str]:
    """(L, G), replicates (R, L, G), how many samples, and what they are."""
    if hasattr(effects, "step_normalised"):
        _check(effects, "effect_disentanglement")
        point, replicates = _normalised(effects)
        return point.numpy(), replicates.numpy(), effects.samples, "images"
    if hasattr(effects, "variants"):
        point = effects.tensor.double().cpu().numpy().T
        measured = ~np.isnan(point).all(1)
        drawn = np.empty((0, *point.shape))
        if effects.replicates is not None:
            drawn = effects.replicates.double().cpu().numpy().transpose(0, 2, 1)
        return point[measured], drawn[:, measured], effects.samples, "pairs"
    array = np.asarray(effects.detach().double().cpu() if isinstance(effects, Tensor) else effects)
    if array.dtype.kind not in "fiu":
        raise InputError(f"effects: expected numbers (L, G) or the result of a sweep, got {type(effects).__name__}")
    array = array.astype(np.float64)
    return array, np.empty((0, *array.shape)), 0, "nothing"
