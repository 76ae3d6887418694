"""The methods are made of the runs' own configurations, and say where runs differ."""

import datetime
import os
import re

import pytest

from vaecirc_fast.report import methods, results
from vaecirc_fast.report.architectures import OBJECTIVES


def said(directory, title="Title"):
    found = methods.methods(results.read(directory), title)
    return found, {name: " ".join(sentences) for name, sentences in found.parts}


def test_every_number_is_that_of_the_runs(many):
    _, parts = said(many)
    assert "for 20 steps on batches of 64 images with Adam at a learning rate of 0.001" in parts["Training"]
    assert "Eight models with 10 latents" in parts["Training"] and "seed 0" in parts["Training"]
    assert "on the same 100 images" in parts["What was judged"] and "swept on 8 of them" in parts["What was judged"]
    assert "One run did not and took part in no mean" in parts["What was judged"]
    assert "±0.6, ±1.2, ±1.8, ±2.4 and ±3" in parts["Interventions"]
    assert "±0.5, ±1, ±1.5 and ±2" in parts["Interventions"]
    assert "8 pairs of images" in parts["Interventions"] and "Level 3" not in parts["Interventions"]
    draws = {len(v) for run in results.read(many).runs for v in run.result["replicates"].values()}
    assert len(draws) == 1 and f"{draws.pop()} replicates" in parts["Statistics"]
    assert "two data sets" in parts["Data"] and "NORB-like (rendered objects" in parts["Data"]
    assert "is not that data set" in parts["Data"] and "one factor (digit)" in parts["Data"]


def test_settings_that_differ_are_said_with_what_has_them(many, add_run, change):
    change(many, "faces_like-*", lambda r: r["metrics"]["reconstruction"].update(n=90))
    _, parts = said(many)
    assert "the same 100 for NORB-like and 90 for Faces-like images" in parts["What was judged"]
    source = next(many.glob("runs/norb_like-vae-*"))
    add_run(many, source, "norb_like-vae-s1", seed=1, steps=40, official=True)
    _, parts = said(many)
    assert re.search(r"for 20 \(eight runs\) and 40 \(one run\) steps", parts["Training"])
    assert "seeds 0, 1" in parts["Training"]
    assert "read from the official files in some runs and not in others" in parts["Data"]


def test_architectures_have_objective_options_and_reference(many):
    found, _ = said(many)
    rows = {row.name: row for row in found.architectures}
    assert list(rows) == ["VAE", "β-VAE", "FactorVAE", "DIP-VAE-II"]
    assert rows["FactorVAE"].options == "γ = 10; hidden = 1,000" and "1802.05983" in rows["FactorVAE"].reference
    assert rows["VAE"].options == "none" and rows["VAE"].runs == "2"
    assert "λ" in rows["DIP-VAE-II"].objective


def test_every_architecture_of_the_project_is_known():
    from vaecirc_fast import models

    assert set(models.names()) <= set(OBJECTIVES)


def test_the_reference_to_the_report(many):
    day = datetime.datetime(2026, 3, 4, 12, tzinfo=datetime.UTC).timestamp()
    for n, file in enumerate(sorted(many.glob("runs/*/result.json"))):
        os.utime(file, (day, day + 86_400 * (n == 0)))
    found, parts = said(many, "Effects of β & more_things")
    assert "from 2026-03-04 to 2026-03-05" in parts["Software"]
    assert found.cite.startswith("Effects of β & more_things. Report of an image study, eight runs, from 2026-03-04")
    assert r"{Effects of $\beta$ \& more\_things}" in found.bibtex
    assert found.bibtex.count("{") == found.bibtex.count("}") and "year         = {2026}" in found.bibtex


def test_the_section_is_on_the_page(many, page):
    whole = page(many)
    assert "methods" in whole.ids and "bibtex" in whole.ids
    assert [row[0] for row in whole.tables["architectures"][1:]] == ["VAE", "β-VAE", "FactorVAE", "DIP-VAE-II"]
    assert "\n  title        = {Causal effects of latents: NORB-like and Faces-like}," in whole.source


@pytest.mark.parametrize("key", ["machine", "timing"])
def test_runs_without_facts_on_the_machine_still_have_methods(many, change, key):
    change(many, "*", lambda result: result.pop(key))
    found, _ = said(many)
    assert "vaecirc_fast" in found.cite
