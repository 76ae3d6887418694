"""The report's page: whole in itself, its numbers those of the runs, honest about what is missing."""

import json
import re
import shutil

import numpy as np
import pytest
from printed import assert_printed
from scipy import stats

from vaecirc_fast import report
from vaecirc_fast.errors import InputError
from vaecirc_fast.sweeps import RunStore


def results(directory):
    return {path.name.rsplit("-", 1)[0]: result for path, result in RunStore(directory).results()}


METRICS = ("reconstruction", "active", "mig", "ces_raw", "ces_posterior", "ces_resample", "specificity")


def test_one_file_that_loads_nothing(study, page):
    found = page(study)
    assert found.problems == []
    assert len(found.source.encode()) < 3_000_000
    for tag, key, value in found.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:", "#")), (tag, key, value[:60])
    assert "<script" not in found.source and "url(" not in found.source and "@import" not in found.source
    assert set(re.findall(r"https?://[^\s\"<]+", found.source)) <= {"http://www.w3.org/2000/svg"}
    assert len(set(found.ids)) == len(found.ids)
    targets = {value[1:] for _, key, value in found.attributes if key == "href" and value.startswith("#")}
    assert targets and targets <= set(found.ids)


def test_no_number_that_is_none(study, page):
    text = page(study).text
    for word in ("NaN", "nan", "None", "null", "inf", "Infinity", "undefined"):
        assert not re.search(rf"\b{word}\b", text), word


def test_the_same_runs_give_the_same_page(study):
    first = report.write(study).read_bytes()
    assert report.write(study).read_bytes() == first
    assert not list(study.glob(".*.tmp"))


def test_every_run_is_printed_as_its_result_says(study, page):
    rows = page(study).tables["runs-table"]
    found = results(study)
    labels = {"VAE, seed 0": "digits-vae-s0", "VAE, seed 1": "digits-vae-s1"}
    labels |= {"β-VAE (β = 4), seed 0": "digits-beta_vae-s0", "β-VAE (β = 4), seed 1 not trained": "digits-beta_vae-s1"}
    rows = {" ".join(row[0].split()): row[1:] for row in rows if len(row) > 2}
    assert labels.keys() <= rows.keys()
    for label, name in labels.items():
        for metric, cell in zip(METRICS, rows[label], strict=False):
            entry = found[name]["metrics"][metric]
            bounds = [entry[key] for key in ("low", "high") if entry[key] is not None]
            assert_printed(cell, entry["value"], *bounds)


def main_rows(page):
    """The main table: for each configuration its rows of estimates, untrained and permuted controls, and seeds."""
    rows = page.tables["main-table"]
    start = {" ".join(row[0].split()): n for n, row in enumerate(rows)}
    vae, beta = start["VAE two seeds"], next(n for label, n in start.items() if label.startswith("β-VAE"))
    return [[row[1:] for row in rows[n : n + 4]] for n in (vae, beta)]


def test_the_main_table_is_over_trained_seeds_with_the_intervals_of_the_definitions(study, page):
    (estimates, controls, permuted, seeds), _ = main_rows(page(study))
    runs = [results(study)[f"digits-vae-s{seed}"] for seed in (0, 1)]
    for n, metric in enumerate(METRICS):
        values = np.array([run["metrics"][metric]["value"] for run in runs], float)
        untrained = np.array([run["control"]["untrained"][metric]["value"] for run in runs], float)
        if np.ptp(values):
            assert_printed(
                estimates[n], values.mean(), *expected_interval(values, [r["replicates"] for r in runs], metric)
            )
        else:
            assert_printed(estimates[n], values.mean())
            assert "no spread" in estimates[n]
        assert_printed(seeds[n], *values)
        if np.ptp(untrained):
            half = stats.t.ppf(0.975, 1) * untrained.std(ddof=1) / np.sqrt(2)
            assert_printed(controls[n], untrained.mean(), untrained.mean() - half, untrained.mean() + half)
        nulls = [run["control"]["permuted"].get(metric) for run in runs]
        assert (metric in ("mig", "specificity")) == all(nulls)
        if all(nulls):
            null = np.array([null["value"] for null in nulls])
            half = stats.t.ppf(0.975, 1) * null.std(ddof=1) / np.sqrt(2)
            assert_printed(permuted[n], null.mean(), null.mean() - half, null.mean() + half)
        else:
            assert permuted[n].strip() == "–"


