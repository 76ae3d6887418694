"""The main table for a terminal: one line a metric, trained and untrained side by side, in about 95 columns."""

from __future__ import annotations

import io
from pathlib import Path

from .aggregate import definitions, groups
from .results import read
from .tables import Places, main_blocks
from .words import metric_name


def main_table(directory: Path) -> str:
    """Every configuration over its trained seeds as plain text; see `vaecirc_fast.report.table`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    study = read(directory)
    found = groups(study.runs)
    metrics = definitions(study.runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
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
    out = io.StringIO()
    Console(file=out, width=200, highlight=False, color_system=None).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    notes = ["Means over trained seeds, intervals over seeds. ▲ ▼: interval wholly above or below the control's."]
    if any(len(group.trained) == 1 for group in found):
        notes.append("One seed has no interval over seeds; the report has the interval within the run.")
    bad = [run.path.name for run in study.runs if not run.trained]
    if bad:
        notes.append(f"Not trained, in no mean: {', '.join(bad)}.")
    return "\n".join([*lines, "", *notes]) + "\n"
