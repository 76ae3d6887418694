"""Figures that relate runs to each other: effect against disentanglement, and metrics against capacity and strength."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import charts
from .aggregate import Group
from .charts import COLOURS, Mark
from .disentanglement import KEY
from .figures import Figure, Panel
from .overview import reading
from .results import Run
from .words import architecture_name, listed, metric_name, option_name, plain

GREY = "#9a9a9a"
UNIT = "intensity per posterior sd"
METRICS = ("ces_posterior", "dci_disentanglement", "mig")


def styles(groups: Sequence[Group]) -> dict[str, tuple[str, int]]:
    """Colour and shape of each architecture, the same on the whole page."""
    kinds = list(dict.fromkeys(group.architecture for group in groups))
    return {kind: (COLOURS[n % len(COLOURS)], n % charts.SHAPES) for n, kind in enumerate(kinds)}


def effect_against_disentanglement(
    groups: Sequence[Group], looks: Mapping[str, tuple[str, int]], remarks: Mapping[str, Sequence[str]]
) -> Figure | None:
    """Posterior CES against DCI disentanglement, a panel a data set, a point a run; None where no run has both.

    remarks: lines under the panel of a data set, by its name, as the correlation within it.
    """
    panels, kinds, hollow = [], {}, False
    for data in dict.fromkeys(group.data for group in groups):
        marks, constant = [], False
        for group in (g for g in groups if g.data == data):
            colour, shape = looks[group.architecture]
            for run in group.runs:
                for state in ("untrained", "trained"):
                    x, y = _value(run, state, "dci_disentanglement"), _value(run, state, "ces_posterior")
                    if x is None or y is None:
                        continue
                    constant = constant or _whatever(run)
                    name = f"{group.label}, seed {run.seed}" + (" before training" if state == "untrained" else "")
                    if state == "untrained":
                        marks.append(Mark(x, y, GREY, shape, small=True, name=name))
                        continue
                    hollow = hollow or not run.trained
                    kinds[group.architecture] = None
                    marks.append(Mark(x, y, colour, shape, hollow=not run.trained, name=name))
        if not marks:
            continue
        if constant:
            missing = "One factor: DCI disentanglement is 1 whatever the codes, so there is nothing to relate."
            panels.append(Panel(data, missing=missing))
            continue
        x_label, y_label = "DCI disentanglement", f"CES, {UNIT}"
        what = f"{data}: posterior CES against DCI disentanglement of {len(marks)} networks"
        panels.append(Panel(data, charts.points(marks, x_label, y_label, what, remarks.get(data, ()))))
    if not any(panel.drawing for panel in panels):
        return None
    entries = [(Mark(0, 0, *looks[kind]), architecture_name(kind)) for kind in kinds]
    entries += [(Mark(0, 0, "#444", 0, hollow=True), "not trained")] if hollow else []
    entries.append((Mark(0, 0, GREY, 0, small=True), "the same networks before training"))
    panels.append(Panel("Key", charts.marks_key(entries)))
    caption = (
        Markup(
            "Posterior CES, the mean over all latents, against DCI disentanglement. A point is a run; grey: the same "
            "network "
            "before training, with its architecture's shape. Hollow: not trained, and in no correlation."
        )
        + _units(groups)
        + (" Under a panel: the correlation within its data set, as under Findings." if remarks else "")
    )
    return Figure("ces-dci", "Effect against disentanglement.", caption, tuple(panels), narrow=True)


def _units(groups: Sequence[Group]) -> str:
    """Who has another unit of posterior CES than the axis says."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        unit = group.runs[0].result["definitions"].get("ces_posterior", {}).get("unit", UNIT)
        if unit != UNIT:
            found.setdefault(unit, {})[architecture_name(group.architecture)] = None
    return "".join(f" Of {listed(names)} in {unit}." for unit, names in found.items())


def _value(run: Run, state: str, metric: str) -> float | None:
    main = run.result["metrics"] if state == "trained" else run.result["control"][state]
    for found in (run.result.get(KEY, {}).get(state, {}), main):
        if metric in found:
            return found[metric]["value"]
    return None


def _whatever(run: Run) -> bool:
    """Whether DCI disentanglement is 1 by definition, as for one factor."""
    return len(run.result.get(KEY, {}).get("trained", {}).get("dci_disentanglement", {}).get("notes", ())) > 0 and any(
        "whatever the codes" in note for note in run.result[KEY]["trained"]["dci_disentanglement"]["notes"]
    )


