"""effect_strength: the value of a sweep's CES, its gradient, its memory, and training with it."""

import pytest
import torch
from close import assert_close, assert_gradient_close
from interventions.live_memory import LiveMemory
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import effect_strength, engine

L = 3
SCALE = torch.tensor([0.5, 1.75, 0.25], dtype=torch.float64)
GRIDS = {
    "fixed": {"grid": "fixed"},
    "posterior": {"grid": "posterior", "scale": SCALE},
    "resample": {"grid": "resample", "seed": 3},
    "shifts, one of them zero": {"grid": torch.tensor([[-2.0, 0.0], [0.0, 4.0], [0.25, 8.0]], dtype=torch.float64)},
}


def decoder_of(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(L, 6), nn.Tanh(), nn.Linear(6, 10), nn.Sigmoid()).to(dtype)


def codes(n=5, dtype=torch.float64):
    return torch.randn(n, L, generator=torch.Generator().manual_seed(2)).to(dtype)


GROUPS = partitions.from_labels([0, 0, 0, 1, 2, 2, -1, 1, 1, 0])


@pytest.mark.parametrize("effect", ["l1", "rms", "tv"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_value_is_the_ces_of_a_sweep(grid, effect):
    decoder, z = decoder_of(), codes()
    expected = torch.tensor(vf.latent_sweep(decoder, z, effect=effect, groups=GROUPS, **GRIDS[grid]).ces()["ces"])
    for tile in (None, 1, 7):
        found = effect_strength(decoder, z, effect=effect, groups=GROUPS, per_latent=True, tile=tile, **GRIDS[grid])
        assert found.shape == (L,) and torch.allclose(found, expected, rtol=1e-12)
        mean = effect_strength(decoder, z, effect=effect, groups=GROUPS, tile=tile, **GRIDS[grid])
        assert mean.shape == () and torch.allclose(mean, expected.mean(), rtol=1e-12)


def plain(decoder, z, grid, effect):
    """The formula with everything in memory, for autograd."""
    shifts = {"fixed": torch.tensor([0.6 * k for k in range(-5, 6) if k], dtype=torch.float64).expand(L, -1)}
    shifts["posterior"] = SCALE[:, None] * torch.tensor([0.5 * k for k in range(-4, 5) if k], dtype=torch.float64)
    total = 0
    for i in range(L):
        for s in range(shifts[grid].shape[1]):
            moved = z + shifts[grid][i, s] * torch.eye(L, dtype=z.dtype)[i]
            d = decoder(moved).flatten(1) - decoder(z).flatten(1)
            size = shifts[grid][i, s].abs() / (SCALE[i] if grid == "posterior" else 1)
            each = []
            for g, n in enumerate(GROUPS.sizes):
                part = d[:, GROUPS.labels == g]
                each.append(part.abs().mean(1) * n if effect == "l1" else part.square().mean(1).sqrt() * n)
            total = total + sum(each).mean() / GROUPS.sizes.sum() / size / shifts[grid].shape[1] / L
    return total


@pytest.mark.parametrize("effect", ["l1", "rms"])
@pytest.mark.parametrize("grid", ["fixed", "posterior"])
def test_gradients_are_those_of_the_formula(grid, effect):
    results = {}
    for dtype in (torch.float32, torch.float64):
        decoder, z = decoder_of(torch.float32).to(dtype), codes(dtype=torch.float32).to(dtype).requires_grad_()
        inputs = [z, *decoder.parameters()]
        options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in GRIDS[grid].items()}
        for tile in (None, 4):
            value = effect_strength(decoder, z, effect=effect, groups=GROUPS, tile=tile, **options)
            results[dtype, tile] = value, torch.autograd.grad(value, inputs)
        value = plain(decoder, z, grid, effect)
        results[dtype, "plain"] = value, torch.autograd.grad(value, inputs)
    truth, yardstick = results[torch.float64, "plain"], results[torch.float32, "plain"]
    for tile in (None, 4):
        assert torch.allclose(results[torch.float64, tile][0], truth[0], rtol=1e-12)
        value, gradients = results[torch.float32, tile]
        assert_close(value.detach(), yardstick[0].detach().float(), truth[0].detach(), terms=300)
        for ours, theirs, true in zip(gradients, yardstick[1], truth[1], strict=True):
            assert_gradient_close(ours, theirs, true, terms=300, unit=true.abs() + true.abs().max())


@pytest.mark.parametrize("grid", GRIDS)
def test_gradcheck(grid):
    decoder, z = decoder_of(), codes(3).requires_grad_()
    inputs = [z, *decoder.parameters()]

    def strengths(z, *parameters):
        call = lambda x: torch.func.functional_call(decoder, names(parameters), x)  # noqa: E731
        return effect_strength(call, z, groups=GROUPS, per_latent=True, tile=9, **GRIDS[grid])

    def names(parameters):
        return dict(zip((name for name, _ in decoder.named_parameters()), parameters, strict=True))

    assert torch.autograd.gradcheck(strengths, inputs)


def test_training_with_it_moves_the_effects():
    z = codes(16, torch.float32)
    for sign in (1, -1):
        decoder = decoder_of(torch.float32)
        optimizer = torch.optim.SGD(decoder.parameters(), lr=0.5)
        before = vf.latent_sweep(decoder, z).ces()["ces"].mean()
        for _ in range(5):
            optimizer.zero_grad()
            (sign * effect_strength(decoder, z)).backward()
            optimizer.step()
        after = vf.latent_sweep(decoder, z).ces()["ces"].mean()
        assert sign * (after - before) < 0 and abs(after / before - 1) > 0.02


def test_one_latent_can_be_held_down():
    decoder, z = decoder_of(torch.float32), codes(16, torch.float32)
    before = effect_strength(decoder, z, per_latent=True).detach()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        strengths = effect_strength(decoder, z, per_latent=True)
        (strengths[0] - strengths[1:].mean()).backward()
        optimizer.step()
    after = effect_strength(decoder, z, per_latent=True).detach()
    assert after[0] / after.sum() < 0.7 * before[0] / before.sum()


def peak(latents, steps, monkeypatch, samples=8):
    monkeypatch.setitem(engine.TILE_BYTES, "cpu", 1 << 16)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(latents, 4), nn.Tanh(), nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256))
    z = torch.randn(samples, latents)
    decoder(z).sum().backward()  # gradients are there already
    with LiveMemory() as memory:
        effect_strength(decoder, z, grid=torch.linspace(0.5, 4.0, steps)).backward()
    return memory.peak


