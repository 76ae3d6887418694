"""The shape of the project, read from its files: each op has its whole row, and imports point down only.

Everything is a function of a root folder that returns complaints, so that the tests can plant a fault in a copy of the
tree and see that it is found.
"""

import ast
import functools
import shutil
from pathlib import Path

import pytest

from vaecirc_fast import _registry

ROOT = Path(__file__).parents[1]
BACKENDS = ("reference", "cpp", "triton", "cuda")

# From the top down: a part may import those below it and itself. "" is vaecirc_fast/__init__.py.
LEVELS = (
    ("",),
    ("cli",),
    ("studies", "compat", "tabular"),
    ("report",),  # reads the runs that sweeps keeps
    ("sweeps",),
    ("training", "interventions"),
    ("models", "metrics", "data", "planted"),
    ("nn",),
    ("ops",),
    ("_registry",),
    ("reference", "triton_kernels", "_native"),
    ("_C", "_C_cuda"),
    ("groups", "_tensor_files", "_files", "_allocator", "errors"),
)
HEIGHT = {part: -level for level, parts in enumerate(LEVELS) for part in parts}
# Tighter than the levels.
ONLY = {
    "planted": {"groups", "errors"},
    "groups": {"errors"},
    "_files": {"errors"},
    "_tensor_files": {"_files", "errors"},
    "_allocator": set(),
    "errors": set(),
}
SOLE = {"_C": "_native", "_C_cuda": "_native"}  # imported by this part alone


@functools.cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


# --- rows ------------------------------------------------------------------------------------------------------------


def cells_of(tree: ast.Module) -> dict[str, dict[str, str | None]]:
    """The rows that a file defines: name -> backend -> None for a kernel, or why there is none."""
    rows = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Row"):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        cells = options.get("cells")
        assert isinstance(node.args[0], ast.Constant) and isinstance(cells, ast.Dict), "a row is written out"
        row = {}
        for key, value in zip(cells.keys, cells.values, strict=True):
            assert isinstance(key, ast.Constant) and isinstance(value, ast.Call)
            kind = value.func.attr if isinstance(value.func, ast.Attribute) else value.func.id
            assert kind in ("Kernel", "Absent"), f"a cell is a Kernel or Absent, not {kind}"
            reason = value.args[0] if value.args else None
            row[key.value] = None if kind == "Kernel" else str(getattr(reason, "value", ""))
        rows[node.args[0].value] = row
    return rows


def rows_of(root: Path) -> dict[str, dict[str, str | None]]:
    """The rows of all ops."""
    rows = {}
    for path in op_files(root):
        rows |= cells_of(parse(path.read_text()))
    return rows


def op_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "vaecirc_fast/ops").glob("*.py") if not path.name.startswith("_"))


def files_of(op: str, cells: dict[str, str | None]) -> list[str]:
    """The files that a row must have."""
    files = [f"vaecirc_fast/ops/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"]
    of_kernel = {
        "reference": [f"vaecirc_fast/reference/{op}.py"],
        "cpp": [f"csrc/cpu/{op}.h", f"csrc/cpu/{op}.cpp"],
        "triton": [f"triton_kernels/{op}.py"],
        "cuda": [f"csrc/cuda/{op}.cuh", f"csrc/cuda/{op}.cu"],
    }
    return files + [file for backend, why in cells.items() if why is None for file in of_kernel[backend]]


