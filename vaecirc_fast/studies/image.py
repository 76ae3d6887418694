"""The image study: train VAEs, intervene on every latent, measure causal effects, report.

Source of the protocol: arXiv 2505.03530, with the formulas of the project's definitions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native, data, models, report, training
from .._files import read_json, write_json
from .._tensor_files import write_tensors
from ..errors import InputError
from ..sweeps import RunDirectory, RunStore, run_all
from ..training.settings import checked_settings
from .circuits import find_circuits
from .disentanglement import ON, disentanglement, encoded_grid
from .manipulation import manipulate
from .measuring import DEFINITIONS, measure

PROTOCOL = 4  # part of every run's id: raised when the same configuration would give other numbers
CHECKPOINT_EVERY = 250  # steps; what a kill can cost
MINIMUM = {"images": 2, "sweep_images": 2, "pairs": 4, "circuit_units": 1}
EVALUATION_SEED = 2025  # the images that models are judged on, the same for every model of a data set


@dataclass(frozen=True)
class Config:
    """What the image study runs.

    out: the directory of runs and report. data: data set names. architectures: model names. seeds: runs of each pair,
    seeds 0, 1, ... latents: L. net: "conv" or "mlp". beta: of beta_vae. steps: training steps of `batch_size` images at
    learning rate `lr`. precision: "auto", "fp32" or "bf16". images: how many a model is judged on; pairs: of inputs for
    level 1; sweep_images: how many of them its latents are swept on; circuit_pairs: of inputs, a change, for levels 3
    and 4 and the circuit graph, 0 to leave these out; circuit_units: of each layer in that graph. battery: what the
    disentanglement metrics are computed on, "samples", the images that a model is judged on, "grid", every image of the
    data set and the reference protocol, or "none" to leave them out. device: "auto", "cpu" or "cuda". data_root:
    directory of official files, if any, for the data sets that are read from files.
    only: shell-style patterns of run names such as "dsprites-beta_vae-s0"; all runs if empty.
    """

    out: Path = Path("runs/image")
    data: tuple[str, ...] = ("dsprites", "digits")
    architectures: tuple[str, ...] = ("vae", "beta_vae")
    seeds: int = 2
    latents: int = 10
    net: str = "conv"
    beta: float = 4.0
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
    data_root: Path | None = None
    only: tuple[str, ...] = ()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The configuration called "smoke" (seconds) or "quick" (minutes on 2 cores), with fields replaced."""
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


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": ("digits",),
        "seeds": 1,
        "steps": 800,
        "images": 500,
        "sweep_images": 16,
        "pairs": 64,
        "net": "mlp",
    },
    "quick": {},
}


def run(config: Config, progress: bool = True) -> Path:
    """Run the study and write its report; the path of the report. Runs that are done are skipped.

    InputError for a configuration that cannot run, before anything is trained.
    """
    device = _checked(config)
    store = RunStore(config.out)
    sets = {name: data.load(name, root=_root(config, name), device=device) for name in config.data}
    planned = plan(config, device, sets)
    for _, c in planned:
        _check_training(c, sets[c["data"]], device)
    runs = [store.run(name, c) for name, c in planned]
    console = report.Console(len(runs), enabled=progress)
    run_all(store, runs, lambda r: one_run(r, sets[r.config["data"]], device, progress), console.announce)
    write_json(config.out / "study.json", {"study": "image", "runs": [r.path.name for r in runs], **_settings(config)})
    page = report.write(config.out)
    console.finish(config.out, page)
    return page


def plan(config: Config, device: torch.device, sets: Mapping[str, data.Dataset]) -> list[tuple[str, dict[str, Any]]]:
    """Name and configuration of every run: everything that its numbers depend on, and nothing else."""
    runs = []
    for name in config.data:
        for architecture in config.architectures:
            for seed in range(config.seeds):
                label = f"{name}-{architecture}-s{seed}"
                if config.only and not any(fnmatchcase(label, pattern) for pattern in config.only):
                    continue
                settings = {
                    "study": "image",
                    "protocol": PROTOCOL,
                    "data": name,
                    "official": _root(config, name) is not None,
                    **({"contents": sets[name].contents} if sets[name].contents else {}),
                    "architecture": architecture,
                    "options": {"beta": config.beta} if architecture == "beta_vae" else {},
                    "seed": seed,
                    **{
                        key: getattr(config, key)
                        for key in ("latents", "net", "steps", "batch_size", "lr", "precision")
                    },
                    **{key: getattr(config, key) for key in ("images", "sweep_images", "pairs")},
                    **{key: getattr(config, key) for key in ("circuit_pairs", "circuit_units", "battery")},
                    "device": device.type,
                }
                runs.append((label, settings))
    if not runs:
        raise InputError(f"only: no run matches {', '.join(config.only)}; runs are named like dsprites-beta_vae-s0")
    return runs


