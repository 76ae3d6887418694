"""The findings on the page: claims with estimates, intervals and verdicts, from findings.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import read_json
from ..errors import InputError
from .tables import Printed
from .words import (
    NOTHING,
    architecture_name,
    counted,
    data_name,
    decimals,
    interval,
    listed,
    metric_name,
    number,
    plain,
    probability,
    prose,
)

FILE = "findings.json"
EVERYWHERE = "all data sets"
TOGETHER = 12  # claims in one table; of more, those on single data sets have one of their own
VERDICTS = ("holds", "does not hold", "undecided")
_REQUIRED = ("id", "claim", "estimate", "low", "high", "verdict")
_NUMBERS = ("estimate", "low", "high", "p", "p_adjusted")


@dataclass(frozen=True)
class Row:
    """A claim as it is printed."""

    id: str
    claim: str
    quantity: str
    unit: str
    cell: Printed
    verdict: str
    replicates: str
    p: Sequence[str]
    scope: str
    yardstick: str
    notes: Sequence[str]
    everywhere: bool
    tested: bool

    @property
    def sign(self) -> str:
        """A mark that goes with the words of the verdict."""
        return {"holds": "✓", "does not hold": "✗"}.get(self.verdict, "?")


@dataclass(frozen=True)
class Recommendation:
    """What to take by one metric; `regrets`: of the advice on held-out data sets, of random choice, and the gain."""

    metric: str
    data: str
    architecture: str
    ranks: str
    regrets: Sequence[Printed]
    verdict: str
    replicates: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """`rows`; `recommended`, one a metric; `notes`; `found`: findings.json itself."""

    rows: Sequence[Row] = ()
    recommended: Sequence[Recommendation] = ()
    notes: Sequence[str] = ()
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tally(self) -> str:
        """How many claims have each verdict, as a sentence."""
        verbs = {"holds": ("holds", "hold"), "does not hold": ("does not hold", "do not hold")}
        verbs["undecided"] = ("is undecided", "are undecided")
        counts = [(verdict, sum(row.verdict == verdict for row in self.rows)) for verdict in VERDICTS]
        said = [f"{count} {verbs[verdict][count != 1]}" for verdict, count in counts if count]
        return f"Of {counted(len(self.rows), 'claim')} {listed(said)}."

    def correlation(self, data: str) -> list[str]:
        """What the panel of a data set, by its name in configurations, says of CES and DCI within it."""
        said = []
        for entry in self.found.get("findings", ()):
            if entry["id"] == f"ces_dci_within_{data}" and entry["estimate"] is not None:
                row = _row(entry)
                quantity = (row.quantity or "correlation").split(" of ")[0]
                said.append(f"{quantity} = {row.cell.value} {row.cell.interval}".strip())
                said.append(f"over {row.replicates}; {row.verdict} (negative)")
        return said

    @property
    def tables(self) -> list[tuple[str, str, Sequence[Row]]]:
        """Id, heading and rows: claims on all data sets; where there are many, apart from these those on single data
        sets, and those that the runs give no estimate of."""
        if len(self.rows) <= TOGETHER:
            return [("findings-table", "", self.rows)]
        tested = [row for row in self.rows if row.tested]
        made = [
            ("findings-table", "", [row for row in tested if row.everywhere]),
            ("findings-single", "Claims on single data sets", [row for row in tested if not row.everywhere]),
            ("findings-open", "Claims that these runs cannot test", [row for row in self.rows if not row.tested]),
        ]
        return [table for table in made if table[2]]


def read_findings(directory: Path) -> tuple[Findings, list[str]]:
    """Findings of a study and notes on the file; without a whole file there are no findings, but a page."""
    file = directory / FILE
    if not file.exists():
        return Findings(), []
    try:
        found = read_json(file)
        _check(found)
    except (InputError, KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        return Findings(), [f"{FILE} cannot be used ({what.replace(f'{directory}/', '')}): there are no findings here."]
    rows = [_row(entry) for entry in found["findings"]]
    recommended = [_recommended(entry) for entry in found.get("recommend", [])]
    return Findings(rows, recommended, [str(note) for note in found.get("notes", [])], found), []


def _check(found: Any) -> None:
    """KeyError, TypeError or ValueError for what is no findings.json."""
    if not isinstance(found, dict) or not isinstance(found["findings"], list):
        raise TypeError("no object with a list of findings")
    for entry in found["findings"]:
        if not isinstance(entry, dict):
            raise TypeError("a finding is no object")
        for key in _REQUIRED:
            entry[key]
        for key in _NUMBERS:
            value = entry.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{key} of {entry['id']} is no number: {value!r}")
        if entry["verdict"] not in VERDICTS:
            raise ValueError(f"verdict of {entry['id']}: {entry['verdict']!r}")
    for key in ("recommend", "notes"):
        if not isinstance(found.get(key, []), list):
            raise TypeError(f"{key} is no list")
    for entry in found.get("recommend", []):
        if not isinstance(entry, dict):
            raise TypeError("a recommendation is no object")
        entry["metric"]
        for key in ("regret", "random", "gain", "ranks"):
            if entry.get(key) is not None and not isinstance(entry[key], dict):
                raise TypeError(f"{key} of a recommendation is no object")


def _row(entry: Mapping[str, Any]) -> Row:
    ends = [v for v in (entry["estimate"], entry["low"], entry["high"]) if v is not None and math.isfinite(v)]
    p = min(4, decimals(ends, 2)) if ends else 2
    n, resampled = entry.get("n"), entry.get("resampled") or ""
    replicates = f"{plain(n)} {resampled}".strip() if n else resampled
    ps = [(name, entry.get(key)) for name, key in (("p", "p"), ("adjusted p", "p_adjusted"))]
    level, scope = entry.get("level"), _words(entry.get("scope"))
    uncommon = "" if level in (None, 0.95) else f"{100 * level:.4g} % interval"
    cell = Printed(number(entry["estimate"], p), interval(entry["low"], entry["high"], p))
    return Row(
        str(entry["id"]),
        prose(str(entry["claim"])),
        prose(str(entry.get("quantity") or "")),
        "; ".join(words for words in (str(entry.get("unit") or ""), uncommon) if words),
        cell,
        entry["verdict"],
        replicates or NOTHING,
        [f"{name} {probability(value)}" for name, value in ps if value is not None],
        "" if scope == EVERYWHERE else data_name(scope),
        _words(entry.get("yardstick")),
        [prose(str(note)) for note in entry.get("notes") or ()],
        scope in ("", EVERYWHERE),
        entry["estimate"] is not None,
    )


def _words(value: Any) -> str:
    """A scope or yardstick, which may be words, a number, a list or an object, as words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {plain(v)}" for key, v in value.items())
    return "" if value is None else value if isinstance(value, str) else plain(value)


def _recommended(entry: Mapping[str, Any]) -> Recommendation:
    ranks = entry.get("ranks") or {}
    return Recommendation(
        metric_name(str(entry["metric"])),
        data_name(str(entry.get("data") or "")),
        architecture_name(str(entry["architecture"])) if entry.get("architecture") else NOTHING,
        "; ".join(f"{architecture_name(name)} {plain(round(rank, 1))}" for name, rank in _sorted(ranks)) or NOTHING,
        [_held_out(entry.get(key)) for key in ("regret", "random", "gain")],
        str(entry.get("verdict") or "undecided"),
        _of_data_sets(entry.get("regret")),
        [prose(str(note)) for note in entry.get("notes") or ()],
    )


def _sorted(ranks: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(ranks.items(), key=lambda item: item[1])


def _held_out(found: Mapping[str, Any] | None) -> Printed:
    if not found or found.get("value") is None:
        return Printed(NOTHING)
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    places = min(4, decimals([value], 2))
    return Printed(number(value, places), interval(low, high, places))


def _of_data_sets(found: Mapping[str, Any] | None) -> str:
    return f"{plain(found['n'])} {found.get('resampled', '')}".strip() if found and found.get("n") else NOTHING
