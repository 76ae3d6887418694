"""Reads the finished runs of a study: checked results, and the effects and pictures that go with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import read_json
from ..errors import InputError
from ..interventions import Effects
from ..sweeps import RunStore

if TYPE_CHECKING:
    from torch import Tensor

GRIDS = ("fixed", "posterior", "resample")
_TERMS = ("nde_pure", "nde_total", "nie_pure", "nie_total", "interaction")
PICTURES = ("inputs", "reconstructions", "traversals")


@dataclass(frozen=True)
class Run:
    """One finished run: its directory, its checked `result`, and `notes`: what of its files cannot be shown and why."""

    path: Path
    result: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    unreadable: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.result["config"]

    @property
    def trained(self) -> bool:
        return self.result["trained"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def effects(self, grid: str) -> Effects | None:
        """The sweep on one grid, or None where its file is noted as missing or damaged."""
        name = f"effects-{grid}.safetensors"
        return None if name in self.unreadable else Effects.load(self.path / name)

    def circuits(self) -> dict[str, Tensor] | None:
        """Effects of patching and weights of graphs by name, or None where there is no file, or a damaged one."""
        name = "circuits.safetensors"
        if "circuits" not in self.result or name in self.unreadable:
            return None
        return _load_circuits(self.path / name, self.result["circuits"])

    def pictures(self) -> dict[str, Tensor] | None:
        """Images (n, C, H, W) uint8 by name, or None where the file is noted as missing or damaged."""
        name = "pictures.safetensors"
        return None if name in self.unreadable else _load_pictures(self.path / name, len(self.result["latents"]))


@dataclass(frozen=True)
class Study:
    """The finished runs in `directory`, by name; `latest`: the names in its last call, None if unknown; `notes`."""

    directory: Path
    runs: tuple[Run, ...]
    latest: tuple[str, ...] | None
    notes: tuple[str, ...]


def read(directory: Path) -> Study:
    """Every finished run in `directory`.

    InputError for no such directory, no finished run, or a config.json or result.json that is damaged, by its name.
    """
    if not directory.is_dir():
        raise InputError(f"report: {directory} is no directory; give the --out of a study")
    runs = [_checked_run(path, result) for path, result in RunStore(directory).results()]
    if not runs:
        raise InputError(f"report: no finished run in {directory}; `vaecirc study image --out {directory}` makes some")
    latest, notes = _latest(directory / "study.json")
    if latest is not None:
        missing = [name for name in latest if name not in {run.path.name for run in runs}]
        if missing:
            notes.append(f"Not finished, and so not in this report: {', '.join(missing)}.")
        earlier = [run.path.name for run in runs if run.path.name not in latest]
        if earlier:
            notes.append(f"Left by earlier calls of the study in this directory: {', '.join(earlier)}.")
    order = {name: n for n, name in enumerate(latest or ())}
    runs.sort(key=lambda run: (order.get(run.path.name, len(order)), run.path.name))
    return Study(directory, tuple(runs), latest, tuple(notes))


def _latest(file: Path) -> tuple[tuple[str, ...] | None, list[str]]:
    """The runs that study.json lists; a page can do without them, so a damaged one is a note."""
    if not file.exists():
        return None, []
    try:
        names = read_json(file)["runs"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("runs is no list of names")
    except (InputError, KeyError, TypeError) as error:
        return None, [f"study.json cannot be read ({type(error).__name__}): the runs of the latest call are unknown."]
    return tuple(names), []


def _checked_run(path: Path, result: dict[str, Any]) -> Run:
    try:
        _check(result)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        file = path / "result.json"
        raise InputError(
            f"{file} is not a result of this study ({what}); delete it to measure the run again"
        ) from error
    problems = {}
    for grid in GRIDS:
        name = f"effects-{grid}.safetensors"
        problems[name] = _problem(lambda file: _check_effects(Effects.load(file), result), path / name)
    name = "pictures.safetensors"
    problems[name] = _problem(lambda file: _load_pictures(file, len(result["latents"])), path / name)
    if "circuits" in result:
        name = "circuits.safetensors"
        problems[name] = _problem(lambda file: _load_circuits(file, result["circuits"]), path / name)
    problems = {name: why for name, why in problems.items() if why}
    notes = tuple(f"{name} {why}: what is drawn from it is left out." for name, why in problems.items())
    return Run(path, result, notes, frozenset(problems))


def _check(result: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError where the result lacks something that every table needs."""
    if not isinstance(result["trained"], bool):
        raise TypeError("trained is neither true nor false")
    for key in ("data", "architecture", "seed"):
        result["config"][key]
    for metrics in (result["metrics"], result["control"]["untrained"]):
        for name in result["definitions"]:
            for key in ("value", "low", "high"):
                number = metrics[name][key]
                if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                    raise TypeError(f"{name} is no number: {number!r}")
    for name, entry in result["control"].get("permuted", {}).items():  # from the fourth protocol on
        if isinstance(entry["value"], bool) or not isinstance(entry["value"], int | float):
            raise TypeError(f"permuted {name} is no number: {entry['value']!r}")
    for draws in result["replicates"].values():
        if not all(isinstance(draw, int | float) and math.isfinite(draw) for draw in draws):
            raise ValueError("replicates are not all numbers")
    for inputs in result.get("inputs", {}).values():  # from the second protocol on
        entries = [site[key] for site in inputs["sites"] for key in ("polysemanticity", "monosemantic")]
        for entry in [*entries, *inputs["isolation"]]:
            entry["value"]
        if len(inputs["latents"]["effect"]) != len(inputs["variants"]) or not inputs["variants"]:
            raise ValueError("the effects of inputs are not a row a variant")
    if "circuits" in result:  # from the fourth protocol on
        _check_circuits(result["circuits"])
    if "disentanglement" in result:
        _check_disentanglement(result["disentanglement"])
    rows = [(row, ("latent", "active")) for row in result["latents"]] + [(row, ("step",)) for row in result["history"]]
    for row, keys in rows:
        for key in keys:
            row[key]


