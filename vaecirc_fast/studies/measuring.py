"""What is measured on one image model: metrics with intervals, effects of every latent, and pictures of both."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..groups import Groups, mosaic
from ..interventions import Effects, latent_sweep
from ..models import ImageModel
from .control_metrics import exchanged_specificity
from .control_models import unit_wise_order

GRIDS = ("fixed", "posterior", "resample")
PICTURES = 8
PERMUTATIONS = 5
TRAVERSE_STEPS = 7

# Name, unit and definition of every number in the tables.
DEFINITIONS = {
    "reconstruction": ("", "(loss - floor) / (loss of the mean image - floor); a trained model is at or below 0.5"),
    "active": ("latents", "latents with Var_x[mu_i] / s_i^2 > 0.05"),
    "mig": ("", "mean over factors v of (greatest - second I(z_i; v)) / H(v), latents in 20 equal-width bins"),
    "ces_raw": ("intensity per unit of z", "mean |dy| / |delta| over do(z_i := mu_i + delta), delta = +-0.6 ... +-3"),
    "ces_posterior": ("intensity per posterior sd", "mean |dy| / |t| over do(z_i := mu_i + t s_i), t = +-0.5 ... +-2"),
    "ces_resample": ("intensity", "mean |dy| when z_i is taken from another image"),
    "specificity": ("", "1 - H(p_i) / log G over image cells, posterior grid, mean over latents with an effect"),
}


@dataclass(frozen=True)
class Measurement:
    """`metrics`: name -> {value, low, high, resampled, n, ...}; `permuted`: likewise, of unit-wise permuted
    activations, for the metrics that have such a null; `replicates`: bootstrap replicates of the model-level causal
    metrics; `latents`: a row per latent; `effects` by grid; `pictures`: images (n, C, H, W) uint8; `plans` of the
    sweeps; `encoded`: the codes of the images.
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


def image_cells(shape: tuple[int, int, int]) -> Groups:
    """The groups of an image study: an 8 x 8 mosaic of cells across all channels."""
    channels, height, width = shape
    return mosaic(height, width, channels=channels)


@torch.no_grad()
def measure(
    model: ImageModel, ds: Dataset, *, images: int, sweep_images: int, seed: int, permute: bool = True
) -> Measurement:
    """Measure `model` on `images` images of `ds` (all where it has fewer), sweeping the first `sweep_images`.

    permute: whether to measure it with permuted activations too.
    """
    model.eval()
    x, v = _evaluation_images(ds, images, seed)
    mu, logvar, loss = _encode(model, x)
    activity = metrics.active_units(mu, logvar)
    active = int(activity["active"].to_numpy().sum())
    likelihood = "bernoulli" if model.likelihood == "bernoulli" else "squared_error"
    reconstruction = metrics.reconstruction_report(
        loss, metrics.mean_image_loss(x, likelihood=likelihood), metrics.loss_floor(x, likelihood), active
    )
    if bool((v != v[0]).any()):
        mig = metrics.mig(mu.cpu(), v.cpu(), factor_names=ds.factor_names)
    else:  # images without labels
        mig = metrics.Estimate(math.nan, math.nan, math.nan, resampled="", n=len(x))
    scale = metrics.posterior_scale_from(mu, logvar)

    z = mu[:sweep_images]
    groups = image_cells(ds.shape)
    effects = {
        grid: latent_sweep(model.decoder, z, grid=grid, scale=scale, groups=groups, effect="l1", seed=seed)
        for grid in GRIDS
    }
    estimates = {
        "reconstruction": reconstruction.ratio,
        "active": metrics.Estimate(active, math.nan, math.nan, resampled="", n=len(x)),
        "mig": mig,
    }
    replicates = {}
    for name, grid in (("ces_raw", "fixed"), ("ces_posterior", "posterior"), ("ces_resample", "resample")):
        estimates[name], drawn = metrics.model_ces(effects[grid])
        replicates[name] = drawn.tolist()
    estimates["specificity"], drawn = metrics.model_specificity(effects["posterior"])
    replicates["specificity"] = drawn.tolist()
    if not all(map(math.isfinite, replicates["specificity"])):
        del replicates["specificity"]

    latents = activity.merge(effects["posterior"].ces(), on="latent").rename(
        columns={"ces": "ces_posterior", "low": "ces_posterior_low", "high": "ces_posterior_high"}
    )
    latents = latents.merge(effects["posterior"].specificity(), on="latent").rename(
        columns={"low": "specificity_low", "high": "specificity_high"}
    )
    return Measurement(
        metrics={name: plain(asdict(estimate)) for name, estimate in estimates.items()},
        permuted=_permuted(model, mu, v, z, scale, groups, seed) if permute else {},
        replicates=replicates,
        latents=[plain(row) for row in latents.to_dict("records")],
        trained=reconstruction.trained,
        effects=effects,
        pictures=_pictures(model, x, v, mu, scale),
        plans={grid: e.plan for grid, e in effects.items()},
        encoded=metrics.Encoded(
            *(mu.float().cpu().numpy(), v.cpu().numpy(), tuple(ds.factor_names)),
            complete=False,
            logvar=logvar.float().cpu().numpy(),
        ),
    )


