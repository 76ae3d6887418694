"""Disentanglement and completeness of causal effects: closed forms, plain loops, and results of real interventions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import input_effects
from vaecirc_fast.metrics import effect_disentanglement


def plain(matrix):
    """D, one row after another: entropy to the base of the columns, weighted by the row's share of all effects."""
    total = 0.0
    for row in matrix:
        if row.sum():
            total += row.sum() / matrix.sum() * (1 - entropy(row / row.sum(), base=len(row)))
    return total


matrices = arrays(
    float, st.tuples(st.integers(2, 6), st.integers(2, 6)), elements=st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-9])
)


@given(matrices)
def test_the_plain_loops(matrix):
    if matrix.max() == 0:
        return
    found = effect_disentanglement(matrix)
    assert found.disentanglement.value == pytest.approx(plain(matrix), abs=1e-12)
    assert found.completeness.value == pytest.approx(plain(matrix.T), abs=1e-12)
    assert math.isnan(found.disentanglement.low)
    turned = effect_disentanglement(torch.from_numpy(matrix.T[::-1] * 7))
    assert turned.disentanglement.value == pytest.approx(found.completeness.value, abs=1e-12)


def test_closed_forms():
    def both(matrix):
        found = effect_disentanglement(matrix)
        return found.disentanglement.value, found.completeness.value

    assert both(np.eye(4)[[2, 0, 3, 1]] * [1, 5, 2, 3]) == (1, 1)
    assert both(np.ones((3, 4))) == pytest.approx((0, 0), abs=1e-12)
    # a duplicated latent: each still moves one thing, one column has two latents of four
    assert both([[1, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 2]]) == pytest.approx((1, (2 * 0.5 + 4) / 6))
    assert both([[1, 0], [0, 1], [0, 0]]) == (1, 1)  # a latent that moves nothing has no weight


def test_a_latent_sweep_and_its_interval():
    torch.manual_seed(0)
    decoder = torch.nn.Linear(3, 6)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 3], [0, 0, 3]]))
    E = vf.latent_sweep(decoder, torch.randn(40, 3), grid="fixed", effect="l1", groups=vf.groups.spans([2, 2, 2]))
    found = effect_disentanglement(E)
    assert found.disentanglement.value == pytest.approx(1, abs=1e-6) == found.completeness.value
    assert found.disentanglement.n == 40 and found.disentanglement.resampled == "images"

    mixing = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh())
    for kept in ("mean", None):
        E = vf.latent_sweep(
            mixing, torch.randn(40, 3), grid="fixed", effect="l1", groups=vf.groups.spans([2, 2, 2]), reduce=kept
        )
        found = effect_disentanglement(E)
        assert 0 < found.disentanglement.low < found.disentanglement.value < found.disentanglement.high < 1
        matrix = E.step_normalised()
        assert found.completeness.value == pytest.approx(plain((matrix if kept else matrix.mean(0)).double().numpy().T))
    squared = vf.latent_sweep(mixing, torch.randn(4, 3), effect="mse", groups=vf.groups.spans([2, 2, 2]))
    with pytest.raises(InputError, match="mse"):
        effect_disentanglement(squared)


def test_input_effects():
    planted = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with torch.no_grad():
        planted[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 3, generator=generator)
    variants = {}
    for k in range(3):
        changed = base.clone()
        changed[:, k] = torch.randn(50, generator=generator)
        variants[f"factor {k}"] = changed
    effects = input_effects(planted, base, variants, ["0"])
    found = effect_disentanglement(effects)
    # the unit that nothing reaches has no weight
    assert (found.disentanglement.value, found.completeness.value) == pytest.approx((1, 1), abs=1e-6)
    assert found.disentanglement.resampled == "pairs" and found.disentanglement.n == 50


@pytest.mark.parametrize(
    "effects, match",
    [
        ([[1.0, 2.0]], "two rows"),
        ([1.0, 2.0], "two rows"),
        ([[1.0, -1.0], [0.0, 1.0]], ">= 0"),
        ([[1.0, math.nan], [0.0, 1.0]], "finite"),
        (np.zeros((2, 2)), "zeros"),
        ([["a", "b"], ["c", "d"]], "numbers"),
    ],
)
def test_bad_input(effects, match):
    with pytest.raises(InputError, match=match):
        effect_disentanglement(effects)
