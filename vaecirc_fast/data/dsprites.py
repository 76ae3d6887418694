"""dSprites (Matthey et al. 2017): redrawn from its geometry, or read from the official file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops import render_sprites
from ..reference.render_sprites import FACTOR_SIZES, SIDE
from .dataset import Dataset
from .npz import READ_ERRORS, read_blocks

OFFICIAL_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class DSprites(Dataset):
    """dSprites: 737,280 binary images, one for each combination of its six factors.

    Without `root` the images are redrawn, by `vf.ops.render_sprites`. With it they come from the official file, which
    `root` is or holds; they are kept in memory one bit a pixel (377 MB).
    """

    name = "dsprites"
    shape = (1, SIDE, SIDE)
    factor_names = ("color", "shape", "scale", "orientation", "posX", "posY")
    factor_sizes = FACTOR_SIZES

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        self._packed = None
        if root is not None:
            path = Path(root)
            path = path / OFFICIAL_FILE if path.is_dir() else path
            self._packed = self._load(path).to(self.device)

    def _render(self, indices: Tensor) -> Tensor:
        if self._packed is not None:
            shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)
            bits = (self._packed[indices][:, :, None] >> shifts) & 1
            return bits.view(-1, *self.shape).float()
        return render_sprites(self._unravel(indices))

    def _load(self, path: Path) -> Tensor:
        """The images of the official file, packed: uint8 (N, 512). The pickled `metadata` in it is never read."""
        n = len(self)
        packed = np.empty((n, SIDE * SIDE // 8), np.uint8)
        try:
            with zipfile.ZipFile(path) as archive:
                for start, v in read_blocks(archive, "latents_classes", np.dtype("<i8"), (n, len(self.factor_sizes))):
                    if not np.array_equal(v, self._unravel(torch.arange(start, start + len(v))).numpy()):
                        raise ValueError("latents_classes is not in the order of the factors, posY fastest")
                for start, x in read_blocks(archive, "imgs", np.dtype("u1"), (n, SIDE, SIDE)):
                    if x.max() > 1:
                        raise ValueError(f"imgs holds the value {x.max()}, expected 0 and 1 only")
                    packed[start : start + len(x)] = np.packbits(x.reshape(len(x), -1), axis=1)
        except READ_ERRORS as error:
            raise InputError(
                f"root: expected {path} to be the official file {OFFICIAL_FILE} with imgs uint8 ({n}, {SIDE}, {SIDE}) "
                f"and latents_classes int64 ({n}, {len(self.factor_sizes)}), found: {' '.join(str(error).split())}"
            ) from error
        return torch.from_numpy(packed)
