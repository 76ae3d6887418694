"""Patching every unit of every site by itself: only what depends on a site runs again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError, MissingExtra
from ..groups import Groups, whole
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_intervals, resampling_weights
from ..ops import effect_reduction
from ..ops.latent_sweep import ROW as LATENT_SWEEP
from ..ops.latent_sweep import Dense, Network
from ..ops.patch_mix import ROW as PATCH_MIX
from ..reference.effect_reduction import KINDS
from .engine import most_bytes, slices
from .fused import agrees, backend_for
from .networks import ACTIVATIONS, record
from .patching import ABLATIONS, Readout, ablated, device_of, inputs_of, quiet, read_out, run_with_cache, taken
from .selection import Selection, is_pattern, resolve, units
from .trace import NOT_REPEATABLE, Program, Step, Trace, Value, laid_out, same, trace

if TYPE_CHECKING:
    import pandas

LARGEST_TILE = 512  # rows of one pass

Weights = Callable[[int, int], Tensor]  # (how many samples, number of the first) -> (R, n) of each in each replicate


@dataclass(frozen=True)
class PatchEffects:
    """Effects of patching single units, one at a time.

    tensor: (unit, group) mean over samples of the effect on the output, in the units of `effect`. table: site and
    number of each unit, in the same order. recovery: (unit,) 1 - d(patched, source) / d(base, source), means divided;
    None where there is no source run. replicates: (replicate, unit) Poisson bootstrap over samples of the effect on the
    whole output. plan: how it was computed.
    """

    tensor: Tensor
    sites: tuple[str, ...]
    units: tuple[int, ...]
    groups: tuple[str, ...]
    effect: str
    ablation: str
    samples: int
    group_weights: Tensor
    recovery: Tensor | None = None
    replicates: Tensor | None = field(default=None, repr=False)
    plan: str = field(default="", repr=False)
    dims: tuple[str, ...] = ("unit", "group")

    @property
    def coords(self) -> dict[str, list]:
        """Labels of the axes: (site, unit) pairs and group names."""
        return {"unit": list(zip(self.sites, self.units, strict=True)), "group": list(self.groups)}

    def whole(self) -> Tensor:
        """(unit,) effect on the whole output."""
        return self.tensor.double() @ self.group_weights.double()

    def to_dataframe(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per unit: site, unit, effect on the whole output, low, high (bootstrap over samples), recovery."""
        import pandas

        values = self.whole().cpu().numpy()
        low = high = recovered = np.full(len(values), np.nan)
        if self.replicates is not None:
            low, high = resampled_intervals(values, self.replicates.numpy(), self.samples, level)
        if self.recovery is not None:
            recovered = self.recovery.cpu().numpy()
        columns = {"site": self.sites, "unit": self.units, "effect": values}
        return pandas.DataFrame(columns | {"low": low, "high": high, "recovery": recovered})

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The n units of greatest effect."""
        return self.to_dataframe().sort_values("effect", ascending=False, ignore_index=True).head(n)

    def to_xarray(self) -> Any:
        """The tensor as an xarray.DataArray over unit and group, with the coordinate `site`."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        coords = {"site": ("unit", list(self.sites)), "number": ("unit", list(self.units)), "group": list(self.groups)}
        return xarray.DataArray(self.tensor.cpu().numpy(), dims=self.dims, coords=coords, name=self.effect)


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
    with quiet(module, device_of(args)):
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


@dataclass(frozen=True)
class Target:
    """One site and its units: labels (E,) the unit of each element of a row, -1 where it is not patched."""

    selection: Selection
    labels: Tensor
    units: tuple[int, ...]

    @property
    def site(self) -> str:
        return str(Selection(self.selection.site, self.selection.side))

    def value(self, traced: Trace) -> Value:
        """What passes the site; InputError where it does not run once or gives no tensor."""
        place = traced.places.get(self.selection.site)
        return (
            value_at(place.outputs if self.selection.side == "output" else place.inputs, self.site)
            if place
            else (value_at([], self.site))
        )


def value_at(seen: Sequence[Value | None], site: str) -> Value:
    """The one value that passed a site; InputError names the site where there is none or more."""
    if not seen:
        raise InputError(f"{site}: is not reached when the module runs; choose another site")
    if len(seen) > 1:
        raise InputError(f"{site}: runs {len(seen)} times in one pass; choose a module that runs once")
    if seen[0] is None:
        raise InputError(f"{site}: gives no tensor that comes from the input; choose a module inside it")
    return seen[0]


