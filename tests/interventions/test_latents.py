"""Latent sweeps against a plain loop over samples, latents and steps, and what a sweep may not do to a module."""

import math

import numpy as np
import pytest
import torch
from close import assert_close
from interventions.live_memory import LiveMemory
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import engine, posterior_scale
from vaecirc_fast.interventions import latent_sweep as sweep
from vaecirc_fast.metrics.statistics import poisson_weights

N, L = 3, 3
WEIGHTS = torch.randn(L, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = ("conv", "conv cropped", "mlp")
DECODERS = (*IMAGES, "sequential", "function")


def decoder_of(name, dtype=torch.float32):
    """The same numbers in both dtypes, as far as float32 holds them."""
    torch.manual_seed(3)
    match name:
        case "conv":
            net = models.build("vae", (1, 16, 16), L, width=0.25).decoder
        case "conv cropped":
            net = models.build("vae", (3, 12, 20), L, width=0.25, likelihood="gaussian").decoder
        case "mlp":
            net = models.build("vae", (1, 8, 8), L, net="mlp", width=0.25).decoder
        case "sequential":
            net = nn.Sequential(nn.Linear(L, 16), nn.Tanh(), nn.Linear(16, 12), nn.Softmax(-1))
        case "function":
            return lambda z: torch.sin(z @ WEIGHTS.float().to(z.dtype)).unflatten(1, (3, 4))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)  # effects well above rounding
    return net.to(dtype).eval()


def codes(samples=N, dtype=torch.float32):
    return torch.randn(samples, L, generator=torch.Generator().manual_seed(2)).to(dtype)


def partition(elements):
    """Three groups in no order, of different sizes, and some elements in none."""
    labels = torch.randint(-1, 3, (elements,), generator=torch.Generator().manual_seed(elements))
    labels[:4] = torch.tensor([2, -1, 0, 1])
    return partitions.from_labels(labels)


SCALE = torch.tensor([0.5, 1.75, 0.25])
GRIDS = {
    "fixed": {"grid": "fixed"},
    "posterior": {"grid": "posterior", "scale": SCALE},
    "resample": {"grid": "resample", "seed": 7},
    "traverse": {"grid": "traverse"},
    "shifts": {"grid": torch.tensor([-2.0, 0.5, 1.0])},
    "shifts by latent": {"grid": torch.tensor([[-2.0, 0.5], [1.0, 4.0], [0.25, 8.0]])},
}


# --- the definition, written out -------------------------------------------------------------------------------------


def targets(name, z, options):
    """What z_i is set to: numbers (N, L, S), from definitions.md."""
    count, width = z.shape
    match name:
        case "fixed":
            steps = [0.6 * k for k in range(-5, 6) if k]
            new = [[[float(z[n, i]) + s for s in steps] for i in range(width)] for n in range(count)]
        case "posterior":
            steps = [0.5 * k for k in range(-4, 5) if k]
            new = [[[float(z[n, i] + s * SCALE[i]) for s in steps] for i in range(width)] for n in range(count)]
        case "resample":
            donors = donors_of(count, options["seed"])
            new = [[[float(z[m, i]) for m in donors[n]] for i in range(width)] for n in range(count)]
        case "traverse":
            levels = [0.05 + 0.1 * q for q in range(10)]
            new = [[np.quantile(z[:, i].double().numpy(), levels).tolist() for i in range(width)] for n in range(count)]
        case _:
            shifts = options["grid"].expand(width, -1).tolist()
            new = [[[float(z[n, i]) + s for s in shifts[i]] for i in range(width)] for n in range(count)]
    return torch.tensor(new, dtype=z.dtype)


def donors_of(count, seed):
    """Which sample each one's value is taken from, read off the sweep of an identity decoder on their numbers."""
    number = torch.arange(count, dtype=torch.float64)[:, None]
    moved = sweep(lambda z: z, number, grid="resample", effect="signed", seed=seed, reduce=None).tensor[:, 0, :, 0]
    return (number + moved).long().tolist()


def outputs(call, module, z, name, options):
    """Outputs (N, P) without and (N, L, S, P) with intervention: a call for each, read by a hook on the module."""
    new = targets(name, z, options)
    seen = []
    handle = None
    if isinstance(module, nn.Module) and call is module:
        handle = module.register_forward_hook(lambda module, args, out: seen.append(out.detach().flatten()))

    def run(code):
        with torch.no_grad():
            y = call(code[None])
        return seen.pop() if handle else y.flatten()

    base = torch.stack([run(code) for code in z])
    rows = []
    for n, i, s in np.ndindex(*new.shape):
        code = z[n].clone()
        code[i] = new[n, i, s]
        rows.append(run(code))
    if handle:
        handle.remove()
    return base, torch.stack(rows).view(*new.shape, -1)


