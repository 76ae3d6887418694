"""Circuit graphs and circuit modularity: closed forms, networkx as judge, invariance under rescaled units, files."""

import importlib
import math
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vaecirc_fast.errors import InputError, MissingExtra
from vaecirc_fast.interventions.edges import direct_edges
from vaecirc_fast.metrics import CircuitGraph, circuit_graph, circuit_modularity
from vaecirc_fast.metrics.louvain import louvain, louvain_of_many, newman_q


def cliques(parts=2, size=3):
    """Layers of `parts` blocks, every unit joined to all of its own block in the next layer."""
    return torch.block_diag(*[torch.ones(size, size)] * parts)


def random_graph(seed=0, sizes=(4, 6, 5)):
    g = torch.Generator().manual_seed(seed)
    names = [f"layer {n}" for n in range(len(sizes))]
    pairs = zip(names, names[1:], sizes, sizes[1:], strict=False)
    return circuit_graph(*[(p, c, torch.rand(v, u, generator=g) ** 3) for p, c, u, v in pairs])


def symmetrised(graph):
    A = graph.adjacency()
    return A + A.T


# --- the graph -------------------------------------------------------------------------------------------------------


def test_each_pair_of_layers_has_weight_one():
    graph = circuit_graph(("z", "fc1", torch.rand(3, 2) * 1e6), ("fc1", "cells", torch.rand(4, 3)))
    assert graph.layers == {"z": 2, "fc1": 3, "cells": 4} and len(graph.nodes) == 9
    for w in graph.weights.values():
        assert float(w.sum()) == pytest.approx(1)
    A = graph.adjacency()
    assert A.sum() == pytest.approx(2) and not A[np.tril_indices(9)].any()
    assert A[1, 2] == graph.weights["z", "fc1"][0, 1] and A[4, 8] == graph.weights["fc1", "cells"][3, 2]


def test_a_layer_that_two_others_read():
    graph = circuit_graph(("a", "b", torch.ones(2, 2)), ("a", "c", torch.ones(3, 2)), ("b", "c", torch.ones(3, 2)))
    assert graph.layers == {"a": 2, "b": 2, "c": 3} and graph.adjacency().sum() == pytest.approx(3)


def test_huge_and_tiny_weights():
    for scale in (1e-320, 1e300):
        graph = circuit_graph(("a", "b", torch.full((20, 20), scale, dtype=torch.float64)))
        assert torch.allclose(graph.weights["a", "b"], torch.tensor(1 / 400, dtype=torch.float64))


def test_edges_without_a_measure_are_left_out_and_counted():
    w = torch.tensor([[1.0, math.nan], [3.0, 0.0]])
    graph = circuit_graph(("a", "b", w))
    assert graph.weights["a", "b"].tolist() == [[0.25, 0], [0.75, 0]] and graph.unmeasured == 1
    assert graph.to_dataframe().weight.tolist() == [0.25, 0.75]


