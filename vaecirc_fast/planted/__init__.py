"""Planted circuits: networks built by hand whose causal effects are known in closed form. A public benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from . import codebook, conv, inputs, linear, mediators, pairs, relu, softmax
from .circuit import Planted
from .codebook import PlantedCodes
from .inputs import PlantedEncoder
from .mediators import PlantedMediator

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Planted",
    "PlantedCodes",
    "PlantedEncoder",
    "PlantedMediator",
    "all",
    "codebooks",
    "input_circuits",
    "mediation_circuits",
    "score",
    "score_inputs",
]


def all() -> list[Planted]:
    """Every planted decoder, made anew, float64 on the CPU."""
    return [*linear.circuits(), *relu.circuits(), *conv.circuits(), *softmax.circuits(), *pairs.circuits()]


def input_circuits() -> list[PlantedEncoder]:
    """Every planted encoder, whose units answer to known factors of its inputs; made anew, float64 on the CPU."""
    return inputs.all()


def codebooks() -> list[PlantedCodes]:
    """Every planted codebook with its decoder; made anew, float64 on the CPU."""
    return codebook.all()


def mediation_circuits() -> list[PlantedMediator]:
    """Every planted mediator, with its terms and the effects of a path; made anew, float64 on the CPU."""
    return mediators.all()


def score(method: Callable[[Planted], Any]) -> pandas.DataFrame:
    """How far a method's causal effects are from the truth on every planted circuit.

    `method(planted)` sees `planted.decoder`, `.z`, `.scale`, `.groups` and `.effect` and returns its E (latent, group):
    the mean over samples and the steps t = +-.5, ..., +-2 of the effect of z_i + t s_i, divided by |t|. As here:

        lambda p: vf.latent_sweep(
            p.decoder, p.z, grid="posterior", scale=p.scale, effect=p.effect, groups=p.groups
        ).step_normalised()

    Returns a row for each circuit: circuit, max_error (largest absolute error over latents and groups; inf where the
    method gave NaN), largest (the largest true effect, to compare it with), shows. Raises InputError on a wrong shape.
    """
    return _scores((p.name, method(p), p.strengths(), "(latent, group)", p.shows) for p in all())


def score_inputs(method: Callable[[PlantedEncoder], Any]) -> pandas.DataFrame:
    """How far a method's effects of inputs on units are from the truth on every planted encoder.

    `method(planted)` sees `planted.encoder`, `.base`, `.variants`, `.sites` and `.unit` and returns effects
    (variant, unit): the mean over inputs and positions of |change of the unit|, in sd of the unit over the base inputs;
    units in the order of the sites. As here:

        lambda p: vf.interventions.input_effects(p.encoder, p.base, p.variants, p.sites, unit=p.unit).tensor

    Returns the table that `score` does; errors alike.
    """
    return _scores((p.name, method(p), p.effects, "(variant, unit)", p.shows) for p in input_circuits())


def _scores(answers: Iterable[tuple[str, Any, np.ndarray, str, str]]) -> pandas.DataFrame:
    """A row for each (name, answer, truth, what its axes are, shows)."""
    import pandas

    rows = []
    for name, answer, truth, axes, shows in answers:
        answer = answer.detach().double().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer, float)
        if answer.shape != truth.shape:
            raise InputError(f"method: expected effects {axes} {truth.shape} for {name}, got {answer.shape}")
        error = np.nan_to_num(np.abs(answer - truth), nan=np.inf).max()
        rows.append((name, float(error), float(truth.max()), shows))
    return pandas.DataFrame(rows, columns=["circuit", "max_error", "largest", "shows"])
