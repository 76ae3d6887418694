"""The FactorVAE (Kim & Mnih 2018): total correlation, estimated by a discriminator, is added to the VAE's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .discriminator import Discriminator, permute_dimensions
from .image_model import check_count, check_not_negative, check_positive
from .vae import VAE, sample_posterior


class FactorVAE(VAE):
    """VAE whose loss is reconstruction + KL + gamma * TC, TC = KL(q(z) || prod_l q(z_l)) as its discriminator sees it.

    The loss takes two batches: the first carries it, the codes of the second, permuted in each dimension, are what the
    discriminator learns to tell those of the first from. It is trained along, by Adam with its own learning rate and
    betas (.5, .9). `gamma` >= 0; `hidden`: units of its layers, whatever `width`; `discriminator_lr`: its learning
    rate; the other arguments are VAE's.
    """

    name = "factor_vae"
    batches = 2

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        gamma: float = 10.0,
        hidden: int = 1000,
        discriminator_lr: float = 1e-4,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        check_not_negative("gamma", gamma)
        check_count("hidden", hidden)
        check_positive("discriminator_lr", discriminator_lr)
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, sigma=sigma)
        self.gamma, self.hidden, self.discriminator_lr = gamma, hidden, discriminator_lr
        self.discriminator = Discriminator(latents, hidden)

    def config(self) -> dict[str, Any]:
        own = {"gamma": self.gamma, "hidden": self.hidden, "discriminator_lr": self.discriminator_lr}
        return {**super().config(), **own}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The VAE's parameters at `lr`; the discriminator's at its own rate and with less momentum."""
        adversary = list(self.discriminator.parameters())
        own = {id(parameter) for parameter in adversary}
        vae = [parameter for parameter in self.parameters() if id(parameter) not in own]
        return [
            {"params": vae, "lr": lr},
            {"params": adversary, "lr": self.discriminator_lr, "betas": (0.5, 0.9)},
        ]

    def objective(self, x: Tensor, generator: torch.Generator | None, step: int | None) -> dict[str, Tensor]:
        """The terms of VAE on the first batch, "total_correlation" = gamma * its estimate, in nats per image, and
        "discriminator", its cross-entropy in nats per code, whose gradient goes to the discriminator alone."""
        first, second = x.chunk(2)
        mu, logvar = self.encode(first)
        z = sample_posterior(mu, logvar, generator)
        with torch.no_grad():  # after the first batch: autocast would keep weights cast here for it, without gradient
            other = permute_dimensions(sample_posterior(*self.encode(second), generator), generator)
        total_correlation, cross_entropy = self.discriminator.judge(z, other)
        return {
            **self.terms(first, self.decoder.logits(z), z, mu, logvar),
            "total_correlation": self.gamma * total_correlation,
            "discriminator": cross_entropy,
        }
