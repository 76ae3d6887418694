"""The tables of the page: rows of cells that are ready to print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.statistics import Estimate
from .aggregate import Cell, Group
from .latents import ordered_latents, quantised
from .results import GRIDS, Run
from .words import NOTHING, counted, data_name, decimals, duration, interval, listed, model_name, number, plain

SIDES = {"above": "▲", "below": "▼", "overlaps": "", "unknown": ""}
ROWS = 500  # of the table of runs; beyond, the page would outgrow its limit


@dataclass(frozen=True)
class Printed:
    """A number, its interval, and a mark before the number."""

    value: str
    interval: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Block:
    """One group in the main table: its estimates, its controls and each seed's values, all by metric."""

    data: str
    label: str
    count: str
    estimates: Sequence[Printed]
    controls: Sequence[Printed]
    permuted: Sequence[Printed]
    seeds: str
    values: Sequence[str]


class Places:
    """Decimals of each metric within a data set: three digits of its greatest value; counts keep one for their mean."""

    def __init__(self, groups: Sequence[Group]):
        self._found: dict[tuple[str, str], int] = {}
        self._counts: set[tuple[str, str]] = set()
        values: dict[tuple[str, str], list[Any]] = {}
        for group in groups:
            for run in group.runs:
                for name in group.cells:
                    values.setdefault((group.data, name), []).append(run.result["metrics"][name]["value"])
        for key, found in values.items():
            if all(isinstance(value, int) for value in found):
                self._counts.add(key)
            self._found[key] = 1 if key in self._counts else decimals(found)
        self._controls = dict(self._found)
        for group in groups:
            for name, cell in group.cells.items():
                for control in (cell.control, cell.permuted):
                    if control and (group.data, name) not in self._counts:
                        places = min(decimals([control.value], 2), self._found[group.data, name] + 2)
                        self._controls[group.data, name] = max(self._controls[group.data, name], places)

    def mean(self, data: str, name: str) -> int:
        return self._found[data, name]

    def control(self, data: str, name: str) -> int:
        """Enough for two digits of the least control, which may be far below what training leads to."""
        return self._controls[data, name]

    def single(self, data: str, name: str) -> int:
        return 0 if (data, name) in self._counts else self._found[data, name]


def main_blocks(groups: Sequence[Group], names: Iterable[str], places: Places) -> list[Block]:
    names = list(names)
    blocks = []
    for group in groups:
        cells = [group.cells.get(name) for name in names]
        means = [places.mean(group.data, name) if name in group.cells else 0 for name in names]
        controls = [places.control(group.data, name) if name in group.cells else 0 for name in names]
        singles = [places.single(group.data, name) if name in group.cells else 0 for name in names]
        seeds = [run.seed for run in group.trained]
        blocks.append(
            Block(
                group.data,
                group.label,
                _trained_count(group),
                [_estimated(cell, p) for cell, p in zip(cells, means, strict=True)],
                [_controlled(cell and cell.control, p) for cell, p in zip(cells, controls, strict=True)],
                [_controlled(cell and cell.permuted, p) for cell, p in zip(cells, controls, strict=True)],
                f"seed{'s' if len(seeds) > 1 else ''} {ranged(seeds)}" if seeds else "",
                [_values(cell, p) for cell, p in zip(cells, singles, strict=True)],
            )
        )
    return blocks


def _trained_count(group: Group) -> str:
    trained, all_ = len(group.trained), len(group.runs)
    if trained == all_:
        return counted(all_, "seed")
    return "not trained" if not trained else f"{counted(trained, 'seed')}; {all_ - trained} more not trained"


