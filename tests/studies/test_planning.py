"""Which runs a configuration means, what their ids depend on, and what an axis adds."""

import pytest
import torch
from PIL import Image

from vaecirc_fast import data
from vaecirc_fast.errors import InputError
from vaecirc_fast.studies import image, memory
from vaecirc_fast.studies.image import Config
from vaecirc_fast.sweeps import RunStore

TINY = {"data": ["digits"], "architectures": ["vae", "beta_vae"], "coverage": "all", "steps": 60, "precision": "fp32"}
CPU = torch.device("cpu")


def config(out, **changes):
    return Config.preset("smoke", out=out, **TINY | changes)


SETS = {"digits": data.load("digits"), "dsprites": data.Dataset()}


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ((), ["digits-vae-s0", "digits-vae-s1", "digits-beta_vae-s0", "digits-beta_vae-s1"]),
        (("*s1",), ["digits-vae-s1", "digits-beta_vae-s1"]),
        (("digits-beta_vae-*", "*-vae-s0"), ["digits-vae-s0", "digits-beta_vae-s0", "digits-beta_vae-s1"]),
    ],
)
def test_only_chooses_by_name(only, names):
    assert [name for name, _ in image.plan(config("x", seeds=2, only=only), CPU, SETS)] == names


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="only: no run matches digits-ae-.*; runs are named like dsprites-beta_vae-s0"):
        image.run(config(tmp_path / "new", only=["digits-ae-*"]), progress=False)
    assert not (tmp_path / "new").exists()


def ids(out="x", sets=SETS, **changes):
    store = RunStore(out)
    return {store.run(name, run).id for name, run in image.plan(config(out, **changes), CPU, sets)}


@pytest.mark.parametrize(
    "change",
    [
        {"latents": 5},
        {"width": 2.0},
        {"net": "conv"},
        {"steps": 61},
        {"batch_size": 9},
        {"lr": 2e-3},
        {"precision": "bf16"},
        {"images": 61},
        {"sweep_images": 9},
        {"pairs": 5},
        {"circuit_pairs": 3},
        {"circuit_units": 4},
        {"battery": "none"},
        {"data": ["dsprites"]},
    ],
)
def test_what_changes_numbers_changes_every_id(change):
    assert not ids() & ids(**change)


def test_other_images_under_the_same_name_change_every_id(tmp_path):
    """A folder's runs are its images', wherever it lies."""
    for folder, shade in (("mine", 10), ("copy", 10), ("yours", 11)):
        (tmp_path / folder).mkdir()
        for n in range(2):
            Image.new("L", (8, 8), shade + n).save(tmp_path / folder / f"{n}.png")
    mine, copy, yours = (
        ids(sets={"folder": data.load("folder", root=tmp_path / folder)}, data=["folder"], data_root="x")
        for folder in ("mine", "copy", "yours")
    )
    assert mine == copy and not mine & yours


def test_a_root_is_for_the_data_that_are_read_from_files(tmp_path):
    c = config(tmp_path, data=["dsprites", "digits"], data_root=tmp_path)
    sets = {name: data.load(name) for name in c.data}
    official = {r["data"]: r["official"] for _, r in image.plan(c, CPU, sets)}
    assert official == {"dsprites": True, "digits": False}


def test_what_changes_no_numbers_changes_no_id():
    assert ids() == ids(out="elsewhere") == ids(architectures=["beta_vae", "vae"]) == ids(workers=7) and len(ids()) == 2
    assert ids() < ids(seeds=3) and len(ids(seeds=3)) == 6 and ids(only=["*beta*"]) < ids()
    # beta is the beta-VAE's alone
    assert ids(architectures=["vae"]) == ids(architectures=["vae"], options=["beta_vae.beta=9"])
    assert not ids(architectures=["beta_vae"]) & ids(architectures=["beta_vae"], options=["beta_vae.beta=9"])


def names(**changes):
    return [name for name, _ in image.plan(config("x", **changes), CPU, SETS)]


def test_a_star_has_every_architecture_once_and_every_data_set_once():
    found = names(data=["digits", "dsprites"], coverage="star")
    assert found == ["digits-vae-s0", "digits-beta_vae-s0", "dsprites-vae-s0"]


def test_an_axis_varies_one_thing_at_a_time():
    axes = ["latents=4,6@digits", "beta_vae.beta=1,4,8.5", "width=0.5@vae,dsprites"]
    found = image.plan(config("x", data=["digits", "dsprites"], axes=axes, seeds=2, latents=4), CPU, SETS)
    runs = dict(found)
    assert len(runs) == len(found)
    assert [name.removesuffix("-s0") for name in runs if name.endswith("-s0")] == [
        *("digits-vae", "digits-vae-latents6"),
        *("digits-beta_vae", "digits-beta_vae-latents6"),
        *("digits-beta_vae-beta1", "digits-beta_vae-beta8.5"),
        *("dsprites-vae", "dsprites-vae-width0.5"),
        *("dsprites-beta_vae", "dsprites-beta_vae-beta1", "dsprites-beta_vae-beta8.5"),
    ]
    assert runs["digits-vae-latents6-s1"]["latents"] == 6 and runs["digits-vae-s1"]["latents"] == 4
    assert runs["dsprites-beta_vae-beta8.5-s0"]["options"] == {"beta": 8.5}
    assert runs["dsprites-beta_vae-s0"]["options"] == {"beta": 4.0}  # the model's default, said
    assert runs["dsprites-vae-width0.5-s0"] == {**runs["dsprites-vae-s0"], "width": 0.5}


def test_the_value_that_all_have_is_no_run_of_its_own():
    assert names(options=["beta_vae.beta=4"], axes=["beta_vae.beta=2,4"], architectures=["beta_vae"]) == [
        "digits-beta_vae-s0",
        "digits-beta_vae-beta2-s0",
    ]


def test_no_two_runs_share_a_configuration():
    every = [run for _, run in image.plan(config("x", axes=["latents=2,3", "latents=3"], seeds=2), CPU, SETS)]
    assert all(a != b for k, a in enumerate(every) for b in every[:k])


def test_memory_grows_with_what_a_run_holds():
    ((_, run),) = image.plan(config("x", architectures=["vae"]), CPU, SETS)
    least = memory.needed_bytes(run, SETS["digits"])
    assert memory.PROCESS < least < memory.PROCESS + 100e6
    assert memory.needed_bytes({**run, "batch_size": 100_000}, SETS["digits"]) > least + 100_000 * 4 * 64
    assert memory.needed_bytes({**run, "width": 64.0}, SETS["digits"]) > least + 1e9


def test_as_many_runs_as_work_at_a_time_have_to_fit(monkeypatch):
    runs = [run for _, run in image.plan(config("x"), CPU, SETS)]
    monkeypatch.setattr(memory.memory, "free_bytes", lambda device="cpu": 1.5 * memory.PROCESS)
    memory.check_memory(runs, SETS, 1, CPU)
    with pytest.raises(InputError, match=r"2 runs at a time, of the largest \(digits, .*lower workers, images \(200\)"):
        memory.check_memory(runs, SETS, 2, CPU)
