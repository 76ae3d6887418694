"""The models that a metric is compared on: untrained, permuted, half of it to be trained again, of constant sigma."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import InputError


def reinitialised(model: nn.Module, seed: int, part: str | None = None) -> Any:
    """A copy of `model` whose parameters, or those of its child `part`, are drawn anew from `seed`.

    Every module that owns parameters must have torch's `reset_parameters`; InputError names one that has not.
    """
    twin = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in (twin if part is None else _child(twin, part)).named_modules():
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                raise InputError(f"model: {name or type(module).__name__} has no reset_parameters to draw it anew with")
            reset()
    return twin


def half_frozen(model: nn.Module, seed: int, anew: str) -> Any:
    """A copy of a VAE whose child `anew` is drawn anew from `seed`, and whose other half does not train.

    A discriminator is drawn anew and trains with either half: it belongs to the objective, not to the model.
    """
    twin = reinitialised(model, seed, anew)
    if hasattr(model, "discriminator"):
        twin = reinitialised(twin, seed, "discriminator")
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name.startswith((f"{anew}.", "discriminator.")))
    return twin


def of_constant_sigma(model: models.ImageModel, sigma: Tensor, seed: int) -> models.ImageModel:
    """A new model of the same architecture, to be trained, whose posterior has the standard deviations `sigma` (L,)."""
    if "sigma" not in inspect.signature(type(model)).parameters:
        raise InputError(f"constant sigma: {type(model).__name__} has no option sigma; leave this control out")
    parameter = next(model.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = models.build(**{**model.config(), "sigma": sigma.tolist()})
    return twin.to(parameter.device, parameter.dtype)


def permuted(model: nn.Module, seed: int) -> Any:
    """A copy of `model` whose encoder permutes its codes: see `ShuffledCodes`. It needs `model.encoder`."""
    twin = copy.deepcopy(model)
    twin.encoder = ShuffledCodes(_child(twin, "encoder"), seed)
    return twin


class ShuffledCodes(nn.Module):
    """An encoder whose (mu, logvar), (B, L) each, are permuted over the rows of each call, every latent by itself; one
    of slots gives z_e (B, D, L), of which every slot is.

    A latent keeps its values, but they say nothing of the image or of the other latents any more.
    """

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__()
        self.encoder, self.seed, self.calls = encoder, seed, 0

    def forward(self, x: Tensor) -> Any:
        codes = self.encoder(x)
        if isinstance(codes, Tensor) and codes.ndim == 3 and len(codes) > 1:
            self.calls += 1
            order = unit_wise_order(codes[:, 0], self._seed())
            return codes.gather(0, order[:, None].expand_as(codes))
        if not isinstance(codes, tuple) or len(codes) != 2 or codes[0].ndim != 2 or len(codes[0]) < 2:
            raise InputError("permuted: the encoder must give (mu, logvar), (B, L) each with B >= 2 to permute")
        self.calls += 1
        order = unit_wise_order(codes[0], self._seed())
        return codes[0].gather(0, order), codes[1].gather(0, order)

    def _seed(self) -> int:
        return (self.seed * 0x9E3779B1 + self.calls) & 0xFFFFFFFF  # torch uses 32 bits


def unit_wise_order(codes: Tensor, seed: int) -> Tensor:
    """For each column of `codes` (N, L) a random order of its rows, to `gather` with: (N, L)."""
    return torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed)).argsort(0).to(codes.device)


def _child(model: nn.Module, name: str) -> nn.Module:
    child = getattr(model, name, None)
    if not isinstance(child, nn.Module):
        raise InputError(f"model: expected a module with a module {name!r}, got {type(model).__name__}")
    return child
