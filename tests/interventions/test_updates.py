"""Updates behind a changed channel, against hooks and against running everything again; what has none falls back."""

import pytest
import torch
from hook_loop import assert_equals_hook_loop
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast.interventions import patch_sweeps
from vaecirc_fast.interventions.passes import Target, value_at
from vaecirc_fast.interventions.patch_sweeps import Behind
from vaecirc_fast.interventions.selection import channel_axis, parse, units
from vaecirc_fast.interventions.trace import trace

N = 4
IMAGE, SEQUENCE = (3, 8, 8), (5, 8)


class Calls(nn.Module):
    """A function of modules."""

    def __init__(self, f, **modules):
        super().__init__()
        self.f = f
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.f(self, x)


def images(*behind):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *behind)


def skip(m, x):
    h = torch.relu(m.a(x))
    return torch.relu(h + m.c(torch.relu(m.norm(m.b(h))))).mean((2, 3))


def gated(m, x):
    """Elementwise products of two changed values, of a changed and a base's, and with a parameter of each channel."""
    h = m.a(x)
    base = m.b(x)
    h = h * torch.sigmoid(h) * base
    return m.c(torch.nn.functional.prelu(h, m.norm.weight)) + base


def conv3(i, o=6):
    return nn.Conv2d(i, o, 3, padding=1)


# the module, its row, the site, and how many layers behind it are updated
CASES = {
    "conv, norm, relu, conv": (
        lambda: images(nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(), conv3(6), nn.Tanh(), conv3(6, 2)),
        (IMAGE, "0", 1),
    ),
    "skip": (
        lambda: Calls(skip, a=conv3(3), b=conv3(6), c=conv3(6), norm=nn.BatchNorm2d(6)),
        (IMAGE, "a", 1),
    ),
    "behind the skip": (
        lambda: Calls(skip, a=conv3(3), b=conv3(6), c=conv3(6), norm=nn.BatchNorm2d(6)),
        (IMAGE, "c", 0),
    ),
    "gates": (lambda: Calls(gated, a=conv3(3), b=conv3(3), c=conv3(6), norm=nn.PReLU(6)), (IMAGE, "a", 1)),
    "two at once": (
        lambda: Calls(lambda m, x: m.b(h := m.a(x)) * m.c(torch.tanh(h)), a=conv3(3), b=conv3(6), c=conv3(6)),
        (IMAGE, "a", 2),
    ),
    "added in place": (
        lambda: Calls(lambda m, x: m.c(m.b(x).add_(m.a(x)).relu_()), a=conv3(3), b=conv3(3), c=conv3(6)),
        (IMAGE, "a", 1),
    ),
    "transposed": (
        lambda: images(nn.SiLU(), nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, output_padding=1), nn.GELU()),
        (IMAGE, "0", 1),
    ),
    "stride and dilation": (
        lambda: images(nn.LeakyReLU(), nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=2, dilation=(1, 3), bias=False)),
        (IMAGE, "0", 1),
    ),
    "pooled and flattened": (
        lambda: images(nn.MaxPool2d(2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(384, 7)),
        (IMAGE, "0", 1),
    ),
    "means": (lambda: images(Calls(lambda m, x: x.mean((2, 3))), nn.Linear(6, 7)), (IMAGE, "0", 1)),
    "grouped": (lambda: images(nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), conv3(4)), (IMAGE, "0", 0)),
    "the output": (lambda: images(nn.ReLU()), (IMAGE, "0", 0)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ELU(), nn.Linear(12, 9, bias=False), nn.Tanh()),
        ((8,), "0", 1),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        (SEQUENCE, "0", 1),
    ),
    "one of two channels is half": (lambda: nn.Sequential(conv3(3, 2), conv3(2)), (IMAGE, "0", 1)),
    "one of one is all": (lambda: nn.Sequential(conv3(3, 1), conv3(1)), (IMAGE, "0", 0)),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(2)
    build, (row, site, updates) = CASES[name]
    module = build().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in part.state_dict().values():
                if t.is_floating_point():
                    t.uniform_(0.5, 2)
    x_base, x_source = torch.randn(2, N, *row)
    return module.to(dtype), x_base.to(dtype), x_source.to(dtype), site, updates


@torch.no_grad()
def behind(module, x, site, unit="channel", heads=None, alone=True):
    """What runs behind a site, and its target."""
    now, _ = trace(module, module, [x], [site])
    shape = now.layouts[value_at(now.places[site].outputs, site).number][0][1:]
    labels = units(shape, unit, heads).labels
    target = Target(parse(site), labels, tuple(range(int(labels.max()) + 1)))
    return Behind(now, target, alone), target


