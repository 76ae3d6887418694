"""What determines a training run's numbers: checked arguments, the precision they resolve to, and their comparison."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..data.dataset import Dataset
from ..errors import InputError
from ..models import ImageModel
from .schedules import SCHEDULES

PRECISIONS = ("auto", "fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that change the weights; two runs of equal settings give equal weights on one machine."""

    model: dict[str, Any]
    data: str
    images: int
    steps: int
    batch_size: int
    seed: int
    lr: float
    schedule: str
    warmup: int
    precision: str

    def differences(self, stored: dict[str, Any], reached: int) -> list[str]:
        """How these settings differ from those `stored` with a checkpoint at step `reached`, one clause each.

        Under a constant schedule the numbers of a step do not depend on how many follow, so `steps` may grow.
        """
        mine = dataclasses.asdict(self)
        mine_model, stored_model = mine.pop("model"), dict(stored.get("model", {}))
        if self.schedule == "constant" and self.steps >= reached:
            mine["steps"] = stored.get("steps")
        pairs = [(name, stored.get(name), value) for name, value in mine.items()]
        names = [*mine_model, *(name for name in stored_model if name not in mine_model)]
        pairs += [(f"model {name}", stored_model.get(name), mine_model.get(name)) for name in names]
        return [f"{name} {old!r} there, {new!r} here" for name, old, new in pairs if old != new]


def checked_settings(
    model: ImageModel,
    ds: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    lr: float,
    schedule: str,
    warmup: int,
    precision: str,
) -> Settings:
    """The settings of a run, or InputError naming the argument that is wrong. Tells the model the size of the data."""
    if not isinstance(model, ImageModel):
        raise InputError(f"model: expected one of models.build, got {type(model).__name__}")
    if tuple(model.shape) != tuple(ds.shape):
        raise InputError(f"model: is for images {tuple(model.shape)}, but data set {ds.name!r} has {tuple(ds.shape)}")
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("warmup", warmup, 0)):
        checked_count(name, value, least)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(f"seed: expected an integer in [0, 2**63), got {seed!r}")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not math.isfinite(lr) or lr <= 0:
        raise InputError(f"lr: expected a positive number, got {lr!r}")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: unknown {schedule!r}; known are {', '.join(SCHEDULES)}")
    model.prepare(len(ds))
    return Settings(
        model=model.config(),
        data=ds.name,
        images=len(ds),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        lr=float(lr),
        schedule=schedule,
        warmup=warmup,
        precision=resolved_precision(model, precision),
    )


def checked_count(name: str, value: int, least: int) -> None:
    """InputError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def resolved_precision(model: nn.Module, precision: str) -> str:
    """What `precision` means for `model`: "fp32" or "bf16".

    "auto" takes bfloat16 for float32 models where the hardware multiplies it natively and it pays: on a CPU always
    (measured at 64x64: 1.3x with convolutions, 1.6x as MLP), on a GPU with convolutions only, since there a small MLP
    waits for its launches and the casts add some. InputError for an unknown name or one that cannot run.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: unknown {precision!r}; known are {', '.join(PRECISIONS)}")
    parameter = next(model.parameters())
    native = _native_bf16(parameter.device) and parameter.dtype == torch.float32
    if precision == "auto":
        pays = parameter.device.type == "cpu" or has_convolutions(model)
        return "bf16" if native and pays else "fp32"
    if precision == "bf16" and parameter.dtype != torch.float32:
        raise InputError(f"precision: 'bf16' keeps float32 weights, but the model's are {parameter.dtype}")
    if precision == "bf16" and not native and parameter.device.type != "cpu":
        raise InputError(f"precision: {parameter.device} has no bfloat16 arithmetic; pass 'fp32'")
    return precision


def has_convolutions(model: nn.Module) -> bool:
    """Whether any layer's weight is a filter bank, so that the channels-last layout matters."""
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        # true on AVX-512 without the bf16 instructions as well, where autocast runs but wins nothing
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