def test_memory_does_not_grow_with_steps_or_latents(monkeypatch):
    few = peak(4, 8, monkeypatch)
    every = 8 * 4 * 256 * 256 * 4  # bytes of one layer's activations, of all rows of the next line
    assert peak(4, 256, monkeypatch) < 1.2 * few < every / 4
    assert peak(64, 8, monkeypatch) < 1.5 * few  # a row has more latents; its activations are as before
    assert peak(4, 8, monkeypatch, samples=256) < 1.5 * few


def test_in_train_mode_and_with_what_it_refers_to():
    model = models.build("vae", (1, 8, 8), L, net="mlp", width=0.25)
    z = codes(4, torch.float32)
    value = effect_strength(model.train().decode, z)
    value.backward()
    assert model.training and all(p.grad is not None for p in model.decoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert torch.equal(value, effect_strength(model.eval().decode, z))
    gain = torch.tensor(2.0, requires_grad=True)
    effect_strength(lambda z: gain * z, z).backward()
    assert torch.allclose(gain.grad, torch.tensor(1 / 3))  # mean of one element of three, over latents too


def test_without_gradients():
    decoder, z = decoder_of(), codes()
    with torch.no_grad():
        assert not effect_strength(decoder, z).requires_grad
    assert torch.equal(effect_strength(decoder, z).detach(), effect_strength(decoder.requires_grad_(False), z))


@pytest.mark.parametrize(
    ("layer", "named"), [(nn.BatchNorm1d(L), "BatchNorm1d"), (nn.Dropout(), "Dropout")], ids=["norm", "dropout"]
)
def test_layers_that_train_are_refused(layer, named):
    with pytest.raises(InputError, match=rf"{named}\) is in train mode"):
        effect_strength(nn.Sequential(nn.Linear(L, L), layer), codes(dtype=torch.float32))
    assert effect_strength(nn.Sequential(nn.Linear(L, L), layer).eval(), codes(dtype=torch.float32)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effect": "mse"}, "effect: strengths are defined for l1, rms, tv, not for 'mse'"),
        ({"effect": "signed"}, "effect: strengths are defined for"),
        ({"grid": "traverse"}, "grid: 'traverse' has no step size"),
        ({"grid": "posterior"}, "scale: "),
        ({"groups": partitions.spans([3])}, "groups: partition 3 elements, but the decoder's output has 10"),
        ({"tile": 0}, "tile: expected an integer of at least 1"),
        ({"z": torch.ones(3)}, "z: expected floats of shape"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        effect_strength(decoder_of(), options.pop("z", codes()), **options)
