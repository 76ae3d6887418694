"""The image study end to end on tiny numbers: what it stores, what it skips, how it survives, what it refuses."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vaecirc_fast as vf
from vaecirc_fast import _files, data, training
from vaecirc_fast._tensor_files import read_tensors
from vaecirc_fast.data.folder import Folder
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Effects
from vaecirc_fast.metrics import model_ces, model_specificity
from vaecirc_fast.studies import image, manipulation, measuring
from vaecirc_fast.studies.image import Config
from vaecirc_fast.studies.judged import judged_images
from vaecirc_fast.sweeps import RunStore

TINY = {"steps": 60, "images": 60, "sweep_images": 8, "pairs": 4, "latents": 3, "batch_size": 8, "precision": "fp32"}
TINY |= {"circuit_pairs": 0, "battery": "none"}  # circuits and disentanglement metrics have tests of their own
TINY |= {"data": ["digits"], "architectures": ["vae", "beta_vae"], "coverage": "all", "workers": 1}
CPU = torch.device("cpu")
SWEPT = {"ces_raw", "ces_posterior", "ces_resample", "specificity"}
NAMES = {"reconstruction", "active", "mig"} | SWEPT


def config(out, **changes):
    return Config.preset("smoke", out=out, **TINY | changes)


def study(out, **changes):
    torch.set_num_threads(1)
    return image.run(config(out, **changes), progress=False)


def strict(path):
    """JSON as RFC 8259 has it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def results(out):
    """The result of every run by its name without the id, less what a clock measured."""
    found = {}
    for file in sorted(out.glob("runs/*/result.json")):
        result = strict(file)
        del result["timing"]
        found[file.parent.name.rsplit("-", 1)[0]] = result
    return found


