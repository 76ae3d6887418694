"""The methods section: what was done, in sentences made from the configurations and results of the runs alone."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .architectures import OBJECTIVES, STAND_INS
from .disentanglement import KEY
from .inputs import KINDS
from .results import Run, Study
from .tables import ranged
from .words import architecture_name, counted, data_name, listed, metric_name, number, option_name, plain

NETS = {"conv": "convolutional encoder and decoder", "mlp": "fully connected encoder and decoder"}


@dataclass(frozen=True)
class Architecture:
    """A row of the table of architectures."""

    name: str
    objective: Markup
    options: str
    reference: str
    runs: str


@dataclass(frozen=True)
class Methods:
    """`parts`: heading and sentences; `architectures`; `cite`, a sentence, and `bibtex`."""

    parts: Sequence[tuple[str, Sequence[str]]]
    architectures: Sequence[Architecture]
    cite: str
    bibtex: str


def methods(study: Study, title: str) -> Methods:
    """The methods of all runs of a study. Where runs differ in a setting, it is said which have what."""
    runs = study.runs
    parts = [
        ("Data", _data(runs)),
        ("Training", _training(runs)),
        ("What was judged", _judged(runs)),
        ("Interventions", _interventions(runs)),
        ("Metrics", _metrics(runs)),
        ("Controls", _controls(runs)),
        ("Statistics", _statistics(runs)),
        ("Software", _software(runs)),
    ]
    return Methods([(name, said) for name, said in parts if said], _architectures(runs), *_citation(runs, title))


def differing(runs: Sequence[Run], value: Callable[[Run], Any], show: Callable[[Any], str] = plain) -> str:
    """A setting in words: its value, or its values and which data sets or architectures have which."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(value(run), sort_keys=True, default=str), []).append(run)
    if len(found) == 1:
        return show(value(runs[0]))
    for name, words in (("data", data_name), ("architecture", architecture_name)):
        owners = [dict.fromkeys(run.config[name] for run in members) for members in found.values()]
        if sum(map(len, owners)) == len({run.config[name] for run in runs}):
            said = [
                f"{show(value(members[0]))} for {listed(map(words, own))}"
                for members, own in zip(found.values(), owners, strict=True)
            ]
            return listed(said)
    return listed([f"{show(value(m[0]))} ({counted(len(m), 'run')})" for m in found.values()])


def _setting(runs: Sequence[Run], key: str) -> str:
    return differing(runs, lambda run: run.config.get(key))


def _data(runs: Sequence[Run]) -> list[str]:
    said = []
    for name, members in _by(runs, "data").items():
        first = members[0]
        official = {bool(run.config.get("official")) for run in members}
        about = "read from the official files" if official == {True} else STAND_INS.get(name, "")
        about = about if len(official) == 1 else "read from the official files in some runs and not in others"
        facts = first.result.get("dataset", {})
        parts = [f"{plain(facts['images'])} images"] if isinstance(facts.get("images"), int) else []
        parts += [" × ".join(map(str, facts["shape"]))] if facts.get("shape") else _size(first)
        factors = _factors(first)
        if factors:
            parts.append(
                f"{counted(len(factors), 'factor')} that vary ({listed(factors)})"
                if len(factors) > 1
                else f"one factor ({factors[0]})"
            )
        else:
            parts.append("no labelled factors")
        said.append(f"{data_name(name)}{f' ({about})' if about else ''}: {'; '.join(parts)}.")
    count = counted(len(said), "data set")
    return [f"Models were trained on {count}.", *said]


def _size(run: Run) -> list[str]:
    shown = run.pictures()
    if shown is None:
        return []
    channels, height, width = shown["inputs"].shape[1:]
    return [f"{height} × {width} pixels in {'grey' if channels == 1 else 'colour'}"]


def _factors(run: Run) -> list[str]:
    named = run.result["metrics"].get("mig", {}).get("per_factor")
    return [str(name) for name in named] if named else []


def _by(runs: Iterable[Run], key: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.config[key], []).append(run)
    return found


def _architectures(runs: Sequence[Run]) -> list[Architecture]:
    rows = []
    for name, members in _by(runs, "architecture").items():
        keys = dict.fromkeys(key for run in members for key in run.config.get("options", {}))
        options = [
            f"{option_name(key)} = {_values(members, lambda run, key=key: run.config.get('options', {}).get(key))}"
            for key in keys
        ]
        objective, reference = OBJECTIVES.get(name, (Markup("as its documentation says"), "–"))
        rows.append(
            Architecture(
                architecture_name(name),
                objective,
                "; ".join(options) or ("none" if name == "vae" else "its defaults"),
                reference,
                str(len(members)),
            )
        )
    return rows


def _values(runs: Sequence[Run], value: Callable[[Run], Any]) -> str:
    return " or ".join(dict.fromkeys(plain(value(run)) for run in runs))