def _permuted(
    model: ImageModel, mu: Tensor, v: Tensor, z: Tensor, scale: Tensor, groups: Groups, seed: int
) -> dict[str, dict[str, Any]]:
    """MIG of codes (N, L) of which each latent is permuted over images by itself, and specificity where in each image
    the effects are permuted among latents: means of `PERMUTATIONS`, with the interval in which one more falls."""
    drawn = {}
    if bool((v != v[0]).any()):
        orders = (unit_wise_order(mu, seed + k) for k in range(PERMUTATIONS))
        drawn["mig"] = [metrics.mig(mu.gather(0, o).cpu(), v.cpu(), replicates=0).value for o in orders]
    effects = latent_sweep(
        *(model.decoder, z), grid="posterior", scale=scale, groups=groups, effect="l1", seed=seed, reduce=None
    )
    drawn["specificity"] = [exchanged_specificity(effects, seed + k) for k in range(PERMUTATIONS)]
    return {
        name: plain(asdict(metrics.statistics.prediction_interval(values, resampled="permutations")))
        for name, values in drawn.items()
        if all(map(math.isfinite, values))
    }


def _evaluation_images(ds: Dataset, images: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(ds) <= images:
        everything = torch.randperm(len(ds), generator=torch.Generator().manual_seed(seed))
        return ds.images(everything), ds.factors(everything)
    return ds.sample(images, torch.Generator().manual_seed(seed))


def _encode(model: ImageModel, x: Tensor, batch: int = 250) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior means and log-variances (N, L), and the loss (N,) of each image's reconstruction from its mean."""
    likelihood = "bernoulli" if model.likelihood == "bernoulli" else "squared_error"
    parts = []
    for n in range(0, len(x), batch):
        images = x[n : n + batch]
        mu, logvar = model.encode(images)
        parts.append((mu, logvar, metrics.reconstruction_loss(images, model.decode(mu), likelihood)))
    mu, logvar, loss = (torch.cat(column) for column in zip(*parts, strict=True))
    return mu, logvar, loss


def _pictures(model: ImageModel, x: Tensor, v: Tensor, mu: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Inputs, their reconstructions, and a traversal of every latent from the first input, uint8."""
    shown = x[:PICTURES]
    half = TRAVERSE_STEPS // 2
    t = torch.arange(-half, half + 1, device=mu.device) * (2.0 / half)
    rows = mu[0].repeat(model.latents, TRAVERSE_STEPS, 1)
    for i in range(model.latents):
        rows[i, :, i] += t * scale[i]
    pictures = {
        "inputs": shown,
        "reconstructions": model.decode(mu[:PICTURES]),
        "traversals": model.decode(rows.flatten(0, 1)),
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