def effect_of(base, y, effect, labels, groups):
    """(N, L, S, G) by the definition; for logit_mse base and y are logits."""
    dy = y - base[:, None, None]
    columns = []
    for g in range(groups):
        d = dy[..., labels == g]
        columns.append(
            {
                "l1": lambda d: d.abs().mean(-1),
                "mse": lambda d: d.square().mean(-1),
                "rms": lambda d: d.square().mean(-1).sqrt(),
                "logit_mse": lambda d: d.square().mean(-1),
                "tv": lambda d: d.abs().sum(-1) / 2,
                "signed": lambda d: d.mean(-1),
            }[effect](d)
        )
    return torch.stack(columns, -1)


def magnitude(base, y, effect, labels, groups):
    """How large the numbers were that cancel in y - base, as an effect."""
    both = y.abs() + base.abs()[:, None, None]
    return effect_of(torch.zeros_like(base), both, effect, labels, groups)


def check(E, reference, truth, unit, terms):
    assert_close(E.tensor, reference, truth, terms=terms, unit=unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", DECODERS)
def test_effects_are_those_of_a_hook_loop(name, grid, dtype):
    options = GRIDS[grid]
    decoder, double = decoder_of(name, dtype), decoder_of(name, torch.float64)
    z = codes(dtype=dtype)
    base, y = outputs(decoder, decoder, z, grid, options)
    true_base, true_y = outputs(double, double, z.double(), grid, options)
    groups = partition(base.shape[1])
    labels, count = groups.labels, len(groups)
    for effect in ("l1", "mse", "rms", "tv", "signed"):
        reference = effect_of(base, y, effect, labels, count)
        truth = effect_of(true_base, true_y, effect, labels, count)
        unit = magnitude(true_base, true_y, effect, labels, count)
        assert truth.abs().min() > 0
        every = sweep(decoder, z, effect=effect, groups=groups, reduce=None, **options)
        assert every.dims == ("sample", "latent", "step", "group") and every.tensor.dtype == dtype
        check(every, reference, truth, unit, y.shape[-1])
        mean = sweep(decoder, z, effect=effect, groups=groups, tile=4, **options)
        assert mean.dims == ("latent", "step", "group") and mean.tensor.dtype == dtype
        check(mean, reference.mean(0), truth.mean(0), unit.mean(0), y.shape[-1] + N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IMAGES)
def test_effects_on_logits(name, dtype):
    decoder, double, z = decoder_of(name, dtype), decoder_of(name, torch.float64), codes(dtype=dtype)
    base, y = outputs(decoder.logits, decoder, z, "fixed", {})
    true_base, true_y = outputs(double.logits, double, z.double(), "fixed", {})
    groups = partition(base.shape[1])
    for effect, on in (("l1", "logits"), ("rms", "logits"), ("logit_mse", "output"), ("logit_mse", "logits")):
        of = (effect, groups.labels, len(groups))
        reference, truth, unit = effect_of(base, y, *of), effect_of(true_base, true_y, *of), None
        unit = magnitude(true_base, true_y, *of)
        E = sweep(decoder, z, effect=effect, on=on, groups=groups, reduce=None)
        check(E, reference, truth, unit, y.shape[-1])


def test_without_groups_all_elements_are_one():
    decoder, z = decoder_of("function"), codes()
    base, y = outputs(decoder, decoder, z.double(), "fixed", {})
    E = sweep(decoder, z.double(), reduce=None)
    assert E.coords["group"] == ["output"] and E.tensor.shape == (N, L, 10, 1)
    expected = (y - base[:, None, None]).abs().mean(-1, keepdim=True)
    assert torch.allclose(E.tensor, expected, rtol=1e-12, atol=0)


def test_elements_left_out_do_not_matter():
    """Whatever the decoder puts there, NaN too."""
    left_out = torch.tensor([0, -1, 1, 0, -1, 1])

    def decoder(z):
        y = torch.cat([z, z.square()], 1)
        y[:, 1], y[:, 4] = torch.nan, torch.inf
        return y

    E = sweep(decoder, codes(), groups=partitions.from_labels(left_out))
    assert bool(torch.isfinite(E.tensor).all()) and E.tensor.sum() > 0
    kept = sweep(lambda z: decoder(z)[:, left_out >= 0], codes(), groups=partitions.from_labels([0, 1, 0, 1]))
    assert torch.equal(E.tensor, kept.tensor)


def test_labels_of_the_result():
    z = codes()
    E = sweep(decoder_of("mlp"), z, groups=partitions.cells(8, 8, 4))
    assert E.coords["latent"] == [0, 1, 2] and E.coords["group"] == ["cell 0,0", "cell 0,1", "cell 1,0", "cell 1,1"]
    assert E.coords["step"] == pytest.approx([0.6 * k for k in range(-5, 6) if k]) and E.samples == N
    assert (E.effect, E.grid) == ("l1", "fixed") and E.group_weights.tolist() == [0.25] * 4
    E = sweep(decoder_of("mlp"), z, grid="resample", draws=2, reduce=None)
    assert E.coords["step"] == [0, 1] and E.coords["sample"] == [0, 1, 2] and E.step_size is None
    assert E.replicates is None and E.step_replicates is None
    sizes = sweep(decoder_of("function"), z, groups=partitions.spans([2, 4, 6])).group_weights
    assert sizes.tolist() == pytest.approx([2 / 12, 4 / 12, 6 / 12])
    spans = sweep(decoder_of("function"), z, groups=partitions.spans([2, 4, 6]), effect="tv").group_weights
    assert spans.tolist() == pytest.approx([1 / 3] * 3)


def test_the_same_call_gives_the_same_bits_and_draws_nothing_from_the_global_state():
    decoder, z = decoder_of("conv"), codes(10)
    before = torch.get_rng_state()
    first, second = (sweep(decoder, z, grid="resample", seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.tensor, second.tensor) and torch.equal(first.replicates, second.replicates)
    assert not torch.equal(first.tensor, sweep(decoder, z, grid="resample", seed=5).tensor)


# --- tiles, streaming, bootstrap -------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A decoder on whole numbers: every sum over its outputs is exact, so no order of additions can show."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("weight", torch.randint(-3, 4, (L, 10), generator=generator).double())

    def forward(self, z):
        return torch.relu(z @ self.weight)


def whole_codes(samples):
    return torch.randint(-4, 5, (samples, L), generator=torch.Generator().manual_seed(6)).double()


POWERS = torch.tensor([-2.0, -1.0, 1.0, 0.0, 4.0])  # steps, their number and groups of four: exact to divide by
FOURS = partitions.from_labels([0, 1, 0, 1, -1, 1, 0, 0, -1, 1])


@pytest.mark.parametrize("samples", [5, 32])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_no_tile_size_changes_a_bit(samples, reduce):
    z, options = whole_codes(samples), {"grid": POWERS, "groups": FOURS, "seed": 11, "reduce": reduce}
    whole = sweep(Whole(), z, tile=10**6, **options)
    for tile in (1, 2, 3, 7, 13, 100, None):
        E = sweep(Whole(), z, tile=tile, **options)
        assert torch.equal(E.tensor, whole.tensor)
        if reduce:
            assert torch.equal(E.replicates, whole.replicates)
            assert torch.equal(E.step_replicates, whole.step_replicates)


@pytest.mark.parametrize("name", DECODERS)
def test_tile_sizes_agree_to_rounding(name):
    decoder, double, z = decoder_of(name), decoder_of(name, torch.float64), codes(9)
    groups = partition(double(z.double()).flatten(1).shape[1])
    truth = sweep(double, z.double(), groups=groups)
    base, y = outputs(double, double, z.double(), "fixed", {})
    unit = magnitude(base, y, "l1", groups.labels, len(groups)).mean(0)
    huge = sweep(decoder, z, groups=groups, tile=10**6)
    for tile in (1, 7, None):
        E = sweep(decoder, z, groups=groups, tile=tile)
        assert_close(E.tensor, huge.tensor, truth.tensor, terms=y.shape[-1], unit=unit)


@pytest.mark.parametrize("seed", [0, 9])
def test_replicates_are_the_poisson_bootstrap_by_sample_index(seed):
    """Each replicate is the mean under the weights of its row, by sample index; exact, on whole numbers."""
    z = whole_codes(20)
    every = sweep(Whole(), z, grid=POWERS, groups=FOURS, reduce=None).tensor
    E = sweep(Whole(), z, grid=POWERS, groups=FOURS, replicates=50, seed=seed, tile=7)
    weights = poisson_weights(50, 20, seed).double()
    normalised = sum(every[:, :, s] / abs(float(POWERS[s])) for s in (0, 1, 2, 4)) / 4
    total = weights.sum(1)[:, None, None]
    assert torch.equal(E.replicates, torch.einsum("rn,nlg->rlg", weights, normalised) / total)
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    expected = torch.einsum("rn,nls->rls", weights, every @ shares) / total
    assert torch.equal(E.step_replicates, expected)
    other = sweep(Whole(), z, grid=POWERS, groups=FOURS, replicates=50, seed=seed + 1)
    assert torch.equal(other.tensor, E.tensor) and not torch.equal(other.replicates, E.replicates)


def test_few_samples_are_left_out_one_at_a_time():
    z = whole_codes(5)
    E = sweep(Whole(), z, grid=POWERS, groups=FOURS, tile=2)
    assert E.replicates.shape == (5, L, 2)
    for n in range(5):
        rest = sweep(Whole(), z[torch.arange(5) != n], grid=POWERS, groups=FOURS)
        assert torch.equal(E.replicates[n], rest.step_normalised())


def test_a_replicate_that_drew_no_sample_is_left_out():
    """All of 8 weights are zero once in 2,981 replicates."""
    empty = int((poisson_weights(20_000, 8, 3).sum(1) == 0).sum())
    assert empty > 0
    E = sweep(lambda z: z + 10, torch.ones(8, 1), grid=torch.tensor([1.0]), replicates=20_000, seed=3)
    assert len(E.replicates) == len(E.step_replicates) == 20_000 - empty
    assert bool((E.replicates == 1).all()) and bool((E.step_replicates == 1).all())


def test_without_replicates_there_is_no_interval():
    E = sweep(Whole(), whole_codes(20), groups=FOURS, replicates=0)
    assert E.replicates is None and E.step_replicates is None
    for name, table in (("ces", E.ces()), ("specificity", E.specificity())):
        assert np.isfinite(table[name]).all() and np.isnan(table[["low", "high"]]).all(axis=None)
    estimate, drawn = vf.metrics.model_ces(E)
    assert math.isfinite(estimate.value) and math.isnan(estimate.low) and drawn.numel() == 0


@pytest.mark.parametrize("samples", [4, 16])
def test_kept_samples_have_the_mean_and_intervals_of_streamed_ones(samples):
    z = whole_codes(samples)
    kept, streamed = (sweep(Whole(), z, grid=POWERS, groups=FOURS, reduce=reduce) for reduce in (None, "mean"))
    assert torch.equal(kept.mean(), streamed.tensor) and kept.tensor.shape == (samples, L, 5, 2)
    for table in ("ces", "specificity"):
        ours, theirs = getattr(kept, table)(), getattr(streamed, table)()
        assert ours.to_numpy() == pytest.approx(theirs.to_numpy(), rel=1e-12)


# --- what is decoded -------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Passes z on, or what `decoder` makes of it, and keeps every batch it was given."""

    def __init__(self, decoder=None):
        super().__init__()
        self.decoder = decoder if decoder is not None else nn.Identity()
        self.batches = []

    def forward(self, z):
        self.batches.append(z.clone())
        return self.decoder(z)

    @property
    def rows(self):
        """Rows after the single one that sizes the tiles."""
        return sum(map(len, self.batches)) - 1


def test_zero_steps_are_zero_and_never_decoded():
    z = codes(8)
    decoder = Recorder(decoder_of("mlp"))
    E = sweep(decoder, z, grid=torch.tensor([-1.0, 0.0, 2.0, -0.0]))
    assert decoder.rows == 8 + 8 * L * 2
    assert torch.equal(E.tensor[:, [1, 3]], torch.zeros(L, 2, 1)) and bool((E.tensor[:, [0, 2]] > 0).all())
    assert torch.equal(E.step_replicates[:, :, [1, 3]], torch.zeros(200, L, 2))
    assert E.step_size.tolist() == [[1, 0, 2, 0]] * L
    decoder = Recorder(decoder_of("mlp"))
    shifts = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 3.0]])
    E = sweep(decoder, z, grid=shifts, reduce=None)
    assert decoder.rows == 8 + 8 * 4 and torch.equal(E.tensor[..., 0] > 0, (shifts != 0).expand(8, -1, -1))
    assert f"{8 + 8 * 4} decodes" in E.plan and "2 zero steps" in E.plan


