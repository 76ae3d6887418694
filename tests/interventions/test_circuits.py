"""Circuits and motifs as tables, graphs and files: networkx reads them back, damaged files are named."""

import dataclasses
import importlib
import json
import math
import sys

import networkx as nx
import pytest
import torch
from torch import nn

from vaecirc_fast.errors import InputError, MissingExtra
from vaecirc_fast.interventions import Circuit, discover
from vaecirc_fast.interventions.circuits import Edge
from vaecirc_fast.metrics.statistics import Estimate


def found(n=9, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, other = torch.randn(2, n, 3, dtype=torch.float64)
    return discover(net, x, other, sites=["0", "2"], faithfulness=0.97, **options)


def test_tables():
    C = found()
    table = C.to_dataframe()
    assert list(table.columns) == ["site", "unit", "gain", "loss", "low", "high"] and len(table) == len(C)
    assert table.gain.sum() == pytest.approx(C.faithfulness.value)
    assert ((table.low <= table.loss) & (table.loss <= table.high)).all()
    edges = C.edge_table()
    assert list(edges.columns) == ["parent", "child", "effect", "low", "high", "share"]
    names = list(zip(edges.parent, edges.child, strict=True))
    assert set(names) >= {(f"{site}[{unit}]", "output") for site, unit in C.nodes}
    text = str(C)
    assert "7 units, for output" in text and "goal 0.97 reached in the search" in text and C.plan in text


def test_graphml_opens_in_networkx(tmp_path):
    C = found()
    G = C.to_networkx()
    C.save(tmp_path / "c.graphml")
    read = nx.read_graphml(tmp_path / "c.graphml")
    assert dict(read.nodes(data=True)) == dict(G.nodes(data=True)) and set(read.edges) == set(G.edges)
    assert set(G) == {f"{site}[{unit}]" for site, unit in C.nodes} | {"output"}
    for a, b in G.edges:
        assert read.edges[a, b] == pytest.approx(G.edges[a, b])
    first = G.nodes[f"{C.sites[0]}[{C.units[0]}]"]
    assert first == {"site": C.sites[0], "unit": C.units[0], "order": 0, "gain": C.gains[0], "loss": C.losses[0].value}
    assert read.graph["faithfulness"] == pytest.approx(C.faithfulness.value) and read.graph["reached"] is True
    assert all(data["weight"] > 0 and data["low"] <= data["weight"] for _, _, data in G.edges(data=True))
    weights = {(f"{e.parent[0]}[{e.parent[1]}]", "output"): e.effect.value for e in C.edges if e.child is None}
    assert all(G.edges[edge]["weight"] == value for edge, value in weights.items() if value)


@pytest.mark.parametrize("n", [9, 1])
def test_json_comes_back(tmp_path, n):
    """One pair bounds nothing: intervals are infinite, in JSON by name."""
    C = found(n)
    assert math.isinf(C.faithfulness.high) == (n == 1)
    text = C.to_json(tmp_path / "a.json")
    assert Circuit.from_json(text) == C and Circuit.from_json((tmp_path / "a.json").read_text()) == C
    C.save(tmp_path / "b.json")
    assert Circuit.load(tmp_path / "b.json") == C
    json.loads(text, parse_constant=pytest.fail)


def test_shares_that_are_none_and_empty_circuits(tmp_path):
    C = found()
    edge = Edge(("0", 0), ("2", 0), Estimate(0.5, 0.4, 0.6), math.nan)
    one = dataclasses.replace(C, edges=(edge,))
    again = Circuit.from_json(one.to_json())
    assert math.isnan(again.edges[0].share) and again.edges[0].child == ("2", 0)
    one.save(tmp_path / "c.graphml")
    assert nx.read_graphml(tmp_path / "c.graphml").edges["0[0]", "2[0]"] == {"weight": 0.5, "low": 0.4, "high": 0.6}
    none = dataclasses.replace(C, sites=(), units=(), gains=(), losses=(), minimality=None, edges=())
    assert Circuit.from_json(none.to_json()) == none and list(none.to_networkx()) == ["output"]
    assert "no units" in str(none) and none.edge_table().empty


def test_files_that_are_no_circuits(tmp_path):
    C = found()
    text = C.to_json()
    with pytest.raises(InputError, match=r"expected a name that ends in .json or .graphml"):
        C.save(tmp_path / "c.pdf")
    for damaged in (text[:-20], "[]", "{}", '{"format": "another"}', text.replace('"gains"', '"g"')):
        with pytest.raises(InputError, match="text: is no circuit of to_json"):
            Circuit.from_json(damaged)
        (tmp_path / "c.json").write_text(damaged)
        with pytest.raises(InputError, match="no circuit|not valid JSON"):
            Circuit.load(tmp_path / "c.json")
    with pytest.raises(InputError, match="cannot read"):
        Circuit.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        C.to_json(tmp_path / "file" / "c.json")


def test_without_networkx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "networkx", None)
    importlib.invalidate_caches()
    C = found()
    for call in (C.to_networkx, lambda: C.to_graphml(tmp_path / "c.graphml")):
        with pytest.raises(MissingExtra, match=r"pip install 'vaecirc-fast\[graph\]'"):
            call()
    assert not list(tmp_path.iterdir())
