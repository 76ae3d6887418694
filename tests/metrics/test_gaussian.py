"""Gaussian total correlation and Wasserstein correlation: closed forms, the formulas in scipy, and their intervals."""

import math

import numpy as np
import pytest
from coded_grids import FACTORS, noisy, perfect, rotated
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import gaussian_total_correlation, wasserstein_correlation
from vaecirc_fast.metrics.statistics import poisson_weights


def plain_tc(covariance):
    return (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]) / 2


def plain_wasserstein(covariance):
    """2 tr C - 2 tr (D^1/2 C D^1/2)^1/2 with scipy's matrix root."""
    root = np.diag(np.sqrt(np.diag(covariance)))
    return 2 * np.trace(covariance) - 2 * np.trace(sqrtm(root @ covariance @ root)).real


@given(n=st.integers(12, 200), latents=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_the_formulas(n, latents, seed):
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(n, latents)) @ rng.normal(size=(latents, latents)) + rng.normal(size=latents)
    covariance = np.atleast_2d(np.cov(codes.T))
    assert gaussian_total_correlation(codes, replicates=0).value == pytest.approx(plain_tc(covariance), abs=1e-8)
    plain, trace = plain_wasserstein(covariance), np.trace(covariance)
    # the distance is a difference: roots of eigenvalues near 0 are known to sqrt(eps)
    assert wasserstein_correlation(codes, replicates=0).value == pytest.approx(plain, abs=1e-6 * trace)
    assert wasserstein_correlation(codes, normalised=True, replicates=0).value == pytest.approx(plain / trace, abs=1e-6)


def test_two_latents_of_known_correlation():
    x, y = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])  # orthogonal
    codes = np.stack([x, 0.6 * x + 0.8 * y], 1)
    assert gaussian_total_correlation(codes, exact=True).value == pytest.approx(-math.log(1 - 0.36) / 2, abs=1e-12)
    # unit variances (times n / (n - 1)): eigenvalues 1.6 and .4
    score = wasserstein_correlation(codes, exact=True)
    assert score.value == pytest.approx((4 - 2 * (1.6**0.5 + 0.4**0.5)) * 4 / 3, abs=1e-12)
    assert score.low == score.high == score.value and score.unit == "of codes, squared"


def test_a_perfect_and_a_rotated_code_are_uncorrelated():
    # these two see covariance only: a rotation of whitened codes is beyond them
    for codes in (perfect(), rotated()):
        assert gaussian_total_correlation(codes, exact=True).value == pytest.approx(0, abs=1e-12)
        assert wasserstein_correlation(codes, exact=True).value == pytest.approx(0, abs=1e-9)


def test_a_duplicated_latent():
    codes = FACTORS[:, [0, 1, 1]].astype(float)
    score = gaussian_total_correlation(codes)
    assert score.value == score.low == score.high == math.inf and "linear functions" in score.note
    variance = codes[:, 1].var(ddof=1)
    assert wasserstein_correlation(codes, exact=True).value == pytest.approx((4 - 2 * 2**0.5) * variance)
    few = gaussian_total_correlation(np.random.default_rng(0).normal(size=(4, 6)))
    assert few.value == math.inf and "fewer samples" in few.note


def test_constant_latents_add_nothing():
    codes, _ = noisy(50)
    wide = np.insert(codes, 2, 0.1, axis=1)
    for metric in (gaussian_total_correlation, wasserstein_correlation):
        assert metric(wide).value == pytest.approx(metric(codes).value, abs=1e-12)
        assert "1 constant" in metric(wide).note and metric(codes).note == ""
        nothing = metric(np.full((9, 3), 0.1))
        assert nothing.value == 0 and "3 constant" in nothing.note


@given(seed=st.integers(0, 1000))
def test_what_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    codes, _ = noisy(100, seed)
    order, scale = rng.permutation(5), rng.uniform(0.1, 10, 5) * rng.choice([-1, 1], 5)
    tc = gaussian_total_correlation(codes, replicates=8)
    moved = gaussian_total_correlation(codes[:, order] * scale + rng.normal(size=5), replicates=8)
    assert [moved.value, moved.low, moved.high] == pytest.approx([tc.value, tc.low, tc.high], abs=1e-8)
    assert wasserstein_correlation(codes[:, order] * 3 + 1).value == pytest.approx(
        9 * wasserstein_correlation(codes).value, abs=1e-6
    )
    # whitened codes stay uncorrelated under any rotation
    white = np.linalg.svd(codes - codes.mean(0), full_matrices=False)[0]
    turned = white @ ortho_group.rvs(5, random_state=seed)
    assert gaussian_total_correlation(turned, replicates=0).value == pytest.approx(0, abs=1e-9)


def test_tiny_and_huge_codes_are_defined():
    codes, _ = noisy(40)
    expected = gaussian_total_correlation(codes, replicates=0).value
    with pytest.raises(InputError, match="within"):
        gaussian_total_correlation(codes * 1e150)
    for scale in (1e-150, 1e90):
        assert gaussian_total_correlation(codes * scale, replicates=0).value == pytest.approx(expected, abs=1e-9)
        assert 0 < wasserstein_correlation(codes * scale, replicates=0, normalised=True).value < 1


def test_intervals_resample_the_samples():
    codes, _ = noisy(60)
    weights = poisson_weights(25, 60, seed=3).long().numpy()
    drawn = [np.cov(codes.T, fweights=w) for w in weights]
    for metric, plain in ((gaussian_total_correlation, plain_tc), (wasserstein_correlation, plain_wasserstein)):
        replicates = [plain(c) for c in drawn]
        found = metric(codes, replicates=25, seed=3)
        expected = np.quantile(replicates, [0.025, 0.975], method="weibull") - np.mean(replicates) + found.value
        assert [found.low, found.high] == pytest.approx(np.maximum(expected, [0, 0]).tolist(), abs=1e-7)


def test_bad_input():
    for metric in (gaussian_total_correlation, wasserstein_correlation):
        for codes, match in (([[1.0, 2.0]], "2 samples"), ([[math.nan], [1.0]], "latent 0"), ([1.0], r"\(N, L\)")):
            with pytest.raises(InputError, match=match):
                metric(codes)
        with pytest.raises(InputError, match="replicates"):
            metric(perfect(), replicates=-1)
        with pytest.raises(InputError, match="level"):
            metric(perfect(), level=0)


@pytest.mark.deep
def test_intervals_cover():
    """The mean of the protocol's values at this N, in at least 87 of 100 samples."""
    mix = np.random.default_rng(0).normal(size=(4, 4))
    for metric in (gaussian_total_correlation, wasserstein_correlation):
        found = [metric(np.random.default_rng(s).normal(size=(300, 4)) @ mix, replicates=60) for s in range(120)]
        mean = np.mean([f.value for f in found])
        assert 0.87 < np.mean([f.low < mean < f.high for f in found]) <= 1
