"""CES and specificity: closed forms, an independent computation from the definition, and intervals that cover."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import ces, model_ces, model_specificity, specificity
from vaecirc_fast.metrics.causal import REPLICATES, STRENGTHS, specificity_of, step_normalised


def kept(effects, step_size=None, weights=None, effect="l1", grid="fixed"):
    """What the metrics read of a sweep that keeps its samples: effects (N, L, S, G)."""
    effects = torch.as_tensor(effects)
    groups = effects.shape[-1]
    weights = torch.full((groups,), 1 / groups, dtype=torch.float64) if weights is None else torch.as_tensor(weights)
    step_size = None if step_size is None else torch.as_tensor(step_size)
    return SimpleNamespace(
        effect=effect,
        grid=grid,
        samples=len(effects),
        dims=("sample", "latent", "step", "group"),
        coords={"latent": list(range(effects.shape[1]))},
        group_weights=weights,
        replicates=None,
        step_normalised=lambda: step_normalised(effects, step_size),
    )


def streamed(effects, replicates, samples, weights):
    """The same of one that keeps means only: effects (L, S, G) and replicates (R, L, G)."""
    return SimpleNamespace(
        effect="l1",
        grid="posterior",
        samples=samples,
        dims=("latent", "step", "group"),
        coords={"latent": list(range(len(effects)))},
        group_weights=torch.as_tensor(weights),
        replicates=torch.as_tensor(replicates),
        step_normalised=lambda: step_normalised(torch.as_tensor(effects), None),
    )


def draw(samples=30, latents=4, steps=5, groups=3, seed=0):
    generator = np.random.default_rng(seed)
    effects = generator.gamma(2.0, 1.0, (samples, latents, steps, groups))
    sizes = generator.choice([0.0, 0.5, 1.0, 2.0], (latents, steps))
    sizes[:, 0] = 1.5  # at least one step
    return effects * (sizes > 0)[None, :, :, None], sizes, generator


# --- the step-normalised effect --------------------------------------------------------------------------------------


def test_steps_are_divided_and_averaged_without_those_of_size_zero():
    effects = torch.tensor([[[6.0], [100.0], [8.0], [9.0]], [[1.0], [2.0], [4.0], [0.0]]])
    sizes = torch.tensor([[2.0, 0.0, 4.0, 0.0], [1.0, 1.0, 2.0, 8.0]])  # both (latent 2, step 4), one group
    assert step_normalised(effects, sizes).tolist() == [[(6 / 2 + 8 / 4) / 2], [(1 + 2 + 4 / 2) / 4]]
    assert step_normalised(effects, None).tolist() == [[123 / 4], [7 / 4]]
    assert step_normalised(effects[None], sizes).shape == (1, 2, 1)
    assert step_normalised(torch.zeros(2, 3, 1), torch.zeros(2, 3)).tolist() == [[0.0], [0.0]]


def by_definition(effects, sizes):
    """Mean over samples and steps of effect / |step|: (L, G), a loop over every entry."""
    samples, latents, steps, groups = effects.shape
    rows = np.zeros((latents, groups))
    for i in range(latents):
        used = [s for s in range(steps) if sizes[i, s] != 0]
        for g in range(groups):
            rows[i, g] = np.mean([effects[n, i, s, g] / abs(sizes[i, s]) for n in range(samples) for s in used])
    return rows


# --- against the definition ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16))
def test_ces_by_its_definition(seed):
    effects, sizes, generator = draw(samples=12, seed=seed)
    weights = generator.dirichlet([1.0] * 3)
    table = ces(kept(effects, sizes, weights))
    rows = by_definition(effects, sizes)
    assert table["latent"].to_list() == [0, 1, 2, 3] and list(table.columns) == ["latent", "ces", "low", "high"]
    assert table["ces"].to_numpy() == pytest.approx(rows @ weights, rel=1e-12)
    undivided = ces(kept(effects, None, weights, grid="resample"))["ces"].to_numpy()
    assert undivided == pytest.approx(effects.mean((0, 2)) @ weights, rel=1e-12)


@given(st.integers(0, 2**16))
def test_specificity_by_its_definition(seed):
    effects, sizes, _ = draw(samples=12, seed=seed)
    effects[:, 1, :, 2] = 0  # 0 log 0 = 0
    rows = by_definition(effects, sizes)
    expected = []
    for row in rows:
        p = [e / sum(row) for e in row]
        expected.append(1 - sum(-q * math.log(q) for q in p if q > 0) / math.log(3))
    table = specificity(kept(effects, sizes))
    assert list(table.columns) == ["latent", "specificity", "low", "high"]
    assert table["specificity"].to_numpy() == pytest.approx(expected, rel=1e-10)


def test_a_model_is_the_mean_over_its_latents():
    effects, sizes, _ = draw()
    effects[:, 2] = 0
    E = kept(effects, sizes)
    total, drawn = model_ces(E)
    assert total.value == pytest.approx(ces(E)["ces"].mean())  # all latents, the dead one too
    assert (total.n, total.resampled, total.level) == (30, "images", 0.95) and drawn.shape == (REPLICATES,)
    mean, drawn = model_specificity(E)
    assert mean.value == pytest.approx(specificity(E)["specificity"].dropna().mean())  # those with an effect
    assert total.low < total.value < total.high and mean.low < mean.high and drawn.shape == (REPLICATES,)


# --- closed forms ----------------------------------------------------------------------------------------------------


def of_rows(*rows):
    """Ten samples alike, with these effects on the groups."""
    effects = torch.tensor(rows, dtype=torch.float64)[None, :, None].repeat(10, 1, 2, 1)
    return kept(effects, torch.ones(len(rows), 2))


@pytest.mark.parametrize("groups", [2, 3, 64])
def test_specificity_of_one_group_is_one_and_of_equal_ones_zero(groups):
    one, equal = [0.0] * groups, [0.7] * groups
    one[1] = 3.0
    table = specificity(of_rows(one, equal))
    assert table["specificity"][0] == 1 and table["specificity"][1] == pytest.approx(0, abs=1e-14)
    assert table["specificity"].between(0, 1).all()


def test_specificity_of_half_the_groups():
    """Equal effects on m of G groups: 1 - log m / log G."""
    for m in range(1, 9):
        row = [0.25] * m + [0.0] * (8 - m)
        assert specificity(of_rows(row))["specificity"][0] == pytest.approx(1 - math.log(m) / math.log(8), abs=1e-14)


def test_specificity_knows_no_scale_and_no_order():
    row = [0.5, 2.0, 0.0, 1.0]
    table = specificity(of_rows(row, [1e-30 * e for e in row], [1e30 * e for e in row], row[::-1]))["specificity"]
    assert table.to_numpy() == pytest.approx([table[0]] * 4, rel=1e-13) and 0 < table[0] < 1


def test_a_latent_without_effect_has_no_specificity():
    table = specificity(of_rows([1.0, 2.0], [0.0, 0.0])).set_index("latent")
    assert table.loc[1].isna().all() and table.loc[0].notna().all()
    assert specificity_of(torch.zeros(3, 4)).isnan().all()
    value, drawn = model_specificity(of_rows([0.0, 0.0]))
    assert math.isnan(value.value) and math.isnan(value.low) and drawn.isnan().all()
    strength = ces(of_rows([1.0, 2.0], [0.0, 0.0]))
    assert strength.loc[1, ["ces", "low", "high"]].to_list() == [0, 0, 0]


def test_groups_count_by_their_weights():
    effects = torch.tensor([1.0, 10.0]).expand(9, 1, 1, 2)
    assert ces(kept(effects, torch.ones(1, 1), [0.75, 0.25]))["ces"][0] == 3.25


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 5, 7, 8, 30])
def test_intervals_contain_the_value(samples):
    effects, sizes, _ = draw(samples=samples)
    E = kept(effects, sizes)
    table = ces(E)
    assert (table["low"] < table["ces"]).all() and (table["ces"] < table["high"]).all()
    table = specificity(E)
    assert (table["low"] < table["specificity"]).all() and (table["specificity"] < table["high"]).all()
    strength, wider = ces(E), ces(E, level=0.99)
    assert (wider["high"] - wider["low"] > strength["high"] - strength["low"]).all()
    assert wider["ces"].equals(strength["ces"])


def test_few_samples_take_the_t_interval():
    """Below 8 samples the jackknife's interval of a mean is Student's, exactly."""
    from scipy import stats

    effects, sizes, _ = draw(samples=5)
    table = ces(kept(effects, sizes))
    for i in range(4):
        values = [by_definition(effects[n : n + 1], sizes)[i].mean() for n in range(5)]
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert table.loc[i, ["low", "high"]].to_list() == pytest.approx([low, high], rel=1e-9)


def test_one_sample_bounds_nothing():
    effects, sizes, _ = draw(samples=1)
    assert ces(kept(effects, sizes))[["low", "high"]].to_numpy().tolist() == [[-math.inf, math.inf]] * 4
    assert model_ces(kept(effects, sizes))[0].low == -math.inf


def test_streamed_replicates_are_used_as_they_are():
    """The interval is read off them: percentiles of each latent's, groups weighted."""
    effects = np.array([[[1.0, 3.0]], [[5.0, 7.0]]])
    replicates = np.arange(400.0).reshape(100, 2, 2)
    E = streamed(effects, replicates, 50, [0.25, 0.75])
    table = ces(E, level=0.9)
    assert table["ces"].to_list() == [2.5, 6.5]
    for i in range(2):
        drawn = replicates[:, i] @ [0.25, 0.75]
        assert table.loc[i, ["low", "high"]].to_list() == pytest.approx(
            list(np.quantile(drawn, [0.05, 0.95], method="weibull"))
        )
    _, drawn = model_ces(E)
    assert drawn.tolist() == pytest.approx((replicates @ [0.25, 0.75]).mean(1).tolist())


