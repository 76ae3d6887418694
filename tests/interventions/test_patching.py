"""Activation patching against a naive loop of hooks: on VAEs, a residual net and a transformer; caches; bad input."""

import itertools

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
from vaecirc_fast.interventions import patch_sweeps, selection
from vaecirc_fast.interventions.patching import ablated

N = 5


class Block(nn.Module):
    """A residual block: in-place activations, one module called twice, a skip added in place."""

    def __init__(self, channels):
        super().__init__()
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.c2(self.act(self.norm(self.c1(x))))
        h += x
        return self.act(h)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.b1, self.b2 = nn.Conv2d(3, 4, 3, padding=1), Block(4), Block(4)
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        return self.fc(self.b2(self.b1(self.stem(x))).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


def made(name, dtype=torch.float32):
    torch.manual_seed(4)
    if name in ("conv", "mlp"):
        module = models.build("vae", (1, 16, 16), 3, net=name, width=0.25)
        x = [torch.rand(N, 1, 16, 16) for _ in range(2)]
    else:
        module = {"residual": Residual, "transformer": Sequence}[name]()
        x = [torch.randn(N, *((3, 6, 6) if name == "residual" else (4, 8))) for _ in range(2)]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    return module.eval().to(dtype), *(t.to(dtype) for t in x)


SITES = {
    "conv": ["encoder.conv2", "encoder.fc", "decoder.fc1", "decoder.fc2", "decoder.ct1", "decoder.ct2"],
    "mlp": ["encoder.fc1", "encoder.mu", "decoder.fc1", "decoder.fc2", "decoder.fc3", "decoder.fc4"],
    "residual": ["stem", "b1.c1", "b1.norm", "b1", "b2.c2", "fc"],
    "transformer": ["encoder.layers.0.linear1", "encoder.layers.0.norm1", "encoder.layers.1.linear2"],
}


def naive(module, x_base, x_source, sites, effect, groups, unit="channel"):
    """A forward pass with a hook for every unit of every site: (unit, group), and the recoveries."""
    modules = dict(module.named_modules())
    kinds = {
        "l1": lambda d: d.abs().mean(-1),
        "mse": lambda d: d.square().mean(-1),
        "signed": lambda d: d.mean(-1),
    }
    labels, count = groups.labels, len(groups)

    def distance(y, y0):
        d = (y - y0).flatten(1)
        return torch.stack([kinds[effect](d[:, labels == g]) for g in range(count)], 1)

    rows, near = [], []
    with torch.no_grad():
        base, source = module(x_base), module(x_source)
        apart = kinds[effect]((base - source).flatten(1)).mean()
        for site in sites:
            kept = []
            handle = modules[site].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.clone()))
            module(x_source)
            handle.remove()
            owner = selection.units(kept[0].shape[1:], unit).labels.view(kept[0].shape[1:])
            for u in range(int(owner.max()) + 1):
                handle = modules[site].register_forward_hook(
                    lambda m, a, out, u=u, owner=owner, kept=kept: torch.where(owner == u, kept[0], out)
                )
                y = module(x_base)
                handle.remove()
                rows.append(distance(y, base).mean(0))
                near.append(1 - kinds[effect]((y - source).flatten(1)).mean() / apart)
    return torch.stack(rows), torch.stack(near), base


def thirds(elements):
    return partitions.from_labels(torch.arange(elements) % 3)


@pytest.mark.parametrize("tile", [None, 2, 64])
@pytest.mark.parametrize("effect", ["l1", "mse"])
@pytest.mark.parametrize("name", SITES)
def test_every_unit_equals_a_loop_of_hooks(name, effect, tile):
    module, x_base, x_source = made(name)
    double, base64, source64 = made(name, torch.float64)
    with torch.no_grad():
        elements = module(x_base)[0].numel()
    groups = thirds(elements)
    reference, _, _ = naive(module, x_base, x_source, SITES[name], effect, groups)
    truth, recovery, y = naive(double, base64, source64, SITES[name], effect, groups)
    P = vf.wrap(module).patch_sweep(x_base, x_source, SITES[name], effect=effect, groups=groups, tile=tile)
    largest = 2 * float(y.abs().max()) + float(truth.max()) ** (0.5 if effect == "mse" else 1)
    unit = torch.full_like(truth, largest**2 if effect == "mse" else largest)
    assert_close(P.tensor, reference, truth, terms=elements + 400, unit=unit)
    assert P.coords["unit"][0] == (SITES[name][0], 0) and len(P.coords["unit"]) == len(truth)
    exact = vf.wrap(double).patch_sweep(base64, source64, SITES[name], effect=effect, recovery=True, tile=tile)
    assert torch.allclose(exact.recovery, recovery, rtol=1e-9, atol=1e-9)
    assert exact.recovery.max() > 0.01 and "only what depends on" in P.plan


