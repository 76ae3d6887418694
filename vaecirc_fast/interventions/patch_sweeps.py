"""Patching every unit of every site by itself: only what depends on a site runs again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._allocator import kept_memory
from ..errors import InputError
from ..groups import Groups, whole
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampling_weights
from ..ops import effect_reduction
from ..ops._network_outputs import network_outputs
from ..reference.effect_reduction import KINDS
from .engine import most_bytes, slices
from .passes import LARGEST_TILE, Passes, Target, most_alive, sizes_of, targets_at
from .patch_effects import PatchEffects
from .patch_kernels import kernels_behind
from .patching import ABLATIONS, Readout, ablated, device_of, inputs_of, quiet, run_with_cache, site_values, taken
from .selection import Selection, channel_axis
from .trace import Trace, Value
from .updates import Updated, Updates

FEW = 8  # rows from which a CPU's pass for one channel, by updates, beats one for several that runs everything again
PART_BYTES = 64 << 20  # of activations and effects of the samples that kernels take at once

Weights = Callable[[int, int], Tensor]  # (how many samples, number of the first) -> (R, n) of each in each replicate


@torch.no_grad()
def patch_sweep(
    module: nn.Module,
    x_base: Any,
    x_source: Any = None,
    sites: Sequence[str] = ("*",),
    *,
    unit: str = "channel",
    heads: int | None = None,
    ablation: str = "resample",
    effect: str = "mse",
    groups: Groups | None = None,
    recovery: bool = False,
    reference: Any = None,
    clean: Any = None,
    corrupted: Any = None,
    direction: str | None = None,
    readout: Readout | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> PatchEffects:
    """Effect of patching every unit of every site by itself: the unit takes its value from `x_source`'s run (or is
    ablated), all downstream is computed again, and the output is compared with x_base's.

    x_base receives, x_source gives, pair by pair: tensors (N, ...) or tuples of arguments. Or clean= and corrupted=
    with direction "noising" (clean receives) or "denoising" (corrupted receives). sites: paths or patterns; with
    indices, only units that have a chosen element, of which only these are patched. unit, heads: see `selection.units`.
    ablation: "resample" takes x_source's values; the others need none, but "mean", "mean-positional" and "noise" a
    reference=. effect, groups: as in `vf.ops.effect_reduction`. recovery: also the distance to x_source's output.
    readout: chooses the tensor of an output that is none. tile: rows of one pass.

    The pass up to a site is computed once, and only what depends on the patched site runs again; behind a vector or
    image that is the kernel of `vf.ops.latent_sweep` or `patch_mix` where the layers are such. Memory does not grow
    with the number of patches.
    Returns effects over (unit, group). InputError names the site and the remedy.
    """
    x_base, x_source = _pair(x_base, x_source, clean, corrupted, direction, ablation)
    check_measure(effect, ablation, recovery)
    args, rows = inputs_of(x_base)
    source_args = None
    if ablation == "resample":
        source_args, source_rows = inputs_of(x_source)
        if source_rows != rows:
            raise InputError(f"x_source: has {source_rows} rows, x_base {rows}; they are pairs")
    started = time.perf_counter()
    device = device_of(args)
    with quiet(module, device), kept_memory(device.type == "cpu"):
        passes = Passes(module, args, rows, readout)
        targets = targets_at(passes, sites, unit, heads)
        sources = Sources(module, source_args, rows, ablation, reference, seed)
        passes.check_repeatable(source_args)
        sweep = Sweep(passes, targets, sources, effect, groups, recovery, tile)
        return sweep.run(replicates, seed, started)


def check_measure(effect: str, ablation: str, recovery: bool) -> None:
    """InputError for unknown names, and for a recovery without a source."""
    known = [kind for kind in KINDS if kind != "logit_mse"]
    if effect not in known:
        raise InputError(f"effect: {effect!r} is unknown; known: {', '.join(known)}")
    if ablation not in ABLATIONS:
        raise InputError(f"ablation: {ablation!r} is unknown; known: {', '.join(ABLATIONS)}")
    if recovery and ablation != "resample":
        raise InputError("recovery: is of ablation='resample', which has a source to come near to")


def ablate(module: nn.Module, x: Any, sites: Sequence[str] = ("*",), **options: Any) -> PatchEffects:
    """`patch_sweep` without a source: units become zero, the mean, the mean of each place, or noise (`ablation`)."""
    return patch_sweep(module, x, None, sites, **{"ablation": "zero", **options})


def _pair(
    x_base: Any, x_source: Any, clean: Any, corrupted: Any, direction: str | None, ablation: str
) -> tuple[Any, Any]:
    if (clean is None) != (corrupted is None) or (clean is not None and (x_source is not None or x_base is not None)):
        raise InputError("clean, corrupted: give both, and neither x_base nor x_source")
    if clean is not None:
        if direction not in ("noising", "denoising"):
            raise InputError(f'direction: expected "noising" or "denoising" with clean=, got {direction!r}')
        x_base, x_source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    if ablation == "resample" and x_source is None:
        raise InputError('x_source: ablation="resample" takes values from another run; give x_source=')
    return x_base, x_source


class Sources:
    """What units take, by site: activations of the samples that give, or ablations."""

    def __init__(self, module: nn.Module, args: Any, rows: int, ablation: str, reference: Any, seed: int):
        self.module, self.args, self.rows, self.ablation, self.seed = module, args, rows, ablation, seed
        self.reference = reference
        self._references: dict[str, Tensor] = {}

    def of(self, targets: Sequence[Target], base: Sequence[Tensor], part: slice, tile: int) -> list[Tensor]:
        """For each target (B, ...), for the samples of `part`, whose base activations are given; `tile` rows a pass."""
        names = [t.site for t in targets]
        if self.ablation != "resample":
            if self.reference is not None and not set(names) <= self._references.keys():
                self._references |= run_with_cache(self.module, self.reference, names)[1]
            found = [self._references.get(name) for name in names]
            pairs = zip(base, found, strict=True)
            return [ablated(self.ablation, a, r, self.seed + part.start) for a, r in pairs]
        if part.start == 0:  # what can be wrong with a site is seen on one row
            run_with_cache(self.module, taken(self.args, self.rows, slice(0, 1)), names)
        given = site_values(self.module, self.args, self.rows, part, names, tile)
        for name, a in zip(names, base, strict=True):
            if given[name].shape != a.shape:
                shapes = f"{tuple(given[name].shape)} for x_source, {tuple(a.shape)} for x_base"
                raise InputError(f"{name}: gives {shapes}")
        return [given[name] for name in names]


class Sweep:
    """All patches of all targets, part by part of the samples."""

    def __init__(
        self,
        passes: Passes,
        targets: list[Target],
        sources: Sources,
        effect: str,
        groups: Groups | None,
        recovery: bool,
        tile: int | None,
    ):
        self.passes, self.targets, self.sources = passes, targets, sources
        self.effect, self.recovery = effect, recovery
        if not passes.looked:
            passes.look([t.site for t in targets])
        one, values = passes.one, passes.values
        self.elements = values[one.output].numel()
        self.groups = self._partition(groups, values[one.output].device)
        self.kernels = kernels_behind(passes, targets, recovery)
        self.rest = [t for t in targets if t.selection not in self.kernels]
        self.flops = self.bytes = 0  # of what ran
        made = {t.selection: self._made_behind(t) for t in targets}
        device, sizes = values[one.output].device, sizes_of(one, values)
        alive = max(self._alive_behind(t, sizes) for t in self.rest or targets)
        self.tile = max(1, min(most_bytes(device) // alive, LARGEST_TILE)) if tile is None else tile
        self.tile_samples = min(passes.rows, self.tile)
        self.repeats = max(1, min(self.tile // self.tile_samples, max((len(t.units) for t in self.rest), default=1)))
        if device.type == "cpu" and self.tile_samples >= FEW and all(self._channels(t) for t in self.rest):
            self.repeats = 1
        self.bytes_behind = {name: passes.bytes_of(some) for name, some in made.items()}
        self.samples = self.tile_samples
        if self.kernels:
            held = 24 * len(self.groups) * sum(len(t.units) for t in targets)
            held += 4 * sum(values[t.value(one)].nbytes for t in targets if t.selection in self.kernels)
            self.samples = max(1, min(passes.rows, PART_BYTES // held))
        self._traced: dict[int, tuple[Trace, list[Behind]]] = {}
        self._before: dict[str, None] = {}  # sites whose activations kernels made

    def run(self, replicates: int, seed: int, started: float) -> PatchEffects:
        rows = self.passes.rows
        kept = slice(None if replicates else 0)  # the jackknife's weights, of few samples, are there without replicates
        sums = self.sums(lambda n, first: resampling_weights(replicates, n, seed, first, rows)[kept])
        return self.result(sums, rows, self.plan(rows, time.perf_counter() - started))

    def sums(self, weights: Weights) -> dict[str, Tensor]:
        """Sums over the samples, float64; those of more samples add up, name by name.

        effects (U, G); drawn (R, U), of the effect on the whole output, weighted, and weights (R,); with a recovery
        also near (U,) and apart (), of the distances.
        """
        sums: dict[str, Tensor] = {}
        for part in slices(self.passes.rows, self.samples):
            effects, *near = self._part(part)
            if not bool(torch.isfinite(effects).all()):
                u = int((~torch.isfinite(effects)).any(2).any(0).nonzero()[0])
                site, unit = self._labels()[u]
                raise InputError(f"{site}: the output is NaN or infinite when unit {unit} is patched")
            w = weights(len(effects), part.start).to(effects)
            drawn = w @ (effects @ self._weights().to(effects))
            update = {"effects": effects.sum(0), "drawn": drawn, "weights": w.sum(1)}
            update |= dict(zip(("near", "apart"), (d.sum(0) for d in near), strict=False))
            sums = {name: sums[name] + value for name, value in update.items()} if sums else update
        return sums

    def result(self, sums: dict[str, Tensor], samples: int, plan: str) -> PatchEffects:
        """The means, once every sample was added."""
        some = sums["weights"] > 0  # all weights are zero once in e^N replicates
        labels = self._labels()
        return PatchEffects(
            (sums["effects"] / samples).to(torch.float32),
            tuple(site for site, _ in labels),
            tuple(unit for _, unit in labels),
            self.groups.names,
            self.effect,
            self.sources.ablation,
            samples,
            self._weights(),
            recovery=1 - sums["near"] / sums["apart"] if self.recovery else None,
            replicates=(sums["drawn"][some] / sums["weights"][some, None]).cpu() if len(some) else None,
            plan=plan,
        )

    def _part(self, part: slice) -> list[Tensor]:
        """Effects (B, U, G) on some samples; with recovery also distances to the source's output, (B, U) of the patched
        outputs and (B,) of the base's. Float64."""
        found: dict[Selection, list[Tensor]] = self._by_kernels(part) if self.kernels else {}
        if self.rest:
            by_tile = [
                self._tile(slice(part.start + s.start, part.start + s.stop))
                for s in slices(part.stop - part.start, self.tile_samples)
            ]
            for n, t in enumerate(self.rest):
                found[t.selection] = [torch.cat(same) for same in zip(*(tile[n] for tile in by_tile), strict=True)]
        by_kind = list(zip(*(found[t.selection] for t in self.targets), strict=True))
        out = [torch.cat(some, 1).double() for some in by_kind[:2]]
        return out + [some[0].double() for some in by_kind[2:]]  # the base's distance is the same at all sites

    def _by_kernels(self, part: slice) -> dict[Selection, list[Tensor]]:
        targets = [t for t in self.targets if t.selection in self.kernels]
        found, everything = {}, whole(self.elements)
        for t, base, source in self._ends(targets, part):
            kernel = self.kernels[t.selection]
            found[t.selection] = [kernel.effects(base, source, t, self.effect, self.groups)]
            if self.recovery:
                d = kernel.effects(base, source, t, self.effect, everything, against="source")[..., 0]
                found[t.selection] += [d[:, :-1], d[:, -1]]
            self.flops += (1 + self.recovery) * len(base) * len(t.units) * kernel.flops
        return found

    def _ends(self, targets: list[Target], part: slice) -> list[tuple[Target, Tensor, Tensor]]:
        """Targets behind which are kernels, with the activations (B, ...) of the base and of what units take: by
        kernels, both at once, where these know what is before the site too, else by passes of the module."""
        passes, sources, found = self.passes, self.sources, []
        args = taken(passes.args, passes.rows, part)
        given = taken(sources.args, passes.rows, part) if sources.ablation == "resample" else None
        alike = given is None or (len(given) == 1 and _alike(given[0], args[0]))
        for t in targets:
            before, shape = self.kernels[t.selection].before, passes.values[t.value(passes.one)].shape[1:]
            if before is None or not alike:
                continue
            self._before[t.site] = None
            both = args[0] if given is None else torch.cat([args[0], given[0]])
            values = network_outputs(before, both).unflatten(1, shape)
            base = values[: len(args[0])]
            new = values[len(base) :] if given is not None else sources.of([t], [base], part, passes.tile)[0]
            found.append((t, base, new))
        slow = [t for t in targets if not alike or self.kernels[t.selection].before is None]
        if slow:
            names = [t.site for t in slow]
            values = site_values(passes.module, passes.args, passes.rows, part, names, passes.tile)
            bases = [values[name] for name in names]
            found += zip(slow, bases, sources.of(slow, bases, part, passes.tile), strict=True)
        return found

    def _tile(self, part: slice) -> list[list[Tensor]]:
        """For each target behind which is no kernel: what `_part` gives, of few samples."""
        passes, size, repeats = self.passes, part.stop - part.start, self.repeats
        if size not in self._traced:
            now = passes.trace(part, repeats, [t.site for t in self.rest])
            self._traced[size] = now, [Behind(now, t, repeats == 1) for t in self.rest]
        now, behind = self._traced[size]
        keep = set().union(*(b.needs for b in behind))
        inputs = dict(zip(now.inputs, passes.tensors(part, repeats), strict=True))
        values = now.everything().run(inputs, keep)
        base = values[now.output].flatten(1)
        given = apart = None
        if self.recovery:
            given = passes.output(taken(self.sources.args, passes.rows, part)).flatten(1)
            apart = effect_reduction(given, base[::repeats][:, None], self.effect, groups=whole(self.elements))[:, 0, 0]
        sources = self.sources.of(self.rest, [values[b.start][::repeats] for b in behind], part, passes.tile)
        found = []
        for target, b, source in zip(self.rest, behind, sources, strict=True):
            e, d = self._generic(b, values, source, target, base, given)
            found.append([e] if apart is None else [e, d, apart])
        return found

    def _labels(self) -> list[tuple[str, int]]:
        return [(t.site, unit) for t in self.targets for unit in t.units]

    def _weights(self) -> Tensor:
        sizes = self.groups.sizes.double()
        return torch.full_like(sizes, 1 / len(sizes)) if self.effect == "tv" else sizes / sizes.sum()

    def _partition(self, groups: Groups | None, device: torch.device) -> Groups:
        groups = (whole(self.elements) if groups is None else groups).to(device)
        if groups.labels.numel() != self.elements:
            raise InputError(f"groups: partition {groups.labels.numel()} elements, but the output has {self.elements}")
        return groups

    def _made_behind(self, target: Target) -> set[Value]:
        one = self.passes.one
        made = set().union(*(one.steps[n].makes for n in one.between([target.value(one)], one.output).chosen))
        return made & self.passes.values.keys()

    def _alive_behind(self, target: Target, sizes: dict[Value, int]) -> int:
        """The most bytes of a row that its program holds at once: what a tile's share of the cache is for."""
        one = self.passes.one
        start = target.value(one)
        return most_alive(one.between([start], one.output), start, sizes)

    def _channels(self, target: Target) -> bool:
        shape = self.passes.values[target.value(self.passes.one)].shape[1:]
        return channel_axis(target.labels.view(shape)) is not None

    def _generic(
        self,
        behind: Behind,
        values: dict[Value, Tensor],
        source: Tensor,
        target: Target,
        base: Tensor,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Effects (B, U, G) of all units of a site, and distances (B, U) to the source's output. Each sample has
        `repeats` rows, for as many units at once."""
        activation, repeats = values[behind.start], self.repeats
        size, count = len(activation) // repeats, len(target.units)
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        effects = base.new_zeros(size, count, len(self.groups), dtype=dtype)
        distances = effects.new_zeros(size, count)
        run, flops = behind.on(values, source, target, repeats)
        everything = whole(self.elements)
        for chunk in slices(count, repeats):
            n = chunk.stop - chunk.start
            y = run(target.units[chunk]).flatten(1)
            self.flops += flops
            self.bytes += len(activation) * self.bytes_behind[target.selection]
            e = effect_reduction(base, y[:, None], self.effect, groups=self.groups)
            effects[:, chunk] = e.view(size, repeats, -1)[:, :n]
            if given is not None:
                d = effect_reduction(given, y.view(size, repeats, -1), self.effect, groups=everything)
                distances[:, chunk] = d[:, :n, 0].to(dtype)
        return effects, distances

    def plan(self, samples: int, seconds: float) -> str:
        """What was done with so many samples, for people."""
        passes, patched = self.passes, len(self._labels()) * samples
        rows = self.tile_samples * self.repeats
        flops = patched * sum(passes.one.flops)
        held = patched * passes.bytes_of(v for step in passes.one.steps for v in step.makes)
        behind = dict.fromkeys(t.site for t in self.targets if t.selection in self.kernels)
        kernels = f"; kernels behind {', '.join(behind)}" if behind else ""
        kernels += f"; kernels before {', '.join(self._before)}" if self._before else ""
        return (
            f"{patched} patched samples at {len(self.targets)} sites, tiles of {rows} rows; only what depends on "
            f"a site runs again: {100 * self.flops / max(1, flops):.0f} % of the operations of whole passes, "
            f"{readable(flops - self.flops)}FLOP saved, and {readable(held - self.bytes)}B of activations never "
            f"made{kernels}; {1e6 * seconds / max(patched, 1):.1f} us a patched sample"
        )


def _alike(a: Any, b: Any) -> bool:
    """Whether both are tensors of one shape, dtype and device."""
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def readable(n: float) -> str:
    """A number with its prefix: 12345678 as "12.3 M"."""
    for prefix in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.3g} {prefix}"
        n /= 1000
    return f"{n:.3g} T"


class Behind:
    """What runs behind a target. needs: values of the base that must be there.

    alone: whether all rows of a pass have the same unit; where that is a channel, updates save most of the first
    layers.
    """

    def __init__(self, now: Trace, target: Target, alone: bool):
        self.start = target.value(now)
        self.program = now.between([self.start], now.output)
        self.needs = {self.start, *self.program.needs}
        axis = channel_axis(target.labels.view(now.layouts[self.start.number][0][1:])) if alone else None
        self.updates = None if axis is None else Updates(self.program, self.start, 1 + axis)
        if self.updates is not None:
            self.needs |= self.updates.needs

    def on(
        self, values: dict[Value, Tensor], source: Tensor, target: Target, repeats: int
    ) -> tuple[Callable[[Sequence[int]], Tensor], int]:
        """The outputs for some units, as `Units.set` takes them, until it is called again; and the operations."""
        updated = None if self.updates is None else Updated(self.updates, values, source)
        if updated is not None and updated.possible:
            return lambda units: updated.run(units[0]), updated.updates.flops
        units, program = Units(target, values[self.start], source, repeats), self.program
        return lambda some: program.run({**values, self.start: units.set(some)})[program.trace.output], program.flops


class Units:
    """Activations in which units of a site are another's, in the memory layout of what they replace.

    activation: (B * repeats, ...), each sample's rows side by side; source: (B, ...).
    """

    def __init__(self, target: Target, activation: Tensor, source: Tensor, repeats: int):
        self.activation, self.repeats = activation, repeats
        shape = activation.shape[1:]
        self.labels = target.labels.to(activation.device).view(shape)
        self.new = source.to(activation)[:, None]
        self.last = activation.ndim == 4 and activation.is_contiguous(memory_format=torch.channels_last)

    def set(self, units: Sequence[int]) -> Tensor:
        """Row r of each sample with the elements of units[r] set; rows behind them are as they were."""
        a = self.activation
        numbers = torch.full((self.repeats,), -2, device=a.device)
        numbers[: len(units)] = torch.tensor(units, device=a.device)
        mask = self.labels == numbers.view(-1, *(1 for _ in a.shape[1:]))
        if self.last:
            mask = mask.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(a)
        by_sample = (-1, self.repeats)
        torch.where(mask, self.new, a.unflatten(0, by_sample), out=out.unflatten(0, by_sample))
        return out
