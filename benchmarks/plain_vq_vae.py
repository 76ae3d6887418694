"""The VQ-VAE as one first writes it in plain torch, and as its public ports do: a training step of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vaecirc_fast as vf

CODES, WIDTH, COMMITMENT, DECAY, SMOOTHING = 512, 8, 0.25, 0.99, 1e-5


class PlainVqTraining:
    """Training with nets of ours, but distances, one-hot codes, moving averages, loss and loop in plain torch.

    Ports draw no dead codes anew, so neither does this.
    """

    def __init__(self, net: str, batch: int, device: str, *, bf16: bool = False):
        torch.manual_seed(0)
        self.batch, self.device, self.bf16 = batch, device, bf16
        self.ds = vf.data.load("dsprites")
        model = vf.models.VQVAE(self.ds.shape, net=net, codes=CODES, code_width=WIDTH).to(device)
        self.encoder, self.decoder = model.encoder, model.decoder
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)
        self.codebook = torch.randn(CODES, WIDTH, device=device)
        self.counts, self.sums = torch.zeros(CODES, device=device), self.codebook.clone()

    def step(self) -> None:
        """One update, and the loss as a loop prints it."""
        x = self.ds.sample(self.batch, self.generator)[0].to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            z_e = self.encoder(x).float()
            flat = z_e.transpose(1, 2).reshape(-1, WIDTH)
            with torch.autocast(self.device, enabled=False):
                squares = flat.pow(2).sum(1, keepdim=True) + self.codebook.pow(2).sum(1)
                indices = (squares - 2 * flat @ self.codebook.T).argmin(1)
                one_hot = F.one_hot(indices, CODES).float()
                z_q = (one_hot @ self.codebook).view(self.batch, -1, WIDTH).transpose(1, 2)
                with torch.no_grad():
                    self.counts.mul_(DECAY).add_(one_hot.sum(0), alpha=1 - DECAY)
                    self.sums.mul_(DECAY).add_(one_hot.T @ flat, alpha=1 - DECAY)
                    total = self.counts.sum()
                    smoothed = (self.counts + SMOOTHING) / (total + CODES * SMOOTHING) * total
                    self.codebook = self.sums / smoothed[:, None]
            commitment = COMMITMENT * (z_e - z_q.detach()).pow(2).sum() / self.batch
            logits = self.decoder.logits(z_e + (z_q - z_e).detach()).float()
            loss = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / self.batch + commitment
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
