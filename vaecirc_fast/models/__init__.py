"""The image models: `build` makes one by name, `save` and `load` keep it in a file. Modules only, no training code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from .._tensor_files import read_tensors, write_tensors
from ..errors import InputError
from .annealed_vae import AnnealedVAE
from .beta_tcvae import BetaTCVAE
from .beta_vae import BetaVAE
from .codes import Codes
from .dip_vae import DIPVAEI, DIPVAEII
from .factor_vae import FactorVAE
from .image_model import ImageModel
from .likelihoods import kl_divergence
from .vae import VAE
from .vq_vae import VQVAE

__all__ = [
    "VAE",
    "VQVAE",
    "AnnealedVAE",
    "BetaTCVAE",
    "BetaVAE",
    "Codes",
    "DIPVAEI",
    "DIPVAEII",
    "FactorVAE",
    "ImageModel",
    "build",
    "kl_divergence",
    "load",
    "names",
    "options",
    "save",
]

_CLASSES: tuple[type[ImageModel], ...] = (VAE, BetaVAE, AnnealedVAE, FactorVAE, BetaTCVAE, DIPVAEI, DIPVAEII, VQVAE)
_MODELS = {model.name: model for model in _CLASSES}


def names() -> tuple[str, ...]:
    """The names `build` knows."""
    return tuple(_MODELS)


def options(name: str) -> dict[str, Any]:
    """The options that model `name` has of its own, beside those that all have, with their default values."""
    shared = inspect.signature(VAE).parameters
    own = inspect.signature(_MODELS[name]).parameters
    return {option: parameter.default for option, parameter in own.items() if option not in shared}


def build(
    name: str,
    shape: tuple[int, int, int],
    latents: int = 10,
    *,
    net: str = "conv",
    likelihood: str = "bernoulli",
    **options: Any,
) -> ImageModel:
    """A new model for images of `shape` (C, H, W) with `latents` latents, float32 on the CPU.

    `net`: "conv" or "mlp"; `likelihood`: "bernoulli" or "gaussian"; `options` are those of the class: `width`,
    `trials` of all; `sigma` of all but "vq_vae"; `beta` of "beta_vae" and so on. InputError for an unknown name or
    option, naming the known ones.
    """
    if name not in _MODELS:
        raise InputError(f"name: unknown model {name!r}; known are {', '.join(_MODELS)}")
    model = _MODELS[name]
    known = [option for option in inspect.signature(model).parameters if option not in ("shape", "latents")]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)} of model {name!r}; known are {', '.join(known)}")
    return model(shape, latents, net=net, likelihood=likelihood, **options)


def save(model: ImageModel, path: str | Path) -> None:
    """Write `model` to one safetensors file, atomically: the weights, and `config()` to build it from."""
    write_tensors(Path(path), "model", model.state_dict(), {"config": model.config()})


def load(path: str | Path, device: str | torch.device = "cpu") -> ImageModel:
    """The model that `save` wrote, in eval mode on `device`; InputError for a damaged, cut or foreign file."""
    tensors, header = read_tensors(Path(path), "model", "save the model again")
    try:
        with torch.device("meta"):  # no initialisation: it would cost time and advance the global random state
            model = build(**header["config"])
        model.load_state_dict(tensors, assign=True)
    except (InputError, RuntimeError) as error:
        raise InputError(f"{path} holds a model that this version cannot build: {error}") from error
    return model.to(device).eval()
