"""The registry: which kernel a call gets, how one is forced, and whether the table of backends tells the truth."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from backends import CPP

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast._registry import BACKENDS, Absent, Kernel, Row
from vaecirc_fast.errors import BackendError, InputError

F32, F16 = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("VAECIRC_BACKEND", raising=False)


@pytest.fixture
def make_row(monkeypatch):
    """Makes rows that are forgotten after the test."""
    monkeypatch.setattr(_registry, "rows", dict(_registry.rows))

    def make(order=("cuda", "triton", "cpp", "reference"), **cells):
        every = {"reference": kernel(), "cpp": Absent("left out"), "triton": Absent("left out"), "cuda": Absent("no")}
        return Row("an_op", every | cells, {"cpu": order})

    return make


def kernel(name="", devices=("cpu",), dtypes=(F32,), reason=None):
    return Kernel(lambda: {"an_op": lambda: name}, devices, dtypes, lambda device: reason)


# --- the rule --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_of_the_order_that_can_run(make_row):
    assert make_row(cpp=kernel(), triton=kernel()).choose("cpu", F32) == "triton"
    assert make_row(cpp=kernel(), triton=kernel(reason="is not installed")).choose("cpu", F32) == "cpp"
    assert make_row(cpp=kernel(), triton=kernel(devices=("cuda",))).choose("cpu", F32) == "cpp"
    assert make_row(cpp=kernel(), triton=kernel(dtypes=(F16,))).choose("cpu", F32) == "cpp"
    assert make_row().choose("cpu", F32) == "reference"
    # A backend that the order leaves out is never taken by itself.
    row = make_row(order=("reference",), cpp=kernel())
    assert row.choose("cpu", F32) == "reference"
    with vf.backend("cpp"):
        assert row.choose("cpu", F32) == "cpp"


def test_a_device_without_an_order_gets_the_reference(make_row):
    assert make_row(reference=kernel(devices=("cpu", "xpu")), cpp=kernel()).choose("xpu", F32) == "reference"


def test_nothing_that_runs_is_an_error(make_row):
    with pytest.raises(BackendError, match="an_op: no backend runs on cpu with torch.float16"):
        make_row().choose("cpu", F16)
    with pytest.raises(BackendError, match="an_op: no backend runs on meta"):
        make_row().choose("meta", F32)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (Absent("is not written: too small"), "is not written: too small"),
        (kernel(devices=("cuda",)), "has no kernel for cpu"),
        (kernel(dtypes=(F16,)), "has no kernel for torch.float32"),
        (kernel(reason="is not built: run this"), "is not built: run this"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_an_error_and_never_another_backend(make_row, cell, why):
    row = make_row(triton=cell, cpp=kernel())
    assert row.why_not("triton", "cpu", F32) == why
    with vf.backend("triton"), pytest.raises(BackendError, match=f"^an_op: backend 'triton' was asked for but {why}$"):
        row.choose("cpu", F32)


def test_a_kernel_is_loaded_when_it_is_used(make_row):
    def refuse():
        raise AssertionError("loaded")

    row = make_row(cpp=kernel("cpp"), triton=Kernel(refuse, ("cpu",), (F32,), lambda device: "is not there"))
    assert row.function("an_op", torch.zeros(1))() == "cpp"
    with vf.backend("reference"):
        assert row.function("an_op", torch.zeros(1))() == ""


def test_a_row_needs_every_cell(make_row):
    with pytest.raises(ValueError, match="row an_op: needs a cell for each of"):
        Row("an_op", {"reference": kernel()}, {})
    make_row()
    assert "an_op" in _registry.rows


# --- forcing ---------------------------------------------------------------------------------------------------------


def test_contexts_nest_and_end_with_their_block(make_row):
    row = make_row(cpp=kernel(), triton=kernel())
    with vf.backend("cpp"):
        with vf.backend("reference"):
            assert row.choose("cpu", F32) == "reference"
            with vf.backend("auto"):
                assert row.choose("cpu", F32) == "triton"
            assert row.choose("cpu", F32) == "reference"
        assert row.choose("cpu", F32) == "cpp"
        with pytest.raises(KeyError), vf.backend("reference"):
            raise KeyError
        assert row.choose("cpu", F32) == "cpp"
    assert row.choose("cpu", F32) == "triton"


def test_a_context_holds_in_its_own_thread_only(make_row):
    row, seen = make_row(cpp=kernel()), []
    with vf.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(row.choose("cpu", F32)))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_the_environment_sets_the_default(make_row, monkeypatch):
    row = make_row(cpp=kernel(), triton=kernel())
    monkeypatch.setenv("VAECIRC_BACKEND", "reference")
    assert row.choose("cpu", F32) == "reference"
    with vf.backend("cpp"):
        assert row.choose("cpu", F32) == "cpp"
    with vf.backend("auto"):  # asked for in code, so it counts more
        assert row.choose("cpu", F32) == "triton"
    monkeypatch.setenv("VAECIRC_BACKEND", "cuda")
    with pytest.raises(BackendError, match="backend 'cuda' was asked for but no"):
        row.choose("cpu", F32)
    for empty in ("", "auto"):
        monkeypatch.setenv("VAECIRC_BACKEND", empty)
        assert row.choose("cpu", F32) == "triton"


def test_an_unknown_backend_is_bad_input(make_row, monkeypatch):
    with pytest.raises(
        InputError, match="^backend: backend 'c' is unknown; known: auto, reference, cpp, triton, cuda$"
    ):
        with vf.backend("c"):
            pass
    assert _registry.forced() is None
    monkeypatch.setenv("VAECIRC_BACKEND", "gpu")
    with pytest.raises(InputError, match="^VAECIRC_BACKEND: backend 'gpu' is unknown; known: auto"):
        make_row().choose("cpu", F32)


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_what_the_rule_does():
    table = vf.backends()
    assert list(table.columns) == ["op", "backend", "available", "chosen_for", "why_not"]
    assert list(zip(table.op, table.backend, strict=True)) == [(op, name) for op in _registry.rows for name in BACKENDS]
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for line in table.itertuples():
        row, able = _registry.rows[line.op], []
        for device in devices:
            try:
                with vf.backend(line.backend):
                    row.choose(device)
                able.append(device)
            except BackendError as error:
                assert f"{device}: {str(error).partition(' but ')[2]}" in line.why_not
        assert line.available == bool(able)
        assert (line.why_not == "") == (able == devices)
        assert line.chosen_for == ", ".join(device for device in devices if row.choose(device) == line.backend)
    assert {"cpu"} <= set(table[table.op == "effect_reduction"].chosen_for)


def test_what_the_table_says_is_available_runs():
    """On the CPU: the kernel of that backend is called, and no other one."""
    table = vf.backends()
    of_op = table[(table.op == "effect_reduction") & table.available & ~table.why_not.str.contains("cpu: ")]
    assert {"reference", "cpp"} <= set(of_op.backend)
    row, inputs = _registry.rows["effect_reduction"], (torch.zeros(2, 4), torch.ones(2, 3, 4))
    for name in of_op.backend:
        with vf.backend(name):
            assert row.function("effect_reduction", inputs[0]) is row.cells[name].load()["effect_reduction"]
            assert vf.ops.effect_reduction(*inputs).tolist() == [[[1.0]] * 3] * 2


def test_the_table_shows_the_forced_choice(monkeypatch):
    with vf.backend("reference"):
        assert set(vf.backends().query("chosen_for != ''").backend) == {"reference"}


# --- what is not there -----------------------------------------------------------------------------------------------

WITHOUT = """
import os, sys, torch
sys.modules["vaecirc_fast._C"] = None  # as where it is not built
import vaecirc_fast as vf
inputs = torch.zeros(2, 4), torch.ones(2, 3, 4)
assert vf.ops.effect_reduction(*inputs).shape == (2, 3, 1)
print(vf.backends().query("op == 'effect_reduction'").set_index("backend").chosen_for["reference"])
for name in ("cpp", "triton"):
    with vf.backend(name):
        try:
            vf.ops.effect_reduction(*inputs)
        except vf.errors.BackendError as error:
            print(error)
