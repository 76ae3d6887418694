"""Kept memory: the pages of a freed block are there when the next one is made, and only as long as asked."""

import ctypes
import resource
import statistics
import sys

import pytest
import torch

from vaecirc_fast.training.allocator import kept_memory

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
MIB = 2**20


def faults_of_a_block(size):
    """Page faults of making, filling and freeing `size` bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_freed_blocks_are_reused(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    size = 160 * MIB
    with kept_memory():
        counts = [faults_of_a_block(size) for _ in range(12)]
    after = faults_of_a_block(size)
    assert counts[0] > 50 and after > 50  # or this test shows nothing; huge pages make few faults of many pages
    assert statistics.median(counts[4:]) < 50  # small blocks may split the first ones


@glibc
def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    size = 160 * MIB
    with kept_memory():
        counts = [faults_of_a_block(size) for _ in range(3)]
    assert min(counts) > 50