@pytest.mark.parametrize("name", CASES)
def test_every_channel_equals_a_loop_of_hooks(name):
    module, x_base, x_source, site, _ = made(name)
    assert_equals_hook_loop(module, x_base, x_source, [site], tile=N)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_updated_and_what_they_cost(name, layout):
    module, x_base, x_source, site, count = made(name, torch.float64)
    if x_base.ndim == 4:
        module, x_base = module.to(memory_format=layout), x_base.contiguous(memory_format=layout)
    b, target = behind(module, x_base, site)
    assert b.updates is not None and len(b.updates.linear) == count
    assert (b.updates.flops < b.program.flops) == (count > 0)
    with torch.no_grad():
        now, inputs = b.program.trace, dict.fromkeys(b.program.trace.inputs, x_base)
        values = now.everything().run(inputs, b.needs)
        source = now.everything().run(dict.fromkeys(now.inputs, x_source), {b.start})[b.start]
        before = {v: t.clone() for v, t in values.items()}
        cheap, flops = b.on(values, source, target, 1)
        assert flops == b.updates.flops
        for u in (*target.units, *reversed(target.units)):
            patched = torch.where(target.labels.view(source.shape[1:]) == u, source, values[b.start])
            expected = b.program.run({**values, b.start: patched})[now.output]
            y = cheap([u])
            assert y.stride() == expected.stride() or count == 0 or y.ndim < 4
            torch.testing.assert_close(y, expected)  # float64
        assert torch.equal(cheap([0]), cheap([0]))
        assert all(torch.equal(values[v], t) for v, t in before.items()), "the base is as it was"


def test_a_channel_that_does_not_change_has_no_effect():
    module, x, _, site, _ = made("skip")
    P = vf.interventions.patch_sweep(module, x, x.clone(), [site], tile=N, replicates=0)
    assert not P.tensor.any()


@pytest.mark.parametrize(
    ("name", "unit", "heads"), [("skip", "cell", None), ("sequence", "token", None), ("sequence", "head", 4)]
)
def test_other_units_run_everything_again(name, unit, heads):
    module, x_base, x_source, site, _ = made(name)
    assert behind(module, x_base, site, unit, heads)[0].updates is None
    assert_equals_hook_loop(module, x_base, x_source, [site], unit=unit, heads=heads, tile=N)


def test_units_side_by_side_run_everything_again():
    module, x_base, *_, site, _ = made("skip")
    assert behind(module, x_base, site, alone=False)[0].updates is None


def test_parts_of_channels_are_none():
    labels = units((3, 2, 2)).labels.view(3, 2, 2)
    assert channel_axis(labels) == 0 and channel_axis(units(SEQUENCE).labels.view(SEQUENCE)) == 1
    assert channel_axis(torch.where(labels == 1, labels, -1)) == 0, "some channels, whole"
    labels[2, 0, 1] = -1
    assert channel_axis(labels) is None
    assert channel_axis(units((6,), "head", 3).labels) is None


def test_sixteen_bits_run_everything_again():
    module, x_base, *_, site, _ = made("conv, norm, relu, conv", torch.bfloat16)
    updates = behind(module, x_base, site)[0].updates
    assert updates is not None and not updates.linear


def test_nothing_is_taken_from_an_infinity():
    """A base's infinite value, that the patch replaces, leaves no NaN."""
    linear = nn.Linear(4, 3)
    nn.init.ones_(linear.weight)
    module = nn.Sequential(Calls(lambda m, x: x.exp()), linear, nn.Sigmoid()).eval()
    x_base, x_source = torch.zeros(N, 4), torch.zeros(N, 4)
    x_base[:, 2] = 100  # more than float32 holds
    with vf.backend("reference"):
        P = vf.interventions.patch_sweep(module, x_base, x_source, ["0"], tile=N, replicates=0, effect="signed")
    expected = torch.sigmoid(4 + linear.bias.detach()).mean() - 1
    assert torch.isfinite(P.tensor).all() and torch.isclose(P.tensor[2, 0], expected, rtol=1e-5)


def test_a_sweep_takes_updates_where_rows_fill_a_tile(monkeypatch):
    module, x_base, x_source, site, _ = made("conv, norm, relu, conv")
    seen = []
    run = patch_sweeps.Updated.run
    monkeypatch.setattr(patch_sweeps.Updated, "run", lambda self, u: seen.append(u) or run(self, u))
    vf.interventions.patch_sweep(module, x_base, x_source, [site], tile=2, replicates=0)
    assert seen == 2 * list(range(6))


def test_a_pass_has_one_unit_where_updates_save_more_than_full_tiles():
    module, *_, site, _ = made("skip")
    for unit, rows, together in (("channel", 8, 8), ("channel", 7, 42), ("cell", 8, 512)):
        x_base, x_source = torch.randn(2, rows, *IMAGE)
        P = vf.interventions.patch_sweep(module, x_base, x_source, [site], unit=unit, replicates=0)
        assert f"tiles of {together} rows" in P.plan


def test_a_tile_is_what_a_program_holds_at_once(monkeypatch):
    """Of ten equal layers, two activations are alive at a time: the one that is read and the one that is made."""
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)), nn.Softmax(-1)).eval()
    monkeypatch.setattr(patch_sweeps, "most_bytes", lambda _device: 20 * 2 * 4 * 64)
    x_base, x_source = torch.randn(2, 20, 64)
    P = vf.interventions.patch_sweep(module, x_base, x_source, ["0"], replicates=0)
    assert "tiles of 20 rows" in P.plan
