"""The VAE family as one first writes it in plain torch, and as its public ports do: a training step of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vaecirc_fast as vf

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (kl, z, mu, logvar) -> what is added to the likelihood

# The options that both sides train with.
OPTIONS: dict[str, dict] = {
    "vae": {},
    "beta_vae": {"beta": 4.0},
    "annealed_vae": {"gamma": 100.0, "capacity": 25.0, "anneal_steps": 1000},
    "factor_vae": {"gamma": 10.0},
    "beta_tcvae": {"beta": 4.0},
    "dip_vae_i": {"lambda_od": 10.0, "lambda_d": 100.0},
    "dip_vae_ii": {"lambda_od": 10.0, "lambda_d": 10.0},
}


def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor, images: int) -> Tensor:
    """By minibatch weighted sampling, through the (B, B, L) matrix of log densities."""
    log_density = -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu[None]) ** 2 * torch.exp(-logvar))
    log_weight = math.log(len(z) * images)
    log_qz = torch.logsumexp(log_density.sum(2), 1) - log_weight
    log_product = (torch.logsumexp(log_density, 1) - log_weight).sum(1)
    return (log_qz - log_product).mean()


def objective(name: str, images: int) -> Objective:
    """The regulariser of architecture `name` at `OPTIONS`, for a data set of `images`."""
    own = OPTIONS[name]

    def dip(kl: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        added = torch.diag(torch.exp(logvar).mean(0)) if name == "dip_vae_ii" else 0.0
        products = (mu[:, :, None] * mu[:, None, :]).mean(0)
        covariance = products - mu.mean(0)[:, None] * mu.mean(0)[None] + added
        variances = torch.diagonal(covariance)
        off_diagonal = covariance - torch.diag(variances)
        return kl + own["lambda_od"] * (off_diagonal**2).sum() + own["lambda_d"] * ((variances - 1) ** 2).sum()

    return {
        "vae": lambda kl, z, mu, logvar: kl,
        "beta_vae": lambda kl, z, mu, logvar: own["beta"] * kl,
        "annealed_vae": lambda kl, z, mu, logvar: own["gamma"] * (kl - 0.01 * own["capacity"]).abs(),
        "beta_tcvae": lambda kl, z, mu, logvar: kl + (own["beta"] - 1) * total_correlation(z, mu, logvar, images),
        "dip_vae_i": dip,
        "dip_vae_ii": dip,
    }[name]


class PlainTraining:
    """Training of architecture `name` with nets of ours, but losses, discriminator and loop in plain torch."""

    def __init__(self, name: str, net: str, batch: int, device: str, *, bf16: bool = False, compiled: bool = False):
        torch.manual_seed(0)
        self.name, self.batch, self.device, self.bf16 = name, batch, device, bf16
        self.ds = vf.data.load("dsprites")
        model = vf.models.VAE(self.ds.shape, net=net).to(device)
        self.encoder, self.decoder, self.latents = model.encoder, model.decoder, model.latents
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.elbo = torch.compile(self._elbo) if compiled else self._elbo
        if name == "factor_vae":
            sizes = [self.latents, *[1000] * 6]
            layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
            self.judge = nn.Sequential(*layers, nn.Linear(1000, 2)).to(device)
            self.of_judge = torch.optim.Adam(self.judge.parameters(), lr=1e-4, betas=(0.5, 0.9))
        else:
            self.regulariser = objective(name, len(self.ds))

    def step(self) -> None:
        """One update, and the loss as a loop prints it."""
        (self._factor_step if self.name == "factor_vae" else self._step)()

    def _elbo(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mu, logvar = (t.float() for t in self.encoder(x))
        z = mu + torch.exp(0.5 * logvar) * noise
        logits = self.decoder.logits(z).float()
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu**2 - torch.exp(logvar)).sum() / len(x)
        return nll, kl, z, mu, logvar

    def _drawn(self) -> tuple[Tensor, Tensor]:
        x, _ = self.ds.sample(self.batch, self.generator)
        noise = torch.randn(self.batch, self.latents, generator=self.generator)
        return x.to(self.device), noise.to(self.device)

    def _step(self) -> None:
        x, noise = self._drawn()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            nll, *rest = self.elbo(x, noise)
            loss = nll + self.regulariser(*rest)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    def _factor_step(self) -> None:
        """Two optimizers, two backward passes, the first of which also goes through the discriminator's weights."""
        x, noise = self._drawn()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            nll, kl, z, _, _ = self.elbo(x, noise)
            of_z = self.judge(z).float()
            loss = nll + kl + OPTIONS["factor_vae"]["gamma"] * (of_z[:, 0] - of_z[:, 1]).mean()
        self.optimizer.zero_grad()
        loss.backward(retain_graph=True)
        x, noise = self._drawn()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                mu, logvar = self.encoder(x)
                z = mu + torch.exp(0.5 * logvar) * noise
                other = torch.stack([column[torch.randperm(self.batch)] for column in z.T], 1)
            of_other = self.judge(other).float()
        zeros = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        own = 0.5 * (F.cross_entropy(of_z, zeros) + F.cross_entropy(of_other, zeros + 1))
        self.of_judge.zero_grad()
        own.backward(inputs=list(self.judge.parameters()))
        self.optimizer.step()
        self.of_judge.step()
        loss.item()
