"""A folder of images: one subfolder a class, or all in one."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import memory
from .dataset import Dataset
from .image_files import centred_square, read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class Folder(Dataset):
    """The images below a directory, resized to `side` x `side`; its subfolders, in the order of their names, are the
    classes.

    root: the directory. One factor "class" (one value where there are no subfolders). Names that begin with a dot are
    left out. Colour images have 3 channels, transparency dropped; if every image is grey there is 1. All are decoded
    once and kept as uint8. InputError names an unreadable file, an empty folder, an image beside the classes.
    """

    name = "folder"
    factor_names = ("class",)
    complete = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu", side: int = 64):
        super().__init__(device)
        if root is None:
            raise InputError(
                "folder: needs root, the directory of images, with a subfolder for each class if there are any"
            )
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder: {root} is no directory")
        if side < 8:
            raise InputError(f"side: expected at least 8 pixels, got {side}")
        classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) or [root]
        if classes != [root] and (beside := [f for f in _images_in(root) if f.parent == root]):
            raise InputError(f"folder: {beside[0]} lies beside the classes; move it into a subfolder")
        files = [(k, f) for k, folder in enumerate(classes) for f in _images_in(folder)]
        for k, folder in enumerate(classes):
            if not any(label == k for label, _ in files):
                raise InputError(f"folder: {folder} holds no image ({', '.join(SUFFIXES)})")
        # The decoded images and, while these are stacked, a copy.
        memory.check(2 * len(files) * side * side * 3, f"folder ({len(files):,} images)", "use fewer or a smaller side")
        fit = functools.partial(centred_square, side=side)
        arrays = [read_image(file, fit, "folder", "repair or remove it") for _, file in files]
        grey = all(np.array_equal(a[..., 0], a[..., 1]) and np.array_equal(a[..., 0], a[..., 2]) for a in arrays)
        stack = torch.from_numpy(np.stack(arrays)).movedim(3, 1)
        images, labels = (stack[:, :1] if grey else stack).contiguous(), torch.tensor([[k] for k, _ in files])
        self.contents = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
        self._images, self._classes = images.to(self.device), labels.to(self.device)
        self.shape = (self._images.shape[1], side, side)
        self.factor_sizes = (len(classes),)
        self.class_names = tuple(p.name for p in classes)

    def __len__(self) -> int:
        return len(self._images)

    def _render(self, indices: Tensor) -> Tensor:
        return self._images[indices].float() / 255

    def _unravel(self, indices: Tensor) -> Tensor:
        return self._classes[indices]


def _images_in(folder: Path) -> list[Path]:
    found = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))
