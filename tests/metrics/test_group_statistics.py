"""Comparisons of groups, effect sizes, families and seeds needed: against scipy, statsmodels and simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import weightstats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics.statistics import (
    Inference,
    cliffs_delta,
    cohens_d,
    equivalence,
    family,
    hedges_g,
    holm_sidak,
    permutation_test,
    prediction_interval,
    seeds_needed,
    seeds_table,
    verdict,
    welch,
)

A = [0.31, 0.42, 0.28, 0.55, 0.47]
B = [0.22, 0.19, 0.35, 0.30]
NUMBERS = st.lists(st.integers(-50, 50).map(lambda k: k / 8), min_size=2, max_size=5)


def covers(interval, truth, draw, trials):
    """Share of trials whose interval holds `truth`."""
    rng = np.random.default_rng(0)
    results = [interval(*draw(rng)) for _ in range(trials)]
    return np.mean([r.low <= truth <= r.high for r in results])


def two_groups(n, m, shift=0.0, spread=1.0):
    return lambda rng: (rng.normal(shift, 1, n), rng.normal(0, spread, m))


# --- Welch -----------------------------------------------------------------------------------------------------------


def test_welch_against_scipy():
    expected = stats.ttest_ind(A, B, equal_var=False)
    bounds = expected.confidence_interval(0.9)
    found = welch(A, B, level=0.9, unit="nats")
    assert [found.value, found.low, found.high] == pytest.approx([np.mean(A) - np.mean(B), bounds.low, bounds.high])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.n, found.resampled, found.unit, found.method) == (9, "seeds", "nats", "Welch's t test")
    assert "only 4 seeds in a group" in found.note and "Welch" in str(found)
    assert welch(range(8), range(1, 9)).note == ""


def test_groups_that_do_not_vary_have_a_defined_result():
    same, other = welch([10, 10, 10], [10, 10]), welch([10, 10, 10], [7, 7])
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (other.value, other.low, other.high, other.p) == (3, 3, 3, 0)
    assert "neither group varies" in same.note


@pytest.mark.parametrize(
    "trials", [pytest.param(800, id="fast"), pytest.param(20_000, id="thorough", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("n, m, spread", [(3, 3, 1.0), (4, 7, 3.0)])
def test_welch_covers(trials, n, m, spread):
    share = covers(welch, 0.5, two_groups(n, m, 0.5, spread), trials)
    # of three seeds a group Welch is a little conservative; binomial error of four sd below and above
    assert 0.94 - 4 * math.sqrt(0.06 / trials) < share < 0.98 + 4 * math.sqrt(0.02 / trials)


# --- permutations ----------------------------------------------------------------------------------------------------


def by_enumeration(x, y):
    """The p of the permutation test, straight from its definition."""
    both = [*x, *y]
    observed = abs(np.mean(x) - np.mean(y))
    differences = []
    for chosen in itertools.combinations(range(len(both)), len(x)):
        first = [both[i] for i in chosen]
        second = [both[i] for i in range(len(both)) if i not in chosen]
        differences.append(abs(np.mean(first) - np.mean(second)))
    return np.mean([d >= observed - 1e-9 for d in differences])


@settings(max_examples=25, deadline=None)
@given(x=NUMBERS, y=NUMBERS)
def test_the_exact_permutation_p_is_that_of_enumeration(x, y):
    assert permutation_test(x, y).p == pytest.approx(by_enumeration(x, y))


def test_permutation_of_three_against_three_cannot_go_below_a_tenth():
    found = permutation_test([5.0, 6, 7], [1.0, 2, 3])
    assert found.p == pytest.approx(2 / 20) and "all 20 rearrangements" in found.method
    assert (found.low, found.high) == (-math.inf, math.inf) and "too few" in found.note


def test_a_paired_permutation_flips_signs():
    x, y = [0.5, 0.7, 0.6, 0.9, 0.8, 0.75], [0.4, 0.5, 0.65, 0.6, 0.5, 0.5]
    flips = np.array(list(itertools.product((1, -1), repeat=6))) @ (np.array(x) - y) / 6
    found = permutation_test(x, y, paired=True)
    assert found.p == pytest.approx(np.mean(np.abs(flips) >= found.value - 1e-9))
    assert "signs of paired differences" in found.method and found.n == 6


def test_a_random_permutation_counts_itself_and_is_seeded():
    rng = np.random.default_rng(1)
    x, y = rng.normal(3, 1, 12), rng.normal(0, 1, 12)  # C(24, 12) is 2.7 million
    found = permutation_test(x, y, replicates=199, seed=3)
    assert found.p == 1 / 200 and "199 random rearrangements, seed 3" in found.method
    assert found == permutation_test(x, y, replicates=199, seed=3)
    z = rng.normal(0.4, 1, 12)
    many = permutation_test(z, y, replicates=4000).p
    expected = stats.permutation_test(
        (z, y), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=4000, vectorized=True, rng=rng
    ).pvalue
    assert many == pytest.approx(expected, abs=5 * math.sqrt(0.5 / 4000))


@settings(max_examples=20, deadline=None)
@given(x=st.lists(st.floats(-2, 2), min_size=4, max_size=5, unique=True), y=NUMBERS.filter(lambda v: len(v) > 3))
def test_the_interval_of_a_permutation_test_is_what_it_does_not_reject(x, y):
    found = permutation_test(x, y, level=0.9)
    width = found.high - found.low
    for shift, rejected in ((found.low - 0.01 * width, True), (found.high + 0.01 * width, True)):
        assert (permutation_test(np.array(x) - shift, y).p <= 0.1 + 1e-9) == rejected
    for shift in (found.low + 0.01 * width, found.high - 0.01 * width):
        assert permutation_test(np.array(x) - shift, y).p > 0.1 - 1e-9


@pytest.mark.parametrize(
    "trials", [pytest.param(300, id="fast"), pytest.param(5000, id="thorough", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("paired", [False, True])
def test_permutation_tests_hold_their_level(trials, paired):
    def uneven(rng):
        return rng.exponential(1, 6) + 0.7, rng.exponential(1, 6)

    def p(x, y):
        return permutation_test(x - 0.7, y, paired=paired).p

    rng = np.random.default_rng(0)
    rejected = np.mean([p(*uneven(rng)) <= 0.05 for _ in range(trials)])
    assert rejected < 0.05 + 4 * math.sqrt(0.05 / trials)
    share = covers(lambda x, y: permutation_test(x, y, paired=paired), 0.7, uneven, trials)
    assert 0.95 - 4 * math.sqrt(0.05 / trials) < share


# --- equivalence -----------------------------------------------------------------------------------------------------


def test_equivalence_against_statsmodels():
    p, _, _ = weightstats.ttost_ind(A, B, -0.3, 0.3, usevar="unequal")
    found = equivalence(A, B, margin=0.3)
    assert found.p == pytest.approx(p)
    bounds = stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.9)
    assert [found.low, found.high] == pytest.approx([bounds.low, bounds.high])
    differences = np.array([0.02, -0.01, 0.03, 0.01, 0.0])
    p, _, _ = weightstats.ttost_paired(differences, np.zeros(5), -0.05, 0.05)
    found = equivalence(differences, margin=0.05)
    assert found.p == pytest.approx(p) and found.verdict == "equivalent" and found.level == 0.9
    assert "equivalent within a margin of 0.05" in str(found)


@settings(max_examples=50, deadline=None)
@given(x=NUMBERS, margin=st.floats(0.01, 5))
def test_equivalent_is_what_both_one_sided_tests_say(x, margin):
    found = equivalence(x, margin=margin)
    if abs(found.p - 0.05) > 1e-9:
        assert (found.verdict == "equivalent") == (found.p < 0.05)
    if found.verdict == "different":
        assert abs(found.value) > margin


def test_equivalence_of_what_does_not_vary():
    assert equivalence([0.0, 0.0], margin=0.1).verdict == "equivalent"
    assert equivalence([0.0, 0.0], margin=0.1).p == 0
    assert equivalence([0.2, 0.2], margin=0.1).verdict == "different"
    assert equivalence([0.0, 1.0], margin=0.1).verdict == "undecided"


@pytest.mark.parametrize(
    "trials", [pytest.param(1000, id="fast"), pytest.param(20_000, id="thorough", marks=pytest.mark.deep)]
)
def test_equivalence_is_rarely_claimed_at_the_margin(trials):
    rng = np.random.default_rng(0)
    claimed = np.mean([equivalence(rng.normal(1, 0.3, 5), margin=1.0).verdict == "equivalent" for _ in range(trials)])
    assert abs(claimed - 0.05) < 4 * math.sqrt(0.05 / trials)


# --- effect sizes ----------------------------------------------------------------------------------------------------


def test_cohens_d_by_hand_and_by_the_noncentral_t():
    x, y = [2.0, 4.0, 6.0], [1.0, 3.0, 5.0]  # means 4 and 3, both of variance 4
    found = cohens_d(x, y)
    assert found.value == pytest.approx(0.5)
    scale = math.sqrt(9 / 6)
    assert stats.nct.sf(0.5 * scale, 4, found.low * scale) == pytest.approx(0.025, abs=1e-7)
    assert stats.nct.cdf(0.5 * scale, 4, found.high * scale) == pytest.approx(0.025, abs=1e-7)
    assert hedges_g(x, y).value == pytest.approx(0.5 * (1 - 3 / (4 * 4 - 1)), rel=0.01)  # Hedges' approximation
    assert cohens_d(y, x).value == -found.value and cohens_d(y, x).low == pytest.approx(-found.high)
    assert (found.unit, found.n, found.resampled) == ("sd", 6, "seeds")


def test_hedges_g_is_unbiased_where_d_is_not():
    rng = np.random.default_rng(0)
    pairs = [two_groups(3, 3, 1.0)(rng) for _ in range(1500)]
    d = [((x.mean() - y.mean()) / math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)) for x, y in pairs]
    ratio = hedges_g(*pairs[0]).value / d[0]
    error = 4 * np.std(d) / math.sqrt(len(d))
    assert abs(ratio * np.mean(d) - 1) < error < np.mean(d) - 1 + error


@settings(max_examples=50, deadline=None)
@given(x=NUMBERS, y=NUMBERS)
def test_cliffs_delta_is_the_mann_whitney_u(x, y):
    found = cliffs_delta(x, y)
    u = stats.mannwhitneyu(x, y).statistic
    assert found.value == pytest.approx(2 * u / (len(x) * len(y)) - 1)
    assert -1 <= found.low <= found.value <= found.high <= 1
    flipped = cliffs_delta(y, x)
    assert [flipped.low, flipped.high] == pytest.approx([-found.high, -found.low])


@pytest.mark.parametrize(
    "trials", [pytest.param(400, id="fast"), pytest.param(10_000, id="thorough", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("n, shift", [(3, 0.0), (5, 1.0), (10, 2.0)])
def test_effect_sizes_cover(trials, n, shift):
    draw = two_groups(n, n, shift)
    share = covers(cohens_d, shift, draw, trials // 2)
    assert share > 0.95 - 4 * math.sqrt(0.05 / (trials // 2))
    truth = 2 * stats.norm.cdf(shift / math.sqrt(2)) - 1
    # Cliff's interval is approximate: 92 % is what it reaches with ten a group and a large effect
    assert covers(cliffs_delta, truth, draw, trials) > 0.92 - 4 * math.sqrt(0.08 / trials)


# --- families --------------------------------------------------------------------------------------------------------


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_holm_sidak_against_statsmodels(p):
    with np.errstate(divide="ignore"):  # theirs takes the log of 0 for p = 1
        expected = multipletests(p, method="holm-sidak")[1]
    assert holm_sidak(p) == pytest.approx(expected, abs=1e-12)
    named = holm_sidak({f"test {i}": v for i, v in enumerate(p)})
    assert list(named.values()) == pytest.approx(expected, abs=1e-12) and list(named)[0] == "test 0"
    series = holm_sidak(pd.Series(p, index=[f"test {i}" for i in range(len(p))]))
    assert series.to_dict() == named


def test_holm_sidak_keeps_the_digits_of_small_p():
    assert holm_sidak([1e-20, 0.5])[0] == pytest.approx(2e-20)


def test_a_family_holds_its_error_rate():
    rng = np.random.default_rng(0)
    wrong = np.mean([holm_sidak(rng.uniform(size=10)).min() <= 0.05 for _ in range(4000)])
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 / 4000)


def test_a_family_is_a_named_table():
    tests = {"vae against beta_vae": welch(A, B), "digits": permutation_test(A, B)}
    table = family(tests, "architecture pairs x data sets, CES")
    assert list(table["test"]) == list(tests) and set(table["family"]) == {"architecture pairs x data sets, CES"}
    assert list(table["p_adjusted"]) == pytest.approx(list(holm_sidak([t.p for t in tests.values()])))
    assert list(table["significant"]) == [p <= 0.05 for p in table["p_adjusted"]]
    assert set(table["resampled"]) == {"seeds"} and all(table["method"])


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_one_more_seed_falls_into_the_prediction_interval():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        *seen, one_more = rng.normal(size=4)
        interval = prediction_interval(seen)
        hits += interval.low <= one_more <= interval.high
    assert abs(hits / 2000 - 0.95) < 4 * math.sqrt(0.05 / 2000)
    assert prediction_interval([1.0]).low == -math.inf


RUNS = pd.DataFrame(
    {
        "data": ["dsprites"] * 6 + ["digits"] * 6,
        "architecture": (["vae"] * 3 + ["beta_vae"] * 3) * 2,
        "ces": [0.10, 0.12, 0.11, 0.05, 0.04, 0.06, 0.3, 0.1, 0.2, 0.2, 0.25, 0.15],
        "mig": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.2, 0.2, 0.2],
    }
)


def test_seeds_table_against_statsmodels_power():
    table = seeds_table(RUNS, ["ces", "mig"], within="data")
    assert list(table["data"]) == ["dsprites", "dsprites", "digits", "digits"] and set(table["a"]) == {"vae"}
    row = table.iloc[0]
    assert row["difference"] == pytest.approx(0.06) and row["sd"] == pytest.approx(0.01)
    wide = seeds_table(RUNS, "ces", within="data", effect=0.05).iloc[1]
    expected = TTestIndPower().solve_power(0.05 / wide["sd"], alpha=0.05, power=0.8)
    assert wide["needed"] == math.ceil(expected)
    assert wide["needed_low"] < wide["needed"] < wide["needed_high"]
    low = wide["sd"] * math.sqrt(4 / stats.chi2.ppf(0.975, 4))
    assert wide["needed_low"] == math.ceil(TTestIndPower().solve_power(0.05 / low, alpha=0.05, power=0.8))
    assert [(r["difference"], r["low"], r["high"]) for _, r in table.iterrows()][0] == pytest.approx(
        (lambda w: (w.value, w.low, w.high))(welch(RUNS["ces"][:3], RUNS["ces"][3:6]))
    )


def test_seeds_table_says_where_there_is_nothing_to_find():
    table = seeds_table(RUNS, "mig", within=["data"]).set_index("data")
    assert table.loc["dsprites", "needed"] is pd.NA and "no difference" in table.loc["dsprites", "note"]
    assert table.loc["digits", "needed"] == 2  # no spread at all
    pooled = seeds_table(RUNS, "ces", effect=1e-9).iloc[0]
    assert pooled["needed"] is pd.NA and "1e12" in pooled["note"]
    assert seeds_needed([0.0, 1.0], 0.5) > 2  # one group still answers


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: welch([1.0], [1.0, 2.0]), "x: expected at least 2"),
        (lambda: welch([1.0, 2.0], [1.0, math.nan]), "y: .*NaN"),
        (lambda: welch([1.0, 2.0], [1.0, 2.0], level=1), "level"),
        (lambda: permutation_test([1.0], [1.0, 2.0], paired=True), "for pairs"),
        (lambda: permutation_test([1.0], [2.0], replicates=0), "replicates"),
        (lambda: equivalence([1.0, 2.0], margin=0), "margin"),
        (lambda: equivalence([1.0, 2.0], margin=math.inf), "margin"),
        (lambda: equivalence([1.0], margin=1.0), "at least 2"),
        (lambda: equivalence([1.0, 2.0], margin=1.0, alpha=0.5), "alpha"),
        (lambda: cohens_d([1.0, 1.0], [2.0, 2.0]), "vary"),
        (lambda: cliffs_delta([1.0], [2.0, 3.0]), "at least 2"),
        (lambda: holm_sidak([]), "p:"),
        (lambda: holm_sidak([0.1, 1.2]), "p:"),
        (lambda: holm_sidak([math.nan]), "p:"),
        (lambda: holm_sidak({"a": -0.1}), "p:"),
        (lambda: family({}, "none"), "p:"),
        (lambda: family({"a": 0.1}, "numbers"), "tests"),
        (lambda: family({"a": welch(A, B)}, "one", alpha=5), "alpha"),
        (lambda: prediction_interval([]), "values"),
        (lambda: seeds_table(RUNS, "dci"), "no column 'dci'"),
        (lambda: seeds_table(RUNS, "ces", by="seed"), "no column 'seed'"),
        (lambda: seeds_table(RUNS, "ces", effect=0), "effect"),
        (lambda: seeds_table(RUNS, "ces", power=1.0), "power"),
        (lambda: seeds_table(RUNS[:4], "ces"), "at least 2 seeds"),
        (lambda: seeds_table(RUNS[:3], "ces"), "2 levels"),
        (lambda: seeds_table({"ces": [1.0]}, "ces"), "DataFrame"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_tested_estimate_goes_into_a_verdict():
    found = welch([1.0, 1.1, 0.9], [0.0, 0.1, -0.1])
    assert isinstance(found, Inference) and verdict(found) == "holds"
