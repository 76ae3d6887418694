"""The variational autoencoder (Kingma & Welling 2014): Gaussian posterior, standard normal prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .likelihoods import LIKELIHOODS, at_least_float32, kl_divergence
from .networks import NETS

SMALLEST_SIDE = 8  # of an image for the convolutional nets


class VAE(nn.Module):
    """Encoder q(z|x) = N(mu(x), diag exp(logvar(x))), decoder y = g(z) = the mean of the likelihood.

    `shape` (C, H, W); `latents` L >= 1; `net` "conv" (sides of 8 and more) or "mlp"; `likelihood` "bernoulli" (x in
    [0, 1]) or "gaussian" (unit variance); `width` multiplies every hidden size; `trials`: a Bernoulli pixel x stands
    for that many binary ones, a share x of which is on (see `Dataset.trials`); `sigma`: a constant sd of the posterior
    q(z|x), one for all latents or one for each, in place of the encoder's. Parameters start from torch's default
    initialisation and the global random state: call `torch.manual_seed` first for a model that can be made again.
    """

    name = "vae"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        super().__init__()
        self.shape = _checked_shape(shape, net)
        if not isinstance(latents, int) or isinstance(latents, bool) or latents < 1:
            raise InputError(f"latents: expected an integer of at least 1, got {latents!r}")
        if likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood: unknown {likelihood!r}; known are {', '.join(LIKELIHOODS)}")
        if not positive(width):
            raise InputError(f"width: expected a positive number, got {width!r}")
        if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
            raise InputError(f"trials: expected an integer of at least 1, got {trials!r}")
        if trials > 1 and likelihood != "bernoulli":
            raise InputError(f"trials: only the bernoulli likelihood has them, got {trials} for {likelihood}")
        self.latents = latents
        self.trials = trials
        self.net = net
        self.likelihood = likelihood
        self.width = width
        encoder, decoder = NETS[net]
        self.encoder = encoder(self.shape, latents, width)
        self.decoder = decoder(self.shape, latents, likelihood, width)
        self.sigma = _checked_sigma(sigma, latents)
        if self.sigma is not None:
            self.constant_logvar: Tensor
            self.register_buffer("constant_logvar", 2 * torch.tensor(self.sigma).log())

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
            **({} if self.sigma is None else {"sigma": list(self.sigma)}),
        }

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x): x (B, C, H, W) -> (B, L), (B, L), float32 also under autocast."""
        self.check_images(x)
        mu, logvar = self.encoder(x)
        if self.sigma is not None:
            logvar = self.constant_logvar.expand_as(mu)
        return at_least_float32(mu), at_least_float32(logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of the likelihood: z (B, L) -> (B, C, H, W)."""
        if z.ndim != 2 or z.shape[1] != self.latents or not z.is_floating_point():
            raise InputError(f"z: expected floats of shape (B, {self.latents}), got {z.dtype} {tuple(z.shape)}")
        return self.decoder(z)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction (B, C, H, W): through a posterior sample in training mode, the posterior mean in eval mode."""
        mu, logvar = self.encode(x)
        z = sample_posterior(mu, logvar, generator) if self.training else mu
        return self.decoder(z)

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Terms of the objective, each the batch mean in nats per image; "loss" is the sum of the others.

        x (B, C, H, W) with B >= 1 in the model's dtype. All randomness comes from `generator` (the global state if
        None). Values are checked on CPU tensors only: on a GPU that would wait for the device at every step.
        """
        values = x.device.type == "cpu" and not torch.compiler.is_compiling()
        self.check_images(x, values=values)
        if not len(x):
            raise InputError("x: expected at least one image, got none")
        mu, logvar = self.encode(x)
        z = sample_posterior(mu, logvar, generator)
        terms = self.terms(x, self.decoder.logits(z), z, mu, logvar)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def terms(self, x: Tensor, logits: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The summands of the loss: "reconstruction" (negative log-likelihood) and "kl", in nats per image."""
        nll = LIKELIHOODS[self.likelihood].nll(at_least_float32(logits), x)
        return {"reconstruction": self.trials * nll.sum() / len(x), "kl": kl_divergence(mu, logvar).sum() / len(x)}

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


def sample_posterior(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + sigma * noise, all (B, L); the noise is drawn on the generator's device, without one on that of `mu`."""
    device = mu.device if generator is None else generator.device
    noise = torch.randn(mu.shape, generator=generator, device=device, dtype=mu.dtype).to(mu.device)
    return mu + torch.exp(0.5 * logvar) * noise


def positive(value: Any) -> bool:
    """Whether `value` is a finite number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _checked_sigma(sigma: Any, latents: int) -> tuple[float, ...] | None:
    if sigma is None:
        return None
    sigmas = tuple(sigma) if isinstance(sigma, list | tuple) else (sigma,) * latents
    if len(sigmas) != latents or not all(positive(s) for s in sigmas):
        raise InputError(f"sigma: expected a positive number, or one for each of {latents} latents, got {sigma!r}")
    return tuple(float(s) for s in sigmas)


def _checked_shape(shape: Any, net: str) -> tuple[int, int, int]:
    if net not in NETS:
        raise InputError(f"net: unknown {net!r}; known are {', '.join(NETS)}")
    smallest = SMALLEST_SIDE if net == "conv" else 1
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    integers = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) != 3 or not integers or sizes[0] < 1 or min(sizes[1:]) < smallest:
        raise InputError(f"shape: expected (C, H, W) with C >= 1 and sides >= {smallest} for {net!r}, got {shape!r}")
    return sizes