def _training(runs: Sequence[Run]) -> list[str]:
    seeds = sorted({run.seed for run in runs})
    nets = differing(runs, lambda run: run.config.get("net"), lambda net: NETS.get(str(net), plain(net)))
    said = [
        f"{counted(len(runs), 'model').capitalize()} with {_setting(runs, 'latents')} latents "
        f"({nets}) {'was' if len(runs) == 1 else 'were'} trained, seed{'s' * (len(seeds) > 1)} {ranged(seeds)}.",
        f"Each was trained for {_setting(runs, 'steps')} steps on batches of {_setting(runs, 'batch_size')} images "
        f"with "
        f"Adam at a learning rate of {_setting(runs, 'lr')}; the seed determined the initial weights and the batches.",
    ]
    likelihoods = {run.config.get("likelihood") for run in runs} - {None}
    if likelihoods:
        said.append(f"The likelihood of a pixel was {_setting(runs, 'likelihood')}.")
    if any("width" in run.config for run in runs):
        said.append(f"The networks' width was {_setting(runs, 'width')} times the reference.")
    precisions = differing(runs, lambda run: run.result.get("machine", {}).get("precision"))
    if precisions != "–":
        said.append(f"Forward and backward passes ran in {precisions}.")
    return said


def _judged(runs: Sequence[Run]) -> list[str]:
    def count(metric: str) -> str:
        return differing(runs, lambda run: run.result["metrics"].get(metric, {}).get("n"))

    failed = [run for run in runs if not run.trained]
    return [
        f"Every model, and its twin before training, was judged on the same {count('reconstruction')} images of its "
        f"data "
        f"set; latents were swept on {count('ces_posterior')} of them.",
        "A model counted as trained if its reconstruction loss lay at most half way from the least possible to that of "
        "drawing the mean image, and if at least three of its latents were active. "
        + (
            f"{counted(len(failed), 'run').capitalize()} did not and took part in no mean and no finding."
            if failed
            else "All did."
        ),
    ]


def _interventions(runs: Sequence[Run]) -> list[str]:
    said = []
    manipulated = [run for run in runs if "inputs" in run.result]
    if manipulated:
        kinds = dict.fromkeys(run.result["inputs"]["trained"]["kind"] for run in manipulated)
        pairs = differing(manipulated, lambda run: run.result["inputs"]["trained"]["pairs"])
        what = "; for other data, ".join(
            KINDS.get(kind, ("", "one thing in the image is changed"))[1] for kind in kinds
        )
        said.append(
            f"Level 1, input manipulation: {pairs} pairs of images in which {what}; the effect on a unit of the "
            f"encoder "
            "is its mean absolute change in standard deviations over the unchanged images."
        )
    grids = [f"{words} {_steps(runs, grid)}" for grid, words in _GRIDS if _steps(runs, grid)]
    said.append(
        "Level 2, latent perturbation: each latent was set by itself, the others kept, to its mean plus "
        f"{', and plus '.join(grids)}; and to its value for another image. The effect is |Δy|, averaged over the "
        f"pixels "
        "of a cell of the image."
        if grids
        else "Level 2, latent perturbation: each latent was set by itself, the others kept."
    )
    patched = [run for run in runs if "circuits" in run.result]
    if patched:
        pairs = differing(patched, lambda run: run.result["circuits"]["pairs"])
        sites = differing(patched, lambda run: len(run.result["circuits"]["sites"]))
        units = differing(patched, lambda run: sum(site["units"] for site in run.result["circuits"]["sites"]))
        said.append(
            f"Level 3, activation patching: at {sites} sites, every one of {units} units took by itself the value of "
            f"the "
            f"changed image's run, on {pairs} pairs a change, and all that follows was computed again."
        )
        said.append(
            f"Level 4, causal mediation: on {pairs} pairs of each change, through the mean of each active latent and "
            f"the "
            "decoder's strongest unit, chosen on other pairs."
        )
        graphs = [run for run in patched if run.result["circuits"]["graph"]]
        if graphs:
            nulls = differing(graphs, lambda run: run.result["circuits"]["graph"]["nulls"])
            kept = _setting(graphs, "circuit_units")
            said.append(
                f"Circuit graphs held the latents, {kept} units of each layer and the cells of the image; edges are "
                f"direct "
                f"effects. Their modularity is that of the best Louvain partition less the mean of {nulls} graphs "
                f"whose "
                "weights were permuted within layers."
            )
    if any("recovered" in run.result for run in runs):
        members = [run for run in runs if "recovered" in run.result]
        images = differing(
            members, lambda run: run.result["recovered"].get("trained", run.result["recovered"])["images"]
        )
        said.append(
            f"On data with a known causal graph, that graph was recovered from interventions on {images} images a "
            f"cause, "
            "at the data and at the latents, and scored against the truth."
        )
    return said


