"""Builds the module `_C_cuda` for the CPU, from csrc/cuda and tests/cuda_on_cpu, and runs ops on it."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11

from vaecirc_fast import _native, _registry

HERE = Path(__file__).parent / "cuda_on_cpu"
ROOT = HERE.parents[1]
FLAGS = ["-O1", "-std=gnu++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


def build(source: Path = ROOT / "csrc") -> Path:
    """The emulated module of the CUDA sources in `source`, compiled unless build/ has it from the same sources."""
    files = [*HERE.iterdir(), *(source / "cuda").iterdir(), source / "bindings_cuda.cpp"]
    key = hashlib.sha256(
        b"\n".join(file.read_bytes() for file in sorted(files, key=lambda file: file.name))
    ).hexdigest()[:16]
    module = ROOT / "build" / "cuda_on_cpu" / key / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        part = module.with_suffix(f".{os.getpid()}")
        includes = [HERE, source, sysconfig.get_path("include"), pybind11.get_include()]
        command = [os.environ.get("CXX", "c++"), *FLAGS, *(f"-I{path}" for path in includes)]
        subprocess.run([*command, str(HERE / "module.cpp"), "-o", str(part)], check=True)
        part.replace(module)
    return module


@functools.cache
def load(path: Path):
    """The compiled module."""
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(module=None):
    """Within this context the backend "cuda" of every op takes CPU tensors and runs emulated."""
    module = module or load(build())
    cuda, place = _native.cuda, _native.cuda_place
    cells = {name: row.cells["cuda"] for name, row in _registry.rows.items()}
    _native.cuda, _native.cuda_place = lambda: module, lambda tensor: (0, 0)
    try:
        for name, cell in cells.items():
            if isinstance(cell, _registry.Kernel):
                on_cpu = dataclasses.replace(cell, devices=("cpu",), reason=_registry.always)
                _registry.rows[name].cells["cuda"] = on_cpu
        yield
    finally:
        _native.cuda, _native.cuda_place = cuda, place
        for name, cell in cells.items():
            _registry.rows[name].cells["cuda"] = cell
