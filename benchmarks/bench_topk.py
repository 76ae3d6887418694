"""Benchmark of the row `topk`: against torch.topk, eager and compiled, and the memory's speed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

B = 4096


def _normal(M: int, dtype: torch.dtype = torch.float32) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(B, M, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _few_positives(M: int) -> Tensor:
    """After a ReLU: some 20 of a row are positive, the rest are zeros."""
    a = _normal(M)
    return torch.where(torch.rand_like(a) < 20 / M, a.abs(), 0.0)


def _steps(M: int) -> Tensor:
    """Multiples of 1/4: every value many times."""
    return _normal(M).mul(4).round().div(4)


# name: (input, k, sorted)
CASES = {
    **{f"{B} x {M:,}, k = {k}": (lambda M=M: _normal(M), k, False) for M in (512, 4096, 16384) for k in (32, 50)},
    f"{B} x 4,096, k = 32, sorted": (lambda: _normal(4096), 32, True),
    f"{B} x 4,096, k = 32, bfloat16": (lambda: _normal(4096, torch.bfloat16), 32, False),
    f"{B} x 512, k = 50, fewer positives than k": (lambda: _few_positives(512), 50, False),
    f"{B} x 4,096, k = 50, fewer positives than k": (lambda: _few_positives(4096), 50, False),
    f"{B} x 4,096, k = 50, many ties": (lambda: _steps(4096), 50, False),
    f"{B} x 4,096, k = 50, all equal": (lambda: torch.ones_like(_normal(4096)), 50, False),
    f"{B} x 512, k = 256": (lambda: _normal(512), 256, False),
    f"{B} x 4,096, k = 2048": (lambda: _normal(4096), 2048, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["ours", "torch.topk", "torch.compile", "sum of the input"])
def test_forward(benchmark, case: str, form: str) -> None:
    make, k, by_value = CASES[case]
    a = make()
    compiled = torch.compile(lambda a: torch.topk(a, k, sorted=by_value))
    call = {
        "ours": lambda: vf.ops.topk(a, k, sorted=by_value),
        "torch.topk": lambda: torch.topk(a, k, sorted=by_value),
        "torch.compile": lambda: compiled(a),
        "sum of the input": lambda: a.sum(),  # reads every byte once: the memory's speed
    }[form]
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=5, bytes=a.nbytes)


@pytest.mark.parametrize("form", ["ours", "torch.topk"])
def test_backward(benchmark, form: str) -> None:
    a, k = _normal(4096).requires_grad_(), 32
    forward = {"ours": lambda: vf.ops.topk(a, k)[0], "torch.topk": lambda: torch.topk(a, k, sorted=False)[0]}[form]

    def step() -> None:
        a.grad = None
        forward().square().sum().backward()

    case = f"forward and backward, {B} x 4,096, k = 32"
    measure(benchmark, step, case=case, form=form, ours=form == "ours", rounds=5, bytes=2 * a.nbytes)
