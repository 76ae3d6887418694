"""What the measuring half sees of a model: an encoder, latents, a decoder, and the sites where it intervenes.

Three kinds are known: a posterior of L numbers (the VAEs), L slots of vector-quantised codes (the VQ-VAE), and a module
from elsewhere with `encode` and `decode` (see `foreign`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import metrics
from ..errors import InputError
from ..metrics.reconstruction import Likelihood
from ..models import ImageModel

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Subject:
    """A model as it is measured.

    module: x (B, C, H, W) -> mean images, in evaluation mode. decoder: a module of codes -> mean images. encoding: a
    module of x that runs the encoder alone, with the sites `encoding_sites` and `head`. latents L. loss: "bernoulli" or
    "squared_error". head: the site whose channels are the latents. before, after: the sites of encoder and decoder that
    are patched. chain: the decoder's layers in their order, by their names in `decoder`. codebook: (K, D) where latents
    are slots of codes. prefix: of sites, which tables leave out. left_out: part -> why it is not measured.
    """

    module: nn.Module
    decoder: nn.Module
    encoding: nn.Module
    shape: tuple[int, int, int]
    latents: int
    loss: Likelihood
    head: str
    encoding_sites: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    chain: tuple[str, ...]
    encode: Callable[[Tensor], Any] = field(repr=False)
    codebook: Tensor | None = field(default=None, repr=False)
    prefix: str = ""

    @property
    def quantised(self) -> bool:
        """Whether latents are slots of codes."""
        return self.codebook is not None

    @property
    def patched(self) -> list[str]:
        """Where units are patched, in the order in which they run."""
        return [*self.before, self.head, *self.after]

    def shown(self, site: str) -> str:
        """A site as tables name it."""
        return site.removeprefix(self.prefix)


@dataclass(frozen=True)
class Coded:
    """What a model makes of N images: `numbers` (N, L), one a latent and image, which every metric of codes reads.

    logvar (N, L) of the posterior, None where it has none. indices (N, L), z_e and z_q (N, D, L) of quantised codes;
    `component_share` (L,): how much of the variance of a slot's z_q its number has.
    """

    numbers: Tensor
    logvar: Tensor | None = None
    indices: Tensor | None = None
    z_e: Tensor | None = None
    z_q: Tensor | None = None
    component_share: Tensor | None = None


def subject_of(model: Any) -> Subject:
    """How `model` is measured; InputError for what is neither an image model nor one made by `foreign.adapted`."""
    if isinstance(model, Subject):
        return model
    if hasattr(model, "as_subject"):
        return model.as_subject()
    if not isinstance(model, ImageModel):
        raise InputError(
            f"model: expected one of vf.models, got {type(model).__name__}; "
            "vf.studies.measure_model takes any module with encode and decode"
        )
    loss: Likelihood = "bernoulli" if model.likelihood == "bernoulli" else "squared_error"
    codebook = getattr(model, "codebook", None)
    quantised = isinstance(codebook, Tensor)
    encoder, decoder = layers_of(model.encoder), layers_of(model.decoder)
    convolutions = [name for name, layer in encoder.items() if isinstance(layer, nn.Conv2d)]
    # of convolutions the last and every second before it: those in front are the dearest
    before = convolutions[::-1][::2][::-1] or [name for name in encoder if name not in ("mu", "logvar", "head")]
    after = list(decoder)[:-1]
    after = [name for name in after if isinstance(decoder[name], nn.ConvTranspose2d)] or after
    if len(after) == 2 and isinstance(list(decoder.values())[-1], nn.ConvTranspose2d):
        after = after[:1]  # images of one convolution: its grid is wide, the layer before it is not
    return Subject(
        module=model,
        decoder=model.decoder,
        encoding=_SlotEncoding(model) if quantised else _Encoding(model),
        shape=model.shape,
        latents=model.latents,
        loss=loss,
        head="quantiser" if quantised else "encoder.mu",
        encoding_sites=("encoder.*", "quantiser") if quantised else ("encoder.*",),
        before=tuple(f"encoder.{name}" for name in before),
        after=tuple(f"decoder.{name}" for name in after),
        chain=tuple(decoder),
        encode=model.encode,
        codebook=codebook if quantised else None,
    )


class _Encoding(nn.Module):
    """The encoder alone, under its name."""

    def __init__(self, model: ImageModel):
        super().__init__()
        self.encoder = model.encoder

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x)


class _SlotEncoding(nn.Module):
    """The encoder and the quantiser, whose output here has the slots first: (B, L, D)."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder, self.quantiser = model.encoder, _SlotsFirst(model.quantiser)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantiser(self.encoder(x))


