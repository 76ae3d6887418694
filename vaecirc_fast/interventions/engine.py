"""The generic engine: any decoder, called on intervened inputs tile by tile, its outputs reduced to effects at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._allocator import kept_memory
from ..errors import InputError
from ..groups import Groups, whole
from ..ops import effect_reduction
from ..reference.effect_reduction import KINDS
from .accumulate import Accumulator, Axes
from .effect_tables import check_out
from .effects import Effects
from .networks import Recorded, record

# Activations of one forward pass. A CPU tile should stay in the shared cache; a GPU tile should fill the
# multiprocessors.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
LARGEST_TILE = 4096


class Path(Protocol):
    """One way to compute the effects of a sweep's interventions."""

    def parts(self) -> Iterator[slice]:
        """Slices of the samples, to be asked for one after the other."""
        ...

    def effects(self, part: slice) -> Tensor:
        """(B, J, G) effects of the J decoded interventions on the samples of `part`."""
        ...

    def plan(self, seconds: float) -> str:
        """What was done, for people; `seconds` is what the whole sweep took."""
        ...


def sweep(
    call: Calls,
    axes: Axes,
    path: Path,
    groups: Groups,
    *,
    effect: str,
    reduce: str | None,
    replicates: int,
    seed: int,
    started: float,
    out: str | FilePath | None = None,
) -> Effects:
    """Run all parts of a sweep along `path` and add up their effects. started: when, by `time.perf_counter()`."""
    accumulator = Accumulator(
        axes,
        len(call.inputs),
        groups,
        effect=effect,
        reduce=reduce,
        replicates=replicates,
        seed=seed,
        dtype=call.dtype,
        device=call.inputs.device,
        out=out,
    )
    try:
        for part in path.parts():
            accumulator.add(part, path.effects(part))
        return accumulator.result(path.plan(time.perf_counter() - started))
    finally:
        accumulator.discard()


class GenericPath:
    """The decoder itself, called on intervened inputs. Used within `with call:`.

    intervened: (samples, interventions (J,)) -> (B, J, ...), what the decoder is given instead of inputs[samples]
    under each of these interventions, numbered as `axes.decoded.nonzero()` lists them. skip_unchanged: rows that equal
    their base input are not decoded; their effect is exactly 0. why: the reason for this path, for the plan.
    """

    def __init__(
        self,
        call: Calls,
        axes: Axes,
        intervened: Callable[[slice, Tensor], Tensor],
        groups: Groups,
        *,
        skip_unchanged: bool = False,
        why: str = "",
    ):
        self.call, self.axes, self.intervened, self.groups = call, axes, intervened, groups
        self.skip_unchanged, self.why, self.unchanged = skip_unchanged, why, 0
        self.numbers = torch.arange(int(axes.decoded.sum()))

    def parts(self) -> Iterator[slice]:
        inputs = self.call.inputs
        most = most_bytes(inputs.device) // (8 * self.axes.decoded.numel() * len(self.groups))  # effects of so many
        return slices(len(inputs), max(1, min(self.call.rows, most, len(inputs))))

    def effects(self, part: slice) -> Tensor:
        call, inputs = self.call, self.call.inputs
        base = call(inputs[part])
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        effects = base.new_zeros(len(base), len(self.numbers), len(self.groups), dtype=dtype)
        for local, chosen in tiles(len(base), len(self.numbers), call.rows):
            here = slice(part.start + local.start, part.start + local.stop)
            batch = self.intervened(here, self.numbers[chosen])
            if self.skip_unchanged:
                changed = (batch != inputs[here, None]).flatten(2).any(2)
                self.unchanged += int((~changed).sum())
                if not bool(changed.all()):
                    n, j = changed.nonzero(as_tuple=True)
                    if len(n):
                        e = call.effects(base[local][n], call(batch[n, j])[:, None], self.groups)
                        effects[local.start + n, chosen.start + j] = e[:, 0]
                    continue
            y = call(batch.flatten(0, 1)).unflatten(0, batch.shape[:2])
            effects[local, chosen] = call.effects(base[local], y, self.groups)
        return effects

    def plan(self, seconds: float) -> str:
        call = self.call
        because = f" ({self.why})" if self.why else ""
        plan = (
            f"generic engine{because}: {call.decodes} decodes in tiles of {call.rows} rows "
            f"({call.recorded.bytes / 1e3:.0f} kB of activations a row), {1e6 * seconds / call.decodes:.1f} us a "
            "decode"
        )
        zero = int((~self.axes.decoded).sum())
        plan += f", {zero} zero steps not decoded" if zero else ""
        return plan + f", nor {self.unchanged} interventions that change nothing" if self.skip_unchanged else plan


