"""The picture figures of the page: reconstructions, traversals and maps of effects, as PNGs labelled in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .svg import line, picture, png, sequential_palette, tag, text

PALETTE = sequential_palette()
WIDTH = 440.0
LABELS = 76.0  # room for the longest label, "z₁₀ inactive", so that the panels of a figure match


def sheet(images: np.ndarray) -> tuple[np.ndarray, int]:
    """Images (rows, columns, C, H, W) uint8 side by side with thin white gaps: (H', W') grey or (H', W', 3), and the
    width of a gap. Small ones are enlarged, as not everything that shows a page keeps pixels square.
    """
    images = enlarged(images, 40)
    rows, columns, channels, height, width = images.shape
    gap = max(1, width // 16)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            y, x = r * (height + gap), c * (width + gap)
            page[y : y + height, x : x + width] = images[r, c].transpose(1, 2, 0)
    return (page[..., 0] if channels == 1 else page), gap


def enlarged(images: np.ndarray, side: int) -> np.ndarray:
    """Images (..., H, W) with every pixel repeated so often that they are at least `side` wide."""
    times = max(1, -(-side // images.shape[-1]))
    return images.repeat(times, axis=-2).repeat(times, axis=-1)


def image_rows(
    images: np.ndarray, labels: Sequence[str], what: str, *, faint: Sequence[bool] = (), heads: Sequence[str] = ()
) -> str:
    """Rows of images (rows, columns, C, H, W) uint8, a label before each row and a head above each column."""
    rows, columns = images.shape[:2]
    pixels, gap = sheet(images)
    left = LABELS
    side = (WIDTH - left) / columns  # a picture and its gap
    shape = pixels.shape[0] + gap, pixels.shape[1] + gap
    pitch = side * shape[0] / shape[1] * columns / rows
    top = 16.0 if heads else 2.0
    scale = side * columns / shape[1]
    parts = [
        tag(
            "image",
            href=png(pixels),
            x=left,
            y=top,
            width=pixels.shape[1] * scale,
            height=pixels.shape[0] * scale,
            preserveAspectRatio="none",
            cls="pixels",
        )
    ]
    inner = side - gap * scale
    for c, head in enumerate(heads):
        parts.append(text(left + side * c + inner / 2, 11, head, "middle", "tick"))
    for r, label in enumerate(labels):
        cls = "label faint" if r < len(faint) and faint[r] else "label"
        parts.append(text(left - 9, top + pitch * r + inner / 2 + 4, label, "end", cls))
    return picture("".join(parts), left + side * columns, top + pitch * rows, what)


def maps(values: np.ndarray, labels: Sequence[str], faint: Sequence[bool], top: float, what: str) -> str:
    """Maps (n, rows, columns) of effects as shades from white, 0, to dark blue, `top`; a label under each."""
    count, rows, columns = values.shape
    across, side = 5, (WIDTH - 40) / 5
    height = side * rows / columns
    shades = (np.clip(values / top, 0, 1) * 255).round().astype(np.uint8)
    parts = []
    for n in range(count):
        x, y = (n % across) * (side + 10) + 0.5, (n // across) * (height + 22) + 0.5
        parts.append(
            tag(
                "image",
                href=png(enlarged(shades[n], 64), PALETTE),
                x=x,
                y=y,
                width=side,
                height=height,
                preserveAspectRatio="none",
                cls="pixels",
            )
        )
        parts.append(tag("rect", x=x, y=y, width=side, height=height, cls="frame"))
        cls = "tick faint" if faint[n] else "tick"
        parts.append(text(x + side / 2, y + height + 13, labels[n], "middle", cls))
    lines = -(-count // across)
    return picture("".join(parts), across * (side + 10) - 9, lines * (height + 22), what)


def matrix(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], faint: Sequence[bool], top: float, what: str
) -> str:
    """A matrix of shades from white, 0, to dark blue, `top`, with its numbers; NaN is left white with a dash."""
    count, across = values.shape
    left, height, head = LABELS + 8, 24.0, 18.0
    width = (WIDTH - left) / across
    shades = (np.clip(np.nan_to_num(values) / top, 0, 1) * 255).round().astype(np.uint8)
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
            cls = "tick light" if shades[r, c] > 165 else "tick dark"
            places = 2 if value < 9.995 else 1
            words = f"{value:.{places}f}".replace("-", "−") if np.isfinite(value) else "–"
            words = words.lstrip("−") if not words.strip("−0.") else words
            parts.append(text(left + (c + 0.5) * width, y, words, "middle", cls))
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
        shades = (np.clip(np.nan_to_num(strip.values) / top, 0, 1) ** 0.5 * 255).round().astype(np.uint8)
        parts.append(text(left, y + 13, strip.heading, cls="heading"))
        parts.append(text(WIDTH, y + 13, strip.remark, "end", "tick"))
        y += head
        box: dict[str, Any] = {"x": left, "y": y, "width": WIDTH - left, "height": height * len(rows)}
        address = png(enlarged(shades, 64), PALETTE)
        parts.append(tag("image", href=address, preserveAspectRatio="none", cls="pixels", **box))
        for r, name in enumerate(rows):
            parts.append(text(left - 8, y + height * (r + 0.5) + 3.6, name, "end", "tick"))
            if r:
                parts.append(line(left, y + height * r, WIDTH, y + height * r, "grid"))
        parts.append(tag("rect", cls="frame", **box))
        y += height * len(rows) + 7
    return picture("".join(parts), WIDTH, y, what)


def shade_bar(top: float, ticks: Sequence[float], labels: Sequence[str], unit: str, root: bool = False) -> str:
    """The colour bar of `maps`, 0 to `top`, with its unit; `root`: by the square root, as of `strips`."""
    left, width = 8.0, 240.0
    ramp = np.arange(256, dtype=np.uint8)[None]
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
