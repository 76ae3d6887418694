"""Pixel likelihoods: the link from logits to the mean, and the negative log-likelihood in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(NamedTuple):
    """One likelihood p(x | logits), independent over pixels.

    `link`: the name of the map from logits to the mean, "sigmoid" or "identity"; `mean(logits)` applies it;
    `nll(logits, x)`: -log p, same shape as both, in nats; `unit_range`: whether x must lie in [0, 1].
    """

    link: str
    mean: Callable[[Tensor], Tensor]
    nll: Callable[[Tensor, Tensor], Tensor]
    unit_range: bool


def _bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-x log p - (1 - x) log(1 - p): for grey values the cross-entropy, as all published VAEs of this line use it."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def _gaussian_nll(mean: Tensor, x: Tensor) -> Tensor:
    """-log N(x; mean, 1): the constant log(2 pi)/2 is kept, so the sum is a true negative log-likelihood."""
    return 0.5 * (x - mean).square() + 0.5 * math.log(2 * math.pi)


LIKELIHOODS = {
    "bernoulli": Likelihood("sigmoid", torch.sigmoid, _bernoulli_nll, True),
    "gaussian": Likelihood("identity", lambda logits: logits, _gaussian_nll, False),
}


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32 where autocast made it half precision: a sum over 4,096 pixels in bfloat16 keeps two digits."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every latent: (B, L) and (B, L) -> (B, L), in nats."""
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar)
