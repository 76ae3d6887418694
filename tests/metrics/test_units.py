"""Polysemanticity, assignment and isolation: closed forms, units without effect, bounds and invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import assignment, isolation, polysemanticity
from vaecirc_fast.metrics.units import MONOSEMANTIC

NAN = math.nan


@st.composite
def matrices(draw, least=0.0):
    """Effects (K, U) of up to 6 factors on up to 8 units, zeros among them, over many orders of magnitude."""
    K, U = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    value = st.one_of(st.just(least), st.floats(max(least, 1e-30), 1e30), st.floats(max(least, 0.1), 10))
    rows = draw(st.lists(st.lists(value, min_size=U, max_size=U), min_size=K, max_size=K))
    return torch.tensor(rows, dtype=torch.float64)


# --- polysemanticity -------------------------------------------------------------------------------------------------


def test_polysemanticity_in_closed_form():
    effects = torch.tensor(
        [
            [5.0, 0, 2, 3, 1, 0.0],
            [0.0, 7, 2, 1, 1, 0.5],
            [0.0, 0, 0, 0, 1, 0.25],
            [0.0, 0, 0, 0, 1, 0.25],
        ]
    )
    expected = [1, 1, 2, 4 / 3**0.75, 4, 2 * math.sqrt(2)]  # H(1/2, 1/4, 1/4) = 3/2 log 2
    assert polysemanticity(effects).tolist() == pytest.approx(expected, rel=1e-14)
    assert polysemanticity(effects)[:2].tolist() == [1, 1]


def test_a_unit_that_nothing_moves_has_no_polysemanticity():
    assert polysemanticity([[0.0, 1], [0, 0]]).isnan().tolist() == [True, False]
    assert polysemanticity([[NAN, 1, 0], [NAN, 1, 0]]).isnan().tolist() == [True, False, True]


def test_one_factor_is_one():
    assert polysemanticity([[3.0, 1e-300, 1e300]]).tolist() == [1, 1, 1]


def test_monosemantic_is_nearly_nine_tenths_to_one():
    """Between two factors the bound of 1.5 lies where the larger has about 86 percent."""
    below, above = polysemanticity([[0.87, 0.85], [0.13, 0.15]]).tolist()
    assert below < MONOSEMANTIC < above


@given(matrices())
def test_polysemanticity_lies_between_one_and_the_number_of_factors(effects):
    values = polysemanticity(effects)
    dead = effects.sum(0) == 0
    assert values.shape == effects.shape[1:] and values.dtype == torch.float64
    assert torch.equal(values.isnan(), dead)
    assert ((values >= 1) & (values <= len(effects)))[~dead].all()
    assert (values <= (effects > 0).sum(0).double() * (1 + 1e-12))[~dead].all()


@given(matrices(), st.lists(st.floats(1e-20, 1e20), min_size=8, max_size=8), st.permutations(range(6)))
def test_polysemanticity_is_each_unit_s_own(effects, scales, order):
    """It does not change with the unit's scale, the order of factors, or what other units do."""
    scale = torch.tensor(scales[: effects.shape[1]], dtype=torch.float64)
    order = [k for k in order if k < len(effects)]
    expected = polysemanticity(effects)
    torch.testing.assert_close(polysemanticity((effects * scale)[order]), expected, rtol=1e-9, atol=0, equal_nan=True)
    alone = torch.cat([polysemanticity(effects[:, [u]]) for u in range(effects.shape[1])])
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=0, equal_nan=True)


@given(matrices(least=0.1))
def test_a_factor_split_in_two_alike_doubles_it(effects):
    halves = torch.cat([effects / 2, effects / 2])
    torch.testing.assert_close(polysemanticity(halves), 2 * polysemanticity(effects), rtol=1e-12, atol=0)


# --- assignment ------------------------------------------------------------------------------------------------------


def test_assignment():
    effects = torch.tensor([[0.0, 2, 1, 0, NAN], [3, 2, 0, 0, NAN], [1, 2, 1, 0, NAN]])
    assert assignment(effects).tolist() == [1, 0, 0, -1, -1]  # ties to the first
    assert assignment(effects.numpy().astype(np.float16)).tolist() == [1, 0, 0, -1, -1]


# --- isolation -------------------------------------------------------------------------------------------------------

BLOCKS = torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4]])


