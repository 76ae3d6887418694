"""The reconstruction report: losses against torch and scipy, the floor, the rule for "trained", its intervals."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics.reconstruction import (
    loss_floor,
    mean_image_loss,
    reconstruction_loss,
    reconstruction_report,
)


def images(n=40, grey=False):
    x = torch.rand(n, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x if grey else (x > 0.7).double()


def test_bernoulli_against_a_plain_sum():
    x, p = images(grey=True), images(grey=True).flip(0)
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    assert torch.allclose(reconstruction_loss(x, p), expected, rtol=1e-12)
    assert torch.allclose(reconstruction_loss(x, p.logit(), logits=True), expected, rtol=1e-12)


def test_squared_error():
    x, y = images(), images(grey=True)
    assert torch.allclose(reconstruction_loss(x, y, "squared_error"), (x - y).flatten(1).norm(dim=1) ** 2)


def test_saturated_probabilities_stay_finite_and_logits_exact():
    x = torch.ones(1, 2)
    assert reconstruction_loss(x, torch.zeros(1, 2)).item() == pytest.approx(2 * 16.118, rel=1e-3)
    assert reconstruction_loss(x, torch.full((1, 2), -50.0), logits=True).item() == pytest.approx(100)


def test_mean_image():
    x = images()
    p = x.mean(0)
    assert torch.allclose(mean_image_loss(x), reconstruction_loss(x, p.expand_as(x)))
    assert torch.allclose(mean_image_loss(x[:3], p), reconstruction_loss(x[:3], p))
    # no constant answer does better
    assert mean_image_loss(x).sum() < mean_image_loss(x, (p + 0.05).clamp(max=1)).sum()


def test_floor_is_the_entropy_of_grey_pixels_and_zero_for_binary_images():
    assert loss_floor(images()).abs().max() == 0
    x = images(grey=True)
    pixel_entropy = entropy(torch.stack([x, 1 - x]).numpy(), axis=0)
    assert torch.allclose(loss_floor(x), torch.from_numpy(pixel_entropy).flatten(1).sum(1))
    assert loss_floor(x, "squared_error").abs().max() == 0


def test_a_perfect_model_of_grey_images_is_trained_though_its_raw_ratio_is_not_below_a_half():
    x = images(grey=True)
    report = reconstruction_report(reconstruction_loss(x, x), mean_image_loss(x), loss_floor(x))
    assert report.ratio.value == pytest.approx(0, abs=1e-6) and report.raw_ratio.value > 0.6
    assert report.trained


def test_the_mean_image_is_not_trained():
    x = images()
    report = reconstruction_report(mean_image_loss(x), mean_image_loss(x), active=8)
    assert report.ratio.value == 1 and not report.trained
    assert (report.ratio.low, report.ratio.high) == (1, 1)


def test_without_a_floor_both_ratios_are_one_number():
    report = reconstruction_report([1.0, 2.0, 3.0], [8.0, 6.0, 4.0])
    assert report.ratio == report.raw_ratio and report.ratio.value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "share, active, trained", [(0.5, None, True), (0.5, 3, True), (0.5, 2, False), (0.501, 9, False)]
)
def test_rule(share, active, trained):
    constant = np.linspace(10, 20, 16)
    assert reconstruction_report(share * constant, constant, active=active).trained is trained


def test_intervals_resample_images_jointly():
    rng = np.random.default_rng(0)
    constant, floor = rng.uniform(10, 20, 500), rng.uniform(0, 2, 500)
    report = reconstruction_report(floor + 0.25 * (constant - floor), constant, floor)
    # a ratio that is the same in each image is the same in each resample
    assert [report.ratio.low, report.ratio.high] == pytest.approx([0.25, 0.25])
    half = 1.96 * constant.std() / math.sqrt(500)
    assert report.mean_image_loss.high - report.mean_image_loss.value == pytest.approx(half, rel=0.25)
    assert report.loss.resampled == "images" and report.loss.n == 500


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    loss, constant = rng.uniform(1, 5, 100), rng.uniform(10, 20, 100)
    whole = reconstruction_report(loss, constant)
    monkeypatch.setattr("vaecirc_fast.metrics.reconstruction._ROWS", 9)
    chunked = reconstruction_report(loss, constant)
    assert [chunked.ratio.low, chunked.ratio.high] == pytest.approx([whole.ratio.low, whole.ratio.high], rel=1e-12)


def test_few_and_equal_images():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = reconstruction_report([1.0], [4.0])
        equal = reconstruction_report([0.0] * 9, [0.0] * 9)
        x = images(grey=True)[:1].expand(9, -1, -1, -1)
        same = reconstruction_report(reconstruction_loss(x, x), mean_image_loss(x), loss_floor(x))
    assert alone.ratio.low == -math.inf and alone.trained
    assert math.isnan(equal.ratio.value) and not equal.trained
    assert math.isnan(same.ratio.value) and not same.trained


def test_prints_both_losses():
    text = str(reconstruction_report([1.0] * 9, [4.0] * 9, active=2))
    assert "1 against 4" in text and "2 active latents" in text and "not trained" in text


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: reconstruction_report([1.0], [1.0, 2.0]), "mean_image_loss_per_image"),
        (lambda: reconstruction_report(1.0, 2.0), "loss_per_image"),
        (lambda: reconstruction_report([], []), "loss_per_image"),
        (lambda: reconstruction_report([math.nan], [1.0]), "loss_per_image"),
        (lambda: reconstruction_report([1.0], [1.0], [2.0]), "floor_per_image"),
        (lambda: reconstruction_loss(images() * 2, images()), r"\[0, 1\]"),
        (lambda: reconstruction_loss(images(), images() - 1), r"\[0, 1\]"),
        (lambda: reconstruction_loss(images(), images()[:3]), "shape of x"),
        (lambda: reconstruction_loss(images(), images(), "gauss"), "likelihood"),
        (lambda: reconstruction_loss(images(), images(), "squared_error", logits=True), "logits"),
        (lambda: reconstruction_loss(images(), images() * math.nan, "squared_error"), "finite"),
        (lambda: loss_floor(images() * math.nan), r"\[0, 1\]"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(InputError, match=match):
        call()
