"""Benchmark of the row `render_scene`: batches of shapes3d_like, against the torch reference and torch.compile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf
from vaecirc_fast.data.shapes3d_like import Shapes3DLike
from vaecirc_fast.reference import render_scene as reference

from .harness import measure

BATCH = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNKS = tuple(1 << n for n in (16, 18, 20, 22, 24))  # of the reference: rays times solids computed at once


@functools.cache
def _scenes() -> tuple[tuple[Tensor, ...], ...]:
    """Arguments of the op for random batches of shapes3d_like."""
    data, generator = Shapes3DLike(device=DEVICE), torch.Generator().manual_seed(0)
    batches = torch.randint(len(data), (16, BATCH), generator=generator).to(DEVICE)
    return tuple(data.scenes(batch) for batch in batches)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("form", ["ours", *(f"torch reference, {n:,} at once" for n in CHUNKS), "torch.compile"])
def test_batch(benchmark, form: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random batches of 64, rendered anew; the reference in chunks of which one suits the caches best."""
    scenes = _scenes()
    at = itertools.cycle(range(len(scenes)))
    options = dict(size=(64, 64), samples=samples)
    plain: Callable[..., Tensor] = lambda *scene: reference.forward(*scene, **options)  # noqa: E731
    ours: Callable[..., Tensor] = lambda *scene: vf.ops.render_scene(*scene, **options)  # noqa: E731
    draw = ours if form == "ours" else plain
    if form.startswith("torch reference"):
        chunk = int(form.removeprefix("torch reference, ").removesuffix(" at once").replace(",", ""))
        monkeypatch.setattr(reference, "CELLS", chunk)
    elif form == "torch.compile":
        torch._dynamo.reset()
        draw = torch.compile(plain)
    assert ((draw(*scenes[0]) - ours(*scenes[0])).abs() > 1e-5).float().mean() < 1e-3  # but for edges
    call = lambda: draw(*scenes[next(at)])  # noqa: E731
    case = f"shapes3d_like, random batches of 64, {samples} x {samples} rays a pixel"
    rounds = 50 if form == "ours" else 5
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=rounds, images=BATCH)


@pytest.mark.parametrize("form", ["ours", "rendered alone", "stored bytes"])
def test_data_set(benchmark, form: str) -> None:
    """What training takes: `sample(64)` with indices, factors and arguments; stored: 6 GB, here a hundredth of it."""
    data, scenes = Shapes3DLike(device=DEVICE), _scenes()
    generator, at = torch.Generator().manual_seed(0), itertools.cycle(range(len(scenes)))
    render: Callable[..., Tensor] = vf.ops.render_scene
    stored = torch.empty(4800, 3, 64, 64, dtype=torch.uint8, device=DEVICE) if form == "stored bytes" else None

    def read() -> Tensor:
        assert stored is not None
        return stored[torch.randint(len(stored), (BATCH,), generator=generator).to(DEVICE)].float() / 255

    call = {
        "ours": lambda: data.sample(BATCH, generator),
        "rendered alone": lambda: render(*scenes[next(at)]),
        "stored bytes": read,
    }[form]
    case = "shapes3d_like, sample(64)"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=100, images=BATCH)
