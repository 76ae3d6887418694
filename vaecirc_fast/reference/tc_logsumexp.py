"""Reference of `tc_logsumexp`: log densities of codes under a minibatch's aggregate posterior, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def standardised(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(z_bl - mu_ml) / sigma_ml as (B, M, L), and 1 / sigma (M, L).

    1 / sigma stops at the largest number, so that a code that lies on a mean of no width has distance 0, not NaN.
    """
    scale = torch.exp(-logvar / 2).clamp(max=torch.finfo(logvar.dtype).max)
    return (z[:, None] - mu) * scale, scale


def weighted_densities(u: Tensor, logvar: Tensor, log_own: float, log_other: float) -> tuple[Tensor, Tensor]:
    """Log weight plus log density: of all latents together (B, M), of each (B, M, L). `u` from `standardised`."""
    density = -(u.square() + logvar + math.log(2 * math.pi)) / 2
    weight = density.new_full(density.shape[:2], log_other)
    weight.diagonal().fill_(log_own)
    return density.sum(2) + weight, density + weight[:, :, None]


def forward(z: Tensor, mu: Tensor, logvar: Tensor, log_own: float, log_other: float) -> tuple[Tensor, Tensor]:
    """z (B, L), mu and logvar (M, L) -> (B,) and (B, L).

    joint[b] = log sum over m of w_bm prod over l of N(z_bl; mu_ml, exp(logvar_ml)), marginals[b, l] the same of one
    latent. w_bm = exp(log_own) where m = b, else exp(log_other).
    """
    u, _ = standardised(z, mu, logvar)
    joint, marginals = weighted_densities(u, logvar, log_own, log_other)
    return joint.logsumexp(1), marginals.logsumexp(1)


def backward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    grad_joint: Tensor,
    grad_marginals: Tensor,
    log_own: float,
    log_other: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for z (B, L), mu and logvar (M, L). A density of 0 adds nothing, however far its mean is."""
    u, scale = standardised(z, mu, logvar)
    of_joint, of_marginals = weighted_densities(u, logvar, log_own, log_other)

    def share(x: Tensor, total: Tensor) -> Tensor:
        return torch.exp(x - torch.where(total == -torch.inf, 0, total)[:, None])

    p = (grad_joint[:, None] * share(of_joint, joint))[:, :, None]
    p = p + grad_marginals[:, None] * share(of_marginals, marginals)
    u = torch.where(p == 0, 0, u)
    towards = p * u
    return -(towards * scale).sum(1), towards.sum(0) * scale, (towards * u - p).sum(0) / 2
