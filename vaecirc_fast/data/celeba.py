"""CelebA (Liu et al. 2015): photographs of faces with 40 attributes, from the official files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._files import reason
from ..errors import InputError
from . import image_cache
from .dataset import Dataset
from .image_files import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER, ATTRIBUTES, PARTITION = "img_align_celeba", "list_attr_celeba", "list_eval_partition"
PARTITIONS = {"train": "0", "valid": "1", "test": "2"}
ALIGNED = (178, 218)  # width and height of the aligned photographs
CROP, SIDE = 148, 64

# A change of how pixels are made must change this: the cache goes by it.
_PIXELS = f"crop {CROP}, bilinear to {SIDE}, channels first"


class CelebA(Dataset):
    """CelebA, aligned and cropped: the middle 148 x 148 pixels of each photograph, resized to 64 x 64, in colour.

    root: the directory of img_align_celeba/ (that folder of .jpg may lie in another of its name), of
    list_attr_celeba.txt and of list_eval_partition.txt, or of both as .csv; below Img/, Anno/ and Eval/ they are found
    too. partition: "train" (162,770 images), "valid", "test" or "all".
    The factors are the 40 attributes, 0 where the file has -1; they do not determine the image. 148 is the crop usual
    in work on variational autoencoders.
    The lists are read at once; the photographs are decoded when the first is asked for (some 1,800 a second and
    thread) and kept in $XDG_CACHE_HOME/vaecirc_fast or ~/.cache/vaecirc_fast (2.0 GB for "train"), from where they are
    mapped; in memory where that directory cannot take them. Photographs that no list has are left alone.
    """

    name = "celeba"
    shape = (3, SIDE, SIDE)
    complete = False
    attribute_count = 40

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu", partition: str = "train"):
        super().__init__(device)
        if root is None:
            raise InputError(
                f"celeba: needs root, the directory of {FOLDER}/, {ATTRIBUTES}.txt and {PARTITION}.txt; the files are "
                "linked from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html. Without files: the stand-in faces_like"
            )
        if partition != "all" and partition not in PARTITIONS:
            raise InputError(f"partition: expected {', '.join(map(repr, PARTITIONS))} or 'all', got {partition!r}")
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"celeba: root: {root} is no directory")
        attributes, partitions = _find(root, "Anno", ATTRIBUTES), _find(root, "Eval", PARTITION)
        self._folder = _image_folder(root)
        self.factor_names, rows = _read_attributes(attributes, self.attribute_count)
        self.factor_sizes = (2,) * len(self.factor_names)
        of_file = _read_partition(partitions)
        _check_same_files(attributes, rows, partitions, of_file)
        chosen = [f for f in rows if partition == "all" or of_file[f] == PARTITIONS[partition]]
        for name, number in PARTITIONS.items():
            if partition in (name, "all") and number not in of_file.values():
                raise InputError(f"celeba: {partitions}: partition {name!r} ({number}) has no image")
        self._files = tuple(chosen)
        self._attributes = torch.from_numpy(np.array([rows[f] for f in chosen], np.int64)).to(self.device)
        self._check_attributes(attributes, partition)
        self._key = self._digest_of_files()
        listed = "\n".join([*self.factor_names, *self._files]).encode() + self._attributes.cpu().numpy().tobytes()
        self.contents = hashlib.sha256(listed).hexdigest()[:16]
        self._images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._files)

    def _render(self, indices: Tensor) -> Tensor:
        if self._images is None:
            name = f"celeba-{self._key}.u8"
            self._images = image_cache.decoded(name, len(self), self.shape, self._decode, self.name)
        return torch.from_numpy(self._images[indices.cpu().numpy()]).to(self.device).float() / 255

    def _unravel(self, indices: Tensor) -> Tensor:
        return self._attributes[indices]

    def _decode(self, n: int) -> np.ndarray:
        remedy = "download the photographs again"
        return read_image(self._folder / self._files[n], _middle, self.name, remedy).transpose(2, 0, 1)

    def _check_attributes(self, path: Path, partition: str) -> None:
        for k, name in enumerate(self.factor_names):
            values = self._attributes[:, k].unique().tolist()
            if len(values) == 1:
                raise InputError(
                    f"celeba: {path}: {name} is {2 * values[0] - 1} for all {len(self)} images of partition "
                    f"{partition!r}; expected both -1 and 1"
                )

    def _digest_of_files(self) -> str:
        """Of names, sizes and times of change: what the cache of decoded images goes by. Names the first that is not
        there."""
        try:
            with os.scandir(self._folder) as entries:
                there = {entry.name: entry for entry in entries}
            digest = hashlib.sha256(f"{_PIXELS}\n".encode())
            for name in self._files:
                if name not in there:
                    missing = sum(f not in there for f in self._files)
                    raise InputError(
                        f"celeba: {self._folder / name} is listed and not there ({missing} of {len(self)} images are "
                        "missing)"
                    )
                status = there[name].stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError as error:
            raise InputError(f"celeba: cannot read {self._folder}: {reason(error)}") from error
        return digest.hexdigest()[:16]


def _find(root: Path, below: str, name: str) -> Path:
    places = [root / part / f"{name}{suffix}" for part in (".", below) for suffix in (".txt", ".csv")]
    for path in places:
        if path.is_file():
            return path
    raise InputError(f"celeba: no {name}.txt or {name}.csv in {root}; expected it beside {FOLDER}/")


def _image_folder(root: Path) -> Path:
    for folder in (root / FOLDER / FOLDER, root / "Img" / FOLDER, root / FOLDER):
        if folder.is_dir():
            return folder
    raise InputError(f"celeba: no folder {FOLDER}/ of .jpg files in {root}")


def _read_attributes(path: Path, count: int) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Names of the attributes, and for every file their values, 0 or 1, in the order of the list."""
    lines = _lines(path)
    csv = path.suffix == ".csv"
    expected = f"a header of image_id and {count} names" if csv else "the number of images"
    number, first = next(lines, (1, []))
    declared = None
    if not csv:
        if len(first) != 1 or not first[0].isdigit():
            raise InputError(f"celeba: {path}, line {number}: expected {expected}, found {' '.join(first)[:60]!r}")
        declared = int(first[0])
        number, first = next(lines, (2, []))
    names = tuple(first[1:] if csv else first)
    if len(names) != count:
        raise InputError(f"celeba: {path}, line {number}: expected the names of {count} attributes, found {len(names)}")
    if len(set(names)) != count:
        raise InputError(f"celeba: {path}, line {number}: an attribute is named twice")
    rows: dict[str, list[int]] = {}
    bits = {"-1": 0, "1": 1}
    for number, row in lines:
        if len(row) != count + 1:
            raise InputError(
                f"celeba: {path}, line {number}: expected a file and {count} values, found {len(row)} columns"
            )
        if row[0] in rows:
            raise InputError(f"celeba: {path}, line {number}: {row[0]} is listed twice")
        try:
            rows[row[0]] = [bits[value] for value in row[1:]]
        except KeyError as error:
            k = next(k for k, value in enumerate(row[1:]) if value not in bits)
            raise InputError(
                f"celeba: {path}, line {number}: {names[k]} is {row[k + 1]!r}, expected -1 or 1"
            ) from error
    if declared is not None and declared != len(rows):
        raise InputError(f"celeba: {path}, line 1: says {declared} images, {len(rows)} follow")
    return names, rows


