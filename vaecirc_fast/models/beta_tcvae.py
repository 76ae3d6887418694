"""The beta-TCVAE (Chen et al. 2018): of the three parts of KL, total correlation alone is weighted by beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..ops.tc_logsumexp import KINDS, tc_logsumexp
from .image_model import check_count, check_positive
from .vae import VAE


class BetaTCVAE(VAE):
    """VAE whose loss is reconstruction + mutual information + beta * total correlation + KL of the single latents.

    The three are parts of KL, I_q(z; x) + KL(q(z) || prod_l q(z_l)) + sum_l KL(q(z_l) || p(z_l)), so the loss is
    computed as reconstruction + KL + (beta - 1) * total correlation: the same mean, and KL is exact, not sampled.

    `beta` > 0. `weights`: how a minibatch stands for q(z), "mws" as published or "mss", whose density is unbiased for
    minibatches of different samples (`fit` draws with replacement: for data sets much larger than the batch the same);
    see `vf.ops.tc_logsumexp`. `dataset_size`: N of those weights; `fit` sets it to that of the data. Both estimate
    total correlation with a large bias that is constant in the weights of "mws": for its value measure the trained
    model. The other arguments are VAE's.
    """

    name = "beta_tcvae"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        beta: float = 6.0,
        weights: str = "mws",
        dataset_size: int | None = None,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        check_positive("beta", beta)
        if weights not in KINDS:
            raise InputError(f"weights: unknown {weights!r}; known are {', '.join(KINDS)}")
        if dataset_size is not None:
            check_count("dataset_size", dataset_size)
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, sigma=sigma)
        self.beta, self.weights, self.dataset_size = beta, weights, dataset_size

    def config(self) -> dict[str, Any]:
        return {**super().config(), "beta": self.beta, "weights": self.weights, "dataset_size": self.dataset_size}

    def prepare(self, images: int) -> None:
        if self.dataset_size not in (None, images):
            raise InputError(f"dataset_size: the model says {self.dataset_size}, but the data set has {images} images")
        self.dataset_size = images

    def terms(self, x: Tensor, logits: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The terms of VAE and "total_correlation" = (beta - 1) * its estimate, in nats per image."""
        if self.dataset_size is None:
            raise InputError("dataset_size: beta_tcvae needs the number of images that minibatches are drawn from")
        joint, marginals = tc_logsumexp(z, mu, logvar, kind=self.weights, dataset_size=self.dataset_size)
        total_correlation = (joint - marginals.sum(1)).mean()
        return {**super().terms(x, logits, z, mu, logvar), "total_correlation": (self.beta - 1) * total_correlation}