def test_each_row_changes_one_latent_only():
    z = codes(4)
    decoder = Recorder()
    sweep(decoder, z, tile=11)
    rows = torch.cat(decoder.batches[1:])
    changed = (rows[:, None] != z).sum(-1).min(1).values  # against the sample it came from
    assert changed.tolist().count(0) == 4 and changed.tolist().count(1) == 4 * L * 10 == len(rows) - 4
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_a_grid_of_zeros_decodes_nothing():
    decoder = Recorder()
    E = sweep(decoder, codes(8), grid=torch.zeros(3))
    assert decoder.rows == 8 and not E.tensor.any() and not E.replicates.any()
    assert (E.ces()[["ces", "low", "high"]] == 0).all(axis=None)


def test_a_latent_of_scale_zero_has_no_effect():
    decoder = Recorder(decoder_of("mlp"))
    E = sweep(decoder, codes(8), grid="posterior", scale=torch.tensor([1.0, 0.0, 2.0]), groups=partition(64))
    assert decoder.rows == 8 + 8 * 2 * 8
    assert not E.tensor[1].any() and bool((E.tensor[[0, 2]] > 0).all())
    assert E.ces()["ces"][1] == 0 and math.isnan(E.specificity()["specificity"][1])


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "resample"])
def test_one_sample(grid):
    decoder, z = decoder_of("mlp"), codes(1)
    E = sweep(decoder, z, **GRIDS[grid])
    base, y = outputs(decoder, decoder, z, grid, GRIDS[grid])
    assert E.samples == 1 and torch.allclose(E.tensor[..., 0], (y - base).abs().mean(-1)[0], atol=1e-6)
    if grid != "traverse":
        assert E.ces()[["low", "high"]].to_numpy().tolist() == [[-math.inf, math.inf]] * L


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 5, 64])
def test_no_call_has_more_rows_than_a_tile(tile):
    decoder = Recorder(decoder_of("mlp"))
    sweep(decoder, codes(30), tile=tile)
    rows = [len(batch) for batch in decoder.batches]
    assert max(rows) <= tile and sum(rows) == 1 + 30 + 30 * L * 10
    assert len(rows) < 3 * sum(rows) / tile  # and they are nearly full


