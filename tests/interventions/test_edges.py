"""Direct edges of any module against loops of hooks that freeze everything else, one unit at a time."""

from fractions import Fraction

import pytest
import torch
from close import assert_close
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions.edges import PAIRS, direct_edges
from vaecirc_fast.metrics.statistics import t_interval


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 4)).double()


class Residual(nn.Module):
    """Blocks with skips: x + fc2(relu(fc1(x)))."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        h = h + self.fc2(torch.relu(self.fc1(h)))
        return self.last(torch.tanh(h))


class ConvDecoder(nn.Module):
    """Dense layer, reshape, transposed convolutions, a convolution with batch norm, a dense layer on its channels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 16)
        self.ct1 = nn.ConvTranspose2d(4, 5, 3, 2, 1, 1)
        self.ct2 = nn.ConvTranspose2d(5, 3, 2, 2)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 3, 2, 1, groups=2)
        self.head = nn.Linear(2 * 16, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, z):
        h = torch.relu(self.fc(z)).view(-1, 4, 2, 2)
        h = torch.relu(self.ct1(h))
        h = nn.functional.silu(self.ct2(h))
        h = torch.relu_(self.norm(self.conv(h)))
        return self.head(nn.functional.gelu(self.out(h)).flatten(1))


def naive(module, after, x_base, x_source, parent, child, kind, features_last=False):
    """One unit at a time: the parent's output patched, the child read behind `after`; (V, U), and the unit of check.

    A neighbouring layer cannot see what else changes, so the child's own output is that with all else frozen.
    """
    modules = dict(module.named_modules())

    def run(x, unit=None, given=None):
        seen = {}

        def patch(_m, _args, out):
            seen["parent"] = out.clone()
            if unit is not None:
                out = out.clone()
                at = (..., unit) if features_last else (slice(None), unit)
                out[at] = given[at]
            return out

        handles = [modules[parent].register_forward_hook(patch)]
        handles.append(modules[child].register_forward_hook(lambda _m, _a, out: seen.update(child=out.clone())))
        with torch.no_grad():
            module(x)
        for handle in handles:
            handle.remove()
        return seen

    base, source = run(x_base), run(x_source)
    axis = -1 if features_last else 1
    columns, size, most = [], float(after(base["child"]).detach().abs().max()) + float(base["child"].abs().max()), 0.0
    for u in range(base["parent"].shape[axis]):
        d = after(run(x_base, u, source["parent"])["child"]) - after(base["child"])
        d = d.movedim(axis, 0).flatten(1).detach()
        most = max(most, float(d.abs().max()))
        of = {"l1": d.abs().mean(1), "mse": d.square().mean(1), "signed": d.mean(1)}
        columns.append({**of, "rms": of["mse"].sqrt()}[kind])
    return torch.stack(columns, 1), (size + most) * (2 * most if kind == "mse" else 1)


def check(found, expected):
    """Against what `naive` gives: the unit is how large the numbers are whose difference an edge is."""
    expected, unit = expected if isinstance(expected, tuple) else (expected, float(expected.abs().max()))
    unit = torch.full_like(expected, unit, dtype=torch.float64)
    assert_close(found, expected.to(found.dtype), expected, terms=100, unit=unit)


@pytest.mark.parametrize("kind", ["l1", "mse", "rms", "signed"])
def test_mlp(kind):
    module, x, y = mlp().eval(), torch.randn(9, 5).double(), torch.randn(9, 5).double()
    E = direct_edges(module, x, y, "0", "2", kind=kind)
    check(E.tensor, naive(module, torch.relu, x, y, "0", "2", kind))
    assert E.tensor.shape == (6, 7) and "the op direct_edges" in E.plan and E.activation == "relu"
    E = direct_edges(module, x, y, "2", "4", kind=kind)
    check(E.tensor, naive(module, lambda c: c, x, y, "2", "4", kind))
    assert E.activation == "identity"


@pytest.mark.parametrize("activation", [lambda: nn.LeakyReLU(0.3), nn.GELU, nn.Sigmoid, lambda: nn.ELU(0.5), nn.Mish])
def test_activations(activation):
    module, x, y = mlp(activation), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    check(direct_edges(module, x, y, "0", "2").tensor, naive(module, activation(), x, y, "0", "2", "l1"))


