"""The charts of the page: dots with intervals, curves with bands, bars. Numbers in, SVG out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from ..metrics.statistics import Estimate
from . import svg
from .svg import CHARACTER, Scale, line, path, picture, spread, tag, text, x_axis, y_axis

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
NARROW, WIDE = 340, 440  # of drawings that stand three and two in a row


@dataclass(frozen=True)
class Dots:
    """A row of `dots`: a configuration trained, untrained and permuted, with `values` a seed each; `heading` starts a
    block."""

    label: str
    estimate: Estimate | None
    control: Estimate | None
    values: Sequence[float]
    heading: str = ""
    permuted: Estimate | None = None

    @property
    def controls(self) -> tuple[Estimate | None, ...]:
        return self.control, self.permuted


def dots(rows: Sequence[Dots], label: str, what: str) -> str:
    """Estimates (filled) above their controls (hollow, permuted ones grey) with intervals, a stroke for every seed.

    The axis holds all estimates, controls and seeds. An interval that leaves it is cut and ends in an arrow.
    """
    labels = [textwrap.wrap(row.label, 24, max_lines=2, placeholder=" …") for row in rows]
    left = 16 + CHARACTER * max(len(words) for lines in labels for words in lines)
    points = [v for row in rows for v in row.values] + [e.value for r in rows for e in (r.estimate, *r.controls) if e]
    scale = Scale(*_range(points, rows), left, NARROW - 12)
    headings = sum(bool(row.heading) for row in rows)
    bottom = 8 + 34 * len(rows) + 13 * sum(row.permuted is not None for row in rows) + 18 * headings
    parts = [x_axis(scale, bottom, label, top=4)]
    y = 8.0
    for row, lines in zip(rows, labels, strict=True):
        if row.heading:
            parts.append(text(0, y + 11, row.heading, cls="heading"))
            y += 18
        for n, words in enumerate(lines):
            parts.append(text(8, y + (10 if len(lines) > 1 else 16) + 12 * n, words, cls="label"))
        parts += [line(scale(v), y + 4, scale(v), y + 14, "seed") for v in row.values]
        if row.estimate:
            parts.append(_whisker(row.estimate, scale, y + 9, "estimate"))
        else:
            parts.append(text(scale.start + 6, y + 13, "not trained", cls="tick"))
        if row.control:
            parts.append(_whisker(row.control, scale, y + 22, "control"))
        if row.permuted:
            parts.append(_whisker(row.permuted, scale, y + 35, "permuted"))
            y += 13
        y += 34
    return picture("".join(parts), NARROW, bottom + 36, what)


def dots_key() -> str:
    """What the signs in `dots` mean."""
    trained, control = Estimate(0.5, 0.2, 0.8), Estimate(0.5, 0.2, 0.8)
    scale = Scale(0, 1, 0, 90)
    lines = [
        (_whisker(trained, scale, 22, "estimate"), 22, "trained: mean over seeds, 95 % interval"),
        (_whisker(control, scale, 46, "control"), 46, "untrained control, likewise"),
        (_whisker(control, scale, 70, "permuted"), 70, "permuted control, likewise"),
        ("".join(line(x, 89, x, 99, "seed") for x in (36.0, 55.0)), 94, "single seeds, trained"),
        (
            _whisker(Estimate(0.5, 0.2, 9.0), Scale(0, 0.8, 0, 72), 118, "estimate"),
            118,
            "interval goes on beyond the axis",
        ),
    ]
    parts = [drawn + text(96, y + 4, words, cls="label") for drawn, y, words in lines]
    return picture("".join(parts), NARROW, 134, "Key to the signs in these panels")


def _range(points: list[float], rows: Sequence[Dots]) -> tuple[float, float]:
    """From 0 or below to beyond the greatest point; intervals may double it, no more."""
    low, high = min([0.0, *points]), max([0.0, *points])
    span = (high - low) or 1.0
    ends = [b for row in rows for e in (row.estimate, *row.controls) if e for b in (e.low, e.high) if math.isfinite(b)]
    high = max([high + 0.06 * span, *(e for e in ends if e <= high + 0.5 * span)])
    low = min([low, *(e for e in ends if e >= low - 0.3 * span)])
    return low, high


def _whisker(estimate: Estimate, scale: Scale, y: float, cls: str) -> str:
    parts = []
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        low, high = max(estimate.low, scale.low), min(estimate.high, scale.high)
        parts.append(line(scale(low), y, scale(high), y, f"whisker {cls}"))
        for end, cut, way in ((low, estimate.low < scale.low, -1), (high, estimate.high > scale.high, 1)):
            x = scale(end)
            if cut:
                parts.append(path([(x, y - 3.5), (x + 5 * way, y), (x, y + 3.5)], close=True, cls=f"arrow {cls}"))
            else:
                parts.append(line(x, y - 3, x, y + 3, f"whisker {cls}"))
    return "".join(parts) + tag("circle", cx=scale(estimate.value), cy=y, r=3.6, cls=f"dot {cls}")


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one line, its band if any; faint ones have neither name nor band."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    name: str = ""
    dash: str | None = None
    faint: bool = False


def curves(
    drawn: Sequence[Curve], x_label: str, y_label: str, what: str, *, log: bool = False, top: float | None = None
) -> str:
    """Lines with bands, each named where it ends. The height axis starts at 0, or is logarithmic, up to `top`."""
    names = max((len(curve.name) for curve in drawn), default=0)
    right, bottom = WIDE - (20 + CHARACTER * names if names else 20), 196.0
    ys = [v for curve in drawn for v in curve.y]
    xs = [v for curve in drawn for v in curve.x]
    if log and min(ys) > 0:
        low, high = min(ys) / 1.06, max(ys) * 1.06
    else:
        log, low, high = False, min(0.0, *ys), svg.rounded_up(top or max(ys))
    y = Scale(low, high, bottom, 30, log)
    left = 10 + 6.2 * max(map(len, svg.tick_labels(y.ticks(6 if log else 4))), default=1)
    x = Scale(min(0.0, *xs), max(xs), left, right)
    parts = [y_axis(y, left, right, y_label, 6 if log else 4), x_axis(x, bottom, x_label, count=5)]
    for curve in drawn:
        if curve.low is not None and curve.high is not None:
            edge = [(x(a), y(b)) for a, b in zip(curve.x, curve.high, strict=True)]
            edge += [(x(a), y(b)) for a, b in reversed(list(zip(curve.x, curve.low, strict=True)))]
            parts.append(path(edge, close=True, fill=curve.colour, cls="band"))
    for curve in sorted(drawn, key=lambda c: not c.faint):
        points = [(x(a), y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
        cls = "curve faint" if curve.faint else "curve"
        parts.append(path(points, stroke=curve.colour, stroke_dasharray=curve.dash, cls=cls))
    named = [curve for curve in drawn if curve.name]
    heights = spread([y(curve.y[-1]) for curve in named], 11.5, 20, bottom)
    for curve, at in zip(named, heights, strict=True):
        parts.append(line(right + 5, at, right + 14, at, "sample", stroke=curve.colour))
        parts.append(text(right + 17, at + 3.8, curve.name, cls="name"))
    return picture("".join(parts), WIDE, bottom + 36, what)


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float | None
    high: float | None
    filled: bool


def bars(drawn: Sequence[Bar], y_label: str, what: str, top: float) -> str:
    """Bars with whiskers from 0 up to `top`; those not `filled` are hollow."""
    bottom = 176.0
    y = Scale(0, top, bottom, 30)
    left = 10 + 6.2 * max(map(len, svg.tick_labels(y.ticks())), default=1)
    pitch = (WIDE - 6 - left) / len(drawn)
    width = min(26.0, 0.66 * pitch)
    parts = [y_axis(y, left, WIDE - 6, y_label)]
    every = math.ceil(CHARACTER * 4 / pitch)
    for n, bar in enumerate(drawn):
        x = left + (n + 0.5) * pitch
        cls = "bar" if bar.filled else "bar hollow"
        parts.append(tag("rect", x=x - width / 2, y=y(bar.value), width=width, height=bottom - y(bar.value), cls=cls))
        if bar.low is not None and bar.high is not None:
            parts.append(line(x, y(max(bar.low, 0)), x, y(min(bar.high, top)), "error"))
        if n % every == 0:
            parts.append(text(x, bottom + 14, bar.label, "middle", "tick"))
    parts.append(line(left, bottom, WIDE - 6, bottom, "axis"))
    parts.append(text((left + WIDE - 6) / 2, bottom + 29, "latent", "middle", "label"))
    return picture("".join(parts), WIDE, bottom + 34, what)


@dataclass(frozen=True)
class Mark:
    """A point of `points`, or of `ladders`: `shape` is an index into the shapes; hollow: its inside is white."""

    x: float
    y: float
    colour: str
    shape: int = 0
    hollow: bool = False
    small: bool = False
    name: str = ""
    low: float | None = None
    high: float | None = None


def points(marks: Sequence[Mark], x_label: str, y_label: str, what: str, remarks: Sequence[str] = ()) -> str:
    """A scatter plot whose axes hold 0; `remarks`, lines beneath it; a mark's name is said when pointed at."""
    x_top, y_top = (
        svg.rounded_up(max([*(v for v in values if v > 0), 0.0])) for values in zip(*_places(marks), strict=True)
    )
    low = [min(0.0, *values) for values in zip(*_places(marks), strict=True)]
    bottom = 216.0
    y = Scale(low[1], y_top, bottom, 30)
    left = 10 + 6.2 * max(map(len, svg.tick_labels(y.ticks())), default=1)
    x = Scale(low[0], x_top, left + 6, NARROW - 18)
    parts = [y_axis(y, left, NARROW - 18, y_label), x_axis(x, bottom, x_label)]
    parts += [_mark(mark, x(mark.x), y(mark.y)) for mark in sorted(marks, key=lambda mark: not mark.small)]
    for n, words in enumerate(remarks):
        parts.append(text(0, bottom + 50 + 14 * n, words, cls="tick"))
    return picture("".join(parts), NARROW, bottom + 36 + (6 + 14 * len(remarks) if remarks else 0), what)


