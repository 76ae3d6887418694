"""The interventional robustness score: closed forms, the definition in plain loops, and its interval."""

import math

import numpy as np
import pytest
from coded_grids import FACTORS, grid, noisy, perfect, rotated
from hypothesis import given
from hypothesis import strategies as st

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import irs
from vaecirc_fast.metrics.statistics import poisson_weights


def plain_irs(codes, factors, quantile=0.99):
    """One latent, factor and value after another."""
    codes = codes[:, codes.min(0) < codes.max(0)]
    scores, weights = [], []
    for z in codes.T:
        furthest = np.abs(z - z.mean()).max()
        held = [
            np.mean([np.quantile(np.abs(z[v == a] - z[v == a].mean()), quantile) for a in np.unique(v)])
            for v in factors.T
        ]
        scores.append(1 - min(held) / furthest)
        weights.append(furthest)
    return np.average(scores, weights=weights)


@given(
    n=st.integers(2, 200), seed=st.integers(0, 1000), quantile=st.sampled_from([0.5, 0.9, 0.99, 1]), whole=st.booleans()
)
def test_the_plain_loops(n, seed, quantile, whole):
    codes, factors = noisy(n, seed)
    codes = codes.round() if whole else codes
    if not (factors != factors[0]).any():
        return
    factors = factors[:, (factors != factors[0]).any(0)]
    score = irs(codes, factors, quantile=quantile, replicates=0)
    assert score.value == pytest.approx(plain_irs(codes, factors, quantile), abs=1e-12)
    assert math.isnan(score.low)


def test_a_perfect_code_scores_one():
    score = irs(perfect(), FACTORS, exact=True)
    assert score.value == score.low == score.high == 1
    assert score.parents.tolist() == [2, 0, 1]
    twice = np.concatenate([perfect(), perfect()[:, :1], np.full((60, 1), 0.1)], 1)
    score = irs(twice, FACTORS, exact=True)
    assert score.value == pytest.approx(1, abs=1e-12)
    assert score.parents.tolist() == [2, 0, 1, 2, -1] and score.per_latent[-1] == 0


def test_a_latent_of_two_binary_factors():
    # z in {-1, 0, 0, 1}: its largest deviation is 1; with either held, it deviates by 1/2
    factors = grid(2, 2)
    score = irs(factors.sum(1, keepdims=True) - 1.0, factors, exact=True)
    assert score.matrix.tolist() == [[0.5, 0.5]] and score.value == 0.5


def test_weights_are_largest_deviations():
    factors = grid(2, 2)
    codes = np.stack([3.0 * factors[:, 0], factors.sum(1) - 1.0], 1)  # scores 1 and .5, deviations 1.5 and 1
    assert irs(codes, factors, exact=True).value == pytest.approx((1.5 + 0.5) / 2.5)


def test_a_rotated_code_is_less_robust():
    assert irs(rotated(), FACTORS, exact=True).value < 0.6


def test_constant_codes_score_zero():
    score = irs(np.full((60, 2), 0.1), FACTORS)
    assert (score.value, score.low, score.high) == (0, 0, 0) and score.note == "no latent varies"
    assert math.isnan(irs(np.full((60, 2), 0.1), FACTORS, replicates=0).low)


@given(seed=st.integers(0, 1000))
def test_what_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    codes, factors = noisy(100, seed)
    order, signs = rng.permutation(5), rng.choice([-1, 1], 5)
    before = irs(codes, factors, replicates=8)
    after = irs((codes[:, order] * signs + rng.normal(size=5)) * 3, factors[:, ::-1], replicates=8)
    assert [after.value, after.low, after.high] == pytest.approx([before.value, before.low, before.high], abs=1e-5)


@pytest.mark.parametrize("n, quantile", [(60, 0.99), (60, 0.7), (400, 0.99), (400, 1)])
def test_the_interval_resamples_the_samples(n, quantile):
    """Each replicate is the plain score of rows repeated by the weights, up to float32."""
    codes, factors = noisy(n)
    drawn = [
        plain_irs(np.repeat(codes, weights, 0), np.repeat(factors, weights, 0), quantile)
        for weights in poisson_weights(20, n, seed=3).long().numpy()
    ]
    found = irs(codes, factors, quantile=quantile, replicates=20, seed=3)
    expected = np.quantile(drawn, [0.025, 0.975], method="weibull") - np.mean(drawn) + found.value
    assert [found.low, found.high] == pytest.approx(expected.tolist(), abs=1e-5)


def test_few_samples():
    codes, factors = noisy(6, seed=3)
    score = irs(codes, factors)
    assert score.low <= score.value <= score.high and "occur once" in score.note
    assert irs(codes, factors) == score


def test_bad_input():
    codes, factors = noisy(30)
    for options, match in (({"quantile": 0}, "quantile"), ({"replicates": -1}, "replicates"), ({"level": 95}, "level")):
        with pytest.raises(InputError, match=match):
            irs(codes, factors, **options)


@pytest.mark.deep
def test_the_interval_covers():
    """The mean of the protocol's score at this N, in at least 85 of 100 samples: it rests on extremes."""
    found = [irs(*noisy(2000, seed), replicates=60) for seed in range(100)]
    mean = np.mean([f.value for f in found])
    assert 0.85 < np.mean([f.low < mean < f.high for f in found]) <= 1
