"""Input manipulation: pairs, masks and redrawn columns change what they name alone; effects are those defined."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vaecirc_fast.data import load
from vaecirc_fast.data.dataset import Dataset
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import factor_pairs, input_effects, mask_region, noise_region, redraw_columns


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- factor_pairs ----------------------------------------------------------------------------------------------------


class Blocks(Dataset):
    """4 x 4 images of one channel: each quadrant's grey value is one factor, so an image shows its factors."""

    name = "blocks"
    shape = (1, 4, 4)
    factor_names = ("a", "fixed", "b", "c")
    factor_sizes = (2, 1, 3, 5)

    def _render(self, indices):
        v = self.factors(indices).float()
        quadrants = torch.stack([v[:, 0], v[:, 2], v[:, 3], 0 * v[:, 1]], 1).view(-1, 1, 2, 2)
        return quadrants.repeat_interleave(2, 2).repeat_interleave(2, 3) / 8


def factors_seen(x):
    """The factors a, b, c that Blocks' images show."""
    return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 2], x[:, 0, 2, 0]], 1) * 8


def test_pairs_differ_in_the_named_factor_alone():
    base, variants = factor_pairs(Blocks(), 500, seeded())
    assert base.shape == (500, 1, 4, 4) and list(variants) == ["a", "b", "c"]
    v = factors_seen(base)
    for k, (name, x) in enumerate(variants.items()):
        changed = factors_seen(x) != v
        assert changed[:, k].all(), name  # never equal
        assert not changed[:, [j for j in range(3) if j != k]].any(), name
        assert not (x[:, :, 2:, 2:]).any()


def test_every_other_value_is_drawn_alike():
    base, variants = factor_pairs(Blocks(), 6000, seeded())
    before, after = factors_seen(base)[:, 2].long(), factors_seen(variants["c"])[:, 2].long()
    pairs = torch.bincount(before * 5 + after, minlength=25).view(5, 5)
    assert not pairs.diag().any()
    off = pairs[~torch.eye(5, dtype=torch.bool)].double()  # 20 cells of 300 expected
    assert float(((off - 300) ** 2 / 300).sum()) < 52  # the .9999 quantile of chi-square with 19 degrees of freedom


def test_pairs_of_a_real_data_set_are_its_images_with_another_value():
    data = load("dsprites")
    base, variants = factor_pairs(data, 12, seeded(3))
    _, v = data.sample(12, seeded(3))
    assert torch.equal(base, data.images(data.index_of(v)))
    assert list(variants) == ["shape", "scale", "orientation", "posX", "posY"]  # colour has one value
    for name, x in variants.items():
        k = data.factor_names.index(name)
        for n in range(12):
            others = v[n].repeat(data.factor_sizes[k] - 1, 1)
            others[:, k] = torch.tensor([value for value in range(data.factor_sizes[k]) if value != v[n, k]])
            assert (data.images(data.index_of(others)) == x[n]).flatten(1).all(1).any(), (name, n)


def test_pairs_repeat_with_the_generator():
    base, variants = factor_pairs(Blocks(), 50, seeded(1))
    again, same = factor_pairs(Blocks(), 50, seeded(1))
    assert torch.equal(base, again) and all(torch.equal(variants[name], same[name]) for name in variants)
    other, differing = factor_pairs(Blocks(), 50, seeded(2))
    assert not torch.equal(base, other) and not torch.equal(variants["c"], differing["c"])


def test_chosen_factors_in_the_order_given():
    _, variants = factor_pairs(Blocks(), 5, seeded(), factors=["c", "a"])
    assert list(variants) == ["c", "a"]


@pytest.mark.parametrize(
    "data, options, match",
    [
        ("blocks", dict(factors=["fixed"]), "'fixed' has one value"),
        ("blocks", dict(factors=["a", "hue"]), "'hue' is unknown; blocks has a, fixed, b, c"),
        ("digits", {}, "factor_pairs: the factors of 'digits' do not determine the image"),
        ("blocks", dict(n=0), "n: expected at least 1"),
    ],
)
def test_bad_factors_are_refused(data, options, match):
    with pytest.raises(InputError, match=match):
        factor_pairs(Blocks() if data == "blocks" else load(data), **{"n": 4} | options)


