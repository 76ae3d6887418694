"""The VQ-VAE (van den Oord et al. 2017) with a codebook by moving averages: L slots, each one of K codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.vq_assign import Assigned, vq_assign
from .codes import Codes
from .image_model import ImageModel, check_count, check_positive, positive
from .likelihoods import at_least_float32
from .networks import SLOT_NETS

SMOOTHING = 1e-5  # of the counts, as in the authors' own implementation
DEAD = 0.1  # a code used less often than this share of the average use is drawn anew


class Usage(NamedTuple):
    """How a codebook is used: `perplexity` exp(entropy of the codes' shares), in codes, 1 to K; `share` of the K codes
    that occur at all; `counts` (K,) int64."""

    perplexity: float
    share: float
    counts: Tensor


class VQVAE(ImageModel):
    """z_e = encoder(x), L slots of D channels; z_q the nearest code of each slot; y = g(z_q) the likelihood's mean.

    Latent p is slot p. `codes` K >= 2; `code_width` D; `commitment` > 0 weighs |z_e - z_q|^2, whose gradient goes to
    the encoder alone; that of z_q goes to z_e unchanged. The codebook is no parameter: in training mode each call of
    `loss` moves it by moving averages of `decay` (see `Quantiser`). `reseed`: whether dead codes are drawn anew from
    the batch. The other arguments are `ImageModel`'s.
    """

    name = "vq_vae"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latents: int = 10,
        *,
        codes: int = 512,
        code_width: int = 8,
        commitment: float = 0.25,
        decay: float = 0.99,
        reseed: bool = True,
        net: str = "conv",
        likelihood: str = "bernoulli",
        width: float = 1.0,
        trials: int = 1,
    ):
        super().__init__(shape, latents, net=net, likelihood=likelihood, width=width, trials=trials)
        check_positive("commitment", commitment)
        encoder, decoder = SLOT_NETS[net]
        quantiser = Quantiser(codes, code_width, decay, reseed)
        self.encoder = encoder(self.shape, latents, code_width, width)
        self.quantiser = quantiser
        self.decoder = decoder(self.shape, latents * code_width, likelihood, width)
        self.commitment = commitment

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D)."""
        return self.quantiser.codebook

    def config(self) -> dict[str, Any]:
        """What `models.build(**config)` needs to make this architecture again; plain JSON values."""
        size, width = self.codebook.shape
        return {
            **super().config(),
            "codes": size,
            "code_width": width,
            "commitment": self.commitment,
            "decay": self.quantiser.decay,
            "reseed": self.quantiser.reseed,
        }

    def encode(self, x: Tensor) -> Codes:
        """The codes of x (B, C, H, W): indices (B, L) int64, z_e and z_q (B, D, L), float32 also under autocast."""
        self.check_images(x)
        z_e = at_least_float32(self.encoder(x))
        indices = self.quantiser.assign(z_e).indices
        return Codes(indices, z_e, self.quantiser(z_e, indices))

    def decode(self, z: Tensor) -> Tensor:
        """Mean of the likelihood (B, C, H, W) of z (B, D, L), which need not be codes."""
        expected = (self.codebook.shape[1], self.latents)
        if z.ndim != 3 or z.shape[1:] != expected or not z.is_floating_point():
            raise InputError(
                f"z: expected floats of shape (B, {expected[0]}, {expected[1]}), got {z.dtype} {tuple(z.shape)}"
            )
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (B, C, H, W)."""
        self.check_images(x)
        return self.decoder(self.quantiser(at_least_float32(self.encoder(x))))

    def objective(self, x: Tensor, generator: torch.Generator | None, step: int | None) -> dict[str, Tensor]:
        """ "reconstruction", in nats per image, and "commitment": `commitment` times the sum over slots and channels of
        (z_e - z_q)^2, in squared units of the code space per image. In training mode the codebook moves afterwards."""
        z_e = at_least_float32(self.encoder(x))
        found = self.quantiser.assign(z_e, totals=self.training)
        terms = {
            "reconstruction": self.reconstruction(x, self.decoder.logits(found.z_q.transpose(1, 2))),
            "commitment": self.commitment * found.distance.sum() / len(x),
        }
        if self.training:
            self.quantiser.update(z_e, found, generator)
        return terms

    @torch.no_grad()
    def usage(self, x: Tensor) -> Usage:
        """How the codes of images x (B, C, H, W), B >= 1, use the codebook."""
        indices = self.encode(x).indices
        if not len(x):
            raise InputError("x: expected at least one image, got none")
        counts = torch.bincount(indices.flatten(), minlength=len(self.codebook))
        share = counts[counts > 0].double() / counts.sum()
        return Usage(float(torch.exp(-(share * share.log()).sum())), len(share) / len(counts), counts)


class Quantiser(nn.Module):
    """z_e (B, D, L) -> z_q (B, D, L), each slot's nearest code (Euclidean; ties: lowest index), straight-through.

    Moving averages of decay g, as in the paper's appendix, of how often code k is nearest and of what it is nearest to:

        N_k <- g N_k + (1 - g) n_k,    m_k <- g m_k + (1 - g) sum of the z_e nearest to k,    e_k = m_k / N'_k

    with N' the counts after Laplace smoothing by 1e-5. Where N_k is below a tenth of the mean count, code k is dead:
    it becomes a z_e of the batch with count 1. Counts start from 0, so the first batch already replaces every code it
    does not use. Without `reseed` they start from 1. Codes start standard normal.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int, decay: float = 0.99, reseed: bool = True):
        super().__init__()
        if not isinstance(codes, int) or isinstance(codes, bool) or codes < 2:
            raise InputError(f"codes: expected an integer of at least 2, got {codes!r}")
        check_count("code_width", width)
        if not positive(decay) or decay >= 1:
            raise InputError(f"decay: expected a number between 0 and 1, got {decay!r}")
        if not isinstance(reseed, bool):
            raise InputError(f"reseed: expected True or False, got {reseed!r}")
        self.decay, self.reseed = decay, reseed
        codebook = torch.randn(codes, width)
        counts = torch.zeros(codes) if reseed else torch.ones(codes)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", counts)
        self.register_buffer("sums", codebook * counts[:, None])

    def forward(self, z_e: Tensor, indices: Tensor | None = None) -> Tensor:
        """z_q, of `indices` (B, L) where they are known already. Its gradient is that of z_e."""
        if indices is None:
            return self.assign(z_e).z_q.transpose(1, 2)
        z_q = self.codebook.to(z_e.dtype)[indices].transpose(1, 2)
        return z_q + (z_e - z_e.detach())  # adds 0, exactly

    def assign(self, z_e: Tensor, totals: bool = False) -> Assigned:
        """The codes of z_e (B, D, L), its channels moved last: see `vq_assign`. The codebook is a constant."""
        return vq_assign(z_e.transpose(1, 2), self.codebook.to(z_e.dtype), totals=totals)

    @torch.no_grad()
    def update(self, z_e: Tensor, found: Assigned, generator: torch.Generator | None = None) -> None:
        """Move the codebook towards z_e (B, D, L), of which `found` are the codes, with totals.

        What is drawn from the batch, where codes are dead, is drawn on the generator's device (that of z_e if None).
        """
        assert found.counts is not None and found.sums is not None
        size = len(self.codebook)
        self.counts.lerp_(found.counts.to(self.counts), 1 - self.decay)
        self.sums.lerp_(found.sums.to(self.sums), 1 - self.decay)
        if self.reseed:
            z = z_e.transpose(1, 2).flatten(0, 1)
            device = z.device if generator is None else generator.device
            rows = torch.randperm(len(z), generator=generator, device=device).to(z.device)
            drawn = z[rows[torch.arange(size, device=z.device) % len(z)]].to(self.sums)
            dead = self.counts < DEAD * self.counts.sum() / size
            self.counts.masked_fill_(dead, 1)
            self.sums.copy_(torch.where(dead[:, None], drawn, self.sums))
        total = self.counts.sum()
        smoothed = (self.counts + SMOOTHING) / (total + size * SMOOTHING) * total
        self.codebook.copy_(self.sums / smoothed[:, None])
