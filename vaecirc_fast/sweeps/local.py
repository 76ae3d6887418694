"""The local engine: runs one after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..errors import RunFailed
from .messages import received, sent
from .store import RunDirectory, RunStore

Announce = Callable[[int, RunDirectory, str], None]
Advance = Callable[[RunDirectory, int, int], None]  # run, step, steps
Work = Callable[[RunDirectory, Mapping[str, Any], Callable[[int, int], None] | None], dict[str, Any]]

PATIENCE = 60  # seconds that an interrupted process has to keep its last step


def run_all(
    store: RunStore,
    runs: Sequence[RunDirectory],
    work: Work,
    announce: Announce,
    *,
    given: Mapping[str, Any] | None = None,
    workers: int = 1,
    threads: int = 1,
    advance: Advance | None = None,
) -> None:
    """Do `work(run, given, tell)` on every run that is not done and store what it returns.

    workers: 1 works in this process, in the order of `runs`. More are processes of `threads` threads each, that take
    the next run when they are free; `work` is then a function at the top of a module, and `given` plain JSON values.
    `announce(number, run, state)` is called with "skipped", "started" and "finished", `advance(run, step, steps)` when
    a process tells how far it is; in this process the work is given no `tell`. An error or Ctrl-C ends the sweep: the
    other processes keep their last step, finished runs stay, and the next call goes on from there.
    """
    with store.lock() as held:
        todo: deque[tuple[int, RunDirectory]] = deque()
        for number, run in enumerate(runs, 1):
            if run.done or any(run.path == other.path for _, other in todo):
                _skip(number, run, announce)
            elif workers > 1:
                todo.append((number, run))
            else:
                announce(number, run, "started")
                run.begin()
                run.finish(work(run, given or {}, None))
                announce(number, run, "finished")
        if todo:
            with _processes(min(workers, len(todo)), threads, work, given or {}, held) as pool:
                _share_out(pool, todo, announce, advance)


def _skip(number: int, run: RunDirectory, announce: Announce) -> None:
    if run.done:
        run.result()  # refuses a damaged one here, not at the end
    announce(number, run, "skipped")


@dataclass
class _Process:
    """One worker: what it runs, None while it waits."""

    process: subprocess.Popen[str]
    said: queue.Queue[tuple[_Process, dict[str, Any] | None]]
    run: tuple[int, RunDirectory] | None = None

    def listen(self) -> None:
        """Pass on what it says, and None when it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = received(line)
            if message is not None:
                self.said.put((self, message))
        self.said.put((self, None))

    def take(self, number: int, run: RunDirectory) -> None:
        run.begin()
        self.run = number, run
        self.tell({"id": run.id, "path": str(run.path), "config": dict(run.config)})

    def tell(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: what it said before, or its end, is in the queue
            self.process.stdin.write(sent(message))
            self.process.stdin.flush()


_Pool = tuple[list[_Process], "queue.Queue[tuple[_Process, dict[str, Any] | None]]"]


@contextmanager
def _processes(count: int, threads: int, work: Work, given: Mapping[str, Any], held: int) -> Iterator[_Pool]:
    """Workers that wait for runs; interrupted, and waited for, however the block is left.

    They inherit the store's lock: should this process be killed, nobody else works here before they have ended.
    """
    said: queue.Queue = queue.Queue()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the work may be in a module of the caller's
    }
    command = [sys.executable, "-m", "vaecirc_fast.sweeps.worker", f"{work.__module__}:{work.__qualname__}"]
    pool = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                pass_fds=(held,),
                start_new_session=True,  # Ctrl-C reaches it through this process alone, once
            )
            worker = _Process(process, said)
            pool.append(worker)
            threading.Thread(target=worker.listen, daemon=True).start()
            worker.tell({"given": dict(given), "threads": threads})
        yield pool, said
    finally:
        for worker in pool:
            assert worker.process.stdin is not None
            with suppress(BrokenPipeError):
                worker.process.stdin.close()  # by which it interrupts itself
        for worker in pool:
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def _share_out(pool: _Pool, todo: deque[tuple[int, RunDirectory]], announce: Announce, advance: Advance | None) -> None:
    workers, said = pool

    def next_for(worker: _Process) -> None:
        worker.run = None
        if todo:
            number, run = todo.popleft()
            announce(number, run, "started")
            worker.take(number, run)

    for worker in workers:
        next_for(worker)
    while any(worker.run is not None for worker in workers):
        worker, message = said.get()
        if worker.run is None:
            continue
        number, run = worker.run
        if message is None:
            raise RunFailed(f"the process of {run.path.name} ended with code {worker.process.wait()}")
        if "step" in message:
            if advance is not None:
                advance(run, message["step"], message["steps"])
        elif "error" in message:
            kind = getattr(errors, message["error"], None)
            raise kind(message["text"]) if kind is not None else RunFailed(f"{run.path.name}: {message['text']}")
        else:
            announce(number, run, "finished")
            next_for(worker)
