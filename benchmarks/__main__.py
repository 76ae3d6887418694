"""`python -m benchmarks [--tested] [NAME ...]`: run benchmarks, keep their figures in git, and write the tables.

A benchmark of a row refuses to report while that row's tests fail: a fast wrong kernel has no speed. `--tested`: they
have just passed and need not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import tables
from .harness import commit, machine

HERE = Path(__file__).parent
ROOT = HERE.parent


def main(names: list[str]) -> int:
    tested, names = "--tested" in names, [name for name in names if name != "--tested"]
    marked = "not deep" if torch.cuda.is_available() else "not deep and not gpu"
    known = sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"benchmarks: {', '.join(unknown)} unknown; known: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        tests = ROOT / "tests" / "ops" / f"test_{name}.py"
        if not tested and tests.exists() and _pytest([str(tests), "-m", marked]) != 0:
            print(f"{name}: its tests fail, so it is not measured", file=sys.stderr)
            failed.append(name)
            continue
        if not _measure(name):
            failed.append(name)
    tables.write(ROOT)
    return 1 if failed else 0


def _pytest(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def _measure(name: str) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory) / "raw.json"
        options = ["-o", "python_files=bench_*.py", "--benchmark-only", "--benchmark-disable-gc"]
        if _pytest([str(HERE / f"bench_{name}.py"), *options, f"--benchmark-json={raw}"]) != 0:
            return False
        found = json.loads(raw.read_text())["benchmarks"]
    cases = []
    for b in found:
        calls = b["extra_info"].pop("calls")
        times = {"median_s": b["stats"]["median"] / calls, "iqr_s": b["stats"]["iqr"] / calls}
        stats = {**times, "rounds": b["stats"]["rounds"]}
        cases.append({**b["extra_info"], **stats})
    out = HERE / "results" / machine() / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out.write_text(json.dumps({"commit": commit(ROOT), "versions": versions, "cases": cases}, indent=1) + "\n")
    print(f"{name}: {out.relative_to(ROOT)}")
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
