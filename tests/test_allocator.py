"""Kept memory: the pages of a freed block are there when the next one is made, and only as long as asked."""

import ctypes
import os
import resource
import statistics
import subprocess
import sys

import pytest
import torch

from vaecirc_fast._allocator import kept_memory

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
MIB = 2**20


def faults_of_a_block(size):
    """Page faults of making, filling and freeing `size` bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def counts_of(blocks, environment):
    """Faults of `blocks` blocks with kept memory and of one after it, in a process whose heap nobody has used."""
    ours = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, __file__, str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    *during, after = (int(word) for word in done.stdout.split())
    return during, after


@glibc
def test_freed_blocks_are_reused():
    during, after = counts_of(24, {})
    assert during[0] > 50 and after > 50  # or this test shows nothing; huge pages make few faults of many pages
    assert statistics.median(during[8:]) < 50  # small blocks may split the first ones


@glibc
def test_the_users_own_settings_stay():
    during, _ = counts_of(3, {"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert min(during) > 50


if __name__ == "__main__":
    with kept_memory():
        counts = [faults_of_a_block(160 * MIB) for _ in range(int(sys.argv[1]))]
    print(*counts, faults_of_a_block(160 * MIB))
