"""Benchmark of the op `threshold_encode`: an L1 and a JumpReLU encoder, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

SHAPES = {"4096 x 64 -> 500": (4096, 64, 500), "1024 x 256 -> 4096": (1024, 256, 4096)}
BANDWIDTH = 0.1


class _Step(torch.autograd.Function):
    """The number of p > t, with the straight-through gradient, as its authors' code has it."""

    @staticmethod
    def forward(ctx, p: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(p, t)
        return (p > t).to(p)

    @staticmethod
    def backward(ctx, grad: Tensor):
        p, t = ctx.saved_tensors
        near = ((p - t) / BANDWIDTH).abs() < 0.5
        return None, -(near * grad).sum(0) / BANDWIDTH


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(p, t)
        return p * (p > t)

    @staticmethod
    def backward(ctx, grad: Tensor):
        p, t = ctx.saved_tensors
        near = ((p - t) / BANDWIDTH).abs() < 0.5
        return (p > t) * grad, -(t * near * grad).sum(0) / BANDWIDTH


def _plain(x: Tensor, w: Tensor, b: Tensor, t: Tensor, kind: str):
    pre = torch.nn.functional.linear(x, w, b)
    if kind == "relu":
        acts = pre.relu()
        return acts, acts.abs().sum(1), (acts > 0).sum(0)
    acts = _Jump.apply(pre, t)
    return acts, _Step.apply(pre, t).sum(1), (acts > 0).sum(0)


def _ours(x: Tensor, w: Tensor, b: Tensor, t: Tensor, kind: str):
    out: Any = vf.ops.threshold_encode(x, w, b, t if kind == "jump" else 0.0, kind, bandwidth=BANDWIDTH, counts=True)
    return out.acts, out.penalty if kind == "relu" else out.l0, out.fired


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["relu", "jump"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("form", ["ours", "eager", "torch.compile", "the product alone"])
def test_encode(benchmark, shape: str, kind: str, backward: bool, form: str) -> None:
    B, D, M = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=g).to(device)
    w = (torch.randn(M, D, generator=g) / D**0.5).to(device).requires_grad_(backward)
    b = torch.zeros(M, device=device, requires_grad=backward)
    t = torch.full((M,), 0.5, device=device, requires_grad=backward)
    compiled = torch.compile(_plain)
    upstream = torch.randn(B, M, generator=g).to(device)

    def step() -> None:
        if form == "the product alone":
            pre = x @ w.detach().T
            if backward:
                torch.mm(pre.T, x)
                if kind == "jump":
                    torch.mm(x, w.detach().T, out=pre)  # ours makes it again
            return
        encode = {"ours": _ours, "eager": _plain, "torch.compile": compiled}[form]
        acts, penalty, _ = encode(x, w, b, t, kind)
        if backward:
            leaves = (w, b) if kind == "relu" else (w, b, t)
            torch.autograd.grad([acts, penalty], leaves, [upstream, torch.ones_like(penalty)])

    case = f"{kind}, {shape}, {'forward and backward' if backward else 'forward'}"
    measure(benchmark, step, case=case, form=form, ours=form == "ours", rounds=7, rows=B)
