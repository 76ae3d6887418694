"""Every Triton kernel compiles for GPUs without spills, to the instructions that it names; and the gate can fail."""

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

import compile_gate

FILES = sorted(file for file in compile_gate.KERNELS.glob("*.py") if file.name != "__init__.py")
HERE = Path(__file__).parent
deep = pytest.mark.deep


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_kernel_has_cases(file):
    lacking = compile_gate.missing(file)
    assert not lacking, lacking


@pytest.fixture(scope="module")
def gates(request):
    """(file, capability) -> the future of its results: a process each, as many at a time as there are cores."""
    chosen = [item.callspec.params for item in request.session.items if "capability" in _parameters(item)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (p["file"], p["capability"]): pool.submit(compile_gate.compiled, p["capability"], [p["file"]])
            for p in chosen
            if not compile_gate.missing(p["file"])
        }


def _parameters(item):
    return item.callspec.params if item.module.__name__ == __name__ and hasattr(item, "callspec") else {}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=deep), 90, pytest.param(100, marks=deep)])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_compile_without_spills(file, capability, gates):
    assert not compile_gate.missing(file), "it has no cases"
    results = gates[file, capability].result()
    assert [r.name for r in results] == [launch.name for launch in compile_gate.launches(file)]
    faults = [f"{r.name}, sm_{capability}: {fault}" for r in results for fault in r.faults()]
    assert not faults, "\n".join(faults)


def test_the_gate_rejects_what_it_should():
    passes, matrix, few, broken = compile_gate.compiled(90, [HERE / "gate_controls.py"])
    assert passes.faults() == matrix.faults() == []
    assert any("spills" in fault for fault in few.faults())
    assert any("STACK" in fault or "LOCAL" in fault for fault in few.faults())
    assert len(broken.faults()) == 1 and "power of 2" in broken.faults()[0]
    # An instruction that is not there, one for this GPU only, one for another, and a part of a name.
    for wanted, faults in {"HGMMA": 1, "90:HGMMA": 1, "80:HGMMA": 0, "LD": 1, "LDG": 0}.items():
        assert len(dataclasses.replace(passes, instructions=(wanted,)).faults()) == faults, wanted


def test_a_compile_that_hangs_is_stopped():
    (result,) = compile_gate.compiled(90, [HERE / "gate_hang.py"], seconds=3)
    assert result.faults() == ["not compiled in 3 s"]


def test_what_compiles_nothing_is_an_error(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("GATE = {}\n")
    with pytest.raises(RuntimeError, match="nothing was compiled"):
        compile_gate.compiled(90, [empty])


KERNEL = """
import torch
import triton


@triton.jit
def _half(x):
    return x / 2


@triton.jit
def _new_kernel(x):
    _half(x)


def forward(x):
    _new_kernel[(1,)](x)
"""


def test_a_kernel_without_cases_is_told_what_to_add(tmp_path):
    file = tmp_path / "new_op.py"
    file.write_text(KERNEL)
    assert compile_gate.kernels(file) == {"_new_kernel"}  # and not the function that it calls
    message = compile_gate.missing(file)
    assert message.startswith("new_op.py: no case of GATE launches _new_kernel.") and "GATE = {" in message
    file.write_text(KERNEL + 'GATE = {"a case": (lambda: forward(torch.empty(4, device="cuda")), ())}\n')
    assert compile_gate.missing(file) == ""
    assert [launch.name for launch in compile_gate.launches(file)] == ["a case (_new_kernel)"]
    assert "new_op" not in sys.modules
