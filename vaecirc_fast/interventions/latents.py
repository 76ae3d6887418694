"""Latent perturbation sweeps: what each latent does to any decoder's output, streamed through tiles."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._registry import forced
from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from ..reference.latent_sweep import PRECISIONS
from . import grids
from .accumulate import Axes
from .effects import Effects
from .engine import Calls, GenericPath, check_options, sweep
from .fused import FusedPath, agrees, backend_for, gram_head

ENGINES = ("auto", "fused", "gram", "generic")


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
    latents: Sequence[int] | None = None,
    effect: str = "l1",
    groups: Groups | None = None,
    reduce: str | None = "mean",
    on: str = "output",
    draws: int = grids.DRAWS,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
    out: str | Path | None = None,
    engine: str = "auto",
    precision: str = "float32",
) -> Effects:
    """Effects of do(z_i := ...) on the decoder's output, for every latent i and every step of a grid.

    decoder: any callable (rows, L) -> (rows, ...), row by row independent; a module is used in the mode it is in, and
    one whose batch norm or dropout is in train mode is refused. Its parameters are not changed and its hooks fire.
    z: (N, L) float codes, usually posterior means. Grids: see `grids.make`; "posterior" needs `scale` (L,); `draws`
    for "resample". latents: which to sweep, all by default; the result names them, in ascending order. Grid and scale
    are those of all L nevertheless.
    effect: see `vf.ops.effect_reduction`; on="logits" measures it on `decoder.logits(z)`; "logit_mse" needs such
    logits.
    groups: partition of the output's elements; one group by default.
    reduce: "mean" over samples, with `replicates` bootstrap replicates accumulated on the way, so that memory does not
    grow with N or S (samples enter the bootstrap by index and `seed`, in any tiling alike); None keeps every sample.
    out: a file, .parquet or .arrow, that the effects of every sample are written to as they come, in memory that does
    not grow with N: a row for each sample, latent, step and group, with the column `effect`. The result then has the
    means, whatever `reduce`, and `path`; `Effects.from_table` reads the file. It needs the extra `arrow`. The file
    appears whole or not at all.
    tile: rows of one decoder call of the generic engine; chosen by the size of the activations if None.
    engine: "auto" takes the fastest that applies, and the plan says which and why. "fused" computes with the layers
    that one call of the decoder showed, in the kernels of `vf.ops.latent_sweep`; "gram", for squared effects before a
    linear last layer, with that layer's R factor; "generic" calls the decoder. All are exact: they agree up to
    rounding.
    precision: of matrix products on the fused engine, "float32", "tf32" or "bf16"; the plan states its error.

    Returns Effects with dims (latent, step, group), sample first if reduce is None. A zero step is exactly 0 and never
    decoded. InputError for NaN codes or outputs, wrong shapes, unknown names.
    """
    check_codes(z)
    check_options(
        effect=effect, groups=groups, reduce=reduce, on=on, replicates=replicates, tile=tile, draws=draws, out=out
    )
    if engine not in ENGINES:
        raise InputError(f"engine: {engine!r} is unknown; known: {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision: {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    if engine == "generic" and precision != "float32":
        raise InputError(f"precision: {precision!r} is of the fused engine, not of 'generic'")
    started = time.perf_counter()
    spec = grids.make(grid, z, scale, seed, draws)
    if latents is not None:
        spec = dataclasses.replace(spec, only=grids.selected(latents, z.shape[1]))
    columns, steps = spec.decoded.nonzero(as_tuple=True)
    axes = Axes.of_latents(spec)
    call = Calls(decoder, z, effect, on, tile)
    groups = call.partition(groups)
    path = _fused(call, groups, spec, effect, engine, precision)
    with contextlib.ExitStack() as stack:
        if isinstance(path, str):
            if engine in ("fused", "gram") or precision != "float32":
                wanted = f"engine: {engine!r}" if engine != "auto" else f"precision: {precision!r}"
                raise InputError(f"{wanted} cannot be had: {path}")
            stack.enter_context(call)
            path = GenericPath(
                call,
                axes,
                lambda samples, chosen: intervened(z, spec, samples, [columns[chosen]], steps[chosen]),
                groups,
                why=path,
            )
        return sweep(
            *(call, axes, path, groups),
            effect=effect,
            reduce=reduce,
            replicates=replicates,
            seed=seed,
            started=started,
            out=out,
        )


def _fused(call: Calls, groups: Groups, spec: grids.Grid, effect: str, engine: str, precision: str) -> FusedPath | str:
    """The path that computes with the decoder's layers, or why the decoder itself must be called."""
    if engine == "generic":
        return "asked for"
    network = call.recorded.network
    if network is None:
        return call.recorded.reason
    backend = backend_for(call.inputs, precision)
    if backend is None:
        return f"the backend {forced()!r} has no kernel for it"
    decodes = int(spec.decoded.sum()) * len(call.inputs)
    head = gram_head(network, groups, effect, None if engine == "gram" else decodes)
    if isinstance(head, str):
        if engine == "gram":
            return head
        if backend == "reference" and engine == "auto" and precision == "float32":
            return f"no kernel for {call.inputs.dtype} on {call.inputs.device.type}"
        head = None
    if engine == "fused":
        head = None
    path = FusedPath(network, groups, call.inputs, spec, effect, head=head, precision=precision)
    codes = path.examples()
    return path if agrees(network, codes, call(codes)) else "the layers read off it do not make its output"


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
