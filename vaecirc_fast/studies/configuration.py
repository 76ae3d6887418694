"""What the image study runs: its configuration, and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import data, models
from .._files import read_json
from ..errors import InputError
from .disentanglement import ON

ARCHITECTURES = ("vae", "beta_vae", "factor_vae", "beta_tcvae", "dip_vae_ii", "vq_vae")
STAND_INS = ("dsprites", "shapes3d_like", "mpi3d_like", "norb_like", "faces_like")
ORIGINALS = ("dsprites", "shapes3d", "mpi3d", "smallnorb", "celeba")

MINIMUM = {"images": 2, "sweep_images": 2, "pairs": 4, "circuit_units": 1, "workers": 0}
COVERAGE = ("all", "star")


@dataclass(frozen=True)
class Config:
    """What the image study runs. `print(config)` shows it as a table.

    out: the directory of runs and report. data: data set names; none means the five of the study: the originals where
    `data_root` is given, else dSprites, which is redrawn exactly, and the rendered stand-ins of the others.
    architectures: model names. seeds: runs of each cell, seeds 0, 1, ... coverage: "all" data sets by all
    architectures, or "star": every architecture on the first data set, the first architecture on the others.
    latents: L. width: multiplies every hidden size. net: "conv" or "mlp". options: "ARCHITECTURE.OPTION=VALUE", such as
    "beta_vae.beta=4"; what is not given is the model's default. axes: what is varied beside, one at a time:
    "latents=4,6,16", "width=4", "beta_vae.beta=1,2,8", or any field that a run depends on; "@" and names of data sets
    and architectures keep it to those: "latents=4,6,16@dsprites,vae,beta_vae".
    steps: training steps of `batch_size` images at learning rate `lr`. precision: "auto", "fp32" or "bf16". images: how
    many a model is judged on; pairs: of inputs for level 1; sweep_images: how many of them its latents are swept on;
    circuit_pairs: of inputs, a change, for levels 3 and 4 and the circuit graph, 0 to leave these out; circuit_units:
    of each layer in that graph. battery: what the disentanglement metrics are computed on, "samples", the images that a
    model is judged on, "grid", every image of the data set and the reference protocol, or "none" to leave them out.
    device: "auto", "cpu" or "cuda". workers: processes that work at the same time, 0 for one a core (one on a GPU).
    data_root: directory of official files, if any, for the data sets that are read from files.
    only: shell-style patterns of run names such as "dsprites-beta_vae-s0"; all runs if empty.
    """

    out: Path = Path("runs/image")
    data: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES
    seeds: int = 1
    coverage: str = "all"
    latents: int = 10
    width: float = 1.0
    net: str = "conv"
    options: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    precision: str = "auto"
    images: int = 10_000
    sweep_images: int = 64
    pairs: int = 256
    circuit_pairs: int = 16
    circuit_units: int = 16
    battery: str = "samples"
    device: str = "auto"
    workers: int = 0
    data_root: Path | None = None
    only: tuple[str, ...] = ()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The configuration called "smoke" (seconds), "quick" (30 runs, under 45 minutes on 2 cores), "standard" (a
        GPU) or "paper" (the published protocol's 90 runs of 300,000 steps), with fields replaced."""
        if name not in PRESETS:
            raise InputError(f"preset: {name!r} is unknown; known: {', '.join(PRESETS)}")
        return cls(**PRESETS[name]).replaced(changes)

    def replaced(self, changes: Mapping[str, Any]) -> Config:
        """This configuration with the fields in `changes` replaced, as read from JSON; InputError for others."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        values = {}
        for key, value in changes.items():
            if key not in fields:
                raise InputError(f"config: {key!r} is no field; known: {', '.join(fields)}")
            values[key] = _typed(key, value, getattr(Config, key))
        return dataclasses.replace(self, **values)

    @classmethod
    def from_file(cls, path: str | Path, base: Config) -> Config:
        """`base` with the fields of a JSON file."""
        changes = read_json(Path(path))
        if not isinstance(changes, dict):
            raise InputError(f"{path}: expected a JSON object of fields, got {type(changes).__name__}")
        return base.replaced(changes)

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The data sets: those that were named, or the five of the study."""
        return self.data or (STAND_INS if self.data_root is None else ORIGINALS)

    def root(self, name: str) -> Path | None:
        """Where the files of data set `name` are; those that have none go on without."""
        return self.data_root if data.takes_root(name) else None

    def __str__(self) -> str:
        """A table of two columns: field and value."""
        values = dataclasses.asdict(self) | {"data": self.data_sets}
        width = max(map(len, values))
        return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in values.items())

    def check(self) -> None:
        """InputError for what would only fail after minutes of training."""
        for name in self.data_sets:
            if name not in data.names():
                raise InputError(f"data: {name!r} is unknown; known: {', '.join(data.names())}")
        for name in self.architectures:
            if name not in models.names():
                raise InputError(f"architectures: {name!r} is unknown; known: {', '.join(models.names())}")
        if not self.architectures:
            raise InputError("architectures: expected at least one")
        for key in ("seeds", "latents", "steps", "batch_size"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}: expected at least 1, got {getattr(self, key)}")
        for key, least in MINIMUM.items():
            if getattr(self, key) < least:
                raise InputError(f"{key}: expected at least {least}, got {getattr(self, key)}")
        if self.circuit_pairs < 2 and self.circuit_pairs != 0:
            raise InputError(f"circuit_pairs: expected at least 2, or 0 for none, got {self.circuit_pairs}")
        for key, known in (("battery", ON), ("coverage", COVERAGE), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, key) not in known:
                words = f"{', '.join(known[:-1])} or {known[-1]}"
                raise InputError(f"{key}: expected {words}, got {getattr(self, key)!r}")
        for key in ("lr", "width"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key}: expected a positive number, got {getattr(self, key)}")
        if self.data_root is not None and not any(data.takes_root(name) for name in self.data_sets):
            raise InputError(f"data_root: none of {', '.join(self.data_sets)} is read from files")


# The learning rate of the published protocol, 1e-4, still draws the mean image after 20,000 images (definitions); the
# short presets take 1e-3.
_AXES = (
    "latents=4,6,16@dsprites,shapes3d,shapes3d_like",
    "width=4@vae,beta_vae",
    "beta_vae.beta=1,2,8,16",
    "factor_vae.gamma=10,100",
    "beta_tcvae.beta=2,10",
    "dip_vae_ii.lambda_od=1,50",
)
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "coverage": "star",
        "net": "mlp",
        "width": 0.25,
        "latents": 4,
        "options": ("factor_vae.hidden=100",),
        "steps": 40,
        "images": 200,
        "sweep_images": 8,
        "pairs": 8,
        "circuit_pairs": 2,
        "circuit_units": 8,
    },
    "quick": {"options": ("beta_tcvae.beta=4",)},
    "standard": {
        "seeds": 3,
        "steps": 20_000,
        "sweep_images": 256,
        "pairs": 1000,
        "circuit_pairs": 64,
        "axes": _AXES,
    },
    "paper": {
        "seeds": 3,
        "steps": 300_000,
        "lr": 1e-4,
        "sweep_images": 512,
        "pairs": 2000,
        "circuit_pairs": 128,
        "battery": "grid",
    },
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _typed(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default."""
    if key in ("out", "data_root"):
        if value is None and key == "data_root":
            return None
        if isinstance(value, str | Path):
            return Path(value)
        raise InputError(f"{key}: expected a path, got {value!r}")
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise InputError(f"{key}: expected a list of names, got {value!r}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise InputError(f"{key}: expected {type(default).__name__}, got {value!r}")
    return value
