"""The VAE of controlled capacity (Burgess et al. 2018): KL is held at a capacity that grows during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .image_model import check_count, check_not_negative, check_positive
from .vae import VAE


class AnnealedVAE(VAE):
    """VAE whose loss is reconstruction + gamma * |KL - C(step)|, C rising along a line from 0 to `capacity`.

    `gamma` > 0; `capacity` >= 0 in nats, reached after `anneal_steps` updates and kept; the other arguments are VAE's.
    KL is the mean of the batch, as published. A loss without a step is the one after annealing.
    """

    name = "annealed_vae"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        gamma: float = 1000.0,
        capacity: float = 25.0,
        anneal_steps: int = 100_000,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
        sigma: float | Sequence[float] | None = None,
    ):
        check_positive("gamma", gamma)
        check_not_negative("capacity", capacity)
        check_count("anneal_steps", anneal_steps)
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials, sigma=sigma)
        self.gamma, self.capacity, self.anneal_steps = gamma, capacity, anneal_steps

    def config(self) -> dict[str, Any]:
        own = {"gamma": self.gamma, "capacity": self.capacity, "anneal_steps": self.anneal_steps}
        return {**super().config(), **own}

    def capacity_at(self, step: int | None) -> float:
        """C in nats after `step` updates; None: after annealing."""
        share = 1.0 if step is None else min(1.0, step / self.anneal_steps)
        return self.capacity * share

    def objective(self, x: Tensor, generator: torch.Generator | None, step: int | None) -> dict[str, Tensor]:
        """ "reconstruction" and "capacity" = gamma * |KL - C(step)|, in nats per image."""
        terms = super().objective(x, generator, step)
        distance = (terms["kl"] - self.capacity_at(step)).abs()
        return {"reconstruction": terms["reconstruction"], "capacity": self.gamma * distance}
