"""The local engine: runs one after another in this process, skipping finished ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .store import RunDirectory, RunStore


def run_all(
    store: RunStore,
    runs: Sequence[RunDirectory],
    work: Callable[[RunDirectory], dict[str, Any]],
    announce: Callable[[int, RunDirectory, str], None],
) -> None:
    """Do `work` on every run that is not done and store what it returns.

    `announce(number, run, state)` is called with "skipped", "started" and "finished". An error or Ctrl-C ends the
    sweep; finished runs stay, and the next call goes on from there.
    """
    with store.lock():
        for number, run in enumerate(runs, 1):
            if run.done:
                run.result()  # refuses a damaged one here, not at the end
                announce(number, run, "skipped")
                continue
            announce(number, run, "started")
            run.begin()
            run.finish(work(run))
            announce(number, run, "finished")
