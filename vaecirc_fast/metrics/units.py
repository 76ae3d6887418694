"""Metrics of units, from what each factor does to each unit: polysemanticity and isolation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

MONOSEMANTIC = 1.5


def polysemanticity(effects: Any) -> Tensor:
    """How many factors a unit answers to: exp(H(shares)), shares = effects[k, u] / sum_k effects[k, u]; (U,) in [1, K].

    effects: (K, U) non-negative effects of each factor on each unit, tensor or array. 1: one factor alone; K: all
    alike. A unit below 1.5 is called monosemantic. NaN for a unit that nothing moves, and for one whose effects are
    all NaN, as `input_effects` gives where a unit has no sd to measure them in. InputError for other shapes or values.
    """
    effects = _checked(effects)
    total = effects.sum(0)
    shares = effects / torch.where(total > 0, total, 1)
    entropy = -torch.special.xlogy(shares, shares).sum(0)
    return torch.where(total > 0, entropy.exp().clamp(1, len(effects)), torch.nan)  # NaN > 0 is false


def assignment(effects: Any) -> Tensor:
    """The factor that each unit answers to most: (U,) indices, ties to the first; -1 for a unit that nothing moves or
    whose effects are NaN."""
    effects = _checked(effects)
    return torch.where(effects.sum(0) > 0, effects.argmax(0), -1)


def isolation(effects: Any, target: Any) -> Tensor:
    """Share of each factor's effect that falls off its own units: (K,) in [0, 1]; 0 is perfectly isolated.

    effects: (K, U) as for `polysemanticity`; target: (U,) the factor each unit belongs to, -1 for none. Take the
    targets from other samples than the effects (`assignment` of one half, effects of the other): the same samples
    flatter. Units whose effects are NaN are left out. A factor without any effect has none: NaN.
    """
    effects = _checked(effects).nan_to_num(0)
    target = torch.as_tensor(target, device=effects.device)
    if target.shape != effects.shape[1:] or target.is_floating_point() or target.dtype == torch.bool:
        raise InputError(
            f"target: expected {effects.shape[1]} factor indices, got {target.dtype} {tuple(target.shape)}"
        )
    if bool(((target < -1) | (target >= len(effects))).any()):
        raise InputError(f"target: expected factors 0..{len(effects) - 1}, or -1 for none")
    own = target == torch.arange(len(effects), device=effects.device)[:, None]
    total = effects.sum(1)
    off = torch.where(own, 0, effects).sum(1)
    return torch.where(total > 0, off / torch.where(total > 0, total, 1), torch.nan)


def _checked(effects: Any) -> Tensor:
    effects = torch.as_tensor(effects, dtype=torch.float64)
    if effects.ndim != 2 or 0 in effects.shape:
        raise InputError(f"effects: expected (K, U) with K, U > 0, got {tuple(effects.shape)}")
    unmeasured = effects.isnan().all(0)
    if not bool((torch.isfinite(effects) | unmeasured).all()) or bool((effects < 0).any()):
        raise InputError("effects: expected finite numbers >= 0, or NaN for all factors of a unit")
    return effects
