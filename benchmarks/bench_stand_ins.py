"""Benchmark of the drawn data sets: what a training step waits for, against reading stored bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

BATCH = 64
STORED = 4800  # images: a whole data set would take gigabytes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWN = ("dsprites", "mpi3d_like", "norb_like", "faces_like", "scm_sprites")  # shapes3d_like: see render_scene


@pytest.mark.parametrize("form", ["ours", "stored bytes"])
@pytest.mark.parametrize("name", DRAWN)
def test_sample(benchmark, name: str, form: str) -> None:
    """`sample(64)`: factors drawn, images rendered anew; or as many bytes gathered and divided by 255."""
    data, generator = vf.data.load(name, device=DEVICE), torch.Generator().manual_seed(0)
    stored = torch.empty(STORED, *data.shape, dtype=torch.uint8, device=DEVICE)

    def read() -> Tensor:
        return stored[torch.randint(STORED, (BATCH,), generator=generator).to(DEVICE)].float() / 255

    call = (lambda: data.sample(BATCH, generator)) if form == "ours" else read
    measure(benchmark, call, case=f"{name}, sample(64)", form=form, ours=form == "ours", rounds=100, images=BATCH)
