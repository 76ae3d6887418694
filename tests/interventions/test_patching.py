"""Activation patching against a loop of hooks: on VAEs, a residual net, a transformer, a UNet; caches; bad input."""

import copy
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from close import assert_close
from hook_loop import assert_equals_hook_loop, thirds
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


class ResNetBlock(nn.Module):
    """A block of a diffusion model: normalised in groups, told the step, around which a convolution goes."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.c1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.step, self.norm2, self.drop = nn.Linear(6, out), nn.GroupNorm(2, out), nn.Dropout(0.2)
        self.c2, self.short, self.act = nn.Conv2d(out, out, 3, padding=1), nn.Conv2d(channels, out, 1), nn.SiLU()

    def forward(self, x, step):
        h = self.c1(self.act(self.norm1(x))) + self.step(self.act(step))[:, :, None, None]
        return (self.short(x) + self.c2(self.drop(self.act(self.norm2(h))))) / 2**0.5


class Attention(nn.Module):
    """Places of an image attend to each other, in heads, by torch's fused attention."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(2, channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).view(B, H * W, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return x + self.out(h.transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).view(B, C, H, W)


@dataclass
class Sample:
    sample: torch.Tensor


class UNet(nn.Module):
    """What a UNet of a diffusion model has: a step, skips that are concatenated, attention, an output with a name."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6)), nn.Conv2d(3, 4, 3, 1, 1)
        self.down1, self.down2 = ResNetBlock(4, 4), nn.Conv2d(4, 4, 3, 2, 1)
        self.middle, self.attention, self.up1 = ResNetBlock(4, 4), Attention(4, 2), ResNetBlock(8, 4)
        self.last = nn.Conv2d(4, 3, 3, 1, 1)

    def forward(self, x, step):
        angles = step[:, None] * torch.tensor([1.0, 10.0], dtype=x.dtype)
        step = self.embed(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        skip = self.down1(self.first(x), step)
        h = self.attention(self.middle(self.down2(skip), step))
        h = nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")
        return Sample(self.last(nn.functional.silu(self.up1(torch.cat([h, skip], 1), step))))


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
        module = {"residual": Residual, "transformer": Sequence, "unet": UNet}[name]()
        x = [torch.randn(N, *((4, 8) if name == "transformer" else (3, 6, 6))) for _ in range(2)]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    return module.eval().to(dtype), *(t.to(dtype) for t in x)


CASES = [  # family, unit, heads, sites
    (
        "conv",
        "channel",
        None,
        ["encoder.conv2", "encoder.fc", "decoder.fc1", "decoder.fc2", "decoder.ct1", "decoder.ct2"],
    ),
    ("conv", "cell", None, ["encoder.conv1", "decoder.ct1"]),
    ("conv", "element", None, ["encoder.mu", "decoder.fc1"]),
    ("mlp", "channel", None, ["encoder.fc1", "encoder.mu", "decoder.fc1", "decoder.fc2", "decoder.fc3", "decoder.fc4"]),
    ("mlp", "head", 4, ["encoder.fc2", "decoder.fc2"]),
    ("residual", "channel", None, ["stem", "b1.c1", "b1.norm", "b1", "b2.c2", "fc"]),
    ("residual", "cell", None, ["stem", "b2.c1"]),
    ("residual", "element", None, ["fc"]),
    (
        "transformer",
        "channel",
        None,
        ["encoder.layers.0.linear1", "encoder.layers.0.norm1", "encoder.layers.1.linear2"],
    ),
    ("transformer", "token", None, ["encoder.layers.0", "encoder.layers.0.norm1", "encoder.layers.1.linear1"]),
    ("transformer", "head", 2, ["encoder.layers.0.norm1", "encoder.layers.1.linear2"]),
    ("unet", "channel", None, ["embed", "down1.c1", "down1.norm2", "down2", "attention.q", "middle.c2", "up1", "last"]),
    ("unet", "cell", None, ["down1", "attention", "up1.c1"]),
    ("unet", "token", None, ["attention.v"]),
    ("unet", "head", 2, ["attention.q", "attention.out"]),
]


def assert_case(name, unit, heads, sites, **options):
    module, x_base, x_source = made(name)
    if name == "unet":  # a step of the process for each sample
        steps = torch.arange(N) / N
        x_base, x_source = (x_base, steps), (x_source, steps.flip(0))
        options["readout"] = lambda out: out.sample
    return assert_equals_hook_loop(module, x_base, x_source, sites, unit=unit, heads=heads, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_unit_equals_a_loop_of_hooks(case):
    P = assert_case(*case)
    assert "only what depends on" in P.plan


@pytest.mark.parametrize(("effect", "tile"), [("l1", 2), ("mse", 64)])
@pytest.mark.parametrize("name", ["conv", "mlp", "residual", "transformer", "unet"])
def test_in_tiles_of_any_size(name, effect, tile):
    case = next(case for case in CASES if case[0] == name)
    assert_case(*case[:3], case[3][:3], effect=effect, tile=tile)


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
    assert f"kernels behind {', '.join(sites[net == 'conv' :])};" in P.plan
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


def perceptron(norm=None):
    layers = [nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6)]
    return nn.Sequential(*(layer for layer in layers if layer is not None)).eval()


BEFORE = {
    "conv": (lambda: models.build("vae", (1, 32, 32), latents=4, net="conv").decoder.eval(), "ct2", True),
    "mlp": (lambda: models.build("vae", (1, 32, 32), latents=4, net="mlp").decoder.eval(), "fc3", True),
    "modules": (perceptron, "2", True),
    "behind an activation": (perceptron, "1", False),
    "an unknown layer": (lambda: perceptron(nn.LayerNorm(8)), "3", False),
}


@pytest.mark.parametrize("name", BEFORE)
def test_kernels_before_a_site(name):
    torch.manual_seed(1)
    make, site, known = BEFORE[name]
    module, (base, source) = make(), torch.randn(2, N, 4)
    P = assert_equals_hook_loop(module, base, source, [site])
    assert f"kernels behind {site};" in P.plan and (f"kernels before {site};" in P.plan) == known
    zeros = vf.interventions.patch_sweep(module, base, base, [site], replicates=0)
    assert not zeros.tensor.any()


def test_ablations_of_what_kernels_made():
    """Without a source too the base is the kernel's; what gives infinities runs as it was and is refused."""
    torch.manual_seed(1)
    module, (base, reference) = perceptron(), torch.randn(2, N, 4)
    P = vf.interventions.ablate(module, base, ["2"], ablation="mean-positional", reference=reference, replicates=0)
    assert "kernels before 2;" in P.plan
    mean = vf.interventions.run_with_cache(module, reference, ["2"])[1]["2"].mean(0, keepdim=True).expand(N, -1)
    y = module(base)
    truth, yardstick = (
        torch.stack(
            [
                (vf.interventions.patch(m, x, {f"2[{u}]": by}) - m(x)).double().square().mean()[None].detach()
                for u in range(20)
            ]
        )
        for m, x, by in ((copy.deepcopy(module).double(), base.double(), mean.double()), (module, base, mean))
    )
    unit = torch.full_like(truth, float(4 * y.detach().abs().max() ** 2))
    assert_close(P.tensor, yardstick.float(), truth, terms=40, unit=unit)
    with torch.no_grad():
        module[0].weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        vf.interventions.patch_sweep(module, base, reference, ["2"], replicates=0)


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


