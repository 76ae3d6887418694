"""Keep the C library from returning memory to the system between training steps.

Every step frees and allocates the same activations. By default glibc gives such large blocks back at once, and the next
step pays for some thousand page faults: a tenth to a quarter of a convolutional step on a CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt in <malloc.h>
_MIB = 2**20


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Within the block freed memory stays with the process; at its end the free part goes back to the system.

    Without effect where there is no glibc, and where MALLOC_* or GLIBC_TUNABLES already say what the user wants.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    library = _glibc() if wanted and not chosen else None
    if library is None:
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, 2047 * _MIB)
    if not library.mallopt(_MMAP_THRESHOLD, 1024 * _MIB):
        library.mallopt(_MMAP_THRESHOLD, 32 * _MIB)  # the most that older versions accept
    try:
        yield
    finally:
        # glibc's own adaptive thresholds end at these values in a process that has freed a block of 32 MiB
        library.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        library.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
