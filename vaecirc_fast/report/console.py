"""What a study says while it runs: a line for each run with time gone and time left, and the table at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from .words import duration


class Console:
    """Lines on standard output; nothing at all unless `enabled`. `total`: how many runs there are."""

    def __init__(self, total: int, enabled: bool = True):
        self.total = total
        self.enabled = enabled
        self._started = time.monotonic()
        self._run_started = self._started
        self._times: list[float] = []  # seconds of the runs finished in this call

    def announce(self, number: int, run: Any, state: str) -> None:
        """One line: run `number` of the total was "skipped", is "started" or "finished"."""
        now = time.monotonic()
        if state == "started":
            self._run_started = now
        elif state == "finished":
            self._times.append(now - self._run_started)
        if not self.enabled:
            return
        what = {"skipped": "done before, skipped", "started": "training and measuring"}.get(state)
        if state == "finished":
            what = f"finished in {duration(self._times[-1])}{self._outlook(number, now)}"
        name = run.path.name.removesuffix(f"-{run.id}")
        width = len(str(self.total))
        self._print(f"[{number:>{width}}/{self.total}] {name}: {what or state}")

    def _outlook(self, number: int, now: float) -> str:
        """Time gone, and left if the other runs take as long as those of this call did on average."""
        left = self.total - number
        gone = f"; {duration(now - self._started)} gone"
        if not left:
            return gone
        return f"{gone}, about {duration(max(1.0, left * sum(self._times) / len(self._times)))} left"

    def finish(self, out: str | Path, page: str | Path) -> None:
        """The main table of the runs in `out`, and where the report `page` is."""
        if not self.enabled:
            return
        from . import table

        self._print()
        self._print(table(out).rstrip("\n"))
        self._print()
        kilobytes = Path(page).stat().st_size / 1000
        self._print(f"Report: {page} ({kilobytes:,.0f} kB), {duration(time.monotonic() - self._started)} in all")

    def _print(self, line: str = "") -> None:
        from rich.console import Console as Terminal

        # an output that cannot hold a β or an arrow gets a question mark, not an error after minutes of training
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = line.encode(encoding, "replace").decode(encoding)
        # soft_wrap: what reads the output elsewhere gets whole lines
        Terminal(file=sys.stdout, highlight=False, soft_wrap=True).print(line, markup=False)