class Passes:
    """The module on some of the rows, traced."""

    def __init__(self, module: nn.Module, args: tuple, rows: int, readout: Readout | None):
        self.module, self.args, self.rows, self.readout = module, args, rows, readout

    def output(self, args: tuple) -> Tensor:
        return read_out(self.module(*args), self.readout)

    def check_repeatable(self, source: tuple | None) -> None:
        """InputError where a rerun of the first row's operations gives other numbers than the module does, for its own
        row or the source's."""
        traced = self.trace(slice(0, 1), 1, [])
        for name, given in (("", self.args), (" for x_source", source)):
            args = taken(given or (), self.rows, slice(0, 1))
            tensors = [a for a in args if isinstance(a, Tensor) and a.ndim]
            if not given or [t.shape for t in tensors] != [t.shape for t in self.tensors(slice(0, 1))]:
                continue
            again = traced.everything().run(dict(zip(traced.inputs, tensors, strict=True)))[traced.output]
            plain = self.output(args)
            if bool(torch.isfinite(plain).all()) and not same(again, plain):
                what = "what it executed" if name else "it"
                raise InputError(f"module: gives other numbers{name} when {what} runs again; {NOT_REPEATABLE}")

    def tensors(self, part: slice, repeats: int = 1) -> list[Tensor]:
        """The arguments that are traced, for some rows, each repeated."""
        return [a for a in taken(self.args, self.rows, part, repeats) if isinstance(a, Tensor) and a.ndim]

    def trace(self, part: slice, repeats: int, sites: Sequence[str]) -> Trace:
        args = taken(self.args, self.rows, part, repeats)
        where = [n for n, a in enumerate(args) if isinstance(a, Tensor) and a.ndim]

        def call(*tensors: Tensor) -> Any:
            full = list(args)
            for n, t in zip(where, tensors, strict=True):
                full[n] = t
            return self.output(tuple(full))

        # two selections of one site are one place
        made, y = trace(self.module, call, [args[n] for n in where], list(dict.fromkeys(sites)))
        if y.ndim < 2 or len(y) != len(args[where[0]]):
            name = "module: its output has" if self.readout is None else "readout: gives"
            expected = "(rows, ...) with more than the axis of rows"
            raise InputError(f"{name} shape {tuple(y.shape)} for {len(args[where[0]])} rows, expected {expected}")
        return made


def targets_at(
    passes: Passes, sites: Sequence[str], unit: str, heads: int | None, reaching: bool = True
) -> list[Target]:
    """Sites with their units; of patterns, those that run once and have such units. reaching: refuses, or of patterns
    leaves out, those of which nothing reaches the output."""
    found: dict[Selection, Target] = {}
    chosen = [(s, is_pattern(spec)) for spec in sites for s in resolve(passes.module, spec)]
    traced = passes.trace(slice(0, 1), 1, [str(Selection(s.site, s.side)) for s, _ in chosen])
    start = dict(zip(traced.inputs, passes.tensors(slice(0, 1)), strict=True))
    for s, pattern in chosen:
        try:
            bare = Target(s, torch.empty(0), ())
            value = bare.value(traced)
            shape = tuple(traced.everything().run(start, {value})[value].shape[1:])
            mask = s.mask(shape)
            labels = torch.where(mask, units(shape, unit, heads).labels, -1)
            if reaching and traced.output not in traced.reached([value]):
                raise InputError(f"{s}: nothing of it reaches the output; choose a site before it")
            found.setdefault(s, Target(s, labels, tuple(labels[mask].unique().tolist())))
        except InputError:
            if not pattern:
                raise
    if not found:
        raise InputError("sites: none of them runs once, reaches the output and has such units")
    return list(found.values())


class Sources:
    """What units take, by site: activations of the samples that give, or ablations."""

    def __init__(self, module: nn.Module, args: Any, rows: int, ablation: str, reference: Any, seed: int):
        self.module, self.args, self.rows, self.ablation, self.seed = module, args, rows, ablation, seed
        self.reference = reference
        self._references: dict[str, Tensor] = {}

    def of(self, targets: Sequence[Target], base: Sequence[Tensor], part: slice) -> list[Tensor]:
        """For each target (B, ...), for the samples of `part`, whose base activations are given."""
        if self.ablation != "resample":
            if self.reference is not None and not self._references:
                self._references = run_with_cache(self.module, self.reference, [t.site for t in targets])[1]
            found = [self._references.get(t.site) for t in targets]
            pairs = zip(base, found, strict=True)
            return [ablated(self.ablation, a, r, self.seed + part.start) for a, r in pairs]
        cache = run_with_cache(self.module, taken(self.args, self.rows, part), [t.site for t in targets])[1]
        for t, a in zip(targets, base, strict=True):
            if cache[t.site].shape != a.shape:
                given = tuple(cache[t.site].shape)
                raise InputError(f"{t.site}: gives {given} for x_source, {tuple(a.shape)} for x_base")
        return [cache[t.site] for t in targets]


