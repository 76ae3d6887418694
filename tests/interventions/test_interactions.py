"""Pairs of latents moved together: planted circuits exactly, a plain loop by the definition, what is decoded."""

import itertools
import math

import numpy as np
import pytest
import torch
from close import assert_close
from interventions.live_memory import LiveMemory
from torch import nn

from vaecirc_fast import groups as partitions
from vaecirc_fast import planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Interactions, engine, latent_interactions, latent_sweep
from vaecirc_fast.metrics.statistics import poisson_weights, resampled_interval

CIRCUITS = {circuit.name: circuit for circuit in planted.all()}
EFFECTS = ("l1", "mse", "rms", "tv", "signed")
ALONE = ("linear_block", "linear_random", "linear_dead", "relu_kink", "conv_quadrants", "conv_relu")


def pairs_of(latents):
    return list(itertools.combinations(range(latents), 2))


def of(circuit, **options):
    return latent_interactions(
        circuit.decoder, circuit.z, **{"groups": circuit.groups, "effect": circuit.effect, **options}
    )


# --- planted circuits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_planted_circuits_come_out(name, dtype):
    circuit = CIRCUITS[name].to(dtype)
    pairs = pairs_of(circuit.z.shape[1])
    for grid, effect in (("fixed", None), ("posterior", "mse"), ("posterior", "rms"), ("posterior", "signed")):
        truth = circuit.interactions(pairs, grid, effect)
        largest = float(circuit.decoder(circuit.z).detach().abs().max()) + np.abs(truth).max() + 1
        limit = 256 * torch.finfo(dtype).eps * largest
        I = of(circuit, grid=grid, scale=circuit.scale, effect=effect or circuit.effect)
        assert I.pairs == tuple(pairs) and I.tensor.shape == truth.shape and I.tensor.dtype == dtype
        assert np.abs(I.tensor.double().numpy() - truth).max() < limit
        assert np.abs(I.singles.double().numpy() - circuit.effects(grid, effect)).max() < limit


@pytest.mark.parametrize("name", ALONE)
def test_latents_that_act_alone_do_not_interact(name):
    """Exactly, where steps and weights are multiples of powers of two."""
    circuit = CIRCUITS[name]
    I = of(circuit, grid=torch.tensor([-2.0, -0.5, 1.0, 4.0]))
    assert not I.tensor[:, 2].any() and torch.equal(I.tensor[:, 0], I.tensor[:, 1]) and I.tensor[:, 0].any()
    assert (I.table()[["interaction", "share", "low", "high"]] == 0).all(axis=None)


def test_the_product_in_one_formula():
    """Moving by d and e adds W d e: the interaction in every sample is the mean of |W| |d e|, whatever the code."""
    circuit = CIRCUITS["product"]
    shifts = torch.tensor([[0.5, -2.0], [4.0, 1.0], [1.0, 1.0]])
    weight = circuit.decoder.fc.weight.detach()[:, 0].abs().double()
    I = of(circuit, grid=shifts)
    for g in range(3):
        mean = float(weight[circuit.groups.labels == g].mean())
        assert I.tensor[0, 2, :, g].tolist() == [0.5 * 4 * mean, 2 * 1 * mean]
    assert not I.tensor[1:, 2].any()


def test_the_planted_closed_forms_are_those_of_the_networks():
    for circuit in planted.all():
        z = circuit.z.numpy()
        for i, j in pairs_of(z.shape[1]):
            first, second = np.array([[0.5, -2.0, 3.0]]), np.array([[1.0, 4.0, -0.25]])
            shape = (len(z), 3)
            first, second = np.broadcast_to(first, shape), np.broadcast_to(second, shape)

            def run(*moves, circuit=circuit, shape=shape):
                code = circuit.z[:, None].repeat(1, 3, 1)
                for latent, shift in moves:
                    code[..., latent] += torch.from_numpy(shift.copy())
                with torch.no_grad():
                    return circuit.decoder(code.flatten(0, 1)).reshape(*shape, -1).numpy()

            expected = run((i, first), (j, second)) - run((i, first)) - run((j, second)) + run()
            planted_form = 0 * expected if circuit.interaction is None else circuit.interaction(z, i, j, first, second)
            assert np.abs(planted_form - expected).max() < 1e-12 * (1 + np.abs(run()).max()) * 16, circuit.name


