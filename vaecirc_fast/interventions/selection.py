"""Which activations: "decoder.ct1[3]", "decoder.ct2[:, 4:8, 4:8]", "decoder.fc1[*]", "encoder.fc.input"."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..groups import Groups, from_labels

UNITS = ("channel", "element", "cell", "token", "head")
_SPEC = re.compile(r"^(?P<path>[^\[\]]*?)(?:\[(?P<index>[^\[\]]*)\])?$")


@dataclass(frozen=True)
class Selection:
    """Some elements of what a module gives out, or takes in.

    site: its path; side: "output" or "input". index: of the axes after the batch, integers and (start, stop); () for
    all of it. each: whether the spec asked for every unit by itself, [*].
    """

    site: str
    side: str = "output"
    index: tuple[int | tuple[int | None, int | None], ...] = ()
    each: bool = False

    def __str__(self) -> str:
        side = "" if self.side == "output" else ".input"
        if self.each:
            return f"{self.site}{side}[*]"
        parts = [
            str(i) if isinstance(i, int) else ":".join("" if end is None else str(end) for end in i) for i in self.index
        ]
        return f"{self.site}{side}" + (f"[{', '.join(parts)}]" if parts else "")

    def mask(self, shape: Sequence[int]) -> Tensor:
        """Which elements of a row of that shape (without the batch axis) are chosen: (E,) bool. InputError if none."""
        if len(self.index) > len(shape):
            raise InputError(f"{self}: has {len(self.index)} indices, but the site's rows have shape {tuple(shape)}")
        for axis, i in enumerate(self.index):
            if isinstance(i, int) and not -shape[axis] <= i < shape[axis]:
                raise InputError(f"{self}: index {i} is out of range, axis {axis} has {shape[axis]}")
        chosen = torch.zeros(*shape, dtype=torch.bool)
        chosen[tuple(i if isinstance(i, int) else slice(*i) for i in self.index)] = True
        if not bool(chosen.any()):
            raise InputError(f"{self}: selects nothing of rows of shape {tuple(shape)}")
        return chosen.flatten()


def parse(spec: str) -> Selection:
    """One spec, without looking at any module. InputError shows the grammar."""
    found = _SPEC.match(spec.strip()) if isinstance(spec, str) else None
    if found is None or not found["path"]:
        raise InputError(f"site: expected 'path', 'path[3]', 'path[:, 4:8]', 'path[*]' or 'path.input', got {spec!r}")
    path, side = found["path"].strip(), "output"
    for name in ("input", "output"):
        if path.endswith(f".{name}"):
            path, side = path.removesuffix(f".{name}"), name
    text = found["index"]
    if text is None:
        return Selection(path, side)
    if text.strip() == "*":
        return Selection(path, side, each=True)
    index: list[int | tuple[int | None, int | None]] = []
    for part in text.split(","):
        numbers = part.strip().split(":")
        try:
            ends = [int(n) if n.strip() else None for n in numbers]
        except ValueError as error:
            raise InputError(f"site: {part.strip()!r} in {spec!r} is no index") from error
        if len(ends) == 1 and ends[0] is not None:
            index.append(ends[0])
        elif len(ends) == 2:
            index.append((ends[0], ends[1]))
        else:
            raise InputError(f"site: {part.strip()!r} in {spec!r} is no index")
    return Selection(path, side, tuple(index))


def matching_sites(module: nn.Module, pattern: str) -> list[str]:
    """Paths of the submodules that match a shell-style pattern; InputError if none does."""
    known = [name for name, _ in module.named_modules() if name]
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise InputError(f"sites: nothing matches {pattern!r}; the module has {shown or 'no submodules'}")
    return found


def is_pattern(spec: str | Selection) -> bool:
    """Whether a spec's path is a shell-style pattern, which leaves out what does not fit."""
    path = spec.site if isinstance(spec, Selection) else spec.split("[")[0]
    return any(c in path for c in "*?")


def resolve(module: nn.Module, spec: str | Selection) -> list[Selection]:
    """The selections that a spec, whose path may be a shell-style pattern, stands for; InputError if it has none."""
    selection = parse(spec) if isinstance(spec, str) else spec
    known = {name for name, _ in module.named_modules() if name}
    names = [selection.site] if selection.site in known else matching_sites(module, selection.site)
    return [Selection(name, selection.side, selection.index, selection.each) for name in names]


def units(shape: Sequence[int], unit: str = "channel", heads: int | None = None) -> Groups:
    """The units of a site whose rows have that shape, as a partition of a row's elements.

    "channel": the first axis of images (C, H, W), the last of sequences (T, D), each element of a vector. "element":
    every number. "cell": a place (H, W) of an image, all channels. "token": a place of (T, D). "head": `heads`
    equal parts of the last axis. InputError where the shape has no such units.
    """
    labels, name = labels_of(shape, unit, heads)
    return from_labels(labels, [f"{name} {u}" for u in range(int(labels.max()) + 1)])


def labels_of(shape: Sequence[int], unit: str, heads: int | None) -> tuple[Tensor, str]:
    """The unit (E,) of each element, int32, as `units` describes them, and what one is called."""
    if unit not in UNITS:
        raise InputError(f"unit: {unit!r} is unknown; known: {', '.join(UNITS)}")
    size = math.prod(shape)
    numbers = torch.arange(size).view(tuple(shape))
    if unit == "element" or (unit == "channel" and len(shape) == 1):
        labels, name = numbers, "element" if unit == "element" else "channel"
    elif unit == "channel":
        axis = 0 if len(shape) != 2 else 1
        along = torch.arange(shape[axis])
        labels, name = along.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(tuple(shape)), "channel"
    elif unit == "cell" and len(shape) == 3:
        labels, name = torch.arange(math.prod(shape[1:])).view(1, *shape[1:]).expand(tuple(shape)), "cell"
    elif unit == "token" and len(shape) == 2:
        labels, name = torch.arange(shape[0])[:, None].expand(tuple(shape)), "token"
    elif unit == "head" and heads is not None and heads > 0 and shape[-1] % heads == 0:
        labels, name = (torch.arange(shape[-1]) // (shape[-1] // heads)).expand(tuple(shape)), "head"
    else:
        given = f"; heads={heads}" if unit == "head" else ""
        raise InputError(f"unit: rows of shape {tuple(shape)} have no {unit}s{given}")
    return labels.reshape(-1).int(), name


def channel_axis(labels: Tensor) -> int | None:
    """The axis of channels, as "channel" has it, of a row's labels if each unit is one whole channel, of its number."""
    if not labels.ndim:
        return None
    axis = labels.ndim - 1 if labels.ndim == 2 else 0
    by_channel = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
    first = by_channel[:, :1]
    numbers = torch.arange(len(first), device=labels.device)[:, None]
    return axis if bool(((by_channel == first) & ((first == numbers) | (first < 0))).all()) else None
