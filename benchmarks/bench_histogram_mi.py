"""Benchmark of the op `histogram_mi`, and of the metric MIG that is made of it: 10,000 samples and dSprites' grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import mutual_info_score
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.metrics import mig
from vaecirc_fast.metrics.statistics import poisson_weights
from vaecirc_fast.ops.histogram_mi import cut
from vaecirc_fast.reference import histogram_mi as reference

from .harness import measure

BINS, LATENTS, SIZES = 20, 10, (3, 6, 40, 32, 32)  # dSprites without its colour


@cache
def _inputs(samples: str) -> tuple[Tensor, Tensor]:
    """Codes that know the factors, of the whole grid or of 10,000 of its images."""
    grid = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    g = torch.Generator().manual_seed(0)
    levels = grid if samples == "whole grid" else grid[torch.randint(len(grid), (10_000,), generator=g)]
    known = levels[:, torch.arange(LATENTS) % 5] / torch.tensor(SIZES)[torch.arange(LATENTS) % 5]
    return known.double() + 0.3 * torch.randn(len(levels), LATENTS, generator=g, dtype=torch.float64), levels


def _loop(codes: Tensor, levels: Tensor) -> list[float]:
    """disentanglement_lib's mig.py: digitize, then mutual_info_score for each pair."""
    z, factors = codes.numpy(), levels.numpy()
    binned = [np.digitize(x, np.histogram(x, BINS)[1][:-1]) for x in z.T]
    gaps = []
    for v in factors.T:
        second, first = sorted(mutual_info_score(v, x) for x in binned)[-2:]
        gaps.append((first - second) / mutual_info_score(v, v))
    return gaps


def _sparse(binned: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Joint counts by scipy's sparse products, (cells, samples) x (samples, R): the counting alone."""
    one, sample = np.ones(len(binned), dtype=np.float32), np.arange(len(binned))
    counts = []
    for v, size in zip(levels.T, SIZES, strict=True):
        for x in binned.T:
            member = sparse.csr_array((one, (x * size + v, sample)), shape=(BINS * size, len(binned)))
            counts.append(member @ weights)
    return counts


@pytest.mark.parametrize("samples", ["10,000 samples", "whole grid"])
@pytest.mark.parametrize("form", ["ours", "loop over scikit-learn"])
def test_mig(benchmark, samples: str, form: str) -> None:
    codes, levels = _inputs(samples)
    calls: dict[str, Callable] = {
        "ours": lambda: mig(codes, levels, BINS, replicates=0),
        "loop over scikit-learn": lambda: _loop(codes, levels),
    }
    rounds = 9 if form == "ours" else 2 if samples == "whole grid" else 5
    measure(benchmark, calls[form], case=f"MIG, {samples}", form=form, ours=form == "ours", rounds=rounds)


@pytest.mark.parametrize("samples", ["10,000 samples", "whole grid"])
@pytest.mark.parametrize("form", ["ours", "torch", "scipy sparse, counts alone"])
def test_information(benchmark, samples: str, form: str) -> None:
    codes, levels = _inputs(samples)
    binned = cut(codes, BINS)
    arrays, one = (binned.numpy(), levels.numpy()), np.ones((len(codes), 1), dtype=np.float32)
    calls: dict[str, Callable] = {
        "ours": lambda: vf.ops.histogram_mi(binned, levels, BINS),
        "torch": lambda: reference.forward(binned, levels, BINS, SIZES, None, False),
        "scipy sparse, counts alone": lambda: _sparse(*arrays, one),
    }
    case = f"information of {LATENTS} codes and 5 factors, {samples}"
    measure(benchmark, calls[form], case=case, form=form, ours=form == "ours", rounds=9 if form == "ours" else 5)


@pytest.mark.parametrize("form", ["ours", "torch", "scipy sparse, counts alone"])
def test_resamples(benchmark, form: str) -> None:
    codes, levels = _inputs("10,000 samples")
    binned, weights = cut(codes, BINS), poisson_weights(200, 10_000).to(torch.uint8)
    arrays, floats = (binned.numpy(), levels.numpy()), weights.T.float().contiguous().numpy()
    calls: dict[str, Callable] = {
        "ours": lambda: vf.ops.histogram_mi(binned, levels, BINS, weights=weights),
        "torch": lambda: reference.forward(binned, levels, BINS, SIZES, weights, False),
        "scipy sparse, counts alone": lambda: _sparse(*arrays, floats),
    }
    case = "the same, 10,000 samples, 200 resamples"
    measure(benchmark, calls[form], case=case, form=form, ours=form == "ours", rounds=9 if form == "ours" else 3)