class Through(nn.Module):
    """A linear layer, and what `f` does with it."""

    def __init__(self, f):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.flat, self.f = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Flatten(), f

    def forward(self, x):
        return self.f(self, self.a(x))


class Attending(nn.Module):
    """torch's fused attention, which draws random numbers where it is told to drop some, in eval mode too."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda m, h: h + torch.randn_like(h), r"in it \(Through\), .* draws random numbers; call eval\(\)"),
        (lambda m, h: h * torch.rand(4), r"in it \(Through\), .* draws random numbers"),
        (lambda m, h: Attending(0.1)(h[:, None, None])[:, 0, 0], "draws random numbers"),
        (lambda m, h: h if h.mean() < 0 else 2 * h, "makes a decision or a shape depend on values"),
        (lambda m, h: h + nn.functional.relu_(torch.ones(3, 4)[:1]).add_(h), "does not come from the input in place"),
        (lambda m, h: m.act(m.flat(h.view(-1, 2, 2)[:, :1])) + h[:, :2], "shares memory with flat"),
        (lambda m, h: h.as_strided((1, 2), (4, 1)), "reads memory whatever lies in it; use view"),
        (lambda m, h: h * float(np.random.default_rng().normal()), "gives other numbers when it runs again"),
        (lambda m, h: h * h.detach().numpy().mean().item(), "gives other numbers for x_source"),
    ],
)
def test_passes_that_cannot_be_run_again(f, message):
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match=f"module: .*{message}"):
        vf.interventions.patch_sweep(Through(f), x, x + 1, ["flat"] if "flat" in message else ["a"])


def rotated(m, h):
    """As rotary embeddings are written: halves put into a copy, through views of it."""
    turned = h.clone()
    turned[:, 0::2] = -h[:, 1::2]
    turned[:, 1::2] = h[:, 0::2]
    return h * 0.3 + turned.cos()


def into_new(m, h):
    y = torch.empty_like(h)
    first, second = y.split(2, dim=1)
    first.copy_(h[:, :2].tanh())
    second.zero_().add_(h[:, 2:] * first)
    return y + y.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, h: m.act(h) + 1,
        lambda m, h: (m.act(h[:, :2]), h + 0.5)[1],
        lambda m, h: m.act(h.view(-1, 2, 2)).sum(1) + h[:, 1:3],
        lambda m, h: m.act(h.unsqueeze(0)).squeeze(0) * h.add_(1),
        rotated,
        into_new,
    ],
)
def test_a_patched_tensor_that_is_overwritten_later(f):
    """In place, itself or through a view: what the loop of hooks gives, of the site and of what is behind it."""
    x = torch.randn(4, 3)
    assert_equals_hook_loop(Through(f), x, -x, ["a"], tile=3)


def test_attention_without_dropout_draws_nothing():
    module, x = nn.Sequential(nn.Linear(3, 4), Attending(0.0)), torch.randn(4, 1, 5, 3)
    P = vf.interventions.patch_sweep(module, x, -x, ["0"], unit="element")
    assert len(P.units) == 20 and P.tensor.all()


def test_outputs_that_are_no_tensor():
    """The one tensor of a mapping, a sequence or a dataclass is the output; of several readout= chooses."""
    x = torch.randn(4, 3)
    plain = vf.interventions.patch_sweep(Through(lambda m, h: h), x, x + 1, ["a"])
    for f in (lambda m, h: {"sample": h, "steps": 3}, lambda m, h: (h,), lambda m, h: Sample(h)):
        P = vf.interventions.patch_sweep(Through(f), x, x + 1, ["a"], recovery=True)
        assert torch.equal(P.tensor, plain.tensor) and P.recovery is not None
    two = Through(lambda m, h: {"sample": h, "more": h[:, :2]})
    with pytest.raises(InputError, match="its output is dict; readout= must choose one of the 2 tensors in it"):
        vf.interventions.patch_sweep(two, x, x + 1, ["a"])
    P = vf.interventions.patch_sweep(two, x, x + 1, ["a"], readout=lambda out: out["sample"])
    assert torch.equal(P.tensor, plain.tensor)
    with pytest.raises(InputError, match="its output is int"):
        vf.interventions.patch_sweep(Through(lambda m, h: 3), x, x + 1, ["a"])


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        (lambda y: y.mean(), r"readout: gives shape \(\) for 1 rows, expected \(rows, ...\)"),
        (lambda y: y.mean(1), r"readout: gives shape \(1,\) for 1 rows, expected \(rows, ...\) with more than"),
        (lambda y: y.T, r"readout: gives shape \(4, 1\) for 1 rows"),
        (lambda y: float(y.mean()), "makes a decision or a shape depend on values"),
        (lambda y: None, "its output is NoneType; readout= must choose a tensor"),
    ],
)
def test_readouts_of_the_wrong_shape(readout, message):
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match=message):
        vf.interventions.patch_sweep(Through(lambda m, h: h), x, x + 1, ["a"], readout=readout)


def test_sources_of_another_shape():
    """Whose sites hold other shapes than the base's: named with both."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(InputError, match=r"0: gives \(4, 2, 4, 4\) for x_source, \(4, 2, 2, 2\) for x_base"):
        vf.interventions.patch_sweep(module, torch.randn(4, 1, 4, 4), torch.randn(4, 1, 6, 6), ["0"])


