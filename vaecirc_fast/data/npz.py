"""Arrays of an .npz archive: read in blocks of rows, checked and never unpickled, or mapped where they lie."""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

# What a damaged archive raises, whichever part of it is damaged.
READ_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,  # an encrypted member, and as NotImplementedError an unknown compression
    SyntaxError,  # with TokenError: an array header that is no Python literal
    tokenize.TokenError,
    TypeError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


def read_blocks(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype, shape: tuple[int, ...], rows: int = 4096
) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `rows` rows of the array `key`, each with the number of its first row.

    Raises one of READ_ERRORS where the archive has no such array, one of another dtype, shape or order, or one that
    fails its checksum; the checksum is known after the last block.
    """
    with archive.open(f"{key}.npy") as stream:
        _check_header(stream, key, dtype, shape)
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        for start in range(0, shape[0], rows):
            n = min(rows, shape[0] - start)
            block = stream.read(n * row_bytes)
            if len(block) != n * row_bytes:
                raise EOFError(f"{key} ends after {start + len(block) // row_bytes} of {shape[0]} rows")
            yield start, np.frombuffer(block, dtype).reshape(n, *shape[1:])
        if stream.read(1):  # reading to the end is also what checks the checksum
            raise ValueError(f"{key} holds more than {shape[0]} rows")


def is_stored(archive: zipfile.ZipFile, key: str) -> bool:
    """Whether the array `key` lies in the archive as it is, without compression."""
    return archive.getinfo(f"{key}.npy").compress_type == zipfile.ZIP_STORED


def mapped(archive: zipfile.ZipFile, path: Path, key: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The stored array `key` of the archive at `path`, read from the file when it is looked at; checks no checksum."""
    with path.open("rb") as file:
        file.seek(archive.getinfo(f"{key}.npy").header_offset)
        _, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        file.seek(name + extra, 1)
        _check_header(file, key, dtype, shape)
        return np.memmap(path, dtype, "r", file.tell(), shape)


def _check_header(stream: IO[bytes], key: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Leaves the stream at the first number."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a header that Python 2 wrote, as in older official files
        found_shape, fortran, found_dtype = read_header(stream)
    if (found_shape, fortran, found_dtype) != (shape, False, dtype):
        raise ValueError(f"{key} is {found_dtype} {found_shape}{' in Fortran order' if fortran else ''}")
