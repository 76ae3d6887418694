"""Benchmark of the row `sparse_adam`: a step from codes, against dense gradients and the forms of torch's Adam."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.ops.sparse_decode import accumulate

from .harness import measure

# B, D, M, K: a planted circuit's layer, and a dictionary.
SHAPES = {"small": (4096, 64, 500, 50), "large": (1024, 512, 16384, 32)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["ours", "our gradient, fused Adam", "dense, fused Adam", "dense, foreach Adam", "dense, torch.compile"]


def _inputs(size: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices (as ours and as torch's ops take them), g and the matrix."""
    B, D, M, K = SHAPES[size]
    generator = torch.Generator().manual_seed(0)
    # Distinct and ascending, as a top-k gives them.
    indices = torch.rand(B, M, generator=generator).topk(K, sorted=False).indices.sort().values
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731
    return normal(B, K), indices.int().to(DEVICE), indices.to(DEVICE), normal(B, D), normal(M, D)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_step(benchmark, size: str, form: str) -> None:
    """The gradient of a matrix from the gradients of its codes, and Adam."""
    values, own, indices, g, param = _inputs(size)
    moments = torch.zeros_like(param), torch.zeros_like(param)
    foreach = form == "dense, foreach Adam"
    param.grad = torch.zeros_like(param)
    optimiser = torch.optim.Adam([param], lr=1e-3, foreach=foreach, fused=not foreach)
    optimiser.step()  # makes its state

    @torch.compile
    def compiled(param: Tensor, m: Tensor, v: Tensor, grad: Tensor) -> None:
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        param.addcdiv_(m, (v.sqrt() / 0.5).add_(1e-8), value=-0.01)

    def dense() -> Tensor:
        return values.new_zeros(len(values), len(param)).scatter(1, indices, values).T @ g

    def ours() -> None:
        vf.ops.sparse_adam(param, *moments, values, own, g, lr=1e-3, step=5)

    def theirs() -> None:
        param.grad = accumulate(values, own, g, len(param))[0] if form == FORMS[1] else dense()
        optimiser.step()

    call = {"ours": ours, "dense, torch.compile": lambda: compiled(param, *moments, dense())}.get(form, theirs)
    case = "Adam, B {}, D {}, M {}, K {}".format(*SHAPES[size])
    moved = 6 * param.nbytes  # parameter and moments, read and written
    rounds = 15 if size == "small" or DEVICE == "cuda" or form == "ours" else 7
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=rounds, bytes=moved)


@pytest.mark.parametrize("form", ["ours", "copied"])
def test_memory(benchmark, form: str) -> None:
    """What three matrices of the large step cost that are read and written, and nothing else."""
    values, own, _, g, param = _inputs("large")
    moments = torch.zeros_like(param), torch.zeros_like(param)

    def copied() -> None:
        for tensor in (param, *moments):
            tensor.mul_(1.0)

    def ours() -> None:
        vf.ops.sparse_adam(param, *moments, values, own, g, lr=1e-3, step=5)

    call = ours if form == "ours" else copied
    case = "the memory's speed, D {1}, M {2}".format(*SHAPES["large"])
    measure(benchmark, call, case=case, form=form, ours=form == "ours", bytes=6 * param.nbytes)
