"""Patches behind which are layers that the kernels know: what is behind a site as a network, and effects through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..groups import Groups
from ..ops import effect_reduction
from ..ops._network_outputs import network_outputs
from ..ops.latent_sweep import ROW as LATENT_SWEEP
from ..ops.latent_sweep import Dense, Network
from ..ops.patch_mix import ROW as PATCH_MIX
from .fused import DISAGREES, agrees, backend_for, gram_head
from .networks import ACTIVATIONS, record
from .patching import read_out, run_with_cache, taken
from .selection import Selection
from .trace import Step

if TYPE_CHECKING:
    from .passes import Passes, Target


@dataclass(frozen=True)
class Kernel:
    """What is behind a vector or image: activations to pass first, then a network that the kernels know.

    alone: every unit is one element of a vector, which the op `latent_sweep` shifts; `patch_mix` sets any unit. Behind
    it one linear layer alone, all that a unit does is its column of the weights times its change. flops: of one patched
    sample. before: the layers that lead from the module's one input, a vector, to the site, of which the kernels make
    activations too; None where these are others, and the module itself runs.
    """

    lead: tuple[Step, ...]
    network: Network
    alone: bool
    flops: int
    before: Network | None = None

    def effects(
        self, base: Tensor, source: Tensor, target: Target, effect: str, groups: Groups, against: str = "base"
    ) -> Tensor:
        """(B, U, G) of setting each unit of base (B, ...) to the source's, against base's output or source's; against
        the source there is a unit more, (B, U + 1, G), which changes nothing."""
        base, source = self._pass(base).flatten(1), self._pass(source.to(base)).flatten(1)
        numbers = torch.tensor(target.units, device=base.device)
        if self.alone and self.network.link == "identity" and len(self.network.layers) == 1 and against == "base":
            return self._columns((source - base)[:, numbers], numbers, effect, groups)
        head = gram_head(self.network, groups, effect, len(base) * len(numbers))
        network, kind = self.network, effect
        if not isinstance(head, str):
            network, groups, kind = head.network, head.groups, "mse"
        if self.alone and against == "base":
            shifts = (source - base)[:, numbers]
            out = ops.latent_sweep(base, numbers[:, None], shifts[..., None], network, kind, groups=groups)
        else:
            labels = target.labels.to(base.device, torch.int32)
            if against == "source":
                numbers = torch.cat([numbers, numbers.max()[None] + 1])
            out = ops.patch_mix(base, source, labels, numbers, network, kind, groups=groups, against=against)
        if isinstance(head, str):
            return out
        out = out * head.factor.to(out)
        return out.sqrt() if effect == "rms" else out

    def _columns(self, shifts: Tensor, numbers: Tensor, effect: str, groups: Groups) -> Tensor:
        """Effects (B, U, G) of shifts (B, U) of inputs of the one linear layer: of unit shifts, times their size."""
        columns = self.network.layers[0].weight.T[numbers][None]
        of_one = effect_reduction(columns.new_zeros(1, columns.shape[2]), columns, effect, groups=groups)
        size = {"signed": shifts, "mse": shifts.square()}.get(effect, shifts.abs())
        return size[..., None] * of_one

    def agrees(self, a: Tensor, y: Tensor) -> bool:
        """Whether outputs for activations a (R, ...) are y (R, P), up to rounding."""
        return agrees(self.network, self._pass(a), y)

    def _pass(self, a: Tensor) -> Tensor:
        for step in self.lead:
            a = step.func(a.clone() if step.written else a, *step.args[1:], **step.kwargs)
        return a


def kernels_behind(passes: Passes, targets: Sequence[Target], recovery: bool = False) -> dict[Selection, Kernel]:
    """The kernels for what is behind sites, where there are; they were compared with the module on two rows.

    recovery: effects are also to be measured against the source's output.
    """
    found = {t.selection: kernel for t in targets if (kernel := _kernel_behind(passes, t, recovery)) is not None}
    if found:
        names = {t.selection: t.site for t in targets if t.selection in found}
        rows = taken(passes.args, passes.rows, slice(0, 2))
        y, cache = run_with_cache(passes.module, rows, list(dict.fromkeys(names.values())))
        y = read_out(y, passes.readout).flatten(1)
        for selection, name in names.items():
            if not found[selection].agrees(cache[name], y):
                del found[selection]
                continue
            before = _network_before(passes, next(t for t in targets if t.selection == selection))
            if before is not None and _gives(before, rows[0], cache[name].flatten(1)):
                found[selection] = replace(found[selection], before=before)
    return found


def _network_before(passes: Passes, target: Target) -> Network | None:
    """The known layers from the module's one input, a vector, to a site."""
    one, values = passes.one, passes.values
    value = target.value(one)
    if len(passes.args) != 1 or len(one.inputs) != 1 or values[value].dtype != torch.float32:
        return None
    (start,) = one.inputs
    program = one.between([start], value)
    if values[start].ndim != 2 or values[start].dtype != torch.float32 or program.needs or not program.chosen:
        return None
    if backend_for(values[start]) != "cpp":
        return None
    network = record(lambda z: program.run({start: z}, {value})[value], values[start]).network
    return network if network is not None and network.link == "identity" else None


def _gives(network: Network, z: Tensor, activations: Tensor) -> bool:
    """Whether the kernel's outputs for z (R, L) are the activations (R, P), all finite, up to rounding."""
    apart = (network_outputs(network, z) - activations).abs()
    return bool((apart <= DISAGREES * activations.abs().amax().clamp(min=torch.finfo(apart.dtype).tiny)).all())


def _kernel_behind(passes: Passes, target: Target, recovery: bool) -> Kernel | None:
    """That of one site, judged on a pass of one row."""
    one, values = passes.one, passes.values
    value = target.value(one)
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
    needed = [LATENT_SWEEP if alone else PATCH_MIX, *([PATCH_MIX] if recovery else [])]
    if any(backend_for(row, row=op) in (None, "reference") for op in needed):
        return None
    first, *others = network.multiplications()
    share = float((target.labels >= 0).sum()) / len(target.units) / len(target.labels)  # a unit's, of the inputs
    update = isinstance(network.layers[0], Dense) or 2 * share <= 1
    flops = 2 * (sum(others) + round(first * (share if update else 1)))
    return Kernel(tuple(lead), network, alone, flops)
