"""What every benchmark shares: how a time is taken, and what a case says about itself."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vaecirc_fast._native import processor

ROUNDS = 15


def measure(
    benchmark: Any,
    call: Callable[[], Any],
    *,
    case: str,
    form: str,
    ours: bool = False,
    rounds: int = ROUNDS,
    memory: bool = False,
    **facts: Any,
) -> None:
    """Time `call`, `rounds` times after two warm-up calls; with `memory`, also the most memory it takes.

    `form` is what was timed in `case`, `ours` whether it is this project's; where several are, the first counts. Facts:
    `bytes`, `decodes` or `images` of one call. A form that is slow may do fewer of them than the others: the tables
    compare times per image (decode, byte).
    """

    calls = _calls(call)

    def synchronised() -> None:
        for _ in range(calls):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    if memory:
        call()
        facts["peak_bytes"] = peak_bytes(call)
    benchmark.extra_info.update(case=case, form=form, ours=ours, calls=calls, **facts)
    benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=2)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory alive during `call` beyond what was before: of the process on a CPU, of torch on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or what an earlier call freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(mark: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(mark)))


def _calls(call: Callable[[], Any]) -> int:
    """Calls of one round: one, or on a GPU 5 ms of them, so that waiting for it once weighs nothing."""
    if not torch.cuda.is_available():
        return 1
    for _ in range(3):  # the first compiles
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return min(1000, max(1, math.ceil(5 / begin.elapsed_time(end))))


def commit(root: Path) -> str:
    """The commit that is measured, marked where the tree differs from it."""
    written = (":(exclude)benchmarks/results", ":(exclude)benchmarks/README.md", ":(exclude)README.md")  # by this run

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--short", "--", ".", *written) else "")
    except FileNotFoundError:  # no git
        return ""


def machine() -> str:
    """A name for this kind of machine, without its host name: processor or GPU, and the threads torch uses."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
