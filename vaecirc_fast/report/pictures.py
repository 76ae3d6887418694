"""The picture figures of the page: reconstructions, traversals, maps of effects; PNGs and JPEGs labelled in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .svg import SHADES, photo, picture, png, sequential_palette, tag, text

PALETTE = sequential_palette()
WIDTH = 440.0
LABELS = 76.0  # room for the longest label, "z₁₀ inactive", so that the panels of a figure match


def sheet(images: np.ndarray) -> np.ndarray:
    """Images (rows, columns, C, H, W) uint8 side by side: (rows H', columns W') grey or (rows H', columns W', 3).

    Small ones are enlarged, as not everything that shows a page keeps pixels square. Without gaps: lines drawn over the
    sheet part the images, and a JPEG of it has no edges that it would blur.
    """
    images = enlarged(images, 40)
    rows, columns, channels, height, width = images.shape
    page = np.ascontiguousarray(images.transpose(0, 3, 1, 4, 2)).reshape(rows * height, columns * width, channels)
    return page[..., 0] if channels == 1 else page


def shrunk(images: np.ndarray, side: int | None) -> np.ndarray:
    """Images (..., C, H, W) uint8 that are at most `side` high and wide; as they are for None."""
    height, width = images.shape[-2:]
    if side is None or max(height, width) <= side or len(np.unique(images)) <= 16:
        return images
    from PIL import Image

    size = max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width)))
    flat = images.reshape(-1, height, width)
    small = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS)) for plane in flat]
    return np.stack(small).reshape(*images.shape[:-2], size[1], size[0])


def enlarged(images: np.ndarray, side: int) -> np.ndarray:
    """Images (..., H, W) with every pixel repeated so often that they are at least `side` wide."""
    times = max(1, -(-side // images.shape[-1]))
    return images.repeat(times, axis=-2).repeat(times, axis=-1)


def image_rows(
    images: np.ndarray,
    labels: Sequence[str],
    what: str,
    *,
    faint: Sequence[bool] = (),
    heads: Sequence[str] = (),
    left: float = LABELS,
    width: float = WIDTH,
) -> str:
    """Rows of images (rows, columns, C, H, W) uint8, a label before each row, `left` wide, a head above each column."""
    rows, columns, _, tall, wide = images.shape
    side = (width - left) / columns  # a picture and its gap
    pitch = side * tall / wide
    top = 16.0 if heads else 2.0
    pixels = sheet(images)
    box = {"x": left, "y": top, "width": side * columns, "height": pitch * rows}
    address = photo(pixels, 80 if max(tall, wide) > 48 else 68)
    parts = [tag("image", href=address, preserveAspectRatio="none", cls="pixels", **box)]
    gaps = [f"M{left + side * c:.1f} {top:.0f}v{pitch * rows:.1f}" for c in range(1, columns)]
    gaps += [f"M{left:.0f} {top + pitch * r:.1f}h{side * columns:.1f}" for r in range(1, rows)]
    parts.append(tag("path", d="".join(gaps), stroke_width=max(1.5, side / 24), cls="gap") if gaps else "")
    for c, head in enumerate(heads):
        parts.append(text(left + side * (c + 0.5), 11, head, "middle", "tick"))
    for r, label in enumerate(labels):
        cls = "label faint" if r < len(faint) and faint[r] else "label"
        lines = label.split("\n")
        first = top + pitch * (r + 0.5) + 4 - 6 * (len(lines) - 1)
        for n, words in enumerate(lines):
            parts.append(text(left - 9, first + 12 * n, words, "end", cls))
    return picture("".join(parts), width, top + pitch * rows, what)


def maps(values: np.ndarray, labels: Sequence[str], faint: Sequence[bool], top: float, what: str) -> str:
    """Maps (n, rows, columns) of effects as shades from white, 0, to dark blue, `top`; a label under each."""
    count, rows, columns = values.shape
    across, side = min(5, count), (WIDTH - 40) / 5
    height = side * rows / columns
    lines = -(-count // across)
    cells = enlarged(shades_of(values / top), 32)
    tall, wide = cells.shape[1:]
    gap = max(1, round(wide / 8))  # in pixels of the strip: one picture holds a line of maps, white between them
    pitch = side * (wide + gap) / wide
    parts = []
    for start in range(0, count, across):
        members = [np.pad(cell, ((0, 0), (0, gap))) for cell in cells[start : start + across]]
        strip = np.concatenate(members, 1)[:, :-gap]
        y = (start // across) * (height + 22) + 0.5
        box = {"x": 0.5, "y": y, "width": side * strip.shape[1] / wide, "height": height}
        parts.append(tag("image", href=png(strip, PALETTE), preserveAspectRatio="none", cls="pixels", **box))
    for n in range(count):
        x, y = (n % across) * pitch + 0.5, (n // across) * (height + 22) + 0.5
        parts.append(tag("rect", x=x, y=y, width=side, height=height, cls="frame"))
        cls = "tick faint" if faint[n] else "tick"
        parts.append(text(x + side / 2, y + height + 13, labels[n], "middle", cls))
    return picture("".join(parts), max(WIDTH, 5 * pitch), lines * (height + 22), what)


def shades_of(shares: np.ndarray) -> np.ndarray:
    """Indices into the palette of shares from 0 to 1; NaN is white."""
    return (np.clip(np.nan_to_num(shares), 0, 1) * (SHADES - 1)).round().astype(np.uint8)


def matrix(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], faint: Sequence[bool], top: float, what: str
) -> str:
    """A matrix of shades from white, 0, to dark blue, `top`, with its numbers; NaN is left white with a dash."""
    count, across = values.shape
    left, height, head = LABELS + 8, 24.0, 18.0
    width = (WIDTH - left) / across
    shades = shades_of(values / top)
    box = {"x": left, "y": head, "width": WIDTH - left, "height": count * height}
    address = png(enlarged(shades, 60), PALETTE)
    parts = [tag("image", href=address, preserveAspectRatio="none", cls="pixels", **box)]
    parts.append(tag("rect", cls="frame", **box))
    for c, name in enumerate(columns):
        cls = "tick faint" if faint[c] else "tick"
        parts.append(text(left + (c + 0.5) * width, 12, name, "middle", cls))
    for r, name in enumerate(rows):
        y = head + (r + 0.5) * height + 3.8
        parts.append(text(left - 8, y, name, "end", "label"))
        for c in range(across if width >= 22 else 0):
            value = values[r, c]
            cls = "n light" if shades[r, c] > 0.65 * SHADES else "n"
            places = 2 if value < 9.995 else 1
            words = f"{value:.{places}f}".replace("-", "−") if np.isfinite(value) else "–"
            words = words.lstrip("−") if not words.strip("−0.") else words
            parts.append(text(left + (c + 0.5) * width, y, words, cls=cls))
    return picture("".join(parts), WIDTH, head + count * height + 2, what)


@dataclass(frozen=True)
class Strip:
    """A matrix (rows, units) without numbers, its heading and a remark at the heading's end."""

    heading: str
    values: np.ndarray
    remark: str = ""


