"""SmallNORB (LeCun, Huang and Bottou 2004), read from its six official files: photographs of toys on a turntable."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import memory
from .dataset import Dataset

# The name of a part says which instances of each category it has.
PARTS = {"5x46789x9x18x6x2x96x96-training": (4, 6, 7, 8, 9), "5x01235x9x18x6x2x96x96-testing": (0, 1, 2, 3, 5)}
CATEGORIES = ("four-legged animal", "human figure", "airplane", "truck", "car")
SIDE = 64
_BYTES, _INTEGERS = 0x1E3D4C55, 0x1E3D4C54  # magic numbers of the matrices' formats
_FORMATS = {
    0x1E3D4C51: "float32",
    0x1E3D4C52: "packed",
    0x1E3D4C53: "float64",
    0x1E3D4C54: "int32",
    0x1E3D4C55: "uint8",
    0x1E3D4C56: "int16",
}
_WHERE = "the official files are at https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"


class SmallNORB(Dataset):
    """SmallNORB: 48,600 grey images of 50 toys, 10 instances of each of five categories.

    root: the directory of the six files smallnorb-PART-dat.mat, -cat.mat and -info.mat of the training and the testing
    part, unpacked or as the official .mat.gz. Of each stereo pair the first camera's image is taken and resized from 96
    to 64 pixels a side by Pillow's Lanczos filter, as the disentanglement literature does (Locatello et al. 2019);
    199 MB on `device`.

    Its four factors are category, elevation, azimuth and lighting. The instance is none of them, by the same
    literature: instance 3 of the cars has nothing in common with instance 3 of the animals, so as a factor it could not
    be disentangled, and figures could not be compared. Each combination of factors has thus 10 images (`complete` is
    false, `index_of` is refused), and `sample` draws the instance at random. Images are in the order of the factors,
    then the instance, which varies fastest, whatever the order of the files.

    InputError without root, and for files that are missing, cut short, too long, of another magic number or shape, with
    labels out of range, or that do not have each combination of labels once.
    """

    name = "smallnorb"
    shape = (1, SIDE, SIDE)
    factor_names = ("category", "elevation", "azimuth", "lighting")
    factor_sizes = (5, 9, 18, 6)
    complete = False
    parts = PARTS
    raw_side = 96

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is None:
            raise InputError(
                f"smallnorb: needs root, the directory of {_file(next(iter(self.parts)), 'dat')} and its five "
                f"siblings; {_WHERE}; norb_like is drawn and needs no file"
            )
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"root: expected {root} to be the directory of SmallNORB's files; {_WHERE}")
        memory.check(len(self) * SIDE * SIDE, "smallnorb", "free some", self.device)
        self._images = self._load(root).to(self.device)

    def __len__(self) -> int:
        return math.prod(self.factor_sizes) * self.instances

    @property
    def instances(self) -> int:
        """Images of each combination of factors."""
        return sum(len(instances) for instances in self.parts.values())

    def _render(self, indices: Tensor) -> Tensor:
        return self._images[indices].float() / 255

    def _unravel(self, indices: Tensor) -> Tensor:
        return super()._unravel(indices // self.instances)

    def _load(self, root: Path) -> Tensor:
        """uint8 (48600, 1, 64, 64)."""
        labels = {part: self._labels(root, part, instances) for part, instances in self.parts.items()}
        images = np.empty((len(self), SIDE, SIDE), np.uint8)
        for part, index in labels.items():  # after all the labels: they are small, and wrong ones are soon known
            self._read_images(root, part, images, index)
        return torch.from_numpy(images)[:, None]

    def _labels(self, root: Path, part: str, instances: tuple[int, ...]) -> np.ndarray:
        """Where in the data set each image of a part belongs: (24300,)."""
        n = math.prod(self.factor_sizes) * len(instances)
        names = [_file(part, kind) for kind in ("cat", "info")]
        category, info = (_integers(root, name, shape) for name, shape in zip(names, ((n,), (n, 4)), strict=True))
        columns = {
            "category": (names[0], category, range(self.factor_sizes[0])),
            "elevation": (names[1], info[:, 1], range(self.factor_sizes[1])),
            "azimuth": (names[1], info[:, 2], range(0, 2 * self.factor_sizes[2], 2)),
            "lighting": (names[1], info[:, 3], range(self.factor_sizes[3])),
            "instance": (names[1], info[:, 0], instances),
        }
        for label, (name, found, expected) in columns.items():
            outside = ~np.isin(found, expected)
            if outside.any():
                row = int(outside.argmax())
                known = ", ".join(map(str, expected))
                raise InputError(f"root: {root / name} has {label} {found[row]} in row {row}, expected one of {known}")
            for value in expected:
                if value not in found:
                    which = f" ({CATEGORIES[value]})" if label == "category" else ""
                    raise InputError(f"root: {root / name} has no image of {label} {value}{which}")
        known = sorted(k for kept in self.parts.values() for k in kept)
        levels = [category, info[:, 1], info[:, 2] // 2, info[:, 3], np.searchsorted(known, info[:, 0])]
        index = np.ravel_multi_index(levels, (*self.factor_sizes, self.instances))
        if len(np.unique(index)) != n:
            row = int((np.bincount(index)[index] > 1).argmax())
            raise InputError(
                f"root: {root / names[0]} and {names[1]} have the labels of row {row} more than once "
                f"(category {category[row]}, instance, elevation, azimuth, lighting {info[row].tolist()})"
            )
        return np.asarray(index)

    def _read_images(self, root: Path, part: str, images: np.ndarray, index: np.ndarray) -> None:
        from PIL import Image

        side, name = self.raw_side, _file(part, "dat")
        with _Matrix(root, name, _BYTES, (len(index), 2, side, side)) as matrix:
            for k in index:
                first = np.frombuffer(matrix.read(2 * side * side), np.uint8, side * side).reshape(side, side)
                images[k] = np.asarray(Image.fromarray(first).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            matrix.finish()


class _Matrix:
    """One file of SmallNORB, as a context: its header is checked on entry, and each error names the file.

    Little-endian: the magic number of the dtype, the number of axes, at least three int32 of lengths (of which those
    beyond the axes are 1), then the elements, the last axis fastest.
    """

    def __init__(self, root: Path, name: str, magic: int, shape: tuple[int, ...]):
        plain, packed = root / name, root / f"{name}.gz"
        self.path = packed if packed.exists() and not plain.exists() else plain
        self.magic, self.shape = magic, shape
        lengths = (*shape, *[1] * (3 - len(shape)))
        self.header = np.array([magic, len(shape), *lengths], "<i4").tobytes()
        self.size = len(self.header) + math.prod(shape) * (4 if magic == _INTEGERS else 1)
        self.stream: IO[bytes] | gzip.GzipFile

    def __enter__(self) -> _Matrix:
        if not self.path.is_file():
            raise InputError(
                f"root: {self.path.parent} lacks {self.path.name} (or {self.path.name}.gz), of {self.size:,} bytes; "
                f"{_WHERE}"
            )
        try:
            size = self.path.stat().st_size
            packed = self.path.suffix == ".gz"
            self.stream = gzip.open(self.path) if packed else self.path.open("rb")
        except OSError as error:
            raise self._wrong(str(error)) from error
        try:
            found = self.read(min(8, self.size))
            magic, axes = (int(x) for x in np.frombuffer(found, "<i4"))
            if magic != self.magic:
                raise self._wrong(f"the magic number {magic & 0xFFFFFFFF:#x} ({_FORMATS.get(magic, 'of no format')})")
            rest = self.read(len(self.header) - 8)
            if found + rest != self.header:
                lengths = np.frombuffer(rest, "<i4")
                raise self._wrong(f"{axes} axes of lengths {tuple(lengths.tolist())}")
            if not packed and size != self.size:
                raise self._wrong(f"{size:,} bytes")
        except InputError:
            self.stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self, count: int) -> bytes:
        try:
            block = self.stream.read(count)
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(str(error)) from error
        if len(block) < count:
            raise self._wrong("an end before that")
        return block

    def finish(self) -> None:
        """Nothing may follow; reading to the end is also what checks a .gz file's checksum."""
        try:
            more = self.stream.read(1)
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(str(error)) from error
        if more:
            raise self._wrong("more than that")

    def _wrong(self, found: str) -> InputError:
        dtype = _FORMATS[self.magic]
        unpacked = " unpacked" if self.path.suffix == ".gz" else ""
        return InputError(
            f"root: expected {self.path} to hold {dtype} {self.shape} with the magic number {self.magic:#x}, "
            f"{self.size:,} bytes{unpacked}, found {found}"
        )


def _file(part: str, kind: str) -> str:
    return f"smallnorb-{part}-{kind}.mat"


def _integers(root: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    with _Matrix(root, name, _INTEGERS, shape) as matrix:
        numbers = np.frombuffer(matrix.read(4 * math.prod(shape)), "<i4").reshape(shape)
        matrix.finish()
    return numbers
