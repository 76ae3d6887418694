"""What is measured on one image model: metrics with intervals, effects of every latent, and pictures of both."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..errors import InputError
from ..groups import Groups, mosaic
from ..interventions import Effects
from . import numbers as _numbers
from . import slots
from .control_metrics import exchanged_specificity
from .control_models import unit_wise_order
from .judged import judged_images
from .subjects import Coded, Subject, decoded, encoded, reconstruction_losses, subject_of
from .sweeping import Sweeps

PICTURES = 8
PERMUTATIONS = 5

# Name, unit and definition of every number in the tables, of the models whose latents are numbers.
DEFINITIONS = _numbers.DEFINITIONS


@dataclass(frozen=True)
class Measurement:
    """`metrics`: name -> {value, low, high, resampled, n, ...}; `permuted`: likewise, of unit-wise permuted
    activations, for the metrics that have such a null; `replicates`: bootstrap replicates of the model-level causal
    metrics; `latents`: a row per latent; `effects` by grid; `pictures`: images (n, C, H, W) uint8; `plans` of the
    sweeps; `encoded`: the codes of the images; `definitions`: name -> (unit, definition) of all that is in `metrics`.
    """

    metrics: dict[str, dict[str, Any]]
    permuted: dict[str, dict[str, Any]]
    replicates: dict[str, list[float]]
    latents: list[dict[str, Any]]
    trained: bool
    effects: dict[str, Effects]
    pictures: dict[str, Tensor]
    plans: dict[str, str]
    encoded: metrics.Encoded
    definitions: dict[str, tuple[str, str]]


def image_cells(shape: tuple[int, int, int]) -> Groups:
    """The groups of an image study: an 8 x 8 mosaic of cells across all channels."""
    channels, height, width = shape
    return mosaic(height, width, channels=channels)


@torch.no_grad()
def measure(model: Any, ds: Dataset, *, images: int, sweep_images: int, seed: int, permute: bool = True) -> Measurement:
    """Measure `model` on `images` images of `ds` (all where it has fewer), sweeping the first `sweep_images`; its
    reconstruction on the first `judged.RECONSTRUCTED`.

    model: one of `vf.models`, or what `foreign.adapted` made of a module. permute: whether to measure it with permuted
    activations too.
    """
    subject = subject_of(model)
    subject.module.eval()
    judged = judged_images(ds, images, seed)
    x, v = judged.x, judged.v
    if tuple(x.shape[1:]) != tuple(subject.shape):
        raise InputError(f"model: is for images {tuple(subject.shape)}, {ds.name!r} has {tuple(x.shape[1:])}")
    coded = encoded(subject, x)
    loss = reconstruction_losses(subject, coded, judged.reconstructed)
    of = slots if subject.quantised else _numbers
    activity = of.activity(subject, coded)
    active = int(activity["active"].to_numpy().sum())
    reconstruction = metrics.reconstruction_report(loss, *judged.losses(subject.loss), active)
    if judged.labelled:
        mig = metrics.mig(coded.numbers.cpu(), v.cpu(), factor_names=ds.factor_names)
    else:
        mig = metrics.Estimate(math.nan, math.nan, math.nan, resampled="", n=len(x))

    swept = of.sweeps(subject, coded, sweep_images, image_cells(subject.shape), seed)
    estimates = {
        "reconstruction": reconstruction.ratio,
        "active": metrics.Estimate(active, math.nan, math.nan, resampled="", n=len(x)),
        "mig": mig,
    }
    replicates = {}
    for name, effects in swept.strengths.items():
        estimates[name], drawn = metrics.model_ces(effects)
        replicates[name] = drawn.tolist()
    estimates["specificity"], drawn = metrics.model_specificity(swept.of_latents)
    replicates["specificity"] = drawn.tolist()
    if not all(map(math.isfinite, replicates["specificity"])):
        del replicates["specificity"]

    latents = activity
    for name in swept.per_latent:
        latents = _with(latents, swept.strengths[name].ces(), "ces", name)
    latents = _with(latents, swept.of_latents.specificity(), "specificity", "specificity")
    return Measurement(
        metrics={name: plain(asdict(estimate)) for name, estimate in estimates.items()},
        permuted=_permuted(coded, v if judged.labelled else None, swept, seed) if permute else {},
        replicates=replicates,
        latents=[plain(row) for row in latents.to_dict("records")],
        trained=reconstruction.trained,
        effects=swept.files,
        pictures=_pictures(subject, coded, x, of.traversals(subject, coded)),
        plans={name: e.plan for name, e in swept.files.items()},
        encoded=metrics.Encoded(
            *(coded.numbers.float().cpu().numpy(), v.cpu().numpy(), tuple(ds.factor_names)),
            complete=False,
            logvar=None if coded.logvar is None else coded.logvar.float().cpu().numpy(),
        ),
        definitions=of.DEFINITIONS,
    )


def _with(latents: Any, table: Any, column: str, name: str) -> Any:
    """The rows of latents with a metric of each and its bounds beside."""
    names = {column: name, "low": f"{name}_low", "high": f"{name}_high", "position": "latent"}
    table = table.rename(columns=names)
    return latents.merge(table, on="latent")


def _permuted(coded: Coded, v: Tensor | None, swept: Sweeps, seed: int) -> dict[str, dict[str, Any]]:
    """MIG of codes (N, L) of which each latent is permuted over images by itself, and specificity where in each image
    the effects are permuted among latents: means of `PERMUTATIONS`, with the interval in which one more falls."""
    drawn = {}
    if v is not None:
        orders = (unit_wise_order(coded.numbers, seed + k) for k in range(PERMUTATIONS))
        moved = (coded.numbers.gather(0, order).cpu() for order in orders)
        drawn["mig"] = [metrics.mig(codes, v.cpu(), replicates=0).value for codes in moved]
    each = swept.each()
    drawn["specificity"] = [exchanged_specificity(each, seed + k) for k in range(PERMUTATIONS)]
    return {
        name: plain(asdict(metrics.statistics.prediction_interval(values, resampled="permutations")))
        for name, values in drawn.items()
        if all(map(math.isfinite, values))
    }


def _pictures(subject: Subject, coded: Coded, x: Tensor, traversals: Tensor) -> dict[str, Tensor]:
    """Inputs, their reconstructions, and a traversal of every latent from the first input, uint8."""
    shown = x[:PICTURES]
    pictures = {
        "inputs": shown,
        "reconstructions": decoded(subject, coded, slice(0, PICTURES)),
        "traversals": subject.decoder(traversals),
    }
    return {name: (images.clamp(0, 1) * 255).round().byte().cpu() for name, images in pictures.items()}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON values only: numpy scalars become Python's, numbers that are not finite become null."""
    out = {}
    for key, value in row.items():
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        out[key] = value
    return out
