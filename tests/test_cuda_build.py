"""The module _C_cuda as it was built: what machine code it holds, what it needs, and how it behaves without a GPU."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from vaecirc_fast import _native

BUILT = _native._load_cuda()[0]
if BUILT is None:
    pytest.skip(f"not built here: {_native.cuda_reason()}", allow_module_level=True)


def printed(*command):
    """What a command prints; the test is skipped where it is not installed."""
    program = shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([program, *command[1:]], capture_output=True, text=True, check=True).stdout


def cuobjdump(option):
    """What cuobjdump, of CUDA or of Triton, says about the module."""
    if not shutil.which("cuobjdump"):
        pytest.importorskip("triton", reason="neither CUDA's cuobjdump nor Triton, which brings one, is installed")
        import compile_gate

        directory = str(compile_gate.tool("cuobjdump").parent)
        if not os.access(f"{directory}/cuobjdump", os.X_OK):
            pytest.skip("this Triton brings no cuobjdump")
        return printed(f"{directory}/cuobjdump", option, BUILT.__file__)
    return printed("cuobjdump", option, BUILT.__file__)


def test_it_holds_machine_code_for_each_architecture_and_ptx_for_later_ones():
    machine_code = set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("-lelf")))
    ptx = set(re.findall(r"\.sm_(\d+)\.ptx", cuobjdump("-lptx")))
    names = BUILT.architectures.split(", ")
    assert machine_code == {name for name in names if name.startswith("sm_")}
    assert {f"compute_{number}" for number in ptx} == {name for name in names if name.startswith("compute_")}
    if "sm_100" in names:  # as nvcc 12.8 and later know it
        assert names == ["sm_80", "sm_90", "sm_100", "compute_100"]


def test_no_kernel_spills():
    lines = [line for line in cuobjdump("-res-usage").splitlines() if "STACK:" in line]
    assert len(lines) >= 3 * 32  # architectures, kernels
    for line in lines:
        assert "STACK:0 " in line and "LOCAL:0 " in line, line


def test_it_needs_no_library_of_cuda_or_torch():
    needed = re.findall(r"NEEDED.*\[(.+)\]", printed("readelf", "-d", BUILT.__file__))
    assert needed and not [name for name in needed if re.match(r"lib(cu|torch|c10|nv)", name)], needed


def test_it_imports_alone_and_without_a_gpu():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C_cuda", {BUILT.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.device_count(), module.device_error())
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    count, _, error = done.stdout.strip().partition(" ")
    assert count == "0" and error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_it_does_not_run():
    assert BUILT.device_count() == 0
    assert "torch sees no CUDA device" in str(_native.cuda_reason())
    with pytest.raises(RuntimeError, match="^CUDA: "):
        BUILT.effect_reduction(0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, [0], False, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=9), "unknown element type"),
        (dict(P=1 << 29), "2.29 elements"),
        (dict(G=9), "more groups than elements"),
        (dict(kinds=[0] * 7), "more effects than there are kinds"),
        (dict(I=1 << 40), "more blocks than CUDA allows"),
    ],
    ids=str,
)
def test_what_a_kernel_cannot_do_is_refused(change, message):
    sizes = dict(dtype=0, link=0, B=1, I=1, P=8, G=2, elements=8, kinds=[0], sum=False, outer=1) | change
    with pytest.raises(RuntimeError, match=message):
        BUILT.effect_reduction(0, 0, 0, 0, *sizes.values(), 0, 0, 0)
