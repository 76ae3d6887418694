"""All images of a data set as codes: encoded once, after which every metric's sampler is a look-up."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .labelled import Labelled, labelled
from .score import whole

_FIRST_LINE, _NEXT_LINE = 30.0, 60.0  # seconds


@dataclass(frozen=True)
class Encoded:
    """Codes of images with their factors.

    codes: (N, L) float32, the encoder's means; logvar: (N, L) float32, log sigma^2 of its posteriors, None where it has
    none; factors: (N, K) int64; factor_names; complete: whether the rows are a whole factor grid, each combination
    once; seconds: how long encoding took.
    """

    codes: np.ndarray = field(repr=False)
    factors: np.ndarray = field(repr=False)
    factor_names: tuple[str, ...]
    complete: bool
    logvar: np.ndarray | None = field(default=None, repr=False)
    seconds: float = 0.0

    @cached_property
    def labelled(self) -> Labelled | None:
        """Checked codes and factors, None where no factor varies. InputError for NaN or infinite codes."""
        varies = self.factors.shape[1] and bool((self.factors != self.factors[0]).any())
        return labelled(self.codes, self.factors, self.factor_names) if varies else None


def encode_grid(
    model: Any, ds: Any, *, batch: int = 250, images: int | None = None, seed: int = 0, progress: bool = True
) -> Encoded:
    """The codes of every image of a data set, or of `images` random ones.

    model: has `encode(x) -> (mu, logvar)`, both (B, L), for x (B, C, H, W) float32; a torch module is put into
    evaluation mode meanwhile and given x on its own device. ds: a data set with `len`, `images(indices)`,
    `factors(indices)`, `factor_names` and `complete`, as `vf.data.load` gives. `images` below len(ds) draws that many
    without replacement: what is encoded is then no whole grid. `progress`: say on stderr how far it is.
    Raises InputError for a model that encodes otherwise, or fewer than 1 image.
    """
    batch, total = whole("batch", batch, 1), len(ds)
    chosen = None
    if images is not None and whole("images", images, 1) < total:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:images].sort().values
    n = total if chosen is None else len(chosen)
    if n < 1:
        raise InputError("ds: expected at least one image, got none")
    began = time.perf_counter()
    codes, noise, factors = [], [], []
    with torch.no_grad(), _evaluating(model) as device:
        for first in _counted(range(0, n, batch), n, batch, progress):
            rows = torch.arange(first, min(n, first + batch)) if chosen is None else chosen[first : first + batch]
            mu, logvar = _encode(model, ds.images(rows).to(device))
            codes.append(mu.float().cpu().numpy())
            noise.append(None if logvar is None else logvar.float().cpu().numpy())
            factors.append(torch.as_tensor(ds.factors(rows)).cpu().numpy())
    return Encoded(
        np.concatenate(codes),
        np.concatenate(factors),
        tuple(ds.factor_names),
        bool(ds.complete) and chosen is None,
        None if noise[0] is None else np.concatenate(noise),
        time.perf_counter() - began,
    )


def _encode(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    found = model.encode(x)
    if isinstance(found, tuple) and len(found) == 2:
        mu, logvar = found
        fits = isinstance(mu, Tensor) and mu.ndim == 2 and len(mu) == len(x)
        if fits and (logvar is None or isinstance(logvar, Tensor) and logvar.shape == mu.shape):
            return mu, logvar
    parts = found if isinstance(found, tuple) else (found,)
    got = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
    raise InputError(f"model: expected encode(x) to give (mu, logvar), both (B = {len(x)}, L); got {got}")


@contextmanager
def _evaluating(model: Any) -> Iterator[torch.device]:
    """A torch module in evaluation mode, and the device of its parameters; of anything else a CPU."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, torch.nn.Module) else []
    try:
        if modes:
            model.eval()
        parameter = next(model.parameters(), None) if modes else None
        yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for part, training in modes:
            part.training = training


def _counted(starts: Iterable[int], n: int, batch: int, shown: bool) -> Iterator[int]:
    """The same, saying on stderr how far it is: a bar on a terminal, elsewhere a line now and then."""
    if shown and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(list(starts), "encoding", console=Console(stderr=True), transient=True)
        return
    began = time.monotonic()
    due = began + _FIRST_LINE
    for first in starts:
        now = time.monotonic()
        if shown and first and now >= due:
            due = now + _NEXT_LINE
            left = (now - began) / first * (n - first) / 60
            print(f"encoding: image {first:,} of {n:,}, {left:,.1f} min left", file=sys.stderr)
        yield first
