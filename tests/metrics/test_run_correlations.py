"""Correlations, partial correlations and mixed slopes: against scipy, statsmodels, enumeration and planted tables."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics.statistics import (
    latent_agreement,
    matched_latents,
    mixed_slope,
    partial_correlation,
    pearson,
    spearman,
)

RNG = np.random.default_rng(5)
X = RNG.normal(size=20)
Y = 0.6 * X + RNG.normal(size=20)


def runs(rng, sets=3, architectures=5, seeds=3, by_set=0.0, by_architecture=0.0, slope=0.0):
    """A study's table: ces and dci, each with effects of data set and of architecture, unrelated but for the slope."""
    rows = []
    scale = {"d": rng.normal(size=(sets, 2)) * by_set, "a": rng.normal(size=(sets, architectures, 2)) * by_architecture}
    scale["d"][:, 1] = scale["d"][:, 0]  # what a data set does, it does to both
    for d, a, s in itertools.product(range(sets), range(architectures), range(seeds)):
        ces, dci = scale["d"][d] + scale["a"][d, a] + rng.normal(size=2)
        size = {"factors": 5 + d, "resolution": 64 if d else 8, "latents": 10, "reconstruction": rng.normal()}
        rows.append({"data": f"set {d}", "architecture": f"net {a}", "seed": s, "ces": ces, "dci": dci, **size})
        rows[-1]["dci"] += slope * ces
    return pd.DataFrame(rows)


GIVEN = ["factors", "resolution", "latents", "reconstruction"]


# --- plain -----------------------------------------------------------------------------------------------------------


def test_pearson_against_scipy():
    found = pearson(X, Y, level=0.9)
    expected = stats.pearsonr(X, Y)
    bounds = expected.confidence_interval(0.9)
    assert [found.value, found.p] == pytest.approx([expected.statistic, expected.pvalue])
    assert [found.low, found.high] == pytest.approx([bounds.low, bounds.high])
    assert (found.n, found.resampled) == (20, "runs") and "Fisher" in found.method and not found.note


def test_spearman_against_scipy():
    tied = np.round(X)
    found, expected = spearman(tied, Y), stats.spearmanr(tied, Y)
    assert [found.value, found.p] == pytest.approx([expected.statistic, expected.pvalue])
    half = 1.959964 * math.sqrt((1 + found.value**2 / 2) / 17)
    bounds = np.tanh([math.atanh(found.value) - half, math.atanh(found.value) + half])
    assert [found.low, found.high] == pytest.approx(bounds)


@settings(max_examples=15, deadline=None)
@given(y=st.lists(st.integers(0, 9), min_size=4, max_size=6).filter(lambda v: len(set(v)) > 1))
def test_below_eight_spearmans_p_is_exact(y):
    x = list(range(len(y)))
    found = spearman(x, y)
    observed = abs(stats.spearmanr(x, y).statistic)
    drawn = [abs(stats.spearmanr(x, order).statistic) for order in set(itertools.permutations(y))]
    assert found.p == pytest.approx(np.mean([d >= observed - 1e-9 for d in drawn]))
    assert f"only {len(y)} runs" in found.note


def test_a_bootstrapped_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    y = x + rng.normal(size=300)
    for f in (pearson, spearman):
        fisher, drawn = f(x, y), f(x, y, interval="bootstrap", replicates=1000)
        assert (drawn.value, drawn.p) == (fisher.value, fisher.p) and "bootstrap" in drawn.method
        assert [drawn.low, drawn.high] == pytest.approx([fisher.low, fisher.high], abs=0.02)


