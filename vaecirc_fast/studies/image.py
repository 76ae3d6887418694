"""The image study: train VAEs, intervene on every latent, measure causal effects, report.

Source of the protocol: arXiv 2505.03530, with the formulas of the project's definitions.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native, data, models, report, training
from .._files import write_json
from .._tensor_files import write_tensors
from ..errors import InputError
from ..sweeps import RunDirectory, RunStore, run_all
from ..training.settings import checked_settings
from .circuits import find_circuits
from .configuration import PRESETS, Config
from .disentanglement import disentanglement, encoded_grid
from .manipulation import manipulate
from .measuring import DEFINITIONS, measure
from .memory import check_memory
from .planning import PROTOCOL, plan

__all__ = ["PRESETS", "PROTOCOL", "Config", "build", "one_run", "plan", "run"]

CHECKPOINT_EVERY = 250  # steps; what a kill can cost
EVALUATION_SEED = 2025  # the images that models are judged on, the same for every model of a data set


def run(config: Config, progress: bool = True) -> Path:
    """Run the study and write its report; the path of the report. Runs that are done are skipped.

    InputError for a configuration that cannot run, before anything is trained.
    """
    config.check()
    device = _device(config)
    sets = {name: data.load(name, root=config.root(name), device=device) for name in config.data_sets}
    planned = plan(config, device, sets)
    for c in {json.dumps({**c, "seed": 0}): c for _, c in planned}.values():
        _check_training(c, sets[c["data"]], device)
    store = RunStore(config.out)
    runs = [store.run(name, c) for name, c in planned]
    workers = _workers(config, device, sum(not run.done for run in runs))
    check_memory([c for _, c in planned], sets, workers, device)
    console = report.Console(len(runs), enabled=progress)
    console.begin(str(config), workers)
    if workers > 1:
        del sets  # the processes load their own, one at a time
        gc.collect()
    given = {
        "root": None if config.data_root is None else str(config.data_root),
        "device": str(device),
        "progress": progress,
    }
    threads = max(1, torch.get_num_threads() // workers)
    with console.live():
        run_all(
            *(store, runs, _work, console.announce),
            given=given,
            workers=workers,
            threads=threads,
            advance=console.advance,
        )
    write_json(config.out / "study.json", {"study": "image", "runs": [r.path.name for r in runs], **_settings(config)})
    page = report.write(config.out)
    console.finish(config.out, page)
    return page


def _work(run: RunDirectory, given: Mapping[str, Any], tell: Callable[[int, int], None] | None) -> dict[str, Any]:
    """One run, in this process or in one of its own: `tell` is then told the step and how many there are."""
    c = run.config
    ds = _loaded(c["data"], given["root"] if c["official"] else None, given["device"])
    if "contents" in c and ds.contents != c["contents"]:
        raise InputError(f"{c['data']}: the images have changed since the study began; start it again")
    progress = given["progress"] if tell is None else lambda step, terms: tell(step, c["steps"])
    return one_run(run, ds, torch.device(given["device"]), progress)


@functools.lru_cache(maxsize=1)  # runs come data set by data set
def _loaded(name: str, root: str | None, device: str) -> data.Dataset:
    return data.load(name, root=root, device=device)


def one_run(run: RunDirectory, ds: data.Dataset, device: torch.device, progress: Any = True) -> dict[str, Any]:
    """Train and measure one model and its untrained twin; the result, with files beside it in the run's directory.

    progress: as `training.fit` takes it.
    """
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
        ours, theirs = (encoded_grid(m, ds, progress is True) for m in (trained.model, model))
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
    if "dataset_size" in models.options(c["architecture"]):  # an objective that estimates q(z) from a batch
        options["dataset_size"] = len(ds)
    return models.build(c["architecture"], ds.shape, **options, width=c["width"], **c["options"]).to(device)


def _check_training(c: Mapping[str, Any], ds: data.Dataset, device: torch.device) -> None:
    """InputError for what the model or its training would refuse."""
    given = {key: c[key] for key in ("steps", "batch_size", "seed", "lr", "precision")}
    checked_settings(build(c, ds, device), ds, schedule="constant", warmup=0, **given)


def _settings(config: Config) -> dict[str, Any]:
    return {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no CUDA device")
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(wanted)


def _workers(config: Config, device: torch.device, runs: int) -> int:
    """How many processes: as many as were asked for, or one a core of a CPU, and no more than there are runs."""
    wanted = config.workers or (torch.get_num_threads() if device.type == "cpu" else 1)
    return max(1, min(wanted, runs))