@pytest.mark.parametrize(("unit", "site"), [("cell", "b1.c1"), ("element", "fc"), ("channel", "b2.c1")])
def test_units_of_images(unit, site):
    module, x_base, x_source = made("residual", torch.float64)
    expected, _, _ = naive(module, x_base, x_source, [site], "mse", thirds(6), unit)
    P = vf.interventions.patch_sweep(module, x_base, x_source, [site], unit=unit, groups=thirds(6))
    assert torch.allclose(P.tensor.double(), expected, rtol=1e-5) and P.tensor.shape == expected.shape


def test_tokens_and_heads():
    module, x_base, x_source = made("transformer", torch.float64)
    site = "encoder.layers.0.norm1"
    expected, _, _ = naive(module, x_base, x_source, [site], "mse", thirds(32), "token")
    P = vf.interventions.patch_sweep(module, x_base, x_source, [site], unit="token", groups=thirds(32))
    assert torch.allclose(P.tensor.double(), expected, rtol=1e-5)
    H = vf.interventions.patch_sweep(module, x_base, x_source, [site], unit="head", heads=2)
    assert H.units == (0, 1)
    whole = vf.interventions.patch_sweep(module, x_base, x_source, [f"{site}[:, :4]"], unit="head", heads=2)
    assert whole.units == (0,) and torch.equal(whole.tensor[0], H.tensor[0])


def test_only_the_chosen_units_are_patched():
    module, x_base, x_source = made("conv")
    every = vf.interventions.patch_sweep(module, x_base, x_source, ["decoder.ct1"])
    some = vf.interventions.patch_sweep(module, x_base, x_source, ["decoder.ct1[3]", "decoder.fc1[2:4]"])
    assert list(zip(some.sites, some.units, strict=True)) == [
        ("decoder.ct1", 3),
        ("decoder.fc1", 2),
        ("decoder.fc1", 3),
    ]
    assert torch.allclose(some.tensor[0], every.tensor[3])
    corner = vf.interventions.patch_sweep(module, x_base, x_source, ["decoder.ct1[:, :2, :2]"])
    assert corner.tensor.shape == every.tensor.shape and corner.tensor.sum() < every.tensor.sum()


def test_inputs_of_a_site():
    module, x_base, x_source = made("mlp")
    z = vf.interventions.patch_sweep(module, x_base, x_source, ["decoder.fc1.input"])
    mu = vf.interventions.patch_sweep(module, x_base, x_source, ["encoder.mu"])
    assert z.sites == ("decoder.fc1.input",) * 3 and torch.equal(z.tensor, mu.tensor)


def test_clean_and_corrupted_are_assigned_by_the_direction():
    module, a, b = made("mlp")
    forward = vf.interventions.patch_sweep(module, a, b, ["decoder.fc1"]).tensor
    for direction, (clean, corrupted) in {"noising": (a, b), "denoising": (b, a)}.items():
        P = vf.wrap(module).patch_sweep(sites=["decoder.fc1"], clean=clean, corrupted=corrupted, direction=direction)
        assert torch.equal(P.tensor, forward)


# --- caches, hooks, joint patches ------------------------------------------------------------------------------------


