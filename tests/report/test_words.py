"""Numbers and names as they are printed."""

import math

import pytest

from vaecirc_fast.report import words


@pytest.mark.parametrize(
    ("value", "places", "printed"),
    [
        (0.02123, 4, "0.0212"),
        (-0.5, 1, "−0.5"),
        (1234.5, 0, "1,234"),
        (0.0, 3, "0.000"),
        (-0.0, 2, "0.00"),
        (0.00001, 4, "<0.0001"),
        (-0.00001, 4, ">−0.0001"),
        (None, 3, "–"),
        (math.nan, 3, "–"),
        (math.inf, 3, "–"),
        (7, 0, "7"),
    ],
)
def test_number(value, places, printed):
    assert words.number(value, places) == printed


@pytest.mark.parametrize(
    ("low", "high", "places", "printed"),
    [
        (0.019, 0.0234, 3, "[0.019, 0.023]"),
        (-0.001, 0.2, 2, "[0.00, 0.20]"),
        (-0.00001, 0.00002, 3, "within ±0.001"),
        (None, 0.2, 2, ""),
        (-math.inf, math.inf, 2, ""),
    ],
)
def test_interval(low, high, places, printed):
    assert words.interval(low, high, places) == printed


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.0212, 0.001], 4),
        ([0.5], 3),
        ([12.3], 1),
        ([1234.0], 0),
        ([], 2),
        ([0.0, None], 2),
        ([0.0999], 4),
        ([1.0], 2),
    ],
)
def test_decimals(values, places):
    assert words.decimals(values) == places


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(0.83, "0.8 s"), (34.4, "34 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (245, "4 min 05 s"), (7810, "2 h 10 min")],
)
def test_duration(seconds, printed):
    assert words.duration(seconds) == printed


def test_settings_in_words():
    assert [words.plain(v) for v in (4.0, 10000, True, None, [1, 2], {"beta": 2.5}, -1.5)] == [
        *("4", "10,000", "yes", "–", "1, 2", "β = 2.5", "−1.5")
    ]
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert [words.counted(n, "run") for n in (0, 1, 12, 1300)] == ["no runs", "one run", "twelve runs", "1,300 runs"]
    assert words.model_name({"architecture": "beta_vae", "options": {"beta": 4.0}}) == "β-VAE (β = 4)"
    assert words.model_name({"architecture": "new_kind"}) == "new kind"


def test_definitions_are_typeset_and_escaped():
    assert "<i>μ</i><sub>i</sub>" in words.typeset("Var_x[mu_i] / s_i^2 > 0.05")
    assert "&gt; 0.05" in words.typeset("x > 0.05") and "<b>" not in words.typeset("<b>")
    assert words.typeset("do(z_i := mu_i + t s_i), t = +-0.5") == (
        "do(<i>z</i><sub>i</sub> := <i>μ</i><sub>i</sub> + <i>t</i> <i>s</i><sub>i</sub>), <i>t</i> = ±0.5"
    )
