"""Figures that relate runs to each other, and recovered causal graphs."""

import math
import xml.etree.ElementTree

import numpy as np
import pytest
from printed import assert_printed

from vaecirc_fast.report import aggregate, causal, charts, relations, results
from vaecirc_fast.report.charts import Mark

SVG = "{http://www.w3.org/2000/svg}"


def read(directory):
    return aggregate.groups(results.read(directory).runs)


def drawn(words):
    root = xml.etree.ElementTree.fromstring(words)
    for element in root.iter():
        assert not any("nan" in str(value) or "inf" in str(value) for value in element.attrib.values())
    return root


def marks(root):
    """The marks of a drawing by the name that is said when one points at them."""
    return {e.find(f"{SVG}title").text: e for e in root.iter() if e.get("class") == "point" and len(e)}


def test_points_lie_where_their_numbers_say():
    given = [Mark(0.2 * n, 3.0 - n, "#0072B2", n, hollow=n == 2, name=f"run <{n}>") for n in range(4)]
    root = drawn(charts.points(given, "x & y", "unit", "what", ["r = −0.4", "over runs"]))
    found = marks(root)
    assert set(found) == {f"run <{n}>" for n in range(4)}
    assert found["run <2>"].get("fill") == "#fff" and found["run <1>"].get("fill") == "#0072B2"
    assert {"r = −0.4", "over runs", "x & y"} <= {e.text for e in root.iter(f"{SVG}text")}
    circle = found["run <0>"]
    rest = charts.points([Mark(0.0, 0.0, "#000", name="origin"), Mark(1.0, 2.0, "#000", name="end")], "x", "y", "w")
    ends = marks(drawn(rest))
    assert float(ends["origin"].get("cy")) > float(ends["end"].get("cy"))
    assert float(ends["origin"].get("cx")) < float(ends["end"].get("cx"))
    assert circle.tag == f"{SVG}circle"


@pytest.mark.parametrize("shape", range(charts.SHAPES))
def test_every_shape_is_about_as_large_and_centred(shape):
    root = drawn(charts.marks_key([(Mark(0, 0, "#000", shape), "words")]))
    (mark,) = (e for e in root.iter() if e.get("class") == "point")
    if shape == 0:
        return
    corners = np.array([[float(v) for v in pair.split()] for pair in mark.get("d")[1:-1].split("L")])
    assert np.abs(corners - [10.0, 16.0]).max() < 6.5 and len(np.unique(corners, axis=0)) == len(corners)
    x, y = corners.T
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    assert 0.5 < area / (math.pi * 4.6**2) < 1.3


def test_ladders_reach_their_intervals_and_are_logarithmic_where_asked():
    row = [Mark(float(x), 1.0 / x, "#000", low=0.8 / x, high=1.2 / x, name=str(x)) for x in (1, 4, 16)]
    root = drawn(charts.ladders([row], "β", "unit", "w", log=True))
    at = [float(marks(root)[name].get("cx")) for name in ("1", "4", "16")]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.11)
    assert {"1", "4", "16"} <= {e.text for e in root.iter(f"{SVG}text")}
    whisker = next(e for e in root.iter(f"{SVG}line") if e.get("class") == "sample")
    assert float(whisker.get("y1")) > float(marks(root)["1"].get("cy")) > float(whisker.get("y2"))


def test_effect_against_disentanglement_has_a_point_a_run_and_one_before_training(many):
    groups = read(many)
    figure = relations.effect_against_disentanglement(groups, relations.styles(groups), {"NORB-like": ["r = 1"]})
    assert [panel.title for panel in figure.panels] == ["NORB-like", "Faces-like", "Key"]
    found = marks(drawn(figure.panels[1].drawing))
    assert len(found) == 8 and sum(name.endswith("before training") for name in found) == 4
    assert [name for name, mark in found.items() if mark.get("fill") == "#fff"] == ["FactorVAE (γ = 10), seed 0"]
    assert {m.get("fill") for n, m in found.items() if n.endswith("before training")} == {relations.GREY}
    # the dots stand in the order of the numbers that the runs have
    order = sorted((n for n in found if "before" not in n), key=lambda n: centre(found[n]))
    runs = {f"{group.label}, seed 0": group.runs[0].result for group in groups if group.data == "Faces-like"}
    values = [runs[name]["disentanglement"]["trained"]["dci_disentanglement"]["value"] for name in order]
    assert values == sorted(values)
    assert "r = 1" in figure.panels[0].drawing and "r = 1" not in figure.panels[1].drawing