def missing_from_rows(root: Path) -> list[str]:
    """Complaints: what a row lacks, and files of kernels that belong to no row."""
    complaints = []
    rows = rows_of(root)
    for path in op_files(root):
        tree = parse(path.read_text())
        if list(cells_of(tree)) != [path.stem]:
            complaints.append(f"{path.name}: expected one row named {path.stem!r}, found {list(cells_of(tree))}")
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if path.stem not in functions or not ast.get_docstring(functions[path.stem]):
            complaints.append(f"{path.name}: needs a function {path.stem} with a docstring")
        if f"import {path.stem}\n" not in (root / "vaecirc_fast/ops/__init__.py").read_text():
            complaints.append(f"{path.name}: is not in ops/__init__.py")
    for op, cells in rows.items():
        complaints += [f"{op}: no cell for {backend}" for backend in BACKENDS if backend not in cells]
        complaints += [f"{op}: {backend} is absent without a reason" for backend, why in cells.items() if why == ""]
        if cells.get("reference", "") is not None:
            complaints.append(f"{op}: has no reference")
        complaints += [f"{op}: {file} is missing" for file in files_of(op, cells) if not (root / file).is_file()]
        for backend, bindings in (("cpp", "csrc/bindings_cpu.cpp"), ("cuda", "csrc/bindings_cuda.cpp")):
            if cells.get(backend, "") is None and f'"{op}"' not in (root / bindings).read_text():
                complaints.append(f"{op}: is not in {bindings}")
    # Of all CUDA kernels, of topk and topk_encode, of effect_reduction and what follows, of latent_sweep and patch_mix.
    shared = {"__init__", "device", "topk_select", "effect_rows"}
    shared |= {"network_rows", "activations", "panels", "registers"}
    for pattern in ("vaecirc_fast/reference/*.py", "triton_kernels/*.py", "csrc/cpu/*.*", "csrc/cuda/*.*"):
        for path in root.glob(pattern):
            if path.stem not in rows.keys() | shared:
                complaints.append(f"{path.relative_to(root)}: is of no row")
    return complaints


# --- imports ---------------------------------------------------------------------------------------------------------


def imported(tree: ast.Module, package: list[str]) -> list[tuple[int, list[str]]]:
    """(line, dotted name) of every import, also within functions, but not of those for type checkers alone."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            found.extend((node.lineno, [*module, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and str(name.value).startswith("vaecirc_fast"):
                found.append((node.lineno, name.value.split(".")))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def upward_imports(root: Path) -> list[str]:
    """Complaints: imports of a part that is not below, of tests and benchmarks, and of parts that have no level."""
    complaints = []
    files = [*(root / "vaecirc_fast").rglob("*.py"), *(root / "triton_kernels").rglob("*.py")]
    for path in sorted(files):
        where = path.relative_to(root)
        names = list(where.with_suffix("").parts)
        if names[0] == "triton_kernels":
            names = ["vaecirc_fast", *names]
        package = names[:-1]
        part = "" if names[1] == "__init__" else names[1]
        if part not in HEIGHT:
            complaints.append(f"{where}: {part} has no level")
            continue
        for line, target in imported(parse(path.read_text()), package):
            if target[0] in ("tests", "benchmarks", "conftest", "triton_kernels"):
                complaints.append(f"{where}:{line}: imports {target[0]}")
            if target[0] != "vaecirc_fast" or target[1:] == ["__version__"]:
                continue
            other = target[1] if len(target) > 1 and target[1] in HEIGHT else ""
            allowed = other == part or HEIGHT[other] < HEIGHT[part]
            if part in ONLY:
                allowed = other in ONLY[part] | {part}
            if other in SOLE:
                allowed = part == SOLE[other]
            if not allowed:
                complaints.append(f"{where}:{line}: {part or 'the package'} imports {'.'.join(target)}")
    return complaints


# --- first lines -----------------------------------------------------------------------------------------------------

COMMENTS = {
    ".py": ('"""', "# "),
    **dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), ("// ",)),
    **dict.fromkeys((".toml", ".txt", ".yml", ".md", ""), ("# ",)),
    ".css": ("/* ",),
    ".html": ("<!-- ", "{# "),
}


