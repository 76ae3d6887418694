"""Levels 3 and 4 of the image study: on a planted model against closed form, and as a study stores them."""

import itertools
import json
import math

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import data
from vaecirc_fast._tensor_files import read_tensors
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import patch_sweep
from vaecirc_fast.studies import circuits, image
from vaecirc_fast.studies.manipulation import varied_pairs
from vaecirc_fast.studies.subjects import subject_of

SIDE, VALUES = 8, 9


class Halves(data.Dataset):
    """Images whose left half has the brightness of the first factor, whose right half that of the second."""

    name, shape, factor_names, factor_sizes = "halves", (1, SIDE, SIDE), ("left", "right"), (VALUES, VALUES)
    likelihood = "gaussian"

    def _render(self, indices):
        v = self.factors(indices) / (VALUES - 1)
        return v.repeat_interleave(SIDE // 2, 1)[:, None, None].expand(-1, 1, SIDE, -1).contiguous()


def planted(gain=(1.0, 1.0)):
    """An autoencoder that carries each half's brightness through a unit of its own in every layer, times a gain at the
    latents that the output takes back; all other weights are 0."""
    model = vf.models.build("vae", Halves.shape, 3, net="mlp", likelihood="gaussian", width=5 / 256)
    halves = torch.zeros(2, SIDE, SIDE)
    halves[0, :, : SIDE // 2] = halves[1, :, SIDE // 2 :] = 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.fc1.weight[:2] = halves.flatten(1) / (SIDE * SIDE // 2)
        for layer in (model.encoder.fc2, model.decoder.fc2, model.decoder.fc3):
            layer.weight[:2, :2] = torch.eye(2)
        model.encoder.mu.weight[:2, :2] = torch.diag(torch.tensor(gain))
        model.decoder.fc1.weight[:2, :2] = torch.diag(1 / torch.tensor(gain))
        model.decoder.fc4.weight[:, :2] = halves.flatten(1).T
    return model


@pytest.fixture(scope="module")
def found():
    return circuits.find_circuits(planted(), planted((1.0, 4.0)), Halves(), pairs=12, units=3, active=[0, 1], seed=3)


def test_patching_a_planted_model_moves_its_own_half(found):
    """A unit that carries a factor makes all of the change; any other makes none."""
    assert found.found["kind"] == "factors" and found.found["variants"] == ["left", "right"]
    sites = {row["site"]: row["units"] for row in found.found["sites"]}
    assert sites == {f"encoder.fc{n}": 5 for n in (1, 2)} | {"encoder.mu": 3} | {f"decoder.fc{n}": 5 for n in (1, 2, 3)}
    _, base, variants = varied_pairs(Halves(), 24, 3)
    for k, (variant, change) in enumerate(zip(variants, found.found["change"], strict=True)):
        whole = (variants[variant] - base)[:12].abs().mean().item()
        assert change["value"] == pytest.approx(whole, rel=1e-5) and change["low"] < whole < change["high"]
        for site in sites:
            effect, low, high = (found.tensors[f"{part} {site}"][k] for part in ("effect", "low", "high"))
            assert effect[k] == pytest.approx(whole, rel=1e-5) and low[k] < whole < high[k]
            assert effect[k] == effect.sum()  # exactly 0 elsewhere


def test_mediation_of_a_planted_model_is_all_or_nothing(found):
    _, base, variants = varied_pairs(Halves(), 24, 3)
    for k, entry in enumerate(found.found["mediation"]):
        whole = (variants[entry["variant"]] - base)[12:].abs().mean().item()
        assert entry["te"]["value"] == pytest.approx(whole, rel=1e-5)
        *latents, unit = entry["rows"]
        assert [(row["site"], row["unit"]) for row in latents] == [("encoder.mu", 0), ("encoder.mu", 1)]
        assert (unit["site"], unit["unit"]) == ("decoder.fc1", k)
        for row in (latents[k], unit):  # carries the factor: its own NIE is TE, nothing goes past it
            for term in ("nie_pure", "nie_total"):
                assert row[term]["value"] == pytest.approx(whole, rel=1e-5)
            for term in ("nde_pure", "nde_total", "interaction"):
                assert row[term]["value"] == pytest.approx(0, abs=1e-6)
            assert row["share"]["value"] == pytest.approx(1, rel=1e-5)
            assert row["share"]["low"] <= row["share"]["value"] + 1e-6
        other = latents[1 - k]
        assert other["nie_total"]["value"] == other["nie_pure"]["value"] == other["share"]["value"] == 0
        assert other["nde_pure"]["value"] == pytest.approx(whole, rel=1e-5)


def test_the_graph_of_a_planted_model_is_two_paths(found):
    """Edges of one standard deviation per standard deviation along each path, each half of its pair of layers."""
    graph = found.found["graph"]
    names = [row["layer"] for row in graph["layers"]]
    assert names == ["latents", "fc1", "fc2", "fc3", "cells"]
    assert [row["of"] for row in graph["layers"]] == [3, 5, 5, 5, 16]
    assert all(row["units"] == [0, 1, 2] for row in graph["layers"][:-1]) and graph["kept"] == pytest.approx(1)
    for parent, child in itertools.pairwise(names[:-1]):
        w = found.tensors[f"graph {parent} > {child}"]
        assert torch.allclose(w, torch.diag(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)), rtol=1e-5)
    w = found.tensors["graph fc3 > cells"]
    left = torch.tensor([g % 4 < 2 for g in range(16)]).double()
    assert torch.allclose(w[:, 0], left / 16, rtol=1e-5) and torch.allclose(w[:, 1], (1 - left) / 16, rtol=1e-5)
    layer = [name for row in graph["layers"] for name in [row["layer"]] * len(row["units"])]
    unit = [u for row in graph["layers"] for u in row["units"]]
    half = [
        None if name != "cells" and u > 1 else (u % 4 >= 2 if name == "cells" else u == 1)
        for name, u in zip(layer, unit, strict=True)
    ]
    sides = {}
    for community, side in zip(graph["communities"], half, strict=True):
        if side is not None:
            sides.setdefault(community, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())  # no community holds both paths
    assert graph["q"] >= 0.5  # of the two paths as communities


def test_the_graph_does_not_change_with_the_scale_of_a_latent(found):
    """The twin has another gain, which the next layer takes back."""
    assert found.control["circuit_q"]["value"] == pytest.approx(found.metrics["circuit_q"]["value"], rel=1e-6)
    for name, w in found.tensors.items():
        if name.startswith("graph "):
            assert torch.allclose(w, found.tensors[name.replace("graph", "control", 1)], rtol=1e-4)


def test_path_weights_are_sums_over_paths():
    g = torch.Generator().manual_seed(0)
    sizes = {"a": 2, "b": 3, "c": 4}
    edges = {
        pair: torch.rand(sizes[pair[1]], sizes[pair[0]], generator=g).double() for pair in (("a", "b"), ("b", "c"))
    }
    through, everything = circuits.path_weights(sizes, edges)
    first, second = (w / w.sum() for w in edges.values())
    paths = {(i, j, k): float(first[j, i] * second[k, j]) for i in range(2) for j in range(3) for k in range(4)}
    assert everything == pytest.approx(sum(paths.values()))
    for at, name in enumerate("abc"):
        for u in range(sizes[name]):
            expected = sum(weight for path, weight in paths.items() if path[at] == u)
            assert float(through[name][u]) == pytest.approx(expected)


def test_a_model_whose_layers_pass_nothing_has_no_graph():
    model = planted()
    with torch.no_grad():
        model.decoder.fc2.weight.zero_()
    graph = circuits.circuit_graph_of(model, Halves(), pairs=4, units=3, seed=0)
    assert graph.found == {} and graph.weights == {}
    assert all(entry["value"] is None for entry in graph.metrics.values())


@pytest.mark.parametrize(
    ("shape", "net", "sites"),
    [
        ((1, 64, 64), "conv", ["encoder.conv2", "encoder.conv4", "encoder.mu", *(f"decoder.ct{n}" for n in (1, 2, 3))]),
        ((1, 8, 8), "conv", ["encoder.conv1", "encoder.mu", "decoder.fc1"]),
        ((1, 8, 8), "mlp", ["encoder.fc1", "encoder.fc2", "encoder.mu", *(f"decoder.fc{n}" for n in (1, 2, 3))]),
    ],
)
def test_sites(shape, net, sites):
    assert circuits.patched_sites(vf.models.build("vae", shape, 3, net=net)) == sites


def test_the_graph_of_a_convolutional_decoder_has_channels_as_units():
    """Of the layer whose features become the grid of a convolution a unit is a channel, as of any other."""
    torch.manual_seed(1)
    model = vf.models.build("vae", (1, 16, 16), 3, width=0.125).eval()
    z, others = torch.randn(2, 6, 3)
    layers, edges = circuits._direct_effects(subject_of(model), z, others)
    assert layers == {"latents": 3, "fc1": 32, "fc2": 8, "ct1": 4, "cells": 16}
    base, source = (vf.interventions.run_with_cache(model.decoder, x, ["fc1", "fc2"])[1] for x in (z, others))
    weight = model.decoder.fc2.weight.double()
    a, b = base["fc1"].relu().double(), source["fc1"].relu().double()
    c = base["fc2"].double()
    moved = (c[:, :, None] + weight * (b - a)[:, None]).relu() - c.relu()[:, :, None]  # (B, V, U)
    edge = moved.abs().mean(0).unflatten(0, (8, 16)).mean(1)
    child = torch.cat([c, source["fc2"].double()]).relu().unflatten(1, (8, 16))
    expected = edge / child.std((0, 2), correction=0)[:, None]
    expected = expected / ((b - a).abs().mean(0) / torch.cat([a, b]).std(0, correction=0))
    known = ~expected.isnan()
    assert known.any() and torch.allclose(edges["fc1", "fc2"][known], expected[known], rtol=1e-4)
    y, y2 = model.decoder(z).double(), model.decoder(others).double()
    assert edges["ct1", "cells"].shape == (16, 4) and not torch.equal(y, y2)
    P = patch_sweep(model.decoder, z, others, ["ct1"], effect="l1", groups=vf.groups.mosaic(16, 16, 4, 4), replicates=0)
    before, after = (vf.interventions.run_with_cache(model.decoder, x, ["ct1"])[1]["ct1"].relu() for x in (z, others))
    sd = torch.cat([before, after]).double().std((0, 2, 3), correction=0)
    cells = torch.cat([y, y2]).view(12, 4, 4, 4, 4).transpose(2, 3).flatten(3).permute(1, 2, 0, 3).reshape(16, -1)
    expected = (P.tensor.T.double() / cells.std(1, correction=0)[:, None]) / (
        (after - before).abs().double().mean((0, 2, 3)) / sd
    )
    assert torch.allclose(edges["ct1", "cells"], expected, rtol=1e-4)


# --- in the study ----------------------------------------------------------------------------------------------------


TINY = {"steps": 60, "images": 60, "sweep_images": 8, "pairs": 4, "latents": 3, "batch_size": 8, "precision": "fp32"}
CIRCUITS = {"circuit_pairs": 8, "circuit_units": 3}


def test_a_study_stores_circuits_and_their_control(tmp_path):
    torch.set_num_threads(1)
    config = image.Config.preset("smoke", out=tmp_path, data=["digits"], architectures=["vae"], **TINY, **CIRCUITS)
    page = image.run(config, progress=False).read_text()
    (run,) = tmp_path.glob("runs/*")
    result = json.loads((run / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    added = {"circuit_q", "circuit_modularity"}
    assert added < set(result["metrics"]) == set(result["control"]["untrained"]) == set(result["definitions"])
    for metrics, name in ((result["metrics"], "graph"), (result["control"]["untrained"], "control")):
        graph = result["circuits"][name]
        assert metrics["circuit_q"]["value"] == graph["q"]
        assert metrics["circuit_modularity"]["value"] == pytest.approx(graph["q"] - graph["null"])
        assert graph["nulls"] == 50 and all(row["low"] is None for key, row in metrics.items() if key in added)
    assert {"patching", "mediation", "graph", "untrained graph"} < set(result["timing"]["parts"])
    tensors, _ = read_tensors(run / "circuits.safetensors", "circuits", "")
    assert all(math.isfinite(float(t.sum())) for t in tensors.values())
    ds = data.load("digits")
    model = vf.models.load(run / "model.safetensors")
    twin = image.build(result["config"], ds, torch.device("cpu"))
    active = [row["latent"] for row in result["latents"] if row["active"]]
    again = circuits.find_circuits(model, twin, ds, pairs=8, units=3, active=active, seed=image.EVALUATION_SEED)
    assert json.loads(json.dumps(again.found)) == result["circuits"]
    assert tensors.keys() == again.tensors.keys() and all(torch.equal(t, again.tensors[k]) for k, t in tensors.items())
    for key in ("patching-digits", "mediation-digits", "graph-digits", "mediation-table"):
        assert f'id="{key}"' in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"circuit_pairs": 1}, "circuit_pairs: expected at least 2, or 0 for none, got 1"),
        ({"circuit_pairs": -3}, "circuit_pairs: expected at least 2, or 0 for none, got -3"),
        ({"circuit_units": 0}, "circuit_units: expected at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        image.run(
            image.Config.preset("smoke", out=tmp_path / "new", data=["digits"], architectures=["vae"], **changes),
            progress=False,
        )
    assert not (tmp_path / "new").exists()