def test_isolation_in_closed_form():
    assert isolation(BLOCKS, [0, 0, 1, 2]).tolist() == [0, 0, 0]
    assert isolation(BLOCKS, [1, 1, 2, 0]).tolist() == [1, 1, 1]
    assert isolation(BLOCKS, [0, 1, 1, 2]).tolist() == pytest.approx([2 / 3, 0, 0])
    assert isolation(BLOCKS, [-1, -1, -1, 2]).tolist() == [1, 1, 0]
    assert isolation(BLOCKS.T.contiguous(), [0, 2, 3]).tolist() == [0, 1, 0, 0]


def test_a_factor_without_effect_has_no_isolation():
    values = isolation([[0.0, 0], [1, 3]], [0, 1])
    assert values.isnan().tolist() == [True, False] and float(values[1]) == 0.25


def test_units_without_sd_are_left_out():
    effects = torch.tensor([[NAN, 1.0, 3], [NAN, 0, 2]])
    assert isolation(effects, [0, 0, 1]).tolist() == isolation(effects[:, 1:], [0, 1]).tolist() == [0.75, 0]
    assert isolation(torch.full((2, 1), NAN), [0]).isnan().all()


@given(matrices(), st.data())
def test_isolation_is_a_share(effects, data):
    K, U = effects.shape
    target = torch.tensor(data.draw(st.lists(st.integers(-1, K - 1), min_size=U, max_size=U)))
    values = isolation(effects, target)
    idle = effects.sum(1) == 0
    assert torch.equal(values.isnan(), idle) and ((values >= 0) & (values <= 1))[~idle].all()
    # a factor's effect on its own units and that on all the others make the whole
    for k in range(K):
        if not idle[k]:
            on = float(effects[k, target == k].sum() / effects[k].sum())
            assert float(values[k]) + on == pytest.approx(1)
    stronger = effects * torch.linspace(1, 3, K, dtype=torch.float64)[:, None]
    torch.testing.assert_close(isolation(stronger, target), values, rtol=1e-9, atol=1e-12, equal_nan=True)
    order = torch.tensor(data.draw(st.permutations(range(U))))
    torch.testing.assert_close(
        isolation(effects[:, order], target[order]), values, rtol=1e-9, atol=1e-12, equal_nan=True
    )


# --- both ------------------------------------------------------------------------------------------------------------


def test_arrays_and_lists_are_as_good_as_tensors():
    effects = BLOCKS.numpy()
    for given_ in (effects, effects.astype(np.float32), effects.tolist(), BLOCKS.to(torch.bfloat16)):
        assert polysemanticity(given_).tolist() == [1, 1, 1, 1]
        assert isolation(given_, np.array([0, 0, 1, 2])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("metric", [polysemanticity, assignment, lambda e: isolation(e, [0, 0])])
@pytest.mark.parametrize(
    "effects, match",
    [
        ([1.0, 2.0], r"effects: expected \(K, U\) with K, U > 0, got \(2,\)"),
        (torch.zeros(0, 2), r"effects: expected \(K, U\) with K, U > 0, got \(0, 2\)"),
        (torch.zeros(2, 0), r"effects: expected \(K, U\)"),
        (torch.zeros(2, 2, 2), r"effects: expected \(K, U\)"),
        ([[1.0, -1e-9], [0, 1]], "effects: expected finite numbers >= 0"),
        ([[1.0, math.inf], [0, 1]], "effects: expected finite numbers >= 0"),
        ([[1.0, NAN], [0, 1]], "or NaN for all factors of a unit"),
        ([[NAN, -1], [NAN, 1]], "effects: expected finite numbers >= 0"),
    ],
)
def test_bad_effects_are_refused(metric, effects, match):
    with pytest.raises(InputError, match=match):
        metric(effects)


@pytest.mark.parametrize(
    "target, match",
    [
        ([0, 0, 1], r"target: expected 4 factor indices, got torch.int64 \(3,\)"),
        ([[0, 0, 1, 2]], "target: expected 4 factor indices"),
        ([0.0, 0, 1, 2], "target: expected 4 factor indices, got torch.float32"),
        ([True, False, False, True], "target: expected 4 factor indices, got torch.bool"),
        ([0, 0, 1, 3], r"target: expected factors 0\.\.2, or -1 for none"),
        ([0, 0, 1, -2], r"target: expected factors 0\.\.2, or -1 for none"),
    ],
)
def test_bad_targets_are_refused(target, match):
    with pytest.raises(InputError, match=match):
        isolation(BLOCKS, target)
