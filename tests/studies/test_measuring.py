"""Measuring one model: what does not change with the units of a latent, the order of latents or that of a codebook;
and planted models with codes in slots against closed form."""

import itertools
import math

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import data, metrics, models
from vaecirc_fast.errors import InputError
from vaecirc_fast.studies import circuits
from vaecirc_fast.studies.disentanglement import encoded_grid
from vaecirc_fast.studies.examined import Protocol, examine
from vaecirc_fast.studies.judged import RECONSTRUCTED, judged_images
from vaecirc_fast.studies.manipulation import manipulate, varied_pairs
from vaecirc_fast.studies.measuring import measure
from vaecirc_fast.studies.slots import CHANNEL_IMAGES
from vaecirc_fast.studies.subjects import slot_numbers, subject_of

SIDE, VALUES, L = 8, 7, 3
SIZES = {"images": 49, "sweep_images": 12, "seed": 5}


class Halves(data.Dataset):
    """Images whose left half has the brightness of the first factor, whose right half that of the second."""

    name, shape, factor_names, factor_sizes = "halves", (1, SIDE, SIDE), ("left", "right"), (VALUES, VALUES)
    likelihood = "gaussian"

    def _render(self, indices):
        v = self.factors(indices) / (VALUES - 1)
        return v.repeat_interleave(SIDE // 2, 1)[:, None, None].expand(-1, 1, SIDE, -1).contiguous()


DS = Halves()


def net(name="vae", **options):
    torch.manual_seed(4)
    return models.build(name, DS.shape, L, net="mlp", width=0.05, likelihood="gaussian", **options).double()


def gaussian():
    return net()


def quantised():
    """Codes that differ between images: an untrained encoder gives few."""
    model = net("vq_vae", codes=12, code_width=4)
    with torch.no_grad():
        model.encoder.head.weight *= 20
        z_e = model.encoder(DS.images(torch.arange(49)).double())
        model.quantiser.codebook.copy_(z_e.transpose(1, 2).flatten(0, 1)[torch.arange(12) * 11])
    return model


class Doubles(Halves):
    """In float64, so that rounding stays out of invariances."""

    def _render(self, indices):
        return super()._render(indices).double()


DOUBLES = Doubles()
CODES = ["modularity", "gaussian_total_correlation", "dci", "sap"]


def everything(model):
    measured = measure(model, DOUBLES, **SIZES)
    inputs = manipulate(model, DOUBLES, pairs=8, seed=5)
    table = metrics.battery(None, None, encoded=measured.encoded, only=CODES, replicates=0, progress=False)
    return measured, inputs, dict(zip(table.metric, table.value, strict=True))


def values(row):
    return {name: entry["value"] for name, entry in row.items()}


def close(a, b, names, rel=1e-5):
    for name in names:
        assert a[name] is not None and math.isfinite(a[name]), name
        assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-9), name


SAME = ("reconstruction", "active", "mig", "ces_posterior", "ces_resample", "specificity")


def test_the_unit_of_a_latent_changes_no_number_but_raw_ces():
    """z_i -> a_i z_i, with the decoder compensated; by powers of two, so that trees see the same splits."""
    model, scaled = gaussian(), gaussian()
    a = torch.tensor([2.0, 0.5, 8.0]).double()
    with torch.no_grad():
        scaled.encoder.mu.weight *= a[:, None]
        scaled.encoder.mu.bias *= a
        scaled.encoder.logvar.bias += 2 * a.abs().log()
        scaled.decoder.fc1.weight /= a
    (one, inputs, table), (two, inputs_two, table_two) = everything(model), everything(scaled)
    close(values(one.metrics), values(two.metrics), SAME)
    assert one.metrics["ces_raw"]["value"] != pytest.approx(two.metrics["ces_raw"]["value"], rel=0.01)
    assert torch.tensor(inputs["latents"]["effect"]).allclose(torch.tensor(inputs_two["latents"]["effect"]), rtol=1e-4)
    close(
        table, table_two, ("modularity", "gaussian_total_correlation", *(n for n in table if n.startswith("dci"))), 1e-4
    )


