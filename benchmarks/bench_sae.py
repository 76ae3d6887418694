"""Benchmark of whole training steps of sparse autoencoders: forward, backward and Adam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

SHAPES = {"4096 x 64 -> 500, k 50": (4096, 64, 500, 50), "1024 x 512 -> 16384, k 32": (1024, 512, 16384, 32)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR = 1e-3


def _module(shape: str, kind: str) -> tuple[vf.nn.SparseAutoencoder, Tensor]:
    B, D, M, k = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    if kind == "BatchTopK":
        sae: vf.nn.SparseAutoencoder = vf.nn.BatchTopKSAE(D, M, k, generator=g)
    elif kind == "L1":
        sae = vf.nn.L1SAE(D, M, generator=g)
    else:
        sae = vf.nn.TopKSAE(D, M, k, k_aux=D // 2 if kind == "AuxK" else 0, generator=g)
        sae.since_fired[: M // 4] = sae.dead_after  # a quarter is dead
    return sae.to(DEVICE), torch.randn(B, D, generator=g).to(DEVICE)


def _plain(sae: vf.nn.SparseAutoencoder, kind: str, k: int) -> Callable[[Tensor], Tensor]:
    """The loss in plain torch: product, ReLU, topk, scatter, dense decoder."""

    def loss(x: Tensor) -> Tensor:
        acts = ((x - sae.b_dec) @ sae.w_enc.T + sae.b_enc).relu()
        if isinstance(sae, vf.nn.L1SAE):
            y = acts @ torch.nn.functional.normalize(sae.w_dec) + sae.b_dec
            return (y - x).square().sum(1).mean() + sae.l1_coefficient * acts.sum(1).mean()
        flat = acts.flatten() if kind == "BatchTopK" else acts
        values, indices = torch.topk(flat, k * len(x) if kind == "BatchTopK" else k, sorted=False)
        codes = torch.zeros_like(flat).scatter(-1, indices, values).view_as(acts)
        y = codes @ sae.w_dec + sae.b_dec
        error = (y - x).square().sum(1).mean()
        if kind != "AuxK":
            return error
        values, indices = torch.topk(acts * sae.dead, sae.d_in // 2, sorted=False)
        revived = torch.zeros_like(acts).scatter(1, indices, values) @ sae.w_dec
        return error + ((x - y).detach() - revived).square().sum(1).mean() / 32

    return loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["TopK", "AuxK", "BatchTopK", "L1"])
@pytest.mark.parametrize("form", ["ours, SparseAdam", "ours, torch.optim.Adam", "eager", "torch.compile"])
def test_step(benchmark, shape: str, kind: str, form: str) -> None:
    if kind in ("BatchTopK", "L1") and form == "ours, SparseAdam":
        pytest.skip("SparseAdam is for TopKSAE")
    sae, x = _module(shape, kind)
    dead = sae.since_fired.clone()
    ours = form.startswith("ours")
    loss = (lambda x: sae(x).loss) if ours else _plain(sae, kind, SHAPES[shape][3])
    if form == "torch.compile":
        loss = torch.compile(loss)
    if form == "ours, SparseAdam":
        assert isinstance(sae, vf.nn.TopKSAE)
        optimizer: torch.optim.Optimizer = vf.nn.SparseAdam(sae, LR)
    else:
        optimizer = torch.optim.Adam(sae.parameters(), LR)

    def step() -> None:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        sae.since_fired.copy_(dead)  # the same latents are dead in every step

    case = f"step of {kind}, {shape}"
    measure(benchmark, step, case=case, form=form, ours=ours, rounds=5, rows=len(x))
