"""Grids of latent interventions: exact steps, no zero among them, permutations that leave nothing in its place."""

import numpy as np
import pytest
import torch

from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import grids

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def codes(samples=20, latents=3, dtype=torch.float32):
    return torch.randn(samples, latents).to(dtype)


def values_of(spec, z):
    """What z_i is set to, (N, L, S), by asking for every latent and step at once."""
    steps = spec.coordinates.numel()
    latents = torch.arange(z.shape[1]).repeat_interleave(steps)
    numbers = torch.arange(steps).repeat(z.shape[1])
    return spec.values(z, slice(0, len(z)), latents, numbers).view(len(z), z.shape[1], steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_steps_are_multiples_of_three_fifths(dtype):
    """Each delta is the number nearest to k * .6; 0 is not among them, nor anything that rounds like it."""
    spec = grids.make("fixed", codes(dtype=dtype), None, 0)
    expected = torch.tensor([k * 6 / 10 for k in range(-5, 6) if k], dtype=torch.float64).to(dtype)
    assert spec.coordinates.dtype == dtype and spec.coordinates.shape == (10,)
    # k * .6 may differ from 6 k / 10 in the last bit of a float64
    assert torch.allclose(spec.coordinates, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(spec.coordinates.flip(0), -spec.coordinates)
    assert spec.coordinates.abs().min() > 0.5 and bool(spec.decoded.all())
    assert torch.equal(spec.shift, spec.coordinates.expand(3, -1))
    assert torch.equal(spec.step_size, spec.coordinates.abs().expand(3, -1))


def test_symmetric_steps_start_from_integers():
    steps = grids.symmetric(5, 0.6)
    assert steps.dtype == torch.float64 and steps.tolist() == [k * 0.6 for k in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)]
    assert 0 not in grids.symmetric(1000, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_posterior_steps_are_half_scales(dtype):
    z, scale = codes(dtype=dtype), torch.tensor([0.5, 2.0, 0.0])
    spec = grids.make("posterior", z, scale, 0)
    t = [-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0]
    assert spec.coordinates.tolist() == t and spec.coordinate == "t"
    assert spec.shift.tolist() == [[k * s for k in t] for s in scale.tolist()]
    assert spec.step_size.tolist() == [[abs(k) for k in t]] * 3  # CES divides by t, whatever the scale
    assert spec.decoded.tolist() == [[True] * 8, [True] * 8, [False] * 8]
    assert torch.equal(values_of(spec, z), z[..., None] + spec.shift)


@pytest.mark.parametrize("samples", [2, 3, 50])
@pytest.mark.parametrize("seed", range(5))
def test_resampling_takes_another_samples_value_once_each(samples, seed):
    spec = grids.make("resample", codes(samples), None, seed, draws=6)
    assert spec.donors.shape == (samples, 6) and spec.step_size is None and bool(spec.decoded.all())
    for draw in spec.donors.T:
        assert sorted(draw.tolist()) == list(range(samples))
        assert not bool((draw == torch.arange(samples)).any())


def test_resampling_draws_differ_and_follow_the_seed():
    z = codes(100)
    donors = grids.make("resample", z, None, 3).donors
    assert donors.shape[1] == grids.DRAWS == 4
    assert torch.equal(donors, grids.make("resample", z, None, 3).donors)
    assert not torch.equal(donors, grids.make("resample", z, None, 4).donors)
    assert all(not torch.equal(donors[:, a], donors[:, b]) for a in range(4) for b in range(a))


def test_every_other_sample_is_as_likely_a_donor():
    """Over 4,000 draws of 5 samples each of the 4 others gives 1,000 times; six standard deviations are 164."""
    donors = grids.make("resample", codes(5), None, 0, draws=4000).donors
    for n in range(5):
        counts = torch.bincount(donors[n], minlength=5)
        assert counts[n] == 0 and (counts[torch.arange(5) != n] - 1000).abs().max() < 164


def test_resampled_values_are_the_donors():
    z = codes(10)
    spec = grids.make("resample", z, None, 0)
    values = values_of(spec, z)
    for n in range(10):
        for draw in range(4):
            assert torch.equal(values[n, :, draw], z[spec.donors[n, draw]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_traverse_sets_the_quantiles_of_each_latent(dtype):
    z = codes(37, dtype=dtype)
    spec = grids.make("traverse", z, None, 0)
    levels = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert spec.coordinates.tolist() == pytest.approx(levels) and spec.step_size is None
    expected = np.quantile(z.numpy().astype(np.float64), levels, axis=0).T
    # the place between two of 37 values is rounded in units of 37
    assert spec.target.numpy() == pytest.approx(expected, abs=2 * 37 * torch.finfo(dtype).eps * np.abs(expected).max())
    values = values_of(spec, z)
    assert torch.equal(values, spec.target.expand(37, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_traverse_in_16_bits_is_the_quantile_rounded_once(dtype):
    z = codes(37, dtype=dtype)
    target = grids.make("traverse", z, None, 0).target
    assert target.dtype == dtype and torch.equal(target, grids.make("traverse", z.float(), None, 0).target.to(dtype))


def test_explicit_shifts():
    z = codes()
    spec = grids.make(torch.tensor([-1.0, 0.0, 0.25, -0.0]), z, None, 0)
    assert spec.shift.shape == (3, 4) and spec.coordinates.tolist() == [-1, 0, 0.25, 0]
    assert spec.decoded.tolist() == [[True, False, True, False]] * 3
    assert spec.step_size.tolist() == [[1, 0, 0.25, 0]] * 3
    shifts = torch.tensor([[1, 2], [0, 3], [4, 0]])
    spec = grids.make(shifts, z, None, 0)
    assert spec.coordinates.tolist() == [0, 1] and spec.shift.dtype == torch.float32
    assert spec.decoded.tolist() == [[True, True], [False, True], [True, False]]
    assert torch.equal(values_of(spec, z), z[..., None] + shifts)


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ("linear", {}, "grid: 'linear' is unknown; known: fixed, posterior, resample, traverse, or a tensor"),
        ([1.0, 2.0], {}, "grid: expected a name or a tensor of shifts, got list"),
        (np.array([1.0, 2.0]), {}, "grid: expected a name or a tensor of shifts, got ndarray"),
        (torch.tensor(1.0), {}, r"grid: expected shifts of shape \(S,\) or \(3, S\), got \(\)"),
        (torch.zeros(0), {}, r"got \(0,\)"),
        (torch.ones(3, 0), {}, r"got \(3, 0\)"),
        (torch.ones(2, 4), {}, r"expected shifts of shape \(S,\) or \(3, S\), got \(2, 4\)"),
        (torch.ones(1, 3, 4), {}, r"got \(1, 3, 4\)"),
        (torch.tensor([1.0, torch.nan]), {}, "grid: shifts must be finite"),
        (torch.tensor([1.0, torch.inf]), {}, "grid: shifts must be finite"),
        ("posterior", {}, r"scale: .* needs the scale \(L,\) .*; vf.posterior_scale\(model, x\) gives it"),
        ("posterior", {"scale": torch.ones(2)}, r"scale: expected a tensor \(3,\), .* got shape \(2,\)"),
        ("posterior", {"scale": torch.ones(1, 3)}, r"got shape \(1, 3\)"),
        ("posterior", {"scale": [1.0, 1.0, 1.0]}, "scale: expected a tensor .* got list"),
        ("posterior", {"scale": torch.tensor([1.0, -1.0, 1.0])}, "scale: expected finite numbers >= 0"),
        ("posterior", {"scale": torch.tensor([1.0, torch.nan, 1.0])}, "scale: expected finite numbers >= 0"),
        ("posterior", {"scale": torch.tensor([1.0, torch.inf, 1.0])}, "scale: expected finite numbers >= 0"),
    ],
)
def test_bad_input(grid, options, message):
    with pytest.raises(InputError, match=message):
        grids.make(grid, codes(), options.get("scale"), 0)


def test_one_sample_cannot_be_resampled():
    with pytest.raises(InputError, match="resample.* at least 2"):
        grids.make("resample", codes(1), None, 0)
