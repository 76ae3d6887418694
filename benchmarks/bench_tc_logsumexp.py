"""Benchmark of the op `tc_logsumexp`: the densities of beta-TCVAE's total correlation, forward and with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

SIZES = {"B = 2048, L = 10": (2048, 10), "B = 64, L = 10": (64, 10)}
DATASET = 737_280
CHUNK = 8  # codes at once of the chunked form: the best of 2 to 64 here, as is posteriors last in memory
FORMS = ("ours", "torch, codes in chunks", "torch", "torch.compile")


def _densities(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The published form with posteriors in the last dimension, which is 2 to 3 times as fast as latents there."""
    scale = torch.exp(-logvar / 2).T.contiguous() * math.sqrt(0.5)
    constant = ((logvar + math.log(2 * math.pi)) / 2).T.contiguous()
    u = (z[:, :, None] - mu.T.contiguous()) * scale
    density = torch.addcmul(constant, u, u).neg()
    weight = -math.log(DATASET) - math.log(len(mu))
    return density.sum(1).logsumexp(1) + weight, density.logsumexp(2) + weight


def _ours(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return vf.ops.tc_logsumexp(z, mu, logvar, kind="mws", dataset_size=DATASET)


def _call(densities: Callable, inputs: list[Tensor], chunk: int, gradients: bool) -> Callable[[], None]:
    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        for part in inputs[0].split(chunk):
            with torch.set_grad_enabled(gradients):
                joint, marginals = densities(part, *inputs[1:])
                if gradients:
                    (joint - marginals.sum(1)).sum().backward()

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("form", FORMS)
def test_densities(benchmark, size: str, gradients: bool, form: str) -> None:
    rows, latents = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, latents, generator=g) for _ in range(3)]
    inputs = [t.to(device).requires_grad_(gradients) for t in inputs]
    chunk = CHUNK if "chunks" in form and device == "cpu" else 256 if "chunks" in form else rows
    densities = _ours if form == "ours" else torch.compile(_densities) if form == "torch.compile" else _densities
    measure(
        benchmark,
        _call(densities, inputs, chunk, gradients),
        case=f"{size}, {'forward and gradients' if gradients else 'forward'}",
        form=form,
        ours=form == "ours",
        rounds=15 if form == "ours" else 5,
        memory=True,
    )
