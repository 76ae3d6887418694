"""The charts of the page: dots with intervals, curves with bands, bars. Numbers in, SVG out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

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