def _places(marks: Sequence[Mark]) -> list[tuple[float, float]]:
    return [(mark.x, mark.y) for mark in marks]


def ladders(
    rows: Sequence[Sequence[Mark]], x_label: str, y_label: str, what: str, at: float | None = None, log: bool = False
) -> str:
    """Lines through few points with intervals, a line a row; an upright line at x = `at`; log: of the width's axis."""
    marks = [mark for row in rows for mark in row]
    xs = [mark.x for mark in marks] + ([at] if at is not None else [])
    top = max(mark.y for mark in marks)
    ends = [bound for mark in marks for bound in (mark.low, mark.high) if bound is not None]
    reach = [e for e in ends if min(0.0, *(m.y for m in marks)) - 0.3 * top <= e <= 1.5 * top]
    bottom = 196.0
    y = Scale(min([0.0, *(m.y for m in marks), *reach]), svg.rounded_up(max([top, *reach])), bottom, 30)
    left = 10 + 6.2 * max(map(len, svg.tick_labels(y.ticks())), default=1)
    log = log and min(xs) > 0
    margin = 1.12 if log else 0.06 * ((max(xs) - min(xs)) or 1)
    bounds = (min(xs) / margin, max(xs) * margin) if log else (min(xs) - margin, max(xs) + margin)
    x = Scale(*bounds, left + 4, NARROW - 10, log)
    parts = [y_axis(y, left, NARROW - 10, y_label), line(left, bottom, NARROW - 10, bottom, "axis")]
    for value in sorted(set(mark.x for mark in marks)):  # the values that runs have, not round ones
        parts += [
            line(x(value), bottom, x(value), bottom + 3, "axis"),
            text(x(value), bottom + 14, f"{value:g}", "middle", "tick"),
        ]
    parts.append(text((left + NARROW - 10) / 2, bottom + 29, x_label, "middle", "label"))
    if at is not None:
        parts.append(line(x(at), 30, x(at), bottom, "limit"))
    for row in rows:
        ordered = sorted(row, key=lambda mark: mark.x)
        parts.append(path([(x(m.x), y(m.y)) for m in ordered], stroke=row[0].colour, cls="curve"))
        for mark in ordered:
            if mark.low is not None and mark.high is not None:
                low, high = max(mark.low, y.low), min(mark.high, y.high)
                parts.append(line(x(mark.x), y(low), x(mark.x), y(high), "sample", stroke=mark.colour, opacity=0.45))
        parts += [_mark(mark, x(mark.x), y(mark.y)) for mark in ordered]
    return picture("".join(parts), NARROW, bottom + 36, what)


