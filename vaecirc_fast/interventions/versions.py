"""Many versions of one activation of a batch, run to the output: the pass before it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .engine import most_bytes
from .patch_sweeps import LARGEST_TILE, value_at
from .patching import device_of
from .trace import NOT_REPEATABLE, Trace, Value, laid_out, same, trace


class Versions:
    """A call on a batch, in which sites may hold other values than their own.

    module: whose modules the sites are; call: (*args) -> tensor, which runs it. args: those with as many rows as the
    first tensor are repeated to run several versions at once; what a call makes of rows that it sees together is what
    it makes of each, or versions run one by one. Within `torch.no_grad()`, in the mode that the modules are in.

    output: of the call as it is. InputError names the site, or the module that cannot be run again faithfully.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Tensor], args: tuple, sites: Sequence[str]):
        self._module, self._call, self._args, self._sites = module, call, args, list(dict.fromkeys(sites))
        first = next((a for a in args if isinstance(a, Tensor) and a.ndim), None)
        if first is None or not len(first):
            raise InputError("inputs: expected a tensor (B, ...) with B > 0")
        self.rows = len(first)
        self._one = _Passes(self._trace(1), self._tensors(1), self._sites)
        self.output = self._one.output
        plain = call(*args)
        if bool(torch.isfinite(plain).all()) and not same(self.output, plain):
            raise InputError(f"module: gives other numbers when it runs again; {NOT_REPEATABLE}")
        self._many: dict[int, _Passes | None] = {}
        self._apart: dict[str, bool] = {}  # whether versions of a site may run together

    def activation(self, site: str) -> Tensor:
        """What passes a site, (B, ...), to be changed in a copy."""
        return self._one.values[self._one.places[site]]

    def run(self, site: str, versions: Iterable[Tensor]) -> Iterator[Tensor]:
        """The output for each of the versions of a site's activation, in their order."""
        versions = iter(versions)
        together = self._together(site)
        passes = self._many.get(together)
        own = self.activation(site)
        waiting: list[Tensor] = []
        if passes is not None and site not in self._apart:
            # Beside other versions the activation as it is must give what it gives beside itself.
            first = list(_some(versions, together - 1))
            found = self._at_once(passes, site, [own, *first])
            kept = self._at_once(passes, site, [own] * together)
            self._apart[site] = bool(torch.equal(found[0], kept[0]))
            if self._apart[site]:
                yield from found[1 : len(first) + 1]
            else:
                waiting = first
        if passes is None or not self._apart[site]:
            for version in (*waiting, *versions):
                yield self._at_once(self._one, site, [version])[0]
            return
        while some := list(_some(versions, together)):
            yield from self._at_once(passes, site, some)[: len(some)]

    def _together(self, site: str) -> int:
        """How many versions of a site fit a pass; its trace is then in `_many`."""
        wanted = max(1, min(most_bytes(device_of(self._args)) // self._one.bytes[site], LARGEST_TILE // self.rows))
        while wanted > 1 and wanted & (wanted - 1):  # powers of two: few traces
            wanted &= wanted - 1
        if wanted > 1 and wanted not in self._many:
            self._many[wanted] = self._repeated(wanted)
        return wanted

    def _repeated(self, times: int) -> _Passes | None:
        """The pass of as many copies of the batch, or None where the call does not take, or mixes, them."""
        try:
            made = _Passes(self._trace(times), self._tensors(times), self._sites)
        except (InputError, RuntimeError, ValueError, IndexError, AssertionError):
            return None  # it knows how many rows its batch has
        n = self.output.shape[0] if self.output.ndim else 0
        if made.output.shape[:1] != (times * n,) or not n:
            return None
        return made if same(made.output[:n], self.output) else None

    def _at_once(self, passes: _Passes, site: str, versions: list[Tensor]) -> list[Tensor]:
        start = passes.places[site]
        times = len(passes.values[start]) // len(self.activation(site)) if passes is not self._one else 1
        own = self.activation(site)
        for version in versions:
            if version.shape != own.shape:
                raise InputError(f"{site}: a version has shape {tuple(version.shape)}, expected {tuple(own.shape)}")
        filled = versions + [own] * (times - len(versions))
        new = filled[0] if times == 1 else torch.cat(filled)
        y = passes.run(start, laid_out(new.to(own.dtype).contiguous(), passes.values[start]))
        return [y] if times == 1 else list(y.unflatten(0, (times, -1)))

    def _tensors(self, times: int) -> list[Tensor]:
        return [a for a in self._copies(times) if isinstance(a, Tensor) and a.ndim]

    def _copies(self, times: int) -> tuple:
        def of(a: Any) -> Any:
            repeated = times > 1 and isinstance(a, Tensor) and a.ndim and len(a) == self.rows
            return torch.cat([a] * times) if repeated else a

        return tuple(map(of, self._args))

    def _trace(self, times: int) -> Trace:
        args = self._copies(times)
        where = [n for n, a in enumerate(args) if isinstance(a, Tensor) and a.ndim]

        def call(*tensors: Tensor) -> Any:
            full = list(args)
            for n, t in zip(where, tensors, strict=True):
                full[n] = t
            return self._call(*full)

        return trace(self._module, call, [args[n] for n in where], self._sites)[0]


class _Passes:
    """A trace with what its sites need from the pass as it is."""

    def __init__(self, traced: Trace, tensors: list[Tensor], sites: Sequence[str]):
        self.places: dict[str, Value] = {}
        for site in sites:
            name = site.removesuffix(".input")
            place = traced.places.get(site) or traced.places.get(name)
            inputs = site not in traced.places
            self.places[site] = value_at([] if place is None else place.inputs if inputs else place.outputs, site)
        self._programs = {v: traced.downstream([v]) for v in self.places.values()}
        made = {v for step in traced.steps for v in step.makes} | set(traced.inputs)
        values = traced.everything().run(dict(zip(traced.inputs, tensors, strict=True)), made)
        self.output = values[traced.output]
        self.bytes = {}
        for site, v in self.places.items():
            behind = {m for n in self._programs[v].chosen for m in traced.steps[n].makes} | {v}
            storages = {values[m].untyped_storage().data_ptr(): values[m].untyped_storage().nbytes() for m in behind}
            self.bytes[site] = max(1, sum(storages.values()))
        needed = {v for program in self._programs.values() for v in program.needs} | set(self.places.values())
        self.values = {v: values[v] for v in needed}

    def run(self, start: Value, new: Tensor) -> Tensor:
        """The output where the value `start` is `new`; as it is where nothing of it reaches the output."""
        program = self._programs[start]
        if not program.reaches:
            return self.output
        return program.run({**self.values, start: new})[program.trace.output]


def _some(versions: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    for _, version in zip(range(most), versions, strict=False):
        yield version
