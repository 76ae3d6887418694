"""Benchmark of the row `sparse_decode`: forward, both gradients and all of them, against dense products and bags."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.ops.sparse_decode import accumulate, grad_values

from .harness import measure

# B, D, M, K: a planted circuit's layer, and a dictionary.
SHAPES = {"small": (4096, 64, 500, 50), "large": (1024, 512, 16384, 32)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["ours", "dense", "embedding_bag", "gathered", "torch.compile"]


def _inputs(size: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices (as ours and as torch's ops take them), w and the gradient of y."""
    B, D, M, K = SHAPES[size]
    generator = torch.Generator().manual_seed(0)
    # Distinct and ascending, as a top-k gives them.
    indices = torch.rand(B, M, generator=generator).topk(K, sorted=False).indices.sort().values
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731
    return normal(B, K), indices.int().to(DEVICE), indices.to(DEVICE), normal(M, D), normal(B, D)


def _dense(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return values.new_zeros(len(values), len(w)).scatter(1, indices, values) @ w


def _bag(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return F.embedding_bag(indices, w, mode="sum", per_sample_weights=values)


def _gathered(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return (values[:, :, None] * w[indices]).sum(1)


def _ours(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    y = vf.ops.sparse_decode(values, indices, w)
    assert isinstance(y, Tensor)
    return y


def _forms() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    compiled = torch.compile(_gathered)
    return {
        "ours": _ours,
        "dense": _dense,
        "embedding_bag": _bag,
        "gathered": _gathered,
        "torch.compile": compiled,
    }


def _rounds(size: str, form: str) -> int:
    return 15 if size == "small" or form == "ours" or DEVICE == "cuda" else 5


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark, size: str, form: str) -> None:
    values, own, indices, w, _ = _inputs(size)
    decode = _forms()[form]
    at = own if form == "ours" else indices
    case = "forward, B {}, D {}, M {}, K {}".format(*SHAPES[size])
    rounds = _rounds(size, form)
    measure(benchmark, lambda: decode(values, at, w), case=case, form=form, ours=form == "ours", rounds=rounds)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", ["ours", "dense", "gathered"])
def test_gradient_of_values(benchmark, size: str, form: str) -> None:
    _, own, indices, w, g = _inputs(size)
    call = {
        "ours": lambda: grad_values(own, w, g),
        "dense": lambda: (g @ w.T).gather(1, indices),
        "gathered": lambda: torch.einsum("bkd,bd->bk", w[indices], g),
    }[form]
    case = "gradient of values, B {}, D {}, M {}, K {}".format(*SHAPES[size])
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=_rounds(size, form))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", ["ours", "dense", "index_add"])
def test_gradient_of_w(benchmark, size: str, form: str) -> None:
    values, own, indices, w, g = _inputs(size)
    codes = lambda: values.new_zeros(len(values), len(w)).scatter(1, indices, values)  # noqa: E731
    terms = lambda: (values[:, :, None] * g[:, None]).flatten(0, 1)  # noqa: E731
    call = {
        "ours": lambda: accumulate(values, own, g, len(w)),
        "dense": lambda: codes().T @ g,
        "index_add": lambda: torch.zeros_like(w).index_add_(0, indices.flatten(), terms()),
    }[form]
    case = "gradient of w, B {}, D {}, M {}, K {}".format(*SHAPES[size])
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=_rounds(size, form))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward(benchmark, size: str, form: str) -> None:
    """With the squared error of a reconstruction, as a sparse autoencoder is trained."""
    values, own, indices, w, target = _inputs(size)
    values.requires_grad_()
    w.requires_grad_()
    decode = _forms()[form]

    def ours() -> None:
        _, error = vf.ops.sparse_decode(values, own, w, target=target)
        torch.autograd.grad(error.mean(), (values, w))

    def theirs() -> None:
        error = (decode(values, indices, w) - target).square().sum(1)
        torch.autograd.grad(error.mean(), (values, w))

    case = "squared error and its gradients, B {}, D {}, M {}, K {}".format(*SHAPES[size])
    call = ours if form == "ours" else theirs
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=_rounds(size, form))
