"""UDR: models that agree, models that do not, the published procedure in plain loops, and intervals of medians."""

import numpy as np
import pytest
import torch
from coded_grids import FACTORS, noisy, perfect, rotated
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import udr


def plain_udr(codes, informative, method):
    """One pair of models after another, latents of no information masked after they were set to 0."""
    models = len(codes)
    z = [StandardScaler().fit_transform(c) * m for c, m in zip(codes, informative, strict=True)]
    scores = np.zeros((models, models))
    for i in range(models):
        for j in range(models):
            if i == j:
                continue
            if method == "lasso":
                R = np.abs(Lasso(alpha=0.1).fit(z[i], z[j]).coef_.T)
            else:
                R = np.array([[abs(spearmanr(a, b).statistic) for b in codes[j].T] for a in codes[i].T])
            R = R[informative[i]][:, informative[j]]
            if R.size:
                parts = [r.max() ** 2 / r.sum() if r.sum() else 0 for r in [*R, *R.T]]
                scores[i, j] = np.mean(parts)
    return [np.median(np.delete(scores[:, j], j)) for j in range(models)]


def trained(models, n=80, seed=0):
    """Codes of the same inputs from several models: each mixes the same sources a little differently."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(n, 4))
    return [
        sources @ np.linalg.qr(np.eye(4) + 0.3 * rng.normal(size=(4, 4)))[0] + 0.1 * rng.normal(size=(n, 4))
        for _ in range(models)
    ]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), method=st.sampled_from(["lasso", "spearman"]), models=st.integers(2, 4))
def test_the_plain_loops(seed, method, models):
    rng = np.random.default_rng(seed)
    codes = trained(models, seed=seed)
    kl = [rng.choice([0.005, 0.5], 4) for _ in codes]
    found = udr(codes, kl, method=method)
    expected = plain_udr(codes, [k > 0.01 for k in kl], method)
    assert [s.value for s in found.scores] == pytest.approx(expected, abs=2e-4)  # sklearn's tolerance of a lasso
    assert found.informative == tuple(tuple(np.flatnonzero(k > 0.01)) for k in kl)


def test_models_that_agree():
    # orthogonal latents: the lasso shrinks a weight of 1 by its penalty, ranks agree under any monotone map
    codes = [perfect(), perfect()[:, [1, 2, 0]] * [2, -1, 5], perfect()[:, ::-1] + 3]
    for method, expected in (("lasso", 0.9), ("spearman", 1.0)):
        found = udr(codes, method=method)
        assert [s.value for s in found.scores] == pytest.approx([expected] * 3, abs=1e-9)
    assert [s.value for s in udr([c**3 for c in codes], method="spearman").scores] == pytest.approx([1] * 3)


def test_a_rotated_model_agrees_less():
    scores = udr([perfect(), perfect() * -2, rotated()]).scores
    assert scores[2].value < scores[0].value - 0.1
    # two latents at 45 degrees: each relation is (.707, .707) less the penalty
    z = (FACTORS[:, :2] - FACTORS[:, :2].mean(0)) / FACTORS[:, :2].std(0)
    turned = z @ np.array([[1, 1], [1, -1]]) / 2**0.5
    assert udr([z, turned]).scores[0].value == pytest.approx((0.5**0.5 - 0.1) / 2, abs=1e-9)


def test_a_duplicated_and_constant_latents():
    codes = [perfect(), np.concatenate([perfect(), np.full((60, 2), 0.1)], 1)]
    assert [s.value for s in udr(codes).scores] == pytest.approx([0.9, 0.9], abs=1e-9)
    twice = udr([perfect(), np.concatenate([perfect(), perfect()], 1)], method="spearman")
    # three latents answer to two each: (3 / 2 + 6) / 9
    assert twice.scores[0].value == pytest.approx(7.5 / 9)
    nothing = udr([perfect(), np.full((60, 2), 0.1)])
    assert [s.value for s in nothing.scores] == [0, 0] and nothing.informative[1] == ()


def test_order_of_latents_and_of_models():
    codes = trained(4)
    before = udr(codes)
    after = udr([codes[m][:, [3, 1, 0, 2]] * [1, -2, 3, 1] + 1 for m in (2, 0, 3, 1)])
    expected = [before.scores[m].value for m in (2, 0, 3, 1)]
    assert [s.value for s in after.scores] == pytest.approx(expected, abs=1e-4)


def test_intervals_are_order_statistics():
    codes = trained(7)
    found = udr([torch.from_numpy(c) for c in codes])
    others = np.delete(found.pairwise[:, 0], 0)
    first = found.scores[0]
    assert (first.low, first.high, first.n, first.resampled) == (others.min(), others.max(), 6, "other models")
    few = udr(codes[:4]).scores[0]
    assert (few.low, few.high) == (0, 1)
    # 2 P(at most 1 of 10 below the median) = .021: the second of ten on either side
    many = udr(trained(11), method="spearman")
    others = np.sort(np.delete(many.pairwise[:, 3], 3))
    assert (many.scores[3].low, many.scores[3].high) == (others[1], others[-2])


@pytest.mark.parametrize(
    "codes, options, match",
    [
        ([perfect()], {}, "two models"),
        ([perfect(), perfect()[:50]], {}, r"N = \[50, 60\]"),
        ([perfect(), np.full((60, 3), np.nan)], {}, "latent 0"),
        ([perfect(), perfect()], {"method": "kendall"}, "method"),
        ([perfect(), perfect()], {"level": 95}, "level"),
        ([perfect(), perfect()], {"kl": [[1, 1, 1]]}, "2 models"),
        ([perfect(), perfect()], {"kl": [[1, 1, 1], [1, 1]]}, "model 1"),
        ([perfect(), perfect()], {"kl": [[1, 1, 1], [1, 1, -1]]}, "model 1"),
    ],
)
def test_bad_input(codes, options, match):
    with pytest.raises(InputError, match=match):
        udr(codes, **options)


def test_samples_are_the_codes_of_one_input():
    codes, _ = noisy(50)
    shuffled = codes[np.random.default_rng(0).permutation(50)]
    assert udr([codes, codes]).scores[0].value > udr([codes, shuffled]).scores[0].value + 0.3