def test_a_cache_holds_what_passed():
    module, x, _ = made("residual")
    y, cache = vf.wrap(module).run_with_cache(x, ["b1.c*", "fc", "fc.input"])
    with torch.no_grad():
        assert torch.allclose(y, module(x), rtol=1e-5, atol=1e-5)
        stem = module.stem(x)
        before = module.b1.c1(stem)  # the activation changes it in place
        assert torch.allclose(cache["b1.c1"], before, rtol=1e-5, atol=1e-5) and bool((before < 0).any())
        assert torch.equal(cache["fc"], module.fc(cache["fc.input"]))
    assert set(cache) == {"b1.c1", "b1.c2", "fc", "fc.input"}
    everything = vf.interventions.run_with_cache(module, x)[1]
    assert "b1.act" not in everything and "b2.norm" in everything


def test_hooks_change_what_passes_and_modes_come_back():
    module, x, _ = made("residual")
    module.train()
    module.b1.norm.eval()
    y = vf.wrap(module).run_with_hooks(x, {"b1.c1": lambda a: 0 * a, "fc.input": lambda a: a + 1})
    assert module.training and module.b2.norm.training and not module.b1.norm.training
    module.eval()
    with torch.no_grad():
        module.b1.c1.weight.zero_(), module.b1.c1.bias.zero_()
        expected = module.fc(module.b2(module.b1(module.stem(x))).mean((2, 3)) + 1)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_joint_patch_is_one_run():
    module, x_base, x_source = made("conv", torch.float64)
    _, cache = vf.interventions.run_with_cache(module, x_source, ["decoder.ct1", "decoder.ct2"])
    patches = {"decoder.ct1[3]": cache, "decoder.ct2[:, 4:8, 4:8]": "mean", "decoder.fc1[0]": 0.5 * torch.ones(64)}
    y = vf.wrap(module).patch(x_base, patches, reference=x_source)
    with torch.no_grad():
        d = module.decoder
        mu, _ = module.encoder(x_base)
        h = d.fc1(mu)
        h[:, 0] = 0.5
        h = torch.relu(d.fc2(torch.relu(h))).unflatten(1, d.base)
        h = d.ct1(h)
        h[:, 3] = cache["decoder.ct1"][:, 3]
        h = d.ct2(torch.relu(h))  # the last of two
        h[:, :, 4:8, 4:8] = cache["decoder.ct2"].mean((0, 2, 3))[:, None, None]
    assert torch.allclose(y, torch.sigmoid(h), rtol=1e-12, atol=1e-12)


def test_patching_the_whole_site_gives_the_source():
    module, x_base, x_source = made("residual")
    y, cache = vf.interventions.run_with_cache(module, x_source, ["b2"])
    assert torch.allclose(vf.wrap(module).patch(x_base, {"b2": cache}), y, rtol=1e-5, atol=1e-5)


# --- ablations -------------------------------------------------------------------------------------------------------


