"""Grids of latent interventions: what z_i is set to, and how large each step is."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

NAMES = ("fixed", "posterior", "resample", "traverse")
DRAWS = 4
TRAVERSE_QUANTILES = tuple(round(0.05 + 0.1 * q, 2) for q in range(10))


@dataclass(frozen=True)
class Grid:
    """do(z_i := values): S interventions for each of L latents.

    name; coordinates: (S,) what a step is called (delta, t, draw or quantile) and `coordinate`, the name of that unit;
    shift: (L, S) added to z_i, or None; target: (L, S) that z_i is set to, or None; donors: (N, S) samples that give
    z_i, or None;
    step_size: (L, S) |step| by which CES divides, or None where an effect is taken undivided (resample) or not at all
    (traverse). only: the latents that are swept, in ascending order; None for all.
    """

    name: str
    coordinate: str
    coordinates: Tensor
    shift: Tensor | None = None
    target: Tensor | None = None
    donors: Tensor | None = None
    step_size: Tensor | None = None
    only: tuple[int, ...] | None = None

    def values(self, z: Tensor, samples: slice, latents: Tensor, steps: Tensor) -> Tensor:
        """Values (B, J) of latent `latents[j]` under step `steps[j]` for the B samples `samples` of z (N, L)."""
        if self.donors is not None:
            return z[self.donors[samples][:, steps], latents]
        if self.target is not None:
            return self.target[latents, steps].expand(z[samples].shape[0], -1)
        assert self.shift is not None
        return z[samples][:, latents] + self.shift[latents, steps]

    @property
    def decoded(self) -> Tensor:
        """(L, S) bool: which interventions are decoded. A step of zero changes nothing and is never decoded."""
        decoded = self._moves
        if self.only is not None:
            others = torch.ones(len(decoded), dtype=torch.bool, device=decoded.device)
            others[list(self.only)] = False
            decoded = decoded.masked_fill(others[:, None], False)
        return decoded

    @property
    def zero_steps(self) -> int:
        """How many interventions on the latents that are swept change nothing."""
        return int((~self._moves[list(self.latents)]).sum())

    @property
    def latents(self) -> Sequence[int]:
        """Those that are swept."""
        return range(len(self._moves)) if self.only is None else self.only

    @property
    def _moves(self) -> Tensor:
        if self.shift is not None:
            return self.shift != 0
        shape = self.target.shape if self.target is not None else (0, 0)
        return torch.ones(shape, dtype=torch.bool)


def selected(latents: Any, count: int) -> tuple[int, ...]:
    """The given latents of `count` in ascending order; InputError if one is out of range, twice or no integer."""
    try:
        chosen = [operator.index(latent) for latent in latents]
    except TypeError as error:
        raise InputError(f"latents: expected a sequence of integers, got {latents!r}") from error
    wrong = [latent for latent in chosen if not 0 <= latent < count]
    if wrong or not chosen:
        raise InputError(f"latents: expected some of 0..{count - 1}, got {wrong[0] if wrong else 'none'}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"latents: expected each once, got {chosen}")
    return tuple(sorted(chosen))


def symmetric(half: int, step: float) -> Tensor:
    """(-half..half except 0) times step: integers first, so that no step is a rounding error of zero."""
    integers = torch.cat([torch.arange(-half, 0), torch.arange(1, half + 1)])
    return integers.double() * step


def make(grid: str | Tensor, z: Tensor, scale: Tensor | None, seed: int, draws: int = DRAWS) -> Grid:
    """The named grid for codes z (N, L); a tensor of shifts (S,) or (L, S) is a grid of its own.

    fixed: +-.6, ..., +-3. posterior: t s_i for t = +-.5, ..., +-2 and `scale` s (L,). resample: z_i of another sample,
    `draws` random cyclic permutations. traverse: the quantiles .05, ..., .95 of z_i over the samples.
    """
    samples, latents = z.shape
    if isinstance(grid, Tensor):
        return _explicit(grid, z)
    if not isinstance(grid, str):
        raise InputError(f"grid: expected a name or a tensor of shifts, got {type(grid).__name__}")
    if grid == "fixed":
        delta = symmetric(5, 0.6).to(z)
        return Grid("fixed", "delta", delta, shift=delta.expand(latents, -1), step_size=delta.abs().expand(latents, -1))
    if grid == "posterior":
        if scale is None:
            raise InputError(
                'scale: grid="posterior" needs the scale (L,) of each latent; vf.posterior_scale(model, x) gives it'
            )
        if not isinstance(scale, Tensor) or tuple(scale.shape) != (latents,):
            given = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
            raise InputError(f"scale: expected a tensor ({latents},), one number a latent, got {given}")
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(f"scale: expected finite numbers >= 0, got {scale.tolist()}")
        t = symmetric(4, 0.5).to(z)
        return Grid("posterior", "t", t, shift=scale.to(z)[:, None] * t, step_size=t.abs().expand(latents, -1))
    if grid == "resample":
        if samples < 2:
            raise InputError("z: grid='resample' takes z_i from another sample, so it needs at least 2")
        generator = torch.Generator().manual_seed(seed)
        donors = torch.empty(samples, draws, dtype=torch.int64)
        for draw in range(draws):
            cycle = torch.randperm(samples, generator=generator)
            donors[cycle, draw] = cycle.roll(1)
        target = torch.empty(latents, draws)
        return Grid("resample", "draw", torch.arange(draws), target=target, donors=donors.to(z.device))
    if grid == "traverse":
        at_least = torch.promote_types(z.dtype, torch.float32)  # quantile knows no 16-bit floats
        levels = torch.tensor(TRAVERSE_QUANTILES, dtype=at_least, device=z.device)
        target = torch.quantile(z.to(at_least), levels, dim=0).T.to(z.dtype).contiguous()
        return Grid("traverse", "quantile", levels, target=target)
    raise InputError(f"grid: {grid!r} is unknown; known: {', '.join(NAMES)}, or a tensor of shifts (S,) or (L, S)")


def _explicit(shifts: Tensor, z: Tensor) -> Grid:
    latents = z.shape[1]
    if shifts.ndim not in (1, 2) or shifts.shape[-1] == 0 or (shifts.ndim == 2 and shifts.shape[0] != latents):
        raise InputError(f"grid: expected shifts of shape (S,) or ({latents}, S), got {tuple(shifts.shape)}")
    if not bool(torch.isfinite(shifts).all()):
        raise InputError("grid: shifts must be finite")
    shifts = shifts.to(z)
    coordinates = shifts if shifts.ndim == 1 else torch.arange(shifts.shape[1])
    shift = shifts.expand(latents, -1)
    return Grid("shifts", "delta" if shifts.ndim == 1 else "step", coordinates, shift=shift, step_size=shift.abs())
