"""How a run tells where it is: a bar on a terminal, a line now and then elsewhere, or the caller's own function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

Report = Callable[[int], None]

_FIRST_LINE, _NEXT_LINE = 30.0, 300.0  # seconds: a short run in a log stays silent


@contextmanager
def reporter(shown: bool, start: int, steps: int, batch_size: int):
    """A function to call with the number of finished steps, at every step; it costs under a microsecond when silent."""
    if not shown or start >= steps:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _bar(start, steps, batch_size) as report:
            yield report
    else:
        yield _lines(start, steps, batch_size)


@contextmanager
def _bar(start: int, steps: int, batch_size: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    last = began
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=steps, completed=start, rate="")

        def report(step: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 0.2 or step == steps:
                last = now
                rate = (step - start) * batch_size / (now - began)
                progress.update(task, completed=step, rate=f"{rate:,.0f} images/s")

        yield report


def _lines(start: int, steps: int, batch_size: int) -> Report:
    began = time.monotonic()
    due = began + _FIRST_LINE

    def report(step: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        due = now + _NEXT_LINE
        seconds = (now - began) / (step - start)
        print(
            f"training: step {step:,} of {steps:,}, {batch_size / seconds:,.0f} images/s, "
            f"{(steps - step) * seconds / 60:,.1f} min left",
            file=sys.stderr,
        )

    return report
