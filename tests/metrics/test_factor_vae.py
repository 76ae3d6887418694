"""FactorVAE and BetaVAE scores: closed forms, the protocol as plain loops, and what may change nothing."""

import numpy as np
import pytest
from coded_grids import FACTORS, SIZES, noisy, perfect, rotated
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import beta_vae_score, factor_vae_score
from vaecirc_fast.metrics.score import rows_by_level, share_interval


def plain_limit(codes, factors):
    """Votes of all values of all factors, each with all of its rows, factors equally."""
    keep = codes.std(0, ddof=1) >= 0.05
    votes = np.zeros((factors.shape[1], codes.shape[1]))
    for k, v in enumerate(factors.T):
        for a in set(v.tolist()):
            ratio = codes[v == a].var(0) / np.where(keep, codes.var(0), 1)
            votes[k, np.where(keep, ratio, np.inf).argmin()] += (v == a).mean()
    return votes.max(0).sum() / votes.sum(), votes


def plain_factor_vae(codes, factors, rng, train, test, batch=64):
    """The protocol, one vote after another."""
    variance = codes[rng.integers(len(codes), size=10_000)].var(0, ddof=1)
    active = np.flatnonzero(np.sqrt(variance) >= 0.05)

    def tally(votes):
        table = np.zeros((factors.shape[1], len(active)))
        for _ in range(votes):
            k = rng.integers(factors.shape[1])
            same = np.flatnonzero(factors[:, k] == factors[rng.integers(len(codes)), k])
            z = codes[rng.choice(same, batch)][:, active]
            table[k, (z.var(0, ddof=1) / variance[active]).argmin()] += 1
        return table

    classifier = tally(train).argmax(0)
    return tally(test)[classifier, np.arange(len(active))].sum() / test


def plain_beta_vae(codes, factors, rng, train, test, batch=64):
    def points(n):
        x, y = [], []
        for _ in range(n):
            k = rng.integers(factors.shape[1])
            first = rng.integers(len(codes), size=batch)
            second = [rng.choice(np.flatnonzero(factors[:, k] == factors[row, k])) for row in first]
            x.append(np.abs(codes[first] - codes[second]).mean(0))
            y.append(k)
        return np.array(x), np.array(y)

    return LogisticRegression(max_iter=1000).fit(*points(train)).score(*points(test))


FEW = {"train": 300, "test": 200}


def test_a_perfect_code_scores_one():
    for score in (factor_vae_score(perfect(), FACTORS, **FEW), factor_vae_score(perfect(), FACTORS, exact=True)):
        assert score.value == score.train == 1 and score.high == 1 and score.active == (0, 1, 2)
    beta = beta_vae_score(perfect(), FACTORS, train=2000, test=500)
    assert beta.value == 1 and beta.low > 0.99 and beta.n == 500


def test_latents_that_tell_nothing_score_chance():
    # all latents are one mixture of the factors: every vote is for the first, and no factor is told from another
    codes = np.repeat(FACTORS @ [[1.0], [np.pi], [np.e]], 3, 1)
    score = factor_vae_score(codes, FACTORS, exact=True)
    assert score.value == pytest.approx(1 / 3, abs=1e-12) and (score.votes[:, 1:] == 0).all()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6000, 3))
    factors = rng.integers(0, 3, (6000, 3))
    score = beta_vae_score(noise, factors, train=1000, test=1000, batch=16)
    assert score.low < 1 / 3 + 0.02 and score.high > 1 / 3 - 0.02


def test_a_rotated_code_scores_less():
    assert factor_vae_score(rotated(), FACTORS, **FEW, batch=4).high < 0.8
    assert beta_vae_score(rotated(), FACTORS, **FEW, batch=4).high < 0.8


def test_a_latent_of_two_factors():
    # whichever of the two is held fixed, the latent they share varies least: one of three factors is never told
    z = (FACTORS - FACTORS.mean(0)) / FACTORS.std(0)
    score = factor_vae_score(np.stack([z[:, 0] + z[:, 1], z[:, 2]], 1), FACTORS, exact=True)
    assert score.value == pytest.approx(2 / 3, abs=1e-12)


def test_a_duplicated_and_a_constant_latent_change_nothing():
    codes = np.concatenate([perfect(), perfect()[:, :1], np.full((60, 1), 0.3)], 1)
    score = factor_vae_score(codes, FACTORS, exact=True)
    assert score.value == 1 and score.active == (0, 1, 2, 3) and (score.votes[:, 3:] == 0).all()
    assert factor_vae_score(codes, FACTORS, **FEW).value == 1
    assert beta_vae_score(codes, FACTORS, train=2000, test=500).value == 1


def test_pruned_latents_are_counted_by_the_mask():
    codes = perfect() * [1, 1, 1e-3]
    score = factor_vae_score(codes, FACTORS, **FEW)
    assert score.active == (0, 1) and (score.votes[:, 2] == 0).all()
    assert factor_vae_score(codes, FACTORS, threshold=0, **FEW).active == (0, 1, 2)
    nothing = factor_vae_score(np.full((60, 2), 0.1), FACTORS, **FEW)
    assert (nothing.value, nothing.low, nothing.high, nothing.active) == (0, 0, 0, ()) and "no latent" in nothing.note


