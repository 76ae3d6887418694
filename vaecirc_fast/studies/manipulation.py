"""Level 1 of the image study: what changing one thing in the input does to every unit of the encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..interventions import InputEffects, factor_pairs, input_effects, mask_region
from ..metrics import assignment, isolation, polysemanticity
from ..metrics.statistics import resampled_interval
from ..metrics.units import MONOSEMANTIC
from .subjects import batch_size, subject_of


@torch.no_grad()
def manipulate(model: Any, ds: Dataset, *, pairs: int, seed: int) -> dict[str, Any]:
    """Vary each factor of `pairs` images alone (or mask each quadrant, where factors do not determine the image).

    Returns plain values: kind ("factors" or "regions"), pairs, variants; per site the number of units, the median
    polysemanticity of its units and the share that is monosemantic; the variant x latent matrix of the posterior means,
    in sd of each (of slots of codes the mean over the channels of z_q, in sd over images and channels); and per variant
    the isolation over the latents, targets from one half of the pairs and effects from the other. The decoder does not
    run.
    """
    subject = subject_of(model)
    encoding, head_site = subject.encoding, subject.head
    kind, base, variants = varied_pairs(ds, pairs, seed)
    sizes: dict[str, Any] = {"batch_size": batch_size(base)}
    every = input_effects(encoding, base, variants, subject.encoding_sites, seed=seed, **sizes)
    half = len(base) // 2
    first = input_effects(
        *(encoding, base[:half], {k: x[:half] for k, x in variants.items()}, [head_site]), replicates=0, **sizes
    )
    second = input_effects(
        *(encoding, base[half:], {k: x[half:] for k, x in variants.items()}, [head_site]), seed=seed, **sizes
    )
    assert every.replicates is not None and second.replicates is not None
    head = [u for u, site in enumerate(every.sites) if site == head_site]
    low, high = _bounds(every, head)
    target = assignment(first.tensor)
    isolated = isolation(second.tensor, target)
    drawn = torch.stack([isolation(r, target) for r in second.replicates])
    rows = []
    for k, variant in enumerate(variants):
        bounds = resampled_interval(float(isolated[k]), drawn[:, k].numpy(), second.samples)
        rows.append({"variant": variant, **_estimate(float(isolated[k]), *bounds)})
    return {
        "kind": kind,
        "pairs": len(base),
        "variants": list(variants),
        "sites": [_site(every, site) | {"site": subject.shown(site)} for site in dict.fromkeys(every.sites)],
        "latents": {"effect": _plain(every.tensor[:, head].tolist()), "low": _plain(low), "high": _plain(high)},
        "isolation": rows,
    }


def varied_pairs(ds: Dataset, pairs: int, seed: int) -> tuple[str, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if ds.complete:
        return "factors", *factor_pairs(ds, pairs, generator)
    base, _ = ds.sample(pairs, generator)
    height, width = base.shape[2:]
    rows = {"top": slice(0, height // 2), "bottom": slice(height // 2, height)}
    columns = {"left": slice(0, width // 2), "right": slice(width // 2, width)}
    mean = base.mean(0)
    variants = {f"{r} {c}": mask_region(base, rows[r], columns[c], mean) for r in rows for c in columns}
    return "regions", base, variants


def _site(effects: InputEffects, site: str) -> dict[str, Any]:
    """Median polysemanticity of a site's units and the share that is monosemantic, with intervals over pairs."""
    assert effects.replicates is not None
    units = [u for u, name in enumerate(effects.sites) if name == site]
    found = polysemanticity(effects.tensor[:, units])
    drawn = torch.stack([polysemanticity(r[:, units]) for r in effects.replicates])
    answering = ~found.isnan()
    row = {"site": site, "units": len(units), "silent": int((~answering).sum())}
    if not bool(answering.any()):
        return row | {"polysemanticity": _estimate(None, None, None), "monosemantic": _estimate(None, None, None)}
    # Resampled effects are noisier, so units look more polysemantic: replicates are centred on what was found.
    drawn = (drawn - drawn.nanmean(0) + found).clamp(1, len(effects.variants))[:, answering]
    found = found[answering]
    median, medians = found.median(), drawn.nanmedian(1).values
    share, shares = (found < MONOSEMANTIC).double().mean(), (drawn < MONOSEMANTIC).double().mean(1)
    return row | {
        "polysemanticity": _estimate(
            float(median), *resampled_interval(float(median), medians.numpy(), effects.samples)
        ),
        "monosemantic": _estimate(float(share), *resampled_interval(float(share), shares.numpy(), effects.samples)),
    }


def _bounds(effects: InputEffects, units: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    table = effects.to_dataframe()
    size = len(effects.sites)
    low, high = (table[name].to_numpy().reshape(-1, size)[:, units].tolist() for name in ("low", "high"))
    return low, high


def _estimate(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    (finite,) = _plain([[value, low, high]])
    return dict(zip(("value", "low", "high"), finite, strict=True))


def _plain(rows: list[list[Any]]) -> list[list[float | None]]:
    """Numbers as JSON has them: what is not finite is null."""
    return [[None if v is None or not abs(v) < float("inf") else v for v in row] for row in rows]
