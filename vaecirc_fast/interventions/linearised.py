"""Latent sweeps by the decoder's first derivative, beside the exact ones: how linear a decoder is in each latent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from ..ops import effect_reduction
from . import grids
from .accumulate import Axes
from .effects import Effects
from .engine import Calls, check_options, most_bytes, slices, sweep
from .latents import check_codes, latent_sweep

if TYPE_CHECKING:
    import pandas

POWERS = {"l1": 1, "rms": 1, "tv": 1, "mse": 2, "logit_mse": 2}  # an effect of a linear change goes with |step| to it


@dataclass(frozen=True)
class Linearised(Effects):
    """Effects as the first derivative predicts them, with the exact ones of the same sweep in `exact`."""

    exact: Effects | None = field(default=None, repr=False)

    @property
    def error(self) -> pandas.DataFrame:
        """How far the prediction is off, for each latent and decoded step, on the whole output.

        Columns latent, step, exact, linear (in the units of the effect), relative_error = linear / exact - 1, low,
        high: its 95 % interval, samples resampled, alike for both (a jackknife with t below 8). NaN where nothing
        changes. InputError for a result that was saved and loaded, which has no exact effects beside it.
        """
        import pandas

        if self.exact is None:
            raise InputError("error: a loaded result has no exact effects beside it; run `linearised` again")
        (linear, linear_drawn), (exact, exact_drawn) = _on_whole_output(self), _on_whole_output(self.exact)
        relative, drawn = linear / exact - 1, linear_drawn / exact_drawn - 1
        lines = []
        for i, latent in enumerate(self.coords["latent"]):
            for s, step in enumerate(self.coords["step"]):
                if self.step_size is not None and self.step_size[i, s] == 0:
                    continue
                value = float(relative[i, s])
                low, high = resampled_interval(value, drawn[:, i, s].numpy(), self.samples)
                lines.append((latent, step, float(exact[i, s]), float(linear[i, s]), value, low, high))
        columns = ["latent", "step", "exact", "linear", "relative_error", "low", "high"]
        return pandas.DataFrame(lines, columns=columns)


def _on_whole_output(E: Effects) -> tuple[Tensor, Tensor]:
    """Effects (latent, step) and their replicates (R, latent, step), groups averaged, float64."""
    values = E.tensor.double().cpu() @ E.group_weights.double().cpu()
    if E.dims[0] == "sample":
        weights = resampling_weights(REPLICATES, E.samples).double()
        weights = weights[weights.sum(1) > 0]  # all weights are zero once in e^N replicates
        drawn = torch.einsum("rn,nls->rls", weights, values) / weights.sum(1)[:, None, None]
        return values.mean(0), drawn
    if E.step_replicates is None:
        return values, values.new_zeros(0, *values.shape)
    return values, E.step_replicates.double().cpu()


@torch.inference_mode(False)
@torch.no_grad()
def linearised(
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
) -> Linearised:
    """Effects of do(z_i := ...) if the decoder g were linear: dy = step * dg/dz_i at each sample's own code.

    Arguments, units and errors as `vf.latent_sweep`. One Jacobian-vector product a sample and latent, whatever the
    number of steps, by forward-mode differentiation; where an operation has none, by differentiating twice; and
    where it has neither, InputError names it. A decoder whose output does not depend differentiably on z is refused.

    Returns Linearised: an Effects of the same dims as the exact sweep, which runs beside it and is in `.exact`;
    `.error` is the table of both.
    """
    check_codes(z)
    check_options(effect=effect, groups=groups, reduce=reduce, on=on, replicates=replicates, tile=tile, draws=draws)
    z = z.detach().clone()
    options = {"effect": effect, "reduce": reduce, "replicates": replicates, "seed": seed}
    exact = latent_sweep(decoder, z, grid=grid, scale=scale, groups=groups, on=on, draws=draws, tile=tile, **options)
    started = time.perf_counter()
    spec = grids.make(grid, z, scale, seed, draws)
    call = Calls(decoder, z, effect, on, tile)
    path = _LinearPath(call, spec, call.partition(groups), effect, exact.plan)
    with call:
        result = sweep(call, Axes.of_latents(spec), path, path.groups, started=started, **options)
    return Linearised(**{f.name: getattr(result, f.name) for f in fields(Effects)}, exact=exact)


class _LinearPath:
    """Effects of unit steps along each latent's derivative, times the steps."""

    def __init__(self, call: Calls, spec: grids.Grid, groups: Groups, effect: str, beside: str):
        self.call, self.spec, self.groups, self.effect, self.beside = call, spec, groups, effect, beside
        self.latents, self.steps = (t.to(call.inputs.device) for t in spec.decoded.nonzero(as_tuple=True))
        self.twice = ""  # why forward mode would not do

    def parts(self) -> Iterator[slice]:
        inputs = self.call.inputs
        most = most_bytes(inputs.device) // (8 * self.spec.decoded.numel() * len(self.groups))
        return slices(len(inputs), max(1, min(self.call.rows, most, len(inputs))))

    def effects(self, part: slice) -> Tensor:
        z = self.call.inputs[part]
        samples, width = z.shape
        unit = []
        for chunk in slices(width, max(1, self.call.rows // samples)):
            directions = torch.eye(width, dtype=z.dtype, device=z.device)[chunk]
            count = len(directions)
            derivative = self._derivative(z.repeat(count, 1), directions.repeat_interleave(samples, 0))
            derivative = derivative.unflatten(0, (count, samples)).transpose(0, 1)
            kind = "mse" if self.effect == "logit_mse" else self.effect
            unit.append(effect_reduction(torch.zeros_like(derivative[:, 0]), derivative, kind, groups=self.groups))
        shift = self.spec.shift
        if shift is None:
            values = self.spec.values(self.call.inputs, part, self.latents, self.steps)
            shift = values - z[:, self.latents]
        else:
            shift = shift[self.latents, self.steps]
        factor = shift if self.effect == "signed" else shift.abs() ** POWERS[self.effect]
        effects = torch.cat(unit, 1)[:, self.latents]
        return effects * factor.to(effects)[..., None]

    def _derivative(self, codes: Tensor, directions: Tensor) -> Tensor:
        """Jacobian-vector products (rows, P) at codes (rows, L) along directions (rows, L)."""
        if not self.twice:
            try:
                with forward_ad.dual_level():
                    y = self.call(forward_ad.make_dual(codes, directions))
                    tangent = forward_ad.unpack_dual(y).tangent
                return self._checked(tangent)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                self.twice = str(error).strip().split("\n")[0]
        try:
            with torch.enable_grad():
                codes = codes.clone().requires_grad_()
                y = self.call(codes)
                weight = torch.zeros_like(y, requires_grad=True)
                (pulled,) = torch.autograd.grad(y, codes, weight, create_graph=True, allow_unused=True)
                pulled = self._checked(pulled)
                (tangent,) = torch.autograd.grad(pulled, weight, directions)
                return tangent
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"decoder: an operation has neither a forward-mode derivative ({self.twice}) nor a second one "
                f"({str(error).strip().splitlines()[0]})"
            ) from error

    @staticmethod
    def _checked(derivative: Tensor | None) -> Tensor:
        if derivative is None:
            raise InputError("decoder: its output does not depend differentiably on z, so it has no linear form")
        return derivative

    def plan(self, seconds: float) -> str:
        how = f"by differentiating twice, since: {self.twice}" if self.twice else "by forward mode"
        each = 1e6 * seconds / self.call.decodes
        return (
            f"linearised: {self.call.decodes} Jacobian-vector products {how}, {each:.1f} us each; "
            f"the exact sweep beside it: {self.beside}"
        )
