"""The overview of many configurations: tables of architectures against data sets, and of metrics side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.statistics import Estimate
from .aggregate import Group, over_seeds, side
from .disentanglement import KEY
from .tables import SIDES
from .words import NOTHING, architecture_name, decimals, interval, listed, metric_name, model_name, number

# What the overview shows, each as one table; then what the tables of a data set and of an architecture show as well.
SHOWN = ("ces_posterior", "specificity", "circuit_modularity", "dci_disentanglement", "mig", "reconstruction")
MORE = ("ces_raw", "ces_resample", "active", "dci_completeness", "dci_informativeness", "sap", "factor_vae_score")
MORE = (*MORE, "modularity", "irs", "gaussian_total_correlation")
SHADES = 5  # steps of a cell's shade
LABELS = 8  # distinct configurations that the overview shows each by itself; with more, one an architecture
COLUMNS = 6  # of the tables of a data set and of an architecture


@dataclass(frozen=True)
class Reading:
    """A metric of one configuration: `estimate` over trained seeds, or of the one trained run within itself
    (`within`); of a configuration without trained runs that of the run that is shown, with `trained` false. `control`
    and `permuted` over seeds, or of the one run."""

    estimate: Estimate
    within: bool
    trained: bool
    control: Estimate | None
    permuted: Estimate | None


@dataclass(frozen=True)
class Box:
    """A cell: words, and `shade`, 0 to `SHADES`, the value as a share of the greatest in its column."""

    value: str
    interval: str = ""
    mark: str = ""
    control: str = ""
    permuted: str = ""
    flag: str = ""
    shade: int = 0


@dataclass(frozen=True)
class Sheet:
    """A table: `heads` over the columns, `rows` of (name, unit, boxes)."""

    title: str
    unit: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Box]]]


@dataclass(frozen=True)
class Overview:
    """`metrics`: a sheet a metric, architectures by data sets; `data`, `architectures`: a sheet each, metrics by
    configurations; `within`: whether an interval within a run stands for one over seeds; `reduced`: whether only one
    configuration of each architecture is shown."""

    metrics: Sequence[Sheet]
    data: Sequence[Sheet]
    architectures: Sequence[Sheet]
    within: bool
    over: bool
    reduced: bool


def overview(groups: Sequence[Group]) -> Overview | None:
    """None for a single configuration, which is its own overview."""
    if len(groups) < 2:
        return None
    labels = dict.fromkeys(group.label for group in groups)
    reduced = len(labels) > LABELS
    chosen = base(groups) if reduced else list(groups)
    name = _model if reduced else _label
    units = _units(groups)
    readings = {(id(g), m): r for g in chosen for m in (*SHOWN, *MORE) if m in units and (r := reading(g, m))}
    near: dict[tuple[str, str], list[Reading]] = {}  # what shares its decimals
    for group in chosen:
        for metric in units:
            if (id(group), metric) in readings:
                near.setdefault((group.data, metric), []).append(readings[id(group), metric])
    data = list(dict.fromkeys(group.data for group in chosen))
    names = list(dict.fromkeys(name(group) for group in chosen))
    at = {(name(group), group.data): group for group in chosen}
    sheets = []
    for metric in SHOWN:
        found = {key: readings.get((id(group), metric)) for key, group in at.items()}
        if any(found.values()):
            columns = [_column([found.get((row, d)) for row in names], units[metric]) for d in data]
            rows = [(row, "", [column[n] for column in columns]) for n, row in enumerate(names)]
            unit = (units[metric] or "dimensionless") + _other_units(chosen, metric, units[metric])
            sheets.append(Sheet(metric_name(metric), unit, data, rows))
    by_data = [s for d in data for s in _side(d, [g for g in chosen if g.data == d], name, readings, near, units)]
    kinds = list(dict.fromkeys(group.architecture for group in chosen))
    by_kind = []
    for kind in kinds if len(data) > 1 else ():
        members = [group for group in chosen if group.architecture == kind]
        several = len({name(group) for group in members}) > 1
        title = architecture_name(kind) if several else name(members[0])
        heads = (lambda g: f"{g.data}, {name(g)}") if several else (lambda g: g.data)
        by_kind += _side(title, members, heads, readings, near, units)
    found = list(readings.values())
    within = any(r.within and r.trained for r in found)
    return Overview(sheets, by_data, by_kind, within, any(not r.within for r in found), reduced)


def column(groups: Sequence[Group], metric: str) -> list[Box]:
    """One metric of configurations of one data set, without shades."""
    found = [reading(group, metric) for group in groups]
    return [_box(r, _units(groups).get(metric, ""), [r for r in found if r is not None]) for r in found]


def base(groups: Sequence[Group]) -> list[Group]:
    """Of each architecture on each data set the configuration of most seeds, the first of them."""
    best: dict[tuple[str, str], Group] = {}
    for group in groups:
        key = group.data, group.architecture
        if key not in best or len(group.runs) > len(best[key].runs):
            best[key] = group
    return [group for group in groups if best[group.data, group.architecture] is group]


def reading(group: Group, metric: str) -> Reading | None:
    """The metric of the group, from the main table or, where it is not there, the disentanglement metrics."""
    runs = [run for run in group.runs if _entry(run.result, "trained", metric)]
    runs = [run for run in runs if _entry(run.result, "trained", metric).get("value") is not None]
    trained = [run for run in runs if run.trained]
    if not runs:
        return None
    used = trained or [run for run in runs if run is group.shown] or runs[:1]
    states = {state: [_entry(run.result, state, metric) for run in used] for state in ("untrained", "permuted")}
    if len(used) > 1:
        cell = group.cells.get(metric)
        if cell is not None and cell.estimate is not None:
            return Reading(cell.estimate, False, True, cell.control, cell.permuted)
        values = [_entry(run.result, "trained", metric)["value"] for run in used]
        controls = {
            s: over_seeds([e["value"] for e in found if e.get("value") is not None]) for s, found in states.items()
        }
        made = over_seeds(values)
        assert made is not None
        return Reading(made, False, True, controls["untrained"], controls["permuted"])
    one = _estimate(_entry(used[0].result, "trained", metric))
    assert one is not None
    return Reading(one, True, bool(trained), *(_estimate(states[s][0]) for s in ("untrained", "permuted")))


def _entry(result: Mapping[str, Any], state: str, metric: str) -> Mapping[str, Any]:
    """One metric of one run: trained, untrained or permuted; empty if it has none."""
    main = result["metrics"] if state == "trained" else result["control"].get(state, {})
    if metric in result["metrics"]:
        return main.get(metric, {})
    return result.get(KEY, {}).get(state, {}).get(metric, {})


def _estimate(entry: Mapping[str, Any]) -> Estimate | None:
    if entry.get("value") is None:
        return None
    low, high = (math.nan if entry.get(key) is None else entry[key] for key in ("low", "high"))
    return Estimate(entry["value"], low, high)


def _units(groups: Sequence[Group]) -> dict[str, str]:
    """The unit of each metric, that of the first run that has it; the study's own before those of disentanglement."""
    units: dict[str, str] = {}
    runs = [run for group in groups for run in group.runs]
    for name, entry in (item for run in runs for item in run.result["definitions"].items()):
        units.setdefault(name, entry["unit"])
    for run in runs:
        for name, entry in run.result.get(KEY, {}).get("definitions", {}).items():
            units.setdefault(name, entry["unit"])
    return units