def _read_partition(path: Path) -> dict[str, str]:
    """For every file its partition: "0", "1" or "2"."""
    lines = _lines(path)
    if path.suffix == ".csv":
        number, header = next(lines, (1, []))
        if len(header) != 2:
            raise InputError(
                f"celeba: {path}, line {number}: expected the header image_id,partition, found {','.join(header)!r}"
            )
    of_file: dict[str, str] = {}
    for number, row in lines:
        if len(row) != 2:
            raise InputError(
                f"celeba: {path}, line {number}: expected a file and its partition, found {len(row)} columns"
            )
        if row[1] not in PARTITIONS.values():
            raise InputError(f"celeba: {path}, line {number}: partition is {row[1]!r}, expected 0, 1 or 2")
        if row[0] in of_file:
            raise InputError(f"celeba: {path}, line {number}: {row[0]} is listed twice")
        of_file[row[0]] = row[1]
    return of_file


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The columns of every line that is not empty, with its number from 1."""
    separator = "," if path.suffix == ".csv" else None
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    columns = line.split(separator)
                    yield number, [column.strip() for column in columns] if separator else columns
    except OSError as error:
        raise InputError(f"celeba: cannot read {path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"celeba: {path} is no text ({error})") from error


def _check_same_files(attributes: Path, rows: dict[str, list[int]], partitions: Path, of_file: dict[str, str]) -> None:
    if not rows:
        raise InputError(f"celeba: {attributes} lists no image")
    for path, here, other, there in ((attributes, rows, partitions, of_file), (partitions, of_file, attributes, rows)):
        if alone := [name for name in here if name not in there]:
            raise InputError(
                f"celeba: {path} has {len(here)} images and {other} {len(there)}: {alone[0]} is in the first only"
            )


def _middle(image: Image) -> Image:
    from PIL import Image

    if image.size != ALIGNED:
        width, height = image.size
        raise ValueError(f"{width} x {height} pixels, expected the aligned photographs of {ALIGNED[0]} x {ALIGNED[1]}")
    left, top = (ALIGNED[0] - CROP) // 2, (ALIGNED[1] - CROP) // 2
    box = (left, top, left + CROP, top + CROP)
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
