"""MIG against scikit-learn's mutual information in a plain loop, against closed-form cases, and its interval."""

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics.mig import mig


def plain_mig(codes, factors, bins=20):
    """The protocol, as disentanglement_lib's mig.py does it: np.histogram's edges, np.digitize, mutual_info_score."""
    gaps = []
    for v in factors.T:
        if len(set(v.tolist())) == 1:
            continue
        information = []
        for z in codes.T:
            edges = np.histogram(z, bins)[1]
            information.append(mutual_info_score(v, np.digitize(z, edges[:-1])))
        first, second = sorted([*information, 0.0], reverse=True)[:2]
        gaps.append((first - second) / mutual_info_score(v, v))
    return gaps


def mixed(n=400, seed=0, latents=5):
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, size, n) for size in (3, 7, 2)], 1)
    codes = rng.normal(size=(n, latents))
    codes[:, :3] += factors[:, [0, 1, 1]] * [1.0, 0.7, 0.3]
    return codes, factors


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 300),
    latents=st.integers(1, 6),
    bins=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    rounded=st.booleans(),
)
def test_the_plain_loop(n, latents, bins, seed, rounded):
    codes, factors = mixed(n, seed, max(latents, 3))
    codes = (codes.round() if rounded else codes)[:, :latents]  # whole numbers fall on bin edges
    expected = plain_mig(codes, factors, bins)
    if not expected:
        return
    result = mig(codes, factors, bins, replicates=0)
    assert result.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert list(result.per_factor.values()) == pytest.approx(expected, abs=1e-12)


def grid(*sizes):
    return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")], 1)


def test_a_perfect_code_has_gap_one():
    factors = grid(3, 4, 5)
    assert float(mig(factors[:, [2, 0, 1]] * [1.0, -3.0, 0.1], factors)) == pytest.approx(1, abs=1e-12)


def test_a_duplicated_code_has_gap_zero():
    factors = grid(3, 4)
    assert float(mig(np.concatenate([factors, factors], 1) / 2, factors)) == pytest.approx(0, abs=1e-12)


