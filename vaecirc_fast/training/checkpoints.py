"""Checkpoints: weights, buffers and Adam's state in one safetensors file, with the settings they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_text
from .._tensor_files import read_tensors, write_tensors
from ..errors import InputError
from .settings import Settings

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"

_Row = dict[str, float]


def checked_directory(out: str | Path) -> Path:
    """`out` as a directory that exists and can be written, or InputError before any work is lost."""
    out = Path(out)
    probe = out / ".writable"
    write_text(probe, "")
    probe.unlink(missing_ok=True)
    return out


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether every weight and every moment of the optimizer is finite. Waits for the device."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(model, optimizer).values())


def write_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, step: int, history: list[_Row]
) -> None:
    """Write the state after `step` whole updates to `path`, atomically."""
    header = {"step": step, "settings": dataclasses.asdict(settings), "history": history}
    write_tensors(path, "checkpoint", _tensors(model, optimizer), header)


def read_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[int, list[_Row]]:
    """Put the state of `path` into `model` and `optimizer`; its step and history.

    InputError when the file is damaged, or belongs to other settings: then it says which, and nothing was changed.
    """
    tensors, header = read_tensors(path, "checkpoint", "delete it to start this run over, or pass another `out`")
    step = header["step"]
    differences = settings.differences(header["settings"], step)
    if differences:
        raise InputError(
            f"{path} belongs to a run with other settings ({'; '.join(differences)}); "
            "pass the same settings to resume it, or another `out`"
        )
    _restore(model, optimizer, tensors)
    return step, header["history"]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{key}"] = value
    return tensors


@torch.no_grad()
def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            parameter, key = name.removeprefix("adam.").rsplit(".", 1)
            state.setdefault(parameter, {})[key] = tensor
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            # the moments must have the parameter's memory layout: the fused update walks all of them in memory order
            like = parameter if value.shape == parameter.shape else value.to(parameter.device)
            optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)