REFUSALS = {
    "expected at least one pair": (),
    "negative or infinite weights; take kind 'l1'": (("a", "b", [[-1.0]]),),
    "has negative or infinite": (("a", "b", [[math.inf]]),),
    "has no effect at all": (("a", "b", [[0.0, 0.0]]),),
    r"has shape \(2,\), expected \(V, U\)": (("a", "b", [0.0, 1.0]),),
    "layer 'b' has 1 units in one pair and 2 in another": (("a", "b", [[1.0]]), ("b", "c", [[1.0, 1.0]])),
    "is given twice": (("a", "b", [[1.0]]), ("a", "b", [[1.0]])),
    "joins a layer to itself": (("a", "a", [[1.0]]),),
    "expected DirectEdges or .parent, child, weights.": (torch.ones(2, 2),),
    "weights of 'a' -> 'b': expected numbers": (("a", "b", "c"),),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(InputError, match=message):
        circuit_graph(*REFUSALS[message])


# --- modularity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_disconnected_cliques(parts):
    """Q = 1 - 1 / c of c communities of equal weight: 1/2 of two."""
    M = circuit_modularity(circuit_graph(("a", "b", cliques(parts)), ("b", "c", cliques(parts))))
    assert M.q == pytest.approx(1 - 1 / parts)
    assert len(M.partition) == parts and all(len(c) == 9 for c in M.partition)
    assert {unit // 3 for _, unit in M.partition[0]} == {0}
    assert M.excess > 0.1 and M.z > 3 and len(M.null_q) == 50


def test_a_complete_uniform_graph():
    M = circuit_modularity(circuit_graph(("a", "b", torch.ones(6, 5)), ("b", "c", torch.ones(4, 6))))
    assert M.q == pytest.approx(0, abs=1e-12) and M.excess == pytest.approx(0, abs=1e-12) and math.isnan(M.z)


def test_a_single_edge():
    M = circuit_modularity(circuit_graph(("a", "b", [[1.0]])))
    assert M.q == 0 and M.partition == [[("a", 0), ("b", 0)]]


def test_permuted_weights_are_no_circuit():
    """Of a graph that is itself a null, the excess is within what nulls scatter."""
    M = circuit_modularity(random_graph(3, (8, 8)))
    assert abs(M.z) < 3


def test_q_is_newmans_as_networkx_has_it():
    for seed in range(5):
        graph = random_graph(seed)
        labels = np.random.default_rng(seed).integers(0, 3, len(graph.nodes))
        A = symmetrised(graph)
        parts = [set(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        assert newman_q(A, labels) == pytest.approx(nx.community.modularity(nx.from_numpy_array(A), parts))


def test_partitions_are_as_good_as_networkxs():
    for seed in range(4):
        A = symmetrised(random_graph(seed, (10, 14, 8)))
        ours = max(newman_q(A, louvain(A, np.random.default_rng((seed, n)))) for n in range(20))
        G = nx.from_numpy_array(A)
        theirs = max(nx.community.modularity(G, nx.community.louvain_communities(G, seed=n)) for n in range(20))
        assert ours >= theirs * 0.995


def test_the_best_partition_of_small_graphs():
    """Against all partitions of six nodes."""

    def partitions(n):
        if n == 0:
            yield []
            return
        for smaller in partitions(n - 1):
            for c in range(max(smaller, default=-1) + 2):
                yield [*smaller, c]

    for seed in range(5):
        graph = random_graph(seed, (2, 2, 2))
        A = symmetrised(graph)
        best = max(newman_q(A, np.array(labels)) for labels in partitions(6))
        assert circuit_modularity(graph).q == pytest.approx(best)


def test_nulls_keep_the_weights_of_each_pair(monkeypatch):
    from vaecirc_fast.metrics import graph as module

    graph, nulls = random_graph(), []
    original = module._null
    monkeypatch.setattr(module, "_null", lambda *args: nulls.append(original(*args)) or nulls[-1])
    circuit_modularity(graph, partitions=1)
    assert len(nulls) == 50
    for null in nulls:
        assert null.layers == graph.layers
        for pair, w in graph.weights.items():
            assert torch.equal(null.weights[pair].flatten().sort()[0], w.flatten().sort()[0])
    assert not torch.equal(nulls[0].weights["layer 0", "layer 1"], nulls[1].weights["layer 0", "layer 1"])


def one_at_a_time(A, rng):
    """The method as it is written: a node at a time, of one graph."""
    labels, total = np.arange(len(A)), A.sum()
    while True:
        n, degree, community = len(A), A.sum(1), np.arange(len(A))
        degrees, moving = degree.copy(), True
        while moving:
            moving = False
            for i in rng.permutation(n):
                degrees[community[i]] -= degree[i]
                links = np.bincount(community, A[i], minlength=n)
                links[community[i]] -= A[i, i]
                links -= degree[i] / total * degrees
                best = links.argmax()
                if links[best] > links[community[i]] + 1e-12 * total:
                    community[i], moving = best, True
                degrees[community[i]] += degree[i]
        kept, joined = np.unique(community, return_inverse=True)
        labels = joined[labels]
        if len(kept) == n:
            return labels
        member = np.eye(len(kept))[joined]
        A = member.T @ A @ member


def test_many_partitions_at_once_are_those_of_one_graph_at_a_time():
    graphs = np.stack([symmetrised(random_graph(seed, (9, 12, 7))) for seed in range(6)])
    graphs[2, 3] = graphs[2, :, 3] = 0  # a node without edges
    chosen = [g for g in range(6) for _ in range(4)]
    found = louvain_of_many(graphs, chosen, [np.random.default_rng(n) for n in range(24)])
    for n, (g, labels) in enumerate(zip(chosen, found, strict=True)):
        assert np.array_equal(labels, one_at_a_time(graphs[g], np.random.default_rng(n)))


def test_a_seed_decides_everything():
    graph = random_graph()
    a, b, c = (circuit_modularity(graph, partitions=2, seed=seed) for seed in (1, 1, 2))
    assert a.q == b.q and np.array_equal(a.null_q, b.null_q) and np.array_equal(a.communities, b.communities)
    assert not np.array_equal(a.null_q, c.null_q)


def test_tables_and_text():
    M = circuit_modularity(circuit_graph(("a", "b", cliques())))
    table = M.to_dataframe()
    assert list(table.columns) == ["layer", "unit", "community"] and len(table) == 12
    assert set(table[table.community == 0].unit) in ({0, 1, 2}, {3, 4, 5})
    assert str(M).startswith("Q 0.500, +") and "2 communities of 12 nodes" in str(M)


def test_wrong_arguments():
    graph = random_graph()
    for message, options in {
        "nulls: expected a whole number >= 50, got 10": {"nulls": 10},
        "partitions: expected a whole number >= 1, got 0": {"partitions": 0},
        "seed: expected a whole number >= 0, got -1": {"seed": -1},
    }.items():
        with pytest.raises(InputError, match=message):
            circuit_modularity(graph, **options)
    with pytest.raises(InputError, match="graph: expected a CircuitGraph"):
        circuit_modularity(torch.ones(2, 2))


# --- from direct edges -----------------------------------------------------------------------------------------------


def graph_of(module, x, y, kind):
    return circuit_graph(*(direct_edges(module, x, y, str(n), str(n + 2), kind=kind) for n in (0, 2)))


def rescaled(module, scales):
    """The same function with unit u of each hidden ReLU layer multiplied by its scale and divided out behind."""
    other = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        for n, k in zip((0, 2), scales, strict=True):
            other[n].weight *= k[:, None]
            other[n].bias *= k
            other[n + 2].weight /= k
    return other


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["l1", "rms", "mse"]), st.booleans())
def test_rescaling_relu_units_changes_nothing(seed, kind, powers):
    """Powers of two: nothing, to the bit, in modularity too. Any scales: the weights up to rounding."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = (torch.randn(12, 4, generator=g, dtype=torch.float64) for _ in range(2))
    before = graph_of(module, x, y, kind)
    exponents = [torch.randint(-6, 7, (n,), generator=g).double() for n in (5, 6)]
    if not powers:
        exponents = [e + torch.rand(len(e), generator=g, dtype=torch.float64) for e in exponents]
    other = rescaled(module, [2**e for e in exponents])
    after = graph_of(other, x, y, kind)
    assert before.unmeasured == after.unmeasured
    for pair, w in before.weights.items():
        if powers:
            assert torch.equal(after.weights[pair], w)
        # what is small is a difference of pre-activations, which are as large as the largest effect
        assert_close(after.weights[pair], w, w, terms=1000, unit=w.max().expand(w.shape))
    if powers and seed % 4 == 0:
        a, b = (circuit_modularity(graph, partitions=1) for graph in (before, after))
        assert a.q == b.q and np.array_equal(a.null_q, b.null_q)


def test_a_planted_circuit_is_found():
    """Two nets side by side that share nothing: no community has units of both. In a tiny graph permuted weights would
    fall into communities as well."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for layer in (module[0], module[2], module[4]):
            half = layer.out_features // 2, layer.in_features // 2
            layer.weight[: half[0], half[1] :] = 0
            layer.weight[half[0] :, : half[1]] = 0
    graph = graph_of(module, torch.randn(50, 4).double(), torch.randn(50, 4).double(), "l1")
    M = circuit_modularity(graph)
    assert M.excess > 0.05 and M.z > 4
    for community in M.partition:
        sides = {unit * 2 // graph.layers[layer] for layer, unit in community}
        assert len(sides) == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_networkx_and_graphml(tmp_path):
    graph = circuit_graph(("z", "fc", [[0.5, 0.0], [0.25, 0.25]]))
    G = graph.to_networkx()
    assert set(G) == {"z[0]", "z[1]", "fc[0]", "fc[1]"} and G["z[1]"]["fc[1]"]["weight"] == 0.25
    assert not G.has_edge("z[1]", "fc[0]") and G.nodes["fc[1]"] == {"layer": "fc", "unit": 1}
    graph.to_graphml(tmp_path / "g.graphml")
    back = nx.read_graphml(tmp_path / "g.graphml")
    assert back.adj == G.adj and dict(back.nodes(data=True)) == dict(G.nodes(data=True))
    assert [path.name for path in tmp_path.iterdir()] == ["g.graphml"]


def test_json(tmp_path):
    graph = random_graph()
    text = graph.to_json(tmp_path / "g.json")
    assert (tmp_path / "g.json").read_text() == text
    back = CircuitGraph.from_json(text)
    assert back.layers == graph.layers and all(torch.equal(back.weights[p], w) for p, w in graph.weights.items())
    for bad in ("{", "[]", '{"format": "x"}', "{}"):
        with pytest.raises(InputError, match="text: is no circuit graph of to_json"):
            CircuitGraph.from_json(bad)


def test_without_networkx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "networkx", None)
    graph = random_graph()
    for write in (graph.to_networkx, lambda: graph.to_graphml(tmp_path / "g.graphml")):
        with pytest.raises(MissingExtra, match=r"needs networkx: pip install 'vaecirc-fast\[graph\]'"):
            write()
    assert circuit_modularity(graph, partitions=1).q >= 0
    assert importlib.import_module("vaecirc_fast.metrics.graph") and not list(tmp_path.iterdir())


@pytest.mark.deep
def test_two_layers_of_256():
    """No circuit in independent weights, as large as the layers of a decoder."""
    g = torch.Generator().manual_seed(0)
    graph = circuit_graph(("a", "b", torch.rand(256, 256, generator=g) ** 4))
    assert abs(circuit_modularity(graph).z) < 4
