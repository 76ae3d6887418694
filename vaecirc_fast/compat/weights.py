"""The weights of a sparse autoencoder, whatever package wrote them, and reading files without unpickling."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .._files import write_json, write_with
from ..errors import InputError


@dataclass
class Weights:
    """codes = activation((x - centre) w_enc' + b_enc); x is reconstructed as codes w_dec + b_dec.

    w_enc, w_dec: (M, D), contiguous; b_enc: (M,); b_dec: (D,). centre is b_dec if `centred`, else 0.
    kind: "topk", "batch_topk", "relu", "jumprelu" or "unknown", where the file does not say.
    threshold: (M,), or () one for all, or None; k: entries a row, or None.
    config: the file's own settings, as far as it has some; `save` writes them again.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    kind: str = "unknown"
    centred: bool = True
    threshold: Tensor | None = None
    k: int | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.w_enc.ndim != 2:
            raise InputError(f"w_enc: expected (M, D), got {tuple(self.w_enc.shape)}")
        M, D = self.w_enc.shape
        shapes = {"w_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                got = tuple(getattr(self, name).shape)
                raise InputError(f"{name}: expected {shape} for w_enc {(M, D)}, got {got}")
        if self.threshold is not None and self.threshold.shape not in ((), (M,)):
            raise InputError(f"threshold: expected () or {(M,)}, got {tuple(self.threshold.shape)}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. InputError where it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is cut short, damaged or no safetensors file ({error})") from error


def read_pickled(path: Path) -> dict[str, Any]:
    """A state_dict that torch.save wrote, on the CPU; anything that is not tensors and plain values is refused."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises pickle's, zipfile's and its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is no file of tensors that torch.load(weights_only=True) reads ({first})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a state_dict, got {type(found).__name__}")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. InputError where it cannot be read or is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def take(tensors: dict[str, Any], path: Path, *names: str) -> tuple[Tensor, ...]:
    """These tensors. InputError that names what is missing and what is there."""
    missing = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise InputError(f"{path}: no tensor {', '.join(missing)}; it has {', '.join(sorted(map(str, tensors)))}")
    return tuple(tensors[name] for name in names)


def whole(number: Any, path: Path) -> int | None:
    """k as an integer, from a number or a tensor of one. InputError where it is none."""
    if number is None:
        return None
    value = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
        raise InputError(f"{path}: expected a whole number k > 0, got {number!r}")
    return int(value)


def flipped(matrix: Tensor) -> Tensor:
    """The transpose, in its own memory."""
    return matrix.T.contiguous()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(stored)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_with(path, write)


def write_pickled(path: Path, state: dict[str, Any]) -> None:
    stored = {name: t.detach().cpu().contiguous().clone() if isinstance(t, Tensor) else t for name, t in state.items()}
    write_with(path, lambda temporary: torch.save(stored, temporary))


def write_config(path: Path, config: dict[str, Any]) -> None:
    write_json(path, config)