def test_the_order_of_latents_is_that_of_the_rows_alone():
    order = torch.tensor([2, 0, 1])
    model, turned = gaussian(), gaussian()
    with torch.no_grad():
        for head in (turned.encoder.mu, turned.encoder.logvar):
            head.weight.copy_(head.weight[order])
            head.bias.copy_(head.bias[order])
        turned.decoder.fc1.weight.copy_(turned.decoder.fc1.weight[:, order])
    (one, inputs, _), (two, inputs_two, _) = everything(model), everything(turned)
    close(values(one.metrics), values(two.metrics), (*SAME, "ces_raw"))
    for row, i in zip(two.latents, order.tolist(), strict=True):
        close({k: v for k, v in one.latents[i].items() if k != "latent"}, row, one.latents[i].keys() - {"latent"})
    effect = torch.tensor(inputs["latents"]["effect"])
    assert effect[:, order].allclose(torch.tensor(inputs_two["latents"]["effect"]), rtol=1e-5)


# --- codes in slots --------------------------------------------------------------------------------------------------

DISCRETE = ("ces_resample", "ces_code_neighbour")
SLOTTED = (*SAME[:3], "specificity", "ces_raw", "ces_posterior", "ces_z_q", *DISCRETE)


def test_the_order_of_the_codebook_changes_nothing():
    """But the codes that are drawn to be swapped, of which there are as many as their usage says."""
    model, turned = quantised(), quantised()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    turned.quantiser.codebook.copy_(turned.quantiser.codebook[order])
    (one, inputs, table), (two, inputs_two, table_two) = everything(model), everything(turned)
    close(values(one.metrics), values(two.metrics), SLOTTED)
    for a, b in zip(one.latents, two.latents, strict=True):
        close(a, b, [k for k in a if "swap" not in k])
    assert inputs == inputs_two
    close(table, table_two, table.keys(), 1e-6)


def test_the_order_of_slots_is_that_of_the_rows_alone():
    order = torch.tensor([1, 2, 0])
    model, turned = quantised(), quantised()
    with torch.no_grad():
        head = turned.encoder.head
        head.weight.copy_(head.weight.view(L, 4, -1)[order].flatten(0, 1))
        head.bias.copy_(head.bias.view(L, 4)[order].flatten())
        w = turned.decoder.fc1.weight
        w.copy_(w.view(len(w), 4, L)[:, :, order].flatten(1))
    one, two = (measure(m, DOUBLES, **SIZES) for m in (model, turned))
    close(values(one.metrics), values(two.metrics), ("reconstruction", "active", "mig", "specificity", *SLOTTED[4:]))
    for row, p in zip(two.latents, order.tolist(), strict=True):
        close(one.latents[p], row, [k for k in row if k != "latent" and "swap" not in k])


