"""What a study prints while it runs."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vaecirc_fast import report
from vaecirc_fast.report import console


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def run(name, directory):
    return SimpleNamespace(path=directory / f"{name}-0123456789ab", config={}, id="0123456789ab")


def test_a_line_for_each_run_with_the_time_left(tmp_path, clock, capsys):
    shown = report.Console(4)
    shown.announce(1, run("digits-vae-s0", tmp_path), "skipped")
    for number, seconds in ((2, 30), (3, 50)):
        shown.announce(number, run(f"digits-vae-s{number}", tmp_path), "started")
        clock[0] += seconds
        shown.announce(number, run(f"digits-vae-s{number}", tmp_path), "finished")
    assert capsys.readouterr().out.splitlines() == [
        "[1/4] digits-vae-s0: done before, skipped",
        "[2/4] digits-vae-s2: training and measuring",
        "[2/4] digits-vae-s2: finished in 30 s; 30 s gone, about 1 min 00 s left",
        "[3/4] digits-vae-s3: training and measuring",
        "[3/4] digits-vae-s3: finished in 50 s; 1 min 20 s gone, about 40 s left",
    ]


def test_the_end_has_the_table_and_the_report(study, capsys):
    page = report.write(study)
    report.Console(4).finish(study, page)
    out = capsys.readouterr()
    assert report.table(study).strip() in out.out
    assert str(page) in out.out.splitlines()[-1] and "kB" in out.out
    assert out.err == ""


def test_disabled_it_says_nothing(study, capsys):
    silent = report.Console(4, enabled=False)
    silent.announce(1, run("digits-vae-s0", study), "started")
    silent.announce(1, run("digits-vae-s0", study), "finished")
    silent.finish(study, study / "report.html")
    out = capsys.readouterr()
    assert out.out == "" and out.err == ""


def test_an_output_without_greek_letters_is_no_error(study, monkeypatch):
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        report.Console(1).finish(study, report.write(study))
        narrow.flush()
        assert b"?-VAE" in written.getvalue() and b"report.html" in written.getvalue()


def test_importing_the_report_is_cheap():
    heavy = ("matplotlib", "jinja2", "rich", "pandas", "scipy", "sklearn")
    code = f"import sys, vaecirc_fast.report; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
