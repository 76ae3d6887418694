"""The VAE family for tests: every architecture with options that are cheap, and an encoder of known posteriors."""

import torch
from torch import nn

from vaecirc_fast import models

SHAPE = (1, 8, 8)
OPTIONS = {
    "vae": {},
    "beta_vae": {"beta": 2.0},
    "annealed_vae": {"gamma": 3.0, "capacity": 0.5, "anneal_steps": 10},
    "factor_vae": {"gamma": 2.0, "hidden": 16, "discriminator_lr": 1e-2},
    "beta_tcvae": {"beta": 3.0, "dataset_size": 100},
    "dip_vae_i": {"lambda_od": 2.0, "lambda_d": 3.0},
    "dip_vae_ii": {"lambda_od": 2.0, "lambda_d": 3.0},
}


def new_model(name, latents=4, seed=0, shape=SHAPE, **options):
    """Model `name` in float64 with nets that are away from the prior, so that every term weighs."""
    torch.manual_seed(seed)
    options = {"net": "mlp", "width": 0.1, **OPTIONS[name], **options}
    model = models.build(name, shape, latents, **options).double()
    with torch.no_grad():
        model.encoder.mu.weight.mul_(20)
        model.encoder.logvar.weight.mul_(20)
    return model


def images(n, seed=0, shape=SHAPE):
    """Binary images (n, C, H, W) in float64."""
    return torch.randint(2, (n, *shape), generator=seeded(seed)).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class LinearEncoder(nn.Module):
    """mu = W (the first pixels of the image), the same sigma for all images: posteriors that are known."""

    def __init__(self, weight, sigma):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float64))
        self.logvar = nn.Parameter(2 * torch.as_tensor(sigma, dtype=torch.float64).log())

    def forward(self, x):
        mu = x.flatten(1)[:, : self.weight.shape[1]] @ self.weight.T
        return mu, self.logvar.expand_as(mu)
