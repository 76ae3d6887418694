"""Linearised sweeps: exact where decoders are linear, the Jacobian's own product elsewhere, and their error table."""

import numpy as np
import pytest
import torch
from close import assert_close
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Effects, Linearised, latent_sweep, linearised

LINEAR = [c for c in vf.planted.all() if c.name.startswith("linear")]
L = 3


def codes(n=9, width=L, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def smooth(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(L, 8), nn.Tanh(), nn.Linear(8, 12), nn.Sigmoid()).to(dtype)


@pytest.mark.parametrize("circuit", LINEAR, ids=lambda c: c.name)
@pytest.mark.parametrize("grid", ["fixed", "posterior", "shifts"])
@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "tv", "signed"])
def test_linear_circuits_are_exact(circuit, grid, effect):
    grid = torch.tensor([-3.0, 0.25, 8.0], dtype=torch.float64) if grid == "shifts" else grid
    E = linearised(circuit.decoder, circuit.z, grid=grid, scale=circuit.scale, effect=effect, groups=circuit.groups)
    truth = torch.from_numpy(circuit.effects(grid, effect))
    size = float(circuit.decoder(circuit.z).detach().abs().max()) + float(truth.abs().max())
    unit = torch.full_like(truth, size * (size if effect == "mse" else circuit.groups.labels.numel()))
    assert_close(E.tensor, E.exact.tensor, truth, terms=circuit.groups.labels.numel(), unit=unit)
    assert E.dims == E.exact.dims and E.coords == E.exact.coords
    error = E.error
    changing = error["exact"].abs() > 1e-9
    assert (error["relative_error"][changing].abs() < 1e-12).all() and changing.any()
    assert np.allclose(error["low"][changing], 0, atol=1e-12) and np.allclose(error["high"][changing], 0, atol=1e-12)


def test_resampled_values_of_a_linear_circuit():
    circuit = LINEAR[2]
    for options in ({"grid": "resample"}, {"grid": "traverse"}, {"grid": "resample", "reduce": None}):
        E = linearised(circuit.decoder, circuit.z, groups=circuit.groups, seed=5, **options)
        assert torch.allclose(E.tensor, E.exact.tensor, rtol=1e-12, atol=1e-12)
        assert E.tensor.any() and E.dims == E.exact.dims


def test_the_error_is_that_of_the_formula():
    """y = tanh(a z) at z = 0: the linear form moves by a s, the decoder by tanh(a s), so the error grows with |s|."""
    slopes = torch.tensor([0.125, 0.5, 2.0], dtype=torch.float64)
    steps = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    E = linearised(lambda z: torch.tanh(z * slopes), torch.zeros(9, L, dtype=torch.float64), grid=steps)
    expected = slopes[:, None] * steps / torch.tanh(slopes[:, None] * steps) - 1
    found = torch.tensor(E.error["relative_error"].to_numpy()).view(L, -1)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert (found.diff(dim=1) > 0).all() and (found.diff(dim=0) > 0).all()
    assert E.error["latent"].tolist() == [i for i in range(L) for _ in steps]
    assert E.error["step"].tolist() == steps.tolist() * L


def by_jacobian(decoder, z, shifts, effect, groups):
    """(N, L, S, G), from whole Jacobians."""
    jacobian = torch.autograd.functional.jacobian(lambda z: decoder(z).flatten(1).sum(0), z)  # (P, N, L)
    dy = torch.einsum("pni,s->nisp", jacobian, shifts)
    kinds = {
        "l1": lambda d: d.abs().mean(-1),
        "mse": lambda d: d.square().mean(-1),
        "rms": lambda d: d.square().mean(-1).sqrt(),
        "tv": lambda d: d.abs().sum(-1) / 2,
        "signed": lambda d: d.mean(-1),
    }
    return torch.stack([kinds[effect](dy[..., groups.labels == g]) for g in range(len(groups))], -1)


@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "tv", "signed"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_equals_whole_jacobians(net, effect):
    torch.manual_seed(3)
    decoder = models.build("vae", (1, 8, 8), L, net=net, width=0.25).decoder.double()
    z, shifts = codes(4), torch.tensor([-2.0, 0.5, 1.0], dtype=torch.float64)
    groups = partitions.cells(8, 8, 3)
    expected = by_jacobian(decoder, z, shifts, effect, groups)
    for tile in (None, 1, 5):
        E = linearised(decoder, z, grid=shifts, effect=effect, groups=groups, reduce=None, tile=tile)
        assert torch.allclose(E.tensor, expected, rtol=1e-10, atol=1e-15)
    mean = linearised(decoder, z, grid=shifts, effect=effect, groups=groups)
    assert torch.allclose(mean.tensor, expected.mean(0), rtol=1e-10, atol=1e-15)
    assert "by forward mode" in mean.plan and mean.exact.plan in mean.plan


