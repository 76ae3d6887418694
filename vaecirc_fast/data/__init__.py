"""Data sets by name: `load("dsprites")`; each file beside this one holds one data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError
from .dataset import Dataset
from .digits import Digits
from .dsprites import DSprites
from .folder import Folder

__all__ = ["Dataset", "load", "names"]

_DATASETS: dict[str, Callable[..., Dataset]] = {"dsprites": DSprites, "digits": Digits, "folder": Folder}


def names() -> tuple[str, ...]:
    """The names `load` knows."""
    return tuple(_DATASETS)


def load(name: str, root: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """The data set `name` on `device`; `root` is the directory of the official files, where a data set has any."""
    if name not in _DATASETS:
        raise InputError(f"data set {name!r} is unknown; known: {', '.join(_DATASETS)}")
    return _DATASETS[name](root=root, device=device)