class _SlotsFirst(nn.Module):
    def __init__(self, quantiser: nn.Module):
        super().__init__()
        self.quantise = [quantiser]  # no submodule: its own site would be another name for the same

    def forward(self, z_e: Tensor) -> Tensor:
        return self.quantise[0](z_e).transpose(1, 2)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolutional children of a module by name."""
    return {name: m for name, m in module.named_children() if isinstance(m, LAYERS)}


def batch_size(x: Tensor) -> int:
    """Images a call: what keeps a CPU's activations in its cache, and a GPU busy."""
    return 64 if x.device.type == "cpu" else 500


@torch.no_grad()
def encoded(subject: Subject, x: Tensor) -> Coded:
    """The codes of images x (N, C, H, W)."""
    size = batch_size(x)
    parts = [subject.encode(x[n : n + size]) for n in range(0, len(x), size)]
    if subject.quantised:
        indices, z_e, z_q = (torch.cat([getattr(p, k) for p in parts]) for k in ("indices", "z_e", "z_q"))
        if not bool(z_e.isfinite().all()):
            raise InputError("model: encode gave NaN or infinity")
        assert subject.codebook is not None
        numbers, share = slot_numbers(indices, subject.codebook)
        return Coded(numbers, None, indices, z_e, z_q, share)
    mu = torch.cat([p[0] for p in parts])
    logvar = None if parts[0][1] is None else torch.cat([p[1] for p in parts])
    if not bool(mu.isfinite().all()) or (logvar is not None and bool(logvar.isnan().any())):
        raise InputError("model: encode gave NaN or infinity")
    return Coded(mu, logvar)


def slot_numbers(indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """One number a slot and image, and the share of the slot's variance that it has: indices (N, L) of a codebook
    (K, D) -> (N, L) float32, (L,) float64.

    It is the first principal component of the slot's codes over the images, centred; of its loadings the largest in
    size is positive (of equals the first), so that it does not depend on the solver. A slot of one code has numbers 0
    and share 1. Which row of the codebook a code is does not matter.
    """
    book = codebook.double()
    numbers = torch.zeros(indices.shape, dtype=torch.float64, device=indices.device)
    shares = torch.ones(indices.shape[1], dtype=torch.float64)
    for p, used in enumerate(indices.T):
        weight = torch.bincount(used, minlength=len(book)).double() / len(used)
        some = weight > 0
        vectors = book[some] - weight[some] @ book[some]
        values, axes = torch.linalg.eigh((vectors * weight[some][:, None]).T @ vectors)
        total = float(values.clamp(min=0).sum())
        if int(some.sum()) < 2 or total <= 0:  # rounding alone gives a constant slot a direction
            continue
        first = axes[:, -1]
        first = first * first[first.abs().argmax()].sign()
        line = torch.zeros(len(book), dtype=torch.float64, device=book.device)
        line[some] = vectors @ first
        numbers[:, p], shares[p] = line[used], float(values[-1]) / total
    return numbers.float(), shares


def decoded(subject: Subject, coded: Coded, rows: slice) -> Tensor:
    """Mean images of some of the codes."""
    codes = coded.z_q if subject.quantised else coded.numbers
    assert codes is not None
    return subject.decoder(codes[rows])


def check_means(subject: Subject, y: Tensor) -> Tensor:
    """y, mean images of the subject's shape; InputError for another shape, NaN, or probabilities that are none."""
    if tuple(y.shape[1:]) != tuple(subject.shape):
        raise InputError(f"model: decode gave images {tuple(y.shape[1:])}, expected {tuple(subject.shape)}")
    low, high = (float(v) for v in torch.aminmax(y.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("model: decode gave NaN or infinity")
    if subject.loss == "bernoulli" and not 0 <= low <= high <= 1:
        raise InputError(
            f"model: the bernoulli likelihood needs means in [0, 1], decode gave {low:.4g} to {high:.4g}; "
            "say likelihood='gaussian', or let decode apply the sigmoid"
        )
    return y


@torch.no_grad()
def reconstruction_losses(subject: Subject, coded: Coded, x: Tensor) -> Tensor:
    """Loss (N,) of each of the images x, the first of those that were coded."""
    size, parts = batch_size(x), []
    for n in range(0, len(x), size):
        rows = slice(n, min(n + size, len(x)))
        y = check_means(subject, decoded(subject, coded, rows))
        parts.append(metrics.reconstruction_loss(x[rows], y, subject.loss))
    return torch.cat(parts)


def called_layers(module: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the linear and convolutional layers of `module` that `run` calls, in the order of their first call."""
    order: list[str] = []
    handles = [
        m.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, m in module.named_modules()
        if isinstance(m, LAYERS)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def chosen_layers(names: Sequence[str], module: nn.Module, most: int = 3) -> list[str]:
    """At most `most` of these layers, evenly spread, the last among them."""
    every = max(1, math.ceil(len(names) / most))
    return list(names)[::-1][::every][::-1]
