"""A module's passes on some rows, traced; sites in them, and their units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .engine import most_bytes
from .patching import Readout, read_out, taken
from .selection import Selection, is_pattern, labels_of, resolve
from .trace import NOT_REPEATABLE, Program, Trace, Value, same, trace

LARGEST_TILE = 512  # rows of one pass


@dataclass(frozen=True)
class Target:
    """One site and its units: labels (E,) the unit of each element of a row, -1 where it is not patched."""

    selection: Selection
    labels: Tensor
    units: tuple[int, ...]

    @cached_property
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
    """The module on some of the rows, traced.

    one: the first row's pass, and `values` all it computed, once `look` was called; tile: rows of a whole pass whose
    activations fit the cache.
    """

    one: Trace
    values: dict[Value, Tensor]
    tile: int
    looked = False

    def __init__(self, module: nn.Module, args: tuple, rows: int, readout: Readout | None):
        self.module, self.args, self.rows, self.readout = module, args, rows, readout

    def look(self, sites: Sequence[str]) -> None:
        """Trace the first row's pass."""
        self.one = one = self.trace(slice(0, 1), 1, sites)
        start = dict(zip(one.inputs, self.tensors(slice(0, 1)), strict=True))
        self.values = one.everything().run(start, {*start, *(v for step in one.steps for v in step.makes)})
        device = self.values[one.output].device
        self.looked = True
        self.tile = max(1, min(most_bytes(device) // self.bytes_of(self.values), LARGEST_TILE))

    def bytes_of(self, some: Iterable[Value]) -> int:
        """Memory that these values of one row take, each storage once; at least 1."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in map(self.values.get, some)
            if t is not None
        }
        return max(1, sum(storages.values()))

    def output(self, args: tuple) -> Tensor:
        return read_out(self.module(*args), self.readout)

    def check_repeatable(self, source: tuple | None) -> None:
        """InputError where a rerun of the first row's operations gives other numbers than the module does, for its own
        row or the source's."""
        for name, given in (("", self.args), (" for x_source", source)):
            args = taken(given or (), self.rows, slice(0, 1))
            tensors = [a for a in args if isinstance(a, Tensor) and a.ndim]
            if not given or [t.shape for t in tensors] != [t.shape for t in self.tensors(slice(0, 1))]:
                continue
            if given is self.args and self.looked:  # what `look` ran
                again = self.values[self.one.output]
            else:
                again = self.one.everything().run(dict(zip(self.one.inputs, tensors, strict=True)))[self.one.output]
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


def sizes_of(traced: Trace, values: dict[Value, Tensor]) -> dict[Value, int]:
    """Bytes of each value's memory, 0 for views of others."""
    seen, sizes = set(), {}
    for v in chain(traced.inputs, (v for step in traced.steps for v in step.made if v is not None)):
        storage = values[v].untyped_storage()
        sizes[v] = 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
    for step in traced.steps:
        sizes.update((v, values[v].nbytes) for _, v in step.written)
    return sizes


def most_alive(program: Program, start: Value, sizes: dict[Value, int]) -> int:
    """The most bytes that are alive at once while the program runs; at least 1."""
    alive = most = sum(sizes[v] for v in {start, *program.needs})
    for n in program.chosen:
        alive += sum(sizes[v] for v in program.trace.steps[n].makes)
        most = max(most, alive)
        alive -= sum(sizes[v] for v in program.last_used(n))
    return max(most, 1)


def targets_at(
    passes: Passes, sites: Sequence[str], unit: str, heads: int | None, reaching: bool = True
) -> list[Target]:
    """Sites with their units; of patterns, those that run once and have such units. reaching: refuses, or of patterns
    leaves out, those of which nothing reaches the output."""
    found: dict[Selection, Target] = {}
    chosen = [(s, is_pattern(spec)) for spec in sites for s in resolve(passes.module, spec)]
    passes.look([str(Selection(s.site, s.side)) for s, _ in chosen])
    traced = passes.one
    for s, pattern in chosen:
        try:
            bare = Target(s, torch.empty(0), ())
            value = bare.value(traced)
            shape = tuple(passes.values[value].shape[1:])
            mask = s.mask(shape)
            labels = torch.where(mask, labels_of(shape, unit, heads)[0], -1)
            if reaching and traced.output not in traced.reached([value]):
                raise InputError(f"{s}: nothing of it reaches the output; choose a site before it")
            found.setdefault(s, Target(s, labels, tuple(labels[mask].bincount().nonzero()[:, 0].tolist())))
        except InputError:
            if not pattern:
                raise
    if not found:
        raise InputError("sites: none of them runs once, reaches the output and has such units")
    return list(found.values())