@pytest.mark.parametrize("name", ["conv", "conv cropped", "mlp"])
def test_automatic_tiles_hold_a_set_number_of_bytes(name, monkeypatch):
    """The activations of one call, counted independently, fill the budget and do not overrun it."""
    monkeypatch.setitem(engine.TILE_BYTES, "cpu", 1 << 20)
    decoder = Recorder(decoder_of(name))
    sweep(decoder, codes(200))
    largest = max(decoder.batches, key=len)
    made = 0
    handles = [
        m.register_forward_hook(lambda m, args, out: seen.append(out.nbytes))
        for m in decoder.modules()
        if not list(m.children())
    ]
    seen = []
    decoder(largest)
    made = sum(seen)  # layers only; activations and the link between them come to as much again, at most
    assert (1 << 20) / 4 < made <= 1 << 20
    for handle in handles:
        handle.remove()


def peak(samples, steps, replicates=10):
    """Bytes alive at most during a sweep, without those of its result."""
    decoder = nn.Sequential(nn.Linear(L, 64), nn.ReLU(), nn.Linear(64, 32))
    z = torch.randn(samples, L)
    shifts = torch.arange(1, steps + 1) / steps
    groups = partitions.spans([2] * 16)
    with LiveMemory() as memory:
        E = sweep(decoder, z, grid=shifts, groups=groups, replicates=replicates, engine="generic")
    result = (E.tensor, E.replicates, E.step_replicates, E.step_size)
    return memory.peak, sum(t.nbytes for t in result)


