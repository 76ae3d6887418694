"""Latents that are slots of vector-quantised codes, as those of the VQ-VAE: which are active, and what each does.

Latent p is slot p. One can set the code of a slot (discrete), or move a channel of the code space at every slot before
quantisation, which is what continuous interventions on such a model are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..groups import Groups
from ..interventions import Effects, code_sweep, latent_sweep
from ..interventions.codes import Codes
from ..metrics.activity import ACTIVE_SHARE
from .numbers import RECONSTRUCTION, SPECIFICITY, TRAVERSE_STEPS
from .subjects import Coded, Subject
from .sweeping import Sweeps

CHANNEL_IMAGES = 4  # one of so many swept images is swept over channels: those sweeps decode D times 8 codes an image
NEIGHBOURS = 4
STRENGTHS = {
    "ces_raw": "fixed",
    "ces_posterior": "posterior",
    "ces_resample": "resample",
    "ces_z_q": "z_q",
    "ces_code_swap": "code_swap",
    "ces_code_neighbour": "code_neighbour",
}
CODE_GRIDS = {"fixed": "z_e", "posterior": "z_e"}  # what they are for codes

_NEIGHBOUR = "mean |dy| when the code of slot p becomes its nearest, ..., 4th nearest other code"
DEFINITIONS = {
    "reconstruction": RECONSTRUCTION,
    "active": ("latents", "slots whose most used code holds less than 95 % of the images"),
    "mig": (
        "",
        "mean over factors v of (greatest - second I(z_p; v)) / H(v), z_p the first principal component of slot p's "
        "codes in 20 equal-width bins",
    ),
    "ces_raw": (
        "intensity per unit of z_e",
        "mean |dy| / |t| when channel c of z_e moves by t at every slot and is quantised again, t = +-0.5 ... +-2",
    ),
    "ces_posterior": (
        "intensity per sd of z_e",
        "mean |dy| / |t| when channel c of z_e moves by t sd at every slot and is quantised again, t = +-0.5 ... +-2",
    ),
    "ces_resample": ("intensity", "mean |dy| when the code of slot p is taken from another image"),
    "specificity": ("", SPECIFICITY.format("the code of a slot taken from another image")),
    "ces_z_q": (
        "intensity per sd of z_q",
        "mean |dy| / |t| when channel c of z_q moves by t sd at every slot, not quantised, t = +-0.5 ... +-2",
    ),
    "ces_code_swap": ("intensity", "mean |dy| when the code of slot p becomes another one, drawn by usage"),
    "ces_code_neighbour": ("intensity", _NEIGHBOUR),
}


def activity(subject: Subject, coded: Coded) -> Any:
    """A row for each slot: `share` of the images that have not its most used code, whether that is above 0.05
    (`active`), the `entropy` of its codes in nats and exp of it, in `codes`; `component_share` of the variance of its
    vectors that its number has."""
    import pandas

    assert coded.indices is not None and subject.codebook is not None and coded.component_share is not None
    rows = []
    for p, used in enumerate(coded.indices.T):
        counts = torch.bincount(used, minlength=len(subject.codebook))
        shares = counts[counts > 0].double() / len(used)
        share = 1 - float(counts.max()) / len(used)
        entropy = max(0.0, -float((shares * shares.log()).sum()))
        rows.append((p, share, share > ACTIVE_SHARE, entropy, float(torch.tensor(entropy).exp())))
    table = pandas.DataFrame(rows, columns=["latent", "share", "active", "entropy", "codes"])
    return table.assign(component_share=coded.component_share.cpu().numpy())


def sweep(
    subject: Subject,
    coded: Coded,
    grid: str,
    images: int,
    groups: Groups | None,
    seed: int,
    reduce: str | None = "mean",
) -> Effects:
    """One sweep: "resample", "code_swap" or "code_neighbour" of the slots of the first `images` images; "fixed" or
    "posterior" (of z_e) or "z_q" of channels on a quarter of them and at least 2."""
    indices, z_e, z_q, book = coded.indices, coded.z_e, coded.z_q, subject.codebook
    assert indices is not None and z_e is not None and z_q is not None and book is not None
    options: dict[str, Any] = {"groups": groups, "effect": "l1", "seed": seed, "reduce": reduce}
    if grid == "resample":
        return latent_sweep(SlotDecoder(subject), indices[:images].to(book.dtype), grid="resample", **options)
    if grid == "code_neighbour":
        options["draws"] = min(NEIGHBOURS, len(book) - 1)
    elif grid != "code_swap":
        images = min(images, max(2, images // CHANNEL_IMAGES))
        scales = {"fixed": torch.ones_like(book[0]), "posterior": channel_sd(z_e), "z_q": channel_sd(z_q)}
        options["scale"] = scales[grid]
    codes = Codes(indices[:images], z_e[:images], z_q[:images])
    return code_sweep(subject.decoder, codes, book, grid=CODE_GRIDS.get(grid, grid), **options)


def sweeps(subject: Subject, coded: Coded, images: int, groups: Groups, seed: int) -> Sweeps:
    """All of `STRENGTHS`."""
    of = functools.partial(sweep, subject, coded, images=images, groups=groups, seed=seed)
    effects = {grid: of(grid) for grid in STRENGTHS.values()}
    return Sweeps(
        strengths={name: effects[grid] for name, grid in STRENGTHS.items()},
        per_latent=("ces_resample", "ces_code_swap", "ces_code_neighbour"),
        of_latents=effects["resample"],
        files=effects,
        each=lambda: of("resample", reduce=None),
    )


class SlotDecoder:
    """Numbers of codes (B, L), as floats, to mean images: so that the code of a slot can be swept like a number."""

    def __init__(self, subject: Subject):
        self.decoder, self.codebook = subject.decoder, subject.codebook

    def __call__(self, numbers: Tensor) -> Tensor:
        assert self.codebook is not None
        return self.decoder(self.codebook[numbers.long()].transpose(1, 2).contiguous())


def channel_sd(z: Tensor) -> Tensor:
    """(D,) standard deviation of each channel of z (N, D, L), over images and slots."""
    return z.double().transpose(0, 1).flatten(1).std(1, correction=0).to(z.dtype)


def traversals(subject: Subject, coded: Coded) -> Tensor:
    """z_q (L * 7, D, L) of the first image: each slot in turn with the 7 codes that it has most often, in the order of
    their numbers; a slot of fewer codes repeats the last."""
    assert coded.indices is not None and coded.z_q is not None and subject.codebook is not None
    rows = coded.z_q[0].repeat(subject.latents, TRAVERSE_STEPS, 1, 1)
    for p, used in enumerate(coded.indices.T):
        codes, counts = used.unique(return_counts=True)
        most = codes[counts.argsort(descending=True, stable=True)[:TRAVERSE_STEPS]]
        number = {int(k): float(coded.numbers[(used == k).nonzero()[0, 0], p]) for k in most}
        order = sorted(number, key=lambda k: (number[k], k))
        order += order[-1:] * (TRAVERSE_STEPS - len(order))
        rows[p, :, :, p] = subject.codebook[order]
    return rows.flatten(0, 1)
