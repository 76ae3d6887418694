"""For every test of an op: new memory is poisoned, and `backend` goes through all backends of this machine."""

import ctypes
import platform

import pytest
import torch
from backends import ALL, Backend, parameters

from vaecirc_fast import _registry

# What runs emulated in every run of the tests; the rest is deep.
EMULATED = {"test_values", "test_any_problem", "test_any_gradient", "test_gradients"}
# What takes the interpreter long and shows little that float32 and the other backends do not; deep.
LONG_INTERPRETED = {"test_vmap", "test_compiled_once_for_every_k"}
M_PERTURB = -6  # glibc: fill what malloc gives with the complement of a byte


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned):
    """torch's new memory holds NaN; that of the C library, which C++ kernels use, 0x7f7f...: 3.4e38 as float."""
    perturb = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if perturb:
        perturb(M_PERTURB, 0x80)
    yield
    if perturb:
        perturb(M_PERTURB, 0)


def pytest_collection_modifyitems(items):
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if not isinstance(backend, Backend):
            continue
        if backend.emulated and item.originalname not in EMULATED:
            item.add_marker(pytest.mark.deep)
        half = item.originalname == "test_gradients" and torch.float16 in item.callspec.params.values()
        if backend.interpreted and (half or item.originalname in LONG_INTERPRETED):
            item.add_marker(pytest.mark.deep)


@pytest.fixture(params=parameters(ALL))
def backend(request):
    """A backend, forced while the test runs; one that the op's row leaves out on purpose is skipped."""
    row = _registry.rows.get(request.module.__name__.rpartition("test_")[2])
    cell = row.cells[request.param.name] if row else None
    if isinstance(cell, _registry.Absent):
        pytest.skip(f"{request.param.name} {cell.why}")
    with request.param.forced() as backend:
        yield backend


@pytest.fixture(autouse=True)
def one_thread():
    """These tests' tensors are tiny, and two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
