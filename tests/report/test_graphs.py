"""Drawings of layered graphs."""

import xml.etree.ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vaecirc_fast.report import graphs, pictures
from vaecirc_fast.report.graphs import Edge, Node

SVG = "{http://www.w3.org/2000/svg}"


def drawn(columns, nodes, edges, remarks=()):
    root = xml.etree.ElementTree.fromstring(graphs.layered(columns, nodes, edges, "what <it> is", remarks))
    for element in root.iter():
        assert not any("nan" in str(value) or "inf" in str(value) for value in element.attrib.values())
    return root


def test_a_graph_is_drawn_with_all_its_parts():
    nodes = [
        Node(0, "z<1>", "z1", 0),
        Node(0, "z2", "z2", None, faint=True),
        Node(1, "unit 0", community=0),
        Node(1, "unit 1", community=9),
        Node(2, "cell", community=0, place=(1, 0, 2, 2)),
    ]
    edges = [Edge(0, 2, 0.5), Edge(1, 3, 0.25), Edge(2, 4, 1.0), Edge(0, 3, 0.1)]
    root = drawn(["latents", "fc1 & more", "cells"], nodes, edges, ["a remark <b>"])
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"latents", "fc1 & more", "cells", "z1", "z2", "a remark <b>"} <= set(words)
    paths = list(root.iter(f"{SVG}path"))
    assert len(paths) == 4 and len(list(root.iter(f"{SVG}circle"))) == 4
    widths = [float(path.get("stroke-width")) for path in paths]
    first = graphs.COLOURED[0]
    assert sorted(path.get("stroke") for path in paths) == sorted([graphs.GREY, graphs.GREY, first, first])
    assert max(widths) == widths[-1] and paths[-1].get("stroke") == first  # the heaviest on top
    hollow = [circle for circle in root.iter(f"{SVG}circle") if circle.get("fill") == "#fff"]
    assert [circle[0].text for circle in hollow] == ["z2"]
    box, part = list(root.iter(f"{SVG}rect"))
    assert float(part.get("width")) == float(box.get("width")) / 2
    assert float(part.get("y")) > float(box.get("y")) and float(part.get("x")) == float(box.get("x"))


def test_nodes_of_a_community_stand_together_in_order_of_their_neighbours():
    """Crossed edges are uncrossed; communities are not torn."""
    nodes = [Node(0, f"a{n}", community=n % 2) for n in range(6)] + [
        Node(1, f"b{n}", community=n % 2) for n in range(6)
    ]
    edges = [Edge(n, 6 + (n + 2) % 6, 1.0) for n in range(6)]
    y = graphs._heights(2, nodes, edges)
    for column in (range(6), range(6, 12)):
        order = sorted(column, key=lambda n: y[n])
        assert [nodes[n].community for n in order] == [0, 0, 0, 1, 1, 1]
    crossings = sum(
        (y[a.start] - y[b.start]) * (y[a.end] - y[b.end]) < 0 for n, a in enumerate(edges) for b in edges[:n]
    )
    assert crossings == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 2**16))
def test_any_graph_is_drawn_within_its_frame(columns, count, seed):
    rng = np.random.default_rng(seed)
    nodes = [Node(c, f"n{n}", community=int(rng.integers(0, 9))) for n, c in enumerate(columns)]
    edges = [Edge(*map(int, rng.integers(0, len(nodes), 2)), float(rng.random()) + 1e-9) for _ in range(count)]
    root = drawn(["a", "b", "c", "d"], nodes, edges)
    width, height = map(float, root.get("viewBox").split()[2:])
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == len(nodes)
    places = {(circle.get("cx"), circle.get("cy")) for circle in circles}
    assert len(places) == len(nodes)  # none on top of another
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in places)


def test_the_strongest_edges():
    weights = np.array([[0.5, 0.0, 0.2], [0.1, 0.0, 0.4]])
    assert graphs.strongest(weights, 3) == [(0, 0, 0.5), (2, 1, 0.4), (2, 0, 0.2)]
    assert len(graphs.strongest(weights, 10)) == 4  # no edge of 0


def test_strips_are_xml_and_escape_words():
    values = np.array([[0.5, np.nan, 0.0], [1.0, 2.0, 0.25]])
    strips = [pictures.Strip("a <site>", values, "3 units"), pictures.Strip("b", values[:, :1])]
    root = xml.etree.ElementTree.fromstring(pictures.strips(strips, ["x & y", "z"], 1.0, "w"))
    assert len(list(root.iter(f"{SVG}image"))) == 2
    assert [element.text for element in root.iter(f"{SVG}text")].count("x & y") == 2
