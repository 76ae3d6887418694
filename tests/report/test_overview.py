"""The page of many configurations: its overview, its tables by data set and architecture, what it leaves out."""

import json
import re

import numpy as np
import pytest
from printed import assert_printed
from scipy import stats

from vaecirc_fast import report
from vaecirc_fast.report import aggregate, overview, results
from vaecirc_fast.report import page as pages
from vaecirc_fast.sweeps import RunStore

KINDS = ["VAE", "β-VAE (β = 4)", "FactorVAE (γ = 10)", "DIP-VAE-II (λ_od = 10, λ_d = 10)"]


def read(directory):
    return aggregate.groups(results.read(directory).runs)


def found(directory):
    return {path.name.rsplit("-", 1)[0]: result for path, result in RunStore(directory).results()}


def names(kind):
    return {"VAE": "vae", "β": "beta_vae", "F": "factor_vae", "D": "dip_vae_ii"}[kind if kind == "VAE" else kind[0]]


def test_each_metric_is_a_table_of_architectures_by_data_sets(many):
    shown = overview.overview(read(many))
    sheets = {sheet.title: sheet for sheet in shown.metrics}
    assert {"CES, posterior", "DCI disentanglement", "Specificity (image cells)"} <= sheets.keys()
    of = found(many)
    for title, key in (("CES, posterior", "ces_posterior"), ("Reconstruction", "reconstruction")):
        sheet = sheets[title]
        assert list(sheet.heads) == ["NORB-like", "Faces-like"]
        assert [name for name, _, _ in sheet.rows] == KINDS
        for name, _, boxes in sheet.rows:
            for box, data in zip(boxes, ("norb_like", "faces_like"), strict=True):
                run = of[f"{data}-{names(name)}-s0"]
                entry = run["metrics"][key]
                assert_printed(box.value, entry["value"])
                control = run["control"]["untrained"][key]
                assert_printed(box.control, *(control[end] for end in ("value", "low", "high")))
                assert (box.flag == "not trained") == (not run["trained"])
                if run["trained"]:
                    assert_printed(box.interval, entry["low"], entry["high"])
                else:
                    assert box.interval == "" and box.shade == 0


def test_the_shade_is_the_share_of_the_greatest_in_its_column(many):
    sheet = next(s for s in overview.overview(read(many)).metrics if s.title == "DCI disentanglement")
    shades = np.array([[box.shade for box in boxes] for _, _, boxes in sheet.rows])
    values = np.array([[float(box.value) for box in boxes] for _, _, boxes in sheet.rows])
    trained = np.array([[not box.flag for box in boxes] for _, _, boxes in sheet.rows])
    top = np.where(trained, values, 0).max(0)
    assert np.array_equal(shades, np.where(trained, np.round(5 * values / top), 0))


def test_over_seeds_the_mean_has_a_t_interval_and_a_mark(study):
    group = next(group for group in read(study) if group.architecture == "vae")
    reading = overview.reading(group, "dci_completeness")
    runs = [result for name, result in found(study).items() if name.startswith("digits-vae")]
    values = np.array([run["disentanglement"]["trained"]["dci_completeness"]["value"] for run in runs])
    half = stats.t.ppf(0.975, 1) * values.std(ddof=1) / np.sqrt(2)
    assert not reading.within and reading.trained
    assert reading.estimate.value == pytest.approx(values.mean())
    assert (reading.estimate.low, reading.estimate.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert overview.reading(group, "no such metric") is None


def test_tables_by_data_set_and_by_architecture_hold_the_same_numbers(many):
    shown = overview.overview(read(many))
    by_data = {
        (sheet.title, head, name): boxes[n].value
        for sheet in shown.data
        for name, _, boxes in sheet.rows
        for n, head in enumerate(sheet.heads)
    }
    by_kind = {
        (head, sheet.title, name): boxes[n].value
        for sheet in shown.architectures
        for name, _, boxes in sheet.rows
        for n, head in enumerate(sheet.heads)
    }
    assert by_data == by_kind and len({data for data, _, _ in by_data}) == 2 and len({k for _, k, _ in by_data}) == 4


def test_one_configuration_has_no_overview_and_many_variants_are_reduced(many, add_run):
    assert overview.overview(read(many)[:1]) is None
    source = next(many.glob("runs/norb_like-vae-*"))
    for latents in (4, 6, 16, 20, 24):
        add_run(many, source, "norb_like-vae-s0", latents=latents)
    add_run(many, source, "norb_like-vae-s1", seed=1)  # so that ten latents has the most seeds
    groups = read(many)
    shown = overview.overview(groups)
    assert shown.reduced
    (vae,) = (group for group in overview.base(groups) if group.architecture == "vae" and group.data == "NORB-like")
    assert vae.config["latents"] == 10 and len(vae.runs) == 2
    assert [name for name, _, _ in shown.metrics[0].rows] == KINDS


def test_the_page_shows_every_architecture_first(many, add_run, page, monkeypatch):
    source = next(many.glob("runs/norb_like-vae-*"))
    for latents in (4, 6):
        add_run(many, source, "norb_like-vae-s0", latents=latents)
    chosen = pages._chosen(read(many))
    assert len(chosen) == 10
    monkeypatch.setattr(pages, "DETAILED", 8)
    monkeypatch.setattr(pages, "FEW", 2)
    chosen = pages._chosen(read(many))
    assert sorted((g.config["data"], g.architecture) for g in chosen) == sorted(
        (data, kind) for data in ("norb_like", "faces_like") for kind in ("vae", "beta_vae", "factor_vae", "dip_vae_ii")
    )
    whole = page(many)
    assert whole.problems == [] and "show 8 of 10 configurations" in whole.text
    assert {"overview", "all", "methods", "ces-dci", "capacity"} <= set(whole.ids)
    assert len(set(whole.ids)) == len(whole.ids)
    words = re.sub(r"<svg.*?</svg>|<pre.*?</pre>|<[^>]*>", "", whole.source.replace("λ<sub>", "λ"), flags=re.DOTALL)
    assert "λod = 10" in words and "λ_" not in words


def test_reconstructions_stand_together_where_all_saw_the_same_images(many, page):
    source = page(many).source
    figure = source[source.index('id="reconstructions-norb-like"') :]
    figure = figure[: figure.index("</figure>")]
    assert figure.count("<image") == 1 and all(kind.split(" ")[0] in figure for kind in KINDS)


def test_the_table_of_the_terminal_has_a_line_a_configuration(many):
    table = report.table(many)
    lines = [line for line in table.splitlines() if line.startswith(("VAE", "β-VAE", "FactorVAE", "DIP-VAE"))]
    assert len(lines) == 8 and max(map(len, table.splitlines())) <= 120
    assert sum("not trained" in line for line in lines) == 1
    entry = found(many)["norb_like-vae-s0"]["metrics"]["ces_posterior"]
    assert_printed(" ".join(lines[0].split()[1:4]), *(entry[key] for key in ("value", "low", "high")))


def test_the_summary_has_the_disentanglement_metrics(many):
    summary = json.loads(json.dumps(report.summary(many)))
    assert len(summary) == 8
    for run in summary:
        for state in ("trained", "untrained", "permuted"):
            assert run["disentanglement"][state]
