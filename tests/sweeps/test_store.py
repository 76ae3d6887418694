"""The run store: ids that follow the configuration, runs that are done when whole, one process at a time."""

import json
import os
import signal
import subprocess
import sys

import pytest

from vaecirc_fast import _files
from vaecirc_fast.errors import InputError
from vaecirc_fast.sweeps import RunStore

CONFIG = {"data": "digits", "lr": 1e-3, "seed": 0, "options": {"beta": 4.0, "width": None}, "flags": [True, 1]}


def finished(root, name="digits-vae-s0", config=CONFIG, **result):
    run = RunStore(root).run(name, config)
    run.begin()
    run.finish(result)
    return run


# --- ids -------------------------------------------------------------------------------------------------------------


def test_the_id_is_the_configurations_whatever_the_order_of_its_keys(tmp_path):
    store = RunStore(tmp_path)
    run = store.run("a", CONFIG)
    turned = dict(reversed(CONFIG.items())) | {"options": {"width": None, "beta": 4.0}}
    assert list(turned) != list(CONFIG) and store.run("a", turned).path == run.path
    assert run.path == tmp_path / "runs" / f"a-{run.id}" and len(run.id) == 12
    assert not tmp_path.joinpath("runs").exists()  # asking makes nothing


def test_the_id_is_the_same_in_every_process_and_version(tmp_path):
    """SHA-256 of the text {"a":[0.1,null,"x"],"b":1}; if it changes, all finished runs are measured again."""
    assert RunStore(tmp_path).run("a", {"b": 1, "a": [0.1, None, "x"]}).id == "3cbe6ba4a782"


def test_other_configurations_have_other_ids(tmp_path):
    changes = [
        {"seed": 1},
        {"seed": "0"},
        {"seed": 0.0},
        {"seed": False},
        {"lr": 1.0000000001e-3},
        {"options": {"beta": 4.0}},
        {"options": {"beta": 4.5, "width": None}},
        {"flags": [1, True]},
        {"flags": [True]},
        {"new": 0},
    ]
    configs = [CONFIG, *(CONFIG | change for change in changes)]
    assert len({RunStore(tmp_path).run("a", config).id for config in configs}) == len(configs)
    with pytest.raises(ValueError):
        RunStore(tmp_path).run("a", CONFIG | {"lr": float("nan")})


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_done_when_its_result_is_written(tmp_path):
    run = RunStore(tmp_path).run("a", CONFIG)
    assert not run.done
    run.begin()
    assert not run.done and json.loads((run.path / "config.json").read_text()) == CONFIG
    run.begin()  # again, after a crash
    run.finish({"metrics": {"mig": 0.5, "ces": None}})
    assert run.done and run.result() == {"id": run.id, "config": CONFIG, "metrics": {"mig": 0.5, "ces": None}}
    assert RunStore(tmp_path).run("a", CONFIG).done
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "result.json"]


def test_what_killed_writers_left_is_cleared(tmp_path):
    run = RunStore(tmp_path).run("a", {"x": 1})
    run.begin()
    stray = run.path / ".checkpoint.1.abcd.tmp"
    stray.write_text("half")
    run.begin()
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_tuples_come_back_as_the_lists_of_json(tmp_path):
    run = finished(tmp_path, config={"shape": (1, 8, 8)})
    assert run.result()["config"] == {"shape": [1, 8, 8]}
    run.begin()


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_run_undone_and_no_part_of_a_file(tmp_path, monkeypatch, step):
    run = RunStore(tmp_path).run("a", CONFIG)
    run.begin()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def half(self, content):
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        full()

    if step == "write":
        monkeypatch.setattr(_files.Path, "write_bytes", half)
        monkeypatch.setattr(_files.Path, "write_text", lambda self, text, encoding=None: half(self, text.encode()))
    else:
        monkeypatch.setattr(_files.os, {"fsync": "fsync", "rename": "replace"}[step], full)
    with pytest.raises(InputError, match=r"cannot write .*result\.json: No space left on device"):
        run.finish({"metrics": {}})
    assert not run.done and [path.name for path in run.path.iterdir()] == ["config.json"]
    monkeypatch.undo()
    run.finish({"metrics": {}})
    assert run.done


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(tmp_path):
    run = RunStore(tmp_path).run("a", CONFIG)
    run.begin()
    with pytest.raises(ValueError):
        run.finish({"ces": float("nan")})
    assert not run.done and [path.name for path in run.path.iterdir()] == ["config.json"]


