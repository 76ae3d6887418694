"""The CUDA kernels on the emulator: they stay within their memory; and the emulator finds what is planted."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import guarded
import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("the emulator needs Linux", allow_module_level=True)

HERE = Path(__file__).parent
KERNEL = "cuda/effect_reduction.cu"


def run(code):
    """The exit code and output of a program that sees the files beside this one."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    code = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + code  # no picture of a planted crash
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_kernels_touch_nothing_outside_their_tensors():
    assert run("import guarded; guarded.main()") == (0, "all within bounds\n")


@pytest.mark.parametrize("index", [-1, 8])
def test_the_forbidden_page_is_forbidden(index):
    code = f"import guarded, torch, ctypes; x = guarded.guarded((8,), torch.float32, before={index < 0}).data_ptr();"
    assert run(code + "print(ctypes.c_float.from_address(x).value)") == (0, "nan\n")
    returned, printed = run(code + f"print(ctypes.c_float.from_address(x + 4 * {index}).value)")
    assert returned < 0 and printed == ""


# --- faults that are planted in the kernels and must be found --------------------------------------------------------

BARRIER = "__syncthreads();"
PLANTED = {
    "no barrier before rows are copied again": (BARRIER + "  // the last rows", "// the last rows"),
    "no barrier after the copy": ("__pipeline_wait_prior(0);\n                " + BARRIER, "__pipeline_wait_prior(0);"),
    "no wait for the copy": ("__pipeline_wait_prior(0);", ""),
    "no barrier before values are written again": (BARRIER + "  // the last group", "// the last group"),
    "no barrier between writing and reading values": ("            }\n        " + BARRIER, "            }"),
    "a barrier that some threads skip": (BARRIER + "  // the last rows", "if (threadIdx.x < 32) " + BARRIER + "  //"),
    "a shuffle that some lanes skip": ("add_team(sums, f.lanes", "if (busy) add_team(sums, f.lanes"),
    "too little shared memory": ("shared += (1 + f.staged_rows) * row;", "shared += f.staged_rows * row;"),
    "one element too many": ("for (int j = k; j < last; ++j) {", "for (int j = k; j <= last; ++j) {"),
    "the last thread's bounds": ("if (index >= f.parts * f.B * vectors) return;", ""),
    "vectors where rows are not aligned": ("f.aligned = a.P % V == 0 &&", "f.aligned = a.P % V >= 0 &&"),
}


@pytest.mark.deep
@pytest.mark.parametrize("fault", PLANTED)
def test_the_emulator_finds(fault, tmp_path):
    shutil.copytree(cuda_emulator.ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc" / KERNEL
    old, new = PLANTED[fault]
    source = file.read_text()
    assert source.count(old) == 1, "the kernel has changed: plant this fault anew"
    file.write_text(source.replace(old, new))
    module = cuda_emulator.build(tmp_path / "csrc")
    code = f"""
import torch, cuda_emulator, guarded
from pathlib import Path
broken, whole = (cuda_emulator.load(path) for path in (Path({str(module)!r}), cuda_emulator.build()))
for inputs in guarded.problems():
    edge = [guarded.placed(x, False) for x in inputs]
    for link in (0, 1):
        a, b = (guarded.results(module, edge, link, guarded.guarded) for module in (broken, whole))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "another result"
"""
    returned, printed = run(code)
    shutil.rmtree(module.parent)
    assert returned != 0 and (returned < 0 or "another result" in printed), printed


def test_the_whole_source_is_found_whole(tmp_path):
    """The planted test's own control: an unchanged copy of the sources passes it."""
    shutil.copytree(cuda_emulator.ROOT / "csrc", tmp_path / "csrc")
    assert cuda_emulator.build(tmp_path / "csrc") == cuda_emulator.build()
    inputs = next(iter(guarded.problems()))
    module = cuda_emulator.load(cuda_emulator.build())
    results = [guarded.results(module, inputs, 0, lambda s, d: torch.empty(s, dtype=d)) for _ in range(3)]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