# --- regions ---------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = slice(1, 4), slice(2, 7)


def images():
    return torch.rand(6, 3, 5, 8, generator=seeded())


def inside(x):
    region = torch.zeros(x.shape, dtype=torch.bool)
    region[:, :, ROWS, COLUMNS] = True
    return region


def test_a_mask_changes_the_region_alone():
    x = images()
    before = x.clone()
    y = mask_region(x, ROWS, COLUMNS)
    assert torch.equal(x, before) and (y[inside(x)] == 0).all() and torch.equal(y[~inside(x)], x[~inside(x)])
    for half in (0.5, torch.tensor(0.5)):
        assert (mask_region(x, ROWS, COLUMNS, half)[inside(x)] == 0.5).all()


def test_a_mask_takes_the_values_of_an_image():
    x = images()
    mean = x.double().mean(0)  # of another dtype, as a mean often is
    y = mask_region(x, ROWS, COLUMNS, mean)
    assert y.dtype == x.dtype
    for n in range(len(x)):
        assert torch.equal(y[n, :, ROWS, COLUMNS], mean[:, ROWS, COLUMNS].float())
    assert torch.equal(y[~inside(x)], x[~inside(x)])


def test_noise_changes_the_region_alone():
    x = torch.full((400, 1, 6, 6), 0.5)
    y = noise_region(x, slice(0, 6), slice(3, 6), 0.1, seeded())
    assert torch.equal(y[..., :3], x[..., :3]) and (y[..., 3:] != x[..., 3:]).all() and (x == 0.5).all()
    noise = (y - x)[..., 3:]
    assert abs(float(noise.mean())) < 4 * 0.1 / math.sqrt(noise.numel())
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    # independent from image to image and from pixel to pixel
    correlation = torch.corrcoef(noise.flatten(1).T)
    assert (correlation - torch.eye(18)).abs().max() < 0.25
    assert torch.equal(y, noise_region(x, slice(0, 6), slice(3, 6), 0.1, seeded()))
    assert not torch.equal(y, noise_region(x, slice(0, 6), slice(3, 6), 0.1, seeded(1)))


def test_noise_stays_within_bounds():
    x = images()
    y = noise_region(x, ROWS, COLUMNS, 50.0, seeded())
    assert y.min() == 0 and y.max() == 1
    assert torch.equal(y[~inside(x)], x[~inside(x)])


NOWHERE = dict(rows=slice(5, 9), columns=COLUMNS)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda x: mask_region(x[0], ROWS, COLUMNS), r"x: expected floating images \(N, C, H, W\), got"),
        (lambda x: mask_region((255 * x).byte(), ROWS, COLUMNS), "x: expected floating images .* got torch.uint8"),
        (lambda x: noise_region((255 * x).byte(), ROWS, COLUMNS, 0.1), "x: expected floating images"),
        (lambda x: mask_region(x, **NOWHERE), "hold no pixel of a 5 x 8 image"),
        (lambda x: noise_region(x, **NOWHERE, sd=0.1), "hold no pixel"),
        (lambda x: mask_region(x, ROWS, slice(4, 4)), "hold no pixel"),
        (lambda x: mask_region(x, ROWS, COLUMNS, torch.zeros(3)), r"value: expected a number or an image \(3, 5, 8\)"),
        (lambda x: mask_region(x, ROWS, COLUMNS, torch.zeros(3, 3, 5)), "value: expected"),
        (lambda x: noise_region(x, ROWS, COLUMNS, 0.0), "sd: expected a positive number"),
        (lambda x: noise_region(x, ROWS, COLUMNS, -1.0), "sd: expected a positive number"),
        (lambda x: noise_region(x, ROWS, COLUMNS, math.nan), "sd: expected a positive number"),
    ],
)
def test_bad_regions_are_refused(call, match):
    with pytest.raises(InputError, match=match):
        call(images())


