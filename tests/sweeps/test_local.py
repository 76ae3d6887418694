"""The local engine: done runs are skipped, an error ends the sweep, and the next call goes on from there."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_work

from vaecirc_fast.errors import InputError, RunFailed, TrainingDiverged
from vaecirc_fast.sweeps import RunStore, run_all


class Sweep:
    """Three runs and a record of what was done and said; `fail` are the numbers whose work raises."""

    def __init__(self, root, fail=(), error=RuntimeError):
        self.store = RunStore(root)
        self.runs = [self.store.run(f"run-s{seed}", {"seed": seed}) for seed in range(3)]
        self.fail, self.error = fail, error
        self.worked, self.said = [], []

    def work(self, run, given, tell):
        self.worked.append(run.config["seed"])
        assert (run.path / "config.json").exists() and not run.done
        if run.config["seed"] in self.fail:
            raise self.error("in the middle")
        return {"answer": 10 * run.config["seed"]}

    def announce(self, number, run, state):
        self.said.append((number, run.config["seed"], state))

    def go(self):
        run_all(self.store, self.runs, self.work, self.announce)
        return self


def test_every_run_is_worked_stored_and_announced_in_order(tmp_path):
    sweep = Sweep(tmp_path).go()
    assert sweep.worked == [0, 1, 2] and all(run.done for run in sweep.runs)
    assert [run.result()["answer"] for run in sweep.runs] == [0, 10, 20]
    assert sweep.said == [(seed + 1, seed, state) for seed in range(3) for state in ("started", "finished")]


def test_done_runs_are_skipped(tmp_path):
    Sweep(tmp_path).go()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = Sweep(tmp_path).go()
    assert again.worked == [] and again.said == [(1, 0, "skipped"), (2, 1, "skipped"), (3, 2, "skipped")]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == files and len(files) == 6


@pytest.mark.parametrize("error", [RuntimeError, InputError, KeyboardInterrupt])
def test_an_error_ends_the_sweep_and_the_next_call_goes_on(tmp_path, error):
    stopped = Sweep(tmp_path, fail=[1], error=error)
    with pytest.raises(error, match="in the middle"):
        stopped.go()
    assert stopped.worked == [0, 1] and [run.done for run in stopped.runs] == [True, False, False]
    assert stopped.said[-1] == (2, 1, "started")
    resumed = Sweep(tmp_path).go()
    assert resumed.worked == [1, 2] and resumed.said[0] == (1, 0, "skipped")
    assert [run.result()["answer"] for run in resumed.runs] == [0, 10, 20]


def test_a_run_listed_twice_is_done_once(tmp_path):
    sweep = Sweep(tmp_path)
    sweep.runs *= 2
    assert sweep.go().worked == [0, 1, 2] and sweep.said[-1] == (6, 2, "skipped")


def test_a_damaged_result_stops_the_sweep_before_later_work(tmp_path):
    Sweep(tmp_path).go()
    sweep = Sweep(tmp_path)
    (sweep.runs[0].path / "result.json").write_text('{"id": ')
    (sweep.runs[2].path / "result.json").unlink()
    with pytest.raises(InputError, match=r"run-s0-.*result\.json is not valid JSON"):
        sweep.go()
    assert sweep.worked == []


def test_a_store_in_use_is_not_touched(tmp_path):
    sweep = Sweep(tmp_path)
    with sweep.store.lock(), pytest.raises(InputError, match="another process is working"):
        sweep.go()
    assert sweep.worked == sweep.said == [] and not (tmp_path / "runs").exists()
    sweep.go()
    assert sweep.worked == [0, 1, 2]


def test_the_lock_is_held_while_working(tmp_path):
    sweep = Sweep(tmp_path)
    work = sweep.work

    def checked(run, given, tell):
        with pytest.raises(InputError, match="another process is working"), RunStore(tmp_path).lock():
            pytest.fail("two at once")
        return work(run, given, tell)

    sweep.work = checked
    assert sweep.go().worked == [0, 1, 2]


# --- processes -------------------------------------------------------------------------------------------------------


def pooled(root, given=None, seeds=4, workers=2, said=None):
    """Runs of tests/sweep_work.py in two processes; what was announced."""
    store, said = RunStore(root), [] if said is None else said
    runs = [store.run(f"run-s{seed}", {"seed": seed}) for seed in range(seeds)]
    run_all(
        *(store, runs, sweep_work.work, lambda number, run, state: said.append((number, state))),
        given=given or {},
        workers=workers,
        advance=lambda run, step, steps: said.append((run.config["seed"], step, steps)),
    )
    return runs, said


def test_processes_share_the_runs_and_what_they_print_is_no_message(tmp_path):
    runs, said = pooled(tmp_path, {"base": 100, "print": True})
    assert [run.result()["answer"] for run in runs] == [100, 110, 120, 130]
    assert all(run.result()["threads"] == 1 for run in runs)
    processes = {run.result()["process"] for run in runs}
    assert 1 <= len(processes) <= 2 and os.getpid() not in processes
    assert sorted(s for s in said if s[-1] == "started") == [(n, "started") for n in (1, 2, 3, 4)]
    assert sorted(s for s in said if s[-1] == "finished") == [(n, "finished") for n in (1, 2, 3, 4)]
    assert {(seed, 1, 2) for seed in range(4)} <= set(said)
    again, said = pooled(tmp_path)
    assert said == [(n, "skipped") for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("InputError", InputError, "seed 1 is wrong"),
        pytest.param("TrainingDiverged", TrainingDiverged, "seed 1 is wrong", marks=pytest.mark.deep),
        pytest.param(
            *("ZeroDivisionError", RunFailed, "run-s1-(.|\n)*Traceback(.|\n)*ZeroDivisionError: seed 1 is wrong"),
            marks=pytest.mark.deep,
        ),
        pytest.param("exit", RunFailed, "the process of run-s1-.* ended with code 7", marks=pytest.mark.deep),
    ],
)
def test_an_error_in_a_process_ends_the_sweep_and_the_next_call_goes_on(tmp_path, how, error, message):
    with pytest.raises(error, match=message):
        pooled(tmp_path, {"fail": how})
    runs, said = pooled(tmp_path, workers=1)
    assert all(run.done for run in runs) and (2, "finished") in said


def test_processes_end_with_the_one_that_started_them_and_hold_the_lock_until_then(tmp_path):
    """Killed outright, it leaves nobody who writes into a directory that somebody else works in."""
    script = Path(sweep_work.__file__)
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert len(process.stdout.readline().split()) == 2  # both are at work
        process.kill()
    deadline = time.monotonic() + 120
    while True:
        try:
            with RunStore(tmp_path).lock():
                assert sorted(p.name for p in tmp_path.glob("*.interrupted")) == ["0.interrupted", "1.interrupted"]
                return
        except InputError:
            assert time.monotonic() < deadline, "still at work"
            time.sleep(0.05)