SHAPES = 6


def _mark(mark: Mark, x: float, y: float) -> str:
    """A circle, square, triangle, diamond, triangle on its head or cross of about one size."""
    r = 3.0 if mark.small else 4.6
    name = tag("title", str(escape(mark.name))) if mark.name else ""
    look = {"fill": "#fff" if mark.hollow else mark.colour, "stroke": mark.colour, "cls": "point"}
    shape = mark.shape % SHAPES
    if shape == 0:
        return tag("circle", name, cx=x, cy=y, r=r, **look)
    corners = {
        1: [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        4: [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        5: [(a * u, b * v) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1)) for u, v in _arm(a * b)],
    }[shape]
    d = "M" + "L".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in corners) + "Z"
    return tag("path", name, d=d, **look)


def _arm(turn: int) -> list[tuple[float, float]]:
    """Corners of a quarter of an upright cross, in the order in which its outline is drawn."""
    arm = [(0.4, 1.15), (0.4, 0.4), (1.15, 0.4)]
    return arm if turn > 0 else arm[::-1]


def marks_key(entries: Sequence[tuple[Mark, str]]) -> str:
    """What marks mean, a line each."""
    parts = [
        _mark(mark, 10, 16 + 21 * n) + text(26, 20 + 21 * n, words, cls="label")
        for n, (mark, words) in enumerate(entries)
    ]
    return picture("".join(parts), NARROW, 14 + 21 * len(entries), "Key to the marks in these panels")
