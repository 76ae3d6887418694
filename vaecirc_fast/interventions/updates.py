"""One changed channel, followed to the first layers that mix channels: there it adds what its own weights make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from .trace import Program, Step, Value

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)  # 16 bits would be rounded once more
ELEMENTWISE = {aten._prelu_kernel.default, aten.hardswish.default, aten.hardswish_.default, aten.detach.default}
NORMS = {  # in training they give statistics too, and are refused before
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
}
RESHAPES = {aten.view.default, aten._unsafe_view.default}
OF_PLACES = {  # of an image, each channel by itself
    aten.avg_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten._adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.mean.dim,
}


@dataclass(frozen=True)
class Part:
    """Which elements of a value a channel is: channel u those from u * size to (u + 1) * size of an axis."""

    axis: int
    size: int = 1

    def of(self, t: Tensor, channel: int) -> Tensor:
        """A view of them."""
        return t.narrow(self.axis, channel * self.size, self.size)

    def shared(self, t: Tensor, channel: int, ndim: int) -> Tensor:
        """What of `t`, which is broadcast to a value of `ndim` axes, meets them."""
        axis = self.axis - (ndim - t.ndim)
        return t if axis < 0 or t.shape[axis] == 1 else Part(axis, self.size).of(t, channel)


class Updates:
    """What a program runs instead where one channel of its start changes, the same one in all rows.

    The channel alone passes what keeps channels apart: elementwise operations, batch norm, pooling. A convolution or a
    product with weights that it reaches gives what it gave for the base, plus the channel's difference times the
    channel's weights. `rest` runs as a whole, on the base's values with the channel set where it reads such.

    needs: values of the base that must be there. flops: of one pass.
    """

    def __init__(self, program: Program, start: Value, axis: int):
        self.trace, self.start = program.trace, start
        self.parts = {start: Part(axis)}
        self.local: list[tuple[Step, Value]] = []
        self.linear: list[tuple[Step, Value, Value]] = []  # with what it reads and makes
        self.flops = 0
        steps, rest = self.trace.steps, []
        changed = {start}.union(*(steps[n].makes for n in program.chosen))
        read = {v for n in program.chosen for v in steps[n].reads} | {self.trace.output}
        for n in program.chosen:
            step = steps[n]
            made, *others = (v for v in (*step.made, *(v for _, v in step.written)) if v is not None)
            if changed.intersection(step.reads) <= self.parts.keys() and read.isdisjoint(others):
                if (part := self._passes(step, made)) is not None:
                    self.parts[made] = part
                    self.local.append((step, made))
                    continue
                if (x := self._mixes(step)) is not None:
                    self.linear.append((step, x, made))
                    self.flops += self.trace.flops[n] * self.parts[x].size // self._shape(x)[self.parts[x].axis]
                    continue
            rest.append(n)
        outer = {v for n in rest for v in steps[n].reads} | {self.trace.output}
        self.whole = tuple(v for v in self.parts if v in outer)
        added = {made for *_, made in self.linear}
        self.rest = Program(self.trace, tuple(rest), {*self.whole, *added})
        self.flops += self.rest.flops
        beside = {v for step, _ in self.local for v in step.reads} - changed
        mixed = {x for _, x, _ in self.linear}
        self.needs = frozenset({start, *self.whole, *added, *mixed, *beside, *self.rest.needs})

    def _shape(self, value: Value) -> tuple[int, ...]:
        return self.trace.layouts[value.number][0]

    def _passes(self, step: Step, made: Value) -> Part | None:
        """The part of what an operation makes that the channel's part of what it reads makes; None if there is none."""
        tensors = [a for a in step.args if isinstance(a, Value | Tensor)]
        everything = tree_iter((step.args, dict(step.kwargs)), is_leaf=lambda a: isinstance(a, Value))
        if not isinstance(step.func, torch._ops.OpOverload) or len(tensors) < sum(
            isinstance(a, Value | Tensor) for a in everything
        ):
            return None
        mine = [v for v in step.reads if v in self.parts]
        part, before, after = self.parts[mine[0]], self._shape(mine[0]), self._shape(made)
        if torch.Tag.pointwise in step.func.tags or step.func in ELEMENTWISE:
            alike = all(self.parts[v] == part and self._shape(v) == after for v in mine)
            return part if alike else None
        if step.args[0] != mine[0] or len(step.reads) > 1:
            return None
        if step.func in NORMS:
            return part if part.axis == 1 else None
        if step.func in OF_PLACES:
            axes = [a % len(before) for a in step.args[1]] if step.func is aten.mean.dim and step.args[1] else [2]
            return part if part.axis == 1 and len(before) == 4 and min(axes) > 1 else None
        return _reshaped(part, before, after) if step.func in RESHAPES else None

    def _mixes(self, step: Step) -> Value | None:
        """What a convolution or a product with fixed weights reads, if a channel is at most half of it."""
        func, n = step.func, 1 if step.func is aten.addmm.default else 0
        if func not in (aten.convolution.default, aten.addmm.default, aten.mm.default, aten.linear.default):
            return None
        x, weight = step.args[n : n + 2]
        if step.kwargs or x not in self.parts or not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
            return None
        part, shape = self.parts[x], self._shape(x)
        axis = len(shape) - 1
        if func is aten.convolution.default:
            axis = 1 if step.args[8] == 1 and len(shape) == weight.ndim else -1
        only = [v for v in step.reads if v in self.parts] == [x]
        return x if only and part.axis == axis and 2 * part.size <= shape[axis] else None


