"""Measure a module of one's own: all that is needed is `encode` and `decode`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import vaecirc_fast as vf


class Autoencoder(nn.Module):
    """A VAE as one might have written it, in nobody's framework."""

    def __init__(self, pixels: int, latents: int):
        super().__init__()
        self.enc = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU())
        self.heads = nn.Linear(64, 2 * latents)
        self.dec = nn.Sequential(nn.Linear(latents, 64), nn.ReLU(), nn.Linear(64, pixels), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.heads(self.enc(x)).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z)

    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.encode(x)
        y = self.decode(mu + torch.randn_like(mu) * (logvar / 2).exp())
        nll = nn.functional.binary_cross_entropy(y, x.flatten(1), reduction="sum")
        return (nll + 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum()) / len(x)


def main(out: str = "runs/plain", steps: int = 2000, **protocol: Any) -> vf.studies.ModelMeasurement:
    ds = vf.data.load("digits")
    torch.manual_seed(0)
    model = Autoencoder(pixels=64, latents=6)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        model.loss(ds.sample(64, generator)[0]).backward()
        optimiser.step()
    found = vf.studies.measure_model(model, ds, name="my_vae", **protocol)
    print(found)
    print("report:", found.save(out))
    return found


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/plain")
