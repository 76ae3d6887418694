"""Images that were decoded once and are kept on disk, or in memory where the disk refuses: uint8, memory-mapped."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .._files import Replacement
from ..errors import InputError
from . import memory

_BLOCK = 512  # images decoded between two writes
_FIRST_LINE, _NEXT_LINE = 5.0, 30.0  # seconds until a line of progress, where there is no terminal


def directory() -> Path:
    """$XDG_CACHE_HOME/vaecirc_fast, or ~/.cache/vaecirc_fast."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vaecirc_fast"


def decoded(name: str, count: int, shape: tuple[int, ...], read: Callable[[int], np.ndarray], data: str) -> np.ndarray:
    """uint8 (count, *shape), read-only where it comes from disk: `read(n)` is called once for every n, in threads.

    The result is the file `name` in `directory()`, whose name must change with what `read` gives. A file of the right
    size is used as it is, also from a directory that cannot be written. Otherwise it is written under a temporary name
    and renamed, so that an interruption leaves nothing; one process writes at a time and others wait for it. Where the
    directory cannot be written or the disk is too full, the images are kept in memory, if they fit.
    """
    path, full = directory() / name, (count, *shape)
    if (found := _mapped(path, full)) is not None:
        return found
    with contextlib.ExitStack() as leaving:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            leaving.enter_context(_alone(path.with_suffix(".lock")))
            if (found := _mapped(path, full)) is not None:  # another process was faster
                return found
            file = Replacement(path)
            leaving.callback(file.discard)
            stream = leaving.enter_context(open(file.temporary, "wb"))
            room = shutil.disk_usage(path.parent).free >= math.prod(full)
        except (OSError, InputError):
            room = False
        if room:
            with file.errors():
                for _, block in _blocks(count, read, data):
                    stream.write(block.tobytes())
                stream.close()
            file.commit()
    if room and (found := _mapped(path, full)) is not None:
        return found
    return _in_memory(full, read, data, path)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == math.prod(shape):
            return np.memmap(path, np.uint8, "r", shape=shape)
    return None


def _in_memory(shape: tuple[int, ...], read: Callable[[int], np.ndarray], data: str, path: Path) -> np.ndarray:
    remedy = f"the cache {path.parent} cannot take them either: free disk there or set XDG_CACHE_HOME"
    memory.check(math.prod(shape), data, remedy)
    images = np.empty(shape, np.uint8)
    for start, block in _blocks(shape[0], read, data):
        images[start : start + len(block)] = block
    return images


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits while another process holds `lock`; it is let go of when the process ends, whatever ends it."""
    try:
        import fcntl
    except ImportError:  # Windows: two may write, each its own temporary file
        yield
        return
    with open(lock, "wb") as held:
        with contextlib.suppress(OSError):  # file systems without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that decodes the same images ({lock})", file=sys.stderr)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _blocks(count: int, read: Callable[[int], np.ndarray], data: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of images with the first number of each, decoded in as many threads as torch has."""
    pool = ThreadPoolExecutor(max(1, torch.get_num_threads()))
    try:
        for start in _counted(range(0, count, _BLOCK), count, data):
            yield start, np.stack(list(pool.map(read, range(start, min(count, start + _BLOCK)))))
    finally:
        pool.shutdown(cancel_futures=True)


def _counted(starts: range, count: int, data: str) -> Iterator[int]:
    """The same, saying on stderr how far it is: a bar on a terminal, elsewhere a line now and then."""
    if len(starts) > 4 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(starts, f"{data}: decoding", console=Console(stderr=True), transient=True)
        return
    began = time.monotonic()
    due = began + _FIRST_LINE
    for start in starts:
        now = time.monotonic()
        if start and now >= due:
            due = now + _NEXT_LINE
            left = (now - began) / start * (count - start) / 60
            print(f"{data}: decoding image {start:,} of {count:,}, {left:,.1f} min left", file=sys.stderr)
        yield start