class Sweep:
    """All patches of all targets, tile by tile of the samples."""

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
        one = passes.trace(slice(0, 1), 1, [t.site for t in targets])
        start = dict(zip(one.inputs, passes.tensors(slice(0, 1)), strict=True))
        values = one.everything().run(start, set().union(*(step.makes for step in one.steps)))
        self.elements = values[one.output].numel()
        self.groups = self._partition(groups, values[one.output].device)
        self.flops_of_a_pass, self.flops = sum(one.flops), 0
        downstream = [one.between([t.value(one)], one.output) for t in targets]
        made = [set().union(*(one.steps[n].makes for n in p.chosen)) for p in downstream]
        largest = max(sum(values[v].nbytes for v in some if v in values) for some in made)
        fitting = max(1, min(most_bytes(values[one.output].device) // max(largest, 1), LARGEST_TILE))
        self.tile = fitting if tile is None else tile
        self.samples = min(passes.rows, self.tile)
        self.kernels: dict[Selection, _Kernel] = {}
        if not recovery:
            for t in targets:
                kernel = _kernel_behind(one, t.value(one), values, t)
                if kernel is not None:
                    self.kernels[t.selection] = kernel

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
        passes, targets = self.passes, self.targets
        rest = [t for t in targets if t.selection not in self.kernels]
        most = max((len(t.units) for t in rest), default=1)
        repeats = max(1, min(self.tile // self.samples, most))
        traced: dict[int, Trace] = {}
        sums: dict[str, Tensor] = {}
        groups = self.groups
        for part in slices(passes.rows, self.samples):
            size = part.stop - part.start
            if size not in traced:
                traced[size] = passes.trace(part, repeats, [t.site for t in targets])
            now = traced[size]
            starts = [t.value(now) for t in targets]
            programs = [now.between([v], now.output) for v in starts]
            keep = {v for program in programs for v in program.needs} | set(starts)
            inputs = dict(zip(now.inputs, passes.tensors(part, repeats), strict=True))
            values = now.everything().run(inputs, keep)
            base = values[now.output].flatten(1)
            given = None
            if self.recovery:
                given = passes.output(taken(self.sources.args, passes.rows, part)).flatten(1)
            sources = self.sources.of(targets, [values[v][::repeats] for v in starts], part)
            found, near = [], []
            for target, program, start, source in zip(targets, programs, starts, sources, strict=True):
                kernel = self.kernels.get(target.selection)
                if kernel is not None:
                    found.append(kernel.effects(values[start][::repeats], source, target, self.effect, groups))
                    self.flops += size * len(target.units) * kernel.flops
                    continue
                e, d = self._generic(program, values, start, source, target, base, given, repeats, groups)
                found.append(e)
                near.append(d)
            effects = torch.cat(found, 1).double()  # (B, U, G)
            if not bool(torch.isfinite(effects).all()):
                u = int((~torch.isfinite(effects)).any(2).any(0).nonzero()[0])
                site, unit = self._labels()[u]
                raise InputError(f"{site}: the output is NaN or infinite when unit {unit} is patched")
            w = weights(size, part.start).to(effects)
            drawn = w @ (effects @ self._weights(groups).to(effects))
            update = {"effects": effects.sum(0), "drawn": drawn, "weights": w.sum(1)}
            if given is not None:
                everything = whole(self.elements)
                apart = effect_reduction(given, base[::repeats][:, None], self.effect, groups=everything)
                update |= {"near": torch.cat(near, 1).double().sum(0), "apart": apart.double().sum()}
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
            self._weights(self.groups),
            recovery=1 - sums["near"] / sums["apart"] if self.recovery else None,
            replicates=(sums["drawn"][some] / sums["weights"][some, None]).cpu() if len(some) else None,
            plan=plan,
        )

    def _labels(self) -> list[tuple[str, int]]:
        return [(t.site, unit) for t in self.targets for unit in t.units]

    def _weights(self, groups: Groups) -> Tensor:
        sizes = groups.sizes.double()
        return torch.full_like(sizes, 1 / len(groups)) if self.effect == "tv" else sizes / sizes.sum()

    def _partition(self, groups: Groups | None, device: torch.device) -> Groups:
        groups = (whole(self.elements) if groups is None else groups).to(device)
        if groups.labels.numel() != self.elements:
            raise InputError(f"groups: partition {groups.labels.numel()} elements, but the output has {self.elements}")
        return groups

    def _generic(
        self,
        program: Program,
        values: dict[Value, Tensor],
        start: Value,
        source: Tensor,
        target: Target,
        base: Tensor,
        given: Tensor | None,
        repeats: int,
        groups: Groups,
    ) -> tuple[Tensor, Tensor]:
        """Effects (B, U, G) of all units of a site, and distances (B, U) to the source's output. Each sample has
        `repeats` rows, for as many units at once."""
        activation = values[start]
        size, count = len(activation) // repeats, len(target.units)
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        effects = base.new_zeros(size, count, len(groups), dtype=dtype)
        distances = effects.new_zeros(size, count)
        labels = target.labels.to(base.device)
        numbers = torch.tensor(target.units, device=base.device)
        rows = activation.flatten(1).view(size, repeats, -1)
        new = source.to(activation).flatten(1)[:, None]
        everything = whole(self.elements)
        for chunk in slices(count, repeats):
            n = chunk.stop - chunk.start
            chosen = torch.zeros(repeats, len(labels), dtype=torch.bool, device=base.device)
            chosen[:n] = labels == numbers[chunk, None]
            mixed = laid_out(torch.where(chosen, new, rows), activation)
            y = program.run({**values, start: mixed})[program.trace.output].flatten(1)
            self.flops += program.flops
            e = effect_reduction(base, y[:, None], self.effect, groups=groups)
            effects[:, chunk] = e.view(size, repeats, -1)[:, :n]
            if given is not None:
                d = effect_reduction(given, y.view(size, repeats, -1), self.effect, groups=everything)
                distances[:, chunk] = d[:, :n, 0].to(dtype)
        return effects, distances

    def plan(self, samples: int, seconds: float) -> str:
        patched = len(self._labels()) * samples
        share = 100 * self.flops / max(1, patched * self.flops_of_a_pass)
        behind = dict.fromkeys(t.site for t in self.targets if t.selection in self.kernels)
        kernels = f"; kernels behind {', '.join(behind)}" if behind else ""
        return (
            f"{patched} patched samples at {len(self.targets)} sites, tiles of {self.tile} rows; only what depends on "
            f"a site runs again: {share:.0f} % of the operations of whole passes{kernels}; "
            f"{1e6 * seconds / max(patched, 1):.1f} us a patched sample"
        )


@dataclass(frozen=True)
class _Kernel:
    """What is behind a vector or image: activations to pass first, then a network that the kernels know.

    alone: every unit is one element of a vector, which the op `latent_sweep` shifts; `patch_mix` sets any unit.
    """

    lead: tuple[Step, ...]
    network: Network
    alone: bool
    flops: int

    def effects(self, base: Tensor, source: Tensor, target: Target, effect: str, groups: Groups) -> Tensor:
        """(B, U, G) of setting each unit of base (B, ...) to the source's."""
        base, source = self._pass(base).flatten(1), self._pass(source.to(base)).flatten(1)
        numbers = torch.tensor(target.units, device=base.device)
        if self.alone:
            shifts = (source - base)[:, numbers]
            return ops.latent_sweep(base, numbers[:, None], shifts[..., None], self.network, effect, groups=groups)
        labels = target.labels.to(base.device, torch.int32)
        return ops.patch_mix(base, source, labels, numbers, self.network, effect, groups=groups)

    def _pass(self, a: Tensor) -> Tensor:
        for step in self.lead:
            a = step.func(a.clone() if step.written else a, *step.args[1:], **step.kwargs)
        return a


def _kernel_behind(one: Trace, value: Value, values: dict[Value, Tensor], target: Target) -> _Kernel | None:
    """The kernel for what is behind a site, judged on a pass of one row; None where there is none."""
    if value not in values or values[value].ndim not in (2, 4):
        return None
    lead: list[Step] = []
    while True:
        program = one.between([value], one.output)
        readers = [one.steps[n] for n in program.chosen if value in one.steps[n].reads]
        if len(readers) != 1 or program.needs:
            return None
        (step,) = readers
        if step.func not in ACTIVATIONS:
            break
        lead.append(step)
        after = step.made[0] if step.made[0] is not None else step.written[0][1]
        if after == one.output:
            return None
        value = after

    def call(a: Tensor) -> Tensor:
        return program.run({value: a})[one.output]

    row = values[value]
    recorded = record(call, row, images=True)
    network = recorded.network
    if network is None:
        return None
    own = torch.arange(len(target.labels))
    alone = isinstance(network.layers[0], Dense) and bool(((target.labels == own) | (target.labels < 0)).all())
    kernel = backend_for(row, row=LATENT_SWEEP if alone else PATCH_MIX)
    if kernel in (None, "reference") or not agrees(network, row, recorded.output.flatten(1)):
        return None
    return _Kernel(tuple(lead), network, alone, 2 * sum(network.multiplications()[int(alone) :]))
