"""What `import vaecirc_fast` loads and starts, which names it gives, and that one OpenMP runtime is in the process."""

import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaecirc_fast as vf

ROOT = Path(__file__).parents[1]
HEAVY = (
    "pandas",
    "matplotlib",
    "sklearn",
    "scipy",
    "rich",
    "tyro",
    "triton",
    "jinja2",
    "xarray",
    "networkx",
    "pyarrow",
)


def run(script, cwd=None):
    """What a fresh process prints as JSON."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("VAECIRC_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded(statements):
    """The modules that are loaded after some statements and not after `import torch` alone, and whether CUDA is up."""
    return run(
        f"import json, sys, torch\nbefore = set(sys.modules)\n{statements}\n"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )


def test_the_import_loads_nothing_heavy_and_starts_no_gpu():
    modules, cuda = loaded("import vaecirc_fast")
    assert "vaecirc_fast" in modules and "vaecirc_fast.ops.effect_reduction" in modules
    assert {name.partition(".")[0] for name in modules} & set(HEAVY) == set()
    assert not cuda
    # What is given when first used is not loaded before.
    parts = {name.split(".")[1] for name in modules if name.startswith("vaecirc_fast.")}
    assert parts <= {"_C", "_files", "_native", "_registry", "errors", "groups", "ops", "reference"}


def test_the_check_of_what_is_loaded_can_fail():
    modules, _ = loaded("import vaecirc_fast as vf; vf.backends(); vf.planted")
    assert {"pandas", "vaecirc_fast.planted"} <= set(modules)


def test_the_command_line_imports_its_parts_when_it_needs_them():
    modules, cuda = loaded("import vaecirc_fast.cli")
    assert {name.partition(".")[0] for name in modules} & {"pandas", "matplotlib", "sklearn", "triton", "tyro"} == set()
    assert not cuda


def test_every_public_name_is_there():
    assert sorted(vf.__all__) == vf.__all__ and len(set(vf.__all__)) == len(vf.__all__)
    for name in vf.__all__:
        assert getattr(vf, name) is not None, name
        assert name in dir(vf), name
    assert vf.__version__ == importlib.metadata.version("vaecirc-fast")


def test_what_is_given_when_first_used_is_the_module_or_function_itself():
    for name in vf._MODULES:
        assert getattr(vf, name) is importlib.import_module(f"vaecirc_fast.{name}")
    for name, module in vf._FUNCTIONS.items():
        assert getattr(vf, name) is getattr(importlib.import_module(f"vaecirc_fast.{module}"), name)
    with pytest.raises(AttributeError, match="module 'vaecirc_fast' has no attribute 'latent_sweeps'"):
        _ = vf.latent_sweeps


def public_modules():
    found = pkgutil.walk_packages(vf.__path__, "vaecirc_fast.")
    return sorted(module.name for module in found if not module.name.rpartition(".")[2].startswith("_"))


def test_every_module_imports_by_itself():
    """In one process and in the order of the alphabet, so that none relies on what another happened to load first."""
    names = public_modules()
    assert "vaecirc_fast.ops.effect_reduction" in names
    for name in names:
        assert importlib.import_module(name).__doc__, name


@pytest.mark.deep
@pytest.mark.parametrize("name", public_modules())
def test_every_module_imports_first(name):
    """In a process of its own: no import circle shows only when a module comes first."""
    assert run(f"import json, importlib; importlib.import_module({name!r}); print(json.dumps(True))")


def test_the_exports_of_every_package_are_there():
    for name in public_modules():
        module = importlib.import_module(name)
        for export in getattr(module, "__all__", ()):
            assert hasattr(module, export), f"{name}.{export}"


IMPORT_SOURCE = """
import json
try:
    import triton_kernels
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_the_kernels_folder_is_no_package_of_its_own():
    """`triton_kernels` is also the name of other people's packages: ours has it inside vaecirc_fast only."""
    message = run(IMPORT_SOURCE, cwd=ROOT)
    assert "vaecirc_fast.triton_kernels" in message and "imported as 'triton_kernels'" in message
    assert "pip install -e ." in message
    shipped = importlib.metadata.distribution("vaecirc-fast").read_text("top_level.txt")
    assert shipped is None or shipped.split() == ["vaecirc_fast"]
    if "triton" in sys.modules or importlib.util.find_spec("triton"):
        kernels = importlib.import_module("vaecirc_fast.triton_kernels")
        assert Path(kernels.__file__).parent == ROOT / "triton_kernels"


MAPS = """
import json, torch, vaecirc_fast as vf
torch.set_num_threads(2)
base, perturbed = torch.zeros(4, 4096), torch.ones(4, 20, 4096)
torch.nn.functional.linear(perturbed, torch.ones(64, 4096)).sum()
with vf.backend("cpp"):
    assert float(vf.ops.effect_reduction(base, perturbed, reduce="sum").sum()) == 80
{}
print(json.dumps(open("/proc/self/maps").read()))
"""


def openmp_runtimes(more=""):
    """The files of OpenMP runtimes in a process that ran torch and a C++ kernel, each with two threads."""
    lines = run(MAPS.format(more)).splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {path for path in paths if re.search(r"/lib(gomp|i?omp5?)\b[^/]*\.so", path)}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="this system does not list a process's libraries")
def test_one_openmp_runtime_is_loaded(tmp_path):
    """Two would each start a thread per core, and may hang. A second one, loaded on purpose, is seen."""
    (runtime,) = openmp_runtimes()
    other = shutil.copy(runtime, tmp_path / "libgomp-other.so.1")
    assert openmp_runtimes(f"import ctypes; ctypes.CDLL({str(other)!r})") == {runtime, str(other)}


def test_the_kernels_use_torchs_threads():
    """The C++ module is told torch's number of threads; small inputs and forked children get one."""
    from vaecirc_fast import _native

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert _native.threads(1 << 18) == threads
            assert _native.threads((1 << 18) - 1) == 1
    finally:
        torch.set_num_threads(before)
