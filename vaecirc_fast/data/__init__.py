"""Data sets by name: `load("dsprites")`; each file beside this one holds one data set."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from .celeba import CelebA
from .dataset import Dataset
from .digits import Digits
from .dsprites import DSprites
from .faces_like import FacesLike
from .folder import Folder
from .mpi3d import MPI3D
from .mpi3d_like import MPI3DLike
from .norb_like import NORBLike
from .scm_sprites import SCMSprites
from .shapes3d import Shapes3D
from .shapes3d_like import Shapes3DLike
from .smallnorb import SmallNORB

__all__ = ["Dataset", "load", "names", "takes_root"]

_DATASETS: dict[str, type[Dataset]] = {
    "dsprites": DSprites,
    "shapes3d": Shapes3D,
    "shapes3d_like": Shapes3DLike,
    "mpi3d": MPI3D,
    "mpi3d_like": MPI3DLike,
    "smallnorb": SmallNORB,
    "norb_like": NORBLike,
    "celeba": CelebA,
    "faces_like": FacesLike,
    "scm_sprites": SCMSprites,
    "digits": Digits,
    "folder": Folder,
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
