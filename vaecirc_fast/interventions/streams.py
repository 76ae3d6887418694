"""Patch sweeps over a data set of any size: batch by batch in constant memory, and on from where a run was stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._allocator import kept_memory
from .._tensor_files import read_tensors, write_tensors
from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from ..metrics.statistics import FEW, poisson_weights
from .patch_sweeps import Passes, PatchEffects, Sources, Sweep, Target, check_measure, targets_at
from .patching import Readout, device_of, inputs_of, quiet

STATE = "patch_sweep.safetensors"
_KIND = "patch sweep"
_LINES = 30.0  # seconds between lines of progress where there is no terminal
Progress = Callable[[int, int], None]


@torch.no_grad()
def patch_sweep_over(
    module: nn.Module,
    pairs: Iterable[Any],
    sites: Sequence[str] = ("*",),
    *,
    out: str | Path | None = None,
    progress: bool | Progress = False,
    save_every: float = 5.0,
    unit: str = "channel",
    heads: int | None = None,
    ablation: str = "resample",
    effect: str = "mse",
    groups: Groups | None = None,
    recovery: bool = False,
    reference: Any = None,
    readout: Readout | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> PatchEffects:
    """`patch_sweep` over batches as they come: a data set of any size, in memory that does not grow with it.

    pairs: a DataLoader or any iterable of (x_base, x_source), tensors (B, ...) or tuples of arguments; of x alone with
    an ablation that needs no source. Every batch's rows have the first one's shape, B may vary. All other options, and
    the result, are those of `patch_sweep`; samples enter the bootstrap by their number in the stream and `seed`.

    out: a directory for the sums so far, written atomically every `save_every` seconds (0: after each batch), at the
    end, and when an error or Ctrl-C ends the run. The same call again skips the batches that were counted and goes on;
    what it returns is, bit for bit on the same machine, what a run without a stop would have. The batches skipped are
    read and compared with those counted, so their order must be the same: no shuffling, or a fixed seed for it. A
    longer stream that begins alike adds to the sums.
    progress: True writes to stderr; a function is called with the numbers of batches and samples after each batch.

    InputError names what differs where `out` is of another configuration (sites, module's weights, effect, seed, ...)
    or other data, and a state file that is damaged; and all that `patch_sweep` refuses.
    """
    check_measure(effect, ablation, recovery)
    for name, value in (("replicates", replicates), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name}: expected a whole number >= 0, got {value!r}")
    if isinstance(pairs, Tensor | str | bytes) or not isinstance(pairs, Iterable):
        raise InputError(f"pairs: expected an iterable of (x_base, x_source), got {type(pairs).__name__}")
    run = _Run(
        module, sites, unit, heads, ablation, effect, groups, recovery, reference, readout, replicates, seed, tile
    )
    return run.over(pairs, None if out is None else Path(out), progress, save_every)


@dataclass(frozen=True)
class _Counted:
    """Sums so far, of how many batches and samples, and a digest of the data behind them. One object, so that whatever
    stops a run finds all of it or none."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    data: str = ""


class _Run:
    """One stream."""

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[str],
        unit: str,
        heads: int | None,
        ablation: str,
        effect: str,
        groups: Groups | None,
        recovery: bool,
        reference: Any,
        readout: Readout | None,
        replicates: int,
        seed: int,
        tile: int | None,
    ):
        self.module, self.sites, self.unit, self.heads = module, sites, unit, heads
        self.ablation, self.effect, self.groups, self.recovery = ablation, effect, groups, recovery
        self.readout, self.replicates, self.seed, self.tile = readout, replicates, seed, tile
        self.sources = Sources(module, None, 0, ablation, reference, seed)
        self.counted = self.saved = _Counted()
        self.flops = self.bytes = 0
        self.targets: list[Target] = []
        self.configuration: dict[str, Any] = {}
        self._rows: list[tuple] = []

    def over(
        self, pairs: Iterable[Any], out: Path | None, progress: bool | Progress, save_every: float
    ) -> PatchEffects:
        started, last, sweep = time.perf_counter(), time.monotonic(), None
        state = None if out is None else out / STATE
        report = progress if callable(progress) else _reporter(pairs) if progress else None
        seen, before, data = 0, _Counted(), ""
        try:
            for item in pairs:
                base, source = self._split(item, seen)
                args, rows = inputs_of(base)
                data = _digest(data, args, source)
                device = device_of(args)
                with quiet(self.module, device), kept_memory(device.type == "cpu"):
                    passes = Passes(self.module, args, rows, self.readout)
                    if not seen:
                        self._look(passes, args)
                        if state is not None and state.exists():
                            before = self.counted = self.saved = self._loaded(state)
                    self._check_rows(args, seen)
                    seen += 1
                    if seen <= before.batches:
                        if seen == before.batches and data != before.data:
                            raise InputError(
                                f"pairs: their first {seen} batches are not those that {out} has counted; give "
                                "the same data in the same order, or another out="
                            )
                        sweep = sweep or self._sweep(passes, source, rows)
                        continue
                    sweep = self._sweep(passes, source, rows)
                    self._add(sweep, rows, data)
                if state is not None and time.monotonic() - last >= save_every:
                    self._save(state)
                    last = time.monotonic()
                if report is not None:
                    report(self.counted.batches, self.counted.samples)
        finally:
            if state is not None:
                self._save(state)
        if sweep is None:
            raise InputError("pairs: expected at least one batch, got none")
        if seen < before.batches:
            raise InputError(f"pairs: gave {seen} batches, but {out} has counted {before.batches}; give another out=")
        return self._result(sweep, before, time.perf_counter() - started)

    def _split(self, item: Any, number: int) -> tuple[Any, Any]:
        if self.ablation == "resample":
            if not isinstance(item, tuple | list) or len(item) != 2:
                given = f"{len(item)} things" if isinstance(item, tuple | list) else type(item).__name__
                raise InputError(f"pairs: expected (x_base, x_source), got {given} in batch {number}")
            return tuple(_arguments(x) for x in item)  # pyright: ignore[reportReturnType]
        return _arguments(item[0] if isinstance(item, list) and len(item) == 1 else item), None

    def _look(self, passes: Passes, args: tuple) -> None:
        """Finds the units, from the first batch, and notes what the sums are of."""
        self.targets = targets_at(passes, self.sites, self.unit, self.heads)
        self._rows = _shapes(args)
        labels = hashlib.blake2b(digest_size=16)
        for t in self.targets:
            labels.update(t.labels.to(torch.int64).numpy().tobytes())
        groups = None
        if self.groups is not None:
            groups = [list(self.groups.names), _digest("", (self.groups.labels,))]
        name = None if self.readout is None else getattr(self.readout, "__qualname__", type(self.readout).__name__)
        reference = self.sources.reference
        structure = [(n, type(m).__name__, m.extra_repr()) for n, m in self.module.named_modules()]
        configuration = {
            "sites": [str(t.selection) for t in self.targets],
            "unit": [self.unit, self.heads, labels.hexdigest()],
            "ablation": self.ablation,
            "effect": self.effect,
            "groups": groups,
            "recovery": self.recovery,
            "reference": None if reference is None else _digest("", inputs_of(reference)[0]),
            "readout": name,
            "replicates": self.replicates,
            "seed": self.seed,
            "tile": self.tile,
            "rows": self._rows,
            "module": [type(self.module).__name__, _digest("", self.module.state_dict(), structure)],
        }
        self.configuration = json.loads(json.dumps(configuration))

    def _check_rows(self, args: tuple, number: int) -> None:
        shapes = _shapes(args)
        if shapes != self._rows:
            raise InputError(f"pairs: rows of batch {number} are {shapes}, of the first {self._rows}")

    def _sweep(self, passes: Passes, source: Any, rows: int) -> Sweep:
        """Made anew for each batch: what it does is then of this batch alone, whichever run it is in."""
        sources = self.sources
        if source is not None:
            sources.args, given = inputs_of(source)
            if given != rows:
                raise InputError(f"x_source: has {given} rows, x_base {rows}; they are pairs")
        sources.rows, sources.seed = rows, self.seed + self.counted.samples
        return Sweep(passes, self.targets, sources, self.effect, self.groups, self.recovery, self.tile)

    def _add(self, sweep: Sweep, rows: int, data: str) -> None:
        before = self.counted

        def weights(n: int, first: int) -> Tensor:
            """Those of the bootstrap; beside them a row each for the first samples, of which a jackknife can be made
            where there are no more."""
            first += before.samples
            own = (torch.arange(FEW - 1)[:, None] == torch.arange(first, first + n)).float()
            kept = own if self.replicates else own[:0]
            return torch.cat([poisson_weights(self.replicates, n, self.seed, first), kept])

        sums = sweep.sums(weights)
        if before.sums:
            sums = {name: before.sums[name] + value for name, value in sums.items()}
        self.flops, self.bytes = self.flops + sweep.flops, self.bytes + sweep.bytes
        self.counted = _Counted(sums, before.batches + 1, before.samples + rows, data)

    def _result(self, sweep: Sweep, before: _Counted, seconds: float) -> PatchEffects:
        sums, n, r = dict(self.counted.sums), self.counted.samples, self.replicates
        if r and n < FEW:
            others = (1 - torch.eye(n)).to(sums["drawn"])
            sums["drawn"], sums["weights"] = others @ sums["drawn"][r : r + n], others.sum(1)
        else:
            sums["drawn"], sums["weights"] = sums["drawn"][:r], sums["weights"][:r]
        plan = f"{n} samples in {self.counted.batches} batches"
        plan += f", {before.batches} of which an earlier run had counted" if before.batches else ""
        if n > before.samples:
            sweep.flops, sweep.bytes = self.flops, self.bytes
            plan += f"; in this run {sweep.plan(n - before.samples, seconds)}"
        return sweep.result(sums, n, plan)

    def _save(self, state: Path) -> None:
        if self.counted is self.saved:
            return
        now = self.counted
        header = {
            "configuration": self.configuration,
            "batches": now.batches,
            "samples": now.samples,
            "data": now.data,
        }
        write_tensors(state, _KIND, now.sums, header)
        self.saved = now

    def _loaded(self, state: Path) -> _Counted:
        tensors, header = read_tensors(state, _KIND, "delete it to start over")
        found = header["configuration"]
        names = dict.fromkeys([*self.configuration, *found])
        differing = [name for name in names if found.get(name) != self.configuration.get(name)]
        if differing:
            name = differing[0]
            more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
            raise InputError(
                f"out: {state} is of another sweep: its {name} is {_short(found.get(name))}, this one's "
                f"{_short(self.configuration.get(name))}{more}; give another out=, or delete it"
            )
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        sums = {name: t.to(device) for name, t in tensors.items()}
        return _Counted(sums, header["batches"], header["samples"], header["data"])


def _arguments(x: Any) -> Any:
    """A loader gives tuples as lists."""
    return tuple(x) if isinstance(x, list) else x


def _shapes(args: tuple) -> list:
    """Shapes of the rows of all tensors, with their dtypes."""
    return [[list(a.shape[1:]), str(a.dtype)] for a in args if isinstance(a, Tensor) and a.ndim]


def _digest(before: str, *values: Any) -> str:
    """A digest of tensors, in nested tuples and mappings, behind an earlier one."""
    digest = hashlib.blake2b(before.encode(), digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for name, part in value.items():
                digest.update(str(name).encode())
                add(part)
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _reporter(pairs: Any) -> Progress:
    """Writes how far a sweep is to stderr: one line on a terminal, one each half minute elsewhere."""
    last = time.monotonic()
    try:
        total = f" of {len(pairs)}"
    except TypeError:
        total = ""

    def report(batches: int, samples: int) -> None:
        nonlocal last
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - last >= (0.2 if terminal else _LINES):
            last = now
            text = f"patch sweep: {batches}{total} batches, {samples:,} samples"
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return report
