"""The accumulator alone: means, replicates and kept effects by definition, whatever the slices and their order."""

import pytest
import torch

from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import accumulate
from vaecirc_fast.interventions.accumulate import Accumulator, Axes
from vaecirc_fast.metrics.statistics import resampling_weights

# Step sizes, their numbers and those of a group's elements are powers of two: exact to divide by.
GROUPS = partitions.from_labels([0, 1, 0, 1, -1, 0, 1, 0, 1])
SIZES = torch.tensor([[2.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 4.0]])
ORDERS = {
    "at once": [slice(0, 16)],
    "one by one": [slice(n, n + 1) for n in range(16)],
    "backwards": [slice(n, n + 4) for n in (12, 8, 4, 0)],
    "uneven": [slice(5, 6), slice(9, 16), slice(0, 5), slice(6, 9)],
}


def axes(step_size=SIZES, decoded=None):
    decoded = (SIZES > 0) if decoded is None else decoded
    return Axes("own", "latent", "step", [4, 7, 9], torch.arange(4.0), decoded, step_size)


def accumulator(ax, samples=16, dtype=torch.float64, **options):
    options = {"effect": "l1", "reduce": "mean", "replicates": 30, "seed": 5} | options
    return Accumulator(ax, samples, GROUPS, dtype=dtype, device=torch.device("cpu"), **options)


def whole_effects(samples=16, count=6):
    """Whole numbers: sums of them are exact in any order."""
    return torch.randint(0, 9, (samples, count, 2), generator=torch.Generator().manual_seed(0)).double()


def spread(effects, decoded):
    full = torch.zeros(len(effects), *decoded.shape, 2, dtype=effects.dtype)
    full[:, decoded] = effects
    return full


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_means_and_replicates_by_their_definition(order, block, monkeypatch):
    monkeypatch.setattr(accumulate, "_BLOCK_BYTES", block)
    every = torch.ones(3, 4, dtype=torch.bool)
    for ax, decoded in ((axes(), SIZES > 0), (axes(None, every), every)):
        effects = whole_effects(count=int(decoded.sum()))
        total = accumulator(ax)
        for part in ORDERS[order]:
            total.add(part, effects[part])
        E, full = total.result("done"), spread(effects, decoded)
        assert torch.equal(E.tensor, full.mean(0)) and E.tensor.dtype == torch.float64
        weights = resampling_weights(30, 16, 5).double()
        normalised = torch.zeros(16, 3, 2, dtype=torch.float64)
        for i in range(3):
            used = [s for s in range(4) if decoded[i, s]]
            for s in used:
                normalised[:, i] += full[:, i, s] / (float(SIZES[i, s]) if ax.step_size is not None else 1) / len(used)
        by_group = torch.einsum("rn,nig->rig", weights, normalised) / weights.sum(1)[:, None, None]
        assert torch.equal(E.replicates, by_group)
        share = torch.tensor([0.5, 0.5], dtype=torch.float64)
        by_step = torch.einsum("rn,nis->ris", weights, full @ share) / weights.sum(1)[:, None, None]
        assert torch.equal(E.step_replicates, by_step)
        assert E.coords == {"latent": [4, 7, 9], "step": [0, 1, 2, 3], "group": ["group 0", "group 1"]}
        assert E.plan == "done" and E.samples == 16


@pytest.mark.parametrize("order", ORDERS)
def test_kept_effects_are_those_given(order):
    effects = whole_effects().float()
    kept = accumulator(axes(), reduce=None, dtype=torch.bfloat16)
    for part in ORDERS[order]:
        kept.add(part, effects[part])
    E = kept.result("")
    assert torch.equal(E.tensor, spread(effects, SIZES > 0)) and E.dims == ("sample", "latent", "step", "group")
    assert E.replicates is None and E.coords["sample"] == list(range(16))


def test_few_samples_are_left_out_one_at_a_time():
    effects = whole_effects(5)
    total = accumulator(axes(), samples=5)
    for n in (2, 0, 4, 3, 1):
        total.add(slice(n, n + 1), effects[n : n + 1])
    E = total.result("")
    for n in range(5):
        rest = accumulator(axes(), samples=4)
        rest.add(slice(0, 4), effects[torch.arange(5) != n])
        assert torch.equal(E.replicates[n], rest.result("").step_normalised())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_what_is_not_finite_is_named(value, reduce):
    effects = whole_effects()
    effects[3, 3, 1] = value
    total = accumulator(axes(), reduce=reduce)
    total.add(slice(4, 8), effects[4:8])
    with pytest.raises(InputError, match="NaN or infinite for latent 9 at step 1 of the grid 'own'"):
        total.add(slice(0, 4), effects[:4])
    effects[3, 4, 0] = -value
    with pytest.raises(InputError, match="latent 9 at step 1"):
        total.add(slice(0, 4), effects[:4])


def test_large_numbers_whose_sum_overflows_are_fine():
    effects = torch.full((16, 6, 2), 3e38)
    total = accumulator(axes(), dtype=torch.float32)
    total.add(slice(0, 16), effects)
    assert torch.equal(total.result("").tensor, spread(effects, SIZES > 0)[0])


def test_groups_weigh_by_their_size_and_spans_of_tv_equally():
    for effect, weights in (("l1", [0.25, 0.75]), ("tv", [0.5, 0.5])):
        options = dict(effect=effect, reduce="mean", replicates=5, seed=0, dtype=torch.float32)
        made = Accumulator(axes(), 3, partitions.spans([2, 6]), device=torch.device("cpu"), **options)
        assert made.weights.tolist() == weights
