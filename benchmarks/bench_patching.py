"""Benchmark of activation patching: every unit of every decoder site, against a loop of hooks and eager suffixes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vaecirc_fast as vf

from .harness import measure

PAIRS = 64
SITES = {"conv": ("fc1", "ct1", "ct2", "ct3"), "mlp": ("fc1", "fc2", "fc3")}
LAST = {"conv": ("ct3",), "mlp": ("fc3",)}


@cache
def _decoder(net: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = vf.models.build("vae", (1, 64, 64), latents=10, net=net).decoder.eval().to(device)
    return decoder, torch.randn(PAIRS, 10, device=device), torch.randn(PAIRS, 10, device=device)


def hook_loop(decoder: nn.Module, base: Tensor, source: Tensor, sites: tuple[str, ...]) -> Tensor:
    """What one writes first: for every unit a forward pass of all pairs with a hook that sets it."""
    modules, effects = dict(decoder.named_modules()), []
    kept: dict[str, Tensor] = {}
    handles = []
    for site in sites:

        def keep(_module: nn.Module, _args: tuple, out: Tensor, site: str = site) -> None:
            kept[site] = out.clone()

        handles.append(modules[site].register_forward_hook(keep))
    decoder(source)
    for handle in handles:
        handle.remove()
    y = decoder(base)
    for site in sites:
        for u in range(kept[site].shape[1]):

            def hook(_module: nn.Module, _args: tuple, out: Tensor, site: str = site, u: int = u) -> Tensor:
                out = out.clone()
                out[:, u] = kept[site][:, u]
                return out

            handle = modules[site].register_forward_hook(hook)
            effects.append((decoder(base) - y).square().mean())
            handle.remove()
    return torch.stack(effects)


@pytest.mark.parametrize("form", ["ours", "hook loop, batches of 64"])
@pytest.mark.parametrize("where", ["all sites", "last site"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
@torch.no_grad()
def test_patching(benchmark, net: str, where: str, form: str) -> None:
    decoder, base, source = _decoder(net)
    sites = SITES[net] if where == "all sites" else LAST[net]

    def ours() -> Tensor:
        return vf.interventions.patch_sweep(decoder, base, source, sites, replicates=0).tensor[:, 0]

    call = ours if form == "ours" else lambda: hook_loop(decoder, base, source, sites)
    expected = ours()
    assert torch.allclose(call(), expected, rtol=1e-2, atol=1e-3 * float(expected.max())), "something else is measured"
    patched = PAIRS * len(expected)
    case = f"{net} decoder, {where}: {len(expected)} units x {PAIRS} pairs"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, memory=True, patched=patched)
