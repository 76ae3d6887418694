"""Saved models: exact, and a damaged or foreign file is named, never half loaded."""

import pytest
import safetensors.torch
import torch

from vaecirc_fast import models
from vaecirc_fast.errors import InputError


@pytest.fixture
def saved(tmp_path):
    model = models.build("beta_vae", (3, 12, 10), 4, beta=2.5, width=0.25, likelihood="gaussian")
    models.save(model, tmp_path / "m.safetensors")
    return model, tmp_path / "m.safetensors"


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_config_rebuilds(name, net):
    model = models.build(name, (3, 12, 10), 4, net=net, likelihood="gaussian", width=0.5)
    again = models.build(**model.config())
    assert type(again) is type(model) and again.config() == model.config()
    again.load_state_dict(model.state_dict())


def test_round_trip(saved):
    model, path = saved
    state = torch.get_rng_state()
    loaded = models.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and loaded.config() == model.config() and not loaded.training
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and b.requires_grad
    x = torch.rand(2, 3, 12, 10)
    assert torch.equal(model.encode(x)[0], loaded.encode(x)[0])
    loaded.loss(x)["loss"].backward()


def test_dtype_and_layout_survive(tmp_path):
    model = models.build("vae", (1, 16, 16)).double().to(memory_format=torch.channels_last)
    models.save(model, tmp_path / "m.safetensors")
    loaded = models.load(tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert next(loaded.parameters()).dtype == torch.float64


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_cut_file(saved, share):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"m\.safetensors is cut short, damaged"):
        models.load(path)


def test_flipped_bit_anywhere(saved):
    _, path = saved
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.safetensors"):
            models.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(InputError, match=r"cannot read .*f\.safetensors"):
        models.load(path)
    path.write_text("not a tensor in sight")
    with pytest.raises(InputError, match=r"f\.safetensors is cut short, damaged or no safetensors file"):
        models.load(path)
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"f\.safetensors is a safetensors file, but no vaecirc_fast model"):
        models.load(path)


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        models.save(models.build("vae", (1, 8, 8)), tmp_path / "file" / "m.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