@given(seed=st.integers(0, 2**31), latents=st.integers(1, 6))
def test_the_limit_in_plain_loops(seed, latents):
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(60, latents)) + FACTORS[:, rng.integers(3, size=latents)] * rng.uniform(0, 2, latents)
    score = factor_vae_score(codes, FACTORS, exact=True)
    value, votes = plain_limit(codes, FACTORS)
    assert score.value == pytest.approx(value, abs=1e-12)
    assert score.votes == pytest.approx(votes, abs=1e-12)
    assert score.low == score.high == score.value and score.n == 60


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_order_sign_and_scale_of_latents_change_nothing(seed):
    rng = np.random.default_rng(seed)
    codes, factors = noisy(200, seed % 1000)
    order, scale = rng.permutation(5), 2.0 ** rng.integers(-2, 3, 5) * rng.choice([-1, 1], 5)
    changed = codes[:, order] * scale
    for exact in (False, True):
        before, after = (factor_vae_score(z, factors, exact=exact, threshold=0, **FEW) for z in (codes, changed))
        assert after.value == pytest.approx(before.value, abs=1e-12)
    before = beta_vae_score(codes, factors, **FEW)
    assert beta_vae_score(codes[:, order] + rng.normal(), factors, **FEW).value == pytest.approx(
        before.value, abs=0.011
    )


@pytest.mark.parametrize("ours, plain", [(factor_vae_score, plain_factor_vae), (beta_vae_score, plain_beta_vae)])
def test_the_protocol_in_plain_loops(ours, plain):
    """Different random numbers, so the means of repetitions are compared: within four of their standard errors."""
    codes, factors = rotated() + np.random.default_rng(1).normal(size=(60, 3)) * 0.8, FACTORS
    options = {"train": 150, "test": 150, "batch": 16}
    mine = [ours(codes, factors, **options, seed=seed).value for seed in range(20)]
    theirs = [plain(codes, factors, np.random.default_rng(seed), **options) for seed in range(10)]
    error = (np.var(mine, ddof=1) / len(mine) + np.var(theirs, ddof=1) / len(theirs)) ** 0.5
    assert abs(np.mean(mine) - np.mean(theirs)) < 4 * error
    assert 0.4 < np.mean(mine) < 0.97  # of neither end, where all implementations agree


def test_rows_of_a_level_are_drawn_alike():
    from vaecirc_fast.metrics.factor_vae import drawn_levels, rows_of_levels

    level = np.array([3, 0, 3, 1, 3, 0, 2])
    rows = rows_by_level(level, 4)
    rng = np.random.default_rng(0)
    drawn = drawn_levels(rows, 60_000, rng)
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == counts[2] == 0  # a value that occurs once is never held fixed
    assert abs(counts[0] / 60_000 - 0.4) < 5 * (0.24 / 60_000) ** 0.5
    found = rows_of_levels(rows, drawn, rng)
    assert (level[found] == drawn).all()
    share = np.bincount(found, minlength=7)[[0, 2, 4]] / counts[3]
    assert np.abs(share - 1 / 3).max() < 5 * (2 / 9 / counts[3]) ** 0.5


def test_fewer_samples_than_the_protocol_needs():
    codes, factors = noisy(40)
    factors = np.concatenate([factors, np.arange(40)[:, None]], 1)
    score = factor_vae_score(codes, factors, **FEW)
    assert "variances from all 40 rows" in score.note and "factor 3 left out: no value occurs twice" in score.note
    assert score.factors == ("factor 0", "factor 1", "factor 2") and score.votes.shape == (3, 5)
    assert "factor 3 left out" in beta_vae_score(codes, factors, **FEW).note
    lonely = np.stack([np.r_[np.zeros(38, int), 1, 2], factors[:, 0]], 1)
    assert "2 factor values that occur once left out" in factor_vae_score(codes, lonely, **FEW).note


def test_a_seed_gives_the_same_numbers():
    codes, factors = noisy()
    assert factor_vae_score(codes, factors, **FEW) == factor_vae_score(codes, factors, **FEW)
    assert beta_vae_score(codes, factors, **FEW) == beta_vae_score(codes, factors, **FEW)
    assert factor_vae_score(codes, factors, **FEW, seed=1) != factor_vae_score(codes, factors, **FEW)


def test_wilsons_interval():
    # Wilson 1927; 8 of 10 at 95 % is the textbooks' example
    assert share_interval(8, 10, 0.95) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share_interval(0, 10, 0.95)[0] == 0 and share_interval(10, 10, 0.95)[1] == 1


@pytest.mark.parametrize("score", [factor_vae_score, beta_vae_score])
@pytest.mark.parametrize(
    "options, match",
    [
        ({"train": 0}, "train"),
        ({"test": 2.5}, "test"),
        ({"batch": 0}, "batch"),
        ({"level": 95}, "level"),
        ({"factor_names": ["a"]}, "factor_names"),
    ],
)
def test_bad_options(score, options, match):
    with pytest.raises(InputError, match=match):
        score(*noisy(60), **options)


def test_one_factor_alone_is_refused():
    for score in (factor_vae_score, beta_vae_score):
        with pytest.raises(InputError, match="two factors"):
            score(perfect(), FACTORS[:, :1])
    with pytest.raises(InputError, match="threshold"):
        factor_vae_score(perfect(), FACTORS, threshold=-1)
    assert SIZES == (3, 4, 5)


@pytest.mark.deep
def test_intervals_cover():
    """Wilson's, for the votes: it holds the mean over seeds as often as it says, up to what training votes add."""
    codes, factors = rotated() + np.random.default_rng(1).normal(size=(60, 3)) * 0.8, FACTORS
    for score in (factor_vae_score, beta_vae_score):
        found = [score(codes, factors, train=2000, test=400, seed=seed) for seed in range(150)]
        mean = np.mean([s.value for s in found])
        assert 0.88 < np.mean([s.low <= mean <= s.high for s in found]) <= 1