def test_an_activation_as_the_parent():
    module, x, y = mlp(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    expected = direct_edges(module, x, y, "0", "2").tensor
    assert torch.equal(direct_edges(module, x, y, "1", "2").tensor, expected)


@pytest.mark.parametrize(
    ("parent", "child", "after"),
    [
        ("fc", "ct1", torch.relu),
        ("ct1", "ct2", nn.functional.silu),
        ("ct2", "conv", None),
        ("conv", "out", nn.functional.gelu),
        ("norm", "out", nn.functional.gelu),
        ("out", "head", lambda c: c),
    ],
)
@pytest.mark.parametrize("kind", ["l1", "rms"])
def test_conv_decoder(parent, child, after, kind):
    module = ConvDecoder().double().eval()
    x, y = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    after = after or (lambda c: torch.relu(module.norm(c)))
    E = direct_edges(module, x, y, parent, child, kind=kind)
    check(E.tensor, naive(module, after, x, y, parent, child, kind))
    assert "unrolled" in E.plan


@pytest.mark.parametrize(("parent", "child", "after"), [("fc1", "fc2", lambda c: c)])
def test_residual(parent, child, after):
    module = Residual().double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    check(direct_edges(module, x, y, parent, child).tensor, naive(module, after, x, y, parent, child, "l1"))
    check(direct_edges(module, x, y, "first", "fc1").tensor, naive(module, torch.relu, x, y, "first", "fc1", "l1"))


@pytest.mark.parametrize(("parent", "child"), [("0.input", "0"), ("0", "2")])
def test_a_planted_circuit_exactly(parent, child):
    """The kink's numbers are dyadic, so edges by fractions are edges to the bit; latents are the first input."""
    planted = next(p for p in vf.planted.all() if p.name == "relu_kink")
    net, x = planted.decoder, planted.z
    y = x.flip(0)
    found = direct_edges(net, x, y, parent, child).tensor

    def fractions(t):
        return [[Fraction(float(v)) for v in row] for row in t.detach()]

    def layer(rows, linear):
        return [[sum(w * a for w, a in zip(ws, row, strict=True)) + b for ws, b in linear] for row in rows]

    first, last = (
        list(zip(fractions(m.weight), [Fraction(float(b)) for b in m.bias.detach()], strict=True))
        if m.bias is not None
        else [(ws, Fraction(0)) for ws in fractions(m.weight)]
        for m in (net[0], net[2])
    )
    base, source = fractions(x), fractions(y)
    chosen, f = first, lambda c: max(c, Fraction(0))
    if child == "2":
        base, source = ([[f(c) for c in row] for row in layer(rows, first)] for rows in (base, source))
        chosen, f = last, lambda c: c
    pre = layer(base, chosen)
    for v, (weights, _) in enumerate(chosen):
        for u, w in enumerate(weights):
            moved = [abs(f(c[v] + w * (s[u] - b[u])) - f(c[v])) for c, b, s in zip(pre, base, source, strict=True)]
            assert Fraction(float(found[v, u])) == sum(moved) / len(moved)


def test_positions_of_a_sequence():
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Conv1d(6, 2, 1)).double()
    x, y = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 3).double()
    E = direct_edges(module, x, y, "0", "2")
    check(E.tensor, naive(module, torch.relu, x, y, "0", "2", "l1", features_last=True))
    assert E.tensor.shape == (4, 5)


def test_a_vae_decoder_of_ours_in_float32():
    model = vf.models.build("vae", shape=(1, 64, 64), latents=4).eval()
    x, y = torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)
    E = direct_edges(model.decoder, torch.randn(3, 4), torch.randn(3, 4), "fc1", "fc2")
    assert E.tensor.shape == (1024, 256) and E.tensor.dtype == torch.float32
    E = direct_edges(model.encoder, x, y, "conv3", "conv4")
    check(E.tensor, naive(model.encoder.double(), torch.relu, x.double(), y.double(), "conv3", "conv4", "l1"))


def test_tiles_and_kinds_of_sd_do_not_depend_on_tiles():
    module, x, y = mlp(), torch.randn(11, 5).double() + 3, torch.randn(11, 5).double()
    whole, tiled = (direct_edges(module, x, y, "0", "2", kind="rms", tile=tile, replicates=5) for tile in (None, 3))
    for name in ("tensor", "parent_sd", "child_sd", "change", "replicates"):
        check(getattr(tiled, name), getattr(whole, name))
    assert PAIRS > 11
    with torch.no_grad():
        both = torch.cat([module[:2](x), module[:2](y)])
        after = torch.cat([module[:4](x), module[:4](y)])
    check(whole.parent_sd, both.std(0, correction=0))
    check(whole.child_sd, after.std(0, correction=0))


def test_a_unit_that_never_varies_has_no_edges_in_sd():
    module, x, y = mlp(nn.Identity), torch.randn(9, 5).double(), torch.randn(9, 5).double()
    with torch.no_grad():
        module[0].weight[2], module[0].bias[2] = 0, 0.1
        module[2].weight[4] = 0
    E = direct_edges(module, x, y, "0", "2")
    assert E.parent_sd[2] == 0 and E.child_sd[4] == 0 and (E.tensor[:, 2] == 0).all() and (E.tensor[4] == 0).all()
    lost = torch.zeros(6, 7, dtype=torch.bool)
    lost[:, 2], lost[4] = True, True
    assert torch.equal(E.in_sd().isnan(), lost)