def capacity(groups: Sequence[Group], looks: Mapping[str, tuple[str, int]]) -> Figure | None:
    """Metrics against the number of latents, where configurations differ in nothing else; None where none do."""
    families = _families(groups, lambda config: {k: v for k, v in config.items() if k != "latents"})
    lines: dict[str, list[list[tuple[float, Group]]]] = {}
    for members in families:
        if len({group.config.get("latents") for group in members}) > 1:
            lines.setdefault(members[0].data, []).append([(float(g.config["latents"]), g) for g in members])
    factors = {data: _factors(rows[0][0][1]) for data, rows in lines.items()}
    panels, kinds = _panels(lines, looks, lambda data: "latents L", at=factors)
    if not panels:
        return None
    panels.append(
        Panel("Key", charts.marks_key([(Mark(0, 0, *looks[kind]), architecture_name(kind)) for kind in kinds]))
    )
    said = "; ".join(f"{data}: {count}" for data, count in factors.items() if count)
    caption = Markup(
        "Configurations that differ only in the number of latents <i>L</i>: means over trained seeds, or the one "
        "trained "
        "run; whiskers: 95&nbsp;% intervals, over seeds or, of one seed, within the run."
    ) + (f" Upright line: as many latents as factors that vary ({said})." if said else "")
    return Figure("capacity", "Metrics against the number of latents.", caption, tuple(panels), narrow=True)


def strength(groups: Sequence[Group], looks: Mapping[str, tuple[str, int]]) -> Figure | None:
    """Metrics against an option, where configurations of one architecture differ in it alone; None where none do."""
    panels, kinds = [], {}
    options = list(dict.fromkeys(key for group in groups for key in group.config.get("options", {})))
    for option in options:
        lines: dict[str, list[list[tuple[float, Group]]]] = {}
        for members in _families(groups, lambda config, option=option: _without(config, option)):
            found = [(g.config.get("options", {}).get(option), g) for g in members]
            rows = [(float(v), g) for v, g in found if isinstance(v, int | float) and not isinstance(v, bool)]
            if len({value for value, _ in rows}) > 1:
                lines.setdefault(members[0].data, []).append(rows)
        made, shown = _panels(lines, looks, lambda data, option=option: option_name(option), log=True)
        panels += made
        kinds |= shown
    if not panels:
        return None
    panels.append(
        Panel("Key", charts.marks_key([(Mark(0, 0, *looks[kind]), architecture_name(kind)) for kind in kinds]))
    )
    caption = Markup(
        "Configurations of one architecture that differ only in one option, on a logarithmic axis: means over trained "
        "seeds, or the one trained run; whiskers as in the figure before."
    )
    return Figure("strength", "Metrics against an architecture's option.", caption, tuple(panels), narrow=True)


def _families(groups: Sequence[Group], rest: Any) -> list[list[Group]]:
    """Groups that are alike in `rest` of their configuration and the data set."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        settings = {key: value for key, value in rest(group.config).items() if key != "seed"}
        found.setdefault(json.dumps(settings, sort_keys=True), []).append(group)
    return list(found.values())


def _without(config: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {**config, "options": {k: v for k, v in config.get("options", {}).items() if k != option}}


def _panels(
    lines: Mapping[str, Sequence[Sequence[tuple[float, Group]]]],
    looks: Mapping[str, tuple[str, int]],
    x_label: Any,
    at: Mapping[str, int] | None = None,
    log: bool = False,
) -> tuple[list[Panel], dict[str, None]]:
    panels, kinds = [], {}
    for data, families in lines.items():
        for metric in METRICS:
            rows = []
            for family in families:
                colour, shape = looks[family[0][1].architecture]
                row = [mark for x, group in family if (mark := _of(group, metric, x, colour, shape))]
                if len({mark.x for mark in row}) > 1:
                    rows.append(row)
                    kinds[family[0][1].architecture] = None
            if rows:
                title = f"{data}: {metric_name(metric)}"
                unit = UNIT if metric == "ces_posterior" else "dimensionless"
                where = float(at[data]) if at and at.get(data) else None
                panels.append(Panel(title, charts.ladders(rows, x_label(data), unit, title, where, log)))
    return panels, kinds


def _of(group: Group, metric: str, x: float, colour: str, shape: int) -> Mark | None:
    found = reading(group, metric)
    if found is None or not found.trained:
        return None
    e = found.estimate
    bounds = (e.low, e.high) if math.isfinite(e.low) and math.isfinite(e.high) else (None, None)
    return Mark(x, e.value, colour, shape, name=f"{group.label}: {plain(e.value)}", low=bounds[0], high=bounds[1])


def _factors(group: Group) -> int:
    """How many factors of the data vary, as far as the runs say; 0 where they do not."""
    return len(group.shown.result["metrics"].get("mig", {}).get("per_factor") or {})