def test_the_memory_meter_measures():
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        d = torch.cat([c, c])
        del b, c
        assert memory.live == 8000 and d.sum() == 2000
    assert memory.peak == 4000 + 8000


def test_memory_does_not_grow_with_samples_or_steps(monkeypatch):
    """Beyond the result itself, which has an entry for every step."""
    budget = 1 << 17
    monkeypatch.setitem(engine.TILE_BYTES, "cpu", budget)
    few, _ = peak(64, 20)
    many_samples, _ = peak(1024, 20)
    assert many_samples < 1.1 * few  # slices are as long as fits, so not quite equally long
    many_steps, result = peak(64, 320)
    assert many_steps < few + 4 * result
    every = 64 * L * 320 * 16 * 4  # the effects of all samples, which a sweep that keeps them would hold
    assert many_steps < every / 2
    assert few < 8 * budget


# --- the module is left alone ----------------------------------------------------------------------------------------


def everything(module):
    """Whatever a sweep could have changed."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        "places": [(name, t.data_ptr(), t.stride(), t.requires_grad, t.dtype) for name, t in tensors],
        "values": [t.detach().clone().tolist() for _, t in tensors],
        "gradients": [None if t.grad is None else (t.grad.data_ptr(), t.grad.tolist()) for _, t in tensors],
        "modes": [(name, m.training) for name, m in module.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "identities": [id(t) for _, t in tensors],
    }


def net():
    """Convolutions, batch norm in eval mode, mixed training flags, a frozen parameter, gradients on some."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Linear(L, 4 * 4 * 4),
        nn.Unflatten(1, (4, 4, 4)),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3),
    )
    module(torch.randn(4, L)).sum().backward()
    module[5].weight.grad = None
    module[0].bias.requires_grad_(False)
    module[3].eval()
    assert module.training and not module[3].training
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grid", ["fixed", "resample"])
def test_nothing_in_the_module_changes(layout, grid):
    module = net().to(memory_format=layout)
    z = codes(9)
    before, version, copy = everything(module), z._version, z.clone()
    E = sweep(module, z, grid=grid, groups=partitions.channels(3, 6, 6))
    assert everything(module) == before
    assert z._version == version and torch.equal(z, copy)
    assert not E.tensor.requires_grad and not E.replicates.requires_grad
    module(z).sum().backward()  # still trainable


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nothing_in_the_module_changes_when_it_raises(layout):
    module = net().to(memory_format=layout)
    calls = []

    def fail(module, args, out):
        calls.append(len(out))
        if len(calls) == 4:
            raise RuntimeError("in the middle")

    module[4].register_forward_hook(fail)
    before = everything(module)
    with pytest.raises(RuntimeError, match="in the middle"):
        sweep(module, codes(9), tile=10)
    assert everything(module) == before and len(calls) == 4