def expected_interval(values, replicates, metric):
    """The hierarchical interval by its formula, or Student's t where a metric has no replicates."""
    runs = len(values)
    between, shared, freedom = values.var(ddof=1) / runs, 0.0, runs - 1
    if metric in replicates[0]:
        w = np.array([r[metric] for r in replicates])
        w = w - w.mean(1, keepdims=True)
        shared = max(0.0, w.mean(0).var(ddof=1) - w.var(0, ddof=1).mean() / runs)
        freedom = (between + shared) ** 2 / (between**2 / (runs - 1) + shared**2 / (w.shape[1] - 1))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(between + shared)
    return values.mean() - half, values.mean() + half


def test_a_run_that_is_not_trained_is_marked_and_in_no_mean(study, page):
    found = page(study)
    _, (estimates, _, _, seeds) = main_rows(found)
    only = results(study)["digits-beta_vae-s0"]
    for n, metric in enumerate(METRICS):
        assert_printed(estimates[n], only["metrics"][metric]["value"])
        assert_printed(seeds[n], only["metrics"][metric]["value"])
    label = next(row[0] for row in found.tables["main-table"] if row[0].startswith("β-VAE"))
    assert "one seed; 1 more not trained" in " ".join(label.split())
    assert "Three of four count as trained" in found.text
    assert "part of no aggregate: Digits, β-VAE (β = 4), seed 1." in found.text


def test_without_a_trained_run_there_is_no_mean(untrained_study, tmp_path, page):
    shutil.copytree(untrained_study, tmp_path / "study")
    found = page(tmp_path / "study")
    assert found.problems == []
    assert "None counts as trained" in found.text
    assert "trained-untrained" not in found.ids
    rows = [row for row in found.tables["main-table"] if "not trained" in row[0]]
    assert len(rows) == 2 and all(cell.strip() == "–" for row in rows for cell in row[1:])


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
@pytest.mark.parametrize("name", ["pictures", "effects-fixed", "effects-posterior", "effects-resample"])
def test_damaged_files_of_one_run_are_noted(study, page, name, damage):
    run = next(study.glob("runs/digits-vae-s0-*"))
    file = run / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-100] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    whole = page(study)
    assert whole.problems == []
    assert f"{run.name}: {name}.safetensors" in whole.text
    assert str(study) not in whole.text
    assert {"reconstructions-digits", "steps-digits", "maps-digits"} <= set(whole.ids)


def test_a_damaged_result_is_named(study):
    file = next(study.glob("runs/digits-vae-s1-*")) / "result.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=re.escape(str(file))):
        report.write(study)
    assert not (study / "report.html").exists() or "seed 1" in (study / "report.html").read_text()


@pytest.mark.parametrize("key", ["trained", "metrics", "control", "replicates", "latents", "history", "definitions"])
def test_an_incomplete_result_is_named(study, change, key):
    change(study, "digits-vae-s1-*", lambda result: result.pop(key))
    with pytest.raises(
        InputError, match=rf"vae-s1-.*result\.json is not a result of this study \('{key}' is missing\)"
    ):
        report.table(study)


