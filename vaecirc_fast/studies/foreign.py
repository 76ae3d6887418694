"""Models from elsewhere: any module with `encode` and `decode`, given the face that the measuring half asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.likelihoods import LIKELIHOODS
from .subjects import Subject, called_layers, check_means, chosen_layers

MEANS = ("embedding", "mu", "mean", "z")  # what an output object may call the codes
LOG_VARIANCES = ("log_covariance", "logvar", "log_var")
IMAGES = ("reconstruction", "recon_x", "x")


def adapted(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    likelihood: str = "bernoulli",
    encode: Callable[[Tensor], Any] | None = None,
    decode: Callable[[Tensor], Any] | None = None,
) -> Foreign:
    """A module from elsewhere as `measure`, `manipulate` and `find_circuits` take it.

    model: a module with `encode(x)` and `decode(z)`, or with modules `encoder` and `decoder` of that kind, as those of
    pythae are; or give the two. encode gives the codes (B, L) of images
    (B, C, H, W) in [0, 1]; or (codes, log-variances); or an object with `embedding` and perhaps `log_covariance` (other
    names: mu, mean, z; logvar, log_var). decode gives the mean images (B, C, H, W), or (B, C H W), or an object with
    `reconstruction`.
    likelihood: "bernoulli", whose means lie in [0, 1], or "gaussian".
    InputError for other shapes, NaN, or means outside [0, 1] for "bernoulli", naming which.
    """
    if isinstance(model, Foreign):
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if likelihood not in LIKELIHOODS:
        raise InputError(f"likelihood: unknown {likelihood!r}; known are {', '.join(LIKELIHOODS)}")
    if encode is None and decode is None:
        encode, decode = _functions(model)
    if not callable(encode) or not callable(decode):
        raise InputError(
            f"model: {type(model).__name__} has neither encode and decode nor encoder and decoder; "
            "give both, measure_model(..., encode=, decode=)"
        )
    channels, height, width = shape
    return Foreign(model, (channels, height, width), likelihood, encode, decode)


def _functions(model: nn.Module) -> tuple[Any, Any]:
    """A module's own encode and decode, or else its modules encoder and decoder, as pythae's models have them."""
    for names in (("encode", "decode"), ("encoder", "decoder")):
        found = (getattr(model, names[0], None), getattr(model, names[1], None))
        if all(map(callable, found)):
            if names[0] == "encoder" and any(hasattr(model, name) for name in ("quantizer", "quantiser")):
                raise InputError(
                    f"model: {type(model).__name__} quantises its codes between encoder and decoder; of such models "
                    "only vf.models' own VQ-VAE can be measured"
                )
            return found
    return None, None


class Foreign(nn.Module):
    """`model` with its latents as a site: x -> decode(latents(encode(x))), in the shapes of this project."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        likelihood: str,
        encode: Callable[[Tensor], Any],
        decode: Callable[[Tensor], Any],
    ):
        super().__init__()
        self.model, self.latents = model, nn.Identity()
        self.shape, self.likelihood = shape, likelihood
        self._functions = (encode, decode)
        self.width = 0  # known from the first codes
        self._subject: Subject | None = None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (B, L) and log-variances (B, L), None where the model has none."""
        found = self._functions[0](x)
        mu, logvar = _codes(found)
        if not isinstance(mu, Tensor) or mu.ndim != 2 or len(mu) != len(x) or not mu.is_floating_point():
            raise InputError(f"model: expected encode(x) to give floats (B = {len(x)}, L), got {_described(mu)}")
        if self.width and mu.shape[1] != self.width:
            raise InputError(f"model: encode gave {mu.shape[1]} latents, and {self.width} before")
        if logvar is not None and (not isinstance(logvar, Tensor) or logvar.shape != mu.shape):
            raise InputError(
                f"model: expected log-variances of the codes' shape {tuple(mu.shape)}, got {_described(logvar)}"
            )
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Mean images (B, C, H, W)."""
        y = self._functions[1](z)
        if not isinstance(y, Tensor):
            y = _named(y, IMAGES)
        if isinstance(y, Tensor) and y.ndim >= 2 and len(y) == len(z) and y[0].numel() == math.prod(self.shape):
            return y.reshape(len(z), *self.shape)
        raise InputError(
            f"model: expected decode(z) to give images (B = {len(z)}, {_sizes(self.shape)}), got {_described(y)}"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.latents(self.encode(x)[0]))

    def as_subject(self) -> Subject:
        """How it is measured; checked on one batch."""
        if self._subject is None:
            self._subject = self._made()
        return self._subject

    @torch.no_grad()
    def _made(self) -> Subject:
        self.eval()
        parameter = next(self.parameters(), None)
        like = torch.zeros(()) if parameter is None else parameter
        ramp = torch.linspace(0, 1, 2 * math.prod(self.shape), device=like.device, dtype=like.dtype)
        x = ramp.view(2, *self.shape)
        mu, _ = self.encode(x)
        if not bool(mu.isfinite().all()):
            raise InputError("model: encode gave NaN or infinity")
        self.width = mu.shape[1]
        before = called_layers(self, lambda: self.encode(x))
        # heads are called last and give L numbers each: they are the latents, or their log-variances
        modules = dict(self.named_modules())
        while before and isinstance(modules[before[-1]], nn.Linear) and modules[before[-1]].out_features == self.width:
            before.pop()
        decoder = _Decoding(self)
        chain = called_layers(decoder, lambda: decoder(mu))
        subject = Subject(
            module=self,
            decoder=decoder,
            encoding=_Encoding(self),
            shape=self.shape,
            latents=self.width,
            loss="bernoulli" if self.likelihood == "bernoulli" else "squared_error",
            head="latents",
            encoding_sites=(*before, "latents"),
            before=tuple(chosen_layers(before, self)),
            after=tuple(chosen_layers(chain[:-1], self)),
            chain=tuple(chain),
            encode=self.encode,
            prefix="model.",
        )
        check_means(subject, self.decode(mu))
        return subject


class _Encoding(nn.Module):
    """The encoder alone, with the sites of the whole."""

    def __init__(self, whole: Foreign):
        super().__init__()
        self.model, self.latents, self._encode = whole.model, whole.latents, whole.encode

    def forward(self, x: Tensor) -> Tensor:
        return self.latents(self._encode(x)[0])


class _Decoding(nn.Module):
    """The decoder alone, with the sites of the whole."""

    def __init__(self, whole: Foreign):
        super().__init__()
        self.model, self._decode = whole.model, whole.decode

    def forward(self, z: Tensor) -> Tensor:
        return self._decode(z)


def _codes(found: Any) -> tuple[Any, Any]:
    """What an encoder gave as codes and log-variances."""
    if isinstance(found, Tensor):
        return found, None
    if isinstance(found, tuple | list):
        return (found[0], found[1] if len(found) > 1 else None) if found else (None, None)
    return _named(found, MEANS), _named(found, LOG_VARIANCES)


def _named(found: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if value is not None:
            return value
    return None


def _described(value: Any) -> str:
    return f"{value.dtype} ({_sizes(tuple(value.shape))})" if isinstance(value, Tensor) else type(value).__name__


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
