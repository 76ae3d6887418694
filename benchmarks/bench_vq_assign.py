"""Benchmark of the op `vq_assign`: nearest codes with their distances, and with the sums that a codebook needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

SIZES = {
    "N = 640, K = 512, D = 16": (640, 512, 16),
    "N = 65536, K = 512, D = 64": (65536, 512, 64),
    "N = 16384, K = 1024, D = 64": (16384, 1024, 64),
    "N = 4096, K = 16384, D = 32": (4096, 16384, 32),
}
SCORES = 1 << 18  # of a chunk of the chunked form: the best of 2^16 to 2^22 on a CPU
FORMS = ("ours", "torch, addmm in chunks", "torch, addmm", "torch, cdist", "torch.compile")


def _addmm(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published form without |z|^2, which chooses the same codes; the distance from the code that was chosen."""
    half = codebook.square().sum(1) / 2
    indices = torch.addmm(half, z, codebook.T, alpha=-1).argmin(1)
    z_q = codebook[indices]
    return indices, z_q, (z - z_q).square().sum(1)


def _cdist(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distance, indices = torch.cdist(z, codebook).min(1)
    return indices, codebook[indices], distance.square()


def _chunked(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, (SCORES if z.device.type == "cpu" else 1 << 26) // len(codebook))
    parts = [_addmm(part, codebook) for part in z.split(rows)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _with_totals(call: Callable) -> Callable:
    def run(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        indices, z_q, distance = call(z, codebook)
        counts = torch.zeros(len(codebook), device=z.device).index_add_(0, indices, torch.ones_like(distance))
        return indices, z_q, distance, counts, torch.zeros_like(codebook).index_add_(0, indices, z)

    return run


def _call(form: str, totals: bool) -> Callable:
    if form == "ours":
        return lambda z, codebook: vf.ops.vq_assign(z, codebook, totals=totals)
    call = {"torch, addmm in chunks": _chunked, "torch, cdist": _cdist}.get(form, _addmm)
    call = _with_totals(call) if totals else call
    return torch.compile(call) if form == "torch.compile" else call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("totals", [False, True], ids=["codes", "codes and sums"])
@pytest.mark.parametrize("form", FORMS)
def test_nearest_codes(benchmark, size: str, totals: bool, form: str) -> None:
    N, K, D = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(rows, D, generator=g).to(device) for rows in (N, K))
    call = _call(form, totals)
    measure(
        benchmark,
        lambda: call(z, codebook),
        case=f"{size}, {'codes and sums' if totals else 'codes'}",
        form=form,
        ours=form == "ours",
        rounds=15 if form == "ours" or N < 1000 else 5,
        memory=True,
    )
