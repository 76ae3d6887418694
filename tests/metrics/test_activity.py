"""Active latents and the aggregate posterior's scale, against numpy and against units in which nothing may change."""

import math
import warnings

import numpy as np
import pytest
import torch

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics.activity import active_units, posterior_scale_from


def posterior(n=500):
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(n, 4)) * [1.0, 0.2, 0.0, 0.01] + [0.0, 3.0, 0.1, 1e4]
    logvar = np.log(rng.uniform(0.5, 1.5, size=(n, 4)) * [0.1, 1.0, 1.0, 1e-6])
    return mu, logvar


def test_against_numpy():
    mu, logvar = posterior()
    scale = np.sqrt(mu.var(0) + np.exp(logvar).mean(0))
    table = active_units(mu, logvar)
    assert list(table["latent"]) == [0, 1, 2, 3]
    assert table["scale"].to_numpy() == pytest.approx(scale)
    assert table["share"].to_numpy() == pytest.approx(mu.var(0) / scale**2, abs=1e-12)
    assert table["variance"].to_numpy() == pytest.approx(mu.var(0), abs=1e-12)
    # the last latent: barely moving but sharp, so active by share and not by Burda's absolute threshold
    assert table["active"].tolist() == [True, False, False, True]
    assert table["burda_active"].tolist() == [True, True, False, False]
    assert posterior_scale_from(torch.tensor(mu), torch.tensor(logvar)).numpy() == pytest.approx(scale)


@pytest.mark.parametrize("share, active", [(0.04, False), (0.06, True)])
def test_a_twentieth_is_active(share, active):
    mu = np.array([[-1.0], [1.0]])
    table = active_units(mu, np.full((2, 1), math.log(1 / share - 1)))
    assert table["share"][0] == pytest.approx(share) and table["active"][0] == active


@pytest.mark.parametrize("variance, active", [(0.009, False), (0.011, True)])
def test_burdas_threshold_is_a_variance_of_a_hundredth(variance, active):
    mu = np.array([[-1.0], [1.0]]) * math.sqrt(variance)
    assert active_units(mu, np.zeros((2, 1)))["burda_active"][0] == active


def test_share_does_not_depend_on_the_unit():
    mu, logvar = posterior()
    unit = np.array([2.0, -0.25, 1024.0, 8.0])
    scaled = active_units(mu * unit, logvar + 2 * np.log(np.abs(unit)))
    assert scaled["share"].to_numpy() == pytest.approx(active_units(mu, logvar)["share"].to_numpy())
    assert scaled["scale"].to_numpy() == pytest.approx(active_units(mu, logvar)["scale"].to_numpy() * np.abs(unit))


def test_dtype_and_sums_in_float64():
    # in float32 sums the variance about a mean of 10,000 would be lost
    mu = torch.tensor([[1e4], [1e4 + 0.0625]], dtype=torch.float32)
    scale = posterior_scale_from(mu)
    assert scale.dtype == torch.float32 and float(scale) == 0.03125


def test_no_variance_at_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = active_units(np.full((3, 2), 0.1))
        still = active_units(np.full((3, 2), 0.1), np.full((3, 2), -math.inf))
    assert table["share"].tolist() == still["share"].tolist() == [0, 0] and not table["active"].any()


@pytest.mark.parametrize(
    "mu, logvar, match",
    [
        ([[math.nan]], [[0.0]], "mu"),
        ([[math.inf], [0.0]], None, "mu"),
        ([1.0], [0.0], r"\(N, L\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), r"\(N, L\)"),
        ([[1.0]], [[0.0, 0.0]], "shape of mu"),
        ([[1.0]], [[math.nan]], "logvar"),
        ([[1.0]], [[800.0]], "below 709"),
    ],
)
def test_bad_input(mu, logvar, match):
    with pytest.raises(InputError, match=match):
        active_units(mu, logvar)
