"""The table of disentanglement metrics: numbers as in the runs, gaps explained, absent where runs have none."""

import re
import shutil

import numpy as np
import pytest
from printed import assert_printed
from scipy import stats

from vaecirc_fast import report
from vaecirc_fast.errors import InputError
from vaecirc_fast.report.words import metric_name
from vaecirc_fast.sweeps import RunStore

STATES = ("trained", "untrained", "permuted")


def results(directory):
    return {path.name.rsplit("-", 1)[0]: result for path, result in RunStore(directory).results()}


def table(page):
    """Cells by metric, six of them: both configurations, each trained, untrained and permuted."""
    rows = page.tables["disentanglement-table"]
    return {row[0].removesuffix(" nats").removesuffix(" latents"): row[1:] for row in rows if len(row) == 7 and row[0]}


def entries(result, name):
    return [result["disentanglement"][state].get(name, {"value": None}) for state in STATES]


def shows(cell, *values):
    """As `assert_printed`, where no number is too small to print."""
    if "within" not in cell and "<" not in cell and ">" not in cell:
        assert_printed(cell, *values)


def test_several_seeds_are_means_with_intervals_over_seeds(study, page):
    rows, found = table(page(study)), results(study)
    runs = [found[f"digits-vae-s{seed}"] for seed in (0, 1)]
    checked = 0
    for name in runs[0]["disentanglement"]["definitions"]:
        cells = next(cells for label, cells in rows.items() if label.startswith(metric_name(name)))
        for cell, *pair in zip(cells[:3], *(entries(run, name) for run in runs), strict=True):
            values = np.array([entry["value"] for entry in pair if entry["value"] is not None])
            if not len(values):
                assert cell.strip() == "–"
            elif np.ptp(values) > 1e-9:
                half = stats.t.ppf(0.975, 1) * values.std(ddof=1) / np.sqrt(2)
                shows(cell, values.mean(), values.mean() - half, values.mean() + half)
                checked += 1
            else:
                assert "no spread" in cell
    assert checked > 20


def test_one_seed_has_its_interval_within_the_run(study, page):
    rows, only = table(page(study)), results(study)["digits-beta_vae-s0"]
    checked = 0
    for name in only["disentanglement"]["definitions"]:
        cells = next(cells for label, cells in rows.items() if label.startswith(metric_name(name)))
        for cell, entry in zip(cells[3:], entries(only, name), strict=True):
            if entry["value"] is None:
                assert cell.strip() == "–"
            elif entry["low"] is None or np.isclose(entry["low"], entry["high"], rtol=1e-9):
                shows(cell, entry["value"])
            else:
                shows(cell, entry["value"], entry["low"], entry["high"])
                checked += 1
    assert checked > 15


def test_which_intervals_are_which_is_said(study, page):
    found = page(study)
    heads = [" ".join(cell.split()) for row in found.tables["disentanglement-table"] for cell in row if "seed" in cell]
    assert heads == ["VAE two seeds, intervals over seeds", "β-VAE (β = 4) one seed, intervals within the run"]
    assert "as their trees would have to be fitted again" in found.text
    assert "Active latents: the same under permutation" in found.text


def test_all_of_fifteen_with_definition_unit_source_and_the_reasons_of_gaps(study, page):
    found = page(study)
    definitions = results(study)["digits-vae-s0"]["disentanglement"]["definitions"]
    assert len(definitions) == len(table(found)) == 15
    for entry in definitions.values():
        assert entry["source"] in found.text and entry["unit"] in found.text
    assert "On the codes of 100 images, which are no whole factor grid" in found.text
    assert "67 training and 33 test samples" in found.text
    assert "No FactorVAE score and β-VAE score: expected two factors that vary" in found.text
    assert not re.search(r"\b(nan|NaN|None|inf)\b", found.text)


def test_factors_of_one_value_are_named(study, change, page):
    def drop(result):
        for entry in result["disentanglement"]["trained"].values():
            entry["dropped"] = ["hue"]

    change(study, "digits-vae-*", drop)
    assert "One-valued factors, left out of every metric: hue" in page(study).text


def test_a_trained_run_far_above_its_control_is_marked(study, change, page):
    def planted(result):
        for state, value in (("trained", 0.9), ("untrained", 0.1)):
            result["disentanglement"][state]["mig"]["value"] = value + 0.001 * result["config"]["seed"]

    change(study, "digits-vae-*", planted)
    rows = table(page(study))
    assert "▲" in rows["MIG"][0] and "▲" not in "".join(rows["MIG"][1:])


def test_undefined_values_are_dashes(study, change, page):
    def undefine(result):
        entry = result["disentanglement"]["trained"]["gaussian_total_correlation"]
        entry |= {"value": None, "low": None, "high": None, "notes": ["infinite: a latent repeats another"]}

    change(study, "digits-*", undefine)
    found = page(study)
    cells = table(found)["Total correlation, Gaussian"]
    assert cells[0].strip() == cells[3].strip() == "–" and cells[1].strip() != "–"
    assert "Total correlation, Gaussian: infinite: a latent repeats another" in found.text


def test_many_configurations_are_a_block_of_two_each(study, page, monkeypatch):
    from vaecirc_fast.report import disentanglement

    monkeypatch.setattr(disentanglement, "ACROSS", 1)
    found = page(study)
    rows = found.tables["disentanglement-table"]
    assert found.problems == [] and [row[0] for row in rows].count("MIG") == 2
    monkeypatch.setattr(disentanglement, "MOST", 1)
    assert "1 further configuration" in page(study).text


def test_runs_without_them_are_reported_without(study, change, page):
    """As those of an earlier protocol are; beside others too."""
    change(study, "digits-beta_vae-*", lambda result: result.pop("disentanglement"))
    mixed = page(study)
    assert mixed.problems == [] and [row[0] for row in mixed.tables["disentanglement-table"]].count("MIG") == 1
    change(study, "digits-vae-*", lambda result: result.pop("disentanglement"))
    found = page(study)
    assert found.problems == [] and "disentanglement" not in found.ids
    assert "Table 3. Polysemanticity" in found.text and "Table 4. Polysemanticity" in mixed.text
    assert report.table(study)


def test_without_a_trained_run_there_is_no_table(untrained_study, tmp_path, page):
    shutil.copytree(untrained_study, tmp_path / "study")
    assert "disentanglement-table" not in page(tmp_path / "study").tables


@pytest.mark.parametrize("key", ["trained", "permuted", "definitions", "left_out"])
def test_incomplete_ones_are_named(study, change, key):
    change(study, "digits-vae-s1-*", lambda result: result["disentanglement"].pop(key))
    with pytest.raises(
        InputError, match=rf"vae-s1-.*result\.json is not a result of this study \('{key}' is missing\)"
    ):
        report.write(study)
