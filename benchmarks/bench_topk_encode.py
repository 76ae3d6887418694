"""Benchmark of the row `topk_encode`: against plain torch, eager and compiled, and the product alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.ops._product import linear

from .harness import measure

# B, D, M, k
SIZES = [(4096, 64, 500, 50), (1024, 64, 500, 50), (2048, 256, 4096, 32), (1024, 512, 16384, 32)]


def _inputs(B: int, D: int, M: int, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = torch.randn(B, D, generator=generator), torch.randn(M, D, generator=generator) / D**0.5
    return x.to(device), w.to(device), torch.full((M,), bias, device=device)


def _plain(k: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def plain(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(torch.relu(torch.nn.functional.linear(x, w, b)), k, sorted=False)

    return plain


def _plain_onednn(k: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same on oneDNN's product, which torch has but does not offer: what ours uses too."""
    if torch.cuda.is_available():
        pytest.skip("oneDNN is of the CPU")

    def plain(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(torch.relu(linear(x, w).add_(b)), k, sorted=False)

    return plain


def _name(B: int, D: int, M: int, k: int) -> str:
    return f"{B} x {D} to {M:,} latents, k = {k}"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: _name(*size))
@pytest.mark.parametrize("form", ["ours", "plain torch", "torch.compile", "plain, oneDNN", "the product alone"])
def test_forward(benchmark, size: tuple[int, int, int, int], form: str) -> None:
    B, D, M, k = size
    x, w, b = _inputs(B, D, M)
    plain = _plain(k)
    compiled = torch.compile(plain)
    call = {
        "ours": lambda: vf.ops.topk_encode(x, w, b, k),
        "plain torch": lambda: plain(x, w, b),
        "torch.compile": lambda: compiled(x, w, b),
        "the product alone": lambda: linear(x, w),
    }.get(form)
    if call is None:
        onednn = _plain_onednn(k)
        call = lambda: onednn(x, w, b)  # noqa: E731
    measure(benchmark, call, case=_name(*size), form=form, ours=form == "ours", rounds=7)


@pytest.mark.parametrize("form", ["ours", "plain torch", "torch.compile"])
def test_fewer_positives_than_k(benchmark, form: str) -> None:
    B, D, M, k = SIZES[0]
    x, w, b = _inputs(B, D, M, bias=-2.0)
    plain = _plain(k)
    compiled = torch.compile(plain)
    call = {
        "ours": lambda: vf.ops.topk_encode(x, w, b, k),
        "plain torch": lambda: plain(x, w, b),
        "torch.compile": lambda: compiled(x, w, b),
    }[form]
    measure(benchmark, call, case=f"{_name(B, D, M, k)}, fewer positive", form=form, ours=form == "ours", rounds=7)


@pytest.mark.parametrize("form", ["ours", "plain torch"])
def test_fired_and_dead(benchmark, form: str) -> None:
    """Counts of fired latents and a second list among the dead, as AuxK needs them."""
    B, D, M, k = SIZES[0]
    x, w, b = _inputs(B, D, M)
    dead = torch.arange(M, device=x.device) % 10 == 0

    def plain() -> tuple[Tensor, ...]:
        act = torch.relu(torch.nn.functional.linear(x, w, b))
        values, indices = torch.topk(act, k, sorted=False)
        fired = torch.bincount(indices[values > 0], minlength=M)
        aux = torch.topk(torch.where(dead, act, -torch.inf), 32, sorted=False)
        return values, indices, fired, *aux

    call = {
        "ours": lambda: vf.ops.topk_encode(x, w, b, k, fired=True, dead=dead, k_aux=32),
        "plain torch": plain,
    }[form]
    case = f"{_name(B, D, M, k)}, fired, 32 of 50 dead"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=7)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("size", SIZES[:3], ids=lambda size: _name(*size))
@pytest.mark.parametrize("form", ["ours", "plain torch", "ours, of each row"])
def test_batch(benchmark, size: tuple[int, int, int, int], form: str, activation: str) -> None:
    """BatchTopK: the k B largest of all rows; plain torch sorts nothing but one flat array, and gives flat indices."""
    B, D, M, k = size
    x, w, b = _inputs(B, D, M)

    def plain() -> tuple[Tensor, Tensor]:
        act = torch.nn.functional.linear(x, w, b)
        return torch.topk((act.relu() if activation == "relu" else act).flatten(), k * B, sorted=False)

    call = {
        "ours": lambda: vf.ops.topk_encode(x, w, b, k, activation=activation, scope="batch"),
        "plain torch": plain,
        "ours, of each row": lambda: vf.ops.topk_encode(x, w, b, k, activation=activation),
    }[form]
    measure(benchmark, call, case=f"batch, {activation}, {_name(*size)}", form=form, ours=form == "ours", rounds=7)