class Updated:
    """`Updates` on one batch. values: the base's; source: what the start becomes, of its shape."""

    def __init__(self, updates: Updates, values: Mapping[Value, Tensor], source: Tensor):
        self.updates, self.values = updates, values
        self.source = source.to(values[updates.start])
        self._kept = {v: values[v].clone() for v in updates.whole}
        self._set: int | None = None  # the channel that these have

    @property
    def possible(self) -> bool:
        """Whether all that is added to or taken away is finite: nothing can be taken from an infinity."""
        ends = {v for _, *two in self.updates.linear for v in two}
        return all(bool(torch.isfinite(self.values[v]).all()) for v in ends)

    def run(self, channel: int) -> Tensor:
        """The program's output where this channel is the source's; it stays until the next call."""
        u, values = self.updates, self.values
        new = {u.start: u.parts[u.start].of(self.source, channel)}
        for step, made in u.local:
            new[made] = self._passed(step, made, new, channel)
        given = dict(values)
        for step, x, made in u.linear:
            before = u.parts[x].of(values[x], channel)
            last = before.ndim == 4 and values[x].is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format  # one channel's strides would fit both
            delta = torch.empty(before.shape, dtype=before.dtype, device=before.device, memory_format=layout)
            torch.sub(new[x], before, out=delta)
            given[made] = _added(step, values[made], delta, u.parts[x], channel)
        for v, kept in self._kept.items():
            part = u.parts[v]
            if self._set is not None:
                part.of(kept, self._set).copy_(part.of(values[v], self._set))
            part.of(kept, channel).copy_(new[v])
        self._set = channel
        return u.rest.run(given | self._kept)[u.trace.output]

    def _passed(self, step: Step, made: Value, new: Mapping[Value, Tensor], channel: int) -> Tensor:
        u = self.updates
        x = next(v for v in step.reads if v in new)
        part = u.parts[x]
        shape = u.trace.layouts[made.number][0]
        if step.func in RESHAPES:
            there = u.parts[made]
            return new[x].reshape(*shape[: there.axis], there.size, *shape[there.axis + 1 :])
        ndim = part.axis + 1 if step.func in NORMS else len(shape)
        args: list[Any] = list(step.args)
        for n, a in enumerate(args):
            if isinstance(a, Value) and a in new:
                args[n] = new[a]
            elif isinstance(a, Value | Tensor):
                args[n] = part.shared(self.values[a] if isinstance(a, Value) else a, channel, ndim)
        for position, _ in step.written:
            args[position] = args[position].clone()
        out = step.func(*args, **step.kwargs)
        return next(t for t in tree_iter(out) if isinstance(t, Tensor))


def _reshaped(part: Part, before: Sequence[int], after: Sequence[int]) -> Part | None:
    """A channel's part of a value that is seen in another shape."""
    axis = part.axis
    if axis == len(before) - 1 and after[-1] == before[-1]:
        return Part(len(after) - 1, part.size)
    if tuple(after[: axis + 1]) == tuple(before[: axis + 1]):
        return part
    behind = prod(before[axis:])
    return Part(axis, part.size * prod(before[axis + 1 :])) if tuple(after) == (*before[:axis], behind) else None


def _added(step: Step, base: Tensor, delta: Tensor, part: Part, channel: int) -> Tensor:
    """What a layer made of the base, with what the difference of a channel adds."""
    if step.func is aten.convolution.default:
        weight = Part(0 if step.args[6] else 1, part.size).of(step.args[1], channel)
        more = aten.convolution.default(delta, weight, None, *step.args[3:])
        return more.add_(base) if more.stride() == base.stride() else torch.add(base, more, out=torch.empty_like(base))
    if step.func is aten.linear.default:
        return base + aten.linear.default(delta, Part(1, part.size).of(step.args[1], channel))
    weight = step.args[2] if step.func is aten.addmm.default else step.args[1]
    return torch.addmm(base, delta, Part(0, part.size).of(weight, channel))
