"""Louvain partitions of many dense graphs at once, and Newman's Q of a partition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def newman_q(A: np.ndarray, labels: np.ndarray) -> float:
    """Newman's Q of a partition of a symmetric graph: sum over communities of L_c / L - (d_c / 2 L)^2."""
    total = A.sum()
    if total == 0:
        return 0.0
    degrees = np.bincount(labels, A.sum(1))
    inside = A[labels[:, None] == labels].sum()
    return float(inside / total - (degrees / total) @ (degrees / total))


def louvain(A: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) communities of a symmetric graph by the Louvain method, nodes in random order; A: (n, n) >= 0."""
    return louvain_of_many(A[None], [0], [rng])[0]


def louvain_of_many(graphs: np.ndarray, chosen: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[np.ndarray]:
    """(n,) communities of the b-th partition, of graphs[chosen[b]] with its nodes in the random order of rngs[b].

    graphs: (G, n, n) >= 0, symmetric. On matrices and not on dictionaries, as these graphs are dense; many at once, as
    one moves a node at a time and the numbers of one node are too few for numpy. Each partition is what it would be
    alone.
    """
    labels = [np.arange(graphs.shape[1]) for _ in chosen]
    totals = graphs.sum((1, 2))[np.asarray(chosen)]
    left = np.arange(len(labels))  # partitions that still change
    level, index = graphs, np.asarray(chosen)
    while len(left):
        sizes = np.array([labels[b].max() + 1 for b in left.tolist()])
        moved = _moved(level, index, sizes, totals[left], [rngs[b] for b in left.tolist()])
        smaller, going = [], []
        for k, b in enumerate(left.tolist()):
            kept, joined = np.unique(moved[k, : sizes[k]], return_inverse=True)
            labels[b] = joined[labels[b]]
            if len(kept) < sizes[k]:
                member = np.zeros((sizes[k], len(kept)))
                member[np.arange(sizes[k]), joined] = 1
                A = level[index[k], : sizes[k], : sizes[k]]
                smaller.append(member.T @ A @ member)
                going.append(b)
        left = np.array(going, dtype=np.int64)
        most = max(map(len, smaller), default=0)
        level, index = np.zeros((len(smaller), most, most)), np.arange(len(smaller))
        for k, A in enumerate(smaller):
            level[k, : len(A), : len(A)] = A
    return labels


def _moved(
    graphs: np.ndarray,
    index: np.ndarray,
    sizes: np.ndarray,
    totals: np.ndarray,
    rngs: Sequence[np.random.Generator],
) -> np.ndarray:
    """Each node in turn joins the community that gains Q most, until none does: (B, n), of the b-th the first sizes[b]
    nodes of graphs[index[b]]."""
    count, n = len(index), graphs.shape[1]
    degree = graphs.sum(2)[index]
    own = np.diagonal(graphs, axis1=1, axis2=2)[index]
    community = np.tile(np.arange(n), (count, 1))
    degrees, share = degree.copy(), degree / totals[:, None]
    active = np.argsort(-sizes, kind="stable")  # the large ones first: those with a t-th node are the first few
    while len(active):
        order = np.full((len(active), n), -1)
        for row, b in enumerate(active.tolist()):
            order[row, : sizes[b]] = rngs[b].permutation(sizes[b])
        changed = np.zeros(len(active), dtype=bool)
        of_all = index[active]
        for t in range(sizes[active[0]]):
            some = active[: np.searchsorted(-sizes[active], -t, side="left")]
            i = order[: len(some), t]
            before = community[some, i]
            d = degree[some, i]
            degrees[some, before] -= d
            at = community[some] + n * np.arange(len(some))[:, None]
            weights = graphs[of_all[: len(some)], i]
            links = np.bincount(at.ravel(), weights.ravel(), minlength=n * len(some)).reshape(len(some), n)
            rows = np.arange(len(some))
            links[rows, before] -= own[some, i]
            links -= share[some, i][:, None] * degrees[some]
            after = links.argmax(1)
            better = links[rows, after] > links[rows, before] + 1e-12 * totals[some]
            after = np.where(better, after, before)
            community[some, i] = after
            changed[: len(some)] |= better
            degrees[some, after] += d
        active = active[changed]
    return community