def test_half_the_information():
    # one latent tells a four-valued factor's upper bit, nothing else does: gap = ln 2 / ln 4
    factors = grid(4, 3)
    result = mig(np.stack([factors[:, 0] // 2, np.zeros(12)], 1), factors)
    assert result.per_factor == pytest.approx({"factor 0": 0.5, "factor 1": 0.0}, abs=1e-12)


def test_independent_codes_approach_zero():
    rng = np.random.default_rng(0)
    assert float(mig(rng.normal(size=(20_000, 4)), rng.integers(0, 4, (20_000, 2)), replicates=0)) < 2e-3


def test_one_valued_factors_are_dropped_and_named():
    codes, factors = mixed()
    wide = np.insert(factors, 1, 7, axis=1)
    result = mig(codes, wide, factor_names=["a", "colour", "b", "c"])
    assert result.dropped == ("colour",) and list(result.per_factor) == ["a", "b", "c"]
    assert float(result) == float(mig(codes, factors))


def test_any_integer_ids_and_any_container():
    codes, factors = mixed()
    expected = mig(codes, factors)
    assert float(mig(codes, factors * -1000 + 17)) == pytest.approx(float(expected), abs=1e-12)
    assert mig(torch.from_numpy(codes), torch.from_numpy(factors)) == expected
    assert mig(codes.tolist(), factors.astype(np.uint8).tolist()) == expected


def test_constant_codes_have_no_information():
    factors = grid(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mig(np.full((10, 3), 0.1), factors)
    assert (result.value, result.low, result.high) == (0, 0, 0)


@pytest.mark.parametrize("codes", [[[0.0], [1.0]], [[0.0, 5e-324], [1e-320, 0.0]], [[1e308, 1.0], [-5e307, 1.0]]])
def test_extreme_codes_are_defined(codes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mig(codes, [[0], [1]])
    assert 0 <= result.value <= 1


def test_interval_does_not_depend_on_the_chunks(monkeypatch):
    codes, factors = mixed(100)
    whole = mig(codes, factors)
    module = importlib.import_module("vaecirc_fast.metrics.information")
    monkeypatch.setattr(module, "_SAMPLES", 7)
    monkeypatch.setattr(module, "_WEIGHTS", 1700)
    assert mig(codes, factors) == whole
    assert mig(codes, factors, seed=1) != whole


def test_interval_resamples_the_samples():
    """Each replicate is the plain MIG of rows repeated by the weights, under the bins of the whole."""
    from vaecirc_fast.metrics.statistics import poisson_weights

    codes, factors = mixed(60)
    cut = np.stack([np.digitize(z, np.histogram(z, 20)[1][:-1]) for z in codes.T], 1)
    replicates = []
    for weights in poisson_weights(25, 60, seed=3).long().numpy():
        rows = np.repeat(np.arange(60), weights)
        gaps = []
        for v in factors[rows].T:
            information = sorted(mutual_info_score(v, z) for z in cut[rows].T)
            gaps.append((information[-1] - information[-2]) / mutual_info_score(v, v))
        replicates.append(np.mean(gaps))
    result = mig(codes, factors, replicates=25, seed=3)
    expected = np.quantile(replicates, [0.025, 0.975], method="weibull") - np.mean(replicates) + result.value
    assert [result.low, result.high] == pytest.approx(expected.tolist(), abs=1e-9)


def test_interval_covers():
    migs = [mig(*mixed(300, seed), replicates=60) for seed in range(120)]
    mean = np.mean([m.value for m in migs])
    covered = np.mean([m.low < mean < m.high for m in migs])
    assert 0.87 < covered <= 0.995


def test_few_samples():
    codes, factors = mixed(6, seed=3)
    result = mig(codes, factors)
    assert result.low < result.value < result.high
    alone = mig([[0.0], [1.0]], [[0], [1]], replicates=0)
    assert alone.value == pytest.approx(1) and math.isnan(alone.low)


@pytest.mark.parametrize(
    "codes, factors, extra, match",
    [
        ([[math.nan], [1.0]], [[0], [1]], {}, "latent 0"),
        ([[1.0, 2.0], [1.0, math.inf]], [[0], [1]], {}, "latent 1"),
        ([[1.7e308], [-1.7e308]], [[0], [1]], {}, "range"),
        ([[0.0], [1.0]], [[0.0], [1.0]], {}, "integers"),
        ([[0.0], [1.0]], [[0], [1], [2]], {}, "N = 2"),
        ([[0.0], [1.0]], [0, 1], {}, r"\(N, K\)"),
        ([0.0, 1.0], [[0], [1]], {}, r"\(N, L\)"),
        (np.zeros((0, 2)), np.zeros((0, 2), int), {}, r"\(N, L\)"),
        (np.zeros((2, 0)), [[0], [1]], {}, r"\(N, L\)"),
        ([[1j], [0]], [[0], [1]], {}, "numbers"),
        ([["a"], ["b"]], [[0], [1]], {}, "numbers"),
        ([[0.0], [1.0]], [[3], [3]], {"factor_names": ["hue"]}, "hue"),
        ([[0.0]], [[0]], {}, "varies"),
        ([[0.0], [1.0]], [[0], [1]], {"factor_names": ["a", "b"]}, "factor_names"),
        ([[0.0], [1.0]], [[0], [1]], {"bins": 0}, "bins"),
        ([[0.0], [1.0]], [[0], [1]], {"bins": 2.5}, "bins"),
        ([[0.0], [1.0]], [[0], [1]], {"replicates": -1}, "replicates"),
        ([[0.0], [1.0]], [[0], [1]], {"level": 95}, "level"),
    ],
)
def test_bad_input(codes, factors, extra, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match) as caught:
            mig(codes, factors, **extra)
    assert "\n" not in str(caught.value)