def test_a_site_behind_which_the_pass_leaves_early():
    """By a number of the call, not of the data: b is reached or not."""

    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, depth):
            h = self.a(x)
            return h if depth == 1 else self.b(h)

    x = torch.randn(4, 3)
    assert vf.interventions.patch_sweep(Depth(), (x, 2), (x + 1, 2), ["b"]).units == (0, 1, 2)
    with pytest.raises(InputError, match="b: is not reached when the module runs; choose another site"):
        vf.interventions.patch_sweep(Depth(), (x, 1), (x + 1, 1), ["b"])


# --- compiled modules ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("how", ["around", "inside", "in place"])
def test_nothing_is_compiled_for_a_patch(how):
    """A compiled module runs as it was written, so hooks fire, and what was compiled stays so."""
    from torch._dynamo.utils import counters

    module, x_base, x_source = made("mlp")
    plain = vf.wrap(module)
    expected = plain.patch_sweep(x_base, x_source, ["decoder.fc1", "decoder.fc2"]).tensor
    _, cache = plain.run_with_cache(x_source, ["decoder.fc1"])
    one_by_one = [plain.patch(x_base, {f"decoder.fc1[{u}]": cache}) for u in range(8)]
    site, compiled = "decoder.fc1", module
    if how == "around":
        compiled = torch.compile(module, backend="eager")
    elif how == "inside":
        module.decoder = torch.compile(module.decoder, backend="eager")
        site = "decoder._orig_mod.fc1"
    else:
        module.compile(backend="eager")
    with torch.no_grad():
        y = compiled(x_base)
        graphs = counters["stats"]["unique_graphs"]
        m = vf.wrap(compiled)
        assert graphs and site in m.sites(site)["site"].to_list()
        P = m.patch_sweep(x_base, x_source, [site, site.replace("fc1", "fc2")])
        assert torch.equal(P.tensor, expected)
        _, cache = m.run_with_cache(x_source, [site])
        patched = [m.patch(x_base, {f"{site}[{u}]": cache}) for u in range(8)]
        assert all(map(torch.equal, patched, one_by_one)) and any(not torch.equal(y, p) for p in patched)
        assert torch.equal(compiled(x_base), y) and counters["stats"]["unique_graphs"] == graphs


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
