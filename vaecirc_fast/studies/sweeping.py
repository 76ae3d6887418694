"""What sweeping the latents of a model gives, whatever its latents are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..interventions import Effects


@dataclass(frozen=True)
class Sweeps:
    """strengths: by the name of the strength (CES) that is made of it. per_latent: those of them with a row for each
    latent. of_latents: the sweep that specificity is of. files: by the name of the grid, to be kept. each: makes the
    sweep of `of_latents` again with a row for each image.
    """

    strengths: dict[str, Effects]
    per_latent: tuple[str, ...]
    of_latents: Effects
    files: dict[str, Effects]
    each: Callable[[], Effects] = field(repr=False)
