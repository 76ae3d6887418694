"""The preset "smoke" as it is: six architectures on one data set, one architecture on the others, to the report."""

import json
import math

import pytest

from vaecirc_fast import report
from vaecirc_fast.studies import configuration, image


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    image.run(image.Config.preset("smoke", out=out), progress=False)
    return out


def results(out):
    return [json.loads(file.read_text()) for file in sorted(out.glob("runs/*/result.json"))]


def test_every_architecture_and_every_data_set_is_there(smoke):
    cells = {(r["config"]["data"], r["config"]["architecture"]) for r in results(smoke)}
    first, *others = configuration.STAND_INS
    expected = {(first, name) for name in configuration.ARCHITECTURES}
    assert cells == expected | {(name, configuration.ARCHITECTURES[0]) for name in others}


def test_every_run_has_all_levels_all_metrics_and_its_controls(smoke):
    for result in results(smoke):
        name = result["config"]["data"], result["config"]["architecture"]
        named = {"reconstruction", "active", "mig", "ces_raw", "ces_posterior", "ces_resample", "specificity"}
        named |= {"circuit_q", "circuit_modularity"}
        if name[1] == "vq_vae":
            named |= {"ces_z_q", "ces_code_swap", "ces_code_neighbour"}
        assert set(result["metrics"]) == set(result["control"]["untrained"]) == named, name
        # where few codes change anything, a permutation may leave a slot without an effect
        permuted = {"mig"} if name[1] == "vq_vae" else {"mig", "specificity"}
        assert permuted <= set(result["control"]["permuted"]), name
        for metrics in (result["metrics"], result["control"]["untrained"]):
            for row in metrics.values():
                assert row["value"] is None or math.isfinite(row["value"])
        table = result["disentanglement"]["trained"]
        assert {"dci_disentanglement", "sap", "modularity", "irs", "factor_vae_score"} <= set(table), name
        assert set(result["inputs"]) == {"trained", "untrained"} and result["circuits"]["mediation"], name
        assert len(result["latents"]) == 4 and result["dataset"]["images"] > 4000
        assert result["trained"] == (
            result["metrics"]["reconstruction"]["value"] <= 0.5 and result["metrics"]["active"]["value"] >= 3
        )


def test_the_report_and_the_findings_are_complete(smoke):
    page = (smoke / "report.html").read_text()
    assert len(page) < 3_000_000
    for section in ("findings", "results", "methods", "training", "pictures", "effects", "circuits"):
        assert f'id="{section}"' in page, section
    for word in (
        "FactorVAE",
        "β-TCVAE",
        "DIP-VAE-II",
        "VQ-VAE",
        "3D-Shapes-like",
        "MPI3D-like",
        "NORB-like",
        "Faces-like",
    ):
        assert word in page, word
    found = report.findings(smoke)["findings"]
    assert found and {row["verdict"] for row in found} <= {"holds", "does not hold", "undecided"}
    for row in found:
        assert row["estimate"] is None or math.isfinite(row["estimate"]), row["id"]
        assert row["estimate"] is not None or row["notes"], row["id"]
