"""Runs that differ only in their seed, put together: each metric over the trained ones, its control beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..metrics.statistics import Estimate, hierarchical_interval, t_interval
from .results import Run
from .words import architecture_name, data_name, listed, model_name, option_name, plain

Side = Literal["above", "below", "overlaps", "unknown"]


@dataclass(frozen=True)
class Cell:
    """One metric of one group: `estimate` over its trained seeds, `control` over the same networks untrained and
    `permuted` over the trained ones with permuted activations, None where no run has the metric; `values`: (seed,
    value) of each trained run; `side`: where the estimate's interval lies against the control's, "unknown" unless both
    are bounded and the estimate has a spread.
    """

    estimate: Estimate | None
    control: Estimate | None
    values: tuple[tuple[int, float | None], ...]
    side: Side
    permuted: Estimate | None = None


@dataclass(frozen=True)
class Group:
    """All runs of one configuration but for the seed. `label` tells it from the others of its data set."""

    data: str
    label: str
    runs: tuple[Run, ...]
    cells: Mapping[str, Cell]

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that the runs share, with the seed of the first."""
        return self.runs[0].config

    @property
    def architecture(self) -> str:
        return self.config["architecture"]

    @property
    def trained(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.trained)

    @property
    def shown(self) -> Run:
        """The run whose pictures stand for the group: its first trained one, else its first."""
        return (self.trained or self.runs)[0]


def groups(runs: Sequence[Run]) -> list[Group]:
    """The groups in the order of their first runs, by data set."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key != "seed"}
        by_config.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    members = [sorted(found, key=lambda run: run.seed) for found in by_config.values()]
    labels = _labels([found[0].config for found in members])
    made = [
        Group(data_name(found[0].config["data"]), label, tuple(found), _cells(found))
        for found, label in zip(members, labels, strict=True)
    ]
    order = list(dict.fromkeys(group.data for group in made))
    return sorted(made, key=lambda group: order.index(group.data))


def _labels(configs: list[Mapping[str, Any]]) -> list[str]:
    """The architecture; where several configurations of a data set share it, also the settings in which they differ."""
    labels = []
    for config in configs:
        label = model_name(config)
        rivals = [c for c in configs if c["data"] == config["data"] and model_name(c) == label]
        keys = [key for key in config if key not in ("seed", "options") and _differ(rivals, key)]
        settings = [f"{key.replace('_', ' ')} {plain(config[key])}" for key in keys]
        options, others = config.get("options", {}), [c.get("options", {}) for c in rivals]
        keys = [key for key in options if _differ(others, key)]
        settings += [f"{option_name(key)} = {plain(options[key])}" for key in keys]
        labels.append(", ".join([label, *settings]))
    return labels


def _differ(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({json.dumps(c.get(key)) for c in configs}) > 1


def _cells(runs: Sequence[Run]) -> dict[str, Cell]:
    used = [run for run in runs if run.trained]
    return {name: _cell(name, used) for name in runs[0].result["definitions"]}


def _cell(name: str, runs: Sequence[Run]) -> Cell:
    values = tuple((run.seed, run.result["metrics"][name]["value"]) for run in runs)
    kept = [run for run in runs if run.result["metrics"][name]["value"] is not None]
    found = [run.result["metrics"][name]["value"] for run in kept]
    draws = [run.result["replicates"].get(name, []) for run in kept]
    untrained = [run.result["control"]["untrained"][name]["value"] for run in runs]
    estimate = over_seeds(found, draws)
    control = over_seeds([value for value in untrained if value is not None])
    permuted = [run.result["control"].get("permuted", {}).get(name, {}).get("value") for run in runs]
    null = over_seeds([value for value in permuted if value is not None])
    return Cell(estimate, control, values, side(estimate, control), null)


def over_seeds(values: Sequence[float], draws: Sequence[Sequence[float]] = ()) -> Estimate | None:
    """The mean over seeds with its interval: hierarchical where every run has bootstrap replicates, else Student's t.

    One seed bounds nothing: its interval is (-inf, inf). No value, no estimate.
    """
    if not values:
        return None
    if draws and len({len(d) for d in draws}) == 1 and len(draws[0]) >= 20:
        return hierarchical_interval(values, [list(d) for d in draws])
    return t_interval(values)


def side(estimate: Estimate | None, control: Estimate | None) -> Side:
    """Where the estimate's interval lies against the control's, as `Cell` has it."""
    bounds = [e.low for e in (estimate, control) if e] + [e.high for e in (estimate, control) if e]
    if estimate is None or control is None or not all(map(math.isfinite, bounds)) or estimate.low == estimate.high:
        return "unknown"
    if estimate.low > control.high:
        return "above"
    return "below" if estimate.high < control.low else "overlaps"


def definitions(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Unit and definition of each metric, the first of those that runs have. Others are said with the architectures
    that have them: codes have no steps, and runs may be of different protocols.
    """
    found: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
    for run in runs:
        name_of_run = architecture_name(run.config["architecture"])
        for name, entry in run.result["definitions"].items():
            pair = (entry["unit"], entry["definition"])
            found.setdefault(name, {}).setdefault(pair, {})[name_of_run] = None
    out = {}
    for name, pairs in found.items():
        (unit, text), *others = pairs
        for other_unit, other in others:
            same = "" if other_unit == unit else f" ({other_unit or 'dimensionless'})"
            text += f"; of {listed(pairs[other_unit, other])}: {other}{same}"
        out[name] = (unit, text)
    return out
