"""Data sets by name: `load("dsprites")`; each file beside this one holds one data set."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from .dataset import Dataset
from .digits import Digits
from .dsprites import DSprites
from .folder import Folder
from .scm_sprites import SCMSprites

__all__ = ["Dataset", "load", "names", "takes_root"]

_DATASETS: dict[str, type[Dataset]] = {
    "dsprites": DSprites,
    "digits": Digits,
    "folder": Folder,
    "scm_sprites": SCMSprites,
}


def names() -> tuple[str, ...]:
    """The names `load` knows."""
    return tuple(_DATASETS)


def load(name: str, root: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """The data set `name` on `device`; `root` is the directory of the official files, where a data set has any."""
    if name not in _DATASETS:
        raise InputError(f"data set {name!r} is unknown; known: {', '.join(_DATASETS)}")
    # Every data set takes these two; the base class needs no root.
    return _DATASETS[name](root=root, device=device)  # pyright: ignore[reportCallIssue]


def takes_root(name: str) -> bool:
    """Whether the data set `name` can be read from files under a root."""
    return name in _DATASETS and _DATASETS[name].takes_root
