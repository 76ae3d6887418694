"""Drawing by hand: SVG elements, scales with round ticks, axes, and 8-bit PNGs. Fonts and colours are in page.css."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape

CHARACTER = 5.7  # width of a character of a figure's text, about
_FINE = {"opacity", "stroke-width"}
SHADES = 64  # of the palette: more are not told apart, and each picture has its own


def tag(name: str, body: str = "", **attributes: Any) -> str:
    """An element; `cls` is its class, underscores in names become hyphens. Places keep one decimal, tenths of a pixel;
    what is finer than places keeps two.
    """
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        key = "class" if key == "cls" else key.replace("_", "-")
        if isinstance(value, float):
            value = f"{value:.{2 if key in _FINE else 1}f}".rstrip("0").rstrip(".")
        written.append(f' {key}="{escape(str(value))}"')
    return f"<{name}{''.join(written)}>{body}</{name}>" if body else f"<{name}{''.join(written)}/>"


def text(x: float, y: float, words: str, anchor: str = "start", cls: str | None = None, **attributes: Any) -> str:
    """Words at a place. `anchor`, "start", "middle" or "end", is a class: a page has thousands of words."""
    cls = " ".join(name for name in (cls, {"middle": "mid", "end": "end"}.get(anchor)) if name) or None
    return tag("text", str(escape(words)), x=float(x), y=float(y), cls=cls, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, cls: str | None = None, **attributes: Any) -> str:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), cls=cls, **attributes)


def path(points: list[tuple[float, float]], close: bool = False, **attributes: Any) -> str:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if close else "")
    return tag("path", d=d, **attributes)


def picture(body: str, width: float, height: float, what: str) -> str:
    """A whole drawing of natural size `width` x `height` that shrinks with its container; `what` it shows, in words."""
    return tag(
        "svg",
        tag("title", str(escape(what))) + body,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"max-width:{width * 1.12:.0f}px",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


@dataclass(frozen=True)
class Scale:
    """Maps `low`..`high` to `start`..`stop` pixels, by logarithms if `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._on_scale(self.low), self._on_scale(self.high)
        share = (self._on_scale(value) - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.stop - self.start)

    def _on_scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers within the scale, about `count` of them."""
        if self.log and self.high / self.low >= 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= count + 2:
                    break
            return found
        step = _round_step((self.high - self.low) / max(count, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def rounded_up(value: float, count: int = 4) -> float:
    """The end of an axis from 0 that holds `value`: a whole number of its round steps."""
    if value <= 0:
        return 1.0
    step = _round_step(value / count)
    return math.ceil(value / step - 1e-9) * step


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks in the fewest decimals that tell them apart, the same for all."""
    places = next((p for p in range(16) if all(abs(t - round(t, p)) <= 1e-9 * abs(t) for t in ticks)), 15)
    return [f"{t:,.{places}f}".replace("-", "−") if t else "0" for t in ticks]


def x_axis(scale: Scale, y: float, label: str = "", count: int = 4, top: float | None = None) -> str:
    """An axis at height `y`, with grid lines up to `top`."""
    ticks = scale.ticks(count)
    parts = [line(scale.start, y, scale.stop, y, "axis")]
    for tick, words in zip(ticks, tick_labels(ticks), strict=True):
        at = scale(tick)
        parts += [line(at, y, at, top, "grid")] if top is not None else []
        parts += [line(at, y, at, y + 3, "axis"), text(at, y + 14, words, "middle", "tick")]
    if label:
        parts.append(text((scale.start + scale.stop) / 2, y + 29, label, "middle", "label"))
    return "".join(parts)


def y_axis(scale: Scale, x: float, right: float, label: str = "", count: int = 4) -> str:
    """An axis at `x` with grid lines to `right` and its label above, where it reads without turning one's head."""
    ticks = scale.ticks(count)
    parts = []
    for tick, words in zip(ticks, tick_labels(ticks), strict=True):
        at = scale(tick)
        parts += [line(x, at, right, at, "grid"), text(x - 6, at + 3.6, words, "end", "tick")]
    if label:
        parts.append(text(0, scale.stop - 14, label, "start", "label"))
    return "".join(parts)


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """`positions` moved apart to `gap`, as little as that takes, within low..high where there is room."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return [max(value, low) for value in moved]


def png(pixels: np.ndarray, palette: np.ndarray | None = None) -> str:
    """A data address of pixels (H, W) uint8, grey or indices into `palette` (n, 3), or (H, W, 3) uint8, RGB."""
    pixels = np.ascontiguousarray(pixels)
    kind = 3 if palette is not None else 2 if pixels.ndim == 3 else 0
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    scanlines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    chunks += [(b"IDAT", zlib.compress(scanlines, 9)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind_ + body + struct.pack(">I", zlib.crc32(kind_ + body))
        for kind_, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def photo(pixels: np.ndarray, quality: int = 80) -> str:
    """A data address of pixels (H, W) or (H, W, 3) uint8: a JPEG, or a PNG where there are few shades."""
    from PIL import Image

    if len(np.unique(pixels)) <= 16:
        return png(pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


# White to dark blue, of one hue: ordered for every kind of colour vision, and in grey when printed.
_SEQUENTIAL = ("#ffffff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def sequential_palette(n: int = SHADES) -> np.ndarray:
    """(n, 3) uint8 from white to dark blue."""
    anchors = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in _SEQUENTIAL], float)
    at = np.linspace(0, len(anchors) - 1, n)
    columns = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.stack(columns, 1).round().astype(np.uint8)
