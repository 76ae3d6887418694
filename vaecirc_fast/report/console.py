"""What a study says while it runs: a line for each run with time gone and time left, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .words import counted, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Console:
    """Lines on standard output; nothing at all unless `enabled`. `total`: how many runs there are."""

    def __init__(self, total: int, enabled: bool = True):
        self.total = total
        self.enabled = enabled
        self._left = total
        self._started = time.monotonic()
        self._run_started: dict[Path, float] = {}
        self._times: list[float] = []  # seconds of the runs finished in this call
        self._last = self._started
        self._bars: Progress | None = None
        self._tasks: dict[Path, TaskID] = {}

    def begin(self, settings: str, workers: int) -> None:
        """What is going to run: the table of settings, and how many runs at a time."""
        if not self.enabled:
            return
        at_once = f", {workers} at a time" if workers > 1 else ""
        self._print(f"{settings}\n\n{counted(self.total, 'run')}{at_once}\n")

    @contextmanager
    def live(self) -> Iterator[None]:
        """While runs are under way in processes of their own: on a terminal, a bar for each."""
        if not self.enabled or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        terminal = Terminal(stderr=True)
        piped = not sys.stdout.isatty()  # then its lines are not for the terminal
        with Progress(*columns, console=terminal, transient=True, redirect_stdout=not piped) as self._bars:
            yield
        self._bars = None

    def advance(self, run: Any, step: int, steps: int) -> None:
        """Run `run` has done `step` of its `steps`; at the last one it goes on to be measured."""
        if self._bars is None:
            return
        if run.path not in self._tasks:
            self._tasks[run.path] = self._bars.add_task(_name(run), total=steps)
        self._bars.update(
            self._tasks[run.path], completed=step, description=_name(run) + " measuring" * (step == steps)
        )

    def announce(self, number: int, run: Any, state: str) -> None:
        """One line: run `number` of the total was "skipped", is "started" or "finished"."""
        now = time.monotonic()
        if state == "started":
            self._run_started[run.path] = now
        elif state == "finished":
            took = now - self._run_started.pop(run.path, now)
            self._times.append(now - self._last)
            self._last = now
            if self._bars is not None and run.path in self._tasks:
                self._bars.remove_task(self._tasks.pop(run.path))
        if not self.enabled:
            return
        what = {"skipped": "done before, skipped", "started": "training and measuring"}.get(state)
        if state == "finished":
            self._left -= 1
            what = f"finished in {duration(took)}{self._outlook(now)}"
        elif state == "skipped":
            self._left -= 1
        width = len(str(self.total))
        self._print(f"[{number:>{width}}/{self.total}] {_name(run)}: {what or state}")

    def _outlook(self, now: float) -> str:
        """Time gone, and left if the other runs come as fast as those of this call did on average."""
        left = self._left
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


def _name(run: Any) -> str:
    return run.path.name.removesuffix(f"-{run.id}")