def _check_circuits(circuits: dict[str, Any]) -> None:
    """As `_check`, of the circuits that a result may hold."""
    count = len(circuits["variants"])
    if not count or not circuits["sites"] or not isinstance(circuits["pairs"], int):
        raise ValueError("its circuits are empty")
    if len(circuits["change"]) != count or len(circuits["mediation"]) != count:
        raise ValueError("its circuits are not a row a variant")
    rows = [row for entry in circuits["mediation"] for row in entry["rows"]]
    cells = [*circuits["change"], *(entry["te"] for entry in circuits["mediation"])]
    cells += [row[term] for row in rows for term in (*_TERMS, "share")]
    missing = [key for cell in cells for key in ("value", "low", "high") if key not in cell]
    missing += [key for row in rows for key in ("site", "unit") if key not in row]
    for graph in (circuits["graph"], circuits["control"]):
        if graph:
            missing += [key for key in ("q", "null", "z", "kept") if key not in graph]
            if len(graph["communities"]) != sum(len(row["units"]) for row in graph["layers"]):
                raise ValueError("its circuit graph does not fit together")
    if missing:
        raise KeyError(missing[0])


def _check_disentanglement(found: dict[str, Any]) -> None:
    """As `_check`, of the disentanglement metrics that a result may hold."""
    for key in ("left_out", "unmoved", "images", "whole_grid"):
        found[key]
    for state in ("trained", "untrained", "permuted"):
        for name, entry in found[state].items():
            for number in (entry[key] for key in ("value", "low", "high")):
                if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                    raise TypeError(f"{state} {name} is no number: {number!r}")
            for key in ("notes", "dropped") if state != "permuted" else ("n",):
                entry[key]
    for entry in found["definitions"].values():
        for key in ("unit", "definition", "source"):
            entry[key]


def _load_circuits(file: Path, circuits: dict[str, Any]) -> dict[str, Tensor]:
    from .._tensor_files import read_tensors

    tensors, _ = read_tensors(file, "circuits", "delete it and measure again")
    for site in circuits["sites"]:
        name = f"effect {site['site']}"
        if name not in tensors or tensors[name].shape != (len(circuits["variants"]), site["units"]):
            raise ValueError(f"it has no {name} of the result's shape")
    for key in ("graph", "control"):
        layers = circuits[key].get("layers", [])
        for parent, child in zip(layers, layers[1:], strict=False):
            name = f"{key} {parent['layer']} > {child['layer']}"
            if name not in tensors or tensors[name].shape != (len(child["units"]), len(parent["units"])):
                raise ValueError(f"it has no {name} of the result's shape")
    return tensors


def _problem(load: Any, file: Path) -> str:
    """Why `file` cannot be shown, in a few words, or nothing."""
    if not file.exists():
        return "is missing"
    try:
        load(file)
    except (ValueError, KeyError, TypeError) as error:  # InputError is a ValueError
        return f"cannot be used ({str(error).replace(str(file.parent) + '/', '').split(';')[0]})"
    return ""


def _check_effects(effects: Effects, result: dict[str, Any]) -> None:
    """What a sweep sets need not be the latents: of vector-quantised codes it is the channels of all of them."""
    mean, latents = effects.mean(), len(result["latents"])
    of = effects.dims[-3] if len(effects.dims) > 2 else "nothing"
    if mean.ndim != 3 or mean.shape[2] != effects.group_weights.numel() or (of == "latent" and len(mean) != latents):
        raise ValueError(f"its tensor has shape {tuple(mean.shape)}, for {latents} latents")
    sizes = [len(effects.coords[dim]) for dim in effects.dims[-3:-1]]
    if sizes != list(mean.shape[:2]) or not mean.isfinite().all():
        raise ValueError("its numbers do not fit together")


def _load_pictures(file: Path, latents: int) -> dict[str, Tensor]:
    import torch

    from .._tensor_files import read_tensors

    pictures, _ = read_tensors(file, "pictures", "delete it and measure again")
    for name in PICTURES:
        images = pictures.get(name)
        if images is None:
            raise ValueError(f"it has no {name}")
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or not images.numel():
            raise ValueError(f"its {name} are no images (n, 1 or 3, H, W) uint8")
    if len({pictures[name].shape[1:] for name in PICTURES}) > 1 or len(pictures["traversals"]) % max(latents, 1):
        raise ValueError("its pictures do not fit together")
    return pictures
