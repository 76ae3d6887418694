"""Whether two models agree on their latents: which latent of one is which of the other, and their rank correlation."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import InputError
from .correlations import spearman
from .estimate import Inference, as_array, numbers


def matched_latents(codes_a: Any, codes_b: Any) -> np.ndarray:
    """The latent of b that each latent of a corresponds to: (L,) indices, a permutation.

    codes_a, codes_b: (N, L) posterior means of the same N >= 4 samples. The one-to-one matching of greatest total
    |Spearman correlation|; a constant latent correlates with none. Raises InputError on other shapes, NaN or infinity.
    """
    from scipy import optimize, stats

    a, b = as_array(codes_a), as_array(codes_b)
    if a.ndim != 2 or a.shape != b.shape or len(a) < 4 or 0 in a.shape:
        raise InputError(f"codes_b: expected the shape of codes_a, (N >= 4, L), got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("codes_a, codes_b: expected finite numbers, got NaN or infinity")
    ranked = []
    for codes in (a, b):
        ranks = stats.rankdata(codes, axis=0) - (len(codes) + 1) / 2
        size = np.linalg.norm(ranks, axis=0)
        ranked.append(ranks / np.where(size > 0, size, 1))
    return optimize.linear_sum_assignment(-np.abs(ranked[0].T @ ranked[1]))[1]


def latent_agreement(
    values_a: Any, values_b: Any, codes_a: Any = None, codes_b: Any = None, level: float = 0.95, seed: int = 0
) -> Inference:
    """Spearman's correlation over latents of a metric's values on two models, with interval and p (see `spearman`).

    values_a, values_b: (L,) with L >= 4, one for each latent. Without codes latent i of one is latent i of the other,
    as where encoder or decoder are shared; with codes_a, codes_b (N, L) latents are matched first. The unit is the
    latent, of one pair of models. Raises InputError on other shapes, NaN, infinity, or values that do not vary.
    """
    if (codes_a is None) != (codes_b is None):
        raise InputError("codes_a, codes_b: expected both or neither")
    a, b = numbers("values_a", values_a, 4), numbers("values_b", values_b, 4)
    if codes_a is not None:
        order = matched_latents(codes_a, codes_b)
        if len(order) != len(b):
            raise InputError(f"values_b: expected one for each of {len(order)} latents, got {len(b)}")
        b = b[order]
    return spearman(a, b, level=level, seed=seed, resampled="latents")