# --- redraw_columns --------------------------------------------------------------------------------------------------


def numbered(n=60, width=4):
    """A table whose every value says its row and column: row + column / 8."""
    return torch.arange(n).double()[:, None] + torch.arange(width).double() / 8


@pytest.mark.parametrize("how", ["marginal", "neighbour"])
def test_a_group_is_taken_jointly_from_another_row(how):
    table = numbered()
    before = table.clone()
    changed = redraw_columns(table, [1, 3], how, seeded())
    assert torch.equal(table, before) and torch.equal(changed[:, [0, 2]], table[:, [0, 2]])
    donors = changed.floor()
    assert torch.equal(donors[:, 1], donors[:, 3])  # one row gives both
    assert torch.equal(changed[:, 1] - donors[:, 1], torch.full((60,), 1 / 8).double())  # each its own column
    assert (donors[:, 1] != torch.arange(60)).all()  # and never the row itself


@settings(max_examples=20)
@given(n=st.integers(2, 30), seed=st.integers(0, 2**16))
def test_marginal_keeps_the_column_and_gives_nobody_its_own(n, seed):
    table = numbered(n)
    changed = redraw_columns(table, [2], "marginal", seeded(seed))
    assert torch.equal(changed[:, 2].sort().values, table[:, 2])
    assert (changed[:, 2] != table[:, 2]).all()


def test_marginal_donors_are_all_alike():
    """Over many draws each of 5 rows receives from each of the 4 others equally often."""
    g = seeded()
    donors = torch.stack([redraw_columns(numbered(5), [0], "marginal", g)[:, 0] for _ in range(1000)]).long()
    counts = torch.stack([(donors == d).sum(0) for d in range(5)])  # (donor, receiver)
    off = counts[~torch.eye(5, dtype=torch.bool)].double()
    assert not counts.diag().any() and float(((off - 250) ** 2 / 250).sum()) < 60


def planted_clusters():
    """Ten rows in each of three places of columns 0 and 1; column 1 is in a unit a thousand times as fine.

    Column 2 says the row. In the raw unit column 1 alone would decide who is near.
    """
    g = seeded()
    places = torch.tensor([[0.0, 0], [50, 0], [0, 50]]).repeat_interleave(10, 0)
    near = places + torch.rand(30, 2, generator=g)
    return torch.cat([near * torch.tensor([1.0, 1000.0]), torch.arange(30.0)[:, None]], 1)


