"""The disentanglement metrics on the page: a row a metric, configurations side by side with both their controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..metrics.statistics import Estimate
from .aggregate import Group, over_seeds, side
from .results import Run
from .tables import SIDES, Printed, bracketed
from .words import NOTHING, counted, decimals, interval, listed, metric_name, number, plain, typeset

KEY = "disentanglement"
STATES = ("trained", "untrained", "permuted")
ACROSS = 2  # configurations side by side: three numbers with intervals each
MOST_PLACES = 5
NO_SPREAD = "no spread"
MOST = 100  # configurations; beyond, the page would outgrow its limit


@dataclass(frozen=True)
class Block:
    """Configurations of one data set: `heads` (label, what its intervals are of), `rows` (metric, unit, cells), three
    cells a configuration, in the order of `STATES`."""

    data: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[Printed]]]


@dataclass(frozen=True)
class Shown:
    """All of the section; `across`: configurations in the widest block; `single`, `several`: whether intervals within a
    run and over seeds are shown; `few`: whether some controls are of fewer permutations; `unmoved`: metrics without a
    permuted one; `definitions`: (name, unit, text, source); `notes` on each data set; `more`: configurations that are
    not shown."""

    blocks: Sequence[Block]
    across: int
    single: bool
    several: bool
    few: bool
    unmoved: str
    definitions: Sequence[tuple[str, str, Markup, str]]
    notes: Sequence[tuple[str, Sequence[str]]]
    more: int


def shown(groups: Sequence[Group]) -> Shown | None:
    """What is shown of the configurations whose trained runs have disentanglement metrics; None where none has."""
    having = [group for group in groups if _runs(group)]
    if not having:
        return None
    more, having = max(0, len(having) - MOST), having[:MOST]
    by_data: dict[str, list[Group]] = {}
    for group in having:
        by_data.setdefault(group.data, []).append(group)
    blocks = []
    for data, members in by_data.items():
        places = {name: _places(name, members) for name in _definitions(members)}
        blocks += [_block(data, members[n : n + ACROSS], places) for n in range(0, len(members), ACROSS)]
    counts = [len(_runs(group)) for group in having]
    permutations = {entry["n"] for group in having for run in _runs(group) for entry in _entries(run, "permuted")}
    unmoved = dict.fromkeys(name for group in having for run in _runs(group) for name in run.result[KEY]["unmoved"])
    return Shown(
        blocks,
        max(len(block.heads) for block in blocks),
        min(counts) == 1,
        max(counts) > 1,
        len(permutations) > 1,
        listed(map(metric_name, unmoved)),
        [
            (metric_name(name), entry["unit"] or "dimensionless", typeset(entry["definition"]), entry["source"])
            for name, entry in _definitions(having).items()
        ],
        _shared(
            {data: list(_notes([r for group in members for r in _runs(group)])) for data, members in by_data.items()}
        ),
        more,
    )


def _runs(group: Group) -> list[Run]:
    return [run for run in group.trained if KEY in run.result]


def _definitions(groups: Sequence[Group]) -> dict[str, Mapping[str, str]]:
    """By metric; the first run's where runs differ, which then are of different protocols and not pooled."""
    found: dict[str, Mapping[str, str]] = {}
    for group in groups:
        for run in _runs(group):
            found = {**run.result[KEY]["definitions"], **found}
    return found


def _entries(run: Run, state: str) -> Iterator[Mapping[str, Any]]:
    yield from run.result[KEY][state].values()


def _values(group: Group, state: str, name: str) -> list[float]:
    entries = [run.result[KEY][state].get(name, {}) for run in _runs(group)]
    return [entry["value"] for entry in entries if entry.get("value") is not None]


@dataclass(frozen=True)
class _Places:
    """Decimals of a metric in a data set: of means, of one run's value, of controls."""

    mean: int
    single: int
    control: int