def test_nothing_in_the_module_changes_when_input_is_refused():
    module = net()
    before = everything(module)
    for bad in ({"groups": partitions.spans([5])}, {"grid": "no"}, {"effect": "l2"}):
        with pytest.raises(InputError):
            sweep(module, codes(), **bad)
    assert everything(module) == before


def test_hooks_fire_and_may_change_what_passes():
    """A steering hook is part of the decoder; every row passes it once."""
    decoder, z = decoder_of("conv"), codes(4)
    plain = sweep(decoder, z, engine="generic")
    rows = {"top": 0, "ct1": 0}

    def count(name):
        def hook(module, args, out):
            rows[name] += len(out)

        return hook

    decoder.register_forward_hook(count("top"))
    decoder.ct1.register_forward_hook(count("ct1"))
    counted = sweep(decoder, z)
    assert rows == {"top": 1 + 4 + 4 * L * 10, "ct1": 1 + 4 + 4 * L * 10} and torch.equal(counted.tensor, plain.tensor)
    handle = decoder.fc1.register_forward_hook(lambda module, args, out: out * 0)
    assert not sweep(decoder, z).tensor.any()
    handle.remove()
    assert torch.equal(sweep(decoder, z).tensor, plain.tensor)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm1d(L), "BatchNorm1d"),
        (nn.SyncBatchNorm(L), "SyncBatchNorm"),
        (nn.Dropout(0.5), "Dropout"),
        (nn.AlphaDropout(), "AlphaDropout"),
        (nn.FeatureAlphaDropout(), "FeatureAlphaDropout"),
    ],
)
def test_layers_that_train_are_refused_with_the_remedy(layer, named):
    module = nn.Sequential(nn.Linear(L, L), nn.Sequential(layer))
    state = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(
        InputError, match=rf"decoder: 1\.0 \({named}\) is in train mode.*; call decoder\.eval\(\) first"
    ):
        sweep(module, codes(8))
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    module.train()
    layer.eval()  # that one is enough
    if named != "SyncBatchNorm":
        assert sweep(module, codes(8)).tensor.sum() > 0
    with pytest.raises(InputError, match="decoder: it "):
        sweep(layer.train(), codes(8))


def test_a_layer_that_mixes_rows_is_refused():
    module = nn.Sequential(nn.Linear(L, L), nn.BatchNorm1d(L, track_running_stats=False)).eval()
    with pytest.raises(InputError, match=r"decoder: 1 \(BatchNorm1d\) keeps no running statistics"):
        sweep(module, codes(8))


def test_the_module_of_a_bound_method_is_looked_at():
    module = nn.Sequential(nn.Linear(L, L), nn.Dropout(0.5))
    with pytest.raises(InputError, match="is in train mode"):
        sweep(module.forward, codes(8))
    assert sweep(module.eval().forward, codes(8)).tensor.sum() > 0


