"""Planted circuits: decoders built by hand whose causal effects are known in closed form. A public benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from . import conv, linear, relu, softmax
from .circuit import Planted

if TYPE_CHECKING:
    import pandas

__all__ = ["Planted", "all", "score"]


def all() -> list[Planted]:
    """Every planted circuit, made anew, float64 on the CPU."""
    return [*linear.circuits(), *relu.circuits(), *conv.circuits(), *softmax.circuits()]


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
    import pandas

    rows = []
    for planted in all():
        truth = planted.strengths()
        answer = method(planted)
        answer = answer.detach().double().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer, float)
        if answer.shape != truth.shape:
            raise InputError(
                f"method: expected effects (latent, group) {truth.shape} for {planted.name}, got {answer.shape}"
            )
        error = np.nan_to_num(np.abs(answer - truth), nan=np.inf).max()
        rows.append((planted.name, float(error), float(truth.max()), planted.shows))
    return pandas.DataFrame(rows, columns=["circuit", "max_error", "largest", "shows"])