def test_rescaling_a_unit_changes_nothing_in_sd():
    module, x, y = mlp(), torch.randn(20, 5).double(), torch.randn(20, 5).double()
    before = direct_edges(module, x, y, "0", "2").in_sd()
    with torch.no_grad():
        module[0].weight[3] *= 7
        module[0].bias[3] *= 7
        module[2].weight[:, 3] /= 7
        module[2].weight[1] *= 3
        module[2].bias[1] *= 3
    after = direct_edges(module, x, y, "0", "2").in_sd()
    known = ~before.isnan()
    assert torch.equal(known, ~after.isnan()) and known.any()
    check(after[known], before[known])


def test_replicates_are_those_of_the_pairs_mean():
    """Six pairs: the jackknife of a mean is Student's interval, edge by edge."""
    module, x, y = mlp(), torch.randn(6, 5).double(), torch.randn(6, 5).double()
    E = direct_edges(module, x, y, "0", "2", replicates=10)
    of_pairs = torch.stack([direct_edges(module, x[n : n + 1], y[n : n + 1], "0", "2").tensor for n in range(6)])
    table = E.to_dataframe()
    row = table[(table.parent == 2) & (table.child == 1)].iloc[0]
    expected = t_interval(of_pairs[:, 1, 2])
    assert [row.low, row.high] == pytest.approx([expected.low, expected.high])
    assert row.edge == float(E.tensor[1, 2])


def test_bootstrap_intervals_hold_the_edges():
    module, x, y = mlp(), torch.randn(40, 5).double(), torch.randn(40, 5).double()
    E = direct_edges(module, x, y, "0", "2", replicates=100)
    table = E.to_dataframe()
    assert ((table.low <= table.edge) & (table.edge <= table.high)).mean() > 0.95
    assert E.replicates.shape == (100, 6, 7)


def test_tables():
    module, x, y = mlp(), torch.randn(8, 5).double(), torch.randn(8, 5).double()
    E = direct_edges(module, x, y, "0", "2", kind="signed")
    table = E.to_dataframe()
    assert len(table) == 42 and table.low.isna().all()
    top = E.top(3)
    assert top.edge.abs().tolist() == sorted(E.tensor.abs().flatten().tolist(), reverse=True)[:3]
    assert E.to_xarray().sel(child=2, parent=3) == E.tensor[2, 3]
    assert E.dims == ("child", "parent") and E.coords["parent"] == list(range(7))


def test_the_module_is_left_as_it_was():
    module = ConvDecoder().train()
    x = torch.randn(3, 3)
    strides = module.conv.weight.stride()
    direct_edges(module, x, x + 1, "ct1", "ct2")
    assert module.training and module.norm.training and module.conv.weight.stride() == strides
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def refusals():
    x = torch.randn(2, 5)
    deep, residual = mlp().float(), Residual()
    wrong = nn.Sequential(nn.Linear(5, 4), Doubled(4, 3))
    normed = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    shared = nn.Linear(5, 5)
    return {
        "parent: no module is called 'fc9'; the module has 0, 1": (deep, x, x, "fc9", "2"),
        "child: 1 is a ReLU, expected a Linear, Conv or ConvTranspose": (deep, x, x, "0", "1"),
        "0 -> 4: aten.addmm.default lies between them": (deep, x, x, "0", "4"),
        "fc2 -> last: aten.add.Tensor lies between them": (residual, x, x, "fc2", "last"),
        "0: does not read what 4 gives": (deep, x, x, "4", "0"),
        "lies between them; edges are of neighbouring layers": (normed, x, x, "0", "2"),
        "1: its output is not its weight times its input": (wrong, x, x + 1, "0", "1"),
        "runs 2 times": (nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(5, 2)), x, x, "0", "3"),
        "x_source: has 1 rows, x_base 2": (deep, x, x[:1], "0", "2"),
        "x: contains NaN": (deep, x * float("nan"), x, "0", "2"),
        "computes in torch.bfloat16": (mlp().bfloat16(), x.bfloat16(), x.bfloat16(), "0", "2"),
    }


@pytest.mark.parametrize("message", refusals())
def test_refusals(message):
    module, x, y, parent, child = refusals()[message]
    with pytest.raises(InputError, match=message):
        direct_edges(module, x, y, parent, child)


def test_wrong_options():
    module, x = mlp().float(), torch.randn(2, 5)
    with pytest.raises(InputError, match="kind: 'tv' is unknown"):
        direct_edges(module, x, x, "0", "2", kind="tv")
    with pytest.raises(InputError, match="replicates: expected a whole number"):
        direct_edges(module, x, x, "0", "2", replicates=-1)