def strips(drawn: Sequence[Strip], rows: Sequence[str], top: float, what: str) -> str:
    """Matrices of shades from white, 0, to dark blue, `top`, by the square root, one below the other and equally wide;
    NaN is white."""
    left, height, head = LABELS + 8, 13.0, 19.0
    parts, y = [], 0.0
    for strip in drawn:
        shades = shades_of(np.clip(np.nan_to_num(strip.values) / top, 0, 1) ** 0.5)
        parts.append(text(left, y + 13, strip.heading, cls="heading"))
        parts.append(text(WIDTH, y + 13, strip.remark, "end", "tick"))
        y += head
        box: dict[str, Any] = {"x": left, "y": y, "width": WIDTH - left, "height": height * len(rows)}
        address = png(enlarged(shades, 64), PALETTE)
        parts.append(tag("image", href=address, preserveAspectRatio="none", cls="pixels", **box))
        for r, name in enumerate(rows):
            parts.append(text(left - 8, y + height * (r + 0.5) + 3.6, name, "end", "tick"))
        between = "".join(f"M{left:.0f} {y + height * r:.1f}H{WIDTH:.0f}" for r in range(1, len(rows)))
        parts.append(tag("path", d=between, cls="grid") if between else "")
        parts.append(tag("rect", cls="frame", **box))
        y += height * len(rows) + 7
    return picture("".join(parts), WIDTH, y, what)


def shade_bar(top: float, ticks: Sequence[float], labels: Sequence[str], unit: str, root: bool = False) -> str:
    """The colour bar of `maps`, 0 to `top`, with its unit; `root`: by the square root, as of `strips`."""
    left, width = 8.0, 240.0
    ramp = np.arange(SHADES, dtype=np.uint8)[None]
    parts = [
        text(left, 11, unit, cls="label"),
        tag("image", href=png(ramp, PALETTE), x=left, y=18.0, width=width, height=11.0, preserveAspectRatio="none"),
        tag("rect", x=left, y=18.0, width=width, height=11.0, cls="frame"),
    ]
    for tick, label in zip(ticks, labels, strict=True):
        x = left + width * (tick / top) ** (0.5 if root else 1)
        parts.append(tag("line", x1=x, y1=29.0, x2=x, y2=32.0, cls="axis"))
        parts.append(text(x, 43, label, "middle", "tick"))
    return picture("".join(parts), 320, 48, f"Colour scale from 0 to {labels[-1] if labels else top}: {unit}")
