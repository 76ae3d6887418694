"""The result table of a study's directory, and findings.json, from runs that the test writes."""

import json
import math

import pytest
from planted_tables import ARCHITECTURES, DATA

from vaecirc_fast.errors import InputError
from vaecirc_fast.studies.findings import FILE, findings, result_table, write
from vaecirc_fast.sweeps import RunStore

METRICS = ("reconstruction", "active", "mig", "ces_posterior", "ces_resample", "specificity", "circuit_modularity")
BATTERY = ("mig", "dci_disentanglement", "dci_completeness", "active_units")


def entry(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half, "n": 100, "resampled": "images"}


def battery(value):
    return {name: entry(value, 0.01) | {"notes": [], "dropped": []} for name in BATTERY}


def one_result(value, trained=True, **more):
    isolation = [{"variant": "scale", **entry(value)}, {"variant": "posX", **entry(value + 0.2)}]
    sites = [{"site": "encoder.mu", "units": 2, "polysemanticity": entry(1.2), "monosemantic": entry(0.5)}]
    inputs = {
        "kind": "factors",
        "pairs": 64,
        "variants": ["scale", "posX"],
        "sites": sites,
        "latents": {"effect": [[1.0], [0.5]], "low": [[0.9], [0.4]], "high": [[1.1], [0.6]]},
        "isolation": isolation,
    }
    found = {
        "trained": trained,
        "metrics": {name: entry(value) for name in METRICS},
        "replicates": {},
        "latents": [{"latent": 0, "active": True}],
        "inputs": {"trained": inputs, "untrained": inputs},
        "disentanglement": {
            "trained": battery(value),
            "untrained": battery(value / 2),
            "permuted": {"dci_disentanglement": entry(0.01)},
            "definitions": {},
            "left_out": {},
            "unmoved": [],
            "images": 100,
            "whole_grid": False,
        },
        "control": {
            "untrained": {name: entry(value / 2) for name in METRICS},
            "permuted": {"mig": entry(0.02), "specificity": entry(0.1)},
        },
        "definitions": {name: {"unit": "", "definition": name} for name in METRICS},
        "history": [],
    }
    return {**found, **more}


def config(data, architecture, seed=0, options=None, **more):
    return {"data": data, "architecture": architecture, "options": options or {}, "seed": seed, "latents": 10, **more}


@pytest.fixture
def directory(tmp_path):
    """30 runs: six architectures, five data sets, one seed; the metrics rise with the architecture's number."""
    store = RunStore(tmp_path)
    for d, data in enumerate(DATA):
        for a, architecture in enumerate(ARCHITECTURES):
            options = {"beta": 4.0} if architecture == "beta_vae" else {}
            run = store.run(f"{data}-{architecture}-s0", config(data, architecture, 0, options, net="conv"))
            run.begin()
            run.finish(one_result(0.2 + 0.05 * a + 0.001 * (3 * d * a % 7), trained=(d, a) != (0, 5)))
    return tmp_path


def test_a_row_has_what_its_run_has(directory):
    table = result_table(directory)
    assert len(table) == 30 and table["trained"].sum() == 29
    (row,) = table[(table["data"] == "dsprites") & (table["architecture"] == "beta_vae")].to_dict("records")
    assert row["run"].startswith("dsprites-beta_vae-s0-") and row["label"] == "β-VAE (β = 4)"
    assert json.loads(row["options"]) == {"beta": 4.0} and row["strength"] == 4.0
    assert (row["latents"], row["width"], row["net"], row["factors"]) == (10, 1, "conv", 2)
    assert row["mig"] == pytest.approx(0.25) and row["mig_low"] == pytest.approx(0.20)  # the study's, not the battery's
    assert row["dci_disentanglement_high"] == pytest.approx(0.26)
    assert row["untrained_dci_disentanglement"] == row["untrained_mig"] == pytest.approx(0.125)
    assert row["permuted_mig_high"] == pytest.approx(0.07) and row["permuted_dci_disentanglement"] == 0.01
    assert row["isolation.posX"] == pytest.approx(0.45) and row["untrained_isolation"] == pytest.approx(0.35)
    assert math.isnan(table[table["architecture"] == "vae"]["strength"].iloc[0])


def test_runs_without_what_later_protocols_have(tmp_path):
    run = RunStore(tmp_path).run("digits-vae-s0", config("digits", "vae"))
    run.begin()
    bare = one_result(0.3)
    del bare["disentanglement"], bare["inputs"]
    bare["metrics"]["mig"] = {"value": None, "low": None, "high": None}
    run.finish(bare)
    (row,) = result_table(tmp_path).to_dict("records")
    assert math.isnan(row["mig"]) and math.isnan(row["factors"]) and "dci_disentanglement" not in row
    assert all(finding.verdict == "undecided" for finding in findings(result_table(tmp_path)))


def test_regions_are_no_factors(tmp_path):
    run = RunStore(tmp_path).run("digits-vae-s0", config("digits", "vae"))
    run.begin()
    found = one_result(0.3)
    found["inputs"]["trained"] = found["inputs"]["trained"] | {"kind": "regions"}
    run.finish(found)
    assert math.isnan(result_table(tmp_path)["factors"].iloc[0])


def test_the_file_of_findings(directory):
    path = write(directory)
    assert path == directory / FILE
    found = json.loads(path.read_text())
    assert set(found) == {"findings", "recommend", "families", "notes"}
    assert [f["id"] for f in found["findings"]] == [f.id for f in findings(result_table(directory))]
    fields = {"id", "claim", "quantity", "unit", "estimate", "low", "high", "level", "n", "resampled", "verdict", "p"}
    fields |= {"p_adjusted", "scope", "yardstick", "notes"}
    for finding in found["findings"]:
        assert set(finding) == fields and isinstance(finding["notes"], list)
    by_id = {finding["id"]: finding for finding in found["findings"]}
    assert by_id["ces_dci_within_shapes3d_like"]["verdict"] == "does not hold"  # planted: both rise together
    assert by_id["ces_dci_within_dsprites"]["n"] == 5  # of six architectures one is not trained
    assert "1 of 6 runs are not trained and take no part" in by_id["ces_dci_within_dsprites"]["notes"]
    assert "29 of 30 runs are trained" in found["notes"][0] and "One seed" in found["notes"][-1]
    assert [entry["metric"] for entry in found["recommend"]][:2] == ["dci_disentanglement", "mig"]
    assert found["recommend"][0]["architecture"] == "dip_vae_ii"  # vq_vae is not trained on all
    assert {row["family"] for row in found["families"]}
    before = path.read_bytes()
    assert write(directory).read_bytes() == before


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        write(tmp_path)
    assert not (tmp_path / FILE).exists()