def test_ablations():
    generator = torch.Generator().manual_seed(0)
    a, reference = (torch.randn(n, 3, 2, 2, generator=generator, dtype=torch.float64) for n in (4, 7))
    assert not ablated("zero", a, None, 0).any()
    mean = ablated("mean", a, reference, 0)
    assert torch.allclose(mean[2, 1, 0, 1], reference[:, 1].mean()) and mean.shape == a.shape
    assert torch.allclose(ablated("mean-positional", a, reference, 0)[3], reference.mean(0))
    drawn = ablated("resample", a, reference, 5)
    assert all(any(torch.equal(row, r) for r in reference) for row in drawn)
    assert torch.equal(drawn, ablated("resample", a, reference, 5))
    many = ablated("noise", a[:1].expand(4000, -1, -1, -1), reference, 1)
    assert (many.mean(0) - reference.mean(0)).abs().max() < 0.1
    assert (many.std(0) / reference.std(0, correction=0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional", "noise"])
def test_ablation_sweeps(ablation):
    module, x, other = made("mlp", torch.float64)
    A = vf.wrap(module).ablate(x, ["decoder.fc2"], ablation=ablation, reference=other, tile=len(x))
    y = module(x).detach()
    for u in (0, 7):
        patched = vf.wrap(module).patch(x, {f"decoder.fc2[{u}]": ablation}, reference=other)
        if ablation != "noise":  # whose draws differ
            assert np.isclose(float(A.tensor[u, 0]), float((patched - y).square().mean()), rtol=1e-5)
    assert A.ablation == ablation and A.recovery is None


# --- the result ------------------------------------------------------------------------------------------------------


def test_tables_and_intervals():
    module, x_base, x_source = made("mlp")
    x_base, x_source = x_base.repeat(4, 1, 1, 1), torch.rand(20, 1, 16, 16)
    P = vf.wrap(module).patch_sweep(x_base, x_source, ["decoder.fc1"], groups=thirds(256), recovery=True)
    table = P.to_dataframe()
    assert list(table.columns) == ["site", "unit", "effect", "low", "high", "recovery"]
    assert ((table.low <= table.effect) & (table.effect <= table.high)).mean() > 0.95
    assert np.allclose(table.effect, P.tensor.double() @ P.group_weights, rtol=1e-5)
    top = P.top(3)
    assert top.effect.tolist() == sorted(table.effect, reverse=True)[:3]
    array = P.to_xarray()
    assert array.dims == ("unit", "group") and array.coords["site"].values[0] == "decoder.fc1"


def test_the_kernel_is_used_behind_vectors_and_images():
    module, x_base, x_source = made("conv")
    sites = ["decoder.fc1", "decoder.fc2", "decoder.ct1"]
    P = vf.wrap(module).patch_sweep(x_base, x_source, [*sites, "encoder.conv1"])
    assert f"kernels behind {', '.join(sites)};" in P.plan
    share = int(P.plan.split("runs again: ")[1].split(" %")[0])
    assert 0 < share < 100


@pytest.mark.parametrize(("unit", "heads"), [("channel", None), ("cell", None), ("element", None), ("head", 4)])
def test_units_behind_which_is_a_kernel(unit, heads):
    """Chosen by indices too, two selections of one site; and equal to what torch's layers give."""
    module, x_base, x_source = made("conv")
    site = "decoder.fc1" if unit == "head" else "decoder.ct1"
    sites = [site, site + ("[:9]" if unit == "head" else "[:3, 1:4]")]
    options = {"unit": unit, "heads": heads, "groups": thirds(256), "replicates": 0}
    P = vf.interventions.patch_sweep(module, x_base, x_source, sites, **options)
    assert f"kernels behind {site};" in P.plan
    double, base64, source64 = made("conv", torch.float64)
    exact = vf.interventions.patch_sweep(double, base64, source64, sites, **options)
    with vf.backend("reference"):
        plain = vf.interventions.patch_sweep(module, x_base, x_source, sites, **options)
    assert "kernels" not in exact.plan + plain.plan and P.coords == exact.coords
    truth = exact.tensor.double()
    assert_close(P.tensor, plain.tensor, truth, terms=256 + 400, unit=torch.full_like(truth, 4.0))


@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "signed"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_recovery_by_kernels(net, effect):
    """Distances to the source's output, of an odd number of samples at sites with and without kernels."""
    module, x_base, x_source = made(net)
    sites = [
        "encoder.fc1" if net == "mlp" else "encoder.conv1",
        "decoder.fc1",
        "decoder.ct1" if net == "conv" else "decoder.fc3",
    ]
    given = {"effect": effect, "recovery": True, "replicates": 0}
    P = vf.interventions.patch_sweep(module, x_base, x_source, sites, **given)
    assert f"kernels behind {', '.join(sites[1:])};" in P.plan
    double, base64, source64 = made(net, torch.float64)
    truth = vf.interventions.patch_sweep(double, base64, source64, sites, **given)
    with vf.backend("reference"):
        plain = vf.interventions.patch_sweep(module, x_base, x_source, sites, **given)
    apart = (double(base64) - double(source64)).detach().abs().mean()
    unit = 1 + truth.recovery.abs() + 4 / apart.clamp(max=1) ** 2  # distances of outputs below 1, over that of the pair
    assert "kernels" not in truth.plan + plain.plan
    assert_close(P.recovery, plain.recovery, truth.recovery, terms=656, unit=unit)


@pytest.mark.parametrize("backend", ["auto", "reference"], ids=["kernels", "generic"])
def test_memory_grows_neither_with_patches_nor_with_samples(backend, monkeypatch):
    module, x_base, x_source = made("conv")
    monkeypatch.setattr(patch_sweeps, "PART_BYTES", 1 << 17)

    def peak(site, repeats):
        pairs = [x.repeat(repeats, 1, 1, 1) for x in (x_base, x_source)]
        with vf.backend(backend), LiveMemory() as memory:
            P = vf.interventions.patch_sweep(module, *pairs, [site], unit="element", replicates=0, tile=40)
        assert ("kernels" in P.plan) == (backend == "auto")
        return len(P.units), memory.peak

    peak("decoder.ct1[0, 0]", 1)  # what is made once
    few, small = peak("decoder.ct1[0, 0]", 1)
    many, large = peak("decoder.ct1", 1)
    assert many >= 32 * few and large < small + 200 * N * many  # effects in float64, some copies of them
    _, larger = peak("decoder.ct1[0, 0]", 64)
    assert larger < 2 * max(small, 1 << 17) + (1 << 16)


def test_the_plan_counts_what_is_saved():
    module, x_base, x_source = made("mlp")
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    whole = 2 * sum(layer.weight.numel() for layer in layers)
    last = 2 * layers[-1].weight.numel()
    with vf.backend("reference"):
        P = vf.interventions.patch_sweep(module, x_base, x_source, ["decoder.fc3"], replicates=0)
    patched = N * len(P.units)
    saved = patch_sweeps.readable(patched * (whole - last))
    assert f"{100 * last / whole:.0f} % of the operations" in P.plan and f"{saved}FLOP saved" in P.plan
    assert [patch_sweeps.readable(n) for n in (0, 999, 1234, 5.6e7, 7e13)] == ["0 ", "999 ", "1.23 k", "56 M", "70 T"]


@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "signed"])
@pytest.mark.parametrize("site", ["fc2", "fc3"])
def test_a_linear_last_layer(site, effect):
    """A unit before it acts by its column; squared effects from further away go through its R factor."""
    torch.manual_seed(3)
    decoder = models.build("vae", (1, 32, 32), 3, net="mlp", likelihood="gaussian", width=0.25).decoder.eval()
    base, source = torch.randn(64, 3), 2 * torch.randn(64, 3)
    options = {"effect": effect, "groups": thirds(1024), "replicates": 0}
    P = vf.interventions.patch_sweep(decoder, base, source, [site], **options)
    with vf.backend("reference"):
        plain = vf.interventions.patch_sweep(decoder, base, source, [site], **options)
    truth = vf.interventions.patch_sweep(decoder.double(), base.double(), source.double(), [site], **options).tensor
    assert "kernels behind" in P.plan and "kernels" not in plain.plan
    y = decoder(base.double()).detach().abs().max() + decoder(source.double()).detach().abs().max()
    unit = float(y) ** (2 if effect == "mse" else 1) + truth.double().abs()
    assert_close(P.tensor, plain.tensor, truth.double(), terms=1024 + 400, unit=unit)