@pytest.mark.parametrize(
    "trials", [pytest.param(400, id="fast"), pytest.param(10_000, id="thorough", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("f, rho, n", [(pearson, 0.7, 5), (pearson, 0.0, 12), (spearman, 0.6, 12)])
def test_correlations_cover(trials, f, rho, n):
    rng = np.random.default_rng(0)
    truth = rho if f is pearson else 6 / math.pi * math.asin(rho / 2)
    hits = 0
    for _ in range(trials):
        x = rng.normal(size=n)
        found = f(x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n))
        hits += found.low <= truth <= found.high
    assert abs(hits / trials - 0.95) < 0.02 + 4 * math.sqrt(0.05 / trials)


def test_perfect_correlations_are_finite():
    found = pearson([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert found.value == 1 and 0.99 < found.low <= 1 and found.p < 1e-6
    assert pearson([1, 2, 3, 4], [4, 3, 2, 1]).value == -1


# --- partial ---------------------------------------------------------------------------------------------------------


def test_a_partial_correlation_is_that_of_least_squares():
    data = runs(np.random.default_rng(1), slope=0.5)
    found = partial_correlation(data, "ces", "dci", given=GIVEN)
    design = sm.add_constant(data[["factors", "resolution", "reconstruction", "ces"]])
    fit = sm.OLS(data["dci"], design).fit()
    t, freedom = fit.tvalues["ces"], fit.df_resid
    assert found.value == pytest.approx(t / math.sqrt(t**2 + freedom))
    assert found.p == pytest.approx(fit.pvalues["ces"])
    half = 1.959964 / math.sqrt(45 - 3 - 3)
    assert [found.low, found.high] == pytest.approx(np.tanh([math.atanh(found.value) + h for h in (-half, half)]))
    assert found.given == ("factors", "resolution", "reconstruction") and found.dropped == ("latents (constant)",)
    assert "latents (constant)" in str(found) and found.resampled == "runs" and found.n == 45


def test_the_rank_form_is_the_linear_form_of_ranks():
    data = runs(np.random.default_rng(2), slope=0.5)
    ranked = data[["ces", "dci", "reconstruction"]].rank()
    found = partial_correlation(data, "ces", "dci", ["reconstruction"], method="spearman")
    linear = partial_correlation(ranked, "ces", "dci", ["reconstruction"])
    assert found.value == pytest.approx(linear.value) and found.p == pytest.approx(linear.p)
    assert found.high - found.low > linear.high - linear.low  # ranks: the wider variance
    # nothing changes under monotone maps
    curved = data.assign(ces=np.exp(data["ces"]), reconstruction=data["reconstruction"] ** 3)
    same = partial_correlation(curved, "ces", "dci", ["reconstruction"], method="spearman")
    assert same.value == pytest.approx(found.value)


def test_covariates_that_determine_one_another_are_named():
    data = runs(np.random.default_rng(1)).assign(pixels=lambda d: 2.0 * d["resolution"] + 1)
    found = partial_correlation(data, "ces", "dci", ["resolution", "pixels", "architecture"])
    assert found.given == ("resolution", "architecture")
    assert found.dropped == ("pixels (determined by the covariates before it)",)
    without = partial_correlation(data, "ces", "dci", ["resolution", "architecture"])
    assert found.value == pytest.approx(without.value) and found.p == pytest.approx(without.p)


def test_covariates_of_the_data_set_belong_to_pooled_correlations():
    data = runs(np.random.default_rng(3), by_set=5.0)
    pooled = partial_correlation(data, "ces", "dci")
    assert pooled.value > 0.7  # Simpson: the data sets differ in both
    inside = partial_correlation(data, "ces", "dci", GIVEN, within="data", replicates=500)
    assert abs(inside.value) < 0.4 and inside.given == ("reconstruction",)
    assert inside.dropped[:2] == ("factors (does not vary within data)", "resolution (does not vary within data)")
    # three data sets: factors and resolution say all there is to say of a data set
    known = partial_correlation(data, "ces", "dci", GIVEN)
    assert known.value == pytest.approx(inside.value)
    dummies = partial_correlation(data, "ces", "dci", ["data", "reconstruction"])
    assert dummies.value == pytest.approx(inside.value)


def test_architectures_are_permuted_and_not_runs():
    """Four architectures of two runs: 24 permutations of blocks, gone through by hand."""
    data = runs(np.random.default_rng(4), sets=1, architectures=4, seeds=2, by_architecture=2.0)
    found = partial_correlation(data, "ces", "dci", permute="architecture")
    x, y = data["ces"].to_numpy().reshape(4, 2), data["dci"].to_numpy().reshape(4, 2)
    drawn = [np.corrcoef(x.ravel(), y[list(o)].ravel())[0, 1] for o in itertools.permutations(range(4))]
    assert found.p == pytest.approx(np.mean(np.abs(drawn) >= abs(found.value) - 1e-9))
    assert (found.n, found.resampled) == (4, "architectures") and "all 24 permutations" in found.method
    z = np.arctanh([np.corrcoef(np.delete(x, k, 0).ravel(), np.delete(y, k, 0).ravel())[0, 1] for k in range(4)])
    half = stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * ((z - z.mean()) ** 2).sum())
    bounds = np.tanh([math.atanh(found.value) - half, math.atanh(found.value) + half])
    assert [found.low, found.high] == pytest.approx(bounds)
    assert "only 4 architectures" in found.note
    same = pearson(data["ces"], data["dci"], permute=data["architecture"], resampled="architectures")
    assert (same.value, same.p, same.low) == pytest.approx((found.value, found.p, found.low))


def test_units_are_exchanged_within_strata_alike_or_apart():
    data = runs(np.random.default_rng(4), sets=2, architectures=3, seeds=2)
    alike = partial_correlation(data, "ces", "dci", within="data", permute="architecture")
    apart = partial_correlation(data, "ces", "dci", within="data", permute=["data", "architecture"])
    assert "all 6 permutations" in alike.method and "all 36 permutations" in apart.method
    assert alike.n == 3 and apart.n == 6 and apart.resampled == "datas x architectures"
    x, y = (data[c] - data.groupby("data")[c].transform("mean") for c in ("ces", "dci"))
    x, y = (v.to_numpy().reshape(2, 3, 2) for v in (x, y))
    orders = list(itertools.permutations(range(3)))
    r = [np.corrcoef(x.ravel(), np.stack([y[0, list(a)], y[1, list(b)]]).ravel())[0, 1] for a in orders for b in orders]
    assert apart.p == pytest.approx(np.mean(np.abs(r) >= abs(apart.value) - 1e-9))
    shuffled = data.sample(frac=1, random_state=1).sort_values("seed", kind="stable")  # rows in another order
    again = partial_correlation(shuffled, "ces", "dci", within="data", permute=["data", "architecture"])
    assert again.p == pytest.approx(apart.p) and again.low == pytest.approx(apart.low)


def test_units_of_other_sizes_are_not_exchanged():
    data = runs(np.random.default_rng(4), sets=1, architectures=4, seeds=2).iloc[:-1]  # one architecture has one run
    assert "all 6 permutations" in partial_correlation(data, "ces", "dci", permute="architecture").method
    one_each = runs(np.random.default_rng(4), sets=1, architectures=2, seeds=3).iloc[:4]  # three runs and one
    with pytest.raises(InputError, match="nothing can be exchanged"):
        partial_correlation(one_each, "ces", "dci", permute="architecture")


@pytest.mark.parametrize(
    "trials", [pytest.param(60, id="fast"), pytest.param(2000, id="thorough", marks=pytest.mark.deep)]
)
def test_permuting_architectures_holds_the_level_where_runs_do_not(trials):
    rng = np.random.default_rng(0)
    blocked, naive, covered = 0, 0, 0
    for _ in range(trials):
        data = runs(rng, sets=2, architectures=6, seeds=4, by_set=2.0, by_architecture=2.0)
        found = partial_correlation(
            *(data, "ces", "dci", ["reconstruction"]), within="data", permute=["data", "architecture"], replicates=199
        )
        blocked += found.p <= 0.05
        covered += found.low <= 0 <= found.high
        naive += partial_correlation(data, "ces", "dci", ["data", "reconstruction"]).p <= 0.05
    assert blocked / trials < 0.05 + 4 * math.sqrt(0.05 / trials)
    assert covered / trials > 0.9 - 4 * math.sqrt(0.09 / trials)
    assert naive / trials > 0.2


def test_a_planted_relation_is_found():
    data = runs(np.random.default_rng(0), sets=3, by_set=3.0, by_architecture=2.0, slope=-1.5)
    found = partial_correlation(data, "ces", "dci", GIVEN, within="data", permute=["data", "architecture"])
    assert found.p < 0.001 and found.high < -0.3 and "9999 random permutations, seed 0" in found.method


# --- mixed slopes ----------------------------------------------------------------------------------------------------


def test_a_mixed_slope_against_statsmodels_own_formula():
    data = runs(np.random.default_rng(1), sets=6, by_set=3.0, slope=0.8)
    found = mixed_slope(data, "dci", "ces")
    fit = smf.mixedlm("dci ~ ces", data, groups=data["data"]).fit(reml=True)
    assert found.value == pytest.approx(fit.params["ces"], rel=1e-4)
    half = stats.t.ppf(0.975, 90 - 6 - 1) * fit.bse["ces"]
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], rel=1e-3)
    assert found.between == pytest.approx(math.sqrt(fit.cov_re.iloc[0, 0]), rel=0.02)
    assert found.residual == pytest.approx(math.sqrt(fit.scale), rel=1e-3)
    assert found.converged and not found.singular and found.groups == 6 and "6 levels of data" in found.resampled
    assert found.low < 0.8 < found.high


def test_a_slope_does_not_depend_on_units():
    data = runs(np.random.default_rng(1), sets=4, by_set=3.0, slope=0.8)
    found = mixed_slope(data, "dci", "ces")
    scaled = mixed_slope(data.assign(ces=1e6 * data["ces"] + 3e7, dci=1e-5 * data["dci"]), "dci", "ces")
    assert [1e11 * scaled.value, 1e11 * scaled.low] == pytest.approx([found.value, found.low], rel=1e-5)
    assert scaled.p == pytest.approx(found.p, rel=1e-3)


def test_a_singular_fit_is_said_and_is_least_squares():
    rng = np.random.default_rng(0)
    data = runs(rng, sets=4, slope=0.5)
    for name in ("ces", "dci"):  # equal means in all data sets: less between them than chance would give
        data[name] -= data.groupby("data")[name].transform("mean")
    found = mixed_slope(data, "dci", "ces")
    assert found.singular and "estimated as 0" in found.note and found.between < 0.02
    assert found.value == pytest.approx(sm.OLS(data["dci"], sm.add_constant(data["ces"])).fit().params["ces"], rel=1e-4)
    assert math.isfinite(found.low) and "only 4 data sets" in found.note


def test_slopes_that_differ_between_data_sets_are_wider():
    rng = np.random.default_rng(0)
    parts = []
    for d in range(8):
        x = rng.normal(size=12)
        slope = 1 + rng.normal()
        parts.append(pd.DataFrame({"data": f"set {d}", "x": x, "y": slope * x + 0.3 * rng.normal(size=12)}))
    data = pd.concat(parts)
    common, random = mixed_slope(data, "y", "x"), mixed_slope(data, "y", "x", random_slope=True)
    assert random.high - random.low > 2 * (common.high - common.low)
    assert random.low < 1 < random.high and "7 degrees of freedom" in random.method


@pytest.mark.parametrize(
    "trials", [pytest.param(40, id="fast"), pytest.param(600, id="thorough", marks=pytest.mark.deep)]
)
def test_mixed_slopes_cover(trials):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(trials):
        found = mixed_slope(runs(rng, sets=3, architectures=2, by_set=2.0, slope=0.5), "dci", "ces")
        hits += found.low <= 0.5 <= found.high
    assert hits / trials > 0.95 - 4 * math.sqrt(0.05 / trials)


# --- latents ---------------------------------------------------------------------------------------------------------


def test_matched_latents_undo_a_permutation_and_signs():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 6))
    codes[:, 5] = 3.0  # inactive
    order = np.array([4, 2, 0, 5, 3, 1])
    other = (codes * [1, -2, 3, 1, -1, 1])[:, order] + 0.01 * rng.normal(size=(200, 6))
    found = matched_latents(codes, other)
    assert [order[j] for j in found[:5]] == [0, 1, 2, 3, 4] and sorted(found) == list(range(6))


