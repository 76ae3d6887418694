"""Many versions of one activation of a batch, run to the output: the pass before it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .engine import most_bytes
from .passes import LARGEST_TILE, most_alive, sizes_of, value_at
from .patching import device_of
from .trace import NOT_REPEATABLE, Program, Trace, Value, laid_out, same, trace

TRACE_TILES = 16  # a trace keeps all activations of its pass: so many times what a tile has


class Versions:
    """A call on a batch, in which sites may hold other values than their own.

    module: whose modules the sites are; call: (*args) -> tensor, which runs it. args: those with as many rows as the
    first tensor are repeated, so that several versions run at once; where rows that are seen together are not as they
    are apart, versions run one by one. Within `torch.no_grad()`, in the mode that the modules are in.

    output: of the call as it is. InputError names the site, or the module that cannot be run again faithfully.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Tensor], args: tuple, sites: Sequence[str]):
        self._module, self._call, self._args, self._sites = module, call, args, list(dict.fromkeys(sites))
        first = next((a for a in args if isinstance(a, Tensor) and a.ndim), None)
        if first is None or not len(first):
            raise InputError("inputs: expected a tensor (B, ...) with B > 0")
        self.rows = len(first)
        self._one = one = self._trace(1)
        self._starts = {site: self._start(site) for site in self._sites}
        self._programs = {start: one.downstream([start]) for start in self._starts.values()}
        made = {v for step in one.steps for v in step.makes} | set(one.inputs)
        tensors = [a for a in args if isinstance(a, Tensor) and a.ndim]
        values = one.everything().run(dict(zip(one.inputs, tensors, strict=True)), made)
        self.output = values[one.output]
        plain = call(*args)
        if bool(torch.isfinite(plain).all()) and not same(self.output, plain):
            raise InputError(f"module: gives other numbers when it runs again; {NOT_REPEATABLE}")
        sizes = sizes_of(one, values)
        self._bytes = {start: most_alive(program, start, sizes) for start, program in self._programs.items()}
        self._all_bytes = max(1, sum(sizes.values()))
        needed = {v for program in self._programs.values() for v in program.needs} | self._programs.keys()
        self._values = {v: values[v] for v in needed}
        self._many: dict[int, Trace | None] = {}
        self._apart: dict[int, set[int]] = {}  # steps that were seen to treat each row by itself

    def activation(self, site: str) -> Tensor:
        """What passes a site, (B, ...), to be changed in a copy."""
        return self._values[self._starts[site]]

    def run(self, site: str, versions: Iterable[Tensor]) -> Iterator[Tensor]:
        """The output for each of the versions of a site's activation, in their order."""
        versions, start, own = iter(versions), self._starts[site], self.activation(site)
        if not self._programs[start].reaches:
            yield from (self.output for _ in versions)
            return
        together = self._together(start)
        if together is not None and not self._apart.get(together[0], set()).issuperset(together[1].chosen):
            # Beside other versions the activation as it is must give what it gives beside itself.
            first = list(islice(versions, together[0] - 1))
            kept, mixed = (self._at_once(site, *together, [own, *some]) for some in ([], first))
            if torch.equal(mixed[0], kept[0]) and same(kept[0], self.output):
                self._apart.setdefault(together[0], set()).update(together[1].chosen)
                yield from mixed[1:]
            else:
                together, versions = None, chain(first, versions)
        if together is None:
            program = self._programs[start]
            for version in versions:
                self._check(site, version)
                new = laid_out(version.to(own.dtype).contiguous(), own)
                yield program.run({**self._values, start: new})[self._one.output]
            return
        while some := list(islice(versions, together[0])):
            yield from self._at_once(site, *together, some)

    def _start(self, site: str) -> Value:
        place = self._one.places.get(site)
        if place is not None:
            return value_at(place.outputs, site)
        place = self._one.places.get(site.removesuffix(".input"))
        return value_at(place.inputs if place else [], site)

    def _check(self, site: str, version: Tensor) -> None:
        own = self.activation(site)
        if version.shape != own.shape:
            raise InputError(f"{site}: a version has shape {tuple(version.shape)}, expected {tuple(own.shape)}")

    def _together(self, start: Value) -> tuple[int, Program, dict[Value, Tensor]] | None:
        """How many versions of a site fit a tile, their program, and what it needs; None where they run one by one."""
        budget = most_bytes(device_of(self._args))
        most = min(budget // self._bytes[start], TRACE_TILES * budget // self._all_bytes, LARGEST_TILE // self.rows)
        times = 1 << max(0, int(most).bit_length() - 1)  # powers of two: few traces
        if times < 2:
            return None
        if times not in self._many:
            try:
                self._many[times] = self._trace(times)
            except (InputError, RuntimeError, ValueError, IndexError, AssertionError):
                self._many[times] = None  # it knows how many rows its batch has
        traced = self._many[times]
        # The same operations, or values would not be those of the same number.
        if traced is None or [step.func for step in traced.steps] != [step.func for step in self._one.steps]:
            return None
        program = traced.downstream([start])
        values = {v: self._values[v] for v in {start, *program.needs}}
        repeated = {}
        for v, a in values.items():
            shape, stride = traced.layouts[v.number]
            if shape == a.shape:
                repeated[v] = a
            elif a.ndim and shape == (times * len(a), *a.shape[1:]) and 0 not in stride:
                repeated[v] = a.new_empty_strided(shape, stride).copy_(torch.cat([a] * times))
            else:
                return None
        return times, program, repeated

    def _at_once(
        self, site: str, times: int, program: Program, values: dict[Value, Tensor], versions: list[Tensor]
    ) -> list[Tensor]:
        start, own = self._starts[site], self.activation(site)
        for version in versions:
            self._check(site, version)
        new = torch.cat([*versions, *[own] * (times - len(versions))]).to(own.dtype)
        y = program.run({**values, start: laid_out(new, values[start])})[program.trace.output]
        return list(y.unflatten(0, (times, -1)))[: len(versions)]

    def _trace(self, times: int) -> Trace:
        def copies(a: Any) -> Any:
            repeated = times > 1 and isinstance(a, Tensor) and a.ndim and len(a) == self.rows
            return torch.cat([a] * times) if repeated else a

        args = [copies(a) for a in self._args]
        where = [n for n, a in enumerate(args) if isinstance(a, Tensor) and a.ndim]

        def call(*tensors: Tensor) -> Any:
            full = list(args)
            for n, t in zip(where, tensors, strict=True):
                full[n] = t
            return self._call(*full)

        traced, y = trace(self._module, call, [args[n] for n in where], self._sites)
        if times > 1 and (not y.ndim or y.shape != (times * self.output.shape[0], *self.output.shape[1:])):
            raise InputError("output: does not grow with the rows")
        return traced
