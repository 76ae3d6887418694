"""Latent perturbation sweeps: what each latent does to any decoder's output, streamed through tiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import InputError
from ..groups import Groups, whole
from ..metrics.causal import REPLICATES, step_normalised
from ..metrics.statistics import resampling_weights
from ..ops import effect_reduction
from ..reference.effect_reduction import KINDS
from . import grids
from .effects import Effects

# Activations of one forward pass. A CPU tile should stay in the shared cache; a GPU tile should fill the
# multiprocessors.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
LARGEST_TILE = 4096


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
    _check_sweep(z, effect, reduce, on, groups)
    for name, count, least in (("draws", draws, 1), ("replicates", replicates, 0), ("tile", tile, 1)):
        if not (isinstance(count, int) and count >= least or name == "tile" and count is None):
            raise InputError(f"{name}: expected an integer of at least {least}, got {count!r}")
    owner = getattr(decoder, "__self__", decoder)  # of a bound method, such as model.decode
    if isinstance(owner, nn.Module):
        _refuse_train_mode(owner)
    started = time.perf_counter()
    spec = grids.make(grid, z, scale, seed, draws)
    call = getattr(decoder, "logits", None) if on == "logits" or effect == "logit_mse" else decoder
    if call is None:
        raise InputError("on: the decoder has no method `logits`, which on='logits' and effect='logit_mse' need")
    link = "sigmoid" if effect == "logit_mse" else "identity"

    with _channels_last(decoder, z.device):
        first, bytes_per_row = _measured(call, z[:1])
        elements = first[0].numel()
        groups = (whole(elements) if groups is None else groups).to(z.device)
        if groups.labels.numel() != elements:
            raise InputError(
                f"groups: partition {groups.labels.numel()} elements, but the decoder's output has {elements}"
            )
        rows = _tile(bytes_per_row, z.device) if tile is None else tile
        accumulator = _Accumulator(spec, z, groups, effect, reduce, replicates, seed, first.dtype)
        latents, steps = spec.decoded.nonzero(as_tuple=True)
        decodes = 0
        most = _most_bytes(z.device) // (8 * spec.decoded.numel() * len(groups))  # the effects of so many samples
        for samples in _slices(z.shape[0], max(1, min(rows, most, z.shape[0]))):
            base = _outputs(call, z[samples], elements)
            decodes += len(base)
            effects = base.new_zeros(len(base), len(latents), len(groups), dtype=accumulator.dtype)
            for part, interventions in _tiles(len(base), len(latents), rows):
                i, s = latents[interventions], steps[interventions]
                here = slice(samples.start + part.start, samples.start + part.stop)
                batch = _intervened(z, spec, here, i, s)
                y = _outputs(call, batch, elements).unflatten(0, (part.stop - part.start, len(i)))
                decodes += batch.shape[0]
                effects[part, interventions] = effect_reduction(base[part], y, effect, groups=groups, link=link)
            accumulator.add(samples, effects)
    seconds = time.perf_counter() - started
    plan = (
        f"generic engine: {decodes} decodes in tiles of {rows} rows ({bytes_per_row / 1e3:.0f} kB of activations a "
        f"row), {1e6 * seconds / decodes:.1f} us a decode, {int((~spec.decoded).sum())} zero steps not decoded"
    )
    return accumulator.result(plan)


class _Accumulator:
    """Streams per-sample effects into means and bootstrap replicates, or keeps them."""

    def __init__(
        self,
        spec: grids.Grid,
        z: Tensor,
        groups: Groups,
        effect: str,
        reduce: str | None,
        replicates: int,
        seed: int,
        dtype: torch.dtype,
    ):
        self.spec, self.groups, self.effect, self.reduce, self.seed = spec, groups, effect, reduce, seed
        self.samples, latents = z.shape
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        steps = spec.decoded.shape[1]
        self.decoded = spec.decoded.to(z.device)
        sizes = groups.sizes.to(z.device, torch.float64)
        self.weights = torch.full_like(sizes, 1 / len(groups)) if effect == "tv" else sizes / sizes.sum()
        self.total = z.new_zeros(latents, steps, len(groups), dtype=torch.float64)
        self.kept: list[Tensor] = []
        self.replicates = replicates if reduce == "mean" else 0
        count = len(resampling_weights(self.replicates, 1, total=self.samples)) if self.replicates else 0
        self.weight_sum = z.new_zeros(count, dtype=torch.float64)
        self.by_group = z.new_zeros(count, latents, len(groups), dtype=torch.float64)
        self.by_step = z.new_zeros(count, latents, steps, dtype=torch.float64)

    def add(self, samples: slice, effects: Tensor) -> None:
        """effects (B, J, G) of the decoded interventions of these samples."""
        finite = torch.isfinite(effects)
        if not bool(finite.all()):
            j = int((~finite).flatten(2).any(2).any(0).nonzero()[0])
            i, s = (int(v) for v in self.decoded.nonzero()[j])
            raise InputError(
                f"decoder: its output is NaN or infinite for latent {i} at step {s} of the grid {self.spec.name!r}"
            )
        full = effects.new_zeros(len(effects), *self.total.shape)
        full[:, self.decoded] = effects
        if self.reduce is None:
            self.kept.append(full)
            return
        full = full.double()
        self.total += full.sum(0)
        if self.replicates:
            n = samples.stop - samples.start
            weights = resampling_weights(self.replicates, n, self.seed, samples.start, self.samples).to(full)
            self.weight_sum += weights.sum(1)
            normalised = step_normalised(full, self.spec.step_size)
            self.by_group += (weights @ normalised.flatten(1)).view_as(self.by_group)
            self.by_step += (weights @ (full @ self.weights).flatten(1)).view_as(self.by_step)

    def result(self, plan: str) -> Effects:
        latents, steps = self.decoded.shape
        coords = {
            "latent": list(range(latents)),
            "step": self.spec.coordinates.tolist(),
            "group": list(self.groups.names),
        }
        by_group = by_step = None
        if self.reduce is None:
            coords = {"sample": list(range(self.samples)), **coords}
            tensor = torch.cat(self.kept)
        else:
            tensor = (self.total / self.samples).to(self.dtype)
            if self.replicates:
                drawn = self.weight_sum > 0  # all weights are zero once in e^N replicates
                norm = self.weight_sum[drawn, None, None]
                by_group = (self.by_group[drawn] / norm).to(self.dtype)
                by_step = (self.by_step[drawn] / norm).to(self.dtype)
        return Effects(
            tensor,
            tuple(coords),
            coords,
            effect=self.effect,
            grid=self.spec.name,
            samples=self.samples,
            group_weights=self.weights,
            step_size=None if self.spec.step_size is None else self.spec.step_size.contiguous(),
            replicates=by_group,
            step_replicates=by_step,
            plan=plan,
        )


def _check_sweep(z: Tensor, effect: str, reduce: str | None, on: str, groups: Groups | None) -> None:
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or 0 in z.shape:
        given = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"z: expected floats of shape (N, L) with N, L > 0, got {given}")
    if not bool(torch.isfinite(z).all()):
        raise InputError("z: contains NaN or infinity")
    if effect not in KINDS:
        raise InputError(f"effect: {effect!r} is unknown; known: {', '.join(KINDS)}")
    if reduce not in ("mean", None):
        raise InputError(f'reduce: expected "mean" or None, got {reduce!r}')
    if on not in ("output", "logits"):
        raise InputError(f'on: expected "output" or "logits", got {on!r}')
    if groups is not None and not isinstance(groups, Groups):
        raise InputError(f"groups: expected Groups, as vf.groups.cells makes them, got {type(groups).__name__}")


def _refuse_train_mode(decoder: nn.Module) -> None:
    for name, module in decoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"decoder: {name or 'it'} ({type(module).__name__}) keeps no running statistics, so a row's output "
                "would depend on the rows beside it"
            )
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise InputError(
                f"decoder: {name or 'it'} ({type(module).__name__}) is in train mode, so outputs would be random or "
                "change its statistics; call decoder.eval() first"
            )


@contextlib.contextmanager
def _channels_last(decoder: Any, device: torch.device) -> Iterator[None]:
    """Within, a CPU module's 4-d parameters are channels-last, on which its convolutions run faster."""
    parameters = [p for p in decoder.parameters() if p.ndim == 4] if isinstance(decoder, nn.Module) else []
    if device.type != "cpu" or not parameters:
        yield
        return
    before = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, data in zip(parameters, before, strict=True):
            p.data = data