def _places(name: str, groups: Sequence[Group]) -> _Places:
    """Three digits of the greatest value of the trained models, and two of the least control; counts have one decimal,
    for their mean."""
    if _definitions(groups)[name]["unit"] == "latents":
        return _Places(1, 0, 1)
    found = [value for group in groups for value in _values(group, "trained", name)]
    places = min(MOST_PLACES, decimals(found))
    controls = [_mean(_values(group, state, name)) for group in groups for state in ("untrained", "permuted")]
    wanted = [min(decimals([abs(value)], 2), places + 2) for value in controls if value]
    return _Places(places, places, max([places, *wanted]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _block(data: str, groups: Sequence[Group], places: Mapping[str, _Places]) -> Block:
    heads = []
    for group in groups:
        seeds = len(_runs(group))
        of = "intervals over seeds" if seeds > 1 else "intervals within the run"
        heads.append((group.label, f"{counted(seeds, 'seed')}, {of}"))
    rows = []
    for name, entry in _definitions(groups).items():
        cells = [cell for group in groups for cell in _cells(group, name, places[name])]
        rows.append((metric_name(name), entry["unit"], cells))
    return Block(data, heads, rows)


def _cells(group: Group, name: str, places: _Places) -> Iterator[Printed]:
    runs = _runs(group)
    if len(runs) == 1:
        for state in STATES:
            entry = runs[0].result[KEY][state].get(name, {})
            p = places.control if state != "trained" and places.single else places.single
            value, low, high = (entry.get(key) for key in ("value", "low", "high"))
            yield Printed(number(value, p), _within(low, high, p))
        return
    over: list[Estimate | None] = [over_seeds(_values(group, state, name)) for state in STATES]
    for state, estimate in zip(STATES, over, strict=True):
        if estimate is None:
            yield Printed(NOTHING)
            continue
        p = places.mean if state == "trained" else places.control
        mark = SIDES[side(estimate, over[1])] if state == "trained" else ""
        yield Printed(number(estimate.value, p), _over(estimate, p), mark)


def _over(estimate: Estimate, places: int) -> str:
    return NO_SPREAD if _equal(estimate.low, estimate.high) else bracketed(estimate, places)


def _within(low: float | None, high: float | None, places: int) -> str:
    return NO_SPREAD if _equal(low, high) else interval(low, high, places)


def _equal(low: float | None, high: float | None) -> bool:
    """But for rounding: scores of 1 are sums."""
    return low is not None and high is not None and math.isclose(low, high, rel_tol=1e-9)


def _shared(notes: Mapping[str, list[str]]) -> list[tuple[str, Sequence[str]]]:
    """Notes with the data sets that they are on; what is the same of several is said once."""
    of: dict[tuple[str, ...], list[str]] = {}
    for data, said in notes.items():
        of.setdefault(tuple(said), []).append(data)
    return [(listed(names), said) for said, names in of.items()]


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Sentences: on what images, on which samples a metric is fitted, what is left out and why."""
    results = [run.result[KEY] for run in runs]
    sizes = listed(dict.fromkeys(plain(found["images"]) for found in results))
    grids = {found["whole_grid"] for found in results}
    if grids == {True}:
        yield f"On the codes of all {sizes} images, a whole factor grid"
    else:
        whole = " or of the whole factor grid" if True in grids else ", which are no whole factor grid"
        yield f"On the codes of {sizes} images{whole}"
    notes: dict[str, dict[str, set[str]]] = {}  # note -> metric -> states
    for found in results:
        for state in ("trained", "untrained"):
            for name, entry in found[state].items():
                for note in entry["notes"]:
                    notes.setdefault(note, {}).setdefault(metric_name(name), set()).add(state)
    for note, metrics in notes.items():
        alone = set().union(*metrics.values()) == {"untrained"}
        yield f"{listed(metrics)}{', untrained control' if alone else ''}: {note}"
    reasons: dict[str, dict[str, None]] = {}
    for found in results:
        for name, why in found["left_out"].items():
            why = why.removeprefix("factors: ")
            reasons.setdefault(why, {})[metric_name(name)] = None
    for why, metrics in reasons.items():
        yield f"No {listed(metrics)}: {why}"
    dropped = dict.fromkeys(
        factor for found in results for entry in found["trained"].values() for factor in entry["dropped"]
    )
    if dropped:
        yield f"One-valued factors, left out of every metric: {listed(dropped)}"