# --- the definition, written out, on networks ------------------------------------------------------------------------

L = 4
LABELS = [0, 1, 0, 2, 2, 1, -1, 0, 1, 0]


def network(dtype=torch.float64):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(L, 12), nn.Tanh(), nn.Linear(12, 10), nn.Sigmoid())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return net.to(dtype)


def codes(samples=5, dtype=torch.float64):
    return torch.randn(samples, L, generator=torch.Generator().manual_seed(6)).to(dtype)


def by_definition(net, z, shifts, effect, labels=LABELS):
    """(N, pair, measure, S, G) and singles (N, L, S, G): a call for each."""

    def run(code):
        with torch.no_grad():
            return net(code[None])[0]

    def reduced(dy):
        rows = []
        for g in range(max(labels) + 1):
            m = torch.stack([d for d, label in zip(dy, labels, strict=True) if label == g])
            value = {"l1": m.abs().mean(), "mse": m.square().mean(), "signed": m.mean(), "tv": m.abs().sum() / 2}
            rows.append(m.square().mean().sqrt() if effect == "rms" else value[effect])
        return torch.stack(rows)

    together, single = [], []
    for code in z:
        base = run(code)

        def moved(*latents, s, code=code):
            new = code.clone()
            for i in latents:
                new[i] += shifts[i][s]
            return run(new)

        for i, j in pairs_of(z.shape[1]):
            for s in range(len(shifts[0])):
                y_i, y_j, y = moved(i, s=s), moved(j, s=s), moved(i, j, s=s)
                sums = (y - base, (y_i - base) + (y_j - base), y - y_i - y_j + base)
                together.append(torch.stack([reduced(dy) for dy in sums]))
        single += [reduced(moved(i, s=s) - base) for i in range(z.shape[1]) for s in range(len(shifts[0]))]
    shape = (len(z), len(pairs_of(z.shape[1])), len(shifts[0]), 3, -1)
    return torch.stack(together).view(shape).transpose(2, 3), torch.stack(single).view(
        len(z), z.shape[1], len(shifts[0]), -1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("tile", [1, 6, None])
def test_measures_are_those_of_a_loop(effect, dtype, tile):
    shifts = torch.tensor([[-1.0, 0.5], [2.0, 0.25], [0.75, -2.0], [1.5, 1.0]])
    net, z = network(dtype), codes(dtype=dtype)
    groups = partitions.from_labels(LABELS)
    I = latent_interactions(net, z, grid=shifts, effect=effect, groups=groups, tile=tile)
    reference, single = by_definition(net, z, shifts, effect)
    truth, true_single = by_definition(network(), codes(), shifts, effect)
    unit = torch.full_like(truth.mean(0), 12.0)  # four outputs below 1, of two or three elements a group
    assert truth.abs().amax((0, 1, 3, 4)).min() > 1e-2
    assert_close(I.tensor, reference.mean(0), truth.mean(0), terms=40, unit=unit)
    assert_close(I.singles, single.mean(0), true_single.mean(0), terms=40, unit=unit[0, 0].expand(L, -1, -1))
    expected = I.tensor[:, 2] / I.tensor[:, 0]
    assert torch.equal(I.share, expected) and bool(I.share.isfinite().all())


def test_singles_are_those_of_the_latent_sweep():
    net, z, groups = network(), codes(9), partitions.from_labels(LABELS)
    for options in (
        {"grid": "posterior", "scale": torch.ones(L)},
        {"grid": "resample", "seed": 3},
        {"grid": "traverse"},
    ):
        I = latent_interactions(net, z, groups=groups, **options)
        E = latent_sweep(net, z, groups=groups, **options)
        assert torch.allclose(I.singles, E.tensor, rtol=1e-12) and I.coords["step"] == E.coords["step"]
        diagonal = np.diag(I.second_order())
        assert diagonal == pytest.approx((E.tensor.mean(1) @ E.group_weights).numpy(), rel=1e-12)


def test_resampling_moves_both_latents_to_one_donor():
    z = torch.arange(10.0)[:, None] * torch.tensor([1.0, 100.0])
    rows = []

    def decoder(code):
        rows.append(code.clone())
        return code

    latent_interactions(decoder, z, grid="resample", seed=1)
    pairs = torch.cat(rows[1:])
    donors = {(float(a), float(b)) for a, b in pairs if b == 100 * a}
    assert donors == {(float(k), 100.0 * k) for k in range(10)}  # the bases, and pairs from one donor each
    assert sum(b == 100 * a for a, b in pairs.tolist()) == 10 + 10 * 4


def test_sixteen_bits_are_added_in_float32():
    """y_i + y_j - y_0 of a linear decoder that bfloat16 holds exactly, though not the sum."""
    weight = torch.tensor([[256.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)

    def decoder(z):
        return (z.float() @ weight).sum(1, keepdim=True).to(torch.bfloat16)

    I = latent_interactions(decoder, z, grid=torch.tensor([1.0]), effect="signed")
    base, y_i, y_j, y = 256.0, 512.0, 258.0, 512.0  # 257 rounds to 256, 513 to 512
    assert I.tensor.flatten().tolist() == [y - base, y_i + y_j - 2 * base, y - y_i - y_j + base]
    assert I.tensor.dtype == torch.float32


# --- statistics ------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Whole numbers, so that no order of additions can show."""

    def forward(self, z):
        return torch.stack([z[:, 0] * z[:, 1], z[:, 1] * z[:, 2], (z[:, 0] + z[:, 2]).relu(), z[:, 2]], 1)


def whole_codes(samples):
    return torch.randint(-4, 5, (samples, 3), generator=torch.Generator().manual_seed(7)).double()


POWERS = torch.tensor([-2.0, 1.0, 4.0, -1.0])
TWO = partitions.from_labels([0, 1, 1, 0])


def whole_truth(z):
    """(N, pair, measure, S, G) exactly."""
    return by_definition(Whole(), z, POWERS.double().expand(3, -1), "l1", [0, 1, 1, 0])[0]


@pytest.mark.parametrize("samples", [5, 32])
def test_no_tile_size_changes_a_bit(samples):
    z = whole_codes(samples)
    whole = latent_interactions(Whole(), z, grid=POWERS, groups=TWO, tile=10**6)
    assert torch.equal(whole.tensor, whole_truth(z).mean(0))
    for tile in (1, 2, 3, 7, 50, None):
        I = latent_interactions(Whole(), z, grid=POWERS, groups=TWO, tile=tile)
        assert torch.equal(I.tensor, whole.tensor) and torch.equal(I.replicates, whole.replicates)
        assert torch.equal(I.singles, whole.singles)


def test_replicates_and_the_table_by_their_definition():
    z = whole_codes(32)
    every = whole_truth(z).mean(3)  # over steps: (N, pair, measure, G)
    I = latent_interactions(Whole(), z, grid=POWERS, groups=TWO, replicates=60, seed=4)
    weights = poisson_weights(60, 32, 4).double()
    drawn = torch.einsum("rn,npmg->rpmg", weights, every) / weights.sum(1)[:, None, None, None]
    assert torch.equal(I.replicates, drawn)
    for by_group in (False, True):
        table = I.table(by_group=by_group)
        assert table["interaction"].abs().is_monotonic_decreasing and len(table) == 3 * (2 if by_group else 1)
        for row in table.itertuples():
            p = pairs_of(3).index((row.first, row.second))
            share = torch.tensor([0.5, 0.5]) if not by_group else torch.eye(2)[int(row.group[-1])]
            joint, additive, interaction = (every.mean(0)[p] @ share.double()).tolist()
            assert (row.joint, row.additive, row.interaction) == (joint, additive, interaction)
            r_joint, _, r_interaction = (drawn[:, p] @ share.double()).T
            assert (row.low, row.high) == resampled_interval(interaction, r_interaction.numpy(), 32)
            assert row.share == interaction / joint
            assert (row.share_low, row.share_high) == resampled_interval(
                interaction / joint, (r_interaction / r_joint).numpy(), 32
            )
            assert row.low <= row.interaction <= row.high and row.share_low <= row.share <= row.share_high
        assert (table["share_low"] < table["share_high"]).any()


def test_few_samples_have_jackknife_intervals_and_none_without_replicates():
    z = whole_codes(5)
    I = latent_interactions(Whole(), z, grid=POWERS)
    assert I.replicates.shape == (5, 3, 3, 1)
    rest = latent_interactions(Whole(), z[1:], grid=POWERS)
    assert torch.equal(I.replicates[0], rest.tensor.mean(2))
    table = latent_interactions(Whole(), whole_codes(9), grid=POWERS, replicates=0).table()
    assert (
        table[["low", "high", "share_low", "share_high"]].isna().all(axis=None) and table["interaction"].notna().all()
    )


def test_second_order_is_symmetric_with_single_effects_on_the_diagonal():
    z = whole_codes(12)
    I = latent_interactions(Whole(), z, grid=POWERS, groups=TWO)
    table = I.second_order()
    assert list(table.index) == list(table.columns) == [0, 1, 2]
    assert np.array_equal(table, table.T) and not table.isna().any(axis=None)
    for row in I.table().itertuples():
        assert table.loc[row.first, row.second] == row.interaction
    some = latent_interactions(Whole(), z, grid=POWERS, groups=TWO, pairs=[(2, 0)])
    assert some.pairs == ((2, 0),) and some.latents == (0, 2)
    assert torch.equal(some.tensor[0], I.tensor[1]) and torch.equal(some.singles, I.singles[[0, 2]])
    assert list(some.second_order().index) == [0, 2]
    two = latent_interactions(Whole(), z, grid=POWERS, groups=TWO, pairs=((0, 1), (1, 2))).second_order()
    assert math.isnan(two.loc[0, 2]) and math.isnan(two.loc[2, 0]) and two.isna().sum(axis=None) == 2


def test_to_dataframe_labels_every_entry():
    I = latent_interactions(Whole(), whole_codes(9), grid=POWERS, groups=TWO)
    table = I.to_dataframe()
    assert isinstance(I, Interactions) and I.dims == ("pair", "measure", "step", "group")
    assert [len(I.coords[dim]) for dim in I.dims] == list(I.tensor.shape)
    assert list(table.columns) == ["first", "second", "step", "group", "joint", "additive", "interaction", "share"]
    assert len(table) == 3 * 4 * 2 and not table.duplicated(["first", "second", "step", "group"]).any()
    for row in table.itertuples():
        at = (pairs_of(3).index((row.first, row.second)), POWERS.tolist().index(row.step), int(row.group[-1]))
        assert [row.joint, row.additive, row.interaction] == I.tensor[at[0], :, at[1], at[2]].tolist()
        assert row.share == float(I.share[at]) or math.isnan(row.share) and row.joint == 0


# --- what is decoded -------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A decoder that keeps every batch it was given."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.batches = decoder, []

    def forward(self, z):
        self.batches.append(z.clone())
        return self.decoder(z)


@pytest.mark.parametrize("tile", [1, 5, 40, None])
def test_each_latent_is_decoded_once_for_all_its_pairs(tile):
    decoder, z = Recorder(network()), codes(7)
    I = latent_interactions(decoder, z, tile=tile)
    rows = torch.cat(decoder.batches[1:])
    assert len(rows) == 7 * (1 + 10 * (L + 6)) and f"{len(rows)} decodes" in I.plan
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert f"{7 * 10 * L} of them of one latent" in I.plan
    changed = (rows[:, None] != z).sum(-1).min(1).values.tolist()
    assert [changed.count(k) for k in (0, 1, 2)] == [7, 7 * 10 * L, 7 * 10 * 6]
    assert tile is None or max(len(batch) for batch in decoder.batches) <= tile


def test_a_step_of_zero_leaves_the_other_latent_alone():
    shifts = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    decoder, z = Recorder(network()), codes(4)
    I = latent_interactions(decoder, z, grid=shifts)
    moved = shifts != 0
    both = sum(int((moved[i] & moved[j]).sum()) for i, j in I.pairs)
    assert sum(map(len, decoder.batches[1:])) == 4 * (1 + int(moved.sum()) + both)
    for n, (i, j) in enumerate(I.pairs):
        for s in range(3):
            if not (moved[i, s] and moved[j, s]):
                other = I.singles[i, s] + I.singles[j, s]
                assert torch.equal(I.tensor[n, :, s], torch.stack([other, other, 0 * other]))
    assert not I.tensor[0, :, 2].any() and bool(I.share[0, 2].isnan().all())


def test_memory_does_not_grow_with_samples(monkeypatch):
    monkeypatch.setitem(engine.TILE_BYTES, "cpu", 1 << 17)
    decoder = nn.Sequential(nn.Linear(L, 32), nn.ReLU(), nn.Linear(32, 64))
    peaks = []
    for samples in (64, 1024):
        z = torch.randn(samples, L)
        with LiveMemory() as memory:
            latent_interactions(decoder, z, grid=torch.tensor([1.0, 2.0]), replicates=10)
        peaks.append(memory.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_hooks_and_layout_are_left_alone():
    net = nn.Sequential(nn.Linear(L, 4 * 9), nn.Unflatten(1, (4, 3, 3)), nn.ConvTranspose2d(4, 2, 3)).double()
    strides = net[2].weight.stride()
    rows = []
    net[2].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    latent_interactions(net, codes(3), grid=torch.tensor([1.0]))
    assert sum(rows) == 1 + 3 * (1 + L + 6) and net[2].weight.stride() == strides


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effect": "logit_mse"}, "effect: latent_interactions knows l1, mse, rms, tv, signed, not 'logit_mse'"),
        ({"effect": "l2"}, "effect: .* not 'l2'"),
        ({"pairs": []}, "pairs: expected at least one, none twice, got none"),
        ({"pairs": [(0, 1), (1, 0)]}, r"pairs: .* got \(1, 0\) again"),
        ({"pairs": [(0, 4)]}, r"pairs: expected two different latents of 0..3, got \(0, 4\)"),
        ({"pairs": [(-1, 2)]}, r"got \(-1, 2\)"),
        ({"pairs": [(2, 2)]}, r"got \(2, 2\)"),
        ({"pairs": [(0, 1, 2)]}, r"pairs: expected a sequence of pairs \(i, j\)"),
        ({"pairs": [3]}, r"pairs: expected a sequence of pairs \(i, j\)"),
        ({"pairs": 3}, r"pairs: expected a sequence of pairs \(i, j\)"),
        ({"grid": "line"}, "grid: 'line' is unknown"),
        ({"grid": "posterior"}, "scale: "),
        ({"on": "logits"}, "on: the decoder has no method `logits`"),
        ({"groups": partitions.spans([3])}, "groups: partition 3 elements, but the decoder's output has 10"),
        ({"tile": 0}, "tile: expected an integer of at least 1"),
        ({"replicates": -1}, "replicates: "),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        latent_interactions(network(), codes(), **options)


def test_bad_codes_and_one_latent():
    with pytest.raises(InputError, match="z: contains NaN"):
        latent_interactions(network(), torch.full((3, L), torch.nan))
    with pytest.raises(InputError, match="z: pairs need at least 2 latents, got 1"):
        latent_interactions(lambda z: z, torch.ones(3, 1))


def test_outputs_that_are_not_finite_name_the_pair():
    def decoder(z):
        return torch.where((z[:, 1:2] > 2.5) & (z[:, 2:3] > 2.5), torch.nan, z)

    with pytest.raises(InputError, match="NaN or infinite for latents 1 and 2 at step 9 of the grid 'fixed'"):
        latent_interactions(decoder, torch.zeros(4, 3))
