"""The variational autoencoder (Kingma & Welling 2014): Gaussian posterior, standard normal prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .image_model import ImageModel, positive
from .likelihoods import at_least_float32, kl_divergence
from .networks import NETS


class VAE(ImageModel):
    """Encoder q(z|x) = N(mu(x), diag exp(logvar(x))), decoder y = g(z) = the mean of the likelihood.

    `sigma`: a constant sd of the posterior q(z|x), one for all latents or one for each, in place of the encoder's; the
    other arguments are `ImageModel`'s.
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
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials)
        encoder, decoder = NETS[net]
        self.encoder = encoder(self.shape, latents, width)
        self.decoder = decoder(self.shape, latents, likelihood, width)
        self.sigma = _checked_sigma(sigma, latents)
        if self.sigma is not None:
            self.constant_logvar: Tensor
            self.register_buffer("constant_logvar", 2 * torch.tensor(self.sigma).log())

    def config(self) -> dict[str, Any]:
        """What `models.build(**config)` needs to make this architecture again; plain JSON values."""
        return {**super().config(), **({} if self.sigma is None else {"sigma": list(self.sigma)})}

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

    def objective(self, x: Tensor, generator: torch.Generator | None, step: int | None) -> dict[str, Tensor]:
        """The summands of the loss through one posterior sample of each image, in nats per image."""
        mu, logvar = self.encode(x)
        z = sample_posterior(mu, logvar, generator)
        return self.terms(x, self.decoder.logits(z), z, mu, logvar)

    def terms(self, x: Tensor, logits: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The summands of the loss: "reconstruction" (negative log-likelihood) and "kl", in nats per image."""
        return {"reconstruction": self.reconstruction(x, logits), "kl": kl_divergence(mu, logvar).sum() / len(x)}


def sample_posterior(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + sigma * noise, all (B, L); the noise is drawn on the generator's device, without one on that of `mu`."""
    device = mu.device if generator is None else generator.device
    noise = torch.randn(mu.shape, generator=generator, device=device, dtype=mu.dtype).to(mu.device)
    return mu + torch.exp(0.5 * logvar) * noise


def _checked_sigma(sigma: Any, latents: int) -> tuple[float, ...] | None:
    if sigma is None:
        return None
    sigmas = tuple(sigma) if isinstance(sigma, list | tuple) else (sigma,) * latents
    if len(sigmas) != latents or not all(positive(s) for s in sigmas):
        raise InputError(f"sigma: expected a positive number, or one for each of {latents} latents, got {sigma!r}")
    return tuple(float(s) for s in sigmas)
