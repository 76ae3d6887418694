"""Benchmark of the row `render_sprites`: the whole grid and random batches, against torch, numpy and stored images."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.reference import render_sprites as reference

from .harness import measure

BATCH = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = vf.data.load("dsprites", device=DEVICE)
# The slow forms draw these only, spread over the grid; ratios are per image.
SUBSET = {"torch reference": 4096, "numpy": 512}


@functools.cache
def _grid() -> Tensor:
    return DATA.factors(torch.arange(len(DATA)))


@functools.cache
def _memory(dtype: str) -> Tensor:
    """Room for all images, in bits or bytes; used before."""
    return vf.ops.render_sprites(_grid(), dtype=dtype)


@functools.cache
def _geometry() -> tuple[np.ndarray, np.ndarray]:
    return reference.sprite_outlines().numpy(), reference.sprite_centres().numpy()


def _numpy(factors: np.ndarray) -> np.ndarray:
    """What one writes first: image by image, the edges that cross each row of pixel centres, then the parity."""
    outlines, centres = _geometry()
    middle = 256 * np.arange(64) + 128
    images = np.empty((len(factors), 64, 64), np.uint8)
    for image, (_, shape, scale, orientation, *place) in zip(images, factors, strict=True):
        x, y = np.rint((outlines[shape, scale, orientation] + centres[place]) * 256).astype(np.int64).T
        x1, y1 = np.roll(x, -1), np.roll(y, -1)
        edge, row = np.nonzero((y[:, None] <= middle) != (y1[:, None] <= middle))
        rise, run = (y1 - y)[edge], (x1 - x)[edge] * np.sign(y1 - y)[edge]
        column = -(((128 - x[edge]) * abs(rise) - (middle[row] - y[edge]) * run) // (256 * abs(rise)))
        image[:] = np.bincount(row * 64 + column, minlength=4096).reshape(64, 64).cumsum(1) % 2
    return images


def _some(count: int) -> Tensor:
    return DATA.factors(torch.arange(count, device=DEVICE) * len(DATA) // count)


def _check_numpy() -> None:
    factors = _some(100)
    assert np.array_equal(_numpy(factors.cpu().numpy()), vf.ops.render_sprites(factors, dtype="uint8").cpu().numpy())


# 3 GB of new memory would measure the system.
@pytest.mark.parametrize(("dtype", "memory"), [("bits", "given"), ("bits", "new"), ("uint8", "given")])
@pytest.mark.parametrize("form", ["ours", "torch reference", "numpy", "ones written"])
def test_whole_grid(benchmark, dtype: str, memory: str, form: str) -> None:
    grid, out = _grid(), _memory(dtype) if memory == "given" else None
    images = SUBSET.get(form, len(grid))
    some = _some(images)
    on_cpu = some.cpu().numpy()

    def with_numpy() -> None:
        drawn = _numpy(on_cpu)
        if dtype == "bits":
            np.packbits(drawn.reshape(len(drawn), -1), axis=1)

    def with_reference() -> None:
        reference.forward(some, reference.FORMATS.index(dtype), None if out is None else out[: len(some)])

    call = {
        "ours": lambda: vf.ops.render_sprites(grid, dtype=dtype, out=out),
        "torch reference": with_reference,
        "numpy": with_numpy,
        "ones written": lambda: torch.ones_like(_memory(dtype)) if out is None else out.fill_(1),
    }[form]
    if form == "numpy":
        _check_numpy()
    name = f"{form}, {images:,} of the images" if form in SUBSET else form
    case = f"dSprites, whole grid, {dtype}, into {memory} memory"
    measure(benchmark, call, case=case, form=name, ours=form == "ours", rounds=7, images=images)


@pytest.mark.parametrize("form", ["ours", "torch reference", "numpy", "stored bytes", "stored bits"])
def test_batch(benchmark, form: str) -> None:
    """Random batches of 64 as a model takes them; stored: the whole data set in memory, 3 GB or 377 MB."""
    batches = torch.randint(len(DATA), (200, BATCH), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    factors = [DATA.factors(batch) for batch in batches]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=DEVICE)
    at = itertools.cycle(range(len(batches)))

    dtype = "bits" if form == "stored bits" else "uint8"
    stored = vf.ops.render_sprites(_grid(), dtype=dtype, out=_memory(dtype)) if form.startswith("stored") else _grid()

    def with_numpy(n: int) -> Tensor:
        return torch.from_numpy(_numpy(factors[n].cpu().numpy())[:, None]).float()

    draw = {
        "ours": lambda n: vf.ops.render_sprites(factors[n]),
        "torch reference": lambda n: reference.forward(factors[n], 0, None),
        "numpy": with_numpy,
        "stored bytes": lambda n: stored[batches[n]][:, None].float(),
        "stored bits": lambda n: (stored[batches[n]][:, :, None] >> shifts & 1).view(-1, 1, 64, 64).float(),
    }[form]
    assert torch.equal(draw(0), reference.forward(factors[0], 0, None))
    # Another batch each time: images come from memory, not from a cache.
    call = lambda: draw(next(at))  # noqa: E731
    case = "dSprites, random batches of 64, float32"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=200, images=BATCH)
