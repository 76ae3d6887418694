"""Safetensors files with a JSON header and a checksum: what models, checkpoints, effects and pictures are stored as.

Nothing is unpickled. The checksum is there because safetensors has none: a flipped bit would load as other weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ._files import write_with
from .errors import InputError

_KEY = "vaecirc_fast"  # metadata entry that says what kind of file this is


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
    """Write `tensors` (any device and layout) and the JSON values of `header` to `path` atomically.

    `kind` names the content ("model", "effects"). InputError when the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, allow_nan=False)
    # one entry, because safetensors writes several in random order and equal runs should give equal files
    metadata = {_KEY: json.dumps({"kind": kind, "crc32": _checksum(stored, text), "header": text})}
    # serialised in memory: safetensors' own writer reports a full disk as an error of its own instead of an OSError
    content = safetensors.torch.save(stored, metadata)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_with(Path(path), write)


def read_tensors(path: Path, kind: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and header of a file of `write_tensors`.

    A missing, damaged, cut or foreign file is an InputError that names it; `remedy` is the message's last clause.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is cut short, damaged or no safetensors file ({error}); {remedy}") from error
    try:
        entry = json.loads(metadata.get(_KEY, "{}"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error
    if entry.get("kind") != kind:
        raise InputError(f"{path} is a safetensors file, but no vaecirc_fast {kind}; {remedy}")
    if entry.get("crc32") != _checksum(tensors, entry.get("header", "")):
        raise InputError(f"{path} is damaged (its checksum differs); {remedy}")
    return tensors, json.loads(entry["header"])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