def cut(path):
    path.write_text(path.read_text()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda p: p.write_text(""), lambda p: p.write_bytes(b"\xff\xfe{}")])
def test_a_damaged_file_is_named(tmp_path, damage):
    run = finished(tmp_path)
    damage(run.path / "result.json")
    assert run.done  # by its presence; whoever reads it is told
    for read in (run.result, RunStore(tmp_path).results):
        with pytest.raises(InputError, match=r"digits-vae-s0-.*/result\.json is not valid JSON .*delete it"):
            read()
    (run.path / "result.json").unlink()
    assert not run.done and RunStore(tmp_path).results() == []
    damage(run.path / "config.json")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        run.begin()


def test_a_file_changed_by_hand_is_named(tmp_path):
    run = finished(tmp_path)
    changed = CONFIG | {"lr": 5.0}
    (run.path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"config\.json is not the configuration of run .* changed by hand"):
        run.begin()
    with pytest.raises(InputError, match=rf"{run.path} is not named after its config\.json"):
        RunStore(tmp_path).results()
    (run.path / "config.json").write_text(json.dumps(CONFIG))
    for content in ({"id": run.id, "config": changed}, {"id": "0" * 12, "config": CONFIG}, {}, [1], None):
        (run.path / "result.json").write_text(json.dumps(content))
        for read in (run.result, RunStore(tmp_path).results):
            with pytest.raises(InputError, match=r"result\.json does not belong to run .*; delete it"):
                read()


def test_a_directory_renamed_or_copied_is_named(tmp_path):
    run = finished(tmp_path)
    run.path.rename(run.path.with_name("digits-vae-s0-0123456789ab"))
    with pytest.raises(InputError, match="0123456789ab is not named after its config.json"):
        RunStore(tmp_path).results()


def test_a_result_without_its_configuration_is_named(tmp_path):
    run = finished(tmp_path)
    (run.path / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*config\.json: No such file"):
        RunStore(tmp_path).results()


# --- the store -------------------------------------------------------------------------------------------------------


def test_results_are_those_of_finished_runs_by_name(tmp_path):
    runs = [finished(tmp_path, name, CONFIG | {"seed": seed}, n=seed) for seed, name in enumerate(["c", "a-b-s1", "b"])]
    unfinished = RunStore(tmp_path).run("d", CONFIG)
    unfinished.begin()
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    expected = sorted((run.path, {"id": run.id, "config": dict(run.config), "n": n}) for n, run in enumerate(runs))
    assert RunStore(tmp_path).results() == expected
    assert RunStore(tmp_path / "nowhere").results() == []


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/vaecirc"])
def test_a_directory_that_cannot_be_made_is_refused(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"out: cannot write to .*{out}: "), RunStore(tmp_path / out).lock():
        pytest.fail("worked in it")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_lock_is_free_again_afterwards(tmp_path):
    store = RunStore(tmp_path / "new" / "store")
    for _ in range(2):
        with store.lock(), pytest.raises(InputError, match="another process is working in .*; wait"):
            with RunStore(store.root).lock():
                pytest.fail("two at once")
        with pytest.raises(OSError), store.lock():
            raise OSError("inside")
    with RunStore(tmp_path / "other").lock(), store.lock():
        pass


HOLD = """
import sys, time
from vaecirc_fast.sweeps import RunStore
with RunStore(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_is_gone(tmp_path):
    """Killed without a chance to clean up, it still lets go."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="another process is working"), RunStore(tmp_path).lock():
                pytest.fail("two at once")
        finally:
            holder.send_signal(signal.SIGKILL)
    assert holder.returncode == -signal.SIGKILL
    with RunStore(tmp_path).lock():
        assert os.listdir(tmp_path) == [".lock"]
