"""Configurations of the image study: presets, files, what they print, and what is refused before training."""

import json
import math

import pytest
import torch

from vaecirc_fast.errors import InputError
from vaecirc_fast.studies import configuration, image
from vaecirc_fast.studies.image import Config

TINY = {"data": ["digits"], "architectures": ["vae", "beta_vae"], "coverage": "all", "workers": 1, "steps": 60}


def config(out, **changes):
    return Config.preset("smoke", out=out, **TINY | changes)


@pytest.fixture
def untrainable(monkeypatch):
    """Fails the test that trains."""
    monkeypatch.setattr(image.training, "fit", lambda *args, **options: pytest.fail("training started"))


def test_presets():
    assert Config.preset("quick") == Config(**configuration.PRESETS["quick"])
    changed = Config.preset("smoke", out="here", lr=1, data=["dsprites"], data_root=None)
    assert str(changed.out) == "here" and changed.lr == 1.0 and isinstance(changed.lr, float)
    assert changed.data == ("dsprites",) and changed.data_root is None
    with pytest.raises(InputError, match="preset: 'huge' is unknown; known: smoke, quick, standard, paper"):
        Config.preset("huge")


@pytest.mark.parametrize("name", configuration.PRESETS)
def test_every_preset_runs_six_architectures_on_five_data_sets(name):
    preset = Config.preset(name)
    preset.check()
    assert len(preset.data_sets) == 5 and len(preset.architectures) == 6
    assert preset.seeds == (1 if name in ("smoke", "quick") else 3)


def test_the_originals_are_meant_where_a_root_is_given():
    assert config("x", data=[]).data_sets == configuration.STAND_INS
    given = config("x", data=[], data_root="/data")
    assert given.data_sets == configuration.ORIGINALS
    assert config("x", data=["digits"], data_root="/data").data_sets == ("digits",)


def test_a_configuration_prints_as_a_table():
    lines = str(Config.preset("quick", data_root=None, only=["a", "b"])).splitlines()
    assert [line.split()[0] for line in lines] == [*Config.__dataclass_fields__]
    assert len({line.index(line.split(None, 1)[1]) for line in lines}) == 1  # one column of values
    shown = dict(line.split(None, 1) for line in lines)
    assert shown["data"] == ", ".join(configuration.STAND_INS) and shown["only"] == "a, b"
    assert shown["steps"] == str(Config.preset("quick").steps) and shown["data_root"] == "none"


def test_a_configuration_from_a_file(tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"steps": 7, "out": "there", "only": ["*s0"], "lr": 2}))
    read = Config.from_file(path, config("here"))
    assert read == config("here", steps=7, only=["*s0"], lr=2.0).replaced({"out": "there"})
    record = tmp_path / "again.json"  # what a study records of itself can be run again
    record.write_text(json.dumps(image._settings(read)["config"]))
    assert Config.from_file(record, Config()) == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stepz": 3}', "config: 'stepz' is no field; known: out, data, architectures"),
        ('{"steps": "3"}', "steps: expected int, got '3'"),
        ('{"steps": 3.0}', r"steps: expected int, got 3\.0"),
        ('{"steps": true}', "steps: expected int, got True"),
        ('{"steps": null}', "steps: expected int, got None"),
        ('{"lr": "fast"}', "lr: expected float, got 'fast'"),
        ('{"lr": true}', "lr: expected float, got True"),
        ('{"net": 1}', "net: expected str, got 1"),
        ('{"data": "digits"}', "data: expected a list of names, got 'digits'"),
        ('{"data": [1]}', r"data: expected a list of names, got \[1\]"),
        ('{"out": 5}', "out: expected a path, got 5"),
        ('{"out": null}', "out: expected a path, got None"),
        ('{"data_root": []}', r"data_root: expected a path, got \[\]"),
        ("[1, 2]", r"study\.json: expected a JSON object of fields, got list"),
        ('{"steps": 3', r"study\.json is not valid JSON"),
        ("", r"study\.json is not valid JSON"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Config.from_file(path, Config())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file or directory"):
        Config.from_file(tmp_path / "none.json", Config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["digits", "mnist"]}, "data: 'mnist' is unknown; known: .*digits"),
        ({"architectures": []}, "architectures: expected at least one"),
        ({"architectures": ["gan"]}, "architectures: 'gan' is unknown; known: vae, beta_vae"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"seeds": -1}, "seeds: expected at least 1, got -1"),
        ({"latents": 0}, "latents: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"images": 1}, "images: expected at least 2, got 1"),
        ({"sweep_images": 1}, "sweep_images: expected at least 2, got 1"),
        ({"pairs": 3}, "pairs: expected at least 4, got 3"),
        ({"battery": "all"}, "battery: expected samples, grid or none, got 'all'"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"net": "transformer"}, "net: unknown 'transformer'; known are conv, mlp"),
        ({"precision": "fp8"}, "precision: unknown 'fp8'; known are auto, fp32, bf16"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
        ({"lr": math.inf}, "lr: expected a positive number, got inf"),
        ({"width": 0.0}, "width: expected a positive number, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"coverage": "half"}, "coverage: expected all or star, got 'half'"),
        ({"options": ["beta=4"]}, "options: expected ARCHITECTURE.OPTION=VALUE, such as beta_vae.beta=4, got 'beta=4'"),
        ({"options": ["gan.beta=4"]}, "options: 'gan' is no architecture; known: vae, "),
        ({"options": ["beta_vae.gamma=4"]}, "options: beta_vae has no option 'gamma'; it has beta"),
        ({"options": ["vae.beta=4"]}, "options: vae has no option 'beta'; it has none"),
        ({"options": ["beta_vae.beta=-4"]}, "beta: expected a positive number, got -4"),
        ({"options": ["beta_vae.beta=NaN"]}, "beta: expected a positive number, got nan"),
        ({"axes": ["latents"]}, "axes: expected NAME=VALUE,VALUE... such as latents=4,6,16 or beta_vae.beta=1,8, got"),
        ({"axes": ["seeds=4"]}, "axes: 'seeds' is neither ARCHITECTURE.OPTION nor one of latents, width"),
        ({"axes": ["latents=4,none"]}, "latents: expected int, got 'none'"),
        ({"axes": ["latents=0"]}, "latents: expected at least 1, got 0"),
        ({"axes": ["vae.beta=4"]}, "axes: vae has no option 'beta'"),
        ({"axes": ["latents=4@mnist"]}, "axes: 'mnist' in 'latents=4@mnist' is neither a data set nor an architecture"),
        (
            {"images": 10**9, "data": ["dsprites"], "batch_size": 10**7},
            "the largest run .* needs .* GB of memory, of which .* are free; lower workers, images",
        ),
        ({"data_root": "/nowhere"}, "data_root: none of digits is read from files"),
        ({"data": ["dsprites"], "data_root": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_written(tmp_path, untrainable, changes, message):
    with pytest.raises(InputError, match=message):
        image.run(config(tmp_path / "new", **changes), progress=False)
    assert not (tmp_path / "new").exists()


def test_cuda_without_a_gpu_is_refused(tmp_path, untrainable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: cuda was asked for, but torch sees no CUDA device"):
        image.run(config(tmp_path / "new", device="cuda"), progress=False)
    assert not (tmp_path / "new").exists()
    assert image._device(config(tmp_path, device="auto")) == torch.device("cpu")
