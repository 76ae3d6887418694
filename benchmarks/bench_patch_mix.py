"""Benchmark of patch_mix: every channel of a convolution of the decoder of images patched by itself, against hooks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vaecirc_fast as vf
from vaecirc_fast.interventions.networks import record

from .bench_latent_sweep import _best
from .harness import measure

PAIRS = 64
GROUPS = vf.groups.cells(64, 64, 8)
TILES = (8, 16, 32, 64)  # rows of a chunk, of which eager takes the best
SITES = ("ct1", "ct2", "ct3")


@cache
def _decoder() -> nn.Module:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return vf.models.build("vae", (1, 64, 64), latents=10, net="conv").decoder.eval().to(device)


def _behind(decoder: nn.Module, site: str) -> nn.Sequential:
    """The layers behind a site and its activation, channels last."""
    torch.manual_seed(0)
    names = [*SITES, "ct4"]
    layers: list[nn.Module] = []
    for name in names[names.index(site) + 1 :]:
        old = getattr(decoder, name)
        new = nn.ConvTranspose2d(old.in_channels, old.out_channels, 4, 2, 1)
        new.load_state_dict(old.state_dict())
        layers += [new.to(old.weight), nn.ReLU() if name != "ct4" else nn.Sigmoid()]
    behind = nn.Sequential(*layers)
    for p in behind.parameters():
        p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    return behind


def _cells(y: Tensor, base: Tensor) -> Tensor:
    """Mean |y - base| by cell: (rows, 64)."""
    return (y - base).abs().view(-1, 8, 8, 8, 8).mean((2, 4)).flatten(1)


def _activations(decoder: nn.Module, z: Tensor, site: str) -> Tensor:
    return vf.interventions.run_with_cache(decoder, z, [site])[1][site]


def hook_loop(decoder: nn.Module, z: Tensor, source: Tensor, site: str) -> Tensor:
    """What one writes first: a hook that sets one channel, and a forward pass of all pairs for each."""
    base, found = decoder(z), []
    for u in range(source.shape[1]):

        def patch(_module, _inputs, out, u=u):
            out = out.clone()
            out[:, u] = source[:, u]
            return out

        handle = getattr(decoder, site).register_forward_hook(patch)
        found.append(_cells(decoder(z), base))
        handle.remove()
    return torch.stack(found, 1)


def suffix(behind: nn.Module, base: Tensor, source: Tensor, rows: int) -> Tensor:
    """By hand: only the layers behind, on chunks of rows that fit the cache, reduced at once."""
    y0, channels = behind(base), base.shape[1]
    pair = torch.arange(len(base), device=base.device).repeat_interleave(channels)
    unit = torch.arange(channels, device=base.device).repeat(len(base))
    found = []
    for n in range(0, len(pair), rows):
        p, u = pair[n : n + rows], unit[n : n + rows]
        mixed = base[p].contiguous(memory_format=torch.channels_last)
        mixed[torch.arange(len(p)), u] = source[p, u]
        found.append(_cells(behind(mixed), y0[p]))
    return torch.cat(found).view(len(base), channels, 64)


@pytest.mark.parametrize("form", ["ours", "hook loop", "eager suffix, best chunk, channels_last"])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_patches(benchmark, site: str, form: str) -> None:
    decoder = _decoder()
    generator = torch.Generator().manual_seed(0)
    z, other = (torch.randn(PAIRS, 10, generator=generator).to(next(decoder.parameters()).device) for _ in "ab")
    base, source = _activations(decoder, z, site), _activations(decoder, other, site)
    behind, channels = _behind(decoder, site), base.shape[1]
    start, given = F.relu(base), F.relu(source)
    network = record(behind, start[:1], images=True).network
    assert network is not None
    labels = torch.arange(channels, device=z.device).repeat_interleave(start[0, 0].numel()).int()
    units = torch.arange(channels, device=z.device)

    def ours() -> Tensor:
        return vf.ops.patch_mix(start.flatten(1), given.flatten(1), labels, units, network, groups=GROUPS)

    rows = _best(lambda n: suffix(behind, start, given, n), TILES) if form.startswith("eager") else 0
    call = {
        "ours": ours,
        "hook loop": lambda: hook_loop(decoder, z, source, site),
        "eager suffix, best chunk, channels_last": lambda: suffix(behind, start, given, rows),
    }[form]
    assert torch.allclose(call(), ours(), rtol=1e-3, atol=1e-6), f"{form} measures something else"
    case = f"conv decoder, {PAIRS} pairs x {channels} channels of {site}"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, memory=True, decodes=PAIRS * channels)