def ranged(seeds: Sequence[int]) -> str:
    """ "0, 1", or "0–9" for three and more in a row."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _estimated(cell: Cell | None, places: int) -> Printed:
    if cell is None or cell.estimate is None:
        return Printed(NOTHING)
    return Printed(number(cell.estimate.value, places), bracketed(cell.estimate, places), SIDES[cell.side])


def _controlled(control: Estimate | None, places: int) -> Printed:
    if control is None:
        return Printed(NOTHING)
    return Printed(number(control.value, places), bracketed(control, places))


def bracketed(estimate: Estimate, places: int) -> str:
    """The interval; nothing for one seed, which bounds nothing; a word for equal values, whose spread is unknown."""
    if math.isinf(estimate.low):
        return ""
    if estimate.low == estimate.high:
        return "no spread"
    return interval(estimate.low, estimate.high, places)


def _values(cell: Cell | None, places: int) -> str:
    values = [value for _, value in cell.values] if cell else []
    if len(values) > 8:
        kept = [value for value in values if value is not None]
        return f"{number(min(kept), places)} … {number(max(kept), places)}" if kept else NOTHING
    return ", ".join(number(value, places) for value in values)


@dataclass(frozen=True)
class RunRow:
    name: str
    label: str
    seed: int
    trained: bool
    cells: Sequence[Printed]
    seconds: str


def run_rows(groups: Sequence[Group], names: Iterable[str], places: Places) -> list[tuple[str, list[RunRow]]]:
    """The runs of each data set, at most `ROWS` in all."""
    names = list(names)
    blocks: dict[str, list[RunRow]] = {}
    for group, run in [(g, r) for g in groups for r in g.runs][:ROWS]:
        cells = [_single(run.result["metrics"].get(name), places, group.data, name) for name in names]
        seconds = run.result.get("timing", {}).get("training_seconds")
        row = RunRow(
            run.path.name, group.label, run.seed, run.trained, cells, NOTHING if seconds is None else duration(seconds)
        )
        blocks.setdefault(group.data, []).append(row)
    return list(blocks.items())


def _single(found: Mapping[str, Any] | None, places: Places, data: str, name: str) -> Printed:
    if found is None:
        return Printed(NOTHING)
    p = places.single(data, name)
    return Printed(number(found["value"], p), interval(found["low"], found["high"], p))


@dataclass(frozen=True)
class LatentTable:
    """The latents of one run: `heads` of (name, unit), `rows` of (name, active, cells)."""

    title: str
    mark: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, bool, Sequence[Printed]]]


def latent_table(group: Group) -> LatentTable:
    """Each latent of the shown run: share, scale, the three CES and specificity, with intervals over images; of slots
    the number of codes in place of a scale, and the CES that they have."""
    run = group.shown
    by_latent = {row["latent"]: row for row in ordered_latents(run)}
    heads, columns = [], []
    for head, unit, key in _SLOTS if quantised(run) else _LATENTS:
        heads.append((head, unit))
        if key in GRIDS:
            columns.append(_ces(run, key))
        else:
            columns.append({i: _triple(row, key) for i, row in by_latent.items()})
    places = [decimals(v for v, _, _ in column.values()) for column in columns]
    rows = []
    for i in by_latent:
        cells = []
        for column, p in zip(columns, places, strict=True):
            value, low, high = column.get(i, (None, None, None))
            cells.append(Printed(number(value, p), interval(low, high, p)))
        rows.append((str(i), bool(by_latent[i]["active"]), cells))
    title = f"{group.data}, {group.label}, seed {run.seed}"
    return LatentTable(title, "" if run.trained else "not trained", heads, rows)


# Head, unit, and the key in a latent's row or the grid that a column is made from.
_LATENTS = (
    ("share", "dimensionless", "share"),
    ("scale s", "units of z", "scale"),
    ("CES, raw", "intensity per unit of z", "fixed"),
    ("CES, posterior", "intensity per posterior sd", "ces_posterior"),
    ("CES, resample", "intensity", "resample"),
    ("Specificity", "image cells", "specificity"),
)
_SLOTS = (
    ("share", "images without the most used code", "share"),
    ("codes in use", "exp(entropy)", "codes"),
    ("CES, code swap", "intensity", "ces_code_swap"),
    ("CES, nearest codes", "intensity", "ces_code_neighbour"),
    ("CES, resample", "intensity", "ces_resample"),
    ("Specificity", "image cells", "specificity"),
)


def _triple(row: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    return row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high")


def _ces(run: Run, grid: str) -> dict[int, tuple[float | None, float | None, float | None]]:
    effects = run.effects(grid)
    if effects is None or "latent" not in effects.dims:  # channels of all codes have no row in the table of latents
        return {}
    return {int(r["latent"]): (r["ces"], r["low"], r["high"]) for r in effects.ces().to_dict("records")}


def sweep_plans(groups: Iterable[Group]) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the sweeps of each group's shown run were computed: its title, then (grid, plan) of each."""
    found = []
    for group in groups:
        plans = group.shown.result.get("timing", {}).get("sweeps", {})
        if plans:
            found.append((f"{group.data}, {group.label}, seed {group.shown.seed}", list(plans.items())))
    return found


_SETTINGS = {
    "latents": "latents",
    "net": "network",
    "steps": "training steps",
    "batch_size": "images a step",
    "lr": "learning rate (Adam)",
    "precision": "precision asked for",
    "images": "images judged on, at most",
    "sweep_images": "images swept",
    "pairs": "pairs of images, input manipulation",
    "circuit_pairs": "pairs of images, circuits",
    "circuit_units": "units of a layer in the circuit graph",
    "battery": "disentanglement metrics on",
    "device": "device",
    "official": "official data files",
    "protocol": "protocol version",
}


def settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was configured: name and value, or the several values that runs have."""
    configs = [run.config for run in runs]
    seeds = sorted({run.seed for run in runs})
    rows = [
        ("data sets", listed(dict.fromkeys(data_name(c["data"]) for c in configs))),
        ("architectures", listed(dict.fromkeys(model_name(c) for c in configs))),
        ("seeds", ranged(seeds)),
    ]
    known = {"study", "data", "architecture", "options", "seed"}
    for key in dict.fromkeys(key for config in configs for key in config if key not in known):
        values = dict.fromkeys(plain(config.get(key)) for config in configs)
        rows.append((_SETTINGS.get(key, key.replace("_", " ")), " or ".join(values)))
    return rows


def machines(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Where it ran: versions, device, threads, and how long training took."""
    names = {
        "version": "vaecirc_fast",
        "torch": "torch",
        "device": "processor",
        "instruction_set": "instruction set",
        "threads": "threads",
        "precision": "precision used",
    }
    found = [run.result.get("machine", {}) for run in runs]
    rows = []
    for key in dict.fromkeys(key for machine in found for key in machine):
        values = dict.fromkeys(plain(machine.get(key)) for machine in found)
        rows.append((names.get(key, key.replace("_", " ")), " or ".join(values)))
    times = [t for run in runs if (t := run.result.get("timing", {}).get("training_seconds")) is not None]
    if times:
        each = duration(min(times)) if len(times) == 1 else f"{duration(min(times))} to {duration(max(times))}"
        rows.append(("training time", f"{each} a run, {duration(sum(times))} in all"))
    measured = [parts for run in runs if (parts := run.result.get("timing", {}).get("parts"))]
    if measured:
        whole = [parts["all"] for parts in measured]
        each = duration(min(whole)) if len(whole) == 1 else f"{duration(min(whole))} to {duration(max(whole))}"
        rows.append(("time of measuring", f"{each} a run, {duration(sum(whole))} in all"))
        most = {part: max(found.get(part, 0.0) for found in measured) for part in measured[0] if part != "all"}
        shown = [f"{part} {duration(seconds)}" for part, seconds in most.items() if seconds >= 0.05]
        rows.append(("its parts, at most", ", ".join(shown)))
    return rows
