"""The op boosted_importance: scikit-learn as judge, every backend against the reference, threads, ties, bad input."""

import numpy as np
import pytest
import torch
from backends import ALL, CPP, one_of_each, parameters
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingClassifier

from vaecirc_fast import _native
from vaecirc_fast.errors import InputError
from vaecirc_fast.ops import boosted_importance
from vaecirc_fast.reference import boosted_importance as reference

OP = torch.ops.vaecirc_fast.boosted_importance
REFERENCE = ALL[0]


def problem(n=60, latents=4, classes=(3, 2, 4), seed=0, rounded=None):
    """Codes (n, L) that tell something of labels (n, K)."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(np.arange(n) % size) for size in classes], 1)
    codes = rng.normal(size=(n, latents))
    codes += labels @ (rng.normal(size=(len(classes), latents)) * (rng.random((len(classes), latents)) < 0.5))
    codes = codes if rounded is None else codes.round(rounded)
    return torch.from_numpy(codes), torch.from_numpy(labels)


def check(got, codes, labels, test, rounds, seed=0):
    with REFERENCE.forced():
        truth = boosted_importance(codes, labels, test, rounds=rounds, seed=seed)
    # a column's entries are what is left of sums of 1; errors of the raw predictions pass from round to round
    terms = codes.shape[0] * rounds * int(labels.max() + 1)
    one = torch.ones_like(truth.importance)
    assert_close(got.importance, truth.importance, truth.importance, terms=terms, unit=one)
    assert torch.equal(got.fitted, truth.fitted)
    assert torch.equal(got.predicted, truth.predicted)


# --- scikit-learn ----------------------------------------------------------------------------------------------------


def trees_of_sklearn(codes, labels, test, rounds=100):
    machines = [GradientBoostingClassifier(n_estimators=rounds, random_state=0).fit(codes, v) for v in labels.T.numpy()]
    importance = np.stack([m.feature_importances_ for m in machines], 1)
    return importance, *(np.stack([m.predict(x) for m in machines], 1) for x in (codes, test))


@pytest.mark.parametrize("rounded", [None, 0])
@one_of_each
def test_first_trees_are_those_of_sklearn(backend, rounded):
    """Of data whose first trees have no ties but of equal codes."""
    codes, labels = problem(300, 3, (3, 2), seed=8, rounded=rounded)
    codes, test, labels = codes[:200], codes[200:], labels[:200]
    importance, fitted, predicted = trees_of_sklearn(codes, labels, test, 2)
    expected = torch.from_numpy(importance)
    draws = [boosted_importance(codes, labels, test, rounds=2, seed=seed) for seed in range(8)]
    got = min(draws, key=lambda draw: float((draw.importance - expected).abs().max()))
    assert_close(got.importance, expected, expected, terms=200 * 200, unit=torch.ones_like(expected))
    assert np.array_equal(got.fitted, fitted)
    assert np.array_equal(got.predicted, predicted)


def test_a_hundred_rounds_of_sklearn():
    codes, labels = problem(600, 4, (3, 2), seed=3)
    codes, test, labels = codes[:400], codes[400:], labels[:400]
    got = boosted_importance(codes, labels, test)
    importance, fitted, predicted = trees_of_sklearn(codes, labels, test)
    for ours, theirs in zip(got.importance.T, importance.T, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] >= 0.999
    # few samples tie often, and which latent wins then is drawn
    assert (got.fitted.numpy() == fitted).mean() > 0.98
    assert (got.predicted.numpy() == predicted).mean() > 0.95


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [None, 1, 0])
@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_values(backend, rounded):
    codes, labels = problem(rounded=rounded)
    got = boosted_importance(codes[:40], labels[:40], codes[40:], rounds=4, seed=5)
    check(got, codes[:40], labels[:40], codes[40:], 4, 5)


@settings(max_examples=8)
@given(
    n=st.integers(4, 30),
    latents=st.integers(1, 19),
    classes=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    seed=st.integers(0, 2**31),
    rounded=st.sampled_from([None, 0, 6]),
    scale=st.sampled_from([1.0, 1e-7, 1e6]),
)
def test_any_problem(n, latents, classes, seed, rounded, scale):
    codes, labels = problem(n, latents, classes, seed, rounded)
    codes = codes * scale
    got = boosted_importance(codes, labels, codes[:3], rounds=2, seed=seed)
    check(got, codes, labels, codes[:3], 2, seed)


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_more_trees_than_lanes(backend):
    codes, labels = problem(40, 3, (9, 2, 2, 5, 11, 2))
    check(boosted_importance(codes, labels, rounds=1), codes, labels, codes[:0], 1)


def test_parts_of_the_factors_are_the_whole(monkeypatch):
    import sys

    codes, labels = problem(50, 3, (5, 2, 9, 3))
    whole = boosted_importance(codes, labels, codes, rounds=5)
    monkeypatch.setattr(sys.modules["vaecirc_fast.ops.boosted_importance"], "_BYTES", 1)
    for part, all_ in zip(boosted_importance(codes, labels, codes, rounds=5), whole, strict=True):
        assert torch.equal(part, all_)


def test_threads_change_nothing(monkeypatch):
    codes, labels = problem(500, 5, (7, 2, 12), rounded=1)
    whole = boosted_importance(codes, labels, codes, rounds=10)
    for threads in (2, 3):
        monkeypatch.setattr(_native, "threads", lambda elements, threads=threads: threads)
        for a, b in zip(boosted_importance(codes, labels, codes, rounds=10), whole, strict=True):
            assert torch.equal(a, b)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_a_perfect_code_has_all_importance(backend):
    labels = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    noise = torch.ones(len(labels), 1, dtype=torch.float64)
    codes = torch.cat([noise, -3.0 * labels.double(), noise], 1)
    got = boosted_importance(codes, labels, codes, rounds=10)
    assert torch.equal(got.importance, torch.tensor([[0, 0], [1, 0], [0, 1], [0, 0]], dtype=torch.float64))
    assert torch.equal(got.fitted, labels) and torch.equal(got.predicted, labels)


def test_one_split_of_two_classes(backend):
    """Four samples, one round: the split between classes, then leaves of log odds 0 + .1 (1/2) / (1/4)."""
    codes = torch.tensor([[0.0, 0.3], [1.0, 0.1], [4.0, 0.3], [5.0, 0.1]], dtype=torch.float64)
    labels = torch.tensor([[7], [7], [-2], [-2]])
    got = boosted_importance(codes, labels, torch.tensor([[2.5, 0.0], [2.51, 0.0]], dtype=torch.float64), rounds=1)
    assert got.importance.flatten().tolist() == [1, 0]
    assert got.predicted.flatten().tolist() == [7, -2]  # at the threshold is left


def test_equal_latents_share(backend):
    """A latent, its copy and its mirror image tie in every split: a third of the importance each."""
    codes, labels = problem(40, 1, (4,))
    codes = torch.cat([codes, codes, -codes], 1)
    got = boosted_importance(codes, labels, rounds=3)
    third = torch.full((3, 1), 1 / 3, dtype=torch.float64)
    assert_close(got.importance, third, third, terms=40)


def test_constant_codes_tell_nothing(backend):
    codes, labels = torch.full((9, 2), 0.1, dtype=torch.float64), torch.arange(9)[:, None] % 4
    got = boosted_importance(codes, labels, codes, rounds=2)
    assert torch.equal(got.importance, torch.zeros(2, 1, dtype=torch.float64))
    assert (got.fitted == 0).all()  # the most frequent class


def test_any_ids_and_containers():
    codes, labels = problem()
    expected = boosted_importance(codes, labels, codes, rounds=3)
    got = boosted_importance(codes.T.contiguous().T, labels * -1000 + 17, codes, rounds=3)
    # ids in other order: classes change places, and with them which trees share numbers
    assert set(got.fitted.unique().tolist()) <= set((labels * -1000 + 17).unique().tolist())
    assert torch.equal(boosted_importance(codes.float(), labels, codes.float(), rounds=3).fitted, expected.fitted)
    shifted = boosted_importance(codes, labels * 10 + 3, codes, rounds=3)
    assert torch.equal(shifted.importance, expected.importance)
    assert torch.equal(shifted.fitted, expected.fitted * 10 + 3)


@pytest.mark.parametrize("backend", parameters([REFERENCE, CPP[-1]]), indirect=True)
def test_the_registered_op_passes_opcheck(backend):
    codes, labels = problem(20, 2, (2,))
    torch.library.opcheck(OP.default, (codes, labels, codes[:3], 2, 0))
    assert torch.equal(OP(codes, labels, codes[:3], 2, 0)[0], boosted_importance(codes, labels, rounds=2).importance)


def test_the_walk_of_many_ties_is_that_of_few():
    """A latent with half of its codes equal takes another way than one with few; the reference knows one only."""
    codes, labels = problem(80, 2, (3,))
    codes[:40, 0] = codes[0, 0]
    codes[1, 1] = codes[0, 1]
    check(boosted_importance(codes, labels, rounds=5), codes, labels, codes[:0], 5)


def test_hash_is_splitmix():
    # the first numbers of SplitMix64 from seed 1234567, as published with it
    state, expected = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for number in expected:
        assert reference._mixed(state) == number
        state += 0x9E3779B97F4A7C15


GOOD = {"codes": torch.rand(4, 2, dtype=torch.float64), "labels": torch.tensor([[0], [1], [0], [1]])}


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"codes": [[0.0]]}, "tensors"),
        ({"codes": torch.rand(4)}, r"\(N, L\)"),
        ({"codes": torch.rand(4, 2).half()}, "float64"),
        ({"codes": torch.rand(4, 0)}, "latent"),
        ({"codes": torch.tensor([[0.0, 1], [2, 3], [0, torch.nan], [1, 2]])}, "latent 1"),
        ({"codes": torch.tensor([[0.0, 1], [2, 3], [0, 2], [1e39, 2]], dtype=torch.float64)}, "float32, latent 0"),
        ({"labels": torch.tensor([[0], [1], [0]])}, "N = 4"),
        ({"labels": torch.rand(4, 1)}, "int64"),
        ({"labels": torch.zeros(4, 0, dtype=torch.int64)}, "K"),
        ({"labels": torch.tensor([[0, 3], [1, 3], [0, 3], [1, 3]])}, "factor 1"),
        ({"codes_test": torch.rand(4, 3)}, "2 latents"),
        ({"codes_test": torch.rand(3)}, r"\(T, L\)"),
        ({"codes_test": torch.full((1, 2), torch.inf)}, "codes_test"),
        ({"codes_test": [1]}, "tensor"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": True}, "rounds"),
        ({"seed": 0.5}, "seed"),
        ({"seed": 1 << 63}, "seed"),
    ],
)
def test_bad_input(changes, match):
    arguments = {**GOOD, **changes}
    with pytest.raises(InputError, match=match) as caught:
        boosted_importance(arguments.pop("codes"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(caught.value)
