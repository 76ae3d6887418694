"""The findings of an image study: claims of the published study as functions of the result table, with verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .._files import write_json
from .architectures import clearing, differences, no_overall_winner
from .associations import ces_dci
from .claims import Finding, Table
from .mechanisms import capacity, isolation, vq_continuous_discrete
from .recommendation import METRICS, Recommendation, recommend
from .result_table import result_table

__all__ = ["FILE", "Finding", "Recommendation", "findings", "recommend", "result_table", "write"]

FILE = "findings.json"


def findings(table: Table) -> list[Finding]:
    """Every finding on a table as `result_table` makes it. A claim that the runs cannot decide is "undecided" and says
    why; none raises for what a table lacks."""
    differing, _ = differences(table)
    return [
        *ces_dci(table),
        *capacity(table),
        *no_overall_winner(table),
        *vq_continuous_discrete(table),
        *differing,
        *isolation(table),
        *clearing(table),
    ]


def write(directory: str | Path) -> Path:
    """Compute the findings of the runs in a study's `directory` and write them to its findings.json, whole or not at
    all; the file's path.

    The file: "findings", a list (see `claims.Finding`); "recommend", a list by metric (see `Recommendation`);
    "families", the corrected tests behind the differences of architectures; "notes". InputError as
    `report.results.read`.
    """
    directory = Path(directory)
    table = result_table(directory)
    path = directory / FILE
    write_json(path, _plain(table))
    return path


def _plain(table: Table) -> dict[str, Any]:
    _, families = differences(table)
    trained = int(table["trained"].sum())
    notes = [
        f"{trained} of {len(table)} runs are trained; the others take part in no finding.",
        "A claim holds if its whole interval lies on the claimed side, does not hold if wholly on the other, and is "
        "else undecided. Published results are yardsticks and never targets.",
    ]
    seeds = table.groupby(["data", "architecture", "options", "latents", "width"], dropna=False)["seed"].nunique().max()
    if seeds < 2:
        notes.append(
            "One seed of each configuration: replicates are architectures or data sets, as each finding says. What "
            "that seed does to all of them alike is in no interval."
        )
    return _finite(
        {
            "findings": [finding.plain() for finding in findings(table)],
            "recommend": [recommend(table, metric=metric).plain() for metric in METRICS],
            "families": families,
            "notes": notes,
        }
    )


def _finite(value: Any) -> Any:
    """JSON values: a number that is not finite is null, numpy's are Python's."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
