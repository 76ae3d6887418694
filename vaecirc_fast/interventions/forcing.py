"""Runs of a module on pairs of inputs in which chosen units of several sites are held at other values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..groups import Groups
from .engine import most_bytes
from .patch_sweeps import LARGEST_TILE, Passes, Target, targets_at
from .patching import Readout, inputs_of, run_with_cache, taken
from .trace import NOT_REPEATABLE, Trace, Value, same, trace

MOST_COLUMNS = 512  # groups whose means are a product


class Pairs:
    """A module on pairs of rows: x_base receives, x_source gives.

    unit, heads: see `selection.units`. reaching: whether sites must reach the output. tile: rows of one pass.
    """

    def __init__(
        self,
        module: nn.Module,
        x_base: Any,
        x_source: Any,
        specs: Sequence[str],
        *,
        unit: str = "channel",
        heads: int | None = None,
        reaching: bool = True,
        readout: Readout | None = None,
        tile: int | None = None,
    ):
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise InputError(f"tile: expected an integer of at least 1, got {tile!r}")
        self.args, self.rows = inputs_of(x_base)
        self.source_args = _counterpart(self.args, self.rows, x_source)
        self.passes = Passes(module, self.args, self.rows, readout)
        self.targets = targets_at(self.passes, specs, unit, heads, reaching)
        self.one, values = self.passes.one, self.passes.values
        one = self.one
        self.shape = tuple(values[one.output].shape[1:])
        self.shapes = {t.site: tuple(values[t.value(one)].shape[1:]) for t in self.targets}
        self.device = values[one.output].device
        later = one.downstream([t.value(one) for t in self.targets])
        made = {v for n in later.chosen for v in one.steps[n].makes} | {t.value(one) for t in self.targets}
        row = sum(values[v].nbytes for v in made)
        self.tile = max(1, min(most_bytes(self.device) // max(row, 1), LARGEST_TILE)) if tile is None else tile
        self.samples = min(self.rows, self.tile)

    def repeats(self, variants: int) -> int:
        """How many variants of each sample go into one pass."""
        return max(1, min(self.tile // self.samples, variants))

    def trace(self, part: slice, repeats: int) -> Trace:
        return self.passes.trace(part, repeats, [t.site for t in self.targets])

    def run(
        self, traced: Trace, part: slice, repeats: int, keep: Collection[Value], source: bool
    ) -> dict[Value, Tensor]:
        """What to keep of x_base's or x_source's run, and the output."""
        args = self.source_args if source else self.args
        rows = taken(args, self.rows, part, repeats)
        tensors = [a for a in rows if isinstance(a, Tensor) and a.ndim]
        return traced.everything().run(dict(zip(traced.inputs, tensors, strict=True)), keep)

    def check_reproduced(self, y: Tensor, part: slice, repeats: int, source: bool) -> None:
        """InputError, naming a module, where a rerun's output y is not that of the plain run of the module."""
        name, args = ("x_source", self.source_args) if source else ("x_base", self.args)
        rows = taken(args, self.rows, part, repeats)
        plain = self.passes.output(rows)
        if not bool(torch.isfinite(plain).all()):
            raise InputError(f"{name}: the module's output has NaN or infinity")
        if same(y, plain):
            return
        culprit = self._culprit(part, repeats, rows)
        raise InputError(
            f"module: {culprit} gives other numbers for {name} when what it executed runs again; {NOT_REPEATABLE}"
        )

    def _culprit(self, part: slice, repeats: int, rows: tuple) -> str:
        """The first module whose output a rerun of its operations does not give."""
        module = self.passes.module
        modules = {name: m for name, m in module.named_modules() if name}
        where = [n for n, a in enumerate(rows) if isinstance(a, Tensor) and a.ndim]
        base = taken(self.args, self.rows, part, repeats)

        def call(*tensors: Tensor) -> Any:
            full = list(base)
            for n, t in zip(where, tensors, strict=True):
                full[n] = t
            return self.passes.output(tuple(full))

        traced, _ = trace(module, call, [base[n] for n in where], list(modules))
        places = {n: p.outputs[0] for n, p in traced.places.items() if len(p.outputs) == 1 and p.outputs[0] is not None}
        given = {v: rows[n] for v, n in zip(traced.inputs, where, strict=True)}
        again = traced.everything().run(given, set(places.values()))
        _, cache = run_with_cache(module, rows, ["*"]) if modules else (None, {})
        # the first to be left: what is inside is named before what it is inside of
        for name, value in sorted(places.items(), key=lambda p: (p[1].number, -len(p[0]))):
            if name in cache and not same(again[value], cache[name]):
                return f"{name} ({type(modules[name]).__name__})"
        return f"it ({type(module).__name__})"


@dataclass(frozen=True)
class Held:
    """What units of a site are held at: mask (1 or rows, E) says which, new (rows, ...) has their values."""

    mask: Tensor
    new: Tensor


