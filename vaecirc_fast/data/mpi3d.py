"""MPI3D (Gondal et al. 2019), read from an official file: photographs or renderings of a robot arm with an object."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import memory
from .dataset import Dataset
from .npz import READ_ERRORS, is_stored, mapped, read_blocks

OFFICIAL_FILES = ("mpi3d_toy.npz", "mpi3d_realistic.npz", "mpi3d_real.npz")
SIDE = 64
_WHERE = "the official files are linked from https://github.com/rr-learning/disentanglement_dataset (12.7 GB each)"


class MPI3D(Dataset):
    """MPI3D: 1,036,800 colour images, one for each combination of its seven factors.

    root: the official file (toy, realistic or real; their arrays have the same form), or a directory that holds exactly
    one of the three. Its one array `images` is uint8 (1036800, 64, 64, 3), in the order of the factors, the vertical
    axis fastest. The file has no labels, so another order cannot be noticed; damaged pixels can, by the archive's
    checksum, for which the whole file is read once. An array that is stored without compression, as the official ones
    are, is then mapped: it takes no memory of its own, and processes share it. A compressed one is unpacked into
    12.7 GB. The images stay on the CPU, and batches of them are moved to `device`.

    The meanings of the first five factors, in order: white, green, red, blue, brown, olive; cone, cube, cylinder,
    hexagonal prism, pyramid, sphere; small, large; camera at the top, centre, bottom; purple, sea green, salmon.
    `contents` is the checksum, which tells the three files apart. InputError without root, and for a file that is
    missing, damaged, or has other keys, shapes or dtypes.
    """

    name = "mpi3d"
    shape = (3, SIDE, SIDE)
    factor_names = (
        "object_color",
        "object_shape",
        "object_size",
        "camera_height",
        "background_color",
        "horizontal_axis",
        "vertical_axis",
    )
    factor_sizes = (6, 6, 2, 3, 3, 40, 40)

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is None:
            raise InputError(
                f"mpi3d: needs root, one of {', '.join(OFFICIAL_FILES)} or the directory that holds it; {_WHERE}; "
                "mpi3d_like is drawn and needs no file"
            )
        self._images, self.contents = self._load(_official(Path(root)))

    def _render(self, indices: Tensor) -> Tensor:
        images = torch.from_numpy(np.asarray(self._images[indices.cpu().numpy()]))
        return images.to(self.device).movedim(3, 1).float().contiguous() / 255

    def _load(self, path: Path) -> tuple[np.ndarray, str]:
        shape = (len(self), SIDE, SIDE, 3)
        needed, dtype = len(self) * SIDE * SIDE * 3, np.dtype("u1")
        try:
            with zipfile.ZipFile(path) as archive:
                crc = f"{archive.getinfo('images.npy').CRC:08x}"
                whole = None
                if not is_stored(archive, "images"):
                    remedy = "free some, or store the array without compression (numpy.savez): it is then not loaded"
                    memory.check(needed, f"{path}, which is compressed,", remedy)
                    whole = np.empty(shape, dtype)
                for start, block in read_blocks(archive, "images", dtype, shape, rows=1024):
                    if whole is not None:
                        whole[start : start + len(block)] = block
                return (mapped(archive, path, "images", dtype, shape) if whole is None else whole), crc
        except READ_ERRORS as error:
            if isinstance(error, InputError):  # which is a ValueError
                raise
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
            raise InputError(
                f"root: expected {path} to be an official file of MPI3D ({', '.join(OFFICIAL_FILES)}), an archive of "
                f"more than {needed:,} bytes unless compressed, with images uint8 {shape}, found {size}: "
                f"{' '.join(str(error).split())}"
            ) from error


def _official(root: Path) -> Path:
    """The one official file that `root` is or holds."""
    if not root.is_dir():
        return root
    found = [name for name in OFFICIAL_FILES if (root / name).exists()]
    if len(found) == 1:
        return root / found[0]
    if found:
        raise InputError(f"root: {root} holds {' and '.join(found)}; pass the path of the one to read")
    raise InputError(f"root: {root} holds none of {', '.join(OFFICIAL_FILES)}; {_WHERE}")
