"""Latent perturbation sweeps: what each latent does to any decoder's output, streamed through tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from . import engine, grids
from .accumulate import Axes
from .effects import Effects
from .engine import check_options


def posterior_scale(model: Any, x: Tensor, batch_size: int = 256) -> Tensor:
    """Aggregate posterior scale of each latent, s_i = sqrt(Var_x[mu_i(x)] + E_x[sigma_i(x)^2]): images x (N, ...) ->
    (L,).

    model: anything with `encode(x) -> (mu, logvar)`, each (B, L). InputError for fewer than two images.
    """
    from ..metrics.activity import posterior_scale_from

    if x.shape[0] < 2:
        raise InputError(f"x: a scale needs at least 2 images, got {x.shape[0]}")
    with torch.no_grad():
        parts = [model.encode(x[n : n + batch_size]) for n in range(0, len(x), batch_size)]
    return posterior_scale_from(torch.cat([mu for mu, _ in parts]), torch.cat([logvar for _, logvar in parts]))


@torch.no_grad()
def latent_sweep(
    decoder: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    grid: str | Tensor = "fixed",
    scale: Tensor | None = None,
    effect: str = "l1",
    groups: Groups | None = None,
    reduce: str | None = "mean",
    on: str = "output",
    draws: int = grids.DRAWS,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> Effects:
    """Effects of do(z_i := ...) on the decoder's output, for every latent i and every step of a grid.

    decoder: any callable (rows, L) -> (rows, ...), row by row independent; a module is used in the mode it is in, and
    one whose batch norm or dropout is in train mode is refused. Its parameters are not changed and its hooks fire.
    z: (N, L) float codes, usually posterior means. Grids: see `grids.make`; "posterior" needs `scale` (L,); `draws`
    for "resample".
    effect: see `vf.ops.effect_reduction`; on="logits" measures it on `decoder.logits(z)`; "logit_mse" needs such
    logits.
    groups: partition of the output's elements; one group by default.
    reduce: "mean" over samples, with `replicates` bootstrap replicates accumulated on the way, so that memory does not
    grow with N or S (samples enter the bootstrap by index and `seed`, in any tiling alike); None keeps every sample.
    tile: rows of one decoder call; chosen by the size of the activations if None.

    Returns Effects with dims (latent, step, group), sample first if reduce is None. A zero step is exactly 0 and never
    decoded. InputError for NaN codes or outputs, wrong shapes, unknown names.
    """
    check_codes(z)
    check_options(effect=effect, groups=groups, reduce=reduce, on=on, replicates=replicates, tile=tile, draws=draws)
    spec = grids.make(grid, z, scale, seed, draws)
    latents, steps = spec.decoded.nonzero(as_tuple=True)
    return engine.sweep(
        decoder,
        z,
        lambda samples, chosen: intervened(z, spec, samples, [latents[chosen]], steps[chosen]),
        Axes.of_latents(spec),
        effect=effect,
        groups=groups,
        reduce=reduce,
        on=on,
        replicates=replicates,
        seed=seed,
        tile=tile,
    )


def check_codes(z: Tensor) -> None:
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or 0 in z.shape:
        given = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"z: expected floats of shape (N, L) with N, L > 0, got {given}")
    if not bool(torch.isfinite(z).all()):
        raise InputError("z: contains NaN or infinity")


def intervened(z: Tensor, spec: grids.Grid, samples: slice, latents: Sequence[Tensor], steps: Tensor) -> Tensor:
    """Codes (B, J, L) of samples z[samples], each under J interventions: latents k[j], for all k (J,), at steps[j]."""
    batch = z[samples][:, None].repeat(1, len(steps), 1)
    for columns in latents:
        columns = columns.to(z.device)
        values = spec.values(z, samples, columns, steps.to(z.device))
        batch.scatter_(2, columns.expand(len(batch), -1)[..., None], values[..., None])
    return batch
