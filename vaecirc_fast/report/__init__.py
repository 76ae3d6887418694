"""Reports: what the runs of a study say, as one HTML page and as a table for the terminal.

Importing this is cheap; the functions load what they need when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import Console

__all__ = ["Console", "findings", "summary", "table", "write"]


def write(directory: str | Path) -> Path:
    """Write directory/report.html from every finished run in `directory`, atomically; its path.

    One page with its pictures inside it: it loads nothing and stays below 3 MB. A run whose effects or pictures are
    missing or damaged is reported without them, with a note. InputError for no such directory, no finished run, or a
    damaged config.json or result.json, which it names.
    """
    from .page import write as write_page

    return write_page(Path(directory))


def table(directory: str | Path) -> str:
    """The main table for a terminal: each metric of each configuration over its trained seeds, control beside it.

    Errors as `write`.
    """
    from .plain import main_table

    return main_table(Path(directory))


def summary(directory: str | Path) -> list[dict[str, Any]]:
    """Every finished run as JSON values: name, config, whether trained, its metrics and its controls', and, where it
    has them, the disentanglement metrics of the trained, the untrained and the permuted codes.

    Errors as `write`.
    """
    from .results import read

    keys = ("config", "trained", "metrics", "control", "disentanglement")
    return [
        {"run": run.path.name} | {key: run.result[key] for key in keys if key in run.result}
        for run in read(Path(directory)).runs
    ]


def findings(directory: str | Path) -> dict[str, Any]:
    """findings.json of a study as it is, empty where there is none; InputError for a damaged one."""
    from ..errors import InputError
    from .claims import read_findings

    found, troubles = read_findings(Path(directory))
    if troubles:
        raise InputError(f"{directory}: {troubles[0]}")
    return dict(found.found)
