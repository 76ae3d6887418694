"""The main table for a terminal: a line a metric, or, of many configurations, a line each, in about 100 columns."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .aggregate import Group, definitions, groups
from .overview import Box, column
from .results import read
from .tables import Places, main_blocks
from .words import metric_name

if TYPE_CHECKING:
    from rich.table import Table

FEW = 6  # configurations that are shown with all their metrics and controls
BRIEF = ("ces_posterior", "dci_disentanglement", "reconstruction")  # of more
LABEL = 30  # characters


def main_table(directory: Path) -> str:
    """Every configuration over its trained seeds as plain text; see `vaecirc_fast.report.table`."""
    study = read(directory)
    found = groups(study.runs)
    metrics = definitions(study.runs)
    brief = len(found) > FEW
    tables = _brief(found) if brief else [_whole(found, metrics)]
    lines = [line for n, table in enumerate(tables) for line in ([""] if n else []) + _lines(table)]
    notes = ["Means over trained seeds, intervals over seeds. ▲ ▼: interval wholly above or below the control's."]
    if any(len(group.trained) == 1 for group in found):
        notes.append(
            "One seed: the interval is within the run, over images."
            if brief
            else "One seed has no interval over seeds; the report has the interval within the run."
        )
    if brief:
        notes.append("Controls and the other metrics are in the report; --json has all of them.")
    bad = [run.path.name for run in study.runs if not run.trained]
    if bad and brief:
        notes.append(f"Not trained, in no mean: {len(bad)} of {len(study.runs)} runs.")
    elif bad:
        notes.append(f"Not trained, in no mean: {', '.join(bad)}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def _whole(found: Sequence[Group], metrics: Mapping[str, Any]) -> Table:
    """All metrics of each configuration, trained and untrained side by side."""
    table = _table()
    table.add_column("", no_wrap=True)
    for head in ("trained", "95 % interval", "untrained", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for group, block in zip(found, main_blocks(found, metrics, Places(found)), strict=True):
        trained, runs = len(group.trained), len(group.runs)
        table.add_section()
        table.add_row(f"{block.data}, {block.label}", f"{trained} of {runs} seed{'s' * (runs > 1)}", style="bold")
        if not block.seeds:
            continue
        for name, estimate, control in zip(metrics, block.estimates, block.controls, strict=True):
            value = f"{estimate.mark} {estimate.value}".strip()
            table.add_row(f"  {metric_name(name)}", value, estimate.interval, control.value, control.interval)
    return table


def _brief(found: Sequence[Group]) -> list[Table]:
    """Three metrics of each configuration, a table a data set."""
    tables = []
    for data in dict.fromkeys(group.data for group in found):
        members = [group for group in found if group.data == data]
        table = _table()
        table.add_column(data, no_wrap=True, max_width=LABEL, overflow="ellipsis")
        columns = []
        for metric in BRIEF:
            table.add_column(metric_name(metric), justify="right", no_wrap=True)
            columns.append([_words(box) for box in column(members, metric)])
        for group, cells in zip(members, zip(*columns, strict=True), strict=True):
            table.add_row(group.label, *cells)
        tables.append(table)
    return tables


def _words(box: Box) -> str:
    return " ".join(word for word in (box.mark, box.value, box.flag or box.interval) if word)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _lines(table: Table) -> list[str]:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200, highlight=False, color_system=None).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]
