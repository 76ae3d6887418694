"""Claims with their verdicts on the page, as findings.json has them; a damaged file is a note."""

import json

import pytest

from vaecirc_fast import report
from vaecirc_fast.cli import main
from vaecirc_fast.errors import InputError
from vaecirc_fast.report.claims import read_findings


def finding(**more):
    return {
        "id": "ces_dci_within_norb_like",
        "claim": "On norb_like, stronger architectures are less disentangled",
        "quantity": "Spearman's r of CES and DCI disentanglement",
        "unit": "",
        "estimate": -0.62,
        "low": -0.91,
        "high": -0.13,
        "level": 0.95,
        "n": 4,
        "resampled": "architectures",
        "verdict": "holds",
        "p": 0.021,
        "p_adjusted": 0.0004,
        "scope": "norb_like",
        "yardstick": "published: negative",
        "notes": ["one run is not trained"],
        **more,
    }


RECOMMENDED = {
    "metric": "dci_disentanglement",
    "data": "a new data set",
    "architecture": "beta_vae",
    "verdict": "undecided",
    "regret": {"value": 0.031, "low": -0.012, "high": 0.074, "n": 3, "resampled": "data sets"},
    "random": {"value": 0.06, "low": 0.01, "high": 0.11},
    "gain": {"value": 0.029, "low": None, "high": None},
    "ranks": {"vae": 2.25, "beta_vae": 1.5},
    "notes": ["only 3 data sets"],
}


@pytest.fixture
def stated(many):
    """Writes findings.json beside the runs."""

    def write(findings, **more):
        found = {"findings": findings, "recommend": [], "notes": [], **more}
        (many / "findings.json").write_text(json.dumps(found))
        return many

    return write


def test_a_claim_is_printed_with_all_that_belongs_to_it(stated, page):
    undecided = {"estimate": None, "low": None, "high": None, "verdict": "undecided", "p": None, "p_adjusted": None}
    other = finding(id="other", claim="Something else", scope="all data sets", level=0.9, **undecided)
    directory = stated([finding(), other], recommend=[RECOMMENDED], notes=["A note of the file."])
    whole = page(directory)
    assert whole.problems == []
    rows = whole.tables["findings-table"]
    claim, verdict, estimate, replicates, p, yardstick = rows[1]
    assert claim.startswith("On NORB-like, stronger") and "one run is not trained" in claim
    assert verdict.split(maxsplit=1)[1] == "holds"  # in words, not only by colour or sign
    assert estimate.split("]")[0] == "−0.62 [−0.91, −0.13" and "Spearman's r" in estimate
    assert replicates == "4 architectures" and yardstick == "published: negative"
    assert "p = 0.021" in p and "adjusted p < 0.001" in p
    assert rows[2][1].endswith("undecided") and rows[2][2].startswith("–") and "90 % interval" in rows[2][2]
    assert "Of two claims 1 holds and 1 is undecided." in whole.text
    assert "A note of the file." in whole.text
    by, take, regret, random, gain, *_ = whole.tables["recommendation"][1]
    assert by.startswith("DCI disentanglement") and take == "β-VAE"
    assert regret == "0.031 [−0.012, 0.074]" and random == "0.060 [0.010, 0.110]" and gain == "0.029"
    assert "β-VAE 1.5; VAE 2.2" in whole.text
    figure = whole.source[whole.source.index('id="ces-dci"') :]
    assert "Spearman&#39;s r = −0.62 [−0.91, −0.13]" in figure and "over 4 architectures; holds (negative)" in figure


def test_many_claims_on_single_data_sets_have_a_table_of_their_own(stated, page):
    single = [finding(id=f"single {n}") for n in range(12)]
    tables = page(stated([*single, finding(id="wide", scope="all data sets")])).tables
    assert len(tables["findings-table"]) == 2 and len(tables["findings-table-single"]) == 13


def test_without_findings_there_is_no_section(many, page):
    whole = page(many)
    assert "findings" not in whole.ids and "findings-table" not in whole.tables and report.findings(many) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"findings": {}}',
        lambda text: text.replace('"holds"', '"proven"'),
        lambda text: text.replace("-0.62", '"much"'),
        lambda text: text.replace('"claim"', '"clam"'),
        lambda text: text.replace('"metric"', '"metrics"'),
        lambda text: text.replace('"regret": {', '"regret": 3, "r": {'),
    ],
)
def test_what_is_damaged_is_said(stated, damage):
    directory = stated([finding()], recommend=[RECOMMENDED])
    file = directory / "findings.json"
    file.write_text(damage(file.read_text()))
    found, (trouble,) = read_findings(directory)
    assert found.rows == () and "findings.json cannot be used" in trouble and str(directory) not in trouble
    with pytest.raises(InputError, match=r"findings\.json cannot be used"):
        report.findings(directory)


def test_a_damaged_file_is_a_note(stated, page, capsys):
    directory = stated([])
    (directory / "findings.json").write_text("{")
    whole = page(directory)
    assert whole.problems == [] and "findings.json cannot be used" in whole.text and "findings" not in whole.ids
    assert main(["report", str(directory), "--json"]) == 0
    assert "cannot be used" in json.loads(capsys.readouterr().out)["findings"]["notes"][0]


def test_json_carries_the_findings(stated, capsys):
    directory = stated([finding()], recommend=[RECOMMENDED])
    assert main(["report", str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == json.loads((directory / "findings.json").read_text())
    found, troubles = read_findings(directory)
    assert not troubles and found.correlation("faces_like") == []