# --- bad input -------------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Everything that a site can be wrong about."""

    def __init__(self):
        super().__init__()
        self.a, self.shared, self.unused, self.pair = (nn.Linear(3, 3) for _ in range(4))
        self.pair = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x):
        h, _ = self.pair(self.a(x)[:, None])
        return self.shared(self.shared(h[:, 0]))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("nothing", "sites: nothing matches 'nothing'"),
        ("unused", "unused: is not reached"),
        ("shared", "shared: runs 2 times in one pass"),
        ("pair", "pair: gives no tensor"),
        ("a[7]", r"a\[7\]: index 7 is out of range, axis 0 has 3"),
        ("a[0, 1]", "has 2 indices"),
        ("a[1:1]", "selects nothing"),
        ("a[x]", "'x' in 'a\\[x\\]' is no index"),
        ("[3]", "site: expected 'path'"),
    ],
)
def test_bad_sites(site, message):
    with pytest.raises(InputError, match=message):
        vf.interventions.patch_sweep(Many(), torch.randn(4, 3), torch.randn(4, 3), [site])


def test_patterns_leave_out_what_does_not_fit():
    P = vf.interventions.patch_sweep(Many(), torch.randn(4, 3), torch.randn(4, 3), ["*"])
    assert set(P.sites) == {"a"}
    with pytest.raises(InputError, match="none of them runs once"):
        vf.interventions.patch_sweep(Many(), torch.randn(4, 3), torch.randn(4, 3), ["sh*"])


