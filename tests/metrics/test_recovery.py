"""Graph recovery: distances and AUROC by counting, the relabelling null by enumeration, refusals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import edge_auroc, graph_recovery, reachable, structural_hamming_distance


def graph(k, *edges):
    made = np.zeros((k, k), dtype=bool)
    for a, b in edges:
        made[a, b] = True
    return made


CHAIN = graph(4, (0, 1), (1, 2))


def random_dag(rng, k):
    order = rng.permutation(k)
    return (np.triu(rng.random((k, k)) < 0.5, 1))[np.ix_(order, order)]


@pytest.mark.parametrize(
    ("edges", "distance"),
    [
        ([(0, 1), (1, 2)], 0),
        ([(0, 1)], 1),  # one missing
        ([(0, 1), (1, 2), (0, 3)], 1),  # one too many
        ([(1, 0), (1, 2)], 1),  # one reversed
        ([(0, 1), (1, 0), (1, 2)], 1),  # both ways
        ([], 2),
        ([(1, 0), (2, 1), (2, 3)], 3),
    ],
)
def test_the_distance_counts_pairs_of_nodes(edges, distance):
    assert structural_hamming_distance(graph(4, *edges), CHAIN) == distance


def test_what_is_reachable():
    assert reachable(graph(4, (0, 1), (1, 2), (2, 3))).tolist() == np.triu(np.ones((4, 4), bool), 1).tolist()
    assert not reachable(graph(3)).any()
    with pytest.raises(InputError, match="cycle"):
        reachable(graph(3, (0, 1), (1, 2), (2, 0)))


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_scores_are_those_of_plain_counting(seed, k):
    rng = np.random.default_rng(seed)
    truth, found = random_dag(rng, k), rng.random((k, k)) < 0.4
    np.fill_diagonal(found, False)
    pairs = itertools.combinations(range(k), 2)
    expected = sum((found[i, j], found[j, i]) != (truth[i, j], truth[j, i]) for i, j in pairs)
    assert structural_hamming_distance(found, truth) == expected
    weights = rng.integers(0, 4, (k, k)).astype(float)  # ties
    off = ~np.eye(k, dtype=bool)
    if truth.any():
        assert edge_auroc(weights, truth) == pytest.approx(roc_auc_score(truth[off], weights[off]), abs=1e-12)
    else:
        assert math.isnan(edge_auroc(weights, truth))
    closure = reachable(truth)
    powers = sum(np.linalg.matrix_power(truth.astype(int), p) for p in range(1, k + 1)) > 0
    assert (closure == powers).all()


def test_a_perfect_recovery_against_its_null():
    weights = CHAIN * 1.0 + 0.05
    found = graph_recovery(weights, CHAIN, 0.2, np.stack([weights] * 30), n=40)
    assert (found.shd.value, found.shd.low, found.shd.high) == (0, 0, 0)
    assert (found.auroc.value, found.auroc.low, found.auroc.high) == (1, 1, 1)
    assert found.precision == found.recall == 1 and found.exact and found.nulls == 24
    assert found.auroc_p == found.shd_p == 1 / 24  # a chain has no other labels that give the same graph
    assert found.null_auroc.value == pytest.approx(0.5) and found.null_shd.value > 1


def test_a_fork_is_as_good_relabelled_by_its_symmetry():
    fork = graph(3, (0, 1), (0, 2))
    assert graph_recovery(fork * 1.0, fork, 0.5).auroc_p == 2 / 6


def test_noise_has_uniform_p():
    rng = np.random.default_rng(1)
    p = [graph_recovery(rng.random((4, 4)), CHAIN, 0.5).auroc_p for _ in range(200)]
    assert 0.4 < np.mean(p) < 0.65 and np.mean(np.array(p) <= 0.05) < 0.1


def test_intervals_are_of_the_replicates_and_big_graphs_draw_their_null():
    rng = np.random.default_rng(0)
    truth = random_dag(rng, 8)
    weights = truth + rng.random((8, 8)) * 0.9
    drawn = np.abs(weights + rng.normal(size=(200, 8, 8)) * 0.3)
    found = graph_recovery(weights, truth, 0.95, drawn, n=50, nulls=99)
    assert found.auroc.low < found.auroc.value == 1 and not found.exact and found.auroc_p == 1 / 100
    assert found.shd.high > found.shd.value


def test_nothing_found_or_nothing_to_find():
    found = graph_recovery(np.zeros((3, 3)), graph(3, (0, 1)), 0.1)
    assert math.isnan(found.precision) and found.recall == 0 and found.auroc.value == 0.5 and found.shd.value == 1
    empty = graph_recovery(np.ones((3, 3)), graph(3), 0.1)
    assert math.isnan(empty.auroc.value) and math.isnan(empty.auroc_p) and math.isnan(empty.null_auroc.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edge_auroc(np.zeros((3, 2)), CHAIN), "weights: expected the shape of truth"),
        (lambda: edge_auroc(np.full((4, 4), np.nan), CHAIN), "weights: expected numbers >= 0"),
        (lambda: edge_auroc(-np.ones((4, 4)), CHAIN), "weights: expected numbers >= 0"),
        (lambda: edge_auroc(np.ones((4, 4)), CHAIN * 1), r"truth: expected bool \(K, K\)"),
        (lambda: structural_hamming_distance(np.eye(4, dtype=bool), CHAIN), "found: expected no edge from a node"),
        (lambda: structural_hamming_distance(graph(3), CHAIN), "found: expected the shape of truth"),
        (lambda: graph_recovery(np.ones((4, 4)), CHAIN, -1), "threshold: expected a number >= 0"),
        (lambda: graph_recovery(np.ones((4, 4)), CHAIN, 1, np.ones((9, 3, 3)), n=9), "replicates"),
        (lambda: reachable(graph(1)), "K >= 2"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
