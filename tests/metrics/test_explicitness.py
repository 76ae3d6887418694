"""Explicitness: scikit-learn's logistic regression and AUC, closed forms, and DeLong's interval."""

import numpy as np
import pytest
from coded_grids import FACTORS, grid, noisy, perfect
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import explicitness
from vaecirc_fast.metrics.explicitness import _auc, one_versus_rest
from vaecirc_fast.metrics.splits import split_samples


def sklearn_explicitness(data):
    x, x_test = ((z - data.codes.mean(0)) / data.codes.std(0) for z in (data.codes, data.codes_test))
    found = []
    for v, v_test in zip(data.levels.T, data.levels_test.T, strict=True):
        aucs = []
        for a in np.unique(v):
            y, y_test = v == a, v_test == a
            if len(set(y)) == len(set(y_test)) == 2:
                model = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x, y)
                aucs.append(roc_auc_score(y_test, model.decision_function(x_test)))
        found.append(np.mean(aucs))
    return np.mean(found)


@pytest.mark.parametrize("n", [90, 600])
def test_scikit_learn(n):
    codes, factors = noisy(n)
    score = explicitness(codes, factors, train=300, test=200, seed=1)
    data = split_samples(codes, factors, 300, 200, 1)
    assert score.value == pytest.approx(sklearn_explicitness(data), abs=1e-12)
    assert score.note == ("" if n == 600 else data.text)
    assert np.mean(list(score.per_factor.values())) == pytest.approx(score.value)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), separable=st.booleans(), shift=st.sampled_from([0, 3, 30]))
def test_classifiers_are_those_of_scikit_learn(seed, separable, shift):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(80, 3)) + shift
    score = x @ rng.normal(size=(3, 2)) + (0 if separable else 2) * rng.normal(size=(80, 2))
    y = score > np.quantile(score, rng.uniform(0.05, 0.95, 2), axis=None)
    if (y.all(0) | ~y.any(0)).any():
        return
    found = one_versus_rest(x, y)
    for c in range(2):
        model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000)
        model.fit(x, y[:, c])
        assert found[:3, c] == pytest.approx(model.coef_[0], abs=1e-5)
        assert found[3, c] == pytest.approx(model.intercept_[0], abs=1e-4 * (1 + shift))


@given(n=st.integers(2, 60), seed=st.integers(0, 2**31), ties=st.booleans())
def test_auc_and_its_influence(n, seed, ties):
    rng = np.random.default_rng(seed)
    score, truth = rng.normal(size=n), rng.random(n) < 0.4
    truth[:2] = True, False
    score = score.round() if ties else score
    value, influence = _auc(score, truth)
    assert value == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    # DeLong's placements one pair at a time
    pairs = (score[truth][:, None] > score[~truth]) + 0.5 * (score[truth][:, None] == score[~truth])
    expected = np.empty(n)
    expected[truth] = (pairs.mean(1) - value) * n / truth.sum()
    expected[~truth] = (pairs.mean(0) - value) * n / (~truth).sum()
    assert influence == pytest.approx(expected, abs=1e-9) and influence.mean() == pytest.approx(0, abs=1e-9)


def test_one_hot_codes_are_explicit_and_noise_is_not():
    v = grid(3, 4).repeat(50, 0)
    codes = np.concatenate([np.eye(3)[v[:, 0]], np.eye(4)[v[:, 1]]], 1)
    score = explicitness(codes, v)
    assert score.value == score.low == score.high == 1
    noise = np.random.default_rng(0).normal(size=(3000, 4))
    score = explicitness(noise, np.random.default_rng(1).integers(0, 3, (3000, 2)))
    assert score.low < 0.5 < score.high and score.high - score.low < 0.1


def test_codes_in_a_row_are_not_linearly_explicit():
    # of five values on one line the middle one is neither above nor below the rest: its AUC is that of chance or less
    score = explicitness(perfect().repeat(20, 0), FACTORS.repeat(20, 0))
    assert 0.7 < score.value < 0.95


def test_constant_codes_score_chance():
    score = explicitness(np.full((60, 2), 0.1), FACTORS)
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)


@given(seed=st.integers(0, 1000))
def test_order_and_scale_of_latents_change_nothing(seed):
    rng = np.random.default_rng(seed)
    codes, factors = noisy(150, seed)
    order, scale = rng.permutation(5), rng.uniform(0.1, 10, 5) * rng.choice([-1, 1], 5)
    before = explicitness(codes, factors)
    after = explicitness(codes[:, order] * scale + rng.normal(size=5), factors)
    assert [after.value, after.low, after.high] == pytest.approx([before.value, before.low, before.high], abs=2e-3)
    twice = explicitness(np.concatenate([codes, np.full((150, 1), 0.1)], 1), factors)
    assert twice.value == pytest.approx(before.value, abs=2e-3)


def test_few_samples():
    codes, factors = noisy(30)
    score = explicitness(codes, np.concatenate([factors, np.arange(30)[:, None]], 1))
    assert "20 training and 10 test samples" in score.note and "factor 3 left out" in score.note
    assert list(score.per_factor) == ["factor 0", "factor 1", "factor 2"] and score.n == 10
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_bad_input():
    codes, factors = noisy(30)
    for options, match in (({"train": 0}, "train"), ({"test": 1.5}, "test"), ({"level": 95}, "level")):
        with pytest.raises(InputError, match=match):
            explicitness(codes, factors, **options)
    with pytest.raises(InputError, match="3 samples"):
        explicitness([[0.0], [1.0]], [[0], [1]])
    with pytest.raises(InputError, match="training"):
        explicitness([[0.0], [1.0], [2.0]], [[0], [1], [2]])


@pytest.mark.deep
def test_the_interval_covers():
    """With the classifiers fixed: large test sets of which small ones are drawn."""
    codes, factors = noisy(4000, 5)
    found = [explicitness(*noisy(900, seed), train=600, test=300, seed=1) for seed in range(120)]
    mean = np.mean([f.value for f in found])
    assert 0.86 < np.mean([f.low < mean < f.high for f in found]) <= 1
    assert explicitness(codes, factors, train=3000, test=1000).value == pytest.approx(mean, abs=0.03)
