"""The DIP-VAE-I and -II (Kumar et al. 2018): a penalty draws the covariance of the codes towards the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .image_model import check_not_negative
from .vae import VAE


class DIPVAEI(VAE):
    """VAE whose loss is reconstruction + KL + lambda_od * sum_{i != j} C_ij^2 + lambda_d * sum_i (C_ii - 1)^2.

    C = Cov_x[mu(x)] (L, L), over the batch and divided by its size B, as published. That is an estimate: for Gaussian
    codes an element is off by sqrt((C_ii C_jj + C_ij^2) / B), so the penalty of independent latents of variance 1 is
    not 0 but near (lambda_od * L (L - 1) + lambda_d * 2 L) / B: at L = 10 and B = 64, 1.4 lambda_od + .3 lambda_d.
    `lambda_od`, `lambda_d` >= 0; the other arguments are VAE's.
    """

    name = "dip_vae_i"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        lambda_od: float = 10.0,
        lambda_d: float = 100.0,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        check_not_negative("lambda_od", lambda_od)
        check_not_negative("lambda_d", lambda_d)
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, sigma=sigma)
        self.lambda_od, self.lambda_d = lambda_od, lambda_d

    def config(self) -> dict[str, Any]:
        return {**super().config(), "lambda_od": self.lambda_od, "lambda_d": self.lambda_d}

    def covariance(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """The covariance C (L, L) that is drawn to the identity, of posteriors (B, L)."""
        deviations = mu - mu.mean(0)
        return (deviations[:, :, None] * deviations[:, None]).mean(0)  # no product that autocast would round

    def terms(self, x: Tensor, logits: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The terms of VAE in nats per image, and the penalty "covariance", which is no nats: it is added as it is."""
        C = self.covariance(mu, logvar)
        variances = C.diagonal()
        off_diagonal = C - torch.diag(variances)
        penalty = self.lambda_od * off_diagonal.square().sum() + self.lambda_d * (variances - 1).square().sum()
        return {**super().terms(x, logits, z, mu, logvar), "covariance": penalty}


class DIPVAEII(DIPVAEI):
    """DIP-VAE-I with C = Cov_x[mu(x)] + E_x[diag sigma(x)^2], the covariance of q(z) itself."""

    name = "dip_vae_ii"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        lambda_od: float = 10.0,
        lambda_d: float = 10.0,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        own = {"lambda_od": lambda_od, "lambda_d": lambda_d, "sigma": sigma}
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, **own)

    def covariance(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """The covariance C (L, L) that is drawn to the identity, of posteriors (B, L)."""
        return super().covariance(mu, logvar) + torch.diag(logvar.exp().mean(0))