class Holding:
    """Passes of a trace in which units of some sites are held, all else that depends on the pass's input or on them is
    computed.

    Sites are set in the order in which they are computed: what is not held of a site answers to those before it.
    whole: the sites of which everything is held.
    """

    def __init__(self, traced: Trace, sites: Collection[Value], whole: Collection[Value] = ()):
        self.sites = sorted(sites, key=lambda v: v.number)
        self._trace = traced
        self._before = {}
        for n, site in enumerate(self.sites):
            program = traced.between(self.sites[:n], site)
            if program.chosen and site not in whole:
                self._before[site] = program
        self._rest = traced.downstream(self.sites)
        self.needs = {v for p in (*self._before.values(), self._rest) for v in p.needs} | set(self.sites)
        self.needs.add(traced.output)

    @property
    def flops(self) -> int:
        return self._rest.flops + sum(p.flops for p in self._before.values())

    def output(self, values: Mapping[Value, Tensor], held: Mapping[Value, Held]) -> Tensor:
        """The output of the pass whose `needs` are given, every site held."""
        now: dict[Value, Tensor] = {}
        for site in self.sites:
            current = values[site]
            if site in self._before:
                current = self._before[site].run({**values, **now}, {site})[site]
            now[site] = mixed(held[site].mask, held[site].new, current)
        if not self._rest.reaches:
            return values[self._trace.output]
        return self._rest.run({**values, **now})[self._trace.output]


class GroupMeans:
    """Means of each group's elements, float64: (..., P) -> (..., G)."""

    def __init__(self, groups: Groups, device: torch.device):
        labels = groups.labels.to(device).long()
        elements, self._count = len(labels), len(groups)
        self._sizes = groups.sizes.double().to(device)
        self._picked = None if bool((labels >= 0).all()) else (labels >= 0).nonzero()[:, 0]
        self._labels = labels if self._picked is None else labels[self._picked]
        self._alone = torch.equal(labels, torch.arange(elements, device=device))
        self._matrix: Tensor | None = None
        if 1 < self._count <= MOST_COLUMNS and not self._alone:
            # adding by a product: index_add_ goes through the elements one by one
            columns = torch.arange(self._count, device=device)
            self._matrix = (self._labels[:, None] == columns).double()

    def __call__(self, y: Tensor) -> Tensor:
        if self._alone:
            return y.double()
        y = y if self._picked is None else y[..., self._picked]
        if self._count == 1:
            return y.sum(-1, keepdim=True, dtype=torch.float64) / self._sizes
        if self._matrix is not None:
            return y.double() @ self._matrix / self._sizes
        sums = torch.zeros(*y.shape[:-1], self._count, dtype=torch.float64, device=y.device)
        return sums.index_add_(-1, self._labels, y.double()) / self._sizes


def mixed(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """old (rows, ...) with the elements of mask (1 or rows, E) taken from new (rows, ...), laid out as old is."""
    mask = mask.to(old.device).view(-1, *old.shape[1:])
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last):
        mask = mask.contiguous(memory_format=torch.channels_last)
    return torch.where(mask, new.to(old), old, out=torch.empty_like(old))


def chosen_units(target: Target, numbers: Sequence[int], repeats: int, samples: int, device: torch.device) -> Tensor:
    """Masks (samples * repeats, E) for a variant per unit: row r of a sample has the units numbers[r], the rows behind
    them none."""
    mask = torch.zeros(repeats, len(target.labels), dtype=torch.bool, device=device)
    picked = torch.tensor(numbers, device=device)
    mask[: len(numbers)] = target.labels.to(device) == picked[:, None]
    return mask.repeat(samples, 1)


def chosen_whole(target: Target, device: torch.device) -> Tensor:
    """The mask (1, E) of all chosen units of a target."""
    return (target.labels >= 0)[None].to(device)


def _counterpart(args: tuple, rows: int, x_source: Any) -> tuple:
    """x_source as arguments that differ from x_base's in the numbers of tensors alone."""
    if x_source is None:
        raise InputError("x_source: expected inputs like x_base, got None")
    source, source_rows = inputs_of(x_source)
    if source_rows != rows:
        raise InputError(f"x_source: has {source_rows} rows, x_base {rows}; they are pairs")
    if len(source) != len(args):
        raise InputError(f"x_source: has {len(source)} arguments, x_base {len(args)}")
    for n, (a, b) in enumerate(zip(args, source, strict=True)):
        if isinstance(a, Tensor) and a.ndim:
            if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                given = f"{b.dtype} {tuple(b.shape)} on {b.device}" if isinstance(b, Tensor) else type(b).__name__
                raise InputError(
                    f"x_source: argument {n} is {given}, x_base's {a.dtype} {tuple(a.shape)} on {a.device}"
                )
        elif not (a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)):
            raise InputError(
                f"x_source: argument {n} differs from x_base's and is no tensor with rows; only those may differ"
            )
    return source