def centre(mark):
    if mark.get("cx"):
        return float(mark.get("cx"))
    return np.mean([float(pair.split()[0]) for pair in mark.get("d")[1:-1].split("L")])


def test_one_factor_has_nothing_to_relate(untrained_study):
    groups = read(untrained_study)
    assert relations.effect_against_disentanglement(groups, relations.styles(groups), {}) is None


def test_capacity_and_strength_are_shown_only_where_runs_differ_in_them(many, add_run):
    groups = read(many)
    looks = relations.styles(groups)
    assert relations.capacity(groups, looks) is None and relations.strength(groups, looks) is None
    source = next(many.glob("runs/norb_like-beta_vae-*"))
    for latents in (4, 16):
        add_run(many, source, "norb_like-beta_vae-s0", latents=latents)
    for beta in (1.0, 16.0):
        add_run(many, source, "norb_like-beta_vae-s0", options={"beta": beta})
    groups = read(many)
    capacity, strength = relations.capacity(groups, looks), relations.strength(groups, looks)
    assert {p.title for p in capacity.panels} == {
        "NORB-like: CES, posterior",
        "NORB-like: DCI disentanglement",
        "NORB-like: MIG",
        "Key",
    }
    assert {e.text for e in drawn(capacity.panels[0].drawing).iter(f"{SVG}text")} >= {"4", "10", "16", "latents L"}
    assert {e.text for e in drawn(strength.panels[0].drawing).iter(f"{SVG}text")} >= {"1", "4", "16", "β"}
    assert len(marks(drawn(strength.panels[0].drawing))) == 3


FACTORS = ["cause", "middle", "effect"]
TRUTH = [[False, True, False], [False, False, True], [False, False, False]]


def recovered(value, level="latents"):
    """What a run of causal data holds, as the study writes it."""

    def effects(size):
        effect = (np.array(TRUTH) * size + 0.05).tolist()
        null = {"value": 2.4, "low": 1.0, "high": 4.0}
        return {
            "effect": effect,
            "low": effect,
            "high": effect,
            "found": (np.array(TRUTH) & (size > 0.2)).tolist(),
            "shd": {"value": value, "low": value - 1, "high": value + 1, "null": null, "p": 0.16},
            "auroc": {
                "value": 0.9,
                "low": 0.7,
                "high": 1.0,
                "null": {"value": 0.5, "low": 0.1, "high": 0.9},
                "p": None,
            },
        }

    both = {"total": effects(0.9), "direct": effects(0.6)}
    return {
        "factors": FACTORS,
        "truth": TRUTH,
        "threshold": 0.2,
        "images": 64,
        "data": both,
        "latents": both if level else {},
        "left_out": "" if level else "2 latents cannot hold 3 factors one each",
    }


def test_a_recovered_graph_stands_beside_the_truth(many, change, page):
    change(
        many, "norb_like-vae-*", lambda r: r.update(recovered={"trained": recovered(1.0), "untrained": recovered(3)})
    )
    change(
        many,
        "norb_like-beta_vae-*",
        lambda r: r.update(recovered={"trained": recovered(2.0, ""), "untrained": recovered(3, "")}),
    )
    whole = page(many)
    assert whole.problems == [] and {"recovered", "recovered-norb-like", "recovered-table"} <= set(whole.ids)
    rows = [row for row in whole.tables["recovered-table"] if len(row) == 8]
    vae = [row for row in rows if row[0].startswith("VAE;")]
    assert [row[1] for row in vae] == [
        "at the data, direct effects",
        "at the data, total effects",
        "at the latents, direct effects",
        "at the latents, total effects",
    ]
    trained, untrained, null, *auroc = vae[0][2:]
    assert_printed(trained, 1.0, 0.0, 2.0)
    assert_printed(untrained, 3.0, 2.0, 4.0)
    assert_printed(null, 2.4, 0.16)
    assert_printed(auroc[0], 0.9, 0.7, 1.0)
    assert len([row for row in rows if row[0].startswith("β-VAE")]) == 2
    assert "β-VAE (β = 4), at the latents: 2 latents cannot hold 3 factors one each." in whole.text
    panel = causal.graphs("NORB-like", causal.measured(read(many))).panels[0].drawing
    root = drawn(panel)
    assert [e.get("class") for e in root.iter(f"{SVG}rect")].count("true") == 2 * 3  # the true edges, in each matrix
    said = [e.find(f"{SVG}title").text for e in root.iter(f"{SVG}circle")]
    assert said == ["cause → middle: 0.65 sd", "middle → effect: 0.65 sd"] * 2
    assert {"truth", "at the data", "at the latents", "1 cause"} <= {e.text for e in root.iter(f"{SVG}text")}
