"""FactorVAE's discriminator: it tells codes from codes of permuted dimensions, and so estimates total correlation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .likelihoods import at_least_float32

_LAYERS = 6
_SLOPE = 0.2  # of the leaky ReLU


class Discriminator(nn.Module):
    """z (B, L) -> logits (B, 2) of the classes "drawn from q(z)" and "drawn from prod_l q(z_l)".

    fc1..fc6, of `hidden` units with leaky ReLU(.2), and `logits`. With equal classes the difference of the logits of
    the best discriminator is log q(z) / prod_l q(z_l).
    """

    def __init__(self, latents: int, hidden: int = 1000):
        super().__init__()
        for i in range(_LAYERS):
            setattr(self, f"fc{i + 1}", nn.Linear(hidden if i else latents, hidden))
        self.logits = nn.Linear(hidden, 2)

    def forward(self, z: Tensor) -> Tensor:
        h = z
        for i in range(_LAYERS):
            h = F.leaky_relu(getattr(self, f"fc{i + 1}")(h), _SLOPE)
        return self.logits(h)

    def judge(self, z: Tensor, permuted: Tensor) -> tuple[Tensor, Tensor]:
        """Total correlation of codes z (B, L), and the cross-entropy of telling them from `permuted` (B, L), in nats.

        The first has a gradient for z alone, the second for the discriminator's parameters alone, so one backward pass
        of their sum, however weighted, serves both players: see docs/decisions/024.
        """
        B = len(z)
        follow = z.requires_grad and torch.is_grad_enabled()
        codes = torch.cat([z.detach(), permuted.detach()]).requires_grad_(follow)
        logits = at_least_float32(self(codes))
        labels = torch.arange(2, device=z.device).repeat_interleave(B)
        cross_entropy = F.cross_entropy(logits, labels)
        total_correlation = (logits[:B, 0] - logits[:B, 1]).mean()
        if not follow:
            return total_correlation.detach(), cross_entropy
        (slope,) = torch.autograd.grad(total_correlation, codes, retain_graph=True)
        return total_correlation.detach() + ((z - z.detach()) * slope[:B]).sum(), cross_entropy


def permute_dimensions(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z (B, L) with the rows of every column in an order of its own: samples of prod_l q(z_l)."""
    device = z.device if generator is None else generator.device
    order = torch.rand(z.shape, generator=generator, device=device).argsort(0).to(z.device)
    return z.gather(0, order)