def test_latents_agree_up_to_their_order():
    rng = np.random.default_rng(0)
    codes, values = rng.normal(size=(100, 5)), np.array([5.0, 1, 3, 2, 4])
    order = [4, 2, 0, 1, 3]
    assert latent_agreement(values, values[order], codes, codes[:, order]).value == 1.0
    direct = latent_agreement(values, values[order])
    assert direct.value == pytest.approx(stats.spearmanr(values, values[order]).statistic)
    assert (direct.resampled, direct.n) == ("latents", 5) and "all 120 permutations" in direct.method


DATA = runs(np.random.default_rng(0), sets=2)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: pearson([1, 2, 3], [1, 2, 3]), "at least 4"),
        (lambda: pearson([1, 2, 3, 4], [1, 2, 3, 4, 5]), "y:"),
        (lambda: spearman([1, 1, 1, 1], [1, 2, 3, 4]), "x: expected numbers that vary"),
        (lambda: pearson([1, 2, 3, 4], [1, 2, math.nan, 4]), "NaN"),
        (lambda: pearson(X, Y, interval="wald"), "interval"),
        (lambda: pearson(X[:7], Y[:7], interval="bootstrap"), "at least 8"),
        (lambda: pearson(X, Y, within=[0] * 20, interval="bootstrap"), "interval"),
        (lambda: pearson(X, Y, permute=[0, 1]), "permute: expected a label for each of the 20 rows"),
        (lambda: pearson(X, Y, within=list(range(20))), "nothing can be exchanged"),
        (lambda: pearson(X, Y, within=[None, *range(19)]), "1 missing"),
        (lambda: partial_correlation(DATA, "ces", "fid"), "no column 'fid'"),
        (lambda: partial_correlation(DATA, "ces", "dci", ["depth"]), "no column 'depth'"),
        (lambda: partial_correlation(DATA, "ces", "architecture"), "numbers in column 'architecture'"),
        (lambda: partial_correlation(DATA.assign(dci=math.nan), "ces", "dci"), "misses 30 of 30"),
        (lambda: partial_correlation(DATA, "ces", "latents"), "'latents' is constant"),
        (lambda: partial_correlation(DATA.assign(k=3.0 * DATA["ces"]), "ces", "dci", ["k"]), "determined by k"),
        (lambda: partial_correlation(DATA[:5], "ces", "dci", ["reconstruction", "seed", "architecture"]), "at least"),
        (lambda: partial_correlation(DATA, "ces", "dci", method="kendall"), "method"),
        (lambda: partial_correlation(DATA, "ces", "dci", permute="seed", replicates=0), "replicates"),
        (lambda: mixed_slope(DATA[DATA["data"] == "set 0"], "dci", "ces"), "two levels"),
        (lambda: mixed_slope(DATA, "dci", "factors"), "vary within"),
        (lambda: mixed_slope(DATA, "latents", "ces"), "vary"),
        (lambda: mixed_slope(DATA, "dci", "ces", group="site"), "no column 'site'"),
        (lambda: mixed_slope(DATA[:5].assign(data=list("abcde")), "dci", "ces"), "at least 7 rows"),
        (lambda: matched_latents(np.ones((5, 2)), np.ones((5, 3))), "codes_b"),
        (lambda: latent_agreement([1, 2, 3, 4], [1, 2, 3, 4], np.ones((5, 4))), "both or neither"),
        (lambda: latent_agreement([1, 1, 1, 1], [1, 2, 3, 4]), "vary"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
