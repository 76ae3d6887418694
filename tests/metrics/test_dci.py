"""DCI: closed forms, scikit-learn's trees as judge, splits, intervals, bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn import datasets
from sklearn.ensemble import GradientBoostingClassifier

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import dci, disentanglement_completeness
from vaecirc_fast.metrics.splits import split_samples


def grid(*sizes, times=1):
    return np.tile(
        np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")], 1), (times, 1)
    )


def mixed(n=120, seed=0, latents=4):
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, size, n) for size in (3, 2)], 1)
    codes = rng.normal(size=(n, latents))
    codes[:, :2] += factors * [1.0, 2.0]
    return codes, factors


# --- D and C of a matrix ---------------------------------------------------------------------------------------------


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**31))
def test_the_formula(latents, factors, seed):
    """disentanglement_lib's: scipy's entropies with the base of their length, weighted by mass."""
    R = np.random.default_rng(seed).random((latents, factors)) ** 4
    got = disentanglement_completeness(torch.from_numpy(R))
    d = 1 - entropy(R.T + 1e-300, base=factors)
    c = 1 - entropy(R + 1e-300, base=latents)
    assert got.disentanglement == pytest.approx(d @ R.sum(1) / R.sum(), abs=1e-12)
    assert got.completeness == pytest.approx(c @ R.sum(0) / R.sum(), abs=1e-12)
    assert got.per_latent == pytest.approx(d, abs=1e-12)


def test_closed_forms_of_a_matrix():
    score = lambda rows: disentanglement_completeness(rows)[:2]  # noqa: E731
    assert score(np.eye(3)[[2, 0, 1]] * [[1], [5], [2]]) == (1, 1)  # permuted, of any mass
    assert score(np.ones((4, 3))) == pytest.approx((0, 0), abs=1e-15)
    assert score([[1, 0], [1, 0], [0, 1], [0, 1]]) == pytest.approx((1, 0.5))  # each factor in two of four latents
    assert score([[1, 1, 0, 0], [0, 0, 1, 1]]) == pytest.approx((0.5, 1))
    assert score(np.zeros((2, 2))) == (0, 0)
    assert score([[1, 0], [0, 1], [0, 0]]) == pytest.approx((1, 1))  # an idle latent weighs nothing
    assert score([[1.0], [1.0]]) == (1, 0) and score([[2.0, 2.0]]) == (0, 1)
    assert score([[1e308, 0], [0, 1e308]]) == (1, 1)


@pytest.mark.parametrize("matrix", [[1.0, 2.0], np.zeros((0, 2)), [[-1.0]], [[math.nan]], [[math.inf]], [["a"]]])
def test_bad_matrices(matrix):
    with pytest.raises(InputError, match="matrix"):
        disentanglement_completeness(matrix)


# --- codes -----------------------------------------------------------------------------------------------------------


def test_a_perfect_code():
    factors = grid(3, 4, times=30)
    result = dci(factors[:, [1, 0]] * [-2.0, 0.1], factors)
    assert (result.disentanglement, result.completeness, result.informativeness) == (1, 1, 1)
    assert np.array_equal(result.importance, [[0, 1], [1, 0]])
    assert result.accuracy == {"factor 0": 1, "factor 1": 1} and result.train_accuracy == 1


def test_a_duplicated_code_is_less_complete():
    factors = grid(3, 4, times=30)
    codes = factors[:, [0, 1, 0]].astype(float)
    result = dci(codes, factors)
    assert result.disentanglement == 1
    assert result.per_factor[0] == pytest.approx(1 - math.log(2) / math.log(3), abs=1e-12)  # halves for the copies
    assert result.per_factor[1] == 1


def test_a_rotated_code_is_entangled():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 4, (600, 2))
    z = factors + 0.3 * rng.normal(size=(600, 2))
    straight, turned = dci(z, factors), dci(z @ np.array([[1, -1], [1, 1]]), factors)
    assert straight.disentanglement > 0.7 > 0.1 > turned.disentanglement
    assert turned.informativeness > 0.8


def scores_of_sklearn(data, seed):
    """D, C, importances and test accuracy by GradientBoostingClassifier on the same samples."""
    machines = [GradientBoostingClassifier(random_state=seed).fit(data.codes, v) for v in data.levels.T]
    R = np.stack([m.feature_importances_ for m in machines], 1)
    D = (1 - entropy(R.T + 1e-300, base=max(2, R.shape[1]))) @ R.sum(1) / R.sum()
    C = (1 - entropy(R + 1e-300, base=len(R))) @ R.sum(0) / R.sum()
    accuracy = np.mean([m.score(data.codes_test, v) for m, v in zip(machines, data.levels_test.T, strict=True)])
    return D, C, R, accuracy


def test_sklearn():
    # so few samples tie often, and D of one fit has a standard deviation of .005 on both sides, hence means over seeds
    codes, factors = mixed(900, seed=3, latents=3)
    data = split_samples(codes, factors, 10_000, 5_000, 0)
    own = dict(codes_test=data.codes_test, factors_test=data.levels_test)
    ours = [dci(data.codes, data.levels, seed=seed, **own) for seed in range(8)]
    D, C, R, accuracy = scores_of_sklearn(data, 0)
    assert abs(np.mean([a.disentanglement for a in ours]) - D) <= 0.005
    assert abs(np.mean([a.completeness for a in ours]) - C) <= 0.005
    importance = np.mean([a.importance for a in ours], 0)
    assert all(np.corrcoef(a, b)[0, 1] >= 0.999 for a, b in zip(R.T, importance.T, strict=True))
    assert np.mean([a.informativeness for a in ours]) == pytest.approx(accuracy, abs=0.01)


def problems():
    """name -> codes, factors, seeds to average over: few samples tie often, and both sides then draw."""
    rng = np.random.default_rng(1)
    factors = np.stack([rng.integers(0, size, 3000) for size in (3, 6, 2)], 1)
    signal = np.stack([factors[:, 0], factors[:, 1] / 2, factors[:, 0] * factors[:, 2], factors[:, 2]], 1)
    noise = 0.4 * rng.normal(size=(3000, 6))
    own = np.concatenate([signal, np.zeros((3000, 2))], 1) + noise
    entangled = own @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    digits = datasets.load_digits()
    pixels = digits.data - digits.data.mean(0)
    components = pixels @ np.linalg.svd(pixels, full_matrices=False)[2][:6].T
    parity = np.stack([digits.target, digits.target % 2], 1)
    wine, cancer = datasets.load_wine(), datasets.load_breast_cancer()
    return {
        "own latents": (own, factors, 1),
        "entangled": (entangled, factors, 1),
        "rounded": ((entangled * 4).round(), factors, 1),
        "digits": (components, parity, 1),
        "wine": (wine.data, np.stack([wine.target, wine.data[:, 12] > 750], 1).astype(int), 5),
        "two classes": (cancer.data[:, :10], np.stack([cancer.target, cancer.data[:, 20] > 16], 1).astype(int), 8),
    }


@pytest.mark.deep
@pytest.mark.parametrize("name", ["own latents", "entangled", "rounded", "digits", "wine", "two classes"])
def test_sklearn_on_many_data_sets(name, capsys):
    codes, factors, seeds = problems()[name]
    data = split_samples(codes, factors, 10_000, 5_000, 0)
    train = dict(codes_test=data.codes_test, factors_test=data.levels_test)
    ours = [dci(data.codes, data.levels, seed=seed, **train) for seed in range(seeds)]
    theirs = [scores_of_sklearn(data, seed) for seed in range(seeds)]
    d = np.mean([a.disentanglement - b[0] for a, b in zip(ours, theirs, strict=True)])
    c = np.mean([a.completeness - b[1] for a, b in zip(ours, theirs, strict=True)])
    mean, expected = np.mean([a.importance for a in ours], 0), np.mean([b[2] for b in theirs], 0)
    r = min(np.corrcoef(a, b)[0, 1] for a, b in zip(mean.T, expected.T, strict=True))
    accuracy = np.mean([a.informativeness - b[3] for a, b in zip(ours, theirs, strict=True)])
    with capsys.disabled():
        print(f"\n{name}: dD {d:+.4f}, dC {c:+.4f}, least r {r:.6f}, accuracy {accuracy:+.4f}, {seeds} seeds")
    assert abs(d) <= 0.005 and abs(c) <= 0.005 and r >= 0.999
    assert abs(accuracy) <= 0.01


# --- what is around --------------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_result():
    codes, factors = mixed()
    first, second, other = dci(codes, factors), dci(codes, factors), dci(codes, factors, seed=1)
    assert np.array_equal(first.importance, second.importance) and first.estimates == second.estimates
    assert not np.array_equal(first.importance, other.importance)


def test_splits_are_stated():
    codes, factors = mixed(90)
    assert dci(codes, factors, train=50, test=20).split == "50 training and 20 test samples"
    assert "60 training and 30 test samples: 2/3 and 1/3, fewer than 10,000 and 5,000" in str(dci(codes, factors))
    own = dci(codes[:50], factors[:50], codes_test=codes[50:], factors_test=factors[50:])
    assert own.split == "50 training and 40 test samples, as given"


def test_the_split_has_no_sample_twice():
    codes, factors = np.arange(100.0)[:, None] * [1, 1], np.arange(100)[:, None] % 2
    data = split_samples(codes, factors, 60, 30, 0)
    both = np.concatenate([data.codes, data.codes_test])[:, 0]
    assert len(data.codes) == 60 and len(set(both)) == 90
    assert np.array_equal(data.levels[:, 0], data.codes[:, 0] % 2)


def test_one_valued_factors_are_dropped_and_named():
    codes, factors = mixed()
    wide = np.insert(factors, 1, 7, axis=1)
    result = dci(codes, wide, factor_names=["shape", "colour", "size"])
    assert result.dropped == ("colour",) and result.names == ("shape", "size")
    assert "colour" in str(result)
    assert np.array_equal(result.importance, dci(codes, factors).importance)
    assert list(result.to_dataframe().columns) == ["shape", "size"]
    # one that has a second value among the test samples only
    late = dci(
        codes[:80], wide[:80], codes_test=codes[80:], factors_test=np.c_[wide[80:, 0], wide[80:, 1] + 1, wide[80:, 2]]
    )
    assert late.dropped == ("factor 1",)


def test_classes_absent_from_a_part():
    codes, factors = mixed(90)
    factors[:60, 0] %= 2  # class 2 is never seen
    factors[60:, 1] = 0  # class 1 is never asked for
    factors[60:62, 0] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = dci(codes[:60], factors[:60], codes_test=codes[60:], factors_test=factors[60:])
    assert result.accuracy["factor 0"] <= 28 / 30
    assert 0 <= result.informativeness <= 1


def test_constant_and_tiny_codes():
    _, factors = mixed(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = dci(np.full((60, 2), 3.0), factors)
        tiny = dci(np.random.default_rng(0).normal(size=(60, 2)) * 1e-9, factors)
    assert (result.disentanglement, result.completeness) == (0, 0)
    assert np.array_equal(tiny.importance, np.zeros((2, 2)))  # closer than 1e-7: equal, as to scikit-learn
    assert not math.isnan(result.informativeness)


def test_intervals():
    codes, factors = mixed()
    plain = dci(codes, factors)
    assert math.isnan(plain.estimates["disentanglement"].low) and "no interval" in str(plain)
    accuracy = plain.estimates["informativeness"]
    assert accuracy.low <= plain.informativeness <= accuracy.high and accuracy.resampled == "test samples"
    refitted = dci(codes, factors, replicates=20)
    for name in ("disentanglement", "completeness"):
        estimate = refitted.estimates[name]
        assert estimate.low < getattr(refitted, name) < estimate.high
        assert estimate.value == getattr(refitted, name) and estimate.resampled == "training samples"


def test_any_ids_and_containers():
    codes, factors = mixed()
    expected = dci(codes, factors).importance
    assert np.array_equal(dci(torch.from_numpy(codes), torch.from_numpy(factors)).importance, expected)
    assert np.array_equal(dci(codes.tolist(), factors * 10 - 3).importance, expected)


@pytest.mark.parametrize(
    "codes, factors, extra, match",
    [
        ([[math.nan], [1.0], [2.0]], [[0], [1], [0]], {}, "latent 0"),
        ([[1e39], [1.0], [2.0], [1e39]], [[0], [1], [1], [0]], {"train": 3, "test": 1}, "float32"),
        ([[1.0], [2.0], [3.0]], [[0.0], [1.0], [0.0]], {}, "integers"),
        ([[1.0], [2.0]], [[0], [1]], {}, "3 samples"),
        ([[1.0], [2.0], [3.0]], [[0], [1]], {}, "N = 3"),
        ([[1.0], [2.0], [3.0]], [[0], [0], [0]], {}, "varies"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"train": 0}, "train"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"test": 1.5}, "test"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"seed": -1}, "seed"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"replicates": -1}, "replicates"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"level": 95}, "level"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"codes_test": [[1.0]]}, "both or neither"),
        ([[1.0]] * 3, [[0], [1], [0]], {"codes_test": [[1.0, 2]], "factors_test": [[1]]}, "columns"),
        ([[1.0]] * 3, [[0], [1], [0]], {"codes_test": [[1.0]], "factors_test": [[1], [0]]}, "factors_test"),
        ([[1.0]] * 3, [[0], [0], [0]], {"codes_test": [[1.0]], "factors_test": [[1]]}, "training samples"),
        ([[1.0], [2.0], [3.0]], [[0], [1], [0]], {"factor_names": ["a", "b"]}, "factor_names"),
    ],
)
def test_bad_input(codes, factors, extra, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match) as caught:
            dci(codes, factors, **extra)
    assert "\n" not in str(caught.value)
