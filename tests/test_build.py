"""How setup.py treats CUDA: built, left out, or an error. The C++ compiler is a stand-in."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("pybind11")

COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
: >"$2"
"""
FAILING = """#!/bin/sh
case "$*" in
  --list-gpu-code) echo sm_80; echo sm_90;;
  --version) echo release 1.0;;
  *) echo "nothing is wrong here"; echo "kernel.cu(1): error: no such thing"; exit 2;;
esac
"""


def build(directory, cuda, nvcc=None):
    """`setup.py build_ext` in a copy of the sources, with an nvcc that is this script, or none."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    for name in ("csrc", "triton_kernels"):
        shutil.copytree(ROOT / name, directory / name)
    package = directory / "vaecirc_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    old = package / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.touch()
    toolkit = directory / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    if nvcc:
        (toolkit / "nvcc").write_text(nvcc)
        (toolkit / "nvcc").chmod(0o755)
    compiler = directory / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {name: str(compiler) for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")} | {"PATH": "/nowhere"}
    environment |= {"VAECIRC_CUDA": cuda, "CUDA_HOME": str(toolkit.parent), "HOME": os.environ.get("HOME", "")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", "temporary"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert not old.exists()  # an old module never stands in for one that was not built
    return done.returncode, done.stdout + done.stderr


installed = any(Path(sysconfig.get_path("purelib"), "nvidia").glob("**/bin/nvcc"))
without_nvcc = pytest.mark.skipif(installed, reason="nvcc is installed as a package, so it is always found")


@without_nvcc
def test_without_nvcc_the_module_is_left_out(tmp_path):
    code, text = build(tmp_path, "auto")
    assert code == 0 and "_C_cuda" not in text


@without_nvcc
def test_nvcc_asked_for_and_missing_is_an_error_that_says_so(tmp_path):
    code, text = build(tmp_path, "1")
    assert code != 0 and "no nvcc under CUDA_HOME, on the PATH or in NVIDIA's pip packages" in text


def test_a_failing_nvcc_is_one_line_of_warning(tmp_path):
    code, text = build(tmp_path, "auto", FAILING)
    assert code == 0
    said = [line for line in text.splitlines() if "_C_cuda" in line and "fail" in line]
    assert len(said) == 1 and said[0].endswith("nvcc: kernel.cu(1): error: no such thing")
    assert "nothing is wrong here" not in text


def test_a_failing_nvcc_is_an_error_when_asked_for(tmp_path):
    code, text = build(tmp_path, "1", FAILING)
    assert code != 0 and "nvcc: kernel.cu(1): error: no such thing" in text


def test_an_nvcc_that_knows_none_of_our_architectures_is_told_apart(tmp_path):
    code, text = build(tmp_path, "1", FAILING.replace("echo sm_80; echo sm_90", "echo sm_50"))
    assert code != 0 and "knows none of sm_80, sm_90, sm_100" in text


def test_zero_leaves_the_module_out(tmp_path):
    code, text = build(tmp_path, "0", FAILING)
    assert code == 0 and "nvcc" not in text
