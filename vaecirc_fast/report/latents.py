"""What the latents of a run are and what is measured of each: numbers that steps move, or slots that hold codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..interventions import Effects
from .results import Run


@dataclass(frozen=True)
class Strength:
    """The causal effect strength by which a run's latents are ordered: its key in a latent's row, the sweep that it is
    of, its unit, and what an axis calls it."""

    key: str
    grid: str
    unit: str
    words: str


POSTERIOR = Strength("ces_posterior", "posterior", "intensity per posterior sd", "CES, posterior")
RESAMPLE = Strength("ces_resample", "resample", "intensity", "CES, code of another image")


def quantised(run: Run) -> bool:
    """Whether the latents are slots of codes, which have no steps."""
    rows = run.result["latents"]
    return bool(rows) and not any(POSTERIOR.key in row for row in rows) and any(RESAMPLE.key in row for row in rows)


def strength(run: Run) -> Strength:
    return RESAMPLE if quantised(run) else POSTERIOR


def ordered_latents(run: Run) -> list[Mapping[str, Any]]:
    """The rows of the run's latents, from the greatest strength to the least."""
    key = strength(run).key
    return sorted(run.result["latents"], key=lambda row: -(row.get(key) or 0.0))


def subscript(n: int) -> str:
    return str(n).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@dataclass(frozen=True)
class Unit:
    """What a sweep sets: row `at` of its tensor, mostly a latent."""

    at: int
    name: str
    active: bool


def units(effects: Effects, run: Run) -> list[Unit]:
    """From the greatest strength to the least; what is no latent, as a channel of codes, by its own effects."""
    of = effects.dims[-3]
    if of == "latent":
        return [Unit(row["latent"], f"z{subscript(row['latent'])}", row["active"]) for row in ordered_latents(run)]
    values = effects.step_normalised().double() @ effects.group_weights.double()
    found = (values.mean(0) if effects.dims[0] == "sample" else values).numpy()
    order = np.argsort(-found, kind="stable")
    return [Unit(int(i), f"{of} {effects.coords[of][int(i)]}", bool(found[i] > 0)) for i in order]
