"""Latents that are numbers with a posterior, as those of the VAEs: which are active, and what each does."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..groups import Groups
from ..interventions import latent_sweep
from .subjects import Coded, Subject
from .sweeping import Sweeps

GRIDS = {"ces_raw": "fixed", "ces_posterior": "posterior", "ces_resample": "resample"}
TRAVERSE_STEPS = 7

RECONSTRUCTION = ("", "(loss - floor) / (loss of the mean image - floor); a trained model is at or below 0.5")
SPECIFICITY = "1 - H(p_i) / log G over image cells, {}, mean over latents with an effect"
DEFINITIONS = {
    "reconstruction": RECONSTRUCTION,
    "active": ("latents", "latents with Var_x[mu_i] / s_i^2 > 0.05"),
    "mig": ("", "mean over factors v of (greatest - second I(z_i; v)) / H(v), latents in 20 equal-width bins"),
    "ces_raw": ("intensity per unit of z", "mean |dy| / |delta| over do(z_i := mu_i + delta), delta = +-0.6 ... +-3"),
    "ces_posterior": ("intensity per posterior sd", "mean |dy| / |t| over do(z_i := mu_i + t s_i), t = +-0.5 ... +-2"),
    "ces_resample": ("intensity", "mean |dy| when z_i is taken from another image"),
    "specificity": ("", SPECIFICITY.format("posterior grid")),
}


def activity(subject: Subject, coded: Coded) -> Any:
    """A row for each latent; see `metrics.active_units`."""
    return metrics.active_units(coded.numbers, coded.logvar)


def scale(coded: Coded) -> Tensor:
    """s_i (L,)."""
    return metrics.posterior_scale_from(coded.numbers, coded.logvar)


def sweeps(subject: Subject, coded: Coded, images: int, groups: Groups, seed: int) -> Sweeps:
    """The three grids on the first `images` images."""
    z, s = coded.numbers[:images], scale(coded)
    sweep = functools.partial(latent_sweep, subject.decoder, z, scale=s, groups=groups, effect="l1", seed=seed)
    effects = {grid: sweep(grid=grid) for grid in GRIDS.values()}
    return Sweeps(
        strengths={name: effects[grid] for name, grid in GRIDS.items()},
        per_latent=("ces_posterior",),
        of_latents=effects["posterior"],
        files=effects,
        each=lambda: sweep(grid="posterior", reduce=None),
    )


def traversals(subject: Subject, coded: Coded) -> Tensor:
    """Codes (L * 7, L): each latent of the first image from -2 to 2 s_i about its mean."""
    z, s = coded.numbers[0], scale(coded)
    half = TRAVERSE_STEPS // 2
    t = torch.arange(-half, half + 1, device=z.device) * (2.0 / half)
    rows = z.repeat(subject.latents, TRAVERSE_STEPS, 1)
    for i in range(subject.latents):
        rows[i, :, i] += t * s[i]
    return rows.flatten(0, 1)
