"""Drawing of layered graphs: nodes in columns, edges from left to right. Plain nodes and edges in, SVG out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import escape

from .charts import COLOURS
from .svg import picture, tag, text

WIDTH = 440.0
GREY = "#9a9a9a"
COLOURED = COLOURS[:6]  # of the largest communities; the others are grey
SWEEPS = 6  # of ordering the nodes of each column by their neighbours


@dataclass(frozen=True)
class Node:
    """A node in the `column`-th column. name: said when pointed at. label: printed beside nodes of the first column.
    community: which colour, None for none. faint: hollow. place: (row, column, rows, columns) of a part of an image,
    drawn as a pictogram in place of a dot."""

    column: int
    name: str
    label: str = ""
    community: int | None = None
    faint: bool = False
    place: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Edge:
    """From nodes[start] to nodes[end], `weight` > 0."""

    start: int
    end: int
    weight: float


def strongest(weights: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(parent, child, weight) of the `count` largest of weights (V, U) that are above 0, the largest first."""
    order = np.argsort(-weights, axis=None, kind="stable")[:count]
    found = zip(*np.unravel_index(order, weights.shape), strict=True)
    return [(int(u), int(v), float(weights[v, u])) for v, u in found if weights[v, u] > 0]


def layered(
    columns: Sequence[str], nodes: Sequence[Node], edges: Sequence[Edge], what: str, remarks: Sequence[str] = ()
) -> str:
    """The graph with a head over each column and `remarks`, lines below. Heavier edges are wider and darker.

    An edge has the colour of the community that both of its ends are in, else it is grey. Nodes are ordered by
    community, within it by their neighbours, so that fewer edges cross.
    """
    labels = any(node.label for node in nodes)
    left, right, head = (34.0 if labels else 12.0), WIDTH - 14.0, 22.0
    x = np.linspace(left, right, max(2, len(columns)))
    tallest = max(np.bincount([node.column for node in nodes], minlength=len(columns)))
    height = 15.5 * max(tallest, 10)
    y = head + height * _heights(len(columns), nodes, edges)
    parts = [
        text(x[c], 11, name, "end" if c == len(columns) - 1 else "start" if c == 0 else "middle", "tick")
        for c, name in enumerate(columns)
    ]
    parts[-1] = text(WIDTH, 11, columns[-1], "end", "tick")
    parts[0] = text(0, 11, columns[0], "start", "tick")
    largest = max((edge.weight for edge in edges), default=1.0)
    ordered = sorted(edges, key=lambda e: (_colour(nodes, e) != GREY, e.weight))
    drawn = [_curve(edge, nodes, x, y, (edge.weight / largest) ** 0.5) for edge in ordered]
    parts.append(tag("g", "".join(drawn), cls="edges") if drawn else "")
    dots = [_dot(node, float(x[node.column]), float(at)) for node, at in zip(nodes, y, strict=True)]
    parts.append(tag("g", "".join(dots), cls="nodes", stroke="#fff"))
    for n, words in enumerate(remarks):
        parts.append(text(0, head + height + 16 + 14 * n, words, cls="tick"))
    return picture("".join(parts), WIDTH, head + height + 10 + 14 * len(remarks), what)


def _heights(columns: int, nodes: Sequence[Node], edges: Sequence[Edge]) -> np.ndarray:
    """0 to 1 for each node: the nodes of a column evenly, ordered by community and then by what they are joined to."""
    count = len(nodes)
    joined = np.zeros((count, count))
    for edge in edges:
        joined[edge.start, edge.end] += edge.weight
        joined[edge.end, edge.start] += edge.weight
    community = np.array([count if node.community is None else node.community for node in nodes])
    members = [np.array([n for n, node in enumerate(nodes) if node.column == c], dtype=int) for c in range(columns)]
    y = np.zeros(count)

    def spread(order: np.ndarray) -> None:
        y[order] = (np.arange(len(order)) + 0.5) / max(len(order), 1)

    for at in members:
        spread(at[np.lexsort((at, community[at]))])
    weight = joined.sum(1)
    for sweep in range(SWEEPS):
        for at in members if sweep % 2 == 0 else members[::-1]:
            pull = np.where(weight[at] > 0, joined[at] @ y / np.where(weight[at] > 0, weight[at], 1), y[at])
            spread(at[np.lexsort((at, pull, community[at]))])
    return y


def _colour(nodes: Sequence[Node], edge: Edge) -> str:
    a, b = nodes[edge.start].community, nodes[edge.end].community
    return _of(a) if a == b else GREY


def _of(community: int | None) -> str:
    return COLOURED[community] if community is not None and community < len(COLOURED) else GREY


def _curve(edge: Edge, nodes: Sequence[Node], x: np.ndarray, y: np.ndarray, strength: float) -> str:
    a, b = nodes[edge.start], nodes[edge.end]
    x1, y1, x2, y2 = x[a.column], y[edge.start], x[b.column], y[edge.end]
    bend = 0.45 * (x2 - x1)
    d = f"M{x1:.0f} {y1:.0f}C{x1 + bend:.0f} {y1:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
    colour = _colour(nodes, edge)
    return tag("path", d=d, stroke=colour, stroke_width=0.5 + 2.7 * strength, opacity=0.3 + 0.55 * strength)


def _dot(node: Node, x: float, y: float) -> str:
    colour = _of(node.community)
    name = tag("title", str(escape(node.name))) if node.name else ""
    label = text(x - 9, y + 3.6, node.label, "end", "tick faint" if node.faint else "tick") if node.label else ""
    if node.place is None:
        look = {"fill": "#fff", "stroke": colour} if node.faint else {"fill": colour}
        return tag("circle", name, cx=x, cy=y, r=4.4, **look) + label
    row, column, rows, columns = node.place
    side = 12.0
    left, top = x - side / 2, y - side / 2
    frame = tag("rect", x=left, y=top, width=side, height=side, fill="#fff", stroke=colour)
    box = {"x": left + side * column / columns, "y": top + side * row / rows}
    part = tag("rect", name, width=side / columns, height=side / rows, fill=colour, **box)
    return frame + part + label