def test_intervals_cover():
    """2,000 data sets of 100 samples of exponential effects: the 95 % interval holds the truth 91 to 97 times in 100.

    200 replicates of a skewed mean are a little narrow; an interval of a wrong width or place falls far outside.
    """
    generator = np.random.default_rng(0)
    effects = generator.exponential(1.0, (100, 2000, 2, 2))  # latents as data sets
    sizes = np.array([1.0, 2.0])[None].repeat(2000, 0)
    table = ces(kept(effects, sizes))
    truth = (1 + 1 / 2) / 2
    covered = ((table["low"] < truth) & (truth < table["high"])).mean()
    assert 0.91 <= covered <= 0.97
    narrow = ces(kept(effects, sizes), level=0.5)
    assert 0.43 <= ((narrow["low"] < truth) & (truth < narrow["high"])).mean() <= 0.57


def test_intervals_of_a_biased_statistic_contain_it():
    """Of 64 groups over 8 samples: each resample alone looks more specific than all samples do."""
    effects, sizes, _ = draw(samples=8, groups=64)
    E = kept(effects, sizes)
    raw = specificity_of(E.step_normalised()[[0, 0, 1, 2, 3, 4, 4, 5]].mean(0))
    table = specificity(E)
    assert (raw.numpy() > table["specificity"]).all()
    assert (table["low"] < table["specificity"]).all() and (table["specificity"] < table["high"]).all()
    value, drawn = model_specificity(E)
    assert value.low < value.value < value.high and float(drawn.mean()) == pytest.approx(value.value, rel=1e-9)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", ["mse", "logit_mse", "signed"])
@pytest.mark.parametrize("metric", [ces, specificity, model_ces, model_specificity])
def test_effects_that_are_no_strengths_are_refused(metric, effect):
    effects, sizes, _ = draw()
    with pytest.raises(InputError, match=f"is defined for the effects l1, rms, tv, not for '{effect}'"):
        metric(kept(effects, sizes, effect=effect))
    for allowed in STRENGTHS:
        metric(kept(effects, sizes, effect=allowed))


@pytest.mark.parametrize("metric", [ces, specificity, model_ces, model_specificity])
def test_a_traversal_is_refused(metric):
    effects, _, _ = draw()
    with pytest.raises(InputError, match="the grid 'traverse' has no step size"):
        metric(kept(effects, None, grid="traverse"))


@pytest.mark.parametrize("metric", [specificity, model_specificity])
def test_specificity_of_one_group_is_refused(metric):
    effects, sizes, _ = draw(groups=1)
    with pytest.raises(InputError, match="needs at least two groups, got 1"):
        metric(kept(effects, sizes))
