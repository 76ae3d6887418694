"""What every image model is: nets, a likelihood, a configuration, and checks of what it is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .likelihoods import LIKELIHOODS, at_least_float32
from .networks import NETS, Decoder

SMALLEST_SIDE = 8  # of an image for the convolutional nets


class ImageModel(nn.Module):
    """An autoencoder of images with `encoder`, `decoder` and L latents; a subclass gives the nets and the loss.

    `shape` (C, H, W); `latents` L >= 1; `net` "conv" (sides of 8 and more) or "mlp"; `likelihood` "bernoulli" (x in
    [0, 1]) or "gaussian" (unit variance); `width` multiplies every hidden size; `trials`: a Bernoulli pixel x stands
    for that many binary ones, a share x of which is on (see `Dataset.trials`). Parameters start from torch's default
    initialisation and the global random state: call `torch.manual_seed` first for a model that can be made again.
    """

    name: str
    batches: int = 1  # that `loss` takes at once; all but the first only help its objective
    encoder: nn.Module
    decoder: Decoder

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
    ):
        super().__init__()
        self.shape = _checked_shape(shape, net)
        check_count("latents", latents)
        if likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood: unknown {likelihood!r}; known are {', '.join(LIKELIHOODS)}")
        check_positive("width", width)
        check_count("trials", trials)
        if trials > 1 and likelihood != "bernoulli":
            raise InputError(f"trials: only the bernoulli likelihood has them, got {trials} for {likelihood}")
        self.latents = latents
        self.trials = trials
        self.net = net
        self.likelihood = likelihood
        self.width = width

    def config(self) -> dict[str, Any]:
        """What `models.build(**config)` needs to make this architecture again; plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "latents": self.latents,
            "net": self.net,
            "likelihood": self.likelihood,
            "width": self.width,
            "trials": self.trials,
        }

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The codes of x (B, C, H, W)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Mean of the likelihood (B, C, H, W) of codes."""
        raise NotImplementedError

    def loss(
        self, x: Tensor, generator: torch.Generator | None = None, *, step: int | None = None
    ) -> dict[str, Tensor]:
        """Terms of the objective, each the batch mean in nats per image; "loss" is the sum of the others.

        x (n B, C, H, W) with B >= 1 in the model's dtype: `batches` n equal batches, of which the first is the one that
        terms are means over. All randomness comes from `generator` (the global state if None). `step`: updates made so
        far, for an objective that changes with them; None is after the last change. Values are checked on CPU tensors
        only: on a GPU that would wait for the device at every step.
        """
        values = x.device.type == "cpu" and not torch.compiler.is_compiling()
        self.check_images(x, values=values)
        if not len(x):
            raise InputError("x: expected at least one image, got none")
        if len(x) % self.batches:
            raise InputError(f"x: {self.name} takes {self.batches} batches of equal size at once, got {len(x)} images")
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise InputError(f"step: expected the number of updates so far or None, got {step!r}")
        terms = self.objective(x, generator, step)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def objective(self, x: Tensor, generator: torch.Generator | None, step: int | None) -> dict[str, Tensor]:
        """The summands of the loss for checked images, in nats per image."""
        raise NotImplementedError

    def prepare(self, images: int) -> None:
        """Tell the objective how many images the data set to train on has; most need not know."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What Adam is given to train this model at learning rate `lr`: parameters and their options, for each part
        that has its own. Whatever lowers the rate during training lowers that of every group alike."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def reconstruction(self, x: Tensor, logits: Tensor) -> Tensor:
        """Negative log-likelihood of x given logits, both (B, C, H, W): the batch mean in nats per image."""
        nll = LIKELIHOODS[self.likelihood].nll(at_least_float32(logits), x)
        return self.trials * nll.sum() / len(x)

    def example_input(self) -> Tensor:
        """One image-shaped input (1, C, H, W) in [0, 1], the same every time, to trace shapes with."""
        parameter = next(self.parameters())
        ramp = torch.linspace(0, 1, math.prod(self.shape), device=parameter.device, dtype=parameter.dtype)
        return ramp.view(1, *self.shape)

    def check_images(self, x: Tensor, *, values: bool = False) -> None:
        """InputError unless x is (B, C, H, W) of the model's dtype and, with `values`, in the likelihood's range."""
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise InputError(f"x: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype:
            raise InputError(f"x: expected {dtype} as the model's parameters, got {x.dtype}")
        if values and x.numel():
            low, high = (float(v) for v in torch.aminmax(x))
            if LIKELIHOODS[self.likelihood].unit_range and not 0 <= low <= high <= 1:
                raise InputError(
                    f"x: the {self.likelihood} likelihood needs values in [0, 1], got a range of [{low:g}, {high:g}]"
                )
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InputError("x: expected finite values, got NaN or infinity")


def positive(value: Any) -> bool:
    """Whether `value` is a finite number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def check_positive(name: str, value: Any) -> None:
    """InputError unless `value` is a finite number above zero."""
    if not positive(value):
        raise InputError(f"{name}: expected a positive number, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """InputError unless `value` is a finite number of at least zero."""
    if not positive(value) and (isinstance(value, bool) or value != 0):
        raise InputError(f"{name}: expected a number of at least 0, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """InputError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")


def _checked_shape(shape: Any, net: str) -> tuple[int, int, int]:
    if net not in NETS:
        raise InputError(f"net: unknown {net!r}; known are {', '.join(NETS)}")
    smallest = SMALLEST_SIDE if net == "conv" else 1
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    integers = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) != 3 or not integers or sizes[0] < 1 or min(sizes[1:]) < smallest:
        raise InputError(f"shape: expected (C, H, W) with C >= 1 and sides >= {smallest} for {net!r}, got {shape!r}")
    return sizes
