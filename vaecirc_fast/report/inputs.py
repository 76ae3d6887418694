"""Level 1 on the page: what changing one thing in the input does to the units of the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from . import pictures, svg
from .aggregate import Group, over_seeds
from .figures import Figure, Panel, slug
from .latents import ordered_latents, subscript
from .results import Run
from .tables import Printed, bracketed
from .words import NOTHING, counted, number

KINDS = {
    "factors": ("factor", "one factor is redrawn and all others kept"),
    "regions": ("masked quadrant", "one quadrant is replaced by that of the mean image"),
}
DECIMALS = 2


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups whose runs have manipulated inputs; those of an earlier protocol have not."""
    return [group for group in groups if all("inputs" in run.result for run in group.runs)]


def matrices(data: str, groups: Sequence[Group]) -> Figure:
    """Variant x latent: how far each manipulation moves the mean of each latent."""
    found = {id(group): _matrix(group.shown) for group in groups}
    top = svg.rounded_up(max((float(np.nanmax(m, initial=0.0)) for m in found.values()), default=1.0))
    panels = []
    for group in groups:
        run, inputs = group.shown, group.shown.result["inputs"]["trained"]
        rows = ordered_latents(run)
        columns = [f"z{subscript(row['latent'])}" for row in rows]
        values = found[id(group)][:, [row["latent"] for row in rows]]
        title = f"{group.data}, {group.label}, seed {run.seed}"
        drawing = pictures.matrix(values, inputs["variants"], columns, [not row["active"] for row in rows], top, title)
        panels.append(Panel(title, drawing, "" if run.trained else "not trained"))
    inputs = groups[0].shown.result["inputs"]["trained"]
    what = KINDS.get(inputs["kind"], ("variant", "one thing in the image is changed"))[1]
    caption = Markup(
        "Mean absolute change of a latent's posterior mean <i>μ<sub>i</sub></i> when {}, in standard deviations of "
        "<i>μ<sub>i</sub></i> over the {} unchanged images. Columns: latents from the greatest posterior CES to the "
        "least, inactive ones in grey: the mean of such a latent hardly varies, and its small standard deviation makes "
        "small changes look large. A dash: no standard deviation to measure in."
    ).format(what, inputs["pairs"])
    ticks = svg.Scale(0, top, 0, 1).ticks(4)
    bar = pictures.shade_bar(top, ticks, svg.tick_labels(ticks), "sd of the latent's mean")
    return Figure(
        f"inputs-{slug(data)}", f"{data}: what the input does to the latents.", caption, tuple(panels), extra=bar
    )


def _matrix(run: Run) -> np.ndarray:
    """(variant, latent) effects, NaN where there is none."""
    return np.array(run.result["inputs"]["trained"]["latents"]["effect"], dtype=float)


@dataclass(frozen=True)
class InputBlock:
    """A group in the two tables: `sites` are rows of (name, units, cells), `variants` of (name, cells)."""

    data: str
    label: str
    kind: str
    count: int
    pairs: int
    seeds: str
    sites: Sequence[tuple[str, str, Sequence[Printed]]]
    variants: Sequence[tuple[str, Sequence[Printed]]]


def blocks(groups: Sequence[Group]) -> list[InputBlock]:
    """Polysemanticity of every site and isolation of every variant over trained seeds, controls beside them."""
    made = []
    for group in groups:
        if not group.trained:
            continue
        first = group.trained[0].result["inputs"]["trained"]
        sites = []
        for n, site in enumerate(first["sites"]):
            cells = [
                _over_seeds(group, when, lambda inputs, n=n, key=key: inputs["sites"][n][key])
                for key in ("polysemanticity", "monosemantic")
                for when in ("trained", "untrained")
            ]
            sites.append((site["site"], str(site["units"]), cells))
        variants = []
        for n, variant in enumerate(first["variants"]):
            cells = [
                _over_seeds(group, when, lambda inputs, n=n: inputs["isolation"][n])
                for when in ("trained", "untrained")
            ]
            variants.append((variant, cells))
        kind = KINDS.get(first["kind"], (first["kind"], ""))[0]
        count = len(first["variants"])
        seeds = counted(len(group.trained), "seed")
        made.append(InputBlock(group.data, group.label, kind, count, first["pairs"], seeds, sites, variants))
    return made


def _over_seeds(group: Group, when: str, pick: Any) -> Printed:
    entries: list[Mapping[str, Any]] = [pick(run.result["inputs"][when]) for run in group.trained]
    estimate = over_seeds([entry["value"] for entry in entries if entry["value"] is not None])
    if estimate is None:
        return Printed(NOTHING)
    return Printed(number(estimate.value, DECIMALS), bracketed(estimate, DECIMALS))
