"""The disentanglement metrics of a study: what is measured, on which images, beside which controls."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vaecirc_fast as vf
from vaecirc_fast import data, metrics
from vaecirc_fast.data.folder import Folder
from vaecirc_fast.metrics import Encoded
from vaecirc_fast.metrics.battery import METRICS
from vaecirc_fast.studies import disentanglement as module
from vaecirc_fast.studies import image
from vaecirc_fast.studies.disentanglement import disentanglement
from vaecirc_fast.studies.judged import judged_images
from vaecirc_fast.studies.measuring import measure

NAMES = [name for metric in METRICS.values() for name in metric.definitions]
WITHOUT_LABELS = [name for metric in METRICS.values() if not metric.labels for name in metric.definitions]
SEED = 3


def encoded(n=240, noise=0.3, sizes=(3, 4, 1), seed=0, complete=False, labels=True):
    """Codes: the first two each follow one factor, the others none; of the third factor there is one value."""
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(size, size=n) for size in sizes], 1)
    if complete:
        factors = np.indices((*sizes, 20)).reshape(len(sizes) + 1, -1).T
    codes = rng.normal(size=(len(factors), 4)) * noise
    codes[:, :2] += factors[:, :2]
    shown = factors if labels else factors * 0
    names = tuple(f"factor {k}" for k in range(factors.shape[1]))
    logvar = np.full(codes.shape, -3.0, np.float32)
    return Encoded(codes.astype(np.float32), shown, names, complete, logvar)


@pytest.fixture(scope="module")
def found():
    """Of planted codes, and of codes that say nothing as those of the untrained model."""
    nothing = Encoded(**{**vars(encoded()), "codes": encoded(seed=1).codes[::-1].copy()})
    return disentanglement(encoded(), nothing, SEED).found


def test_every_metric_has_its_value_its_controls_its_unit_and_its_source(found):
    assert list(found["definitions"]) == NAMES == list(found["trained"]) == list(found["untrained"])
    assert len(NAMES) == 15 and set(NAMES) - set(found["permuted"]) == {"active_units"} == set(found["unmoved"])
    for entry in found["definitions"].values():
        assert entry["definition"] and entry["source"] and isinstance(entry["unit"], str)
    assert found["definitions"]["gaussian_total_correlation"]["unit"] == "nats"
    for state in ("trained", "untrained"):
        for name, entry in found[state].items():
            if name in ("dci_disentanglement", "dci_completeness"):
                assert entry["low"] is entry["high"] is None
            else:
                assert entry["low"] <= entry["value"] <= entry["high"], (state, name)
    assert all(
        entry["n"] == 5 and entry["low"] <= entry["value"] <= entry["high"] for entry in found["permuted"].values()
    )
    assert found["left_out"] == {} and found["images"] == 240 and found["whole_grid"] is False
    assert found["trained"]["mig"]["dropped"] == ["factor 2"] and found["trained"]["mean_pairwise_mi"]["dropped"] == []
    json.dumps(found, allow_nan=False)


def test_values_are_the_batterys(found):
    rows = metrics.battery(None, None, encoded=encoded(), seed=SEED, progress=False).set_index("metric")
    for name, entry in found["trained"].items():
        for key in ("value", "low", "high"):
            assert entry[key] == rows.loc[name, key] or (entry[key] is None and math.isnan(rows.loc[name, key]))
    assert found["trained"]["sap"]["notes"] == [
        "160 training and 80 test samples: 2/3 and 1/3, fewer than 10,000 and 5,000"
    ]
    assert found["trained"]["mig"]["notes"] == []


def test_planted_codes_clear_both_controls(found):
    for name in ("mig", "dci_disentanglement", "dci_informativeness", "sap", "explicitness"):
        for control in ("untrained", "permuted"):
            assert found["trained"][name]["value"] > 0.2 + found[control][name]["value"], (name, control)
    assert found["permuted"]["explicitness"]["value"] == pytest.approx(0.5, abs=0.1)
    assert found["permuted"]["gaussian_total_correlation"]["high"] < 0.1


def test_the_permuted_control_is_each_latent_by_itself(found):
    """From the definition: the mean over five such permutations, each drawn by the study's seed."""
    e = encoded()
    values = []
    for k in range(5):
        order = torch.rand(e.codes.shape, generator=torch.Generator().manual_seed(SEED + k)).argsort(0).numpy()
        moved = np.take_along_axis(e.codes, order, 0)
        assert all(np.array_equal(np.sort(moved[:, i]), np.sort(e.codes[:, i])) for i in range(4))
        values.append(metrics.mig(moved, e.factors, replicates=0).value)
    assert found["permuted"]["mig"]["value"] == pytest.approx(np.mean(values), rel=1e-12)


