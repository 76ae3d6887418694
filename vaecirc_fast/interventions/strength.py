"""Causal effect strength as a number to train with: differentiable, in memory that does not grow with the sweep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES, STRENGTHS, step_weights
from . import grids
from .engine import Calls, check_options, tiles
from .latents import check_codes, intervened


def effect_strength(
    decoder: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    grid: str | Tensor = "fixed",
    scale: Tensor | None = None,
    effect: str = "l1",
    groups: Groups | None = None,
    on: str = "output",
    per_latent: bool = False,
    draws: int = grids.DRAWS,
    seed: int = 0,
    tile: int | None = None,
) -> Tensor:
    """Causal effect strength (CES) with gradients: mean over samples and steps of effect / |step|, over latents too.

    Arguments as `vf.latent_sweep`; the value is that of its `.ces()`, groups averaged by their number of elements
    (spans of "tv": equally), in the units of the outputs. effect: "l1", "rms" or "tv".
    per_latent: (L,), one number a latent, instead of their mean, a scalar.

    Differentiable, once, in whatever the decoder computes with (its parameters, tensors it refers to) and in z. A tile
    of rows is decoded at a time and again in the backward pass, so that no tile's activations are kept: the decoder,
    and with it its hooks, runs twice. It may be in train mode, except for batch norm and dropout, which are refused as
    a sweep refuses them. NaN outputs make the value NaN. InputError for bad arguments.
    """
    check_codes(z)
    check_options(effect=effect, groups=groups, reduce="mean", on=on, replicates=REPLICATES, tile=tile, draws=draws)
    if effect not in STRENGTHS:
        raise InputError(f"effect: strengths are defined for {', '.join(STRENGTHS)}, not for {effect!r}")
    if isinstance(grid, str) and grid == "traverse":
        raise InputError("grid: 'traverse' has no step size; use fixed, posterior, resample or explicit shifts")
    spec = grids.make(grid, z, scale, seed, draws)
    call = Calls(decoder, z, effect, on, tile)
    partition = call.partition(groups)
    latents, steps = spec.decoded.nonzero(as_tuple=True)
    sizes = partition.sizes.to(z.device, torch.float64)
    of_group = torch.full_like(sizes, 1 / len(partition)) if effect == "tv" else sizes / sizes.sum()
    if spec.step_size is None:
        of_step = torch.full(spec.decoded.shape, 1 / spec.decoded.shape[1], dtype=torch.float64)
    else:
        of_step = step_weights(spec.step_size.detach().double())
    of_intervention = (of_step.to(z.device)[latents, steps] / len(z))[:, None]

    def part(z: Tensor, samples: slice, chosen: slice) -> Tensor:
        """What a tile adds to the strengths (L,)."""
        base = z[samples]
        codes = intervened(z, spec, samples, [latents[chosen]], steps[chosen]).flatten(0, 1)
        y0, y = call(torch.cat([base, codes])).split([len(base), len(codes)])
        effects = call.effects(y0, y.unflatten(0, (len(base), -1)), partition).double()
        weighted = (effects @ of_group).sum(0) * of_intervention[chosen, 0]
        return weighted.new_zeros(z.shape[1]).index_add(0, latents[chosen].to(z.device), weighted)

    strengths = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for samples, chosen in tiles(len(z), len(latents), max(1, call.rows)):
        if torch.is_grad_enabled():
            added = checkpoint(part, z, samples, chosen, use_reentrant=False, preserve_rng_state=False)
        else:
            added = part(z, samples, chosen)
        strengths = strengths + added
    strengths = strengths.to(torch.float64 if call.dtype == torch.float64 else torch.float32)
    return strengths if per_latent else strengths.mean()
