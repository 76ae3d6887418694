"""Findings on result tables whose truth is planted: what holds, what does not, what cannot be decided, and why."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_tables import ARCHITECTURES, DATA, METRICS, put, result_frame
from scipy import stats

from vaecirc_fast.metrics.statistics import holm_sidak
from vaecirc_fast.studies.architectures import clearing, differences, no_overall_winner
from vaecirc_fast.studies.associations import ces_dci
from vaecirc_fast.studies.claims import reference
from vaecirc_fast.studies.findings import findings
from vaecirc_fast.studies.mechanisms import capacity, isolation, vq_continuous_discrete

SMALL = {"data": DATA[:2]}


def by_id(found):
    assert len({f.id for f in found}) == len(found)
    return {f.id: f for f in found}


def related(slope, noise=0.01):
    """CES falls from architecture to architecture; DCI follows it with `slope`."""

    def change(row, rng):
        ces = 0.1 + 0.05 * ARCHITECTURES.index(row["architecture"]) + noise * rng.normal()
        put(row, "ces_posterior", ces)
        put(row, "dci_disentanglement", 0.5 + slope * ces + noise * rng.normal())

    return change


# --- CES and DCI -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "verdict"), [(-1.0, "holds"), (1.0, "does not hold"), (0.0, "undecided")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_planted_correlation_of_ces_and_dci(slope, verdict, seeds):
    noise = 0.03 if slope == 0 else 0.005
    found = by_id(ces_dci(result_frame(related(slope, noise), seeds=seeds, seed=3, **SMALL)))
    for id in ("ces_dci_within_dsprites", "ces_dci_pooled"):
        assert found[id].verdict == verdict and found[id].n == 6 and found[id].resampled == "architectures"
        assert -1 <= found[id].low <= found[id].estimate <= found[id].high <= 1
    assert found["ces_dci_within_given_reconstruction_dsprites"].verdict == verdict
    assert found["ces_dci_slope"].verdict == (verdict if slope else found["ces_dci_slope"].verdict)
    if slope:
        assert found["ces_dci_slope"].low < slope < found["ces_dci_slope"].high
        assert found["ces_dci_within_dsprites"].p <= 2 / 720 + 1e-12
    assert found["ces_dci_within_dsprites"].scope == "dsprites" and "published" in found["ces_dci_pooled"].yardstick


def test_the_correlation_is_spearmans_of_the_runs():
    table = result_frame(related(-1.0, 0.1), seed=5)
    found = by_id(ces_dci(table))
    for data in DATA:
        rows = table[table["data"] == data]
        expected = stats.spearmanr(rows["ces_posterior"], rows["dci_disentanglement"]).statistic
        assert found[f"ces_dci_within_{data}"].estimate == pytest.approx(expected, abs=1e-12)


def test_what_reconstruction_explains_is_no_association_given_it():
    def change(row, rng):
        quality = 0.05 * ARCHITECTURES.index(row["architecture"])
        for name, value in (("reconstruction", quality), ("ces_posterior", -quality), ("dci_disentanglement", quality)):
            put(row, name, 0.3 + value + 0.01 * rng.normal())

    found = by_id(ces_dci(result_frame(change, seeds=3, **SMALL)))
    assert found["ces_dci_within_dsprites"].verdict == "holds"
    assert found["ces_dci_within_given_reconstruction_dsprites"].verdict == "undecided"


def test_an_association_of_untrained_networks_is_said():
    def change(row, rng):
        related(-1.0, 0.002)(row, rng)
        put(row, "untrained_ces_posterior", row["ces_posterior"])
        put(row, "untrained_dci_disentanglement", row["dci_disentanglement"])

    found = by_id(ces_dci(result_frame(change, **SMALL)))
    assert found["ces_dci_within_untrained_dsprites"].verdict == "holds"
    assert any("untrained networks show it too" in note for note in found["ces_dci_within_dsprites"].notes)


def test_untrained_networks_that_are_one_count_once():
    def change(row, rng):
        related(-1.0)(row, rng)
        if row["architecture"] != "vq_vae":
            put(row, "untrained_ces_posterior", 0.2)
            put(row, "untrained_dci_disentanglement", 0.1)

    (found,) = [f for f in ces_dci(result_frame(change, data=DATA[:1])) if "untrained" in f.id]
    assert found.verdict == "undecided" and "at least 4 of them, there are 2" in found.notes[0]


def test_given_the_architecture_runs_of_one_are_compared():
    def change(row, rng):
        ces = 0.3 + 0.1 * rng.normal()
        put(row, "ces_posterior", ces + ARCHITECTURES.index(row["architecture"]))  # across them the sign is reversed
        put(row, "dci_disentanglement", ARCHITECTURES.index(row["architecture"]) - ces + 0.01 * rng.normal())

    found = by_id(ces_dci(result_frame(change, seeds=4, data=DATA[:1])))
    assert found["ces_dci_within_dsprites"].verdict == "does not hold"
    assert found["ces_dci_within_given_architecture_dsprites"].verdict == "holds"


def test_a_perfect_order_of_four_decides_nothing_and_of_six_is_no_point():
    few = by_id(ces_dci(result_frame(related(-1, 0), architectures=ARCHITECTURES[:4], data=DATA[:1])))
    assert few["ces_dci_within_dsprites"].estimate == -1 and few["ces_dci_within_dsprites"].verdict == "undecided"
    six = by_id(ces_dci(result_frame(related(-1, 0), data=DATA[:1])))["ces_dci_within_dsprites"]
    assert six.verdict == "holds" and six.low == -1 and -0.95 < six.high < 0


def test_architectures_count_alike_whatever_their_runs():
    table = result_frame(related(-1.0), seeds=6, data=DATA[:1])
    fewer = table[table["seed"] <= table["architecture"].map(ARCHITECTURES.index)]
    found = by_id(ces_dci(fewer))["ces_dci_within_dsprites"]
    means = fewer.groupby("architecture")[["ces_posterior", "dci_disentanglement"]].mean()
    assert found.estimate == pytest.approx(stats.spearmanr(means).statistic) and found.n == 6


# --- architectures ---------------------------------------------------------------------------------------------------


def best_on(choose, gap=0.3):
    """The architecture `choose(data set)` is ahead by `gap` in everything."""

    def change(row, rng):
        for name in METRICS:
            ahead = gap if row["architecture"] == choose(row["data"]) else 0.0
            put(row, name, 0.3 + ahead + 0.01 * rng.normal())

    return change


def test_different_winners_are_no_overall_winner():
    for found in no_overall_winner(result_frame(best_on(lambda d: ARCHITECTURES[DATA.index(d)]), seeds=3)):
        assert found.verdict == "holds" and found.p < 0.001 and 0.2 < found.low < 0.3 < found.high < 0.4
        assert found.unit == ("intensity per posterior sd" if "ces" in found.id else "")


def test_one_winner_everywhere_is_one():
    for found in no_overall_winner(result_frame(best_on(lambda d: "dip_vae_ii"), seeds=3)):
        assert found.verdict == "does not hold" and found.low < -0.29 < found.high < -0.2
        assert any("probability 1.00" in note for note in found.notes)


def test_equal_architectures_are_not_called_different_winners():
    for found in no_overall_winner(result_frame(seeds=3, seed=7)):
        assert found.verdict == "undecided" and found.low < 0 < found.high
        assert any("with probability 0.0" in note for note in found.notes)  # which alone would have misled


def test_one_seed_says_who_is_best_and_decides_nothing():
    found = by_id(no_overall_winner(result_frame(best_on(lambda d: "vae"))))["no_overall_winner_mig"]
    assert found.verdict == "undecided" and found.estimate < 0 and found.low is None
    assert "one seed an architecture" in found.notes[0] and "vae on dsprites" in found.notes[1]


def test_differences_of_architectures_are_corrected_over_their_family():
    found, families = differences(result_frame(best_on(lambda d: "vae"), seeds=4))
    found = by_id(found)
    assert found["architectures_differ_specificity_dsprites"].verdict == "holds"
    assert abs(found["architectures_differ_specificity_dsprites"].estimate) == pytest.approx(0.3, abs=0.05)
    rows = [row for row in families if row["family"].startswith("intervention specificity")]
    assert len(rows) == 15 * 5
    assert [row["p_adjusted"] for row in rows] == holm_sidak([row["p"] for row in rows]).tolist()
    equal = by_id(differences(result_frame(seeds=4, seed=11))[0])
    assert all(f.verdict == "undecided" and f.p_adjusted > 0.05 for f in equal.values())
    assert any(
        "seeds an architecture would find" in note
        for note in equal["architectures_differ_ces_posterior_dsprites"].notes
    )


def test_with_one_seed_data_sets_are_the_replicates():
    found = by_id(differences(result_frame(best_on(lambda d: "vae")))[0])
    assert set(found) == {
        f"architectures_differ_{m}_across"
        for m in ("ces_posterior", "specificity", "circuit_modularity", "dci_disentanglement")
    }
    for f in found.values():
        assert f.verdict == "holds" and f.n == 5 and f.resampled == "data sets" and f.scope == "all data sets"
        assert f.level > 0.99 and "vae" in " ".join(f.notes)


def test_runs_that_clear_their_controls_are_counted():
    def change(row, rng):
        better = row["architecture"] != "vae"
        put(row, "mig", 0.5)
        put(row, "untrained_mig", 0.1 if better else 0.49)
        put(row, "permuted_mig", 0.9)

    found = by_id(clearing(result_frame(change)))
    assert found["clears_untrained_mig"].estimate == pytest.approx(5 / 6) and found["clears_untrained_mig"].n == 6
    assert found["clears_untrained_mig"].verdict == "undecided"  # five of six: Wilson's interval begins at .44
    assert found["clears_permuted_mig"].verdict == "does not hold" and found["clears_permuted_mig"].estimate == 0
    assert "dsprites: 5 of 6 runs" in found["clears_untrained_mig"].notes[0]
    assert "clears_permuted_ces_posterior" not in found  # it has no such null


def test_what_has_no_interval_within_a_run_is_taken_by_its_value():
    table = result_frame(
        lambda row, rng: row.update(dci_disentanglement_low=None, untrained_dci_disentanglement_high=math.nan)
    )
    found = by_id(clearing(table))["clears_untrained_dci_disentanglement"]
    assert found.estimate == 1 and "30 of 30 have no interval within the run: its value is taken" in found.notes


# --- mechanisms ------------------------------------------------------------------------------------------------------


def crowded(slope):
    """beta-VAE's metrics change by `slope` a factor a latent, VAE's do not."""

    def change(row, rng):
        x = row["factors"] / row["latents"] if row["architecture"] == "beta_vae" else 0.0
        for name, sign in (("mig", -1), ("dci_disentanglement", -1), ("reconstruction", 1)):
            put(row, name, 0.6 + sign * slope * x + 0.01 * rng.normal())

    return change


AXIS = {"architectures": ("vae", "beta_vae"), "latents": (4, 6, 10, 16), "data": DATA[:2]}


@pytest.mark.parametrize(("slope", "verdict"), [(0.2, "holds"), (-0.2, "does not hold"), (0.0, "undecided")])
def test_planted_crowding_of_beta_vae(slope, verdict):
    for found in capacity(result_frame(crowded(slope), seed=1, **AXIS)):
        sign = 1 if found.id.endswith("reconstruction") else -1
        assert found.verdict == verdict and found.low < sign * slope < found.high
        assert found.n == 16 and "latents 4, 6, 10, 16 on dsprites, shapes3d_like" in found.notes


def test_crowding_without_the_runs_for_it():
    for found in capacity(result_frame()):
        assert found.verdict == "undecided" and found.notes[0].startswith("no such runs")
    alone = capacity(result_frame(crowded(0.2), **AXIS | {"architectures": ("beta_vae",)}))
    assert all("need two or more numbers of latents" in found.notes[0] for found in alone)


def test_crowded_models_that_did_not_train_are_named():
    def change(row, rng):
        crowded(0.2)(row, rng)
        row["trained"] = row["architecture"] == "vae" or row["latents"] > 4

    found = capacity(result_frame(change, **AXIS))[0]
    assert any("crowding itself may cause: beta_vae at 4, beta_vae at 4 latents" in note for note in found.notes)


def quantised(continuous, discrete):
    def change(row, rng):
        if row["architecture"] == "vq_vae":
            put(row, "ces_posterior", row["ces_posterior"] * continuous)
            put(row, "ces_code_swap", 0.3 * discrete + 0.01 * rng.normal())
            put(row, "ces_code_neighbour", 0.3 * discrete + 0.01 * rng.normal())

    return change


@pytest.mark.parametrize("design", [{}, {"data": DATA[:1], "seeds": 5}])
def test_vq_under_continuous_and_discrete_interventions(design):
    found = vq_continuous_discrete(result_frame(quantised(0.02, 1.0), **design))
    assert [f.verdict for f in found] == ["holds"] * 3
    assert found[0].p < 0.01 and "equivalent to 0 within 0.1" in found[0].notes[0] and found[0].low >= 0
    assert found[0].resampled == ("seeds" if design else "data sets") and found[0].n == 5
    found = vq_continuous_discrete(result_frame(quantised(1.0, 0.01), **design))
    assert [f.verdict for f in found] == ["does not hold"] * 3


def test_vq_that_was_not_run_or_has_no_discrete_metrics():
    found = vq_continuous_discrete(result_frame(architectures=ARCHITECTURES[:5]))
    assert all(f.verdict == "undecided" and "vq_vae was not run" in f.notes[0] for f in found)
    swap = vq_continuous_discrete(result_frame())[1]
    assert swap.verdict == "undecided" and "no CES (code swap)" in swap.notes[0]


def isolated(scale, pos_x):
    def change(row, rng):
        for factor, value in (("scale", scale), ("posX", pos_x)):
            put(row, f"isolation.{factor}", value + 0.02 * rng.normal())
        row["isolation"] = (row["isolation.scale"] + row["isolation.posX"]) / 2

    return change


def test_isolation_at_all_and_against_untrained_networks():
    found = by_id(isolation(result_frame(isolated(0.1, 0.2), **SMALL)))
    assert found["isolation_dsprites"].verdict == found["isolation_gain_dsprites"].verdict == "holds"
    assert found["isolation_gain_dsprites_scale"].estimate == pytest.approx(-0.6, abs=0.05)
    assert found["isolation_gain_dsprites_scale"].n == 6
    assert found["isolation_gain_dsprites_scale"].p_adjusted >= found["isolation_gain_dsprites_scale"].p
    found = by_id(isolation(result_frame(isolated(0.9, 0.7), seed=4, **SMALL)))
    assert found["isolation_dsprites"].verdict == "does not hold"
    assert found["isolation_gain_dsprites_scale"].verdict == "does not hold"
    assert found["isolation_gain_dsprites_posX"].verdict == "undecided"


def test_isolation_of_one_architecture_goes_by_seeds():
    found = by_id(isolation(result_frame(isolated(0.1, 0.2), seeds=3, architectures=("vae",), data=DATA[:1])))
    assert found["isolation_dsprites"].resampled == "seeds" and found["isolation_dsprites"].verdict == "holds"


# --- all of them -----------------------------------------------------------------------------------------------------


def test_runs_that_are_not_trained_take_part_in_nothing():
    plain = result_frame(related(-1.0), seeds=2, architectures=ARCHITECTURES[-4:], **SMALL)
    wild = plain[plain["seed"] == 1].copy()
    wild[list(METRICS)] *= 100.0
    both = pd.concat([plain, wild.assign(trained=False, run="wild")], ignore_index=True)

    def bare(found):
        return {f.id: (f.estimate, f.low, f.high, f.verdict) for f in found}

    assert bare(findings(both)) == bare(findings(plain))


def test_the_main_design_is_the_most_frequent_one():
    table = result_frame(**AXIS | {"latents": (10,)})
    off = result_frame(**AXIS | {"latents": (4,), "data": DATA[:1]})
    stronger = table[table["architecture"] == "beta_vae"].head(1).assign(options='{"beta": 16}')
    kept = reference(pd.concat([table, off, stronger], ignore_index=True))
    assert set(kept["run"]) == set(table["run"]) and set(kept["options"]) == {"{}"}


EMPTY = pd.DataFrame({"run": [], "data": [], "architecture": [], "trained": pd.Series([], dtype=bool)})
ONE = result_frame(data=DATA[:1], architectures=("vae",))
LACKING = {
    "no column": pd.DataFrame(),
    "no run": EMPTY,
    "one run": ONE,
    "nothing trained": result_frame(**SMALL).assign(trained=False),
    "one data set": result_frame(data=DATA[:1]),
    "one architecture": result_frame(architectures=("vae",), seeds=2),
    "no metric": result_frame(**SMALL).drop(columns=[c for c in result_frame() if c.startswith(METRICS)]),
    "all alike": result_frame(noise=0.0, seeds=2, **SMALL),
}


def valid(found):
    """What holds of every finding: JSON values, no NaN, an interval around its estimate, a reason if undecided."""
    by_id(found)
    json.dumps([f.plain() for f in found], allow_nan=False)
    for f in found:
        assert f.claim and f.quantity and f.scope and "nan" not in " ".join(f.notes).lower().split()
        if f.low is not None and f.high is not None:
            assert f.estimate is not None and f.low - 1e-9 <= f.estimate <= f.high + 1e-9
            assert f.n > 0 and f.resampled
        else:
            assert f.verdict == "undecided" and f.notes
        for p in (f.p, f.p_adjusted):
            assert p is None or 0 <= p <= 1


@pytest.mark.parametrize("name", LACKING)
def test_what_a_table_lacks_leaves_claims_undecided_with_the_reason(name):
    found = findings(LACKING[name])
    valid(found)
    if name in ("no column", "no run", "one run", "nothing trained", "all alike", "no metric"):
        decided = [f.id for f in found if f.verdict != "undecided"]
        assert not [id for id in decided if not id.startswith(("clears", "isolation"))]
    if name in ("no column", "no run", "nothing trained"):
        assert all(f.verdict == "undecided" and f.estimate is None for f in found)


@settings(max_examples=4)
@given(st.integers(0, 10_000), st.floats(0, 0.9), st.integers(1, 2), st.integers(1, 6), st.integers(1, 2))
def test_any_table_has_honest_findings(seed, missing, data, architectures, seeds):
    rng = np.random.default_rng(seed)
    table = result_frame(seed=seed, data=DATA[:data], architectures=ARCHITECTURES[-architectures:], seeds=seeds)
    numbers = [c for c in table if table[c].dtype == float]
    holes = rng.random((len(table), len(numbers))) < missing * rng.random(len(numbers))
    table[numbers] = table[numbers].mask(holes)
    table["trained"] = rng.random(len(table)) < 0.8
    table = table[rng.random(len(table)) < 0.9].drop(columns=rng.choice(numbers, rng.integers(0, 4), replace=False))
    valid(findings(table))


@pytest.mark.deep
@settings(max_examples=150)
@given(st.data())
def test_many_tables_have_honest_findings(data):
    test_any_table_has_honest_findings.hypothesis.inner_test(
        data.draw(st.integers(0, 10**6)), *(data.draw(s) for s in (st.floats(0, 1), *[st.integers(1, 5)] * 3))
    )


@pytest.mark.deep
def test_intervals_cover_what_was_planted():
    """90 tables: each kind of interval holds its truth about as often as it says; verdicts are seldom wrong."""
    hits = {"gain": 0, "winner": 0, "capacity": 0, "slope": 0, "vq": 0, "correlation": 0}
    wrong = 0
    rounds = 90
    for seed in range(rounds):
        gap = by_id(isolation(result_frame(isolated(0.5, 0.5), seed=seed, noise=0.05, data=DATA[:1])))
        hits["gain"] += gap["isolation_gain_dsprites"].low <= -0.2 <= gap["isolation_gain_dsprites"].high
        table = result_frame(best_on(lambda d: ARCHITECTURES[DATA.index(d)], 0.05), seed=seed, seeds=3, data=DATA[:3])
        winner = no_overall_winner(table)[0]
        hits["winner"] += winner.low <= 0.05 <= winner.high
        crowd = capacity(result_frame(crowded(0.1), seed=seed, **AXIS))[0]
        hits["capacity"] += crowd.low <= -0.1 <= crowd.high
        none = by_id(ces_dci(result_frame(seed=seed, data=DATA[:2])))
        hits["slope"] += none["ces_dci_slope"].low <= 0 <= none["ces_dci_slope"].high
        hits["correlation"] += none["ces_dci_within_dsprites"].low <= 0 <= none["ces_dci_within_dsprites"].high
        ratio = vq_continuous_discrete(result_frame(quantised(0.5, 1), seed=seed))[0]
        hits["vq"] += ratio.low <= 0.5 <= ratio.high
        wrong += sum(f.verdict != "undecided" for f in differences(result_frame(seed=seed, seeds=3, data=DATA[:2]))[0])
    least = stats.binom.ppf(0.001, rounds, 0.95)
    assert {name: count for name, count in hits.items() if count < least} == {}
    assert wrong <= 4 * rounds * 0.05 * 2
