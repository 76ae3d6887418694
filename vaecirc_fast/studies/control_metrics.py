"""The metrics that controls know by name, and what a caller's own metric may return."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..errors import InputError
from ..groups import mosaic
from ..interventions import Effects, latent_sweep
from ..metrics.battery import METRICS
from ..metrics.causal import specificity_of
from ..metrics.statistics import Estimate
from . import slots
from .subjects import encoded, subject_of

BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    """What models are judged on, the same for all: images `x` (N, C, H, W) with factors `v` (N, K), the first `swept`
    of them for sweeps, and the `seed` of resampling."""

    x: Tensor
    v: Tensor
    swept: int
    seed: int
    factor_names: tuple[str, ...] = ()

    def codes(self, model: Any) -> tuple[Tensor, Tensor | None]:
        """Posterior means and log-variances (N, L); of slots of codes their numbers, and None."""
        if quantised(model):
            coded = encoded(subject_of(model), self.x)
            return coded.numbers, None
        parts = [model.encode(self.x[n : n + BATCH]) for n in range(0, len(self.x), BATCH)]
        mu, logvar = (torch.cat(column) for column in zip(*parts, strict=True))
        return mu, logvar

    def ratio(self, model: Any) -> float:
        """Reducible loss that is left, as `metrics.reconstruction_report` has it; at most 1/2 is trained. Of the first
        500 images: a verdict, not a result."""
        return _reconstruction(model, dataclasses.replace(self, x=self.x[:500], v=self.v[:500])).estimate.value


@dataclass(frozen=True)
class Value:
    """A metric's answer for one model: the number with its interval, and one for each latent where it has such."""

    estimate: Estimate
    latents: np.ndarray | None = None


@dataclass(frozen=True)
class Metric:
    """A metric of (model, ds, evaluation). `side` of a null that a good value lies on; `permuted`: its permuted value,
    from one more argument, a seed, where that is not its value for permuted codes; `why_not`: control -> why a
    comparison with it says nothing of this metric."""

    name: str
    measure: Callable[[Any, Dataset, Evaluation], Value]
    side: str = "above"
    unit: str = ""
    permuted: Callable[[Any, Dataset, Evaluation, int], Value] | None = None
    why_not: dict[str, str] = field(default_factory=dict)


def quantised(model: Any) -> bool:
    """Whether its latents are slots of codes."""
    return isinstance(getattr(model, "codebook", None), Tensor)


def evaluation(ds: Dataset, images: int, swept: int, seed: int) -> Evaluation:
    """`images` images of `ds` drawn with `seed`, or all of them where it has no more."""
    generator = torch.Generator().manual_seed(seed)
    if len(ds) <= images:
        order = torch.randperm(len(ds), generator=generator)
        x, v = ds.images(order), ds.factors(order)
    else:
        x, v = ds.sample(images, generator)
    return Evaluation(x, v, min(swept, len(x)), seed, tuple(ds.factor_names))


def named(metric: str | Callable[..., Any]) -> Metric:
    """The metric of this name, or the caller's own `metric(model, ds)`."""
    if isinstance(metric, str):
        if metric not in KNOWN:
            raise InputError(f"metric: {metric!r} is unknown; known: {', '.join(KNOWN)}, or a function of (model, ds)")
        return KNOWN[metric]
    if not callable(metric):
        raise InputError(f"metric: expected a name or a function of (model, ds), got {type(metric).__name__}")
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, lambda model, ds, _: _answer(name, metric(model, ds)))


def _answer(name: str, answer: Any) -> Value:
    """What a caller's metric returned: a number or Estimate, or a pair of that and an array (L,)."""
    given: Any = answer
    latents = None
    if isinstance(answer, tuple) and len(answer) == 2:
        given, values = answer
        latents = np.asarray(values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=float)
        if latents.ndim != 1 or np.isinf(latents).any():
            raise InputError(f"metric: {name} gave values of latents of shape {latents.shape}; expected (L,), finite")
    if not isinstance(given, Estimate):
        try:
            value = float(given)
        except (TypeError, ValueError):
            expected = "a number, an Estimate, or a pair of that and an array (L,)"
            raise InputError(f"metric: {name} must give {expected}, got {type(given).__name__}") from None
        given = Estimate(value, value, value, resampled="nothing", n=1)
    if not math.isfinite(given.value):
        raise InputError(f"metric: {name} gave {given.value}, which cannot be compared")
    if math.isnan(given.low) or math.isnan(given.high):
        given = Estimate(given.value, given.value, given.value, given.level, given.unit, "nothing", given.n)
    return Value(given, latents)


def _ces(grid: str) -> Callable[[Any, Dataset, Evaluation], Value]:
    def measure(model: Any, ds: Dataset, on: Evaluation) -> Value:
        effects = _sweep(model, on, grid)
        of_latents = effects.dims[0] != "channel"  # a sweep of the channels of codes has no row for a latent
        return Value(metrics.model_ces(effects)[0], effects.ces()["ces"].to_numpy() if of_latents else None)

    return measure