def test_directories_without_runs(tmp_path):
    with pytest.raises(InputError, match="is no directory"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no finished run"):
        report.write(tmp_path)


def test_runs_of_other_calls_and_unfinished_ones_are_told_apart(study, page):
    listing = json.loads((study / "study.json").read_text())
    left, kept = listing["runs"][0], listing["runs"][1:]
    (study / "study.json").write_text(json.dumps({**listing, "runs": [*kept, "digits-vae-s7-0123456789ab"]}))
    text = page(study).text
    assert f"Left by earlier calls of the study in this directory: {left}." in text
    assert "Not finished, and so not in this report: digits-vae-s7-0123456789ab." in text
    (study / "study.json").write_text("{")
    assert "study.json cannot be read" in page(study).text


def test_different_configurations_are_not_pooled(study, page):
    store = RunStore(study)
    path, result = next((p, r) for p, r in store.results() if p.name.startswith("digits-vae-s0"))
    run = store.run("digits-vae-s0", {**result["config"], "steps": 40})
    run.begin()
    run.finish({key: value for key, value in result.items() if key not in ("id", "config")})
    for file in path.glob("*.safetensors"):
        shutil.copy(file, run.path)
    labels = [" ".join(row[0].split()) for row in page(study).tables["main-table"]]
    assert "VAE, steps 20 two seeds" in labels and "VAE, steps 40 one seed" in labels


def test_undefined_numbers_are_dashes(study, change, page):
    def undefine(result):
        for metrics in (result["metrics"], result["control"]["untrained"]):
            metrics["specificity"] |= {"value": None, "low": None, "high": None}
        result["replicates"].pop("specificity")
        result["latents"][0] |= {"specificity": None, "specificity_low": None, "specificity_high": None}

    change(study, "digits-vae-*", undefine)
    found = page(study)
    assert found.problems == []
    (estimates, controls, _, seeds), _ = main_rows(found)
    at = METRICS.index("specificity")
    assert [row[at].strip() for row in (estimates, controls, seeds)] == ["–", "–", "–, –"]


def test_effects_of_the_input_over_seeds(study, page):
    found = page(study)
    runs = [results(study)[f"digits-vae-s{seed}"]["inputs"] for seed in (0, 1)]
    rows = {row[0]: row[1:] for row in reversed(found.tables["sites-table"])}  # the first group's rows last, to stay
    for n, site in enumerate(runs[0]["trained"]["sites"]):
        units, *cells = rows[site["site"]]
        assert units == str(site["units"])
        picked = [(k, w) for k in ("polysemanticity", "monosemantic") for w in ("trained", "untrained")]
        for cell, (key, when) in zip(cells, picked, strict=True):
            assert_mean(cell, [run[when]["sites"][n][key]["value"] for run in runs])
    rows = {row[0]: row[1:] for row in reversed(found.tables["isolation-table"])}
    for n, variant in enumerate(runs[0]["trained"]["variants"]):
        for cell, when in zip(rows[variant], ("trained", "untrained"), strict=True):
            assert_mean(cell, [run[when]["isolation"][n]["value"] for run in runs])


def assert_mean(cell, values):
    """The cell holds the mean of two seeds and, where they differ, its t interval."""
    values = np.array(values)
    half = stats.t.ppf(0.975, 1) * values.std(ddof=1) / np.sqrt(2)
    assert_printed(cell, values.mean(), *([values.mean() - half, values.mean() + half] if half else []))


def test_runs_of_the_first_protocol_have_no_effects_of_the_input(study, change, page):
    change(study, "*", lambda result: result.pop("inputs"))
    found = page(study)
    assert found.problems == []
    assert "inputs" not in found.ids and "sites-table" not in found.tables


def test_the_plans_of_the_sweeps_are_printed(study, page):
    rows = {row[0]: row[1] for row in page(study).tables["plans-table"] if len(row) == 2}
    for grid in ("fixed", "posterior", "resample"):
        assert "us a decode" in rows[grid] and "engine" in rows[grid]
    shown = [row[0] for row in page(study).tables["plans-table"] if len(row) == 1]
    assert len(shown) == 2 and all("seed 0" in title for title in shown)


def test_what_does_not_fit_is_left_out_and_said(study, page, monkeypatch):
    from vaecirc_fast.report import page as module

    monkeypatch.setattr(module, "LIMIT", 60_000)
    found = page(study)
    assert found.problems == []
    assert "Left out to keep this page below 3 MB" in found.text
    monkeypatch.setattr(module, "DETAILED", 1)
    assert "show 1 of 2 configurations" in page(study).text


def test_metric_definitions_and_units_are_on_the_page(study, page):
    text = page(study).text
    for entry in next(iter(results(study).values()))["definitions"].values():
        assert entry["unit"] in text
    assert "mean |Δ y | / | δ |" in text or "mean |Δy| / |δ|" in text.replace("Δ y", "Δy").replace("| ", "|")


def test_the_table_and_the_summary(study):
    table = report.table(study)
    lines = table.splitlines()
    assert max(map(len, lines[:-3])) <= 105, max(lines[:-3], key=len)
    runs = [results(study)[f"digits-vae-s{seed}"] for seed in (0, 1)]
    mean = np.mean([run["metrics"]["ces_posterior"]["value"] for run in runs])
    line = next(line for line in lines if "CES, posterior" in line)
    assert_printed(line.split("]")[0].split("[")[0], mean)
    assert "Not trained, in no mean: digits-beta_vae-s1-" in table
    summary = report.summary(study)
    assert [run["trained"] for run in summary] == [True, True, True, False]
    assert json.loads(json.dumps(summary))[0]["metrics"]["mig"]["value"] == runs[0]["metrics"]["mig"]["value"]


@pytest.mark.skipif("not __import__('os').geteuid()", reason="root may write anywhere")
def test_a_directory_without_permission(study):
    study.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        report.write(study)
    study.chmod(0o700)


def circuit_rows(page):
    """The table of mediation: rows by title, change and mediator, and TE by title and change."""
    rows, effects, title, change = {}, {}, "", ""
    for row in page.tables["mediation-table"][1:]:
        if len(row) == 1:
            title = " ".join(row[0].split())
            continue
        head = " ".join(row[0].split())
        if head.startswith("TE "):
            effects[title, change] = head.removeprefix("TE ")
        elif head:
            change = head
        rows[title, change, row[1].replace(" ", "")] = row[2:]
    return rows, effects


def test_mediation_is_printed_as_the_shown_runs_have_it(circuits, page):
    rows, effects = circuit_rows(page(circuits))
    found = results(circuits)["digits-vae-s0"]["circuits"]
    title = "Digits, VAE, seed 0; 8 pairs of each change"
    for entry in found["mediation"]:
        assert_printed(effects[title, entry["variant"]], *(entry["te"][key] for key in ("value", "low", "high")))
        *latents, unit = entry["rows"]
        best = sorted(latents, key=lambda row: -row["nie_total"]["value"])[:3]
        for row, mediator in [(row, f"z{row['unit']}") for row in best] + [(unit, f"{unit['site']}[{unit['unit']}]")]:
            cells = rows[title, entry["variant"], mediator]
            for term, cell in zip(("nie_pure", "nie_total", "nde_pure", "interaction", "share"), cells, strict=True):
                if "within" not in cell and "<" not in cell and ">" not in cell:
                    assert_printed(cell, *(row[term][key] for key in ("value", "low", "high")))


def test_circuits_are_drawn_with_their_numbers(circuits, page):
    found = page(circuits)
    assert found.problems == []
    assert {"patching-digits", "mediation-digits", "graph-digits", "circuits"} <= set(found.ids)
    result = results(circuits)["digits-vae-s0"]
    for graph in (result["circuits"]["graph"], result["circuits"]["control"]):
        assert f"Q = {graph['q']:.3f}, nulls {graph['null']:.3f}" in found.text
        assert f"{max(graph['communities']) + 1} communities" in found.text
    for site in result["circuits"]["sites"]:
        assert f"{site['site']} {site['units']} units, strongest" in found.text
    row = next(row for row in found.tables["runs-table"] if row[0].startswith("VAE, seed 0"))
    for cell, name in zip(row[-3:-1], ("circuit_q", "circuit_modularity"), strict=True):
        assert_printed(cell, result["metrics"][name]["value"])
    (control,) = (row for row in found.tables["main-table"] if row[0] == "untrained control")
    for cell, name in zip(control[-2:], ("circuit_q", "circuit_modularity"), strict=True):
        assert_printed(cell, result["control"]["untrained"][name]["value"])


def test_runs_without_circuits_are_reported_without_and_beside_others(study, circuits, change, page):
    """As those of the third protocol are, which have no permuted control either."""
    change(study, "digits-*", lambda result: result["control"].pop("permuted"))
    found = page(study)
    assert found.problems == [] and "circuits" not in found.ids and "mediation-table" not in found.tables
    assert "ircuit modularity" not in found.text and "circuit" not in report.table(study).lower()
    (run,) = circuits.glob("runs/*")
    shutil.copytree(run, study / "runs" / run.name)
    mixed = page(study)
    assert mixed.problems == [] and "mediation-table" in mixed.tables
    row = next(row for row in mixed.tables["runs-table"] if row[0].startswith("β-VAE"))
    assert [cell.strip() for cell in row[-3:-1]] == ["–", "–"]


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_circuits_of_one_run_are_noted(circuits, page, damage):
    run = next(circuits.glob("runs/digits-vae-s0-*"))
    file = run / "circuits.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "gone":
        file.unlink()
    else:  # of another model
        shutil.copy(run / "pictures.safetensors", file)
    found = page(circuits)
    assert found.problems == [] and f"{run.name}: circuits.safetensors" in found.text
    assert found.text.count(f"circuits.safetensors of {run.name} cannot be read.") == 3  # the heatmap and both graphs
    assert "mediation-digits" in found.ids and "mediation-table" in found.tables  # these are in the result


@pytest.mark.parametrize("key", ["mediation", "sites", "graph", "change", "pairs"])
def test_incomplete_circuits_are_named(circuits, change, key):
    change(circuits, "digits-vae-s0-*", lambda result: result["circuits"].pop(key))
    with pytest.raises(
        InputError, match=rf"vae-s0-.*result\.json is not a result of this study \('{key}' is missing\)"
    ):
        report.table(circuits)


def test_a_model_without_a_graph_says_so(circuits, change, page):
    def collapse(result):
        result["circuits"]["graph"] = {}
        for name in ("circuit_q", "circuit_modularity"):
            result["metrics"][name]["value"] = None

    change(circuits, "digits-vae-s0-*", collapse)
    found = page(circuits)
    assert found.problems == []
    assert found.text.count("A pair of layers has no effect: there is no graph.") == 1
