"""SAP: scikit-learn's LinearSVC as judge of every machine, closed forms, correlations, splits, bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import sap
from vaecirc_fast.metrics.sap import _Machines
from vaecirc_fast.metrics.splits import split_samples


def grid(*sizes, times=1):
    return np.tile(
        np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")], 1), (times, 1)
    )


def mixed(n=300, seed=0, sizes=(3, 2, 7)):
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, size, n) for size in sizes], 1)
    codes = rng.normal(size=(n, 4)) * [1, 3, 0.1, 1] + [0, 5, 0, 0]
    codes[:, : len(sizes)] += factors * np.array([1, -0.7, 0.5])[: len(sizes)]
    return codes, factors


def machine_of_sklearn(x, y):
    return LinearSVC(C=0.01, class_weight="balanced", dual=False, tol=1e-10, max_iter=100_000).fit(x[:, None], y)


# --- scikit-learn ----------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    n=st.integers(6, 80), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 0.1, 1.0, 1e3]), ties=st.booleans()
)
def test_every_machine_is_the_minimum(n, seed, scale, ties):
    """Slope and intercept make the gradient of the loss, written out sample by sample, vanish."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n) * scale, rng.integers(0, 3, n)
    x, y = (x / scale).round() * scale if ties else x, np.concatenate([[0, 1, 2], y[3:]])
    machines = _Machines(np.stack([y, y == 1], 1).astype(np.int64))
    w, b = machines.fit(x)
    sides = [np.where(y == c, 1, -1) for c in range(3)] + [np.where(y == 1, 1, -1)]
    share = [n / (3 * (y == c).sum()) for c in range(3)]
    weights = [np.where(y == c, 0.01 * share[c], 0.01) for c in range(3)]
    weights.append(0.01 * n / 2 / np.where(y == 1, (y == 1).sum(), (y != 1).sum()))
    for lane, (side, weight) in enumerate(zip(sides, weights, strict=True)):
        lack = np.maximum(0, 1 - side * (w[lane] * x + b[lane]))
        size = np.abs(np.stack([x, np.ones(n)])) @ weight + 1
        gradient = np.array([w[lane], b[lane]]) - 2 * np.stack([x, np.ones(n)]) @ (weight * side * lack)
        assert np.all(np.abs(gradient) <= 1e-9 * size)


def test_machines_of_sklearn():
    codes, factors = mixed()
    machines = _Machines(factors)
    for latent in range(4):
        w, b = machines.fit(codes[:, latent])
        for k, (lanes, _) in enumerate(machines.factors):
            theirs = machine_of_sklearn(codes[:, latent], factors[:, k])
            # as far as theirs is converged
            assert w[lanes] == pytest.approx(theirs.coef_.ravel(), rel=1e-5, abs=1e-6)
            assert b[lanes] == pytest.approx(theirs.intercept_, rel=1e-5, abs=1e-6)


