"""Benchmark of the op `direct_edges`: all edges between two layers, 64 pairs, in units of an edge and pair."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast.reference import direct_edges as reference
from vaecirc_fast.reference.latent_sweep import ACTIVATIONS

from .harness import measure

PAIRS = 64
SIZES = {"256 -> 256": (256, 256), "1024 -> 256": (1024, 256), "10 -> 256": (10, 256)}
TILE = 16  # children at once of the vectorised form; the best of 4 to 64 here
HOOKED = 8  # edges that the hook loop does


def _hook_loop(layer: nn.Linear, f: nn.Module, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What a user of hooks writes: patch a parent, freeze all else, run the layer, read a child; one edge a pass."""
    found = []
    with torch.no_grad():
        before = f(layer(base))
        for u in range(HOOKED):

            def patched(_module: nn.Module, args: tuple, u: int = u) -> tuple:
                a = args[0].clone()
                a[:, u] = source[:, u]
                return (a,)

            handle = layer.register_forward_pre_hook(patched)
            found.append((f(layer(base))[:, u] - before[:, u]).abs().mean())
            handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("form", ["ours", "torch, children in tiles", "torch.compile", "hook loop, one edge a pass"])
def test_edges(benchmark, size: str, activation: str, form: str) -> None:
    parents, children = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    base, source = (torch.randn(PAIRS, parents, generator=g).relu().to(device) for _ in range(2))
    layer = nn.Linear(parents, children).to(device)
    f = {"relu": nn.ReLU(), "tanh": nn.Tanh()}[activation]
    weight = layer.weight.detach()
    with torch.no_grad():
        pre = layer(base)
    number, edges = ACTIVATIONS.index(activation), parents * children * PAIRS

    def tiled(weight: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
        return reference.forward(base, source, weight, pre, number, 0.0, 0)

    compiled = torch.compile(tiled)

    def ours() -> None:
        vf.ops.direct_edges(base, source, weight, pre, activation)

    def vectorised() -> None:
        for v in range(0, children, TILE):
            tiled(weight[v : v + TILE], pre[:, v : v + TILE])

    calls = {
        "ours": ours,
        "torch, children in tiles": vectorised,
        "torch.compile": lambda: compiled(weight, pre),
        "hook loop, one edge a pass": lambda: _hook_loop(layer, f, base, source),
    }
    measure(
        benchmark,
        calls[form],
        case=f"{activation} l1, {size}, {PAIRS} pairs",
        form=form,
        ours=form == "ours",
        rounds=15 if form != "hook loop, one edge a pass" else 7,
        edges=edges if not form.startswith("hook") else HOOKED * PAIRS,
    )
