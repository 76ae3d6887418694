"""Keep the C library from returning memory to the system between steps of a long computation.

Every training step, and every tile of a sweep, frees and allocates the same activations. By default glibc gives such
large blocks back at once, and the next step pays for some thousand page faults: a tenth to a half of the time of
convolutions on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt in <malloc.h>
_MIB = 2**20
_KEPT = 128 * _MIB  # free memory that may stay: a call of a few milliseconds repeated pays for no page faults
_lock = threading.Lock()
_within = 0  # blocks of the process that are being run: they nest, and threads have theirs at once


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Within the block freed memory stays with the process; at the end of the outermost its free part goes back to the
    system, where it is more than 128 MiB.

    Without effect where there is no glibc, and where MALLOC_* or GLIBC_TUNABLES already say what the user wants.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    library = _glibc() if wanted and not chosen else None
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


def _enter(library: ctypes.CDLL) -> None:
    global _within
    with _lock:
        _within += 1
        if _within > 1:
            return
        library.mallopt(_TRIM_THRESHOLD, 2047 * _MIB)
        if not library.mallopt(_MMAP_THRESHOLD, 1024 * _MIB):
            library.mallopt(_MMAP_THRESHOLD, 32 * _MIB)  # the most that older versions accept


def _leave(library: ctypes.CDLL) -> None:
    global _within
    with _lock:
        _within -= 1
        if _within:
            return
        # glibc's own adaptive thresholds end at these values in a process that has freed a block of 32 MiB
        library.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        if _free(library) > _KEPT:
            library.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
            library.malloc_trim(0)
        else:
            library.mallopt(_TRIM_THRESHOLD, _KEPT)


class _Counts(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>; the ninth is the bytes in free blocks of all arenas."""

    _fields_ = [(f"count{n}", ctypes.c_size_t) for n in range(10)]


def _free(library: ctypes.CDLL) -> float:
    """Bytes that the library holds and nobody uses; infinite where it does not say, before glibc 2.33."""
    if not hasattr(library, "mallinfo2"):
        return float("inf")
    count = library.mallinfo2
    count.restype = _Counts
    return count().count8


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
