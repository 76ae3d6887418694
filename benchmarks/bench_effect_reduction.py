"""Benchmark of the row `effect_reduction`: against eager torch, torch.compile and the memory's speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

# 105 MB of perturbed outputs, or 839 on a GPU: three times, or ten, the largest cache they should meet.
B, I, P = (512 if torch.cuda.is_available() else 64), 100, 4096
CELLS = vf.groups.cells(64, 64, 8)
ARBITRARY = vf.groups.from_labels(torch.randperm(P, generator=torch.Generator().manual_seed(0)) % 64)


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = torch.rand(B, P, generator=generator).to(device, dtype)
    return base, torch.rand(B, I, P, generator=generator).to(device, dtype)


def _cells(base: Tensor, perturbed: Tensor) -> Tensor:
    """Eager l1 on cells: the regular partition needs no index, only a view."""
    return (perturbed - base[:, None]).abs().view(-1, perturbed.shape[1], 8, 8, 8, 8).mean((3, 5))


def _cells_three(base: Tensor, perturbed: Tensor) -> Tensor:
    d = (perturbed - base[:, None]).view(-1, perturbed.shape[1], 8, 8, 8, 8)
    return torch.stack([d.abs().mean((3, 5)), d.square().mean((3, 5)), d.mean((3, 5))], 2)


def _cells_sigmoid(base: Tensor, perturbed: Tensor) -> Tensor:
    return _cells(base.sigmoid(), perturbed.sigmoid())


def _whole(base: Tensor, perturbed: Tensor) -> Tensor:
    return (perturbed - base[:, None]).abs().mean(2)


def _arbitrary(base: Tensor, perturbed: Tensor) -> Tensor:
    d = (perturbed - base[:, None]).abs()
    return d.new_zeros(*d.shape[:2], 64).index_add_(2, ARBITRARY.labels.to(d.device), d) / 64


# name: (eager form, effect, options of ours, dtype)
CASES = {
    "l1 on 64 cells": (_cells, "l1", {"groups": CELLS}, torch.float32),
    "l1, mse, signed on 64 cells": (_cells_three, ("l1", "mse", "signed"), {"groups": CELLS}, torch.float32),
    "l1 on 64 cells, from logits": (_cells_sigmoid, "l1", {"groups": CELLS, "link": "sigmoid"}, torch.float32),
    "l1 on 64 cells, bfloat16": (_cells, "l1", {"groups": CELLS}, torch.bfloat16),
    "l1 on the whole output": (_whole, "l1", {}, torch.float32),
    "l1 on 64 arbitrary groups": (_arbitrary, "l1", {"groups": ARBITRARY}, torch.float32),
}


def _chunked(eager, base: Tensor, perturbed: Tensor, size: int = 2) -> Tensor:
    """The eager form a few samples at a time, so that its temporaries stay in cache."""
    return torch.cat([eager(b, p) for b, p in zip(base.split(size), perturbed.split(size), strict=True)])


# On a GPU each of our kernels by itself as well: the row's order follows from these figures.
KERNELS = ["ours, triton", "ours, cuda"] if torch.cuda.is_available() else []


def _by(form: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` on the backend that the form names."""

    def forced() -> Tensor:
        with vf.backend(form.removeprefix("ours, ")):
            return call()

    return forced


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["ours", *KERNELS, "eager", "eager in chunks", "torch.compile", "sum of the input"])
def test_forward(benchmark, case: str, form: str) -> None:
    eager, effect, options, dtype = CASES[case]
    base, perturbed = _inputs(dtype)
    if "groups" in options:
        options = {**options, "groups": options["groups"].to(base.device)}
    compiled = torch.compile(eager)

    def ours() -> Tensor:
        return vf.ops.effect_reduction(base, perturbed, effect, **options)

    call = {
        "ours": ours,
        **{kernel: _by(kernel, ours) for kernel in KERNELS},
        "eager": lambda: eager(base, perturbed),
        "eager in chunks": lambda: _chunked(eager, base, perturbed),
        "torch.compile": lambda: compiled(base, perturbed),
        "sum of the input": lambda: perturbed.sum(),  # reads every byte once: the memory's speed
    }[form]
    measure(
        benchmark,
        call,
        case=f"forward, {case}",
        form=form,
        ours=form.startswith("ours"),
        bytes=perturbed.nbytes + base.nbytes,
    )


@pytest.mark.parametrize("form", ["ours", "eager", "torch.compile"])
def test_backward(benchmark, form: str) -> None:
    base, perturbed = _inputs()
    perturbed.requires_grad_()
    compiled = torch.compile(_cells)
    forward = {
        "ours": lambda: vf.ops.effect_reduction(base, perturbed, "l1", groups=CELLS.to(base.device)),
        "eager": lambda: _cells(base, perturbed),
        "torch.compile": lambda: compiled(base, perturbed),
    }[form]

    def step() -> None:
        perturbed.grad = None
        forward().square().sum().backward()

    moved = 3 * perturbed.nbytes  # read forward, read backward, written backward
    measure(
        benchmark,
        step,
        case="forward and backward, l1 on 64 cells",
        form=form,
        ours=form.startswith("ours"),
        bytes=moved,
    )
