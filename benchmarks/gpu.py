"""`make gpu`: builds in place, tests on the GPU, runs all benchmarks and keeps their figures. Ten minutes, no network.

Runs with the python that starts it and the packages it has. Where the environment variable OUT names a folder, the
figures are copied there too. Exit code 1, and one line that says why, at the first step that fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 570  # for everything
TESTS = 240  # of them, at most
START, STARTED = time.monotonic(), time.time()


def main() -> int:
    os.chdir(ROOT)
    build = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    if not _run("build", [*build, "--editable", "."], SECONDS):
        return _stop("the build failed")
    if subprocess.run([sys.executable, "-c", "import torch; exit(not torch.cuda.is_available())"]).returncode:
        return _stop("torch sees no CUDA device on this machine, so there is nothing to test or to measure")
    # Hundreds of small Triton kernels are compiled: in parallel, where pytest can do that.
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tested = _run("tests", ["-m", "pytest", "tests", "-m", "gpu and not deep", *parallel], TESTS)
    # A row whose tests fail is not measured; that is looked at row by row if any test failed.
    measured = _run("benchmarks", ["-m", "benchmarks", *(["--tested"] if tested else [])], _left())
    _copy()
    if not tested:
        return _stop("the tests failed or took too long")
    return 0 if measured else _stop("a benchmark failed or there was no time for it")


def _left() -> float:
    return SECONDS - (time.monotonic() - START)


def _run(step: str, arguments: list[str], seconds: float) -> bool:
    """Whether a step of its own process group ended well; it is killed, with all it started, when its time is over."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], start_new_session=True)
    try:
        code = process.wait(timeout=min(seconds, max(_left(), 1)))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    how = {0: "done", None: "stopped"}.get(code, f"exit code {code}")
    print(f"make gpu: {step}: {how} after {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def _copy() -> None:
    out = os.environ.get("OUT")
    for file in (ROOT / "benchmarks" / "results").glob("*/*.json") if out else ():
        if file.stat().st_mtime >= STARTED:
            target = Path(str(out), file.parent.name)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def _stop(why: str) -> int:
    print(f"make gpu: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
