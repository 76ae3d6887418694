"""How much memory is left, and a refusal before more than that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import InputError


def free_bytes(device: str | torch.device = "cpu") -> float:
    """Bytes that can still be had on `device`; infinite where the system does not say.

    On the CPU the least of what the machine has available and what the limits of this process's control groups
    (containers, batch systems) leave; pages of files that the kernel can drop count as free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_of_machine(Path("/proc/meminfo")), *_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def check(needed: float, what: str, remedy: str, device: str | torch.device = "cpu") -> None:
    """InputError unless `needed` bytes can be had: "WHAT needs 5.9 GB of memory, of which 3.1 GB are free; REMEDY"."""
    free = free_bytes(device)
    if needed > free:
        where = "of memory" if torch.device(device).type == "cpu" else f"of memory on {device}"
        raise InputError(f"{what} needs {sized(needed)} {where}, of which {sized(free)} are free; {remedy}")


def sized(count: float) -> str:
    """ "512 bytes", "3.1 MB", "5.9 GB": decimal units, as disks and downloads have them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _of_machine(meminfo: Path) -> float:
    try:
        lines = meminfo.read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return float("inf")


def _of_groups(membership: Path, mount: Path) -> Iterator[float]:
    """What each control group above this process leaves, of either version; at least one number."""
    yield float("inf")
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            limit, used, cache, roots = "memory.max", "memory.current", "inactive_file", (mount, mount / "unified")
        elif "memory" in controllers.split(","):
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            roots = (mount / "memory",)
        else:
            continue
        for root in roots:
            group = root / path.lstrip("/")
            # A container sees its own group as the root of the mount, under whatever path the host knows it by.
            for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
                yield _left(folder, limit, used, cache)


def _left(group: Path, limit: str, used: str, cache: str) -> float:
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0.0, float(most - now + int(stat.get(cache, 0))))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return float("inf")
