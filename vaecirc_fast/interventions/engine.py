"""The generic engine: any decoder, called on intervened inputs tile by tile, its outputs reduced to effects at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import InputError
from ..groups import Groups, whole
from ..ops import effect_reduction
from ..reference.effect_reduction import KINDS
from .accumulate import Accumulator, Axes
from .effects import Effects

# Activations of one forward pass. A CPU tile should stay in the shared cache; a GPU tile should fill the
# multiprocessors.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
LARGEST_TILE = 4096


def sweep(
    decoder: Callable[[Tensor], Tensor],
    inputs: Tensor,
    intervened: Callable[[slice, Tensor], Tensor],
    axes: Axes,
    *,
    effect: str,
    groups: Groups | None,
    reduce: str | None,
    on: str,
    replicates: int,
    seed: int,
    tile: int | None,
    skip_unchanged: bool = False,
) -> Effects:
    """Effects of `axes`' decoded interventions on the decoder's output, against its output for `inputs` (N, ...).

    intervened: (samples, interventions (J,)) -> (B, J, ...), what the decoder is given instead of inputs[samples]
    under each of these interventions, numbered as `axes.decoded.nonzero()` lists them. skip_unchanged: rows that equal
    their base input are not decoded; their effect is exactly 0. The rest is as in `latent_sweep`.
    """
    started = time.perf_counter()
    samples = len(inputs)
    with Calls(decoder, inputs, effect, on, tile) as call:
        groups = call.partition(groups)
        accumulator = Accumulator(
            axes,
            samples,
            groups,
            effect=effect,
            reduce=reduce,
            replicates=replicates,
            seed=seed,
            dtype=call.dtype,
            device=inputs.device,
        )
        numbers = torch.arange(int(axes.decoded.sum()))
        unchanged = 0
        most = most_bytes(inputs.device) // (8 * axes.decoded.numel() * len(groups))  # the effects of so many samples
        for part in slices(samples, max(1, min(call.rows, most, samples))):
            base = call(inputs[part])
            effects = base.new_zeros(len(base), len(numbers), len(groups), dtype=accumulator.dtype)
            for local, chosen in tiles(len(base), len(numbers), call.rows):
                here = slice(part.start + local.start, part.start + local.stop)
                batch = intervened(here, numbers[chosen])
                if skip_unchanged:
                    changed = (batch != inputs[here, None]).flatten(2).any(2)
                    unchanged += int((~changed).sum())
                    if not bool(changed.all()):
                        n, j = changed.nonzero(as_tuple=True)
                        if len(n):
                            e = call.effects(base[local][n], call(batch[n, j])[:, None], groups)
                            effects[local.start + n, chosen.start + j] = e[:, 0]
                        continue
                y = call(batch.flatten(0, 1)).unflatten(0, batch.shape[:2])
                effects[local, chosen] = call.effects(base[local], y, groups)
            accumulator.add(part, effects)
    seconds = time.perf_counter() - started
    plan = (
        f"generic engine: {call.decodes} decodes in tiles of {call.rows} rows ({call.bytes_per_row / 1e3:.0f} kB of "
        f"activations a row), {1e6 * seconds / call.decodes:.1f} us a decode, "
        f"{int((~axes.decoded).sum())} zero steps not decoded"
    )
    if skip_unchanged:
        plan += f", nor {unchanged} interventions that change nothing"
    return accumulator.result(plan)


class Calls:
    """A decoder ready for many calls: looked at, measured on one row, its parameters laid out for the CPU within.

    elements: P of an output. dtype: of the outputs. rows: of one call. decodes: rows that were asked for.
    """

    def __init__(self, decoder: Any, inputs: Tensor, effect: str, on: str, tile: int | None):
        owner = getattr(decoder, "__self__", decoder)  # of a bound method, such as model.decode
        if isinstance(owner, nn.Module):
            refuse_train_mode(owner)
        call = getattr(decoder, "logits", None) if on == "logits" or effect == "logit_mse" else decoder
        if call is None:
            raise InputError("on: the decoder has no method `logits`, which on='logits' and effect='logit_mse' need")
        self._call, self._effect, self._decoder, self._inputs, self._tile = call, effect, decoder, inputs, tile
        self._stack = contextlib.ExitStack()
        self.decodes = 0

    def __enter__(self) -> Calls:
        device = self._inputs.device
        with contextlib.ExitStack() as stack:
            stack.enter_context(_channels_last(self._decoder, device))
            first, self.bytes_per_row = _measured(self._call, self._inputs[:1])
            self._stack = stack.pop_all()
        self.elements, self.dtype = first[0].numel(), first.dtype
        fitting = max(1, min(most_bytes(device) // self.bytes_per_row, LARGEST_TILE))
        self.rows = fitting if self._tile is None else self._tile
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __call__(self, batch: Tensor) -> Tensor:
        """Outputs (rows, P) for a batch (rows, ...)."""
        self.decodes += len(batch)
        return _outputs(self._call, batch, self.elements)

    def partition(self, groups: Groups | None) -> Groups:
        """The groups on the right device, all elements in one by default; InputError if they do not fit the output."""
        groups = (whole(self.elements) if groups is None else groups).to(self._inputs.device)
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
    *, effect: str, groups: Groups | None, reduce: str | None, on: str, replicates: int, tile: int | None, **counts: int
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
def _channels_last(decoder: Any, device: torch.device) -> Iterator[None]:
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


class _OutputBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that the operations within produce; views of their inputs are none."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        made = (t for t in tree_iter(out) if isinstance(t, Tensor))
        self.total += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in given)
        return out


def _measured(call: Callable[[Tensor], Tensor], row: Tensor) -> tuple[Tensor, int]:
    """The output for one row and the bytes of activations it made."""
    with _OutputBytes() as counter:
        y = call(row)
    if not isinstance(y, Tensor) or y.shape[:1] != row.shape[:1] or y.ndim < 2 or not y.is_floating_point():
        given = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"decoder: expected a float tensor (rows, ...) for z (rows, L), got {given} for one row")
    return y, max(counter.total, 1)


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