def _other_units(groups: Sequence[Group], metric: str, unit: str) -> str:
    """What is said of architectures whose unit is another."""
    found: dict[str, dict[str, None]] = {}
    for run in (run for group in groups for run in group.runs):
        other = run.result["definitions"].get(metric, {}).get("unit", unit)
        if other != unit:
            found.setdefault(other, {})[architecture_name(run.config["architecture"])] = None
    return "".join(f"; {listed(names)}: {other}" for other, names in found.items())


def _side(
    title: str, groups: Sequence[Group], head: Any, readings: Mapping, near: Mapping, units: Mapping[str, str]
) -> list[Sheet]:
    """Metrics by configurations, `COLUMNS` of them a sheet."""
    sheets = []
    for start in range(0, len(groups), COLUMNS):
        members = groups[start : start + COLUMNS]
        rows = []
        for metric in (m for m in (*SHOWN, *MORE) if m in units):
            found = [(readings.get((id(group), metric)), near.get((group.data, metric), [])) for group in members]
            if any(r for r, _ in found):
                rows.append((metric_name(metric), units[metric], [_box(r, units[metric], all_) for r, all_ in found]))
        sheets.append(Sheet(title, "", [head(group) for group in members], rows))
    return sheets


def _column(found: Sequence[Reading | None], unit: str) -> list[Box]:
    near = [r for r in found if r is not None]
    top = max((r.estimate.value for r in near if r.trained), default=0.0)
    return [_box(r, unit, near, top) for r in found]


def _box(found: Reading | None, unit: str, near: Sequence[Reading], top: float = 0.0) -> Box:
    """One cell; `near`: what shares its decimals; `top`: the value of the darkest shade, 0 for no shades."""
    if found is None:
        return Box(NOTHING)
    places = 1 if unit == "latents" else min(5, decimals([r.estimate.value for r in near]))
    if unit == "latents" and all(r.within for r in near):
        places = 0
    e = found.estimate
    shown = interval(e.low, e.high, places) if e.low != e.high else ""
    untrained, permuted = (_control(control, unit, places) for control in (found.control, found.permuted))
    shade = round(SHADES * e.value / top) if found.trained and top > 0 and e.value > 0 else 0
    mark = "" if found.within else SIDES[side(e, found.control)]
    flag = "" if found.trained else "not trained"
    return Box(number(e.value, places), "" if flag else shown, mark, untrained, permuted, flag, min(shade, SHADES))


def _control(control: Estimate | None, unit: str, places: int) -> str:
    """A control with its interval, in enough decimals for two digits: it may be far below what training leads to."""
    if control is None:
        return ""
    if control.value and unit != "latents":
        places = min(places + 2, max(places, decimals([control.value], 2)))
    inner = interval(control.low, control.high, places) if control.low != control.high else ""
    return f"{number(control.value, places)} {inner}".strip()


def _label(group: Group) -> str:
    return group.label


def _model(group: Group) -> str:
    return model_name(group.config)