def test_metrics_that_fit_something_are_permuted_less_on_many_images(monkeypatch):
    monkeypatch.setattr(module, "MANY_IMAGES", 100)
    permuted = disentanglement(encoded(120), encoded(120, seed=1), SEED).found["permuted"]
    dear = {name for key in module.DEAR for name in METRICS[key].definitions}
    assert {name for name, entry in permuted.items() if entry["n"] == 2} == dear
    assert {entry["n"] for name, entry in permuted.items() if name not in dear} == {5}


def test_one_factor_leaves_out_what_needs_two_and_says_why():
    one = encoded(sizes=(5, 1))
    found = disentanglement(one, one, SEED).found
    assert set(found["left_out"]) == {"factor_vae_score", "beta_vae_score", "modularity"}
    assert set(found["trained"]) == set(NAMES) - set(found["left_out"])
    assert "one factor: 1 whatever the codes" in found["trained"]["dci_disentanglement"]["notes"]


def test_a_whole_grid_follows_the_reference_protocol(monkeypatch):
    """But for the number of its samples, which are drawn from the grid."""
    battery = metrics.battery
    monkeypatch.setattr(module.metrics, "battery", lambda *a, **k: battery(*a, **k, samples=500, test_samples=100))
    found = disentanglement(encoded(complete=True), encoded(complete=True, seed=1), SEED).found
    assert found["whole_grid"] is True and found["images"] == 240
    assert found["trained"]["mig"]["n"] == 500 and found["trained"]["sap"]["n"] == 100
    assert found["trained"]["sap"]["notes"] == []


def test_without_labels_there_is_what_needs_none(tmp_path):
    bare = encoded(labels=False)
    found = disentanglement(bare, bare, SEED).found
    assert list(found["trained"]) == list(found["definitions"]) == WITHOUT_LABELS and found["left_out"] == {}
    assert set(found["permuted"]) == set(WITHOUT_LABELS) - {"active_units"}


@pytest.mark.parametrize(("n", "spread"), [(2, 1.0), (5, 1.0), (9, 0.0)])
def test_few_images_and_collapsed_codes_give_no_nan(n, spread):
    e = encoded(n)
    e = Encoded(**{**vars(e), "codes": e.codes * np.float32(spread)})
    found = disentanglement(e, e, SEED).found
    json.dumps(found, allow_nan=False)
    for name, entry in found["trained"].items():
        if entry["value"] is None:  # as many latents as images are linear functions of each other
            assert any("infinite" in note for note in entry["notes"]), name


def config(out, **changes):
    sizes = {
        "steps": 20,
        "images": 60,
        "sweep_images": 8,
        "pairs": 4,
        "latents": 3,
        "batch_size": 8,
        "circuit_pairs": 0,
    }
    return image.Config.preset("smoke", out=out, data=("digits",), architectures=("vae",), precision="fp32").replaced(
        sizes | changes
    )


def result(out):
    (file,) = out.glob("runs/*/result.json")
    return json.loads(file.read_text())


def test_a_study_keeps_them_with_the_codes_that_its_models_are_judged_on(tmp_path):
    image.run(config(tmp_path), progress=False)
    kept = result(tmp_path)
    table = kept["disentanglement"]
    assert table["images"] == 60 and table["whole_grid"] is False and kept["timing"]["parts"]["disentanglement"] > 0
    model = vf.models.load(next(tmp_path.glob("runs/*/model.safetensors")))
    ds = data.load("digits")
    judged = judged_images(ds, 60, image.EVALUATION_SEED)
    x, v = judged.x, judged.v
    mu = model.eval().encode(x)[0].detach()
    for state, codes in (
        ("trained", mu),
        ("untrained", image.build(kept["config"], ds, mu.device).encode(x)[0].detach()),
    ):
        irs = metrics.irs(codes.double(), v, replicates=200, seed=image.EVALUATION_SEED)
        for key in ("value", "low", "high"):
            assert table[state]["irs"][key] == pytest.approx(getattr(irs, key), rel=1e-9), state
    # Table 1's MIG, of the same codes
    assert table["trained"]["mig"]["value"] == kept["metrics"]["mig"]["value"]
    assert table["permuted"]["mig"]["value"] == pytest.approx(kept["control"]["permuted"]["mig"]["value"])


def test_a_study_on_the_grid_encodes_every_image(tmp_path):
    image.run(config(tmp_path, battery="grid"), progress=False)
    table = result(tmp_path)["disentanglement"]
    assert table["images"] == 1797 and table["whole_grid"] is False  # scans are no factor grid
    assert table["trained"]["mig"]["n"] == 1797


def test_a_study_of_images_without_labels(tmp_path):
    for n in range(12):
        Image.new("L", (8, 8), 20 * n).save(tmp_path / f"{n}.png")
    ds = Folder(tmp_path, side=8)
    e = measure(vf.models.build("vae", ds.shape, 3, net="mlp", width=0.25), ds, images=12, sweep_images=4, seed=0)
    found = disentanglement(e.encoded, e.encoded, SEED).found
    assert list(found["trained"]) == WITHOUT_LABELS
