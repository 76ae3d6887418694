"""The figures of the page: what each shows of which runs, and its caption."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ..interventions import Effects
from ..metrics.statistics import resampled_interval
from . import charts, pictures, svg
from .aggregate import Group
from .charts import COLOURS, Bar, Curve, Dots
from .latents import POSTERIOR, RESAMPLE, Unit, ordered_latents, quantised, strength, subscript, units
from .results import Run
from .words import architecture_name, counted, metric_name, number

NAMED = 5  # the strongest latents, which get a colour, a band and a name in the step curves
GREY = "#8a8a8a"
MAPS = 20  # of a configuration
SLOTS = Markup(
    " Where latents are slots of codes, which have no steps: the effect of the code that the slot has for another "
    "image, in intensity and on a scale of its own."
)
GRIDS = (("fixed", "step δ, units of z"), ("posterior", "step t, posterior sd"))


@dataclass(frozen=True)
class Panel:
    """One drawing with its title; `mark` warns beside it; without a drawing, `missing` says why."""

    title: str
    drawing: str = ""
    mark: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Figure:
    """`panels` above a `title` and `caption`; `legend`: (colour, words); `wide`: a drawing as wide as the page before
    the panels, `extra`: one after them."""

    key: str
    title: str
    caption: Markup
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...] = ()
    extra: str = ""
    narrow: bool = False
    wide: str = ""

    @property
    def weight(self) -> int:
        """Bytes of it on the page, about."""
        drawn = [self.wide, self.extra, *(panel.drawing for panel in self.panels)]
        return sum(len(drawing.encode()) for drawing in drawn) + 1_000 + 100 * len(self.panels)


def against_untrained(groups: Sequence[Group], definitions: Mapping[str, tuple[str, str]]) -> Figure:
    """Every metric of every group beside its untrained and its permuted control."""
    panels = []
    for name, (unit, _) in definitions.items():
        rows, last = [], ""
        for group in groups:
            cell = group.cells.get(name)
            if cell is None:
                continue
            values = [value for _, value in cell.values if value is not None]
            heading = group.data if group.data != last else ""
            rows.append(Dots(group.label, cell.estimate, cell.control, values, heading, cell.permuted))
            last = group.data
        label = unit or "dimensionless"
        panels.append(Panel(metric_name(name), charts.dots(rows, label, f"{metric_name(name)}, trained and untrained")))
    panels.append(Panel("Key", charts.dots_key()))
    caption = Markup(
        "Filled: mean over the trained seeds. Hollow: the same networks before training, judged on the same images. "
        "Grey, dashed: the trained networks with permuted activations, where a metric has such a control. "
        "Upright strokes: single seeds. Whiskers: 95&nbsp;% intervals over seeds, as in Table&nbsp;1; one that leaves "
        "the axis is cut and ends in an arrow."
    )
    title = "Trained networks against their controls."
    return Figure("trained-untrained", title, caption, tuple(panels), narrow=True)


def training_curves(groups: Sequence[Group]) -> Figure:
    """The loss terms of the logged steps, a line a run."""
    colours = _colours(groups)
    panels = []
    for data, members in _by_data(groups):
        rows = [row for group in members for run in group.runs for row in run.result["history"]]
        terms = [t for t in ("reconstruction", "kl") if any(t in row for row in rows)] or ["loss"]
        for term in terms:
            drawn = []
            for group, run in ((g, r) for g in members for r in g.runs):
                history = [row for row in run.result["history"] if row.get(term) is not None]
                if len(history) > 1:
                    weighted = term == "kl" and group.architecture == "beta_vae"
                    weight = run.config.get("options", {}).get("beta", 1.0) if weighted else 1.0
                    x, y = [row["step"] for row in history], [row[term] / weight for row in history]
                    drawn.append(Curve(x, y, colours[group.label], dash=None if run.trained else "4 3"))
            name = {"kl": "Kullback–Leibler divergence", "reconstruction": "reconstruction loss"}.get(term, term)
            title = f"{data}: {name}"
            if drawn:
                log = term != "kl"
                unit = "nats per image" + (" (logarithmic)" if log else "")
                panels.append(Panel(title, charts.curves(drawn, "training step", unit, title, log=log)))
            else:
                panels.append(Panel(title, missing="Too few logged steps for a curve."))
    dashed = any(not run.trained for group in groups for run in group.runs)
    caption = Markup(
        "Terms of the training loss on the batch of each logged step, one line a seed: single batches, not averages. "
        "The divergence is shown without the factor β that weights it in the loss, for architectures that log it."
    ) + (" Dashed: runs that ended not trained." if dashed else "")
    names = {group.label: group.label for group in groups}
    if len(names) > len(set(colours.values())):
        names = {group.label: architecture_name(group.architecture) for group in groups}
    legend = tuple(dict.fromkeys((colours[label], name) for label, name in names.items()))
    return Figure("training", "Training.", caption, tuple(panels), legend)


def reconstructions(data: str, groups: Sequence[Group], side: int | None = None) -> Figure:
    """Inputs above the reconstructions of every configuration, as one drawing where all were judged on the same images.

    side: the most pixels of a picture, None for all it has.
    """
    caption = Markup(
        "Evaluation images and their reconstructions from the posterior mean; shade or colour is the pixel's "
        "probability or mean, from 0 (black) to 1 (white)."
    )
    key, title = f"reconstructions-{slug(data)}", f"{data}: reconstructions."
    found = [(group, images) for group in groups if (images := group.shown.pictures()) is not None]
    inputs = [shown["inputs"].numpy() for _, shown in found]
    if len(found) < 2 or not all(np.array_equal(images, inputs[0]) for images in inputs):

        def draw(run: Run) -> str:
            shown = run.pictures()
            assert shown is not None
            rows = _rows([shown["inputs"].numpy(), shown["reconstructions"].numpy()], side)
            return pictures.image_rows(rows, ["input", "output"], f"{data}: inputs above their reconstructions")

        return Figure(key, title, caption, _panels(groups, draw, "pictures.safetensors"))
    rows = _rows([inputs[0], *(shown["reconstructions"].numpy() for _, shown in found)], side)
    labels = ["input", *(f"{_short(group.label)}\n{_seed(group.shown)}" for group, _ in found)]
    faint = [False, *(not group.shown.trained for group, _ in found)]
    what = f"{data}: inputs and their reconstructions by {counted(len(found), 'configuration')}"
    drawing = pictures.image_rows(rows, labels, what, faint=faint, left=170.0, width=760.0)
    missing = [group for group in groups if group not in [group for group, _ in found]]
    return Figure(key, title, caption, (*_panels(missing, lambda _: "", "pictures.safetensors"),), wide=drawing)


def _rows(images: Sequence[np.ndarray], side: int | None) -> np.ndarray:
    """(rows, columns, C, H, W) of as many columns as all have."""
    count = min(len(row) for row in images)
    return pictures.shrunk(np.stack([row[:count] for row in images]), side)


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"


def _seed(run: Run) -> str:
    return f"seed {run.seed}" + ("" if run.trained else ", not trained")


def traversals(data: str, groups: Sequence[Group], side: int | None = None) -> Figure:
    """Decodings along every latent of the shown runs; side as in `reconstructions`."""

    def draw(run: Run) -> str:
        found = run.pictures()
        assert found is not None
        rows = found["traversals"].numpy()
        latents = len(run.result["latents"])
        rows = rows.reshape(latents, -1, *rows.shape[1:])
        t = np.linspace(-2, 2, rows.shape[1])
        order = ordered_latents(run)
        labels = [f"z{subscript(row['latent'])} {'' if row['active'] else 'inactive'}".strip() for row in order]
        places = 0 if np.allclose(t, t.round()) else 1
        heads = ["t = 0" if abs(v) < 1e-9 else number(float(v), places) for v in t]
        heads = [""] * len(t) if quantised(run) else heads
        chosen = pictures.shrunk(np.stack([rows[row["latent"]] for row in order]), side)
        faint = [not row["active"] for row in order]
        return pictures.image_rows(chosen, labels, f"{data}: traversals of the latents", faint=faint, heads=heads)

    caption = Markup(
        "Decodings of do(<i>z<sub>i</sub></i> := <i>μ<sub>i</sub></i> + <i>t s<sub>i</sub></i>), all else at the "
        "posterior mean of the first image above. Rows: latents from the greatest posterior CES to the least; inactive "
        "ones in grey. Columns: <i>t</i> in posterior standard deviations."
    )
    if any(quantised(group.shown) for group in groups):
        caption += " Of codes in slots: the slot's most frequent codes, and rows by the effect of another image's code."
    panels = _panels(groups, draw, "pictures.safetensors")
    return Figure(f"traversals-{slug(data)}", f"{data}: traversals of the latents.", caption, panels)


def strengths(data: str, groups: Sequence[Group]) -> Figure:
    """The strength of every latent of the shown runs, on one scale for all that have the same unit."""
    tops = {}
    for run in (group.shown for group in groups):
        key = strength(run).key
        ends = [row.get(name) or 0.0 for row in run.result["latents"] for name in (key, f"{key}_high")]
        tops[key] = max([tops.get(key, 0.0), *ends])

    def draw(run: Run) -> str:
        of = strength(run)
        drawn = [
            Bar(
                f"z{subscript(row['latent'])}",
                row.get(of.key) or 0.0,
                row.get(f"{of.key}_low"),
                row.get(f"{of.key}_high"),
                row["active"],
            )
            for row in ordered_latents(run)
        ]
        unit = of.unit + (" (code of another image)" if quantised(run) else "")
        return charts.bars(drawn, unit, f"{data}: {of.words} of each latent", svg.rounded_up(tops[of.key] or 1.0))

    caption = Markup(
        "Posterior CES of each latent with its 95&nbsp;% interval, which resamples the swept images of this one run. "
        "Filled: active latents. Hollow: inactive ones. The numbers are in the tables below."
    ) + (SLOTS if any(quantised(group.shown) for group in groups) else "")
    return Figure(f"ces-{slug(data)}", f"{data}: causal effect strength.", caption, _panels(groups, draw))


def step_curves(data: str, groups: Sequence[Group], grids: Sequence[tuple[str, str]] = GRIDS) -> Figure:
    """Effect against step on `grids`, of `GRIDS`, for every latent of the shown run."""
    panels = []
    found = {(id(g), grid): g.shown.effects(grid) for g in groups for grid, _ in grids}
    found = {key: effects for key, effects in found.items() if effects}
    means = {key: _whole(effects) for key, effects in found.items()}
    for group in groups:
        for grid, x_label in grids:
            title = f"{data}, {group.label}, seed {group.shown.seed}: {'raw' if grid == 'fixed' else 'posterior'} steps"
            effects = found.get((id(group), grid))
            if effects is None:
                panels.append(Panel(title, missing=f"effects-{grid}.safetensors cannot be read."))
                continue
            kin = [values for key, values in means.items() if key[1] == grid and found[key].dims == effects.dims]
            top = max(float(values.max()) for values in kin)
            drawn = _step_lines(effects, means[id(group), grid], units(effects, group.shown))
            of = effects.dims[-3]
            label = (
                x_label
                if of == "latent"
                else f"step {x_label[5]} of a {of}, {'z_e' if grid == 'fixed' else 'sd of z_e'}"
            )
            drawing = charts.curves(drawn, label, "mean |Δy|, intensity", title, top=top)
            panels.append(Panel(title, drawing, _mark(group.shown)))
    caption = Markup(
        f"Mean absolute change of the output under do(<i>z<sub>i</sub></i> := <i>μ<sub>i</sub></i> + step), averaged "
        f"over pixels and swept images. The {counted(NAMED, 'latent')} of greatest posterior CES in colour, with "
        "95&nbsp;% bootstrap bands over images; the others in grey. A step of zero changes nothing by definition. "
        "CES is the mean of height over |step|: a straight line would mean an effect proportional to the step."
    )
    if any(effects.dims[-3] != "latent" for effects in found.values()):
        caption += " Of codes in slots: a channel of the codes moves at every slot, and they are quantised again."
    return Figure(f"steps-{slug(data)}", f"{data}: effect against step.", caption, tuple(panels))


def _step_lines(effects: Effects, mean: np.ndarray, order: Sequence[Unit]) -> list[Curve]:
    steps = [float(step) for step in effects.coords["step"]]
    at = next((n for n, step in enumerate(steps) if step > 0), len(steps))
    x = [*steps[:at], 0.0, *steps[at:]]
    lines = []
    for rank, unit in enumerate(order):
        i = unit.at
        y = [float(v) for v in mean[i]]
        bounds = None
        if rank < NAMED and effects.step_replicates is not None:
            draws = effects.step_replicates[:, i].double().numpy()
            bounds = [resampled_interval(v, draws[:, s], effects.samples) for s, v in enumerate(y)]
            bounds = [*bounds[:at], (0.0, 0.0), *bounds[at:]] if np.isfinite(bounds).all() else None
        low, high = zip(*bounds, strict=True) if bounds else (None, None)
        named = rank < NAMED
        name, colour = (unit.name, COLOURS[rank]) if named else ("", GREY)
        lines.append(Curve(x, [*y[:at], 0.0, *y[at:]], colour, low, high, name, faint=not named))
    return lines


def effect_maps(data: str, groups: Sequence[Group]) -> Figure:
    """Where in the image each latent acts: the step-normalised effect of every cell."""
    found, tops = {}, {}
    for run in (group.shown for group in groups):
        of = strength(run)
        effects = run.effects(of.grid)
        if effects is not None:
            values = _cell_maps(effects)
            found[id(run)] = values, units(effects, run)[:MAPS]
            tops[of.key] = max(tops.get(of.key, 0.0), float(values.max()))
    scales = {key: top or 1.0 for key, top in tops.items()}

    def draw(run: Run) -> str:
        values, order = found[id(run)]
        labels = [f"{unit.name}{'' if unit.active else ' inactive'}" for unit in order]
        faint = [not unit.active for unit in order]
        chosen = values[[unit.at for unit in order]]
        what = f"{data}: effect of each latent on the cells of the image"
        return pictures.maps(chosen, labels, faint, scales[strength(run).key], what)

    caption = Markup(
        "Effect of each latent on each cell of an 8 × 8 mosaic over the image: mean "
        "<span class='formula'>|Δ<i>y</i>|/|<i>t</i>|</span> on the posterior grid, averaged over the cell's pixels "
        "and the swept images; from the greatest posterior CES to the least. One scale for all maps of the data set. "
        "Specificity says how unevenly a map is spread over its cells."
    ) + (SLOTS if any(quantised(group.shown) for group in groups) else "")
    bars = []
    for of in (POSTERIOR, RESAMPLE):
        if of.key in scales:
            scale = svg.Scale(0, scales[of.key], 0, 1)
            ticks = scale.ticks(4)
            unit = of.unit + ("" if of is POSTERIOR else ", code of another image")
            bars.append(pictures.shade_bar(scales[of.key], ticks, svg.tick_labels(ticks), unit))
    files = {id(group.shown): f"effects-{strength(group.shown).grid}.safetensors" for group in groups}
    panels = tuple(panel for group in groups for panel in _panels([group], draw, files[id(group.shown)]))
    title = f"{data}: where in the image each latent acts."
    return Figure(f"maps-{slug(data)}", title, caption, panels, extra="".join(bars))


def _whole(effects: Effects) -> np.ndarray:
    """(latent, step) effects on the whole output, averaged over samples."""
    return (effects.mean().double() @ effects.group_weights.double()).numpy()


def _cell_maps(effects: Effects) -> np.ndarray:
    """(latent, rows, columns) step-normalised effects on the image cells; groups that are no cells make one row."""
    values = effects.step_normalised().double()
    values = (values.mean(0) if effects.dims[0] == "sample" else values).numpy()
    cells = [re.fullmatch(r"cell (\d+),(\d+)", str(name)) for name in effects.coords["group"]]
    shape = (1, values.shape[1])
    if all(cells) and cells[-1]:
        shape = (int(cells[-1][1]) + 1, int(cells[-1][2]) + 1)
    return values.reshape(len(values), *(shape if shape[0] * shape[1] == values.shape[1] else (1, -1)))


def _panels(groups: Sequence[Group], draw: Callable[[Run], str], file: str = "") -> tuple[Panel, ...]:
    """A panel a group, of its shown run."""
    panels = []
    for group in groups:
        run = group.shown
        title = f"{group.data}, {group.label}, seed {run.seed}"
        if file in run.unreadable:
            panels.append(Panel(title, mark=_mark(run), missing=f"{file} of {run.path.name} cannot be read."))
        else:
            panels.append(Panel(title, draw(run), _mark(run)))
    return tuple(panels)


def _mark(run: Run) -> str:
    return "" if run.trained else "not trained"


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    """A colour for each label; where there are more labels than colours, for each architecture."""
    labels = dict.fromkeys(group.label for group in groups)
    if len(labels) <= len(COLOURS):
        return dict(zip(labels, COLOURS, strict=False))
    kinds = dict(zip(dict.fromkeys(group.architecture for group in groups), itertools.cycle(COLOURS), strict=False))
    return {group.label: kinds[group.architecture] for group in groups}


def _by_data(groups: Sequence[Group]) -> Iterator[tuple[str, list[Group]]]:
    for data, members in itertools.groupby(groups, key=lambda group: group.data):
        yield data, list(members)


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
