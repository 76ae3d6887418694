"""Causal metrics on effect tensors: causal effect strength (CES) and intervention specificity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .statistics import Estimate, resampled_interval, resampling_weights

if TYPE_CHECKING:
    import pandas

# mse is quadratic in the step, signed effects cancel: neither can be divided by |step| and averaged.
STRENGTHS = ("l1", "rms", "tv")
REPLICATES = 200


def step_normalised(tensor: Tensor, step_size: Tensor | None) -> Tensor:
    """Mean over steps of effect / |step|: (..., latent, step, group) -> (..., latent, group).

    Steps of size 0 were not decoded and are left out; with step_size None the effect itself is averaged.
    """
    if step_size is None:
        return tensor.mean(-2)
    return (tensor * step_weights(step_size).to(tensor)[..., None]).sum(-2)


def step_weights(step_size: Tensor) -> Tensor:
    """What `step_normalised` weighs steps by, (latent, step): 1 / |step| over the number of steps that are not 0."""
    used = step_size > 0
    return torch.where(used, 1 / torch.where(used, step_size, 1), 0) / used.sum(-1, keepdim=True).clamp(min=1)


def specificity_of(effects: Tensor) -> Tensor:
    """1 - H(p_i) / log G with p_i(g) = E[i,g] / sum_g E[i,g], over the last axis; NaN for a row of zero effect."""
    total = effects.sum(-1, keepdim=True)
    p = effects / torch.where(total > 0, total, 1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    value = 1 - entropy / torch.log(torch.tensor(float(effects.shape[-1]), dtype=effects.dtype))
    return torch.where(total[..., 0] > 0, value.clamp(0, 1), torch.nan)


def ces(E: Any, level: float = 0.95) -> pandas.DataFrame:
    """Causal effect strength of each latent: mean over samples and steps of effect / |step|.

    E: the result of `vf.latent_sweep` with effect "l1", "rms" or "tv" on grid "fixed" (raw CES, per unit of z),
    "posterior" (per posterior sd), "resample" (undivided) or explicit shifts; or of `vf.code_sweep`, where a position
    or channel stands for the latent. Groups are averaged by their number of elements (spans of "tv": equally). Returns
    columns latent, ces, low, high in the units of the outputs; the interval is a Poisson bootstrap over samples (a
    jackknife with t below 8).
    InputError for the effects "mse", "logit_mse" and "signed" and for the grid "traverse".
    """
    _check(E, "ces")
    weights = E.group_weights.double().cpu()
    point, replicates = _normalised(E)
    return _table("ces", E, point @ weights, replicates @ weights, level)


def specificity(E: Any, level: float = 0.95) -> pandas.DataFrame:
    """Intervention specificity of each latent: 1 - H(p_i) / log G over the groups of the sweep, in [0, 1].

    Returns columns latent, specificity, low, high. A latent without any effect has none: its row is NaN. The bootstrap
    replicates are shifted to the value: fewer different samples look more specific, so theirs lie above it.
    InputError for fewer than two groups and for effects that cannot be strengths.
    """
    _check(E, "specificity")
    if E.group_weights.numel() < 2:
        raise InputError("specificity: needs at least two groups, got 1; pass groups= to the sweep")
    point, replicates = _specificities(E)
    return _table("specificity", E, point, replicates, level)


def _check(E: Any, metric: str) -> None:
    if E.effect not in STRENGTHS:
        raise InputError(f"{metric}: is defined for the effects {', '.join(STRENGTHS)}, not for {E.effect!r}")
    if E.grid == "traverse":
        raise InputError(
            f"{metric}: the grid 'traverse' has no step size; use fixed, posterior, resample or explicit shifts"
        )


def _normalised(E: Any) -> tuple[Tensor, Tensor]:
    """Step-normalised effects (latent, group) and their bootstrap replicates, float64."""
    point = E.step_normalised().double().cpu()
    if E.replicates is not None:
        return point, E.replicates.double().cpu()
    if point.ndim == 2:  # a sweep with replicates=0
        return point, point.new_zeros(0, *point.shape)
    weights = resampling_weights(REPLICATES, E.samples).double()
    weights = weights[weights.sum(1) > 0]  # all weights are zero once in e^N replicates
    replicates = torch.einsum("rn,nlg->rlg", weights, point) / weights.sum(1)[:, None, None]
    return point.mean(0), replicates


def _table(name: str, E: Any, point: Tensor, replicates: Tensor, level: float) -> pandas.DataFrame:
    import pandas

    intervals = [
        resampled_interval(float(v), r.numpy(), E.samples, level) for v, r in zip(point, replicates.T, strict=True)
    ]
    low, high = zip(*intervals, strict=True)
    unit = E.dims[-3]
    return pandas.DataFrame({unit: E.coords[unit], name: point.numpy(), "low": low, "high": high})


def model_ces(E: Any, level: float = 0.95) -> tuple[Estimate, Tensor]:
    """CES of the whole model, the mean over all latents, active or not; and its bootstrap replicates (R,).

    Arguments, units and errors as `ces`. The interval resamples samples.
    """
    _check(E, "ces")
    weights = E.group_weights.double().cpu()
    point, replicates = _normalised(E)
    return _estimate((point @ weights).mean(), (replicates @ weights).mean(1), E.samples, level)


def model_specificity(E: Any, level: float = 0.95) -> tuple[Estimate, Tensor]:
    """Specificity of the whole model, the mean over the latents that have any effect; and its replicates (R,).

    Arguments and errors as `specificity`. NaN if no latent has an effect.
    """
    _check(E, "specificity")
    if E.group_weights.numel() < 2:
        raise InputError("specificity: needs at least two groups, got 1; pass groups= to the sweep")
    point, replicates = _specificities(E)
    return _estimate(point.nanmean(), replicates.nanmean(1), E.samples, level)


def _specificities(E: Any) -> tuple[Tensor, Tensor]:
    """Specificity of each latent and its bootstrap replicates, centred on it."""
    point, replicates = map(specificity_of, _normalised(E))
    return point, replicates - replicates.nanmean(0) + point


def _estimate(value: Tensor, replicates: Tensor, samples: int, level: float) -> tuple[Estimate, Tensor]:
    low, high = resampled_interval(float(value), replicates.numpy(), samples, level)
    return Estimate(float(value), low, high, level, resampled="images", n=samples), replicates