os.environ["TRITON_INTERPRET"] = "1"  # too late, and no reason to say that it runs
print(vf.backends().query("op == 'effect_reduction'").set_index("backend").why_not["triton"])
"""


def run(script, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("VAECIRC_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, timeout=120
    )


def test_what_is_missing_names_the_command_that_brings_it():
    done = run(WITHOUT)
    assert done.returncode == 0, done.stderr
    chosen, cpp, triton, late = done.stdout.splitlines()
    assert chosen == "cpu"
    assert "backend 'cpp' was asked for but the C++ module is not built" in cpp
    assert _native.BUILD_COMMAND in cpp
    assert "backend 'triton' was asked for but Triton" in triton
    assert late.startswith("cpu: Triton")
    for message in (triton, late):
        assert "set TRITON_INTERPRET=1 before the first import" in message or "pip install triton" in message


def test_the_instruction_set_is_the_widest_or_that_of_the_environment(monkeypatch):
    names = _native.cpp().instruction_sets()
    assert names[0] == "baseline" and names == [backend.instruction_set for backend in CPP]
    try:
        for name in names:
            monkeypatch.setenv("VAECIRC_ISA", name)
            assert _native._load() == (_native.cpp(), None)
            assert _native.instruction_set() == name
        monkeypatch.setenv("VAECIRC_ISA", "sse9")
        with pytest.raises(BackendError, match="^VAECIRC_ISA=sse9: not built or not supported .* available: baseline"):
            _native._load()
    finally:
        monkeypatch.delenv("VAECIRC_ISA")
        _native._load()
    assert _native.instruction_set() == names[-1]
    with pytest.raises(ValueError, match="instruction set 'sse9' was not built or does not run on this processor"):
        _native.cpp().set_instruction_set("sse9")
