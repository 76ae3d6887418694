"""dSprites (Matthey et al. 2017): redrawn from its geometry, or read from the official file."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .dataset import Dataset

OFFICIAL_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
SIDE = 64
# Rasterisers snap vertices to a grid of 1/256 px before they fill. Without this step 8 pixels of the official frames
# differ, with it none.
SUBPIXELS = 256
VERTICES = 150

_READ_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,  # an encrypted member, and as NotImplementedError an unknown compression
    SyntaxError,  # with TokenError: an array header that is no Python literal
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def sprite_outlines() -> Tensor:
    """Vertices (x right, y down, in px from the centre) of every sprite: float64 (3, 6, 40, 150, 2).

    Axes: shape (square, ellipse, heart), scale, orientation, vertex, coordinate. Every outline runs clockwise on the
    screen; shorter ones repeat their last vertex. The constants are published nowhere: they are the round numbers that
    give every pixel of 151 official frames, and their neighbours do not (149 or 151 vertices of the heart, 14.48 for
    14.5, .149 for .15).
    """
    half = 9.6  # px at scale 1: the square's side is .3 of the canvas
    square = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64)
    t = _turn(100)
    ellipse = torch.stack([1.33 * t.cos(), t.sin() / 1.33], 1)
    t = _turn(VERTICES)
    height = (13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()) / 14.5 + 0.15
    heart = torch.stack([t.sin() ** 3, -height], 1)
    padded = [torch.cat([v, v[-1:].expand(VERTICES - len(v), 2)]) for v in (square, ellipse, heart)]
    scaled = half * torch.linspace(0.5, 1, 6, dtype=torch.float64)[:, None, None] * torch.stack(padded)[:, None]
    x, y = scaled[:, :, None].unbind(-1)
    # Counter-clockwise as seen on the screen, where y points down; both ends, 0 and 2 pi, are in the grid.
    angle = torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64)[:, None]
    return torch.stack([x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()], -1)


def sprite_centres() -> Tensor:
    """Centre in px for each index of posX, and of posY (down from the top row): float64 (32,)."""
    return 16 + 32 * torch.linspace(0, 1, 32, dtype=torch.float64)


def draw_sprites(outlines: Tensor, centres: Tensor) -> Tensor:
    """Binary images of closed polygons: float32 (B, 64, 64), 1 where the pixel's centre is inside.

    `outlines` (B, V, 2), clockwise on the screen, and `centres` (B, 2) are float64 in px; their sum must lie inside the
    canvas. Vertices snap to 1/256 px; from there on all is integers, hence exact and the same on every device. A pixel
    centre on an edge is inside when the edge is a left or a top one, as on graphics hardware: no frame we have decides
    this, and it touches one or two pixels in one image of 200.
    """
    x, y = ((outlines + centres[:, None]) * SUBPIXELS).round().long().unbind(-1)
    half = SUBPIXELS // 2
    row = -((half - y) // SUBPIXELS)  # of the first pixel centre at or below the vertex
    crossings = row.roll(-1, 1) - row  # rows between an edge's ends, signed by its direction
    count = crossings.abs().flatten()
    edge = torch.repeat_interleave(count)
    table = torch.stack(
        [x, y, x.roll(-1, 1) - x, y.roll(-1, 1) - y, crossings.sign(), torch.minimum(row, row.roll(-1, 1))]
    )
    x0, y0, dx, dy, sign, upper = table.flatten(1)[:, edge]
    r = upper + torch.arange(len(edge), device=x.device) - (count.cumsum(0) - count)[edge]
    # The first column whose centre is at or right of the crossing, x0 + dx (r's centre - y0) / dy.
    rise = dy.abs()
    column = -(((half - x0) * rise - (r * SUBPIXELS + half - y0) * dx * sign) // (rise * SUBPIXELS))
    # Downward edges lie on the right of a clockwise outline: the sum along a row is 1 inside and 0 outside.
    turns = torch.zeros(len(x), SIDE, SIDE, device=x.device)
    turns.view(-1).index_add_(0, ((edge // x.shape[1]) * SIDE + r) * SIDE + column, -sign.float())
    return turns.cumsum_(-1)


class DSprites(Dataset):
    """dSprites: 737,280 binary images, one for each combination of its six factors.

    Without `root` the images are redrawn. With it they come from the official file, which `root` is or holds; they are
    kept in memory one bit a pixel (377 MB).
    """

    name = "dsprites"
    shape = (1, SIDE, SIDE)
    factor_names = ("color", "shape", "scale", "orientation", "posX", "posY")
    factor_sizes = (1, 3, 6, 40, 32, 32)

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        self._packed = None
        if root is not None:
            path = Path(root)
            path = path / OFFICIAL_FILE if path.is_dir() else path
            self._packed = self._load(path).to(self.device)
        else:
            self._outlines = sprite_outlines().to(self.device)
            self._centres = sprite_centres().to(self.device)

    def _render(self, indices: Tensor) -> Tensor:
        if self._packed is not None:
            shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)
            bits = (self._packed[indices][:, :, None] >> shifts) & 1
            return bits.view(-1, *self.shape).float()
        _, shape, scale, orientation, x, y = self._unravel(indices).unbind(1)
        centres = torch.stack([self._centres[x], self._centres[y]], 1)
        return draw_sprites(self._outlines[shape, scale, orientation], centres).unsqueeze(1)

    def _load(self, path: Path) -> Tensor:
        """The images of the official file, packed: uint8 (N, 512). The pickled `metadata` in it is never read."""
        n = len(self)
        packed = np.empty((n, SIDE * SIDE // 8), np.uint8)
        try:
            with zipfile.ZipFile(path) as archive:
                for start, v in _blocks(archive, "latents_classes", np.dtype("<i8"), (n, len(self.factor_sizes))):
                    if not np.array_equal(v, self._unravel(torch.arange(start, start + len(v))).numpy()):
                        raise ValueError("latents_classes is not in the order of the factors, posY fastest")
                for start, x in _blocks(archive, "imgs", np.dtype("u1"), (n, SIDE, SIDE)):
                    if x.max() > 1:
                        raise ValueError(f"imgs holds the value {x.max()}, expected 0 and 1 only")
                    packed[start : start + len(x)] = np.packbits(x.reshape(len(x), -1), axis=1)
        except _READ_ERRORS as error:
            raise InputError(
                f"root: expected {path} to be the official file {OFFICIAL_FILE} with imgs uint8 ({n}, {SIDE}, {SIDE}) "
                f"and latents_classes int64 ({n}, {len(self.factor_sizes)}), found: {' '.join(str(error).split())}"
            ) from error
        return torch.from_numpy(packed)


def _turn(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)


def _blocks(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype, shape: tuple[int, ...], rows: int = 4096
) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows of one array, with the first row of each: the whole of `imgs` would take 3 GB."""
    with archive.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found_shape, fortran, found_dtype = read_header(stream)
        if (found_shape, fortran, found_dtype) != (shape, False, dtype):
            raise ValueError(f"{key} is {found_dtype} {found_shape}{' in Fortran order' if fortran else ''}")
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        for start in range(0, shape[0], rows):
            n = min(rows, shape[0] - start)
            block = stream.read(n * row_bytes)
            if len(block) != n * row_bytes:
                raise EOFError(f"{key} ends after {start + len(block) // row_bytes} of {shape[0]} rows")
            yield start, np.frombuffer(block, dtype).reshape(n, *shape[1:])
        if stream.read(1):  # reading to the end is also what checks the checksum
            raise ValueError(f"{key} holds more than {shape[0]} rows")
