"""How well a causal graph was recovered: structural Hamming distance and edge AUROC, with a permutation null."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .statistics import Estimate, resampled_interval
from .statistics.estimate import as_array, check_level, check_whole

EXACT = 10_000  # relabellings up to which all are gone through


@dataclass(frozen=True)
class GraphRecovery:
    """A recovered graph against the true one.

    shd, in edges, and auroc: estimates, with the interval of what was resampled. `found` (K, K) bool; precision and
    recall of its edges, NaN where there are none to divide by. null_shd, null_auroc: mean over relabellings of the true
    graph's nodes, with their central interval; shd_p, auroc_p: the share of relabellings at least as good. auroc, its
    null and its p are NaN where the true graph has no edge, or every one. nulls: how many relabellings; exact: whether
    all.
    """

    shd: Estimate
    auroc: Estimate
    found: np.ndarray = field(repr=False)
    precision: float
    recall: float
    null_shd: Estimate
    null_auroc: Estimate
    shd_p: float
    auroc_p: float
    nulls: int
    exact: bool


def reachable(graph: Any) -> np.ndarray:
    """(K, K) bool: whether column is an effect of row, direct or by way of others. InputError for a graph with a cycle,
    which no causal model has."""
    graph = adjacency("graph", graph)
    closure = graph.copy()
    for _ in range(len(graph)):
        closure |= closure.astype(int) @ graph.astype(int) > 0
    if closure.diagonal().any():
        raise InputError("graph: expected no cycle, got one")
    return closure


def structural_hamming_distance(found: Any, truth: Any) -> int:
    """Pairs of nodes between which `found` (K, K) bool and `truth` have other edges: missing, superfluous or reversed,
    one each.

    Source: Tsamardinos, Brown & Aliferis 2006. InputError for other shapes or an edge from a node to itself.
    """
    found, truth = adjacency("found", found), adjacency("truth", truth)
    if found.shape != truth.shape:
        raise InputError(f"found: expected the shape of truth, {truth.shape}, got {found.shape}")
    return int(_distances(found[None], truth)[0])


def edge_auroc(weights: Any, truth: Any) -> float:
    """Probability that a true edge weighs more than an ordered pair of nodes without one; ties count half.

    weights: (K, K) >= 0, the strength of each edge from row to column, its diagonal ignored. NaN where `truth` has no
    edge, or every one. InputError for other shapes, NaN or negative weights.
    """
    truth = adjacency("truth", truth)
    return float(_aurocs(_weights(weights, truth)[None], truth)[0])


def graph_recovery(
    weights: Any,
    truth: Any,
    threshold: float,
    replicates: Any = None,
    *,
    n: int = 0,
    resampled: str = "samples",
    nulls: int = 9999,
    seed: int = 0,
    level: float = 0.95,
) -> GraphRecovery:
    """Score edge weights (K, K) >= 0 against the true graph (K, K) bool; an edge is found where its weight exceeds
    `threshold`.

    replicates: (R, K, K), weights under `resampling_weights` of `n` samples, for the intervals; without them they are
    NaN. Null: the nodes of the true graph relabelled, all K! where at most 10,000, else `nulls` of them drawn with
    `seed`; p = the share at least as good, which counts the true labels once.
    InputError for wrong shapes, NaN, negative weights, a threshold that is no number >= 0, or one node.
    """
    check_level(level)
    check_whole("nulls", nulls, low=1)
    check_whole("seed", seed, low=0)
    truth = adjacency("truth", truth)
    weights = _weights(weights, truth)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise InputError(f"threshold: expected a number >= 0, got {threshold!r}")
    off = ~np.eye(len(truth), dtype=bool)
    found = (weights > threshold) & off
    shd, auroc = float(_distances(found[None], truth)[0]), float(_aurocs(weights[None], truth)[0])
    bounds = [(math.nan, math.nan)] * 2
    if replicates is not None:
        drawn = as_array(replicates)
        if (
            drawn.ndim != 3
            or drawn.shape[1:] != truth.shape
            or not drawn[:, off].size
            or not (drawn[:, off] >= 0).all()
        ):
            raise InputError(f"replicates: expected (R, K, K) numbers >= 0 with K = {len(truth)}, got {drawn.shape}")
        scores = (_distances((drawn > threshold) & off, truth), _aurocs(drawn, truth))
        bounds = [resampled_interval(v, s, n, level) for v, s in zip((shd, auroc), scores, strict=True)]
    orders, exact = _relabellings(len(truth), nulls, seed)
    rows, columns = orders[:, :, None], orders[:, None, :]  # what is found is relabelled, which is the same
    null_shd, null_auroc = _distances(found[rows, columns], truth), _aurocs(weights[rows, columns], truth)
    hits, edges = int((found & truth).sum()), int(found.sum())
    return GraphRecovery(
        Estimate(shd, *bounds[0], level, "edges", resampled, n),
        Estimate(auroc, *bounds[1], level, "", resampled, n),
        found,
        precision=hits / edges if edges else math.nan,
        recall=hits / int(truth.sum()) if truth.any() else math.nan,
        null_shd=_spread(null_shd, level, "edges"),
        null_auroc=_spread(null_auroc, level, ""),
        shd_p=_share(null_shd <= shd, exact),
        auroc_p=_share(null_auroc >= auroc - 1e-12, exact) if math.isfinite(auroc) else math.nan,
        nulls=len(orders),
        exact=exact,
    )


def adjacency(name: str, graph: Any) -> np.ndarray:
    """`graph` as bool (K, K) with K >= 2 and nothing on its diagonal; InputError otherwise."""
    array = np.asarray(graph)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < 2 or array.dtype != bool:
        raise InputError(f"{name}: expected bool (K, K) with K >= 2, got {array.dtype} {array.shape}")
    if array.diagonal().any():
        raise InputError(f"{name}: expected no edge from a node to itself")
    return array


def _weights(weights: Any, truth: np.ndarray) -> np.ndarray:
    weights = as_array(weights)
    if weights.shape != truth.shape:
        raise InputError(f"weights: expected the shape of truth, {truth.shape}, got {weights.shape}")
    if not (weights[~np.eye(len(truth), dtype=bool)] >= 0).all():  # NaN is not
        raise InputError("weights: expected numbers >= 0, got NaN or less")
    return weights


def _distances(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(R, K, K) bool against (K, K) -> (R,)."""
    other = found != truth
    return np.triu(other | other.transpose(0, 2, 1), 1).sum((1, 2)).astype(float)


def _aurocs(weights: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(R, K, K) against (K, K) -> (R,), by ranks."""
    from scipy import stats

    off = ~np.eye(len(truth), dtype=bool)
    edges = truth[off]
    true, false = int(edges.sum()), int((~edges).sum())
    if not true or not false:
        return np.full(len(weights), np.nan)
    ranks = stats.rankdata(weights[:, off], axis=1)
    return (ranks[:, edges].sum(1) - true * (true + 1) / 2) / (true * false)


def _relabellings(k: int, nulls: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of k nodes (R, k), and whether they are all there are."""
    if math.factorial(k) <= EXACT:
        return np.array(list(itertools.permutations(range(k)))), True
    return np.random.default_rng(seed).permuted(np.tile(np.arange(k), (nulls, 1)), axis=1), False


def _share(at_least: np.ndarray, exact: bool) -> float:
    count = int(at_least.sum())
    return count / len(at_least) if exact else (count + 1) / (len(at_least) + 1)


def _spread(values: np.ndarray, level: float, unit: str) -> Estimate:
    if not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, math.nan, level, unit, "relabellings", len(values))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), level, unit, "relabellings", len(values))