def planted():
    """Slot 0 holds the left half's brightness, slot 1 the right one's, slot 2 nothing: seven codes on a line."""
    model = models.build(
        "vq_vae", DS.shape, L, net="mlp", likelihood="gaussian", width=5 / 256, codes=VALUES, code_width=2
    )
    halves = torch.zeros(2, SIDE, SIDE)
    halves[0, :, : SIDE // 2] = halves[1, :, SIDE // 2 :] = 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.fc1.weight[:2] = halves.flatten(1) / (SIDE * SIDE // 2)
        for layer in (model.encoder.fc2, model.decoder.fc2, model.decoder.fc3):
            layer.weight[:2, :2] = torch.eye(2)
        model.encoder.head.weight.view(L, 2, -1)[:2, 0, :2] = torch.eye(2)
        model.decoder.fc1.weight.view(-1, 2, L)[:2, 0, :2] = torch.eye(2)
        model.decoder.fc4.weight[:, :2] = halves.flatten(1).T
    model.quantiser.codebook.zero_()
    model.quantiser.codebook[:, 0] = torch.arange(VALUES) / (VALUES - 1)
    return model.eval()


@pytest.fixture(scope="module")
def measured():
    return measure(planted(), DS, **SIZES)


def test_strengths_of_planted_codes_are_their_closed_forms(measured):
    """A neighbour is one step of brightness off, two at an end; half of the image changes by it."""
    assert measured.metrics["reconstruction"]["value"] == pytest.approx(0, abs=1e-9)
    assert measured.metrics["active"]["value"] == 2 and [row["active"] for row in measured.latents] == [
        True,
        True,
        False,
    ]
    x = judged_images(DS, 49, 5).x[:12, 0, 0]
    brightness = torch.stack([x[:, 0], x[:, -1], torch.zeros(12)], 1)
    steps = (torch.arange(VALUES) / (VALUES - 1) - brightness[..., None]).abs().sort().values[..., 1:5]
    expected = steps.mean((0, 2)) / 2
    for p in range(2):
        assert measured.latents[p]["ces_code_neighbour"] == pytest.approx(float(expected[p]), rel=1e-5)
        assert measured.latents[p]["specificity"] == pytest.approx(1 / 6, rel=1e-5)  # half of 64 cells, log 32 / log 64
        assert measured.latents[p]["codes"] == pytest.approx(VALUES, rel=1e-6)
        assert measured.latents[p]["component_share"] == pytest.approx(1)
    third = measured.latents[2]
    assert third["ces_resample"] == third["ces_code_neighbour"] == third["share"] == 0 and third["specificity"] is None
    # channel 0 by t sd of z_q moves both halves by that, as far as a ReLU lets them; channel 1 none
    z_q = planted().encode(judged_images(DS, 49, 5).x).z_q.detach()
    t = torch.tensor([-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2])
    before = brightness[:3, :2, None]
    moved = (before + t * z_q[:, 0].std(correction=0)).relu() - before
    expected = float((moved.abs() / t.abs()).mean()) / 2
    assert measured.metrics["ces_z_q"]["value"] == pytest.approx(expected, rel=1e-5) and CHANNEL_IMAGES == 4


def test_resampling_a_slot_takes_its_code_from_another_image(measured):
    """An independent loop over the donors that the grid draws."""
    from vaecirc_fast.interventions import grids

    codes = planted().encode(judged_images(DS, 49, 5).x[:12])
    donors = grids.make("resample", torch.zeros(12, L), None, 5).donors
    base = planted().decode(codes.z_q).detach()
    for p in range(L):
        found = []
        for n, s in itertools.product(range(12), range(4)):
            z = codes.z_q[n].clone()
            z[:, p] = codes.z_q[donors[n, s], :, p]
            found.append(float((planted().decode(z[None])[0].detach() - base[n]).abs().mean()))
        assert measured.latents[p]["ces_resample"] == pytest.approx(sum(found) / len(found), rel=1e-5, abs=1e-9)


def test_levels_one_three_and_four_of_planted_slots():
    inputs = manipulate(planted(), DS, pairs=24, seed=3)
    effect = torch.tensor(inputs["latents"]["effect"], dtype=torch.float64)
    assert effect.shape == (2, L) and bool((effect.diagonal() > 0.1).all())
    assert effect[0, 1] == effect[1, 0] == 0 and bool((effect[:, 2] == 0).all())
    assert [row["value"] for row in inputs["isolation"]] == [0, 0]  # each factor moves its own slot alone
    found = circuits.find_circuits(planted(), None, DS, pairs=12, units=3, active=[0, 1], seed=3)
    sites = {row["site"]: row["units"] for row in found.found["sites"]}
    assert sites["quantiser"] == L
    _, base, variants = varied_pairs(DS, 24, 3)
    for k, (entry, variant) in enumerate(zip(found.found["mediation"], variants, strict=True)):
        whole = float((variants[variant] - base)[12:].abs().mean())
        rows = {(row["site"], row["unit"]): row for row in entry["rows"]}
        assert rows["quantiser", k]["nie_total"]["value"] == pytest.approx(whole, rel=1e-5)
        assert rows["quantiser", k]["share"]["value"] == pytest.approx(1, rel=1e-5)
        assert rows["quantiser", 1 - k]["nie_total"]["value"] == pytest.approx(0, abs=1e-7)
        first = float((variants[variant] - base)[:12].abs().mean())
        assert float(found.tensors["effect quantiser"][k, k]) == pytest.approx(first, rel=1e-5)
    graph = found.found["graph"]
    assert [row["layer"] for row in graph["layers"]] == ["latents", "fc1", "fc2", "fc3", "cells"]
    assert [row["of"] for row in graph["layers"]] == [L, 5, 5, 5, 16]
    w = found.tensors["graph latents > fc1"]
    assert w.shape == (3, 3) and w[0, 1] == w[1, 0] == 0 and float(w[0, 0] + w[1, 1]) == pytest.approx(1)
    assert found.control["circuit_q"]["value"] is None


def test_edges_of_slots_are_those_of_a_loop():
    """Slot by slot through the layer itself, against the product that the graph takes."""
    model = quantised().eval()
    x = DOUBLES.images(torch.arange(24))
    z, others = model.encode(x).z_q.split(12)
    _, edges = circuits._direct_effects(subject_of(model), z, others)
    layer = model.decoder.fc1
    base = layer(z.flatten(1)).relu()
    sd = torch.cat([layer(t.flatten(1)).relu() for t in (z, others)]).std(0, correction=0)
    for p in range(L):
        moved = z.clone()
        moved[:, :, p] = others[:, :, p]
        edge = (layer(moved.flatten(1)).relu() - base).abs().mean(0)
        change = (others - z)[:, :, p].abs().mean()
        expected = (edge / sd) / (change / torch.cat([z, others])[:, :, p].std(correction=0))
        found = edges["latents", "fc1"][:, p]
        assert torch.allclose(found[sd > 0], expected[sd > 0], rtol=1e-6)


def test_numbers_of_slots_are_first_principal_components():
    g = torch.Generator().manual_seed(0)
    book = torch.randn(9, 4, generator=g)
    indices = torch.randint(9, (200, 3), generator=g)
    indices[:, 2] = 4
    numbers, share = slot_numbers(indices, book)
    for p in range(2):
        z = book[indices[:, p]].double()
        z = z - z.mean(0)
        u, s, vt = torch.linalg.svd(z, full_matrices=False)
        expected = u[:, 0] * s[0] * vt[0][vt[0].abs().argmax()].sign()
        assert torch.allclose(numbers[:, p].double(), expected, atol=1e-5)
        assert float(share[p]) == pytest.approx(float(s[0] ** 2 / (s**2).sum()))
    assert not numbers[:, 2].any() and float(share[2]) == 1


def test_a_grid_of_codes_is_that_of_its_images():
    found = encoded_grid(planted(), DS, progress=False)
    direct, _ = slot_numbers(planted().encode(DS.images(torch.arange(49))).indices, planted().codebook)
    assert found.complete and torch.equal(torch.from_numpy(found.codes), direct)


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_is_measured_whole(name):
    ds = data.load("digits")
    torch.manual_seed(2)
    model, twin = (models.build(name, ds.shape, L, net="mlp", width=0.1) for _ in range(2))
    pairs = 3 if name in ("vae", "vq_vae") else 0  # the others have the VAE's layers
    protocol = Protocol(
        images=40, sweep_images=6, pairs=6, circuit_pairs=pairs, circuit_units=4, battery="none", seed=1
    )
    found = examine(model, twin, ds, protocol, progress=False)
    result = found.result
    names = set(result["definitions"])
    assert names == set(result["metrics"]) == set(result["control"]["untrained"])
    assert len(result["latents"]) == L and {"latent", "active"} <= result["latents"][0].keys()
    assert set(found.effects) >= {"fixed", "posterior", "resample"}
    assert found.pictures["traversals"].shape == (7 * L, *ds.shape)
    if name == "vae":
        again = examine(model, twin, ds, protocol, progress=False)
        assert again.result == result and again.seconds["untrained"] < found.seconds["untrained"] / 2


def test_the_mean_image_is_that_of_the_images_that_are_reconstructed():
    class Many(Halves):
        factor_sizes = (VALUES, 400)

        def _render(self, indices):
            v = self.factors(indices) / torch.tensor([VALUES, 400])
            return v[:, :1, None, None].expand(-1, 1, SIDE, SIDE).contiguous()

    judged = judged_images(Many(), 2500, 0)
    assert len(judged.x) == 2500 and len(judged.reconstructed) == RECONSTRUCTED
    x = judged.x[:RECONSTRUCTED]
    for kind in ("bernoulli", "squared_error"):
        constant, floor = judged.losses(kind)
        assert torch.allclose(constant, metrics.mean_image_loss(x, likelihood=kind), rtol=1e-12)
        assert torch.allclose(floor, metrics.loss_floor(x, kind), rtol=1e-12)


def test_a_model_of_other_images_is_refused():
    with pytest.raises(InputError, match=r"model: is for images \(1, 9, 9\), 'halves' has \(1, 8, 8\)"):
        measure(vf.models.build("vae", (1, 9, 9), 2, net="mlp", width=0.1), DS, **SIZES)
    with pytest.raises(InputError, match="model: expected one of vf.models, got Linear"):
        measure(torch.nn.Linear(2, 2), DS, **SIZES)


@pytest.mark.parametrize("metric", ["mig", "specificity", "ces_resample", "ces_posterior", "reconstruction"])
def test_controls_of_codes_in_slots(metric):
    """Nulls are cleared by what a planted model has; its own numbers are those of `measure`."""
    sizes = {"images": 49, "sweep_images": 12, "seed": 5}
    # a strength has no permuted null, and an untrained net whose codes are all alike no specificity
    only = {"specificity": ["permuted"], "mig": ["untrained", "permuted"]}.get(metric, ["untrained"])
    found = vf.studies.controls(planted(), DS, metric, only=only, nulls=2, progress=False, **sizes)
    own = measure(planted(), DS, **SIZES).metrics[metric]["value"]
    assert found.result.value == pytest.approx(own, rel=1e-6, abs=1e-9)
    assert list(found.table["control"])[1:] == only
