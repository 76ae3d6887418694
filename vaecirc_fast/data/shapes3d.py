"""3D Shapes (Burgess and Kim 2018), from the official file."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, MissingExtra
from . import memory
from .dataset import Dataset

OFFICIAL_FILE = "3dshapes.h5"

_READ_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError)


class Shapes3D(Dataset):
    """3D Shapes: 480,000 rendered scenes in colour, 64 x 64, one for each combination of six factors.

    root: the file 3dshapes.h5 or the directory that holds it. It is read with h5py, which the extra `h5` installs.
    The images are kept in the memory of `device`, one byte a channel (5.9 GB). Where there is not so much, a
    UserWarning says so and every batch is read from the file, in the order of its rows: many times slower.
    """

    name = "shapes3d"
    shape = (3, 64, 64)
    factor_names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    factor_sizes = (10, 10, 10, 8, 4, 15)

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is None:
            raise InputError(
                f"shapes3d: needs root, the file {OFFICIAL_FILE} or its directory; the file is linked from "
                "https://github.com/google-deepmind/3d-shapes. Without files: the stand-in shapes3d_like"
            )
        self._path = Path(root) / OFFICIAL_FILE if Path(root).is_dir() else Path(root)
        self._stored: Any = None  # the images in the file, where they do not fit into memory
        self._images: Tensor | None = None
        h5py = _h5py()
        try:
            with contextlib.ExitStack() as closing:
                file = closing.enter_context(h5py.File(self._path, "r"))
                images = self._checked_array(h5py, file, "images", np.dtype("u1"), self._stored_shape())
                self._check_labels(self._checked_array(h5py, file, "labels", np.dtype("<f8"), self._labels_shape())[()])
                needed, free = math.prod(self._stored_shape()), memory.free_bytes(self.device)
                if needed <= free:
                    self._images = self._load(images)
                else:
                    warnings.warn(
                        f"shapes3d: {memory.sized(needed)} of images do not fit into {memory.sized(free)} of free "
                        f"memory; every batch is read from {self._path}, which is slow",
                        stacklevel=2,
                    )
                    self._stored = images
                    closing.pop_all()
        except _READ_ERRORS as error:
            raise self._refusal(error) from error

    def _render(self, indices: Tensor) -> Tensor:
        if self._images is not None:
            return self._images[indices].float() / 255
        # h5py wants each row once, in rising order.
        rows, places = torch.unique(indices.cpu(), return_inverse=True)
        if not len(rows):
            return torch.empty(0, *self.shape, device=self.device)
        try:
            images = torch.from_numpy(self._stored[rows.numpy()])
        except _READ_ERRORS as error:
            raise self._refusal(error) from error
        return (images.movedim(3, 1)[places].to(self.device).float() / 255).contiguous()

    def _load(self, images: Any) -> Tensor:
        """All images (N, C, H, W) uint8 on the device, block by block; a block is whole chunks of the file."""
        n = len(self)
        loaded = torch.empty(n, *self.shape, dtype=torch.uint8, device=self.device)
        chunk = images.chunks[0] if images.chunks else 1
        rows = chunk * max(1, 4096 // chunk)
        for start in range(0, n, rows):
            block = torch.from_numpy(images[start : start + rows])
            loaded[start : start + len(block)] = block.movedim(3, 1).to(self.device)
        return loaded

    def _checked_array(self, h5py: Any, file: Any, key: str, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        if not isinstance(file.get(key, getlink=True), h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
            raise ValueError(f"no array {key!r}; it holds {', '.join(map(repr, file)) or 'nothing'}")
        array = file[key]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{key} is {array.dtype} {array.shape}")
        if array.is_virtual or array.external:
            raise ValueError(f"{key} lies in another file")
        return array

    def _check_labels(self, labels: np.ndarray) -> None:
        """Factors are told by the order of their values: the values themselves are not the documented ones."""
        expected = self._unravel(torch.arange(len(self), device=self.device)).cpu().numpy()
        for k, (name, size) in enumerate(zip(self.factor_names, self.factor_sizes, strict=True)):
            if not np.isfinite(labels[:, k]).all():
                row = int(np.argmin(np.isfinite(labels[:, k])))
                raise ValueError(f"labels[{row}]: {name} is {labels[row, k]}")
            values, found = np.unique(labels[:, k], return_inverse=True)
            if len(values) != size:
                raise ValueError(f"labels: {name} has {len(values)} values, expected {size}")
            if len(wrong := np.flatnonzero(found != expected[:, k])):
                row = int(wrong[0])
                raise ValueError(
                    f"labels[{row}]: {name} is {labels[row, k]:g}, expected {values[expected[row, k]]:g}: rows are to "
                    f"be in the order of the factors, {self.factor_names[-1]} fastest"
                )

    def _stored_shape(self) -> tuple[int, ...]:
        channels, height, width = self.shape
        return len(self), height, width, channels

    def _labels_shape(self) -> tuple[int, ...]:
        return len(self), len(self.factor_names)

    def _refusal(self, error: Exception) -> InputError:
        return InputError(
            f"root: expected {self._path} to be the official file {OFFICIAL_FILE} with images uint8 "
            f"{self._stored_shape()} and labels float64 {self._labels_shape()}, found: {' '.join(str(error).split())}"
        )


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("shapes3d needs h5py: pip install 'vaecirc-fast[h5]'") from error
    return h5py
