"""The image study: train VAEs, intervene on every latent, measure causal effects, report.

Source of the protocol: arXiv 2505.03530, with the formulas of the project's definitions.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native, data, models, report, training
from .._files import write_json
from ..errors import InputError
from ..sweeps import RunDirectory, RunStore, run_all
from ..training.settings import checked_settings
from . import findings
from .causal_graphs import recovered
from .configuration import PRESETS, Config
from .examined import EVALUATION_SEED, Protocol, examine, measure_model
from .memory import check_memory
from .planning import JUDGED, PROTOCOL, plan

__all__ = ["EVALUATION_SEED", "PRESETS", "PROTOCOL", "Config", "build", "measure_model", "one_run", "plan", "run"]

CHECKPOINT_EVERY = 250  # steps; what a kill can cost
TRAINING = ("steps", "batch_size", "seed", "lr", "precision")


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
    todo = [run for run in runs if not run.done]
    workers = _workers(config, device, len(todo))
    if todo:
        check_memory([run.config for run in todo], sets, workers, device)
    with store.lock():  # nobody else works here, and it can be written
        pass
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
    findings.write(config.out)
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
    started = time.perf_counter()
    trained = training.fit(
        build(c, ds, device),
        ds,
        **{key: c[key] for key in TRAINING},
        out=run.path,
        checkpoint_every=CHECKPOINT_EVERY,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    protocol = Protocol(**{key: c[key] for key in JUDGED})
    examined = examine(trained.model, build(c, ds, device), ds, protocol, progress is True)
    examined.write(run.path)
    graphs = recovered(trained.model, build(c, ds, device), ds, seed=EVALUATION_SEED)
    return {
        **examined.result,
        **({"recovered": graphs} if graphs else {}),
        "dataset": {"images": len(ds), "shape": list(ds.shape)},
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
            "images_per_second": trained.images_per_second if math.isfinite(trained.images_per_second) else None,
            "sweeps": examined.plans,
            "parts": examined.seconds,
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
    given = {key: c[key] for key in TRAINING}
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
