"""The result of a sweep: its file, its tables and labels, and the metrics that refuse what they are not defined for."""

import dataclasses

import numpy as np
import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import _files
from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Effects, latent_sweep

TENSORS = ("tensor", "group_weights", "step_size", "replicates", "step_replicates")
GROUPS = partitions.from_labels([0, 1, 1, 2, 2, 2], ["one", "two", "three"])


def sweep(samples=12, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()).to(dtype)
    return latent_sweep(net, torch.randn(samples, 4, dtype=dtype), **{"groups": GROUPS, **options})


SWEEPS = {
    "mean": {},
    "float64": {"dtype": torch.float64},
    "few samples": {"samples": 3},
    "samples kept": {"reduce": None},
    "no replicates": {"replicates": 0},
    "no step size": {"grid": "resample"},
    "zero steps": {"grid": torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])},
    "traverse": {"grid": "traverse", "effect": "mse"},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_saved_sweep_comes_back_as_it_was(tmp_path, name):
    E = sweep(**SWEEPS[name])
    E.save(tmp_path / "effects.safetensors")
    back = Effects.load(tmp_path / "effects.safetensors")
    for field in dataclasses.fields(Effects):
        ours, theirs = getattr(E, field.name), getattr(back, field.name)
        if field.name in TENSORS and ours is not None:
            assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
        else:
            assert theirs == ours and type(theirs) is type(ours), field.name
    assert (E.replicates is None) == (name in ("samples kept", "no replicates"))
    assert (E.step_size is None) == (name in ("no step size", "traverse"))
    if name != "traverse":
        assert back.ces().equals(E.ces()) and back.specificity().equals(E.specificity())
    assert [path.name for path in tmp_path.iterdir()] == ["effects.safetensors"]


def test_saving_takes_a_string_and_makes_the_directory(tmp_path):
    E = sweep()
    E.save(str(tmp_path / "new" / "e.safetensors"))
    assert torch.equal(Effects.load(str(tmp_path / "new" / "e.safetensors")).tensor, E.tensor)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "effects.safetensors"
    sweep().save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-10] ^= 4
    for damaged in (content[: len(content) // 2], content[:-1], content[:20], b"", b"not at all", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"effects\.safetensors .*delete it and measure again"):
            Effects.load(path)
    with pytest.raises(InputError, match="cannot read .*missing.safetensors: No such file"):
        Effects.load(tmp_path / "missing.safetensors")


def test_a_foreign_file_is_named(tmp_path):
    vf.models.save(vf.models.build("vae", (1, 8, 8), 2, net="mlp"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is a safetensors file, but no vaecirc_fast effects"):
        Effects.load(tmp_path / "model.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "effects.safetensors"
    E = sweep()
    E.save(path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*effects\.safetensors: No space left on device"):
        sweep(samples=20).save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_to_dataframe_labels_every_entry():
    E = sweep(grid=torch.tensor([-1.0, 0.5]))
    table = E.to_dataframe()
    assert list(table.columns) == ["latent", "step", "group", "effect"] and len(table) == 4 * 2 * 3
    for row in table.itertuples():
        at = E.tensor[row.latent, [-1.0, 0.5].index(row.step), ["one", "two", "three"].index(row.group)]
        assert row.effect == float(at)
    assert not table.duplicated(["latent", "step", "group"]).any()
    kept = sweep(samples=3, grid=torch.tensor([-1.0, 0.5]), reduce=None)
    table = kept.to_dataframe()
    assert list(table.columns) == ["sample", "latent", "step", "group", "effect"] and len(table) == 3 * 4 * 2 * 3
    chosen = table[(table["sample"] == 2) & (table["latent"] == 1) & (table["step"] == 0.5) & (table["group"] == "two")]
    assert chosen["effect"].to_list() == [float(kept.tensor[2, 1, 1, 1])]


def test_to_xarray_has_the_dimensions_and_labels():
    for reduce, dims in (("mean", ("latent", "step", "group")), (None, ("sample", "latent", "step", "group"))):
        E = sweep(reduce=reduce, effect="rms")
        array = E.to_xarray()
        assert array.dims == dims == E.dims and array.shape == tuple(E.tensor.shape) and array.name == "rms"
        assert np.array_equal(array.values, E.tensor.numpy())
        assert array.coords["group"].to_numpy().tolist() == ["one", "two", "three"]
        last = array.sel(latent=3, group="three").isel(step=0)
        assert np.array_equal(last.values, E.tensor[..., 3, 0, 2].numpy())


def test_without_xarray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(vf.errors.MissingExtra, match=r"pip install 'vaecirc-fast\[xarray\]'"):
        sweep().to_xarray()


def test_mean_and_step_normalised():
    kept, streamed = sweep(reduce=None, dtype=torch.float64), sweep(dtype=torch.float64)
    assert torch.allclose(kept.mean(), streamed.tensor, rtol=1e-12) and streamed.mean() is streamed.tensor
    sizes = torch.tensor([abs(0.6 * k) for k in range(-5, 6) if k], dtype=torch.float64)
    expected = (kept.tensor / sizes[:, None]).mean(2)
    assert torch.allclose(kept.step_normalised(), expected, rtol=1e-12)
    assert torch.allclose(streamed.step_normalised(), expected.mean(0), rtol=1e-12)
    resampled = sweep(grid="resample")
    assert torch.allclose(resampled.step_normalised(), resampled.tensor.mean(1), rtol=1e-6)


@pytest.mark.parametrize("effect", ["mse", "signed"])
def test_effects_that_are_no_strengths_are_refused(effect):
    E = sweep(effect=effect)
    for metric in (E.ces, E.specificity, *(lambda f=f: f(E) for f in (vf.metrics.model_ces, vf.metrics.ces))):
        with pytest.raises(InputError, match=f"is defined for the effects l1, rms, tv, not for '{effect}'"):
            metric()


def test_a_traversal_has_no_step_size_to_divide_by():
    E = sweep(grid="traverse")
    for metric in (E.ces, E.specificity):
        with pytest.raises(InputError, match="the grid 'traverse' has no step size; use fixed, posterior, resample"):
            metric()


def test_specificity_needs_two_groups():
    E = sweep(groups=None)
    assert E.ces()["ces"].gt(0).all()
    for metric in (E.specificity, lambda: vf.metrics.model_specificity(E)):
        with pytest.raises(InputError, match="specificity: needs at least two groups, got 1; pass groups="):
            metric()


def test_levels_outside_zero_and_one_are_refused():
    for level in (0, 1, 95, -0.5, float("nan")):
        with pytest.raises(InputError, match="level"):
            sweep().ces(level)