class Calls:
    """A decoder looked at on one row of the inputs (N, ...), and ready for many calls within `with`: a CPU module's
    parameters are then laid out for its convolutions.

    recorded: what the look showed. elements: P of an output. dtype: of the outputs. rows: of one call. decodes: rows
    that were asked for.
    """

    def __init__(self, decoder: Any, inputs: Tensor, effect: str, on: str, tile: int | None):
        owner = getattr(decoder, "__self__", decoder)  # of a bound method, such as model.decode
        if isinstance(owner, nn.Module):
            refuse_train_mode(owner)
        call = getattr(decoder, "logits", None) if on == "logits" or effect == "logit_mse" else decoder
        if call is None:
            raise InputError("on: the decoder has no method `logits`, which on='logits' and effect='logit_mse' need")
        self._call, self._effect, self._decoder, self.inputs = call, effect, decoder, inputs
        self._stack = contextlib.ExitStack()
        self.decodes = 0
        self.recorded = record(call, inputs[:1])
        first = _checked_row(self.recorded, inputs[:1])
        self.elements, self.dtype = first[0].numel(), first.dtype
        fitting = max(1, min(most_bytes(inputs.device) // self.recorded.bytes, LARGEST_TILE))
        self.rows = fitting if tile is None else tile

    def __enter__(self) -> Calls:
        self._stack.enter_context(channels_last(self._decoder, self.inputs.device))
        self._stack.enter_context(kept_memory(self.inputs.device.type == "cpu"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __call__(self, batch: Tensor) -> Tensor:
        """Outputs (rows, P) for a batch (rows, ...)."""
        self.decodes += len(batch)
        return _outputs(self._call, batch, self.elements)

    def partition(self, groups: Groups | None) -> Groups:
        """The groups on the right device, all elements in one by default; InputError if they do not fit the output."""
        groups = (whole(self.elements) if groups is None else groups).to(self.inputs.device)
        if groups.labels.numel() != self.elements:
            raise InputError(
                f"groups: partition {groups.labels.numel()} elements, but the decoder's output has {self.elements}"
            )
        return groups

    def effects(self, base: Tensor, y: Tensor, groups: Groups) -> Tensor:
        """Effects (B, J, G) of outputs y (B, J, P) against base (B, P)."""
        link = "sigmoid" if self._effect == "logit_mse" else "identity"
        return effect_reduction(base, y, self._effect, groups=groups, link=link)


def check_options(
    *,
    effect: str,
    groups: Groups | None,
    reduce: str | None,
    on: str,
    replicates: int,
    tile: int | None,
    out: str | FilePath | None = None,
    **counts: int,
) -> None:
    """InputError for an option that every kind of sweep refuses; `counts` are numbers of at least 1, by name."""
    if effect not in KINDS:
        raise InputError(f"effect: {effect!r} is unknown; known: {', '.join(KINDS)}")
    if reduce not in ("mean", None):
        raise InputError(f'reduce: expected "mean" or None, got {reduce!r}')
    if on not in ("output", "logits"):
        raise InputError(f'on: expected "output" or "logits", got {on!r}')
    if groups is not None and not isinstance(groups, Groups):
        raise InputError(f"groups: expected Groups, as vf.groups.cells makes them, got {type(groups).__name__}")
    for name, count in ({"replicates": replicates, "tile": tile} | counts).items():
        least = 0 if name == "replicates" else 1
        if not (isinstance(count, int) and count >= least or name == "tile" and count is None):
            raise InputError(f"{name}: expected an integer of at least {least}, got {count!r}")
    if out is not None:
        check_out(out)


def refuse_train_mode(decoder: nn.Module) -> None:
    for name, module in decoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"decoder: {name or 'it'} ({type(module).__name__}) keeps no running statistics, so a row's output "
                "would depend on the rows beside it"
            )
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise InputError(
                f"decoder: {name or 'it'} ({type(module).__name__}) is in train mode, so outputs would be random or "
                "change its statistics; call decoder.eval() first"
            )


@contextlib.contextmanager
def channels_last(decoder: Any, device: torch.device) -> Iterator[None]:
    """Within, a CPU module's 4-d parameters are channels-last, on which its convolutions run faster."""
    parameters = [p for p in decoder.parameters() if p.ndim == 4] if isinstance(decoder, nn.Module) else []
    if device.type != "cpu" or not parameters:
        yield
        return
    before = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, data in zip(parameters, before, strict=True):
            p.data = data


def _checked_row(recorded: Recorded, row: Tensor) -> Tensor:
    y = recorded.output
    if not isinstance(y, Tensor) or y.shape[:1] != row.shape[:1] or y.ndim < 2 or not y.is_floating_point():
        given = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"decoder: expected a float tensor (rows, ...) for z (rows, L), got {given} for one row")
    return y


def _outputs(call: Callable[[Tensor], Tensor], codes: Tensor, elements: int) -> Tensor:
    """Outputs (rows, P) for codes (rows, L)."""
    y = call(codes)
    if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != len(codes) or y[0].numel() != elements:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"decoder: expected (rows, ...) with {elements} elements a row for z (rows, L), got {given} for "
            f"{len(codes)} rows"
        )
    return y.flatten(1)


def most_bytes(device: torch.device) -> int:
    return TILE_BYTES.get(device.type, TILE_BYTES["cuda"])


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of [0, total) of nearly equal length, at most `size`."""
    parts = -(-total // size)
    for k in range(parts):
        yield slice(total * k // parts, total * (k + 1) // parts)


def tiles(samples: int, interventions: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Pairs (samples, interventions) whose product is at most `rows`: whole samples where they fit."""
    for part in slices(samples, max(1, rows // max(interventions, 1))) if interventions else ():
        for chunk in slices(interventions, rows):
            yield part, chunk
