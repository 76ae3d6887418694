"""Benchmark of the latent sweep on the two reference decoders: the generic engine against a hook loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.interventions.grids import symmetric

from .harness import measure

SAMPLES, LATENTS, STEPS = 64, 10, 10  # the grid "fixed": 11 steps less the zero that is never decoded
DECODES = SAMPLES * LATENTS * STEPS
GROUPS = vf.groups.cells(64, 64, 8)


def _decoder(net: str) -> torch.nn.Module:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return vf.models.build("vae", (1, 64, 64), latents=LATENTS, net=net).decoder.eval().to(device)


def _hook_loop(decoder: torch.nn.Module, z: Tensor) -> Tensor:
    """What one writes first: a hook that shifts one latent, and a forward pass of all samples per (latent, step)."""
    effects = z.new_zeros(LATENTS, STEPS, 64)
    base = decoder(z)
    for i in range(LATENTS):
        for s, delta in enumerate(symmetric(5, 0.6).tolist()):

            def shift(_module, inputs, i=i, delta=delta):
                moved = inputs[0].clone()
                moved[:, i] += delta
                return (moved,)

            handle = decoder.register_forward_pre_hook(shift)
            y = decoder(z)
            handle.remove()
            effects[i, s] = (y - base).abs().view(SAMPLES, 8, 8, 8, 8).mean((0, 2, 4)).flatten()
    return effects


def _materialised(decoder: torch.nn.Module, z: Tensor) -> Tensor:
    """Every perturbed output at once."""
    delta = symmetric(5, 0.6).to(z)
    codes = z[:, None, None].repeat(1, LATENTS, STEPS, 1)
    for i in range(LATENTS):
        codes[:, i, :, i] += delta
    y = decoder(codes.flatten(0, 2)).view(SAMPLES, -1, 8, 8, 8, 8)
    base = decoder(z).view(SAMPLES, 1, 8, 8, 8, 8)
    return (y - base).abs().mean((0, 3, 5)).view(LATENTS, STEPS, 64)


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("form", ["ours", "hook loop", "materialised"])
def test_sweep(benchmark, net: str, form: str) -> None:
    decoder = _decoder(net)
    z = torch.randn(SAMPLES, LATENTS, generator=torch.Generator().manual_seed(0)).to(next(decoder.parameters()).device)
    forms: dict[str, Callable[[], object]] = {
        "ours": lambda: vf.latent_sweep(decoder, z, groups=GROUPS, replicates=0),
        "hook loop": lambda: _hook_loop(decoder, z),
        "materialised": lambda: _materialised(decoder, z),
    }
    with torch.no_grad():
        call = forms[form]
        case = f"{net} decoder, {SAMPLES} samples x {LATENTS} latents x {STEPS} steps"
        measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, decodes=DECODES)