def test_logits():
    torch.manual_seed(4)
    decoder = models.build("vae", (1, 8, 8), L, net="mlp", width=0.25).decoder.double()
    z, grid = codes(4), torch.tensor([0.5, 1.0], dtype=torch.float64)
    E = linearised(decoder, z, grid=grid, effect="logit_mse", reduce=None)
    expected = by_jacobian(decoder.logits, z, grid, "mse", partitions.whole(64))
    assert torch.allclose(E.tensor, expected, rtol=1e-10)
    E = linearised(decoder, z, grid=grid, on="logits", reduce=None)
    assert torch.allclose(E.tensor, by_jacobian(decoder.logits, z, grid, "l1", partitions.whole(64)), rtol=1e-10)


def test_the_intervals_resample_both_alike():
    """The interval of the ratio is that of pairs, by hand; kept samples and means give the same."""
    decoder, z = smooth(), codes(20)
    means = linearised(decoder, z, grid=torch.tensor([1.0, -2.0])).error
    kept = linearised(decoder, z, grid=torch.tensor([1.0, -2.0]), reduce=None)
    table = kept.error
    for column in means.columns:
        assert np.allclose(means[column], table[column], rtol=1e-9)
    assert (means["low"] < means["relative_error"]).all() and (means["relative_error"] < means["high"]).all()
    linear, exact = (e.tensor[:, 0, 0, 0].numpy() for e in (kept, kept.exact))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 20, (4000, 20))
    low, high = np.quantile(linear[drawn].mean(1) / exact[drawn].mean(1) - 1, [0.025, 0.975])
    width = high - low
    assert abs(table["low"][0] - low) < width / 3 and abs(table["high"][0] - high) < width / 3
    no_intervals = linearised(decoder, z, grid=torch.tensor([1.0]), replicates=0).error
    assert no_intervals[["low", "high"]].isna().all(axis=None) and no_intervals["relative_error"].notna().all()


class Cube(torch.autograd.Function):
    """x^3 without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceCube(Cube):
    """And none of the second order."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return Cube.backward(ctx, grad)


def test_where_forward_mode_is_missing():
    z, grid = codes(5), torch.tensor([0.5, 1.0], dtype=torch.float64)
    forward = linearised(lambda z: z**3, z, grid=grid)
    twice = linearised(lambda z: Cube.apply(z), z, grid=grid)
    assert torch.allclose(twice.tensor, forward.tensor, rtol=1e-12)
    assert "by differentiating twice, since" in twice.plan and "Cube" not in forward.plan
    with pytest.raises(InputError, match="decoder: an operation has neither a forward-mode derivative .* nor"):
        linearised(lambda z: OnceCube.apply(z), z, grid=grid)


@pytest.mark.parametrize("decoder", [lambda z: z.detach() * 2, lambda z: torch.ones(len(z), 4, dtype=z.dtype)])
def test_an_output_that_is_cut_off_is_refused(decoder):
    with pytest.raises(InputError, match="decoder: its output does not depend differentiably on z"):
        linearised(decoder, codes())


def test_nothing_changes_and_nothing_is_kept():
    decoder, z = smooth(torch.float32), codes(dtype=torch.float32).requires_grad_()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in decoder.named_parameters()}
    E = linearised(decoder, z)
    assert not E.tensor.requires_grad and E.tensor.dtype == torch.float32 and z.grad is None
    for name, p in decoder.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]) and p.grad is None
    with torch.inference_mode():
        inside = linearised(decoder, codes(dtype=torch.float32))
    assert torch.equal(inside.tensor, E.tensor)
    assert torch.equal(E.exact.tensor, latent_sweep(decoder, z.detach()).tensor)
    assert E.ces()["ces"].notna().all()


def test_zero_steps_are_not_in_the_table():
    E = linearised(smooth(), codes(), grid=torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert not E.tensor[:, 0].any() and E.error["step"].tolist() == [1.0] * L


def test_saved_and_loaded(tmp_path):
    E = linearised(smooth(), codes())
    E.save(tmp_path / "linear")
    loaded = Effects.load(tmp_path / "linear")
    assert torch.equal(loaded.tensor, E.tensor)
    with pytest.raises(InputError, match="error: a loaded result has no exact effects"):
        Linearised.load(tmp_path / "linear").error  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effect": "l2"}, "effect: 'l2' is unknown"),
        ({"grid": "posterior"}, "scale: "),
        ({"groups": partitions.spans([3])}, "groups: partition 3 elements"),
        ({"tile": 0}, "tile: expected"),
        ({"z": torch.full((2, L), torch.nan)}, "z: contains NaN"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        linearised(smooth(), options.pop("z", codes()), **options)


def test_layers_in_train_mode_are_refused():
    with pytest.raises(InputError, match="Dropout"):
        linearised(nn.Sequential(nn.Linear(L, 4), nn.Dropout()).double(), codes())