def unnamed_files(root: Path) -> list[str]:
    """Complaints: files of ours whose first line (after #!) does not say what they are."""
    complaints = []
    folders = [root / name for name in ("csrc", "triton_kernels", "vaecirc_fast", "benchmarks", "tests", "docs", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    single = ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md")
    files += [path for name in single for path in root.glob(name)]
    for path in sorted(files):
        if path.suffix not in COMMENTS or {"__pycache__", "results"} & set(path.parts) or path.name.startswith("."):
            continue
        lines = path.read_text().splitlines()
        first = next((line for line in lines if not line.startswith(("#!", "<!doctype", "<!DOCTYPE"))), "")
        opening = next((mark for mark in COMMENTS[path.suffix] if first.startswith(mark)), None)
        if opening is None or len(first.removeprefix(opening).strip('"/*-#>}. ')) < 8:
            complaints.append(f"{path.relative_to(root)}: its first line does not say what it is: {first[:60]!r}")
    return complaints


# --- the tests -------------------------------------------------------------------------------------------------------


def test_every_row_is_complete():
    assert missing_from_rows(ROOT) == []


def test_the_rows_are_those_of_the_registry():
    rows = rows_of(ROOT)
    assert rows and set(rows) == set(_registry.rows)
    for name, row in _registry.rows.items():
        absent = {backend: cell.why for backend, cell in row.cells.items() if isinstance(cell, _registry.Absent)}
        assert absent == {backend: why for backend, why in rows[name].items() if why is not None}


def test_imports_point_down_only():
    assert upward_imports(ROOT) == []


def test_every_file_says_what_it_is():
    assert unnamed_files(ROOT) == []


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the tree."""
    root = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results", ".*")
    for folder in ("csrc", "triton_kernels", "vaecirc_fast", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    return root


@pytest.fixture
def plant(copied):
    """Plants text (None: deletes the file) in the copy and returns the complaints that it adds; undone afterwards."""
    originals = {}

    def plant(function, file, text):
        path = copied / file
        originals.setdefault(path, path.read_text() if path.exists() else None)
        before = function(copied)
        path.unlink() if text is None else path.write_text(text)
        return [complaint for complaint in function(copied) if complaint not in before]

    yield plant
    for path, text in originals.items():
        path.unlink(missing_ok=True) if text is None else path.write_text(text)


OP = "effect_reduction"
FILES = files_of(OP, dict.fromkeys(BACKENDS))


ROW = f"vaecirc_fast/ops/{OP}.py"
ROW_TEXT = (ROOT / ROW).read_text()


@pytest.mark.parametrize("file", [file for file in FILES if file != ROW])
def test_a_deleted_file_of_a_row_is_found(plant, file):
    assert plant(missing_from_rows, file, None) == [f"{OP}: {file} is missing"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deleted_cell_is_found(plant, backend):
    lines = ROW_TEXT.splitlines(keepends=True)
    start = next(n for n, line in enumerate(lines) if line.startswith(f'        "{backend}": '))
    stop = next(n for n in range(start + 1, len(lines)) if lines[n].startswith(('        "', "    }")))
    without = "".join(lines[:start] + lines[stop:])
    assert f"{OP}: no cell for {backend}" in plant(missing_from_rows, ROW, without)


def test_an_empty_reason_is_found(plant):
    start = ROW_TEXT.index('        "triton": ')
    empty = ROW_TEXT[:start] + '        "triton": _registry.Absent(""),\n' + ROW_TEXT[ROW_TEXT.index("\n", start) + 1 :]
    assert f"{OP}: triton is absent without a reason" in plant(missing_from_rows, ROW, empty)


def test_an_op_without_its_name_docstring_or_export_is_found(plant):
    other = ROW_TEXT.replace(f'Row(\n    "{OP}"', 'Row(\n    "effects"')
    assert any("expected one row named" in complaint for complaint in plant(missing_from_rows, ROW, other))
    plant(missing_from_rows, ROW, ROW_TEXT)
    renamed = ROW_TEXT.replace(f"def {OP}(", "def effects(")
    assert plant(missing_from_rows, ROW, renamed) == [f"{OP}.py: needs a function {OP} with a docstring"]
    plant(missing_from_rows, ROW, ROW_TEXT)
    complaints = plant(missing_from_rows, "vaecirc_fast/ops/__init__.py", '"""Nothing."""\n')
    assert f"{OP}.py: is not in ops/__init__.py" in complaints


@pytest.mark.parametrize(
    "file",
    ["vaecirc_fast/reference/median.py", "triton_kernels/median.py", "csrc/cpu/median.h", "csrc/cuda/median.cu"],
)
def test_a_kernel_of_no_row_is_found(plant, file):
    assert plant(missing_from_rows, file, "// Something.\n") == [f"{file}: is of no row"]


UPWARD = {
    "errors.py": "from . import groups",
    "groups.py": "from .ops import effect_reduction",
    "_files.py": "import vaecirc_fast.groups",
    "_native.py": "from . import _registry",
    "_registry.py": "from . import ops",
    "reference/effect_reduction.py": "from ..ops import effect_reduction as op",
    "ops/effect_reduction.py": "from ..interventions.latents import latent_sweep",
    "models/vae.py": "from ..metrics import mig",
    "metrics/mig.py": "import vaecirc_fast.models.vae",
    "metrics/causal.py": "from ..training import fit",
    "planted/relu.py": "from ..ops import effect_reduction",
    "data/digits.py": "from ..models import build",
    "interventions/grids.py": "from .. import studies",
    "training/loop.py": "from ..interventions import latent_sweep",
    "sweeps/store.py": "from ..report import page",
    "report/page.py": "from .. import studies",
    "studies/image.py": "from ..cli import main",
    "models/networks.py": "from vaecirc_fast import ops, backends",
    "data/dataset.py": "import vaecirc_fast as vf",
    "interventions/effects.py": "from .. import _C",
    "ops/_library.py": "import tests.close",
    "models/beta_vae.py": "from benchmarks import harness",
    "ops/__init__.py": "import triton_kernels",
}


@pytest.mark.parametrize("lazily", [False, True], ids=["at the top", "in a function"])
@pytest.mark.parametrize("file", UPWARD)
def test_an_upward_import_is_found(plant, file, lazily):
    path = f"vaecirc_fast/{file}"
    statement = f"\n\ndef later():\n    {UPWARD[file]}\n" if lazily else f"\n{UPWARD[file]}\n"
    (complaint,) = plant(upward_imports, path, (ROOT / path).read_text() + statement)
    assert complaint.startswith(f"{path}:")


def test_an_upward_import_of_triton_kernels_is_found(plant):
    path = f"triton_kernels/{OP}.py"
    statement = "\nfrom ..ops import effect_reduction\n"
    (complaint,) = plant(upward_imports, path, (ROOT / path).read_text() + statement)
    assert complaint.startswith(f"{path}:")


def test_imports_for_type_checkers_and_downward_ones_are_no_fault(plant):
    path = "vaecirc_fast/models/vae.py"
    lines = "\nfrom ..ops import effect_reduction\nif TYPE_CHECKING:\n    from ..studies import image\n"
    text = (ROOT / path).read_text() + lines
    assert plant(upward_imports, path, text) == []
    assert len(plant(upward_imports, path, text + "else:\n    from ..studies import image\n")) == 1


def test_a_part_without_a_level_is_found(plant):
    complaints = plant(upward_imports, "vaecirc_fast/utils.py", '"""Helpers."""\n')
    assert complaints == ["vaecirc_fast/utils.py: utils has no level"]


@pytest.mark.parametrize("text", ["import os\n", "", '"""\nLater.\n"""\n', "#!/bin/sh\nls\n", "# --------\n"])
def test_a_file_that_does_not_say_what_it_is_is_found(plant, text):
    assert len(plant(unnamed_files, "vaecirc_fast/models/vae.py", text)) == 1
