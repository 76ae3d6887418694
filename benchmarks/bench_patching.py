"""Benchmark of activation patching and mediation: every unit of every site, against loops of hooks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vaecirc_fast as vf
from vaecirc_fast.interventions.engine import channels_last

from .bench_latent_sweep import _best
from .harness import measure

PAIRS = 64
SITES = {
    "conv": ("fc1", "ct1", "ct2", "ct3"),
    "mlp": ("fc1", "fc2", "fc3"),
    "residual": ("stem", "b1.c1", "b2.c1"),
    "transformer": ("layers.0.linear1", "layers.1.linear1"),
}
LAST = {"conv": ("ct3",), "mlp": ("fc3",)}
TILES = (8, 16, 32, 64)  # pairs of a pass, of which eager takes the best


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.c2(torch.relu(self.norm(self.c1(x)))))


class Residual(nn.Module):
    """Two residual blocks of 32 channels at 16 x 16, ten classes."""

    def __init__(self):
        super().__init__()
        self.stem, self.b1, self.b2 = nn.Conv2d(3, 32, 3, padding=1), Block(32), Block(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b2(self.b1(torch.relu(self.stem(x)))).mean((2, 3)))


@cache
def _decoder(net: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if net == "residual":
        base, source = torch.randn(2, PAIRS, 3, 16, 16, device=device)
        return Residual().eval().to(device), base, source
    if net == "transformer":
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(device)
        base, source = torch.randn(2, PAIRS, 32, 64, device=device)
        return encoder, base, source
    decoder = vf.models.build("vae", (1, 64, 64), latents=10, net=net).decoder.eval().to(device)
    return decoder, torch.randn(PAIRS, 10, device=device), torch.randn(PAIRS, 10, device=device)


def patched_outputs(decoder: nn.Module, base: Tensor, source: Tensor, sites: tuple[str, ...]) -> Iterator[Tensor]:
    """For every unit a forward pass of all pairs with a hook that sets it."""
    modules = dict(decoder.named_modules())
    kept: dict[str, Tensor] = {}
    handles = []
    for site in sites:

        def keep(_module: nn.Module, _args: tuple, out: Tensor, site: str = site) -> None:
            kept[site] = out.clone()

        handles.append(modules[site].register_forward_hook(keep))
    decoder(source)
    for handle in handles:
        handle.remove()
    for site in sites:
        axis = -1 if kept[site].ndim == 3 else 1
        for u in range(kept[site].shape[axis]):

            def hook(
                _module: nn.Module, _args: tuple, out: Tensor, site: str = site, u: int = u, axis: int = axis
            ) -> Tensor:
                out = out.clone()
                out.select(axis, u).copy_(kept[site].select(axis, u))
                return out

            handle = modules[site].register_forward_hook(hook)
            yield decoder(base)
            handle.remove()


def hook_loop(decoder: nn.Module, base: Tensor, source: Tensor, sites: tuple[str, ...]) -> Tensor:
    """What one writes first."""
    y = decoder(base)
    return torch.stack([(p - y).square().mean() for p in patched_outputs(decoder, base, source, sites)])


def tiled(decoder: nn.Module, base: Tensor, source: Tensor, sites: tuple[str, ...], rows: int) -> Tensor:
    """The same loop with channels-last parameters, on so many pairs at a time."""
    with channels_last(decoder, base.device):
        parts = [hook_loop(decoder, base[n : n + rows], source[n : n + rows], sites) for n in range(0, PAIRS, rows)]
    return torch.stack(parts).mean(0)


HOOKS, TILED = "hook loop, batches of 64", "hook loop, best tile, channels_last"
KINDS = [
    *(
        (net, where, form)
        for net in ("conv", "mlp")
        for where in ("all sites", "last site")
        for form in ("ours", HOOKS)
    ),
    *((net, "no kernel behind", form) for net in ("residual", "transformer") for form in ("ours", HOOKS, TILED)),
]


@pytest.mark.parametrize(("net", "where", "form"), KINDS)
@torch.no_grad()
def test_patching(benchmark, net: str, where: str, form: str) -> None:
    decoder, base, source = _decoder(net)
    sites = LAST[net] if where == "last site" else SITES[net]

    def ours() -> Tensor:
        return vf.interventions.patch_sweep(decoder, base, source, sites, replicates=0).tensor[:, 0]

    rows = _best(lambda n: tiled(decoder, base, source, sites, n), TILES) if form == TILED else 0
    call = {
        "ours": ours,
        HOOKS: lambda: hook_loop(decoder, base, source, sites),
        TILED: lambda: tiled(decoder, base, source, sites, rows),
    }[form]
    expected = ours()
    assert torch.allclose(call(), expected, rtol=1e-2, atol=1e-3 * float(expected.max())), "something else is measured"
    patched = PAIRS * len(expected)
    case = f"{net}, {where}: {len(expected)} units x {PAIRS} pairs"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, memory=True, patched=patched)


@pytest.mark.parametrize("form", ["ours", HOOKS])
@torch.no_grad()
def test_recovery(benchmark, form: str) -> None:
    """Of the conv decoder's last site: effects, and distances to the source's output."""
    decoder, base, source = _decoder("conv")
    sites = LAST["conv"]

    def ours() -> tuple[Tensor, Tensor]:
        E = vf.interventions.patch_sweep(decoder, base, source, sites, recovery=True, replicates=0)
        assert E.recovery is not None
        return E.tensor[:, 0], E.recovery

    def hooks() -> tuple[Tensor, Tensor]:
        y, y0 = decoder(source), decoder(base)
        outputs = patched_outputs(decoder, base, source, sites)
        found = [((p - y0).square().mean(), (p - y).square().mean()) for p in outputs]
        effects, near = (torch.stack(f) for f in zip(*found, strict=True))
        return effects, 1 - near / (y0 - y).square().mean()

    call = ours if form == "ours" else hooks
    for got, expected in zip(call(), ours(), strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    units = len(ours()[0])
    case = f"conv, last site with recovery: {units} units x {PAIRS} pairs"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, memory=True, patched=PAIRS * units)


@pytest.mark.parametrize("form", ["ours", HOOKS])
@torch.no_grad()
def test_mediation(benchmark, form: str) -> None:
    """Every channel of the conv decoder's sites as a mediator: pure NIE and pure NDE of the mean output."""
    decoder, base, source = _decoder("conv")
    sites = SITES["conv"][1:]

    def ours() -> tuple[Tensor, Tensor]:
        M = vf.interventions.mediate(decoder, base, source, sites, each=True, per_sample=False, replicates=0)
        return M.nie_pure, M.nde_pure

    def hooks() -> tuple[Tensor, Tensor]:
        y00 = decoder(base)  # differences before means, which would round them away
        nie = torch.stack([(y - y00).mean() for y in patched_outputs(decoder, base, source, sites)])
        nde = torch.stack([(y - y00).mean() for y in patched_outputs(decoder, source, base, sites)])
        return nie, nde

    call = ours if form == "ours" else hooks
    for got, expected in zip(call(), ours(), strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    units = len(ours()[0])
    case = f"conv, mediation: {units} mediators x {PAIRS} pairs"
    measure(
        benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, memory=True, patched=2 * PAIRS * units
    )
