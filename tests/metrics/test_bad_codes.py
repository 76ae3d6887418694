"""What issue and users bring to every labelled metric: constant codes, dropped factors, NaN, few samples, odd ids."""

import math
import warnings

import numpy as np
import pytest
from coded_grids import FACTORS, noisy, perfect

from vaecirc_fast import metrics
from vaecirc_fast.errors import InputError

FEW = {"train": 100, "test": 60}
LABELLED = {
    "mig": metrics.mig,
    "factor_vae_score": lambda *a, **k: metrics.factor_vae_score(*a, **k, **FEW),
    "factor_vae_score, exact": lambda *a, **k: metrics.factor_vae_score(*a, **k, exact=True),
    "beta_vae_score": lambda *a, **k: metrics.beta_vae_score(*a, **k, **FEW),
    "modularity": metrics.modularity,
    "explicitness": metrics.explicitness,
    "irs": metrics.irs,
}
each = pytest.mark.parametrize("metric", LABELLED.values(), ids=LABELLED)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_defined(score):
    assert 0 <= score.value <= 1
    assert score.low <= score.value <= score.high


@each
def test_constant_codes(metric):
    assert_defined(metric(np.full((60, 2), 0.1), FACTORS))
    assert_defined(metric(np.concatenate([perfect(), np.full((60, 1), -3e5)], 1), FACTORS))


@each
def test_one_valued_factors_are_dropped_and_named(metric):
    codes, factors = noisy(120)
    wide = np.insert(factors, 1, 7, axis=1)
    found = metric(codes, wide, factor_names=["a", "colour", "b", "c"])
    assert found.dropped == ("colour",)
    assert found.value == metric(codes, factors).value
    with pytest.raises(InputError, match="varies, got one value each of hue"):
        metric(codes, wide[:, 1:2], factor_names=["hue"])


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_codes_that_are_not_finite(metric, bad):
    codes, factors = noisy(60)
    codes[3, 2] = bad
    with pytest.raises(InputError, match="latent 2"):
        metric(codes, factors)


@each
@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e90])
def test_tiny_and_huge_codes(metric, scale):
    codes, factors = noisy(90)
    assert_defined(metric(codes * scale, factors))


@pytest.mark.parametrize("metric", [m for name, m in LABELLED.items() if name not in ("mig", "modularity")])
def test_codes_whose_squares_overflow(metric):
    codes, factors = noisy(30)
    with pytest.raises(InputError, match="within"):
        metric(codes * 1e160, factors)


@each
@pytest.mark.parametrize("n", [9, 20])
def test_few_samples(metric, n):
    codes, factors = noisy(n, seed=1)
    assert_defined(metric(codes, factors[:, [0, 2]]))


@each
def test_float_factors_and_other_shapes(metric):
    codes, factors = noisy(30)
    for wrong, match in (
        (factors + 0.0, "integers"),
        (factors[:-1], "N = 30"),
        (factors[:, 0], r"\(N, K\)"),
        (factors[:, :0], r"\(N, K\)"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            metric(codes, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"\(N, L\)"):
        metric(codes[:, 0], factors)


@each
def test_ids_with_gaps_and_of_any_type(metric):
    codes, factors = noisy(90)
    expected = metric(codes, factors)
    for ids in (
        factors * 1000 - 17,
        factors * (1 << 40),
        factors.astype(np.uint8),
        factors.astype(np.uint64) + np.uint64((1 << 64) - 10),
        factors.astype(np.int64) * 3 + np.iinfo(np.int64).min,
    ):
        assert metric(codes, ids) == expected
    turned = metric(codes, -factors)
    if turned.resampled not in ("votes", "points"):  # of another order of values others are drawn
        assert turned.value == pytest.approx(expected.value, abs=1e-9)
