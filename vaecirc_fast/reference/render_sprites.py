"""Reference of `render_sprites`: the geometry of dSprites and its exact drawing, in plain torch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FACTOR_SIZES = (1, 3, 6, 40, 32, 32)  # color, shape, scale, orientation, posX, posY
SIDE = 64
# Rasterisers snap vertices to a grid of 1/256 px before they fill. Without this step 8 pixels of the official frames
# differ, with it none.
SUBPIXELS = 256
VERTICES = 150
# The order is the numbering that the kernels use.
FORMATS = ("float32", "uint8", "bits")
DTYPES = (torch.float32, torch.uint8, torch.uint8)
CHUNK = 1024  # images drawn at once


def image_shape(form: int, n: int) -> tuple[int, ...]:
    """Shape of `n` images in a format, by number."""
    return ((n, 1, SIDE, SIDE), (n, SIDE, SIDE), (n, SIDE * SIDE // 8))[form]


def forward(factors: Tensor, form: int, out: Tensor | None) -> Tensor:
    """factors (B, 6) int64 -> images in the format, written to `out` where it is given."""
    if out is None:
        out = torch.empty(image_shape(form, len(factors)), dtype=DTYPES[form], device=factors.device)
    outlines, centres = _geometry(factors.device)
    for v, into in zip(factors.split(CHUNK), out.split(CHUNK), strict=True):
        _, shape, scale, orientation, x, y = v.unbind(1)
        images = draw_sprites(outlines[shape, scale, orientation], torch.stack([centres[x], centres[y]], 1))
        into.copy_(pack(images) if FORMATS[form] == "bits" else images.view(into.shape))
    return out


def sprite_outlines() -> Tensor:
    """Vertices (x right, y down, in px from the centre) of every sprite: float64 (3, 6, 40, 150, 2) on the CPU.

    Axes: shape (square, ellipse, heart), scale, orientation, vertex, coordinate. Every outline runs clockwise on the
    screen; shorter ones repeat their last vertex. The constants are published nowhere: they are the round numbers that
    give every pixel of 151 official frames, and their neighbours do not (149 or 151 vertices of the heart, 14.48 for
    14.5, .149 for .15).
    """
    half = 9.6  # px at scale 1: the square's side is .3 of the canvas
    square = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64, device="cpu")
    t = _turn(100)
    ellipse = torch.stack([1.33 * t.cos(), t.sin() / 1.33], 1)
    t = _turn(VERTICES)
    height = (13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()) / 14.5 + 0.15
    heart = torch.stack([t.sin() ** 3, -height], 1)
    padded = [torch.cat([v, v[-1:].expand(VERTICES - len(v), 2)]) for v in (square, ellipse, heart)]
    scaled = (
        half
        * torch.linspace(0.5, 1, 6, dtype=torch.float64, device="cpu")[:, None, None]
        * torch.stack(padded)[:, None]
    )
    x, y = scaled[:, :, None].unbind(-1)
    # Counter-clockwise as seen on the screen, where y points down; both ends, 0 and 2 pi, are in the grid.
    angle = torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64, device="cpu")[:, None]
    return torch.stack([x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()], -1)


def sprite_centres() -> Tensor:
    """Centre in px for each index of posX, and of posY (down from the top row): float64 (32,) on the CPU."""
    return 16 + 32 * torch.linspace(0, 1, 32, dtype=torch.float64, device="cpu")


def snap(px: Tensor) -> Tensor:
    """Coordinates in px, float64, as whole subpixels: int64. From here on all is integers, hence exact everywhere."""
    return (px * SUBPIXELS).round().long()


def crossings(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where closed outlines of snapped ordinates `y` (N, V) cross the rows of pixel centres, by outline and edge.

    Returns for each crossing: its edge (the flat index of the vertex that the edge leaves from), its row, how far along
    it lies from there in subpixels of y (>= 0), and the edge's rise in y, negative where the edge runs up. A crossing
    at an upper end counts, one at a lower end does not.
    """
    half = SUBPIXELS // 2
    row = -((half - y) // SUBPIXELS)  # of the first pixel centre at or below the vertex
    span = row.roll(-1, 1) - row  # rows between an edge's ends, signed by its direction
    count = span.abs().flatten()
    edge = torch.repeat_interleave(count)
    upper = torch.minimum(row, row.roll(-1, 1)).flatten()
    r = upper[edge] + torch.arange(len(edge), device=y.device) - (count.cumsum(0) - count)[edge]
    rise = (y.roll(-1, 1) - y).flatten()[edge]
    return edge, r, (r * SUBPIXELS + half - y.flatten()[edge]) * rise.sign(), rise


def draw_sprites(outlines: Tensor, centres: Tensor) -> Tensor:
    """Binary images of closed polygons: float32 (B, 64, 64), 1 where the pixel's centre is inside.

    `outlines` (B, V, 2), clockwise on the screen, and `centres` (B, 2) are float64 in px; their sum must lie inside the
    canvas. A pixel centre on an edge is inside when the edge is a left or a top one, as on graphics hardware: no frame
    we have decides this, and it touches one or two pixels in one image of 200.
    """
    x, y = snap(outlines + centres[:, None]).unbind(-1)
    edge, r, along, rise = crossings(y)
    x0, dx = x.flatten()[edge], (x.roll(-1, 1) - x).flatten()[edge]
    # The first column whose centre is at or right of the crossing, x0 + dx along / |rise|.
    height = rise.abs()
    column = -(((SUBPIXELS // 2 - x0) * height - along * dx) // (height * SUBPIXELS))
    # Downward edges lie on the right of a clockwise outline: the sum along a row is 1 inside and 0 outside.
    turns = torch.zeros(len(x), SIDE, SIDE, device=x.device)
    at = ((edge // x.shape[1]) * SIDE + r) * SIDE + column
    turns.view(-1).index_add_(0, at, -rise.sign().float())
    return turns.cumsum_(-1)


def pack(images: Tensor) -> Tensor:
    """Binary images (B, 64, 64) one bit a pixel: uint8 (B, 512), row by row, the first pixel in the highest bit."""
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=images.device)
    return (images.to(torch.uint8).view(-1, SIDE * SIDE // 8, 8) * weights).sum(2, dtype=torch.uint8)


def _turn(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64, device="cpu") * (2 * math.pi / n)


@functools.cache
def _geometry(device: torch.device) -> tuple[Tensor, Tensor]:
    return sprite_outlines().to(device), sprite_centres().to(device)