def as_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished study of a VAE and a beta-VAE, for tests that only read it."""
    out = tmp_path_factory.mktemp("undisturbed")
    study(out)
    return out


@pytest.fixture
def untrainable(monkeypatch):
    """Fails the test that trains."""
    monkeypatch.setattr(image.training, "fit", lambda *args, **options: pytest.fail("training started"))


# --- what a study leaves ---------------------------------------------------------------------------------------------


def test_a_study_leaves_runs_and_a_report(undisturbed):
    runs = [path.name for path in sorted(undisturbed.glob("runs/*"))]
    assert [re.sub("-[0-9a-f]{12}$", "", name) for name in runs] == ["digits-beta_vae-s0", "digits-vae-s0"]
    each = ["checkpoint", "effects-fixed", "effects-posterior", "effects-resample", "model", "pictures"]
    expected = [f"runs/{run}/{name}.safetensors" for run in runs for name in each]
    expected += [f"runs/{run}/{name}.json" for run in runs for name in ("config", "result")]
    assert files(undisturbed) == sorted([*expected, ".lock", "findings.json", "report.html", "study.json"])
    page = (undisturbed / "report.html").read_text()
    assert all(run in page for run in runs) and len(page) < 3_000_000
    record = strict(undisturbed / "study.json")
    assert sorted(record["runs"]) == runs and record["study"] == "image"
    assert record["config"]["steps"] == 60 and record["config"]["data"] == ["digits"]


def test_a_result_is_strict_json_with_intervals_and_the_untrained_control(undisturbed):
    for name, result in results(undisturbed).items():
        assert set(result["metrics"]) == set(result["control"]["untrained"]) == set(result["definitions"]) == NAMES
        for metrics in (result["metrics"], result["control"]["untrained"]):
            for key, row in metrics.items():
                assert math.isfinite(row["value"]) and row["level"] == 0.95
                assert row["n"] == (8 if key in SWEPT else 60)
                if key == "active":
                    assert row["low"] is None and row["high"] is None
                else:
                    assert row["low"] <= row["value"] <= row["high"], (name, key)
        trained, untrained = result["metrics"], result["control"]["untrained"]
        permuted = result["control"]["permuted"]
        assert set(permuted) == {"mig", "specificity"} and permuted["mig"]["resampled"] == "permutations"
        assert all(entry["low"] < entry["value"] < entry["high"] and entry["n"] == 5 for entry in permuted.values())
        assert all(trained[key]["value"] != untrained[key]["value"] for key in NAMES - {"active"})
        assert trained["reconstruction"]["value"] < untrained["reconstruction"]["value"]
        assert isinstance(result["trained"], bool) and result["trained"] == (
            trained["reconstruction"]["value"] <= 0.5 and trained["active"]["value"] >= 3
        )
        assert result["config"]["architecture"] in name and result["config"]["seed"] == 0
        assert [row["step"] for row in result["history"]] == [1, 60]
        assert all(math.isfinite(value) for row in result["history"] for value in row.values())
        assert result["machine"]["version"] == vf.__version__ and result["machine"]["threads"] == 1


def test_input_manipulations_lie_in_their_intervals(undisturbed):
    for result in results(undisturbed).values():
        for state in ("trained", "untrained"):
            estimates = [
                row[key] for row in result["inputs"][state]["sites"] for key in ("polysemanticity", "monosemantic")
            ]
            assert estimates and all(e["low"] <= e["value"] <= e["high"] for e in estimates if e["value"] is not None)


def test_latents_are_a_row_each(undisturbed):
    columns = ["latent", "share", "active", "variance", "burda_active", "scale"]
    columns += [f"{metric}{end}" for metric in ("ces_posterior", "specificity") for end in ("", "_low", "_high")]
    for result in results(undisturbed).values():
        assert [row["latent"] for row in result["latents"]] == [0, 1, 2]
        assert all(list(row) == columns for row in result["latents"])
        mean = sum(row["ces_posterior"] for row in result["latents"]) / 3
        assert result["metrics"]["ces_posterior"]["value"] == pytest.approx(mean, rel=1e-6)
        assert result["metrics"]["active"]["value"] == sum(row["active"] for row in result["latents"])


def test_numbers_are_those_of_the_stored_files(undisturbed):
    """From the stored effects, and again from the stored model: the result holds no number of its own making."""
    ds = data.load("digits")
    for run, result in RunStore(undisturbed).results():
        for name, grid in (("ces_raw", "fixed"), ("ces_posterior", "posterior"), ("ces_resample", "resample")):
            estimate, drawn = model_ces(Effects.load(run / f"effects-{grid}.safetensors"))
            row = result["metrics"][name]
            assert (row["value"], row["low"], row["high"]) == (estimate.value, estimate.low, estimate.high)
            assert result["replicates"][name] == drawn.tolist()
        posterior = Effects.load(run / "effects-posterior.safetensors")
        assert result["metrics"]["specificity"]["value"] == model_specificity(posterior)[0].value
        assert posterior.samples == 8 and posterior.tensor.shape == (3, 8, 64) and posterior.effect == "l1"
        model = vf.models.load(run / "model.safetensors")
        again = measuring.measure(model, ds, images=60, sweep_images=8, seed=image.EVALUATION_SEED)
        assert as_json(again.metrics) == result["metrics"] and as_json(again.latents) == result["latents"]
        pictures, _ = read_tensors(run / "pictures.safetensors", "pictures", "")
        assert {name: tuple(t.shape) for name, t in pictures.items()} == {
            "inputs": (8, 1, 8, 8),
            "reconstructions": (8, 1, 8, 8),
            "traversals": (3 * 7, 1, 8, 8),
        }
        assert all(torch.equal(t, again.pictures[name]) for name, t in pictures.items())


def test_the_control_is_the_network_before_training(undisturbed):
    ds = data.load("digits")
    for _, result in RunStore(undisturbed).results():
        fresh = image.build(result["config"], ds, CPU)
        measured = measuring.measure(fresh, ds, images=60, sweep_images=8, seed=image.EVALUATION_SEED)
        assert as_json(measured.metrics) == result["control"]["untrained"]
        inputs = manipulation.manipulate(fresh, ds, pairs=4, seed=image.EVALUATION_SEED)
        assert as_json(inputs) == result["inputs"]["untrained"] != result["inputs"]["trained"]
        assert set(inputs) == set(result["inputs"]["trained"])


def test_what_a_run_gives_depends_on_its_configuration_alone(undisturbed, tmp_path):
    """Not on what ran before it, nor on the global random state, nor on the directory."""
    torch.manual_seed(12345)
    study(tmp_path, only=["*beta_vae*"])
    assert results(tmp_path) == {"digits-beta_vae-s0": results(undisturbed)["digits-beta_vae-s0"]}


def test_models_are_judged_on_every_image_where_there_are_few():
    ds = data.load("digits")
    judged = judged_images(ds, 5000, 0)
    x, v = judged.x, judged.v
    assert judged_images(ds, 5000, 0) is judged is not judged_images(ds, 5000, 1)
    assert len(x) == len(v) == 1797
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, ds.images(order)) and torch.equal(v, ds.factors(order))


def test_images_without_labels_have_no_gap_between_them(tmp_path):
    for n in range(12):
        Image.new("L", (8, 8), 20 * n).save(tmp_path / f"{n}.png")
    ds = Folder(tmp_path, side=8)
    model = vf.models.build("vae", ds.shape, 3, net="mlp", width=0.25)
    measured = measuring.measure(model, ds, images=12, sweep_images=4, seed=0)
    assert measured.metrics["mig"]["value"] is measured.metrics["mig"]["low"] is None
    assert all(measured.metrics[name]["value"] is not None for name in NAMES - {"mig"})
    as_json([measured.metrics, measured.latents, measured.replicates])


# --- skipping and choosing -------------------------------------------------------------------------------------------


def test_a_second_call_trains_nothing_and_gives_the_same_report(undisturbed, untrainable, monkeypatch, capsys):
    monkeypatch.setattr(image, "examine", lambda *args, **options: pytest.fail("measured again"))
    monkeypatch.setattr(data.memory, "free_bytes", lambda device="cpu": 0.0)  # nothing that is left to do needs any
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/*")}
    page = (undisturbed / "report.html").read_bytes()
    path = image.run(config(undisturbed), progress=True)
    assert path == undisturbed / "report.html" and path.read_bytes() == page
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/*")} == before
    printed = capsys.readouterr().out
    assert printed.count("done before, skipped") == 2 and str(path) in printed


def test_more_seeds_keep_the_runs_that_are_done(undisturbed, tmp_path, monkeypatch):
    out = shutil.copytree(undisturbed, tmp_path / "copy")
    trained = []
    fit = training.fit
    monkeypatch.setattr(image.training, "fit", lambda *args, **o: trained.append(o["seed"]) or fit(*args, **o))
    study(out, seeds=2, only=["*-vae-*"])
    assert trained == [1]
    assert set(results(out)) == {"digits-beta_vae-s0", "digits-vae-s0", "digits-vae-s1"}
    assert results(out)["digits-vae-s0"] == results(undisturbed)["digits-vae-s0"]
    first, second = (results(out)[f"digits-vae-s{seed}"]["metrics"]["ces_raw"]["value"] for seed in (0, 1))
    assert first != second


# --- what ends a study early -----------------------------------------------------------------------------------------


def arguments(out, **changes):
    """The same configuration for the command line."""
    options = TINY | {"out": out, "architectures": ["vae"], **changes}
    flags = []
    for key, value in options.items():
        flags += [f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return ["study", "image", "--preset", "smoke", *flags]


def slow_study(pace, out, **changes):
    script = Path(__file__).with_name("slow_study.py")
    command = [sys.executable, str(script), pace, *arguments(out, **changes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_under_way(process):
    for line in process.stdout:
        if line == "under way\n":
            return
    pytest.fail(f"ended early: {process.stderr.read()}")


def checkpoint(out):
    (path,) = out.glob("runs/*/checkpoint.safetensors")
    return path


def test_a_killed_study_ends_like_an_undisturbed_one(undisturbed, tmp_path, monkeypatch):
    with slow_study("wait", tmp_path) as process:
        until_under_way(process)
        with pytest.raises(InputError, match="another process is working"):
            study(tmp_path, architectures=["vae"])
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and results(tmp_path) == {}
    assert read_tensors(checkpoint(tmp_path), "checkpoint", "")[1]["step"] == 40
    steps = []
    step = training.loop._Trainer.advance
    monkeypatch.setattr(training.loop._Trainer, "advance", lambda self: steps.append(self.step) or step(self))
    study(tmp_path, architectures=["vae"])
    assert steps == list(range(40, 60))
    assert results(tmp_path) == {"digits-vae-s0": results(undisturbed)["digits-vae-s0"]}
    ours, theirs = (next(out.glob("runs/digits-vae-*")) for out in (tmp_path, undisturbed))
    assert ours.name == theirs.name and files(ours) == files(theirs)
    for name in ("model", "checkpoint", "pictures"):
        path = f"{name}.safetensors"
        assert (ours / path).read_bytes() == (theirs / path).read_bytes(), name
    for grid in ("fixed", "posterior", "resample"):  # their plans hold times
        path = f"effects-{grid}.safetensors"
        assert torch.equal(Effects.load(ours / path).tensor, Effects.load(theirs / path).tensor)
        assert torch.equal(Effects.load(ours / path).replicates, Effects.load(theirs / path).replicates)


def test_ctrl_c_exits_with_130_and_a_rerun_completes(undisturbed, tmp_path):
    """From outside, as a terminal sends it; the step in progress is kept."""
    with slow_study("crawl", tmp_path, steps=300) as process:
        until_under_way(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted: finished steps are kept; the same command goes on from there" in errors
    assert read_tensors(checkpoint(tmp_path), "checkpoint", "")[1]["step"] >= 50
    assert results(tmp_path) == {} and not (tmp_path / "report.html").exists()
    study(tmp_path, architectures=["vae"], steps=300)
    assert results(tmp_path)["digits-vae-s0"]["history"][-1]["step"] == 300
    assert (tmp_path / "report.html").exists()


class Killed(BaseException):
    """Not an Exception, so that no handler mistakes it for an error of its own."""


@pytest.mark.parametrize("after", [False, True], ids=["before the file is there", "after"])
def test_stopped_at_any_write_a_rerun_ends_the_same(undisturbed, tmp_path, monkeypatch, after):
    """One call after another, each stopped at the first write that no earlier call was stopped at."""
    expected = {"digits-vae-s0": results(undisturbed)["digits-vae-s0"]}
    replace = _files.os.replace
    reached = []

    def stop(source, target):
        if Path(target).name not in reached:
            assert not Path(target).exists()  # the only way to its name is this call
            reached.append(Path(target).name)
            if after:
                replace(source, target)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(_files.os, "replace", stop)
    for _ in range(30):
        done = results(tmp_path)
        assert done in ({}, expected)
        try:
            study(tmp_path, architectures=["vae"])
            break
        except Killed:
            pass
    effects = [f"effects-{grid}.safetensors" for grid in ("fixed", "posterior", "resample")]
    assert [name for name in reached if not name.startswith(".")] == [
        *("config.json", "checkpoint.safetensors", "model.safetensors"),
        *(*effects, "pictures.safetensors", "result.json", "study.json", "findings.json", "report.html"),
    ]
    assert results(tmp_path) == expected
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("full", ["checkpoint", "effects-posterior", "result.json"])
def test_a_full_disk_leaves_nothing_that_a_later_run_would_trust(undisturbed, tmp_path, monkeypatch, full):
    """The write fails half way, as it does on a disk that fills up."""
    write = Path.write_bytes

    def half(self, content):
        if full in self.name:
            write(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", lambda self, text, encoding="utf-8": half(self, text.encode(encoding)))
    with pytest.raises(InputError, match=f"cannot write .*{full}.*: No space left on device"):
        study(tmp_path, architectures=["vae"])
    assert results(tmp_path) == {} and not (tmp_path / "report.html").exists()
    assert not [name for name in files(tmp_path) if full in name or name.endswith(".tmp")]
    monkeypatch.undo()
    study(tmp_path, architectures=["vae"])
    assert results(tmp_path) == {"digits-vae-s0": results(undisturbed)["digits-vae-s0"]}


@pytest.mark.parametrize("damage", [0.5, 0.01, 0.0])
def test_a_checkpoint_cut_short_is_named(undisturbed, tmp_path, damage):
    out = shutil.copytree(undisturbed, tmp_path / "copy")
    path = next(out.glob("runs/digits-vae-*")) / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * damage)])
    path.with_name("result.json").unlink()
    with pytest.raises(InputError, match=r"digits-vae-.*checkpoint\.safetensors is cut short, .*; delete it to start"):
        study(out)
    assert not path.with_name("result.json").exists()
    path.unlink()
    study(out)
    assert results(out) == results(undisturbed)


@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_a_damaged_run_is_named(undisturbed, tmp_path, untrainable, name):
    out = shutil.copytree(undisturbed, tmp_path / "copy")
    path = next(out.glob("runs/digits-beta*")) / name
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=f"digits-beta_vae-s0-.*{name}"):
        study(out)


def test_an_output_that_is_a_file_is_refused_before_training(tmp_path, untrainable):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/vaecirc")):
        with pytest.raises(InputError, match="out: cannot write to"):
            study(out)
