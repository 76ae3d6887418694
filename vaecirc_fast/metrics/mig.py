"""Mutual information gap (MIG) of codes and ground-truth factors, with a bootstrap interval over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops.histogram_mi import cut, histogram_mi
from .information import resamples
from .labelled import labelled
from .statistics import FEW, Estimate, percentile_interval, resampled_interval


@dataclass(frozen=True)
class Mig(Estimate):
    """`Estimate` of the mean gap, in [0, 1]; `per_factor` the gaps by name; `dropped` the one-valued factors."""

    per_factor: dict[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def mig(
    codes: Any,
    factors: Any,
    bins: int = 20,
    factor_names: Sequence[str] | None = None,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Mig:
    """Mean over factors k of (I(top_k; v_k) - I(second_k; v_k)) / H(v_k): the mutual information gap, in [0, 1].

    `codes` (N, L) numbers, the encoder means; `factors` (N, K) integers, any ids; tensors or arrays. Each latent is cut
    into `bins` equal-width bins from its least to its greatest value (np.digitize on np.histogram's edges, in float64);
    information and entropy are of the counts, in nats. Top and second are the latents with the most information on the
    factor; with L = 1 the second is 0, and a constant latent has 0. One-valued factors have no entropy: they are left
    out and named in `dropped`.

    The interval resamples samples with the bins fixed (`replicates` Poisson bootstraps; below 8 samples the jackknife).
    Counts of a resample have more ties than a sample, which biases information upward, so replicates are centred on the
    value: the interval is for the protocol's MIG at this N. `replicates=0` leaves it out (nan), as a whole factor
    grid, which has no sampling error, should.

    Source: Chen et al. 2018 (arXiv 1802.04942), binned as google-research/disentanglement_lib's `mig.py` bins it.
    Raises InputError on wrong shapes, unequal N, no samples, NaN or infinite codes, factors that are not integers,
    names that do not fit, or no factor that varies.
    """
    for name, value, low in (("bins", bins, 1), ("replicates", replicates, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
    data = labelled(codes, factors, factor_names)
    binned, levels = cut(torch.from_numpy(data.codes), bins), torch.from_numpy(data.levels)

    n = len(binned)
    whole = histogram_mi(binned, levels, bins)
    gaps = _gaps(whole.information, whole.of_levels).numpy()
    value = float(gaps.mean())
    low = high = math.nan
    if replicates and n > 1:
        drawn = []
        for weights in resamples(n, replicates, seed):
            resampled = histogram_mi(binned, levels, bins, weights=weights)
            drawn.append(_gaps(resampled.information, resampled.of_levels))
        # a factor that a small resample left with one value has no gap in it
        replicated = torch.cat(drawn).nanmean(1).numpy()
        replicated = replicated[np.isfinite(replicated)]
        if n >= FEW:
            low, high = percentile_interval(replicated, level, centre=value)
        else:
            low, high = resampled_interval(value, replicated, n, level)
    per_factor = {name: float(gap) for name, gap in zip(data.names, gaps, strict=True)}
    return Mig(value, low, high, level, "", "samples", n, per_factor, data.dropped)


def _gaps(information: Tensor, entropy: Tensor) -> Tensor:
    """(I(top) - I(second)) / H of each factor, from (..., L, K) and (..., K): (..., K), NaN where H is 0."""
    # a second latent of no information where there is one only
    two = torch.cat([information, torch.zeros_like(information[..., :1, :])], -2).topk(2, -2).values
    gap = two[..., 0, :] - two[..., 1, :]
    return torch.where(entropy > 0, gap / torch.where(entropy > 0, entropy, 1), math.nan)
