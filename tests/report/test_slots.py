"""Runs whose latents are slots of codes: no steps of a latent, sweeps over channels, and metrics of their own."""

import dataclasses
import json

import pytest
import torch
from printed import assert_printed

from vaecirc_fast.interventions import Effects
from vaecirc_fast.sweeps import RunStore

CHANNELS = 3


def slotted(result):
    """As `studies` writes it of a VQ-VAE."""
    for row in result["latents"]:
        for key in ("ces_posterior", "ces_posterior_low", "ces_posterior_high", "scale"):
            row.pop(key, None)
        value = 0.01 * (1 + row["latent"])
        for name in ("ces_resample", "ces_code_swap", "ces_code_neighbour"):
            row |= {name: value, f"{name}_low": 0.9 * value, f"{name}_high": 1.1 * value}
        row |= {"entropy": 0.5, "codes": 1.65}
    result["definitions"]["ces_posterior"] = {"unit": "intensity per sd of z_e", "definition": "channels moved"}
    result["definitions"]["ces_code_swap"] = {"unit": "intensity", "definition": "another code"}
    for metrics in (result["metrics"], result["control"]["untrained"]):
        metrics["ces_code_swap"] = dict(metrics["ces_resample"])
    for row in result["history"]:
        row.pop("kl", None)


@pytest.fixture
def slots(many, add_run):
    """The study with a VQ-VAE beside the others."""
    source = next(many.glob("runs/norb_like-vae-*"))
    options = {"codes": 512, "code_width": CHANNELS}
    name = "norb_like-vq_vae-s0"
    path = add_run(many, source, name, slotted, architecture="vq_vae", options=options)
    for grid in ("fixed", "posterior"):
        effects = Effects.load(path / f"effects-{grid}.safetensors")
        of_channels = {"tensor": effects.tensor[:CHANNELS], "step_size": effects.step_size[:CHANNELS]}
        of_channels |= {"replicates": effects.replicates[:, :CHANNELS], "dims": ("channel", "step", "group")}
        of_channels["step_replicates"] = effects.step_replicates[:, :CHANNELS]
        of_channels["coords"] = {"channel": list(range(CHANNELS)), **dict(list(effects.coords.items())[1:])}
        dataclasses.replace(effects, **of_channels).save(path / f"effects-{grid}.safetensors")
    return many


def test_channels_are_no_damage_and_slots_have_their_own_numbers(slots, page):
    whole = page(slots)
    assert whole.problems == [] and "cannot be used" not in whole.text and "NaN" not in whole.text
    assert "Latents that are slots" in whole.text
    for words in ("channel 0", "step t of a channel, sd of z_e", "intensity (code of another image)", "codes in use"):
        assert words in whole.text, words
    table = next(rows for rows in whole.tables.values() if len(rows[0]) == 7 and "codes in use" in rows[0][2])
    order = [row[0] for row in table[1:]]
    run = next(result for path, result in RunStore(slots).results() if path.name.startswith("norb_like-vq_vae"))
    latents = sorted(run["latents"], key=lambda row: -row["ces_resample"])
    assert [name.split()[0] for name in order] == [f"z{row['latent']}" for row in latents]
    for row, cells in zip(latents, table[1:], strict=True):
        assert_printed(cells[3], *(row[f"ces_code_swap{end}"] for end in ("", "_low", "_high")))
    assert "VQ-VAE: intensity per sd of z_e" in whole.text  # where its unit differs from the others'
    assert "of VQ-VAE: channels moved" in whole.text


def test_sweeps_that_do_not_fit_together_are_damage(slots, page):
    (path,) = slots.glob("runs/norb_like-vq_vae-*")
    effects = Effects.load(path / "effects-posterior.safetensors")
    coords = {**effects.coords, "channel": [0]}
    dataclasses.replace(effects, coords=coords).save(path / "effects-posterior.safetensors")
    assert f"{path.name}: effects-posterior.safetensors cannot be used" in page(slots).text
    dataclasses.replace(effects, tensor=torch.full_like(effects.tensor, torch.nan)).save(
        path / "effects-posterior.safetensors"
    )
    assert "its numbers do not fit together" in page(slots).text


def test_the_divergence_is_drawn_of_those_that_have_one(slots, page):
    source = page(slots).source
    figure = source[source.index('id="training"') :]
    figure = figure[: figure.index("</figure>")]
    assert "NORB-like: reconstruction loss" in figure and "NORB-like: Kullback–Leibler divergence" in figure
    assert json.loads(next(slots.glob("runs/norb_like-vq_vae-*/config.json")).read_text())["architecture"] == "vq_vae"
