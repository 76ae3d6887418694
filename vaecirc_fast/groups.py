"""Partitions of a module's output elements into the groups that effects are reported for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of P output elements (the output flattened, row-major) into G named groups.

    labels: (P,) int32, the group of each element in [0, G), or -1 for an element left out.
    names: G strings. shape: how to lay the groups out in a picture, with prod(shape) = G.
    order, offsets: the elements sorted by group, (n,) int32, and where each group starts in it, (G + 1,) int32.
    """

    labels: Tensor
    names: tuple[str, ...]
    shape: tuple[int, ...]
    order: Tensor = field(repr=False)
    offsets: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> Tensor:
        """Elements per group, (G,) int64."""
        return self.offsets.diff().long()

    def to(self, device: torch.device | str) -> Groups:
        """The same partition on `device`."""
        if self.labels.device == torch.device(device):
            return self
        return Groups(self.labels.to(device), self.names, self.shape, self.order.to(device), self.offsets.to(device))


def from_labels(
    labels: Tensor | Sequence[int], names: Sequence[str] | None = None, shape: tuple[int, ...] | None = None
) -> Groups:
    """Any partition: `labels` (P,) integers, groups 0..G-1 with none empty, -1 for elements left out."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: expected integers of shape (P,), P > 0 ({error})") from error
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not integers or labels.numel() == 0:
        raise InputError(f"labels: expected integers of shape (P,), P > 0, got {labels.dtype} {tuple(labels.shape)}")
    if int(labels.min()) < -1 or int(labels.max()) < 0:
        raise InputError("labels: expected groups 0..G-1, or -1 for elements in no group")
    labels = labels.to("cpu", torch.int64)
    count = int(labels.max()) + 1
    kept = labels[labels >= 0]
    sizes = torch.bincount(kept, minlength=count)
    if bool((sizes == 0).any()):
        raise InputError(f"labels: group {int((sizes == 0).nonzero()[0])} of 0..{count - 1} has no element")
    names = tuple(names) if names is not None else tuple(f"group {g}" for g in range(count))
    if len(names) != count:
        raise InputError(f"names: expected {count}, one a group, got {len(names)}")
    shape = tuple(shape) if shape is not None else (count,)
    if math.prod(shape) != count:
        raise InputError(f"shape: expected sizes whose product is the {count} groups, got {shape}")
    order = torch.argsort(labels, stable=True)[int((labels < 0).sum()) :]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return Groups(labels.int(), names, shape, order.int(), offsets.int())


def members(
    groups: Mapping[str, Sequence[int]], elements: int, *, leave_out: bool = False, shape: tuple[int, ...] | None = None
) -> Groups:
    """Groups by name, each the numbers of its elements among `elements` (row-major): {"income": [3, 4], ...}.

    Every element must be in one group; with `leave_out` the rest are in none. InputError for elements in two groups, in
    none, out of range or twice in one, and for empty groups.
    """
    if elements < 1 or not groups:
        raise InputError(f"members: expected at least one group and one element, got {len(groups)} and {elements}")
    labels = [-1] * elements
    names = list(groups)
    for g, (name, numbers) in enumerate(groups.items()):
        for p in numbers:
            if not (isinstance(p, int) and 0 <= p < elements):
                raise InputError(f"members: group {name!r} has element {p!r}, expected integers of 0..{elements - 1}")
            if labels[p] >= 0:
                other = "twice" if labels[p] == g else f"and so has {names[labels[p]]!r}"
                raise InputError(f"members: group {name!r} has element {p} {other}; groups must not overlap")
            labels[p] = g
        if g not in labels:
            raise InputError(f"members: group {name!r} is empty")
    if -1 in labels and not leave_out:
        raise InputError(
            f"members: element {labels.index(-1)} and {labels.count(-1) - 1} more are in no group; leave_out=True "
            "measures without them"
        )
    return from_labels(labels, names, shape)


def whole(elements: int) -> Groups:
    """One group that holds all `elements` output elements."""
    if elements < 1:
        raise InputError(f"whole: expected at least one element, got {elements}")
    # Written out rather than left to from_labels: its checks cost more than a small op and stop torch.compile.
    labels, order = torch.zeros(elements, dtype=torch.int32), torch.arange(elements, dtype=torch.int32)
    return Groups(labels, ("output",), (1,), order, torch.tensor([0, elements], dtype=torch.int32))


def cells(height: int, width: int, cell: int, channels: int = 1) -> Groups:
    """Square cells of `cell` pixels a side of a (channels, height, width) image; a cell spans all channels.

    Where `cell` does not divide a side, the last cells of it are smaller.
    """
    if min(height, width, cell, channels) < 1:
        raise InputError(f"cells: sizes must be positive, got {height} x {width}, cell {cell}, channels {channels}")
    return _rectangles(torch.arange(height) // cell, torch.arange(width) // cell, channels)


def _rectangles(r: Tensor, c: Tensor, channels: int) -> Groups:
    """Cells from the cell row of each pixel row and the cell column of each pixel column."""
    height, width, rows, columns = len(r), len(c), int(r[-1]) + 1, int(c[-1]) + 1
    labels = (r[:, None] * columns + c).expand(channels, height, width).reshape(-1)
    names = [f"cell {i},{j}" for i in range(rows) for j in range(columns)]
    return from_labels(labels, names, (rows, columns))


def mosaic(height: int, width: int, rows: int = 8, columns: int = 8, channels: int = 1) -> Groups:
    """A (channels, height, width) image cut into rows x columns cells, as equal as whole pixels allow, across channels.

    A side with fewer pixels than cells gets a cell a pixel.
    """
    if min(height, width, rows, columns, channels) < 1:
        raise InputError(
            f"mosaic: sizes must be positive, got {height} x {width} in {rows} x {columns}, channels {channels}"
        )
    r, c = (torch.arange(n) * min(parts, n) // n for n, parts in ((height, rows), (width, columns)))
    return _rectangles(r, c, channels)


def channels(count: int, height: int, width: int) -> Groups:
    """One group per colour channel of a (count, height, width) image."""
    if min(count, height, width) < 1:
        raise InputError(f"channels: sizes must be positive, got {count} of {height} x {width}")
    return from_labels(torch.arange(count).repeat_interleave(height * width), [f"channel {c}" for c in range(count)])


def spans(sizes: Sequence[int], names: Sequence[str] | None = None) -> Groups:
    """Consecutive spans of the given sizes, as the columns or feature groups of a table."""
    if len(sizes) == 0 or min(sizes) < 1:
        raise InputError(f"spans: sizes must be positive, got {list(sizes)}")
    return from_labels(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), names)