def test_neighbours_are_near_in_the_remaining_columns():
    table = planted_clusters()
    g = seeded()
    donors = torch.stack([redraw_columns(table, [2], "neighbour", g, neighbours=3)[:, 2] for _ in range(60)]).long()
    scaled = (table[:, :2] / table[:, :2].std(0)).double()
    distance = torch.cdist(scaled, scaled)
    distance.fill_diagonal_(math.inf)
    nearest = distance.argsort(1)[:, :3]
    for row in range(30):
        assert set(donors[:, row].tolist()) == set(nearest[row].tolist())  # each of the three in 60 draws, no other
    assert (donors // 10 == torch.arange(30) // 10).all()


def test_each_column_counts_in_its_own_sd():
    """Without the division, row 0 would be nearest to row 1; in sd of each column, to row 2."""
    table = torch.tensor([[0.0, 0.0, 0], [1.0, 30.0, 1], [10.0, 0.0, 2], [-50.0, 40.0, 3], [60.0, -40.0, 4]])
    table[:, 1] /= 1000
    assert redraw_columns(table, [2], "neighbour", seeded(), neighbours=1)[0, 2] == 2


def test_more_neighbours_than_rows_are_all_of_them():
    g = seeded()
    donors = torch.stack([redraw_columns(numbered(4), [0], "neighbour", g, neighbours=10)[:, 0] for _ in range(60)])
    for row in range(4):
        assert set(donors[:, row].tolist()) == set(range(4)) - {row}


def test_rows_that_agree_are_neighbours_too():
    """A constant column is no reason for NaN, and a twin counts as another row."""
    table = torch.tensor([[1.0, 7, 0], [1, 7, 1], [1, 7, 2], [1, 7, 3]])
    changed = redraw_columns(table, [2], "neighbour", seeded(), neighbours=3)
    assert (changed[:, 2] != table[:, 2]).all() and torch.isfinite(changed).all()


@pytest.mark.parametrize("how", ["marginal", "neighbour"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_redrawing_repeats_with_the_generator(how, dtype):
    table = numbered().to(dtype)
    once, again, other = (redraw_columns(table, [0], how, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other) and once.dtype == dtype


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda t: redraw_columns(t[:, 0], [0]), "table: expected floats"),
        (lambda t: redraw_columns(t[:1], [0]), "table: expected floats of shape"),
        (lambda t: redraw_columns(t.long(), [0]), "table: expected floats .* torch.int64"),
        (lambda t: redraw_columns(t, []), r"columns: expected some of 0\.\.3, got \[\]"),
        (lambda t: redraw_columns(t, [4]), "columns: expected some of"),
        (lambda t: redraw_columns(t, [-1]), "columns: expected some of"),
        (lambda t: redraw_columns(t, [0], "gaussian"), "how: expected 'marginal' or 'neighbour', got 'gaussian'"),
        (lambda t: redraw_columns(t, range(4), "neighbour"), "columns: .*outside the group"),
        (lambda t: redraw_columns(t, [0], "neighbour", neighbours=0), "neighbours: expected at least 1"),
        (lambda t: redraw_columns(t / 0, [0], "neighbour"), "table: .*finite numbers"),
    ],
)
def test_bad_tables_are_refused(call, match):
    with pytest.raises(InputError, match=match):
        call(numbered())


def test_a_whole_row_can_be_redrawn_from_its_marginal():
    changed = redraw_columns(numbered(), [0, 1, 2, 3], generator=seeded())
    assert torch.equal(changed - changed.floor(), numbered() - numbered().floor())


# --- input_effects ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small encoder with everything that an eval mode matters to, and a ReLU that overwrites what it is given."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 4 * 3, 5)
        self.unused = nn.Linear(2, 2)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.fc(self.drop(self.act(self.norm(self.conv(x)))).flatten(1))


def problem(n=30, dtype=torch.float32, variants=2):
    g = seeded(7)
    base = torch.randn(n, 2, 6, 5, generator=g, dtype=dtype)
    changed = {
        f"v{k}": base + (k + 1) * torch.randn(n, 2, 6, 5, generator=g, dtype=dtype) * (k < 2) for k in range(variants)
    }
    return Encoder().to(dtype), base, changed


def naive(module, base, variants, sites, unit="channel"):
    """Effects by the definition in numpy, the whole data at once; the module must be in eval mode."""
    modules, seen = dict(module.named_modules()), {}
    handles = [
        modules[s].register_forward_hook(lambda m, a, out, s=s: seen.update({s: out.double().numpy().copy()}))
        for s in sites
    ]
    runs = []
    with torch.no_grad():
        for x in [base, *variants.values()]:
            module(x)
            runs.append(dict(seen))
    for handle in handles:
        handle.remove()
    result = []
    for run in runs[1:]:
        row = []
        for s in sites:
            a, b = runs[0][s], run[s]
            shape = (len(a), a.shape[1], -1) if unit == "channel" else (len(a), a[0].size, 1)
            a, b = a.reshape(shape), b.reshape(shape)
            row.extend(np.abs(b - a).mean(2).mean(0) / a.std((0, 2)))
        result.append(row)
    return np.array(result)


SITES = ["conv", "norm", "act", "drop", "fc"]


@pytest.mark.parametrize("unit", ["channel", "element"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_effects_are_those_of_the_definition(unit, dtype, rtol):
    module, base, variants = problem(dtype=dtype)
    found = input_effects(module, base, variants, SITES, unit=unit, replicates=0)
    truth = naive(module.eval(), base, variants, SITES, unit)
    assert found.tensor.shape == truth.shape and found.tensor.dtype == dtype and found.replicates is None
    np.testing.assert_allclose(found.tensor.numpy(), truth, rtol=rtol)
    sizes = [3, 3, 3, 3, 5] if unit == "channel" else [36, 36, 36, 36, 5]
    assert found.sites == tuple(s for s, size in zip(SITES, sizes, strict=True) for _ in range(size))
    assert found.units == tuple(u for size in sizes for u in range(size))
    assert found.variants == ("v0", "v1") and found.samples == 30


@pytest.mark.parametrize("n", [5, 30])
def test_batches_do_not_matter(n):
    module, base, variants = problem(n, torch.float64)
    whole = input_effects(module, base, variants, SITES, batch_size=n, replicates=50)
    for size in (1, 7, 1000):
        parts = input_effects(module, base, variants, SITES, batch_size=size, replicates=50)
        torch.testing.assert_close(parts.tensor, whole.tensor, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.replicates, whole.replicates, rtol=1e-12, atol=0)


def test_three_axes_are_channels_of_positions():
    """(N, T, D): the first axis after the batch is the unit, the rest its positions."""
    module = nn.Sequential(nn.Linear(4, 3))
    base = torch.randn(9, 6, 4, generator=seeded())
    variants = {"v": base.flip(2)}
    for unit, size in (("channel", 6), ("element", 18)):
        found = input_effects(module, base, variants, ["0"], unit=unit, replicates=0).tensor
        assert found.shape == (1, size)
        np.testing.assert_allclose(found.numpy(), naive(module, base, variants, ["0"], unit), rtol=2e-5)


def test_a_site_without_a_unit_axis_is_one_unit():
    module = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    base = torch.randn(9, 4, generator=seeded())
    found = input_effects(module, base, {"v": base.roll(1, 0)}, ["0", "1"], replicates=0)
    assert found.tensor.shape == (1, 2) and found.tensor[0, 0] == found.tensor[0, 1] > 0


@settings(max_examples=15)
@given(
    factors=st.lists(st.floats(1e-3, 1e3).flatmap(lambda a: st.sampled_from([a, -a])), min_size=5, max_size=5),
    shift=st.floats(-1e3, 1e3),
)
def test_the_unit_of_an_activation_does_not_matter(factors, shift):
    """A unit multiplied by any number and shifted by another has the effects that it had."""
    module, base, variants = problem(dtype=torch.float64)
    expected = input_effects(module, base, variants, ["fc"], replicates=8)
    scale = torch.tensor(factors, dtype=torch.float64)
    with torch.no_grad():
        module.fc.weight *= scale[:, None]
        module.fc.bias *= scale
        module.fc.bias += shift
    found = input_effects(module, base, variants, ["fc"], replicates=8)
    # the activations themselves round at eps |shift|, in sd of a unit that may be scaled by a thousandth
    rtol = 1e-11 * (1 + abs(shift) / min(abs(f) for f in factors))
    torch.testing.assert_close(found.tensor, expected.tensor, rtol=rtol, atol=0)
    torch.testing.assert_close(found.replicates, expected.replicates, rtol=rtol, atol=0)


def test_a_large_mean_does_not_cancel():
    """A unit of mean 2^27 and sd about 1 in float64: its sums of squares would leave no digit of the variance."""
    base = torch.arange(16.0, dtype=torch.float64)[:, None] / 4
    variants = {"v": base + 0.5}
    module = nn.Sequential(nn.Linear(1, 1).double())
    results = []
    for mean in (0.0, 2.0**27):
        module[0].load_state_dict({"weight": torch.ones(1, 1), "bias": torch.tensor([mean])})
        results.append(float(input_effects(module, base, variants, ["0"], replicates=0).tensor))
    assert results[0] == pytest.approx(0.5 / float(base.std(unbiased=False)), rel=1e-14)
    assert results[1] == pytest.approx(results[0], rel=1e-12)


class Gate(nn.Module):
    """Units of x (N, 1): constant .1, max(x - 10, 0), and x."""

    def __init__(self):
        super().__init__()
        self.out = nn.Identity()

    def forward(self, x):
        return self.out(torch.cat([torch.full_like(x, 0.1), (x - 10).relu(), x], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_unit_that_does_not_vary_has_no_sd(dtype):
    """It is 0 where nothing moves it, however its constant rounds, and NaN where something does: never a silent 0."""
    base = torch.linspace(0, 9, 20, dtype=dtype)[:, None]
    still = input_effects(Gate(), base, {"a": base + 0.5, "b": base}, ["out"])
    assert still.tensor[:, :2].tolist() == [[0, 0], [0, 0]] and still.tensor[0, 2] > 0 == still.tensor[1, 2]
    assert not still.replicates[:, :, :2].any() and still.replicates.isfinite().all()
    awake = input_effects(Gate(), base, {"a": base + 5, "b": base}, ["out"])
    assert awake.tensor[:, 0].tolist() == [0, 0] and awake.tensor[:, 1].isnan().all() and awake.tensor[0, 2] > 0
    assert awake.replicates[..., 1].isnan().all() and awake.replicates[..., [0, 2]].isfinite().all()
    table = awake.to_dataframe()
    assert table[table["unit"] == 1][["effect", "low", "high"]].isna().all(axis=None)


def test_rounding_of_a_constant_is_no_variation():
    """Activations that differ in their last bit only."""
    base = torch.tensor([[1.0], [1 + torch.finfo(torch.float32).eps]] * 8)
    found = input_effects(nn.Sequential(nn.Identity()), base, {"v": base.flip(0)}, ["0"], replicates=0)
    assert float(found.tensor) == 0


# --- what it leaves behind -------------------------------------------------------------------------------------------


def state(module):
    return {
        "modes": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "values": {k: v.clone() for k, v in module.state_dict().items()},
    }


def same(a, b):
    return (
        a["modes"] == b["modes"]
        and a["hooks"] == b["hooks"]
        and all(torch.equal(v, b["values"][k]) for k, v in a["values"].items())
    )


def test_modes_hooks_and_buffers_are_restored():
    module, base, variants = problem()
    module.train()
    module.norm.eval()
    module.conv.register_forward_hook(lambda *_: None)
    before = state(module)
    in_train = input_effects(module, base, variants, SITES, replicates=0)
    assert same(before, state(module)) and before["modes"].count(False) == 1
    in_eval = input_effects(module.eval(), base, variants, SITES, replicates=0)
    assert torch.equal(in_train.tensor, in_eval.tensor) and not any(m.training for m in module.modules())
    assert not in_train.tensor.requires_grad and all(p.grad is None for p in module.parameters())


class Failing(Encoder):
    """Fails from its `after`-th call on."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def forward(self, x):
        y = super().forward(x)
        if self.left == 0:
            raise RuntimeError("out of memory, say")
        self.left -= 1
        return y


@pytest.mark.parametrize("after", [0, 2])
def test_they_are_restored_after_an_exception(after):
    _, base, variants = problem()
    module = Failing(after).train()
    before = state(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        input_effects(module, base, variants, SITES, batch_size=8)
    assert same(before, state(module))
    with pytest.raises(InputError, match="'unused' is not reached"):
        input_effects(Encoder().train(), base, variants, ["unused"])


def test_inputs_are_left_alone():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    base = torch.randn(10, 3, generator=seeded()).abs()
    variants = {"v": base + 1}
    before = base.clone()
    input_effects(module, base, variants, ["1"], replicates=0)
    assert torch.equal(base, before) and torch.equal(variants["v"], before + 1)


def test_a_site_is_read_before_a_later_module_overwrites_it():
    module, base, variants = problem()
    module.eval()
    found = input_effects(module, base, variants, ["norm", "act"], replicates=0).tensor
    np.testing.assert_allclose(found[:, :3], naive(module, base, variants, ["norm"]), rtol=2e-5)
    assert not torch.allclose(found[:, :3], found[:, 3:])


# --- sites -----------------------------------------------------------------------------------------------------------


def test_patterns_name_sites_once_in_the_order_asked_for():
    module, base, variants = problem()
    nested = nn.Sequential(module, nn.Identity())
    found = input_effects(nested, base, variants, ["0.fc", "0.[cn]o*", "*.fc", "1"], replicates=0)
    assert tuple(dict.fromkeys(found.sites)) == ("0.fc", "0.conv", "0.norm", "1")
    assert len(found.sites) == 5 + 3 + 3 + 5
    direct = input_effects(module, base, variants, ["fc", "conv", "norm"], replicates=0).tensor
    assert torch.equal(found.tensor, torch.cat([direct, direct[:, :5]], 1))


def test_a_container_is_a_site():
    module, base, variants = problem()
    nested = nn.Sequential(nn.Sequential(module), nn.ReLU())
    assert torch.equal(
        input_effects(nested, base, variants, ["0"], replicates=0).tensor,
        input_effects(module, base, variants, ["fc"], replicates=0).tensor,
    )


def test_of_a_module_that_runs_twice_the_last_output_counts():
    shared = nn.Tanh()
    module = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 4), shared)
    base = torch.randn(10, 3, generator=seeded())
    found = input_effects(module, base, {"v": base.roll(1, 0)}, ["1"], replicates=0)
    assert found.tensor.shape == (1, 4)


def test_a_site_must_be_reached_each_time():
    """A branch that only some batches take: what an earlier batch left there does not stand in."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.positive = nn.Identity()

        def forward(self, x):
            return self.positive(x) if x.sum() > 0 else x

    base = torch.ones(8, 2)
    with pytest.raises(InputError, match="'positive' is not reached"):
        input_effects(Branching(), base, {"v": -base}, ["positive"])


class Odd(nn.Module):
    """Outputs of every kind that is no site."""

    def __init__(self):
        super().__init__()
        self.pair = nn.LSTM(4, 3, batch_first=True)
        self.whole, self.number, self.folded, self.empty, self.broken, self.fine = (nn.Identity() for _ in range(6))

    def forward(self, x):
        self.pair(x)
        self.whole((x > 0).long())
        self.number(x.mean())
        self.folded(x.flatten(0, 1))
        self.empty(x[:, :0])
        self.broken(torch.where(x > 2, torch.nan, x))
        return self.fine(x)


@pytest.mark.parametrize(
    "site, match",
    [
        ("pair", "sites: 'pair' gives tuple, expected a tensor"),
        ("whole", r"sites: 'whole' gives torch.int64 \(16, 2, 4\), expected floats"),
        ("number", r"sites: 'number' gives shape \(\) for 16 inputs"),
        ("folded", r"sites: 'folded' gives shape \(32, 4\) for 16 inputs"),
        ("empty", r"sites: 'empty' gives torch.float32 \(16, 0, 4\)"),
        ("broken", "sites: 'broken' gives NaN or infinity"),
        ("nowhere", "sites: nothing matches 'nowhere'; the module has pair, whole"),
    ],
)
def test_an_unfit_site_is_named(site, match):
    base = torch.randn(16, 2, 4, generator=seeded())
    with pytest.raises(InputError, match=match):
        input_effects(Odd(), base, {"v": base + 1}, ["fine", site])


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["base", "variant"])
def test_nan_in_the_last_batch_is_noticed(spoil, where):
    module, base, variants = problem()
    (base if where == "base" else variants["v1"])[-1, 0, 0, 0] = spoil
    with pytest.raises(InputError, match="sites: 'conv' gives NaN or infinity"):
        input_effects(module, base, variants, ["conv", "fc"], batch_size=8)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(unit="neuron"), "unit: expected 'channel' or 'element', got 'neuron'"),
        (dict(variants={}), "variants: expected at least one"),
        (dict(sites=[]), "sites: expected at least one"),
        (dict(base=torch.zeros(1, 2, 6, 5)), "base: expected at least 2 inputs"),
        (dict(base=torch.zeros(9)), "base: expected at least 2 inputs"),
        (dict(variants={"short": torch.zeros(29, 2, 6, 5)}), r"variants: 'short' is torch.float32 \(29, 2, 6, 5\)"),
        (dict(variants={"fine": torch.zeros(30, 2, 6, 5).double()}), "variants: 'fine' is torch.float64"),
        (dict(batch_size=0), "batch_size: expected at least 1, got 0"),
        (dict(batch_size=-3), "batch_size: expected at least 1, got -3"),
    ],
)
def test_bad_input_is_refused(change, match):
    module, base, variants = problem()
    with pytest.raises(InputError, match=match):
        input_effects(module, **dict(base=base, variants=variants, sites=["fc"]) | change)


# --- intervals -------------------------------------------------------------------------------------------------------


def widths(table):
    return (table["high"] - table["low"]).to_numpy()


@pytest.mark.parametrize("n", [2, 5, 8, 60])
def test_intervals_contain_the_value(n):
    module, base, variants = problem(n, variants=3)
    table = input_effects(module, base, variants, ["conv", "fc"]).to_dataframe()
    assert list(table.columns) == ["variant", "site", "unit", "effect", "low", "high"] and len(table) == 3 * 8
    assert (table["low"] <= table["effect"]).all() and (table["effect"] <= table["high"]).all()
    moved = table["variant"] != "v2"
    assert (widths(table)[moved] > 0).all() and (table[~moved][["effect", "low", "high"]] == 0).all(axis=None)


def test_intervals_shrink_with_the_number_of_pairs():
    module, base, variants = problem(480, variants=2)
    few = input_effects(module, base[:30], {k: x[:30] for k, x in variants.items()}, ["fc"])
    many = input_effects(module, base, variants, ["fc"])
    ratio = widths(few.to_dataframe()) / widths(many.to_dataframe())
    assert 2.5 < np.median(ratio) < 6  # sqrt(16) = 4
    assert (widths(many.to_dataframe()) < widths(many.to_dataframe(level=0.99))).all()


def test_the_interval_is_that_of_the_mean_over_pairs():
    """Effects of a linear unit are known pair by pair; the replicates must be their Poisson bootstrap, in base sd."""
    from vaecirc_fast.metrics.statistics import resampled_interval, resampling_weights

    base = torch.randn(40, 1, generator=seeded(), dtype=torch.float64)
    step = torch.rand(40, 1, generator=seeded(1), dtype=torch.float64)
    found = input_effects(nn.Sequential(nn.Identity()), base, {"v": base + step}, ["0"], seed=5, batch_size=16)
    weights = resampling_weights(len(found.replicates), 40, seed=5).double()
    expected = (weights @ step[:, 0]) / weights.sum(1) / base.std(unbiased=False)
    torch.testing.assert_close(found.replicates[:, 0, 0], expected, rtol=1e-12, atol=0)
    row = found.to_dataframe().iloc[0]
    low, high = resampled_interval(row["effect"], expected, 40)
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    other = input_effects(nn.Sequential(nn.Identity()), base, {"v": base + step}, ["0"], seed=6, batch_size=16)
    assert not torch.equal(found.replicates, other.replicates) and torch.equal(found.tensor, other.tensor)


def test_without_replicates_there_is_no_interval():
    module, base, variants = problem()
    table = input_effects(module, base, variants, ["fc"], replicates=0).to_dataframe()
    assert table[["low", "high"]].isna().all(axis=None) and table["effect"].notna().all()


def test_replicates_without_any_pair_are_left_out():
    """All weights of a replicate are zero once in e^8: such a replicate has no mean, and is not one of zero."""
    base = torch.randn(8, 1, generator=seeded())
    found = input_effects(nn.Sequential(nn.Identity()), base, {"v": base + 1}, ["0"], replicates=20_000)
    assert 0 < 20_000 - len(found.replicates) < 30
    torch.testing.assert_close(found.replicates, found.tensor.expand_as(found.replicates), rtol=1e-6, atol=0)