class Early(nn.Module):
    """Leaves early when its input is small."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.a(x)
        return h if h.abs().mean() < 1e-3 else self.b(h)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(3, 2), {"x_source": None}, "x_source: ablation"),
        (nn.Linear(3, 2), {"x_source": torch.randn(3, 3)}, "x_source: has 3 rows, x_base 4"),
        (nn.Linear(3, 2), {"x_base": torch.full((4, 3), torch.nan)}, "x: contains NaN"),
        (nn.Linear(3, 2), {"x_base": []}, "x: expected a tensor"),
        (nn.Linear(3, 2), {"effect": "logit_mse"}, "effect: 'logit_mse' is unknown"),
        (nn.Linear(3, 2), {"ablation": "knock"}, "ablation: 'knock' is unknown"),
        (nn.Linear(3, 2), {"ablation": "mean"}, "ablation: 'mean' needs reference="),
        (nn.Linear(3, 2), {"clean": torch.randn(4, 3)}, "clean, corrupted: give both"),
        (nn.Linear(3, 2), {"unit": "neuron"}, "unit: 'neuron' is unknown"),
        (nn.Linear(3, 2), {"unit": "cell"}, r"unit: rows of shape \(2,\) have no cells"),
        (nn.Linear(3, 2), {"groups": partitions.whole(5)}, "groups: partition 5 elements, but the output has 2"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train(), {}, "ok"),
    ],
)
def test_bad_options(module, options, message):
    wrapped = nn.Sequential(module, nn.Identity())
    given = {"x_base": torch.randn(4, 3), "x_source": torch.randn(4, 3), "sites": ["0"], **options}
    if message == "ok":  # dropout is put into eval mode, and back
        assert vf.interventions.patch_sweep(wrapped, **given).tensor.all() and module[1].training
        return
    with pytest.raises(InputError, match=message):
        vf.interventions.patch_sweep(wrapped, **given)


def test_passes_that_cannot_be_run_again():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + torch.randn_like(x)

    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="draws random numbers"):
        vf.interventions.patch_sweep(Noisy(), x, x + 1, ["a"])
    with pytest.raises(InputError, match="depend on values"):
        vf.interventions.patch_sweep(Early(), x, x + 1, ["a"])


def test_outputs_that_are_no_tensor_need_a_readout():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return {"sample": self.a(x), "more": x}

    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="its output is dict; readout= must choose"):
        vf.interventions.patch_sweep(Two(), x, x + 1, ["a"])
    P = vf.interventions.patch_sweep(Two(), x, x + 1, ["a"], readout=lambda out: out["sample"])
    assert P.tensor.shape == (3, 1) and P.tensor.all()


def test_bad_patches():
    module, x_base, x_source = made("mlp")
    m = vf.wrap(module)
    _, cache = m.run_with_cache(x_source, ["decoder.fc1"])
    for patches, message in (
        ({"decoder.fc2": cache}, "the cache holds no decoder.fc2"),
        ({"decoder.fc1": torch.ones(7)}, r"the source has shape \(7,\), the base \(5, 64\)"),
        ({"decoder.fc1": "mean"}, "needs reference="),
        ({"decoder.fc9": "zero"}, "nothing matches 'decoder.fc9'"),
        ({}, "patches: expected at least one site"),
    ):
        with pytest.raises(InputError, match=message):
            m.patch(x_base, patches)
    with pytest.raises(InputError, match="its hook gives"):
        m.run_with_hooks(x_base, {"decoder.fc1": lambda a: a[:, :3]})


@pytest.mark.parametrize("spec", ["a", "a.b[3]", "a.input", "a[:, 4:8, 4:8]", "a[*]", "a.b.input[2:]"])
def test_specs_come_back_as_they_were_written(spec):
    assert str(selection.parse(spec)) == spec


def test_units_are_partitions_of_a_row():
    for shape, unit in itertools.product([(6,), (2, 6), (2, 3, 4)], ["element", "channel"]):
        g = selection.units(shape, unit)
        assert len(g.labels) == int(np.prod(shape)) and int(g.labels.min()) == 0