def test_accuracies_of_sklearn():
    codes, factors = mixed(600, seed=1)
    data = split_samples(codes, factors, 10_000, 5_000, 0)
    result = sap(codes, factors)
    expected = np.zeros((4, 3))
    for latent in range(4):
        for k in range(3):
            machine = machine_of_sklearn(data.codes[:, latent], data.levels[:, k])
            expected[latent, k] = machine.score(data.codes_test[:, latent, None], data.levels_test[:, k])
    assert np.array_equal(result.scores, expected)
    ranked = np.sort(expected, 0)
    assert result.value == pytest.approx((ranked[-1] - ranked[-2]).mean(), abs=1e-12)
    assert list(result.per_factor.values()) == pytest.approx(ranked[-1] - ranked[-2], abs=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_a_perfect_code_of_two_classes():
    factors = grid(2, 2, times=30)
    result = sap(factors * [2.0, -3.0], factors)
    # the other latent tells nothing: all of one class
    assert np.array_equal(np.diag(result.scores), [1, 1])
    share = split_samples(factors, factors, 10_000, 5_000, 0).levels_test.mean(0)
    assert result.value >= 1 - max(*share, *(1 - share)) - 1e-12


def test_a_duplicated_code_has_no_gap():
    codes, factors = mixed()
    assert sap(np.concatenate([codes, codes], 1), factors).value == 0


def test_permuted_latents_change_nothing():
    codes, factors = mixed()
    expected, got = sap(codes, factors), sap(codes[:, [2, 0, 3, 1]], factors)
    assert got.value == expected.value and np.array_equal(got.scores, expected.scores[[2, 0, 3, 1]])


def test_squared_correlations():
    codes, factors = mixed(200)
    y = factors + 0.5
    result = sap(codes, y, continuous=True)
    expected = np.corrcoef(codes.T, y.T)[:4, 4:] ** 2
    assert result.scores == pytest.approx(expected, abs=1e-12)
    assert result.n == 200 and result.resampled == "samples"
    assert "200 samples, fewer than 10,000" in str(result)
    perfect = sap(np.stack([y[:, 0], -y[:, 2]], 1), y[:, [0, 2]], continuous=True)
    assert np.diag(perfect.scores) == pytest.approx([1, 1], abs=1e-12)
    assert sap(codes, y * 1e200, continuous=True).value == pytest.approx(result.value, abs=1e-12)
    part = sap(codes, y, continuous=True, train=50)
    assert part.n == 50 and part.value != result.value


def test_the_interval_resamples_test_samples():
    codes, factors = mixed(600)
    result = sap(codes, factors)
    assert result.low < result.value < result.high and result.n == 200 and result.resampled == "test samples"
    assert sap(codes, factors) == result
    without = sap(codes, factors, replicates=0)
    assert math.isnan(without.low) and without.value == result.value
    few = sap(codes[:12], factors[:12])
    assert few.n == 4 and few.low <= few.value <= few.high


# --- what is around --------------------------------------------------------------------------------------------------


def test_one_valued_factors_and_constant_latents():
    codes, factors = mixed()
    wide, flat = np.insert(factors, 1, 7, axis=1), np.insert(codes, 0, 3.0, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sap(flat, wide, factor_names=["a", "colour", "b", "c"])
        real = sap(flat, wide.astype(float), continuous=True)
    assert result.dropped == ("colour",) and result.names == ("a", "b", "c") and "colour" in str(result)
    assert np.array_equal(result.scores[1:], sap(codes, factors).scores)
    assert real.dropped == ("factor 1",) and (real.scores[0] == 0).all()


def test_classes_absent_from_a_part():
    codes, factors = mixed(90)
    train, test = factors[:60] % [2, 2, 7], factors[60:] * [1, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sap(codes[:60], train, codes_test=codes[60:], factors_test=test)
    assert np.isfinite(result.scores).all()
    assert result.scores[:, 0].max() <= (test[:, 0] < 2).mean()


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_extreme_codes_are_defined(scale):
    codes, factors = mixed(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sap(codes * scale, factors)
    assert np.isfinite(result.scores).all() and 0 <= result.value <= 1


def test_any_ids_and_containers():
    codes, factors = mixed()
    expected = sap(codes, factors)
    assert sap(torch.from_numpy(codes), torch.from_numpy(factors)) == expected
    assert sap(codes.tolist(), factors * 10 - 3) == expected


CODES, FACTORS = [[1.0, 0], [2.0, 1], [3.0, 1]], [[0], [1], [0]]


@pytest.mark.parametrize(
    "codes, factors, extra, match",
    [
        ([[math.nan, 1], [1.0, 1], [2.0, 1]], FACTORS, {}, "latent 0"),
        (CODES, [[0.0], [1.0], [0.0]], {}, "integers"),
        (CODES[:2], FACTORS[:2], {}, "3 samples"),
        ([[1.0], [2.0], [3.0]], FACTORS, {"train": 2, "test": 1, "seed": 1}, "2 latents"),
        ([[1.0], [2.0], [3.0]], FACTORS, {"continuous": True}, "2 latents"),
        (CODES, FACTORS[:2], {"continuous": True}, "N = 3"),
        (CODES, [[math.inf], [0], [1]], {"continuous": True}, "factors: .*factor 0"),
        (CODES, [[1.5], [1.5], [1.5]], {"continuous": True}, "varies"),
        (CODES, FACTORS, {"continuous": True, "train": 1}, "train"),
        (CODES, FACTORS, {"continuous": True, "factor_names": ["a", "b"]}, "factor_names"),
        (CODES, FACTORS, {"continuous": True, "codes_test": CODES, "factors_test": FACTORS}, "nothing to test"),
        (CODES, FACTORS, {"replicates": -1}, "replicates"),
        (CODES, FACTORS, {"level": 1}, "level"),
        (CODES, FACTORS, {"seed": 0.5}, "seed"),
    ],
)
def test_bad_input(codes, factors, extra, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match) as caught:
            sap(codes, factors, **extra)
    assert "\n" not in str(caught.value)
