"""The command line: exit codes, messages on the error stream, JSON alone on the output stream."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import cli, report
from vaecirc_fast.errors import BackendError, InputError, MissingExtra, TrainingDiverged
from vaecirc_fast.studies import image

TINY = ["--steps", "20", "--images", "60", "--sweep-images", "8", "--pairs", "4", "--latents", "3", "--batch-size", "8"]
TINY += ["--circuit-pairs", "0", "--precision", "fp32", "--architectures", "vae", "--data", "digits"]


def smoke(out, *more):
    return ["study", "image", "--preset", "smoke", "--out", str(out), *TINY, *more]


def run(*arguments, **environment):
    """The command in a process of its own, from a directory that is not the checkout's."""
    command = [sys.executable, "-m", "vaecirc_fast.cli", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd="/", timeout=300)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished study, for tests that only read it."""
    out = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main([*smoke(out), "--json"]) == 0
    torch.set_num_threads(threads)
    return out


def refused(capsys, arguments, message, code=2):
    """One line on the error stream, nothing on the other."""
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vaecirc: ") and err.count("\n") == 1 and message in err, err


# --- usage -----------------------------------------------------------------------------------------------------------


def test_usage(capsys):
    assert cli.main([]) == 2
    nothing = capsys.readouterr().out
    for flag in ("-h", "--help"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out == nothing == cli.USAGE + "\n"
    assert all(f"vaecirc {command}" in nothing for command in ("study image", "report", "doctor"))


def test_unknown_names(capsys):
    refused(capsys, ["paint"], "command 'paint' is unknown; known: study, report, doctor")
    refused(capsys, ["study"], "study: expected its name, image, got nothing")
    refused(capsys, ["study", "sound"], "study: expected its name, image, got sound")
    refused(capsys, ["study", "--preset", "smoke"], "study: expected its name, image, got --preset")


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "image", "--preset", "smoke", "--nonsense", "3"],
        ["study", "image", "--preset", "smoke", "--seeds", "two"],
        ["study", "image", "--preset", "smoke", "--step", "3"],  # no abbreviations
        ["study", "image", "--preset"],
        ["report"],
        ["report", "x", "--nonsense"],
        ["doctor", "--nonsense"],
        ["doctor", "x"],
    ],
)
def test_wrong_options_exit_with_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr(image, "run", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err


@pytest.mark.parametrize("command", [["study", "image"], ["report"], ["doctor"]])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out
    if command[0] == "study":
        assert all(option in out for option in ("--seeds", "--sweep-images", "--preset", "--config", "smoke, quick"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x: wrong"), 2),
        (MissingExtra("install y"), 2),
        (TrainingDiverged("at step 3"), 1),
        (BackendError("no cpp"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes(error, code, capsys, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(image, "run", fail)
    assert cli.main(["study", "image"]) == code
    out, err = capsys.readouterr()
    assert out == "" and ("interrupted: " if code == 130 else f"vaecirc: {error}\n") in err


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(image, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["study", "image"])


# --- study -----------------------------------------------------------------------------------------------------------


def test_options_reach_the_configuration(tmp_path, capsys, monkeypatch):
    """The command line over the file over the preset."""
    asked = []

    def run(config, progress=True):
        asked.append((config, progress))
        return tmp_path / "report.html"

    monkeypatch.setattr(image, "run", run)
    monkeypatch.setattr(report, "summary", lambda out: [])
    assert cli.main(["study", "image"]) == 0
    assert asked[-1] == (image.Config.preset("quick"), True)
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"steps": 5, "lr": 0.5, "only": ["*s0"]}))
    options = ["--preset", "smoke", "--config", str(file), "--steps", "6", "--data", "digits", "dsprites", "--json"]
    assert cli.main(["study", "image", *options]) == 0
    expected = image.Config.preset("smoke", steps=6, lr=0.5, only=["*s0"], data=["digits", "dsprites"])
    assert asked[-1] == (expected, False)
    assert cli.main(["study", "image", "--data-root", "/data", "--only", "*", "--device", "cpu"]) == 0
    assert asked[-1][0] == image.Config.preset("quick", data_root="/data", only=["*"], device="cpu")


def test_a_study_prints_its_progress_table_and_report(tmp_path, capsys):
    assert cli.main(smoke(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "[1/1] digits-vae-s0: training and measuring" in out and "[1/1] digits-vae-s0: finished in" in out
    assert str(tmp_path / "report.html") in out and err == ""
    assert cli.main(smoke(tmp_path)) == 0
    assert "[1/1] digits-vae-s0: done before, skipped" in capsys.readouterr().out


def parsed(text):
    """One line of strict JSON and nothing else."""

    def refuse(constant):
        raise AssertionError(f"not JSON: {constant}")

    assert text.endswith("\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def test_json_of_a_study_is_alone_on_the_output(finished, capsys):
    assert cli.main([*smoke(finished), "--json"]) == 0
    out, err = capsys.readouterr()
    answer = parsed(out)
    assert err == "" and answer["report"] == str(finished / "report.html")
    assert [row["config"]["architecture"] for row in answer["runs"]] == ["vae"]
    assert answer["runs"] == report.summary(finished) and "ces_posterior" in answer["runs"][0]["metrics"]


def test_a_study_in_a_process_of_its_own(tmp_path):
    """With progress, bars and warnings off or on the error stream: the output is the JSON."""
    done = run(*smoke(tmp_path / "out", "--json"))
    assert done.returncode == 0, done.stderr
    answer = parsed(done.stdout)
    assert Path(answer["report"]) == tmp_path / "out" / "report.html" and Path(answer["report"]).exists()
    assert len(answer["runs"]) == 1


def test_wrong_settings_of_a_study(tmp_path, capsys):
    out = tmp_path / "out"
    config = tmp_path / "study.json"
    refused(capsys, ["study", "image", "--preset", "huge"], "preset: 'huge' is unknown; known: smoke, quick")
    refused(capsys, smoke(out, "--config", config), f"cannot read {config}: No such file or directory")
    config.write_text('{"stepz": 3}')
    refused(capsys, smoke(out, "--config", config), "config: 'stepz' is no field; known: out, data,")
    config.write_text('{"steps": "many"}')
    refused(capsys, smoke(out, "--config", config), "steps: expected int, got 'many'")
    config.write_text('{"steps": 3')
    refused(capsys, smoke(out, "--config", config), f"{config} is not valid JSON")
    refused(capsys, smoke(out, "--data", "mnist"), "data: 'mnist' is unknown; known: ")
    refused(capsys, smoke(out, "--seeds", "0"), "seeds: expected at least 1, got 0")
    refused(capsys, smoke(out, "--lr", "nan"), "lr: expected a positive number, got nan")
    refused(capsys, smoke(out, "--only", "x"), "only: no run matches x; runs are named like")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(tmp_path, capsys):
    refused(capsys, smoke(tmp_path / "out", "--device", "cuda"), "device: cuda was asked for, but torch sees no CUDA")


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    refused(capsys, smoke(tmp_path / "file"), f"out: cannot write to {tmp_path / 'file'}: ")
    refused(capsys, smoke(tmp_path / "file" / "below"), "out: cannot write to")
    refused(capsys, smoke("/proc/vaecirc"), "out: cannot write to /proc/vaecirc: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_cut_in_half(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "copy")
    path = next(out.glob("runs/*/checkpoint.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.with_name("result.json").unlink()
    refused(capsys, [*smoke(out), "--json"], f"{path} is cut short, damaged or no safetensors file")


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """What a script sees: the exit code, one line of error, no traceback."""
    (tmp_path / "study.json").write_text('{"stepz": 3}')
    done = run(*smoke(tmp_path / "out", "--config", tmp_path / "study.json"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("vaecirc: config: 'stepz' is no field") and done.stderr.count("\n") == 1


# --- report ----------------------------------------------------------------------------------------------------------


def test_a_report_is_written_again(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "copy")
    page = out / "report.html"
    before = page.read_text()
    page.unlink()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == before and "digits-vae-s0" in before
    assert cli.main(["report", str(out), "--json"]) == 0
    answer = parsed(capsys.readouterr().out)
    expected = {"report": str(page), "runs": report.summary(out), "findings": report.findings(out)}
    assert answer == json.loads(json.dumps(expected)) and answer["findings"]["findings"]


def test_a_reader_that_closes_early_is_no_crash(finished):
    """As in `vaecirc report DIR --json | head -0`."""
    command = [sys.executable, "-m", "vaecirc_fast.cli", "report", str(finished), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, "")


def test_a_report_is_opened_on_request(finished, capsys, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert cli.main(["report", str(finished)]) == 0 and opened == []
    assert cli.main(["report", str(finished), "--open"]) == 0
    assert opened == [(finished / "report.html").resolve().as_uri()]


def test_no_report_without_runs(finished, tmp_path, capsys):
    refused(capsys, ["report", tmp_path / "nowhere"], str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    refused(capsys, ["report", tmp_path], str(tmp_path))
    out = shutil.copytree(finished, tmp_path / "copy")
    file = next(out.glob("runs/*/result.json"))
    file.write_text(file.read_text()[:50])
    page = (out / "report.html").read_bytes()
    refused(capsys, ["report", out], f"{file} is not valid JSON")
    assert (out / "report.html").read_bytes() == page


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_backends_tell(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = parsed(capsys.readouterr().out)
    assert facts["backends"] == vf.backends().to_dict("records")
    assert {row["op"] for row in facts["backends"]} >= {"effect_reduction"}
    for row in facts["backends"]:
        assert row["available"] or row["why_not"]
        assert row["available"] or not row["chosen_for"]
    versions = facts["versions"]
    assert versions["vaecirc-fast"] == vf.__version__ and versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["machine"]["threads"] == torch.get_num_threads() == 1


def test_doctor_is_honest_about_a_missing_module(capsys, monkeypatch):
    from vaecirc_fast import _native

    monkeypatch.setattr(_native, "cpp_reason", lambda: "its C++ module is not built; run make")
    assert cli.main(["doctor", "--json"]) == 0
    facts = parsed(capsys.readouterr().out)
    assert facts["machine"]["C++ module"] == "its C++ module is not built; run make"
    assert facts["machine"]["instruction sets here"] == "none"
    (row,) = (r for r in facts["backends"] if (r["op"], r["backend"]) == ("effect_reduction", "cpp"))
    assert not row["available"] and "not built; run make" in row["why_not"] and row["chosen_for"] == ""
    (row,) = (r for r in facts["backends"] if (r["op"], r["backend"]) == ("effect_reduction", "reference"))
    assert "cpu" in row["chosen_for"]


def test_doctor_as_text_in_a_process_of_its_own():
    done = run("doctor")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("versions", "machine", "backends", torch.__version__, vf.__version__, "effect_reduction"):
        assert text in done.stdout
    for row in vf.backends().itertuples():
        (line,) = (line.split() for line in done.stdout.splitlines() if line.split()[:2] == [row.op, row.backend])
        assert line[2] == ("yes" if row.available else "no")


def test_a_backend_that_does_not_exist_is_named():
    done = run("doctor", VAECIRC_BACKEND="fortran")
    assert done.returncode == 2 and done.stdout == ""
    assert "VAECIRC_BACKEND: backend 'fortran' is unknown; known: auto, reference, cpp, triton, cuda" in done.stderr
    assert done.stderr.count("\n") == 1