class _OutputBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that the operations within produce; views of their inputs are none."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        made = (t for t in tree_iter(out) if isinstance(t, Tensor))
        self.total += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in given)
        return out


def _measured(call: Callable[[Tensor], Tensor], row: Tensor) -> tuple[Tensor, int]:
    """The output for one row and the bytes of activations it made."""
    with _OutputBytes() as counter:
        y = call(row)
    if not isinstance(y, Tensor) or y.shape[:1] != row.shape[:1] or y.ndim < 2 or not y.is_floating_point():
        given = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"decoder: expected a float tensor (rows, ...) for z (rows, L), got {given} for one row")
    return y, max(counter.total, 1)


def _outputs(call: Callable[[Tensor], Tensor], codes: Tensor, elements: int) -> Tensor:
    """Outputs (rows, P) for codes (rows, L)."""
    y = call(codes)
    if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != len(codes) or y[0].numel() != elements:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"decoder: expected (rows, ...) with {elements} elements a row for z (rows, L), got {given} for "
            f"{len(codes)} rows"
        )
    return y.flatten(1)


def _tile(bytes_per_row: int, device: torch.device) -> int:
    return max(1, min(_most_bytes(device) // bytes_per_row, LARGEST_TILE))


def _most_bytes(device: torch.device) -> int:
    return TILE_BYTES.get(device.type, TILE_BYTES["cuda"])


def _slices(total: int, size: int) -> Iterator[slice]:
    """Slices of [0, total) of nearly equal length, at most `size`."""
    parts = -(-total // size)
    for k in range(parts):
        yield slice(total * k // parts, total * (k + 1) // parts)


def _tiles(samples: int, interventions: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Pairs (samples, interventions) whose product is at most `rows`: whole samples where they fit."""
    for part in _slices(samples, max(1, rows // max(interventions, 1))) if interventions else ():
        for chunk in _slices(interventions, rows):
            yield part, chunk


def _intervened(z: Tensor, spec: grids.Grid, samples: slice, latents: Tensor, steps: Tensor) -> Tensor:
    """Codes (B J, L) of samples z[samples], each under the J interventions."""
    batch = z[samples][:, None].repeat(1, len(latents), 1)
    columns = latents.to(z.device)
    values = spec.values(z, samples, columns, steps.to(z.device))
    batch.scatter_(2, columns.expand(len(batch), -1)[..., None], values[..., None])
    return batch.flatten(0, 1)