def _specificity(model: Any, ds: Dataset, on: Evaluation) -> Value:
    height, width = on.x.shape[2:]
    effects = _sweep(model, on, "posterior", mosaic(height, width, channels=on.x.shape[1]))
    return Value(metrics.model_specificity(effects)[0], effects.specificity()["specificity"].to_numpy())


def _permuted_specificity(model: Any, ds: Dataset, on: Evaluation, seed: int) -> Value:
    height, width = on.x.shape[2:]
    effects = _sweep(model, on, "posterior", mosaic(height, width, channels=on.x.shape[1]), reduce=None)
    value = exchanged_specificity(effects, seed)
    return Value(Estimate(value, value, value, resampled="nothing", n=1))


def exchanged_specificity(effects: Effects, seed: int) -> float:
    """Specificity of the model where, in every image by itself, the latents' effects are permuted among the latents.

    effects: of a sweep with reduce=None, (sample, latent, step, group).
    """
    each = effects.step_normalised().double().cpu()  # (sample, latent, group)
    order = torch.rand(each.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)
    mixed = each.gather(1, order[..., None].expand_as(each)).mean(0)
    return float(specificity_of(mixed).nanmean())


def _sweep(model: Any, on: Evaluation, grid: str, groups: Any = None, reduce: str | None = "mean") -> Any:
    if quantised(model):
        subject = subject_of(model)
        coded = encoded(subject, on.x)
        # slots have no scale: specificity is that of codes taken from another image
        grid = "resample" if groups is not None else grid
        return slots.sweep(subject, coded, grid, on.swept, groups, on.seed, reduce)
    mu, logvar = on.codes(model)
    scale = metrics.posterior_scale_from(mu, logvar)
    z = mu[: on.swept]
    return latent_sweep(model.decoder, z, grid=grid, scale=scale, groups=groups, seed=on.seed, reduce=reduce)


def _mig(model: Any, ds: Dataset, on: Evaluation) -> Value:
    mu, _ = on.codes(model)
    return Value(metrics.mig(mu.cpu(), on.v.cpu(), factor_names=on.factor_names, seed=on.seed))


def _of_battery(key: str, name: str) -> Callable[[Any, Dataset, Evaluation], Value]:
    """Row `name` of the battery's metric `key`, on the codes and factors of the evaluation's images."""

    def measure(model: Any, ds: Dataset, on: Evaluation) -> Value:
        mu, _ = on.codes(model)
        encoded = metrics.Encoded(mu.float().cpu().numpy(), on.v.cpu().numpy(), on.factor_names, False)
        table = metrics.battery(None, None, only=[key], encoded=encoded, seed=on.seed, progress=False)
        row = next(row for row in table.to_dict("records") if row["metric"] == name)
        low, high = (row["value"] if math.isnan(row[bound]) else row[bound] for bound in ("low", "high"))
        return Value(Estimate(row["value"], low, high, 0.95, row["unit"], row["resampled"] or "nothing", int(row["n"])))

    return measure


def _reconstruction(model: Any, on: Evaluation) -> Value:
    kind = "bernoulli" if model.likelihood == "bernoulli" else "squared_error"
    losses = []
    for n in range(0, len(on.x), BATCH):
        x = on.x[n : n + BATCH]
        codes = model.encode(x)
        y = model.decode(codes.z_q if quantised(model) else codes[0])
        losses.append(metrics.reconstruction_loss(x, y, kind))
    report = metrics.reconstruction_report(
        torch.cat(losses), metrics.mean_image_loss(on.x, likelihood=kind), metrics.loss_floor(on.x, kind)
    )
    return Value(report.ratio)


_STRENGTH = {"permuted": "a mean strength has no such null: permuted among latents, effects have the same mean"}
_INTENSITY = "intensity per "
KNOWN: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("mig", _mig),
        Metric("ces_raw", _ces("fixed"), unit=f"{_INTENSITY}unit of z", why_not=_STRENGTH),
        Metric("ces_posterior", _ces("posterior"), unit=f"{_INTENSITY}posterior sd", why_not=_STRENGTH),
        Metric("ces_resample", _ces("resample"), unit="intensity", why_not=_STRENGTH),
        Metric("specificity", _specificity, permuted=_permuted_specificity),
        Metric("reconstruction", lambda model, ds, on: _reconstruction(model, on), side="below"),
    )
}


KNOWN |= {
    name: Metric(name, _of_battery(key, name))
    for key, entry in METRICS.items()
    for name in entry.definitions
    if entry.labels and name not in KNOWN
}


def names() -> Sequence[str]:
    """The metrics that `controls` knows by name."""
    return tuple(KNOWN)
