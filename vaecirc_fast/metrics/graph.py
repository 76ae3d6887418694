"""The graph of direct effects between layers, and its circuit modularity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._files import write_text, write_with
from ..errors import InputError, MissingExtra
from .louvain import louvain_of_many, newman_q

if TYPE_CHECKING:
    import networkx
    import pandas

NULLS = 50  # the fewest
PARTITIONS = 20
AT_ONCE = 1 << 17  # numbers of a step of all partitions that are computed together: about a cache's worth
FORMAT = "vaecirc circuit graph 1"


@dataclass(frozen=True)
class CircuitGraph:
    """Units as nodes, direct effects as weighted edges from parents to children.

    layers: number of units by layer name (latents, sites, output groups), in the order they were given in. weights:
    (parent, child) -> (V, U) float64, each of them with sum 1. unmeasured: edges that were NaN and are left out.
    """

    layers: Mapping[str, int]
    weights: Mapping[tuple[str, str], Tensor] = field(repr=False)
    unmeasured: int = 0

    @property
    def nodes(self) -> list[tuple[str, int]]:
        """(layer, number) of every node."""
        return [(layer, u) for layer, size in self.layers.items() for u in range(size)]

    def adjacency(self) -> np.ndarray:
        """(n, n) float64, weight of the edge from row to column."""
        starts = self._starts()
        A = np.zeros((len(self.nodes), len(self.nodes)))
        for (parent, child), w in self.weights.items():
            rows = slice(starts[parent], starts[parent] + w.shape[1])
            A[rows, starts[child] : starts[child] + w.shape[0]] += w.T.numpy()
        return A

    def _starts(self) -> dict[str, int]:
        starts, at = {}, 0
        for layer, size in self.layers.items():
            starts[layer], at = at, at + size
        return starts

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per edge that is not 0: parent_layer, parent, child_layer, child, weight."""
        import pandas

        parts = []
        for (parent, child), w in self.weights.items():
            v, u = w.numpy().nonzero()
            columns = {"parent_layer": parent, "parent": u, "child_layer": child, "child": v, "weight": w.numpy()[v, u]}
            parts.append(pandas.DataFrame(columns))
        return pandas.concat(parts, ignore_index=True)

    def to_networkx(self) -> networkx.DiGraph:
        """A networkx.DiGraph: nodes "layer[number]" with layer and unit, edges with weight; edges of 0 left out.
        MissingExtra without networkx."""
        nx = _networkx("to_networkx")
        G = nx.DiGraph()
        G.add_nodes_from((f"{layer}[{u}]", {"layer": layer, "unit": u}) for layer, u in self.nodes)
        table = self.to_dataframe()
        parents = table.parent_layer + "[" + table.parent.astype(str) + "]"
        children = table.child_layer + "[" + table.child.astype(str) + "]"
        G.add_weighted_edges_from(zip(parents, children, table.weight.tolist(), strict=True))
        return G

    def to_graphml(self, path: str | Path) -> None:
        """Write the graph as GraphML, for Gephi, yEd and Cytoscape. MissingExtra without networkx."""
        nx, G = _networkx("to_graphml"), self.to_networkx()
        write_with(Path(path), lambda temporary: nx.write_graphml_xml(G, temporary))

    def to_json(self, path: str | Path | None = None) -> str:
        """The graph as JSON text, which `from_json` reads; also written to `path` if given."""
        pairs = [{"parent": p, "child": c, "weights": w.tolist()} for (p, c), w in self.weights.items()]
        text = json.dumps(
            {"format": FORMAT, "layers": dict(self.layers), "pairs": pairs, "unmeasured": self.unmeasured}
        )
        if path is not None:
            write_text(Path(path), text)
        return text

    @staticmethod
    def from_json(text: str) -> CircuitGraph:
        """The graph that `to_json` gave. InputError for other text."""
        try:
            given = json.loads(text)
            if given["format"] != FORMAT:
                raise ValueError(f"its format is {given['format']!r}")
            weights = {
                (str(p["parent"]), str(p["child"])): torch.tensor(p["weights"], dtype=torch.float64)
                for p in given["pairs"]
            }
            return CircuitGraph(dict(given["layers"]), weights, int(given["unmeasured"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"text: is no circuit graph of to_json ({type(error).__name__}: {error})") from error


def _networkx(what: str) -> Any:
    try:
        import networkx
    except ImportError as error:
        raise MissingExtra(f"{what} needs networkx: pip install 'vaecirc-fast[graph]'") from error
    return networkx


def circuit_graph(*edges: Any) -> CircuitGraph:
    """The graph of direct effects, of which each pair of layers is normalised to sum 1.

    edges: results of `vf.interventions.direct_edges`, taken in child sd per parent sd, so that rescaling a ReLU unit
    changes nothing; or (parent, child, weights): names of two layers and (V, U) numbers >= 0, the same in sd, for
    latents and output groups. NaN, an edge that no sd could measure, is no edge and counted. InputError for negative
    or infinite weights, layers of two sizes, a pair given twice, and a pair without any effect.
    """
    if not edges:
        raise InputError("edges: expected at least one pair of layers")
    layers: dict[str, int] = {}
    weights: dict[tuple[str, str], Tensor] = {}
    unmeasured = 0
    for given in edges:
        parent, child, w = _triple(given)
        if parent == child or (parent, child) in weights:
            raise InputError(f"edges: {parent!r} -> {child!r} is given twice or joins a layer to itself")
        if w.ndim != 2 or 0 in w.shape:
            raise InputError(f"edges: {parent!r} -> {child!r} has shape {tuple(w.shape)}, expected (V, U)")
        lost = w.isnan()
        w = torch.where(lost, 0, w)
        if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
            raise InputError(
                f"edges: {parent!r} -> {child!r} has negative or infinite weights; take kind 'l1' or 'rms'"
            )
        largest = float(w.max())
        if largest == 0:
            raise InputError(f"edges: {parent!r} -> {child!r} has no effect at all; leave the pair out")
        for layer, size in ((parent, w.shape[1]), (child, w.shape[0])):
            if layers.setdefault(layer, size) != size:
                raise InputError(f"edges: layer {layer!r} has {layers[layer]} units in one pair and {size} in another")
        w = w / largest  # or the sum of tiny or huge weights would not be a number
        weights[parent, child] = w / w.sum()
        unmeasured += int(lost.sum())
    return CircuitGraph(layers, weights, unmeasured)


def _triple(given: Any) -> tuple[str, str, Tensor]:
    if hasattr(given, "in_sd"):
        return given.parent, given.child, torch.as_tensor(given.in_sd(), dtype=torch.float64).cpu()
    if not isinstance(given, tuple) or len(given) != 3 or not all(isinstance(name, str) for name in given[:2]):
        raise InputError(f"edges: expected DirectEdges or (parent, child, weights), got {type(given).__name__}")
    try:
        return given[0], given[1], torch.as_tensor(given[2], dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"edges: weights of {given[0]!r} -> {given[1]!r}: expected numbers (V, U)") from error


@dataclass(frozen=True)
class CircuitModularity:
    """Newman's Q of the best partition found, against the same graph with permuted weights.

    q; null_q: (nulls,) the same for each null; z: (q - mean of null_q) / sd of null_q, NaN where the nulls are all
    alike; communities: (n,) number of each node's community, by size, in the order of `graph.nodes`.
    """

    graph: CircuitGraph = field(repr=False)
    q: float
    null_q: np.ndarray = field(repr=False)
    communities: np.ndarray = field(repr=False)

    @property
    def excess(self) -> float:
        """Q minus its mean over the nulls: what one compares."""
        return self.q - float(self.null_q.mean())

    @property
    def z(self) -> float:
        """The excess in standard deviations of the nulls."""
        sd = float(self.null_q.std(ddof=1))
        return self.excess / sd if sd > 1e-12 else math.nan

    @property
    def partition(self) -> list[list[tuple[str, int]]]:
        """The communities, as lists of (layer, number), the largest first."""
        nodes = self.graph.nodes
        return [
            [nodes[i] for i in np.flatnonzero(self.communities == c)] for c in range(int(self.communities.max()) + 1)
        ]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per node: layer, unit, community."""
        import pandas

        table = pandas.DataFrame(self.graph.nodes, columns=["layer", "unit"])
        return table.assign(community=self.communities)

    def __str__(self) -> str:
        return (
            f"Q {self.q:.3f}, {self.excess:+.3f} above {len(self.null_q)} nulls (z {self.z:.1f}), "
            f"{len(self.partition)} communities of {len(self.communities)} nodes"
        )


def circuit_modularity(
    graph: CircuitGraph, nulls: int = NULLS, seed: int = 0, partitions: int = PARTITIONS
) -> CircuitModularity:
    """Circuit modularity of a graph of direct effects (M. Newman, PNAS 103, 2006; see docs/definitions.md).

    Newman's Q of the symmetrised graph, of the best of `partitions` partitions by the Louvain method (V. Blondel et
    al., 2008) from as many seeded orders, or of one community, whose Q is 0; and the same for `nulls` graphs whose
    weights are permuted within each pair of layers. Compare `excess`, at equal numbers of nodes.
    Deterministic for a seed. InputError for fewer than 50 nulls.
    """
    if not isinstance(graph, CircuitGraph):
        raise InputError(f"graph: expected a CircuitGraph, as circuit_graph makes, got {type(graph).__name__}")
    for name, value, least in (("nulls", nulls, NULLS), ("partitions", partitions, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected a whole number >= {least}, got {value!r}")
    graphs = [graph, *(_null(graph, np.random.default_rng((seed, n))) for n in range(1, nulls + 1))]
    width = max(1, AT_ONCE // (partitions * len(graph.nodes)))
    best: list[tuple[float, np.ndarray]] = []
    for first in range(0, len(graphs), width):
        best += _best(graphs[first : first + width], partitions, seed, first)
    (q, labels), *others = best
    return CircuitModularity(graph, q, np.array([null_q for null_q, _ in others]), _by_size(labels))


def _null(graph: CircuitGraph, rng: np.random.Generator) -> CircuitGraph:
    """The graph with its weights permuted within each pair of layers."""
    permuted = {
        pair: torch.from_numpy(rng.permutation(w.numpy().ravel()).reshape(w.shape)) for pair, w in graph.weights.items()
    }
    return CircuitGraph(graph.layers, permuted)


def _best(graphs: Sequence[CircuitGraph], partitions: int, seed: int, first: int) -> list[tuple[float, np.ndarray]]:
    """Of each graph, Q and labels of the best of its partitions or of one community; `first`: number of the first."""
    A = np.stack([graph.adjacency() for graph in graphs])
    A = A + A.transpose(0, 2, 1)
    numbers = [(g, n) for g in range(len(graphs)) for n in range(partitions)]
    rngs = [np.random.default_rng((seed, first + g, n)) for g, n in numbers]
    best = [(0.0, np.zeros(A.shape[1], dtype=np.int64)) for _ in graphs]
    for (g, _), found in zip(numbers, louvain_of_many(A, [g for g, _ in numbers], rngs), strict=True):
        q = newman_q(A[g], found)
        if q > best[g][0] + 1e-12:
            best[g] = q, found
    return best


def _by_size(labels: np.ndarray) -> np.ndarray:
    """The same communities, the largest numbered 0; of equal ones that of the first node."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse]