_GRIDS = (("fixed", "raw steps of"), ("posterior", "multiples of its posterior standard deviation,"))


def _steps(runs: Sequence[Run], grid: str) -> str:
    """The steps of the sweeps on a grid, as their files have them; nothing where no file is whole."""
    found: dict[str, None] = {}
    for run in {run.config["data"] + run.config["architecture"]: run for run in runs}.values():
        effects = run.effects(grid)
        if effects is not None:
            steps = sorted(float(step) for step in effects.coords["step"])
            sizes = [abs(step) for step in steps if step > 0]
            even = [-size for size in reversed(sizes)] == [step for step in steps if step < 0]
            found[listed([f"±{size:g}" for size in sizes] if even else [f"{step:g}" for step in steps])] = None
    return " or ".join(found)


def _metrics(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.result["definitions"])
    said = [f"Of every model these were computed, as defined above: {'; '.join(map(metric_name, names))}."]
    measured = [run for run in runs if KEY in run.result]
    if measured:
        names = dict.fromkeys(name for run in measured for name in run.result[KEY]["definitions"])
        images = differing(measured, lambda run: run.result[KEY]["images"])
        grid = differing(
            measured,
            lambda run: bool(run.result[KEY]["whole_grid"]),
            lambda whole: "the whole factor grid" if whole else "a sample, not the whole factor grid",
        )
        said.append(
            f"{counted(len(names), 'disentanglement metric').capitalize()} were computed on the encoder's means for "
            f"{images} images ({grid}), as defined under their table."
        )
    return said


def _controls(runs: Sequence[Run]) -> list[str]:
    said = [
        "Each model's twin, the same network with the same initial weights before its first step, was measured alike."
    ]
    draws = {entry["n"] for run in runs for entry in run.result["control"].get("permuted", {}).values() if "n" in entry}
    if draws:
        words = " or ".join(counted(n, "permutation") for n in sorted(draws))
        said.append(f"Permuted controls are means of {words} of the trained model's codes or effects.")
    return said


def _statistics(runs: Sequence[Run]) -> list[str]:
    draws = {len(values) for run in runs for values in run.result["replicates"].values()}
    said = [
        "Intervals are of 95 %. Over seeds they are Student's t intervals or, where every run has replicates of its "
        "images, "
        "hierarchical ones; the seed is the unit of replication."
    ]
    if draws:
        words = " or ".join(number(count, 0) for count in sorted(draws))
        said.append(f"Within a run they are Poisson bootstrap intervals of {words} replicates over its images.")
    return said


def _software(runs: Sequence[Run]) -> list[str]:
    def has(key: str) -> str:
        return differing(runs, lambda run: run.result.get("machine", {}).get(key))

    threads = has("threads")
    return [
        f"The runs were made with vaecirc_fast {has('version')} and torch {has('torch')} on {has('device')}"
        f"{'' if threads == '–' else f' with {threads} threads' if threads != '1' else ' with one thread'}; their "
        f"protocol is version {_setting(runs, 'protocol')}. They ended {_dates(runs)}."
    ]


def _days(runs: Sequence[Run]) -> list[datetime.date]:
    """The days (UTC) of the runs' result files."""
    stamps = [(run.path / "result.json").stat().st_mtime for run in runs]
    return sorted({datetime.datetime.fromtimestamp(stamp, datetime.UTC).date() for stamp in stamps})


def _dates(runs: Sequence[Run]) -> str:
    days = _days(runs)
    return f"on {days[0]}" if len(days) == 1 else f"from {days[0]} to {days[-1]}"


def _citation(runs: Sequence[Run], title: str) -> tuple[str, str]:
    """A sentence to cite the report by, and an entry for BibTeX; no author, as files do not say who ran the study."""
    versions = listed(sorted({plain(run.result.get("machine", {}).get("version")) for run in runs}))
    last = _days(runs)[-1]
    count, dates = counted(len(runs), "run"), _dates(runs).removeprefix("on ")
    cite = f"{title}. Report of an image study, {count}, {dates}. Made with vaecirc_fast {versions}."
    entry = [
        f"@misc{{vaecirc_image_study_{last.year},",
        f"  title        = {{{_tex(title)}}},",
        f"  year         = {{{last.year}}},",
        f"  month        = {{{last.month}}},",
        f"  howpublished = {{Report of an image study made with vaecirc\\_fast {_tex(versions)}}},",
        f"  note         = {{{_tex(count[0].upper() + count[1:])}, {dates}}}",
        "}",
    ]
    return cite, "\n".join(entry)


def _tex(words: str) -> str:
    """Words for TeX: special characters escaped, Greek letters as mathematics."""
    words = re.sub(r"([&%$#_{}])", r"\\\1", words)
    return words.replace("β", r"$\beta$").replace("γ", r"$\gamma$").replace("λ", r"$\lambda$")