def test_a_module_in_train_mode_without_such_layers_is_fine():
    decoder = decoder_of("conv")
    assert torch.equal(sweep(decoder.train(), codes()).tensor, sweep(decoder.eval(), codes()).tensor)


# --- around the call -------------------------------------------------------------------------------------------------


def test_under_inference_mode_and_with_gradients_on():
    decoder, z = decoder_of("conv"), codes(8)
    expected = sweep(decoder, z)
    places = everything(decoder)["places"]
    with torch.inference_mode():
        inside = sweep(decoder, z)
    assert torch.equal(inside.tensor, expected.tensor) and everything(decoder)["places"] == places
    decoder(z).sum().backward()
    with torch.enable_grad():
        E = sweep(decoder, z.clone().requires_grad_())
        assert torch.is_grad_enabled()
    assert torch.equal(E.tensor, expected.tensor) and not E.tensor.requires_grad


@pytest.mark.parametrize("name", ["conv", "mlp", "sequential"])
def test_autocast_around_the_call(name):
    """The decoder then computes in bfloat16, as it would for its user; effects and statistics stay float32."""
    decoder, z = decoder_of(name), codes(8)
    exact = sweep(decoder, z, groups=partition(decoder(z).flatten(1).shape[1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(z).dtype in (torch.bfloat16, torch.float32)
        E = sweep(decoder, z, groups=partition(decoder(z).flatten(1).shape[1]))
        table = E.ces()
    assert E.tensor.dtype == torch.float32 and E.replicates.dtype == torch.float32
    assert not torch.equal(E.tensor, exact.tensor)
    limit = 2 * torch.finfo(torch.bfloat16).eps * float(decoder(z).detach().abs().max()) + 0.02 * float(
        exact.tensor.max()
    )
    assert (E.tensor - exact.tensor).abs().max() < limit
    assert table["ces"].to_numpy() == pytest.approx(exact.ces()["ces"].to_numpy(), abs=2 * limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["shifts", "posterior", "resample"])
def test_codes_and_outputs_in_16_bits(dtype, grid):
    """Effects are float32; on outputs that 16 bits hold exactly they are exact."""
    z = whole_codes(8)
    options = {"grid": POWERS if grid == "shifts" else grid, "scale": torch.tensor([2.0, 4.0, 6.0]), "groups": FOURS}
    half, full = sweep(Whole().to(dtype), z.to(dtype), **options), sweep(Whole(), z, **options)
    assert half.tensor.dtype == torch.float32 and torch.equal(half.tensor.double(), full.tensor)
    assert half.replicates.dtype == torch.float32 and full.replicates.dtype == torch.float64


def test_codes_in_any_layout():
    decoder, z = decoder_of("mlp"), codes(6)
    expected = sweep(decoder, z, grid="resample")
    wide = torch.full((6, 2 * L), torch.nan)
    wide[:, ::2] = z
    for other in (z.T.contiguous().T, wide[:, ::2], torch.stack([z, z], 1)[:, 1]):
        assert not other.is_contiguous() and torch.equal(other, z)
        assert torch.equal(sweep(decoder, other, grid="resample").tensor, expected.tensor)
    repeated = z[:1].expand(6, -1)
    assert torch.allclose(sweep(decoder, repeated).tensor, sweep(decoder, z[:1]).tensor, atol=1e-6)


def test_a_bound_method_is_a_decoder():
    model = models.build("vae", (1, 8, 8), L, net="mlp").eval()
    assert torch.equal(sweep(model.decode, codes()).tensor, sweep(model.decoder, codes()).tensor)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_backend_gives_the_same_effects(backend):
    decoder, z, groups = Whole(), whole_codes(20), FOURS
    expected = sweep(decoder, z, grid=POWERS, groups=groups)
    with vf.backend(backend):
        E = sweep(decoder, z, grid=POWERS, groups=groups)
    assert torch.equal(E.tensor, expected.tensor) and torch.equal(E.replicates, expected.replicates)


# --- bad input -------------------------------------------------------------------------------------------------------


def identity(z):
    return z


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ([[1.0]], "z: expected floats .* got list"),
        (torch.ones(3), r"z: expected floats of shape \(N, L\) with N, L > 0, got torch.float32 \(3,\)"),
        (torch.ones(2, 3, 4), r"got torch.float32 \(2, 3, 4\)"),
        (torch.ones(0, 3), r"got torch.float32 \(0, 3\)"),
        (torch.ones(3, 0), r"got torch.float32 \(3, 0\)"),
        (torch.ones(3, 3, dtype=torch.int64), "got torch.int64"),
        (torch.tensor([[1.0, torch.nan]]), "z: contains NaN or infinity"),
        (torch.tensor([[1.0, -torch.inf]]), "z: contains NaN or infinity"),
    ],
)
def test_bad_codes(z, message):
    with pytest.raises(InputError, match=message):
        sweep(identity, z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "line"}, "grid: 'line' is unknown; known: fixed, posterior, resample, traverse"),
        ({"grid": "posterior"}, "scale: "),
        ({"effect": "l2"}, "effect: 'l2' is unknown; known: l1, mse, rms, logit_mse, tv, signed"),
        ({"effect": ["l1", "mse"]}, "effect: .* is unknown"),
        ({"reduce": "sum"}, "reduce: expected \"mean\" or None, got 'sum'"),
        ({"on": "probabilities"}, 'on: expected "output" or "logits", got \'probabilities\''),
        ({"on": "logits"}, "on: the decoder has no method `logits`"),
        ({"effect": "logit_mse"}, "on: the decoder has no method `logits`"),
        ({"groups": [0, 0, 1]}, "groups: expected Groups, as vf.groups.cells makes them, got list"),
        ({"groups": partitions.spans([2])}, "groups: partition 2 elements, but the decoder's output has 3"),
        ({"tile": 0}, "tile: expected an integer of at least 1, got 0"),
        ({"tile": -3}, "tile: expected an integer of at least 1, got -3"),
        ({"tile": 2.5}, "tile: expected an integer of at least 1, got 2.5"),
        ({"draws": 0, "grid": "resample"}, "draws: expected an integer of at least 1, got 0"),
        ({"replicates": -1}, "replicates: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        sweep(identity, codes(), **options)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (lambda z: (z, z), "decoder: expected a float tensor .* got tuple for one row"),
        (lambda z: z.tolist(), "got list for one row"),
        (lambda z: z.sum(1), r"got torch.float32 \(1,\) for one row"),
        (lambda z: z.sum(), r"got torch.float32 \(\) for one row"),
        (lambda z: z.long(), r"got torch.int64 \(1, 3\) for one row"),
        (lambda z: torch.cat([z, z]), r"got torch.float32 \(2, 3\) for one row"),
        (lambda z: z.mean(0, keepdim=True), r"3 elements a row .* got \(1, 3\) for 8 rows"),
        (lambda z: z[:1].expand(2 * len(z) - 1, -1), r"got \(15, 3\) for 8 rows"),
        (lambda z: z[:, : 1 + (len(z) == 1)], r"2 elements a row .* got \(8, 1\) for 8 rows"),
        (lambda z: z if len(z) == 1 else None, "got NoneType for 8 rows"),
        (lambda z: z[:, :0], "decoder|element"),
    ],
)
def test_bad_decoders(decoder, message):
    with pytest.raises(InputError, match=message):
        sweep(decoder, codes(8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tile", [1, 7, None])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_outputs_that_are_not_finite_name_latent_and_step(value, tile, reduce):
    z = torch.zeros(9, L)

    def decoder(z):
        return torch.where(z[:, 1:2] > 2.5, value, z)

    with pytest.raises(InputError, match="decoder: its output is NaN or infinite for latent 1 at step 9 of .*'fixed'"):
        sweep(decoder, z, tile=tile, reduce=reduce)
    only = torch.tensor([[1.0, 1.0], [0.0, 3.0], [5.0, 5.0]])  # numbered by the grid, not by what is decoded
    with pytest.raises(InputError, match="for latent 1 at step 1 of"):
        sweep(decoder, z, grid=only, tile=tile, reduce=reduce)


# --- the aggregate posterior's scale ---------------------------------------------------------------------------------


def test_posterior_scale_by_its_formula():
    model = models.build("vae", (1, 8, 8), L, net="mlp").double().eval()
    x = torch.rand(11, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        mu, logvar = (t.numpy() for t in model.encode(x))
    expected = np.sqrt(((mu - mu.mean(0)) ** 2).mean(0) + np.exp(logvar).mean(0))
    for batch in (1, 4, 256):
        scale = posterior_scale(model, x, batch_size=batch)
        assert scale.numpy() == pytest.approx(expected, rel=1e-12) and not scale.requires_grad
    assert vf.posterior_scale is posterior_scale
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        posterior_scale(model, x[:1])
