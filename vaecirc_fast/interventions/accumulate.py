"""Effects per sample, as they come, into means over samples and their bootstrap replicates; or kept as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import step_weights
from ..metrics.statistics import resampling_weights
from .effect_tables import TableWriter, check_out
from .effects import Effects
from .grids import Grid

_BLOCK_BYTES = 1 << 20  # of effects in float64 at once, so that they stay in cache between the sums over them


@dataclass(frozen=True)
class Axes:
    """What a sweep's effects are indexed by: U units (latents, positions, channels) times S steps (or draws).

    grid: its name. unit, step: names of the two axes; labels: of the U units. coordinates: (S,) what a step is called.
    decoded: (U, S) bool, which interventions are decoded; the others are exactly 0. They are numbered row by row.
    step_size: (U, S) |step| that CES divides by, 0 where nothing is decoded; None where it divides by nothing.
    """

    grid: str
    unit: str
    step: str
    labels: Sequence
    coordinates: Tensor
    decoded: Tensor
    step_size: Tensor | None = None

    @staticmethod
    def of_latents(spec: Grid) -> Axes:
        """Those of a latent sweep."""
        rows = list(spec.latents)
        step_size = None if spec.step_size is None else spec.step_size[rows]
        return Axes(spec.name, "latent", "step", rows, spec.coordinates, spec.decoded[rows], step_size)


class Accumulator:
    """Streams the effects of each sample into means and bootstrap replicates, or keeps them if `reduce` is None.

    samples: how many there are in all. dtype: that of the outputs; results are float64 for float64, else float32, and
    sums are float64 always. out: a file that every sample is written to; samples are then not kept, whatever `reduce`,
    and whoever adds calls `discard` in the end, which after `result` does nothing. Every sample is added once, in any
    order and any slices.
    """

    def __init__(
        self,
        axes: Axes,
        samples: int,
        groups: Groups,
        *,
        effect: str,
        reduce: str | None,
        replicates: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        out: str | Path | None = None,
    ):
        if out is not None:
            reduce = "mean"
        self.axes, self.samples, self.groups, self.effect, self.seed = axes, samples, groups, effect, seed
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        units, steps = axes.decoded.shape
        self.decoded = axes.decoded.to(device)
        self.all_decoded = bool(self.decoded.all())
        sizes = groups.sizes.to(device, torch.float64)
        self.weights = torch.full_like(sizes, 1 / len(groups)) if effect == "tv" else sizes / sizes.sum()
        self.step_weights = None  # (U, 1, S)
        if axes.step_size is not None:
            self.step_weights = step_weights(axes.step_size).to(device, torch.float64)[:, None]
        self.shape = (units, steps, len(groups))
        self.kept = self.total = None
        if reduce is None:
            self.kept = torch.zeros(samples, *self.shape, dtype=self.dtype, device=device)
        else:
            self.total = torch.zeros(self.shape, dtype=torch.float64, device=device)
        self.replicates = replicates if reduce == "mean" else 0
        count = len(resampling_weights(self.replicates, 1, total=samples)) if self.replicates else 0
        self.weight_sum = torch.zeros(count, dtype=torch.float64, device=device)
        # of each unit and group, then of each unit and step: one matrix product adds to both
        self.drawn = torch.zeros(count, units * (len(groups) + steps), dtype=torch.float64, device=device)
        self.writer = None
        if out is not None:
            self.writer = TableWriter(check_out(out), axes, groups.names, self.dtype, self._facts())

    def add(self, samples: slice, effects: Tensor) -> None:
        """effects (B, J, G) of the J decoded interventions, in the order of `decoded.nonzero()`, of these samples."""
        if not bool(torch.isfinite(effects.sum())):  # a quick look; a sum of finite numbers may overflow
            self._refuse_not_finite(effects)
        if self.all_decoded:
            full = effects.reshape(len(effects), *self.shape)
        else:
            full = effects.new_zeros(len(effects), *self.shape)
            full[:, self.decoded] = effects
        if self.kept is not None:
            self.kept[samples] = full
            return
        if self.writer is not None:
            self.writer.add(samples, full)
        assert self.total is not None
        rows = []
        for block in full.split(max(1, _BLOCK_BYTES // (8 * max(self.total.numel(), 1)))):
            block = block.double()
            self.total += block.sum(0)
            if self.replicates:
                by_group = block.mean(2) if self.step_weights is None else (self.step_weights @ block).squeeze(2)
                rows.append(torch.cat([by_group.flatten(1), (block @ self.weights).flatten(1)], 1))
        if rows:
            n = samples.stop - samples.start
            weights = resampling_weights(self.replicates, n, self.seed, samples.start, self.samples).to(self.drawn)
            self.weight_sum += weights.sum(1)
            self.drawn.addmm_(weights, torch.cat(rows))

    def _refuse_not_finite(self, effects: Tensor) -> None:
        finite = torch.isfinite(effects)
        if not bool(finite.all()):
            j = int((~finite).flatten(2).any(2).any(0).nonzero()[0])
            u, s = (int(v) for v in self.decoded.nonzero()[j])
            axes = self.axes
            raise InputError(
                f"decoder: its output is NaN or infinite for {axes.unit} {axes.labels[u]} at {axes.step} {s} "
                f"of the grid {axes.grid!r}"
            )

    def result(self, plan: str) -> Effects:
        """The effects of all samples, once every one of them was added."""
        units, steps, groups = self.shape
        axes = self.axes
        coords = self._coords()
        by_group = by_step = None
        if self.kept is not None:
            coords = {"sample": list(range(self.samples)), **coords}
            tensor = self.kept
        else:
            assert self.total is not None
            tensor = (self.total / self.samples).to(self.dtype)
            if self.replicates:
                some = self.weight_sum > 0  # all weights are zero once in e^N replicates
                drawn = (self.drawn[some] / self.weight_sum[some, None]).to(self.dtype)
                by_group = drawn[:, : units * groups].unflatten(1, (units, groups)).contiguous()
                by_step = drawn[:, units * groups :].unflatten(1, (units, steps)).contiguous()
        if self.writer is not None:
            self.writer.close(plan)
        return Effects(
            tensor,
            tuple(coords),
            coords,
            effect=self.effect,
            grid=axes.grid,
            samples=self.samples,
            group_weights=self.weights,
            step_size=None if axes.step_size is None else axes.step_size.contiguous(),
            replicates=by_group,
            step_replicates=by_step,
            plan=plan,
            path=None if self.writer is None else str(self.writer.path),
        )

    def discard(self) -> None:
        """Leave no file behind where there is no result."""
        if self.writer is not None:
            self.writer.discard()

    def _coords(self) -> dict[str, list]:
        axes = self.axes
        return {
            axes.unit: list(axes.labels),
            axes.step: axes.coordinates.tolist(),
            "group": list(self.groups.names),
        }

    def _facts(self) -> dict[str, Any]:
        """What a file says of the effects in it, as JSON."""
        axes, coords = self.axes, self._coords()
        return {
            "dims": list(coords),
            "coords": coords,
            "samples": self.samples,
            "effect": self.effect,
            "grid": axes.grid,
            "dtype": str(self.dtype).removeprefix("torch."),
            "step_size": None if axes.step_size is None else axes.step_size.tolist(),
            "step_dtype": None if axes.step_size is None else str(axes.step_size.dtype).removeprefix("torch."),
            "group_weights": self.weights.tolist(),
        }
