"""The training loop: Adam on a model's own loss, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import models
from .._allocator import kept_memory
from ..data.dataset import Dataset
from ..errors import TrainingDiverged
from ..models import ImageModel
from .checkpoints import CHECKPOINT, MODEL, all_finite, checked_directory, read_checkpoint, write_checkpoint
from .interrupts import delayed_interrupt
from .progress import reporter
from .schedules import learning_rate
from .settings import Settings, checked_count, checked_settings, has_convolutions

if TYPE_CHECKING:
    import pandas as pd

_MASK64 = 2**64 - 1


@dataclass
class Run:
    """A finished training run.

    `model`: the one given, trained in place; `history`: a row per logged step (`step`, counted from 1, and the loss
    terms of that step's batch, in nats per image); `steps` done in all; `images_per_second` of this call, NaN if
    nothing was left to do; `out`: the directory of its files, or None;
    `precision` "fp32" or "bf16", what "auto" came to.
    """

    model: ImageModel
    history: pd.DataFrame
    steps: int
    images_per_second: float
    out: Path | None
    precision: str


def fit(
    model: ImageModel,
    ds: Dataset,
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    lr: float = 1e-3,
    schedule: str = "constant",
    warmup: int = 0,
    precision: str = "auto",
    checkpoint_every: int = 1000,
    log_every: int = 100,
    progress: bool | Callable[[int, dict[str, float]], None] = True,
) -> Run:
    """Train `model` in place on `ds` with Adam for `steps` updates of `batch_size` images, on the model's device.

    Step s draws its images and its latent noise from a generator seeded with (`seed`, s) alone. So a run that was
    killed and started again with the same arguments ends with the same weights, bit for bit, as one left alone
    (same machine, device and number of threads), provided the model's loss takes all its randomness from `generator`.
    A model of more `batches` than one draws as many at each step; `Run` counts the images of the first. An adversary
    (FactorVAE) is updated in the same step, at its own learning rate, to which `schedule` and `warmup` apply alike.

    `out`: a directory for `checkpoint.safetensors`, written every `checkpoint_every` steps and resumed from if there,
    and the finished `model.safetensors`. A run that is already finished returns at once. Under the constant schedule
    `steps` may be raised later. `schedule` ("constant", "linear", "cosine") and `warmup` steps: see `learning_rate`.
    `precision`: "fp32", "bf16" (autocast; weights, losses and Adam stay float32) or "auto", which is bf16 on
    hardware that has it (see `resolved_precision`). `progress`: a bar on a terminal and rare lines elsewhere, nothing
    if False, or a function called with (step, terms) at each logged step: the first, every `log_every`-th and the last.

    Raises InputError for wrong arguments, an `out` that cannot be written, and a checkpoint that is damaged or of
    other settings; TrainingDiverged when the loss or the weights stop being finite (checked at every step on a CPU;
    elsewhere at logged steps and before each checkpoint, so that the device never waits). On Ctrl-C the last whole
    step is checkpointed first.
    """
    settings = checked_settings(
        model,
        ds,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        precision=precision,
    )
    checked_count("checkpoint_every", checkpoint_every, 1)
    checked_count("log_every", log_every, 1)
    directory = None if out is None else checked_directory(out)
    was_training = model.training
    on_cpu = next(model.parameters()).device.type == "cpu"
    with (
        kept_memory(on_cpu),
        _training_layout(model, settings),
        _deterministic(),
        delayed_interrupt() as check_interrupt,
    ):
        trainer = _Trainer(model, ds, settings, directory, log_every, progress if callable(progress) else None)
        first = trainer.resume()
        began = time.perf_counter()
        try:
            model.train()
            with reporter(progress is True, first, steps, batch_size) as report:
                while trainer.step < steps:
                    trainer.advance()
                    report(trainer.step)
                    if trainer.step % checkpoint_every == 0 or trainer.step == steps:
                        trainer.checkpoint()
                    check_interrupt()
        except KeyboardInterrupt:
            trainer.rescue()
            raise
        finally:
            model.train(was_training)
        seconds = time.perf_counter() - began
    if directory is not None and (first < steps or not (directory / MODEL).exists()):
        models.save(model, directory / MODEL)
    rate = (steps - first) * batch_size / seconds if first < steps else math.nan
    return Run(model, trainer.frame(), steps, rate, directory, settings.precision)


class _Trainer:
    """The state of a run between steps: model, optimizer, number of finished steps, history, last checkpoint."""

    def __init__(
        self,
        model: ImageModel,
        ds: Dataset,
        settings: Settings,
        directory: Path | None,
        log_every: int,
        callback: Callable[[int, dict[str, float]], None] | None,
    ):
        self.model, self.ds, self.settings = model, ds, settings
        self.log_every, self.callback = log_every, callback
        self.path = None if directory is None else directory / CHECKPOINT
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.bf16 = settings.precision == "bf16"
        groups = model.parameter_groups(settings.lr)
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        groups = [group for group in groups if group["params"]]
        self.rates = [group["lr"] for group in groups]  # before the schedule
        self.optimizer = torch.optim.Adam(
            groups,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over memory: a tenth of the step on a CPU
        )
        self.generator = torch.Generator(self.device)
        self.changes_in_forward = any(True for _ in model.buffers())
        self.step = self.first = 0
        self.saved = 0  # the step of the last checkpoint
        self.whole = True
        self.history: list[dict[str, float]] = []

    def resume(self) -> int:
        """Continue from the checkpoint, if there is one; the step reached."""
        if self.path is not None and self.path.exists():
            self.step, history = read_checkpoint(self.path, self.model, self.optimizer, self.settings)
            self.first = self.saved = self.step
            # the last step of a shorter run is logged too; it would not be in the longer one that this may now be
            self.history = [row for row in history if self._logged(int(row["step"]))]
        return self.step

    def advance(self) -> None:
        """One update, and the checks and log lines that follow it."""
        x = self._batch()
        self.whole = not self.changes_in_forward
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            terms = self.model.loss(x, generator=self.generator, step=self.step)
        if self.device.type == "cpu":
            self._check(float(terms["loss"].detach()), self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        s = self.settings
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(self.step, lr=rate, steps=s.steps, schedule=s.schedule, warmup=s.warmup)
        self.whole = False
        self.optimizer.step()
        self.step += 1
        self.whole = True
        if self._logged(self.step):
            self._log(terms)

    def checkpoint(self) -> None:
        """Write the state to disk, if it is sound."""
        if not all_finite(self.model, self.optimizer):
            raise self._diverged("the weights are NaN or infinite", self.step)
        if self.path is not None and self.saved != self.step:
            write_checkpoint(self.path, self.model, self.optimizer, self.settings, self.step, self.history)
            self.saved = self.step

    def rescue(self) -> None:
        """After an interrupt: keep the last whole step, if this is one and it is sound."""
        if self.whole and self.path is not None and all_finite(self.model, self.optimizer):
            self.checkpoint()

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        frame = pd.DataFrame(self.history)
        return frame.astype({"step": int})

    def _batch(self) -> Tensor:
        self.generator.manual_seed(step_seed(self.settings.seed, self.step))
        x, _ = self.ds.sample(self.model.batches * self.settings.batch_size, generator=self.generator)
        x = x.to(self.device, self.dtype, non_blocking=True)
        if self.step == self.first:
            self.model.check_images(x, values=True)  # once per call: on a GPU the loss does not look at values
        return x.to(memory_format=torch.channels_last) if self.bf16 else x

    def _logged(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.settings.steps

    def _log(self, terms: dict[str, Tensor]) -> None:
        row = {name: float(term.detach()) for name, term in terms.items()}
        self._check(row["loss"], self.step)
        self.history.append({"step": self.step, **row})
        if self.callback is not None:
            self.callback(self.step, row)

    def _check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", step)

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        kept = (
            f"the last good checkpoint is {self.path} at step {self.saved}" if self.saved else "there is no checkpoint"
        )
        return TrainingDiverged(f"training diverged: {what} at step {step}; {kept}; try a lower lr or a warmup")


def step_seed(seed: int, step: int) -> int:
    """The 64-bit seed of step `step` (below 2**32) in run `seed`.

    torch's CPU generator uses the low 32 bits only, so for a given `seed` these are a permutation of the step: no two
    steps of a run draw the same batch, which hashing to 32 bits would do ten times in 300,000 steps.
    """
    key = _splitmix64(seed)
    low = _mix32(_mix32(step ^ (key & 0xFFFFFFFF)) ^ (_splitmix64(key) & 0xFFFFFFFF))
    return (key & 0xFFFFFFFF00000000) | low


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """A bijection of 32-bit integers (the finaliser of MurmurHash3)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@contextmanager
def _training_layout(model: ImageModel, settings: Settings) -> Iterator[None]:
    """Filters in channels-last order while training convolutions: a tenth faster on a CPU; restored afterwards."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not has_convolutions(model) or not (on_cpu or settings.precision == "bf16"):
        yield
        return
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.ndim == 4]
    strides = [t.stride() for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for tensor, stride in zip(tensors, strides, strict=True):
            original = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor.data = original.copy_(tensor.data)


@contextmanager
def _deterministic() -> Iterator[None]:
    """cuDNN's deterministic algorithms while training; without effect on a CPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
