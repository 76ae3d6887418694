"""Modularity and mean pairwise information against scikit-learn's mutual information, and in closed form."""

import importlib
import math

import numpy as np
import pytest
import torch
from coded_grids import FACTORS, grid, noisy, perfect, rotated
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import mean_pairwise_mi, modularity
from vaecirc_fast.metrics.statistics import poisson_weights


def cut(codes, bins=20):
    return np.stack([np.digitize(z, np.histogram(z, bins)[1][:-1]) for z in codes.T], 1)


def plain_modularity(binned, factors):
    """One latent after another; one without information counts 0."""
    found = []
    for z in binned.T:
        squares = sorted(mutual_info_score(v, z) ** 2 for v in factors.T)
        found.append(1 - sum(squares[:-1]) / squares[-1] / (len(squares) - 1) if squares[-1] > 1e-25 else 0.0)
    return float(np.mean(found))


def plain_pairwise(binned):
    latents = binned.shape[1]
    return np.mean([mutual_info_score(binned[:, i], binned[:, j]) for i in range(latents) for j in range(i)])


@settings(max_examples=12)
@given(n=st.integers(20, 200), bins=st.integers(2, 30), seed=st.integers(0, 1000), rounded=st.booleans())
def test_the_plain_loops(n, bins, seed, rounded):
    codes, factors = noisy(n, seed)
    codes = codes.round() if rounded else codes  # whole numbers fall on bin edges
    score = modularity(codes, factors, bins=bins, replicates=0)
    assert score.value == pytest.approx(plain_modularity(cut(codes, bins), factors), abs=1e-12)
    assert math.isnan(score.low) and math.isnan(score.high)
    assert mean_pairwise_mi(codes, bins=bins, replicates=0).value == pytest.approx(
        plain_pairwise(cut(codes, bins)), abs=1e-12
    )


def test_a_perfect_code():
    score = modularity(perfect(), FACTORS, exact=True)
    assert score.value == score.low == score.high == pytest.approx(1, abs=1e-12)
    assert np.diag(score.information[:, [2, 0, 1]]) == pytest.approx([math.log(5), math.log(3), math.log(4)])
    assert mean_pairwise_mi(perfect(), exact=True).value == pytest.approx(0, abs=1e-12)


def test_a_latent_of_two_factors_of_three():
    # I with both is that of a factor of 4 values and with the third 0: 1 - 1 / 2
    factors = grid(4, 4, 3)
    codes = np.stack([4 * factors[:, 0] + factors[:, 1], factors[:, 2]], 1)
    score = modularity(codes, factors, exact=True)
    assert score.per_latent == pytest.approx([0.5, 1], abs=1e-12) and score.value == pytest.approx(0.75, abs=1e-12)


def test_a_rotated_code_is_less_modular():
    assert modularity(rotated(), FACTORS, exact=True).value < 0.95
    assert mean_pairwise_mi(rotated(), exact=True).value > 0.5


def test_duplicated_and_constant_latents():
    twice = np.concatenate([perfect(), perfect()], 1)
    assert modularity(twice, FACTORS, exact=True).value == pytest.approx(1, abs=1e-12)
    # of 15 pairs the three of a latent with its copy tell its whole entropy
    assert mean_pairwise_mi(twice, exact=True).value == pytest.approx(math.log(60) / 15, abs=1e-12)
    still = np.concatenate([perfect(), np.full((60, 1), 0.1)], 1)
    assert modularity(still, FACTORS, exact=True).value == pytest.approx(0.75, abs=1e-12)
    assert mean_pairwise_mi(np.full((9, 3), 0.1)).value == 0


@given(seed=st.integers(0, 1000))
def test_order_sign_and_scale_of_latents_change_nothing(seed):
    rng = np.random.default_rng(seed)
    codes, factors = noisy(150, seed)
    order, scale = rng.permutation(5), 2.0 ** rng.integers(-3, 4, 5)
    for metric in (lambda z: modularity(z, factors, replicates=8), lambda z: mean_pairwise_mi(z, replicates=8)):
        before, after = metric(codes), metric(codes[:, order] * scale)
        assert [after.value, after.low, after.high] == pytest.approx([before.value, before.low, before.high], abs=1e-12)
    columns = rng.permutation(3)
    assert modularity(codes, factors[:, columns], replicates=0).value == pytest.approx(
        modularity(codes, factors, replicates=0).value, abs=1e-12
    )


def test_intervals_resample_the_samples():
    """Each replicate is the plain value of rows repeated by the weights, under the bins of the whole."""
    codes, factors = noisy(60)
    binned = cut(codes)
    modular, pairwise = [], []
    for weights in poisson_weights(15, 60, seed=3).long().numpy():
        rows = np.repeat(np.arange(60), weights)
        modular.append(plain_modularity(binned[rows], factors[rows]))
        pairwise.append(plain_pairwise(binned[rows]))
    for found, drawn in (
        (modularity(codes, factors, replicates=15, seed=3), modular),
        (mean_pairwise_mi(codes, replicates=15, seed=3), pairwise),
    ):
        expected = np.quantile(drawn, [0.025, 0.975], method="weibull") - np.mean(drawn) + found.value
        assert [found.low, found.high] == pytest.approx(expected.tolist(), abs=1e-9)


def test_intervals_do_not_depend_on_the_chunks(monkeypatch):
    codes, factors = noisy(100)
    whole = modularity(codes, factors), mean_pairwise_mi(codes)
    module = importlib.import_module("vaecirc_fast.metrics.information")
    monkeypatch.setattr(module, "_SAMPLES", 7)
    monkeypatch.setattr(module, "_WEIGHTS", 1700)
    found = modularity(codes, factors), mean_pairwise_mi(codes)
    for a, b in zip(whole, found, strict=True):
        assert [a.value, a.low, a.high] == pytest.approx([b.value, b.low, b.high], abs=1e-12)
    assert modularity(codes, factors, seed=1) != modularity(codes, factors)


def test_few_samples_and_containers():
    codes, factors = noisy(6, seed=3)
    score = modularity(codes, factors)
    assert score.low <= score.value <= score.high
    assert modularity(torch.from_numpy(codes), torch.from_numpy(factors)) == score
    assert modularity(codes.tolist(), (factors * -1000 + 17).tolist()) == score


def test_bad_input():
    codes, factors = noisy(30)
    with pytest.raises(InputError, match="two that vary, got only a"):
        modularity(codes, factors[:, :1], factor_names=["a"])
    with pytest.raises(InputError, match="two latents"):
        mean_pairwise_mi(codes[:, :1])
    for options, match in (({"bins": 0}, "bins"), ({"replicates": 2.5}, "replicates"), ({"level": 95}, "level")):
        with pytest.raises(InputError, match=match):
            modularity(codes, factors, **options)
        with pytest.raises(InputError, match=match):
            mean_pairwise_mi(codes, **options)
    with pytest.raises(InputError, match="latent 1"):
        mean_pairwise_mi([[0.0, math.nan]])