def one_run(run: RunDirectory, ds: data.Dataset, device: torch.device, progress: bool = True) -> dict[str, Any]:
    """Train and measure one model and its untrained twin; the result, with files beside it in the run's directory."""
    c = run.config
    model = build(c, ds, device)
    judged = {"images": c["images"], "sweep_images": c["sweep_images"], "seed": EVALUATION_SEED}
    untrained = measure(model, ds, **judged, permute=False)
    started = time.perf_counter()
    trained = training.fit(
        build(c, ds, device),
        ds,
        steps=c["steps"],
        batch_size=c["batch_size"],
        seed=c["seed"],
        lr=c["lr"],
        precision=c["precision"],
        out=run.path,
        checkpoint_every=CHECKPOINT_EVERY,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    measured = measure(trained.model, ds, **judged)
    inputs = {
        "trained": manipulate(trained.model, ds, pairs=c["pairs"], seed=EVALUATION_SEED),
        "untrained": manipulate(model, ds, pairs=c["pairs"], seed=EVALUATION_SEED),
    }
    circuits = None
    if c["circuit_pairs"]:
        active = [row["latent"] for row in measured.latents if row["active"]]
        sizes = {"pairs": c["circuit_pairs"], "units": c["circuit_units"]}
        circuits = find_circuits(trained.model, model, ds, active=active, seed=EVALUATION_SEED, **sizes)
    table = None
    if c["battery"] == "samples":
        table = disentanglement(measured.encoded, untrained.encoded, EVALUATION_SEED)
    elif c["battery"] == "grid":
        ours, theirs = (encoded_grid(m, ds, progress) for m in (trained.model, model))
        table = disentanglement(ours, theirs, EVALUATION_SEED)
    for grid, effects in measured.effects.items():
        effects.save(run.path / f"effects-{grid}.safetensors")
    write_tensors(run.path / "pictures.safetensors", "pictures", measured.pictures, {})
    if circuits:
        write_tensors(run.path / "circuits.safetensors", "circuits", circuits.tensors, {})
    definitions = DEFINITIONS | (circuits.definitions if circuits else {})
    return {
        "trained": measured.trained,
        "metrics": measured.metrics | (circuits.metrics if circuits else {}),
        "replicates": measured.replicates,
        "latents": measured.latents,
        "inputs": inputs,
        **({"circuits": circuits.found} if circuits else {}),
        **({"disentanglement": table.found} if table else {}),
        "control": {
            "untrained": untrained.metrics | (circuits.control if circuits else {}),
            "permuted": measured.permuted,
        },
        "definitions": {name: {"unit": unit, "definition": text} for name, (unit, text) in definitions.items()},
        "history": trained.history.to_dict("records"),
        "machine": {
            "version": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _native.processor(),
            "instruction_set": _native.instruction_set(),
            "threads": torch.get_num_threads(),
            "precision": trained.precision,
        },
        "timing": {
            "training_seconds": seconds,
            "sweeps": measured.plans | ({"patching": circuits.plan} if circuits else {}),
            **({"circuits": circuits.seconds} if circuits else {}),
            **({"disentanglement": table.seconds} if table else {}),
        },
    }


def build(c: Mapping[str, Any], ds: data.Dataset, device: torch.device) -> models.ImageModel:
    """The run's model as it is before training; its untrained control too."""
    torch.manual_seed(c["seed"])
    options = {"latents": c["latents"], "net": c["net"], "likelihood": ds.likelihood, "trials": ds.trials}
    return models.build(c["architecture"], ds.shape, **options, **c["options"]).to(device)


def _root(config: Config, name: str) -> Path | None:
    """Where the data set's files are; those that have none go on without."""
    return config.data_root if data.takes_root(name) else None


def _check_training(c: Mapping[str, Any], ds: data.Dataset, device: torch.device) -> None:
    """InputError for what the model or its training would refuse."""
    given = {key: c[key] for key in ("steps", "batch_size", "seed", "lr", "precision")}
    checked_settings(build(c, ds, device), ds, schedule="constant", warmup=0, **given)


def _settings(config: Config) -> dict[str, Any]:
    return {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}


def _checked(config: Config) -> torch.device:
    """The device; InputError for whatever would only fail after minutes of training."""
    for name in config.data:
        if name not in data.names():
            raise InputError(f"data: {name!r} is unknown; known: {', '.join(data.names())}")
    for name in config.architectures:
        if name not in models.names():
            raise InputError(f"architectures: {name!r} is unknown; known: {', '.join(models.names())}")
    for key in ("seeds", "latents", "steps", "batch_size"):
        if getattr(config, key) < 1:
            raise InputError(f"{key}: expected at least 1, got {getattr(config, key)}")
    for key, least in MINIMUM.items():
        if getattr(config, key) < least:
            raise InputError(f"{key}: expected at least {least}, got {getattr(config, key)}")
    if config.circuit_pairs < 2 and config.circuit_pairs != 0:
        raise InputError(f"circuit_pairs: expected at least 2, or 0 for none, got {config.circuit_pairs}")
    if config.battery not in ON:
        raise InputError(f"battery: expected {', '.join(ON[:-1])} or {ON[-1]}, got {config.battery!r}")
    for key in ("lr", "beta"):
        if not 0 < getattr(config, key) < math.inf:
            raise InputError(f"{key}: expected a positive number, got {getattr(config, key)}")
    if not config.data or not config.architectures:
        raise InputError("data, architectures: expected at least one of each")
    if config.data_root is not None and not any(data.takes_root(name) for name in config.data):
        raise InputError(f"data_root: none of {', '.join(config.data)} is read from files")
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no CUDA device")
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(wanted)


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
