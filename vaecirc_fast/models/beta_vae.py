"""The beta-VAE (Higgins et al. 2017): the VAE with its KL term weighted by beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .image_model import check_positive
from .vae import VAE


class BetaVAE(VAE):
    """VAE whose loss is reconstruction + beta * KL, with `beta` > 0; the other arguments are VAE's.

    The "kl" term of the loss is the weighted one, so that the terms sum to the loss; divide by `beta` for nats.
    """

    name = "beta_vae"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        beta: float = 4.0,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        check_positive("beta", beta)
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, sigma=sigma)
        self.beta = beta

    def config(self) -> dict[str, Any]:
        return {**super().config(), "beta": self.beta}

    def terms(self, x: Tensor, logits: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The terms of VAE with "kl" = beta * KL, in nats per image."""
        terms = super().terms(x, logits, z, mu, logvar)
        return {**terms, "kl": self.beta * terms["kl"]}
