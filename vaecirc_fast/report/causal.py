"""Recovered causal graphs on the page: the factors' true graph beside what interventions on the model say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from . import pictures, svg
from .aggregate import Group, over_seeds
from .figures import Figure, Panel, slug
from .results import Run
from .svg import line, picture, png, tag, text
from .tables import Printed, bracketed
from .words import NOTHING, counted, interval, number, probability

KEY = "recovered"
LEVELS = {"data": "at the data", "latents": "at the latents"}
KINDS = {"direct": "direct effects", "total": "total effects"}
ROOM = 92.0  # for the names of factors


@dataclass(frozen=True)
class Score:
    """A row of the table: (trained, untrained) structural Hamming distance and AUROC, and their nulls."""

    label: str
    what: str
    cells: Sequence[Printed]


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups whose runs recovered a causal graph."""
    return [group for group in groups if all(KEY in run.result for run in group.runs)]


def _found(run: Run, state: str = "trained") -> Mapping[str, Any]:
    """What was recovered through the trained or the untrained network; empty for a control that was not."""
    found = run.result[KEY]
    if "trained" in found:
        return found.get(state, {})
    return found if state == "trained" else {}


def graphs(data: str, groups: Sequence[Group]) -> Figure:
    """Truth, and direct effects at the data and at the latents, as matrices side by side."""
    panels = []
    top = max(_top(group.shown) for group in groups) or 1.0
    for group in groups:
        run = group.shown
        title = f"{group.data}, {group.label}, seed {run.seed}"
        panels.append(Panel(title, _drawn(run, top, title), "" if run.trained else "not trained"))
    threshold = _found(groups[0].shown)["threshold"]
    caption = Markup(
        "Row a, column b: whether factor a acts on factor b. Truth: the edges of the model that made the data. Beside "
        "it "
        "the direct effect on what a probe reads off the codes of b when a goes from low to high and all other factors "
        "are held: at the data, by making other images; at the latents, by setting the latent of a and decoding. "
        "Shade: "
        "its size, in standard deviations of the reading. A dot: above {}, and so an edge of the recovered graph. "
        "Framed: "
        "the true edges."
    ).format(number(threshold, 2))
    ticks = svg.Scale(0, top, 0, 1).ticks(4)
    bar = pictures.shade_bar(top, ticks, svg.tick_labels(ticks), "sd of the reading")
    return Figure(f"recovered-{slug(data)}", f"{data}: causal graphs recovered.", caption, tuple(panels), extra=bar)


def _top(run: Run) -> float:
    found = _found(run)
    sizes = [np.abs(_matrix(found[level]["direct"]["effect"])) for level in LEVELS if found[level]]
    return svg.rounded_up(max((float(np.nanmax(size)) for size in sizes), default=1.0))


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)


def _drawn(run: Run, top: float, what: str) -> str:
    found = _found(run)
    names, truth = found["factors"], np.array(found["truth"], dtype=bool)
    blocks: list[tuple[str, np.ndarray | None, np.ndarray]] = [("truth", truth * top, truth)]
    for level, words in LEVELS.items():
        effects = found[level].get("direct")
        values = None if effects is None else np.abs(_matrix(effects["effect"]))
        edges = truth if effects is None else np.array(effects["found"], dtype=bool)
        blocks.append((words, values, edges))
    gap = 14.0
    side = (pictures.WIDTH - ROOM - gap * (len(blocks) - 1)) / len(blocks)
    cell, head = side / len(names), 34.0
    parts = [
        text(ROOM - 8, head + (n + 0.5) * cell + 3.8, f"{n + 1} {name}", "end", "label") for n, name in enumerate(names)
    ]
    for k, (words, values, edges) in enumerate(blocks):
        x = ROOM + k * (side + gap)
        parts.append(text(x, 11, words, cls="heading"))
        box: dict[str, Any] = {"x": x, "y": head, "width": side, "height": side}
        if values is None:
            parts += [
                tag("rect", cls="frame", **box),
                text(x + side / 2, head + side / 2, "not defined", "middle", "tick"),
            ]
            continue
        shades = pictures.enlarged(pictures.shades_of(values / top), 60)
        address = png(shades, pictures.PALETTE)
        parts.append(tag("image", href=address, preserveAspectRatio="none", cls="pixels", **box))
        parts.append(tag("rect", cls="frame", **box))
        for n in range(len(names)):
            parts.append(text(x + (n + 0.5) * cell, head - 5, str(n + 1), "middle", "tick"))
            parts.append(line(x + n * cell, head + n * cell, x + (n + 1) * cell, head + (n + 1) * cell, "grid"))
        for a, b in zip(*np.nonzero(truth), strict=True):
            frame: dict[str, Any] = {
                "x": x + b * cell + 1,
                "y": head + a * cell + 1,
                "width": cell - 2,
                "height": cell - 2,
            }
            parts.append(tag("rect", cls="true", **frame))
        if k:
            for a, b in zip(*np.nonzero(edges), strict=True):
                words = f"{names[a]} → {names[b]}: {number(float(values[a, b]), 2)} sd"
                colour = "#fff" if values[a, b] > 0.55 * top else "#111"
                at = {"cx": x + (b + 0.5) * cell, "cy": head + (a + 0.5) * cell, "r": min(3.6, cell / 4)}
                parts.append(tag("circle", tag("title", str(escape(words))), fill=colour, **at))
    return picture("".join(parts), pictures.WIDTH, head + side + 3, what)


def scores(groups: Sequence[Group]) -> list[tuple[str, list[Score]]]:
    """Of each data set the distance and the AUROC of every configuration, trained and untrained, with their nulls."""
    found: dict[str, list[Score]] = {}
    for group in groups:
        for level, where in LEVELS.items():
            for kind, what in KINDS.items():
                if any(_found(run)[level] for run in _runs(group)):
                    row = Score(_name(group), f"{where}, {what}", _cells(group, level, kind))
                    found.setdefault(group.data, []).append(row)
    return list(found.items())


def left_out(groups: Sequence[Group]) -> list[str]:
    """Why there is no graph at the latents, of the configurations that have none."""
    said = []
    for group in groups:
        for why in dict.fromkeys(_found(run)["left_out"] for run in group.runs):
            said += [f"{group.data}, {group.label}, at the latents: {why}"] if why else []
    return said


def _runs(group: Group) -> Sequence[Run]:
    return group.trained or (group.shown,)


def _name(group: Group) -> str:
    if not group.trained:
        return f"{group.label} (not trained)"
    return f"{group.label}; {counted(len(group.trained), 'seed')}"


def _cells(group: Group, level: str, kind: str) -> list[Printed]:
    cells = []
    for metric in ("shd", "auroc"):
        for state in ("trained", "untrained"):
            entries = [_found(run, state).get(level, {}).get(kind, {}).get(metric) for run in _runs(group)]
            cells.append(_over([entry for entry in entries if entry]))
        entries = [_found(run)[level].get(kind, {}).get(metric) for run in _runs(group)]
        cells.append(_null([entry for entry in entries if entry]))
    return cells


def _over(entries: Sequence[Mapping[str, Any]]) -> Printed:
    """The mean over seeds, or the one run's value with its interval over images."""
    values = [entry["value"] for entry in entries if entry["value"] is not None]
    if not values:
        return Printed(NOTHING)
    if len(values) == 1:
        entry = next(entry for entry in entries if entry["value"] is not None)
        return Printed(number(values[0], 2), interval(entry["low"], entry["high"], 2))
    mean = over_seeds(values)
    assert mean is not None
    return Printed(number(mean.value, 2), bracketed(mean, 2))


def _null(entries: Sequence[Mapping[str, Any]]) -> Printed:
    """The null's mean, and p of one run, or the greatest of several."""
    nulls = [entry["null"]["value"] for entry in entries if entry["null"]["value"] is not None]
    if not nulls:
        return Printed(NOTHING)
    ps = [entry["p"] for entry in entries if entry.get("p") is not None]
    said = (
        f"p {'≤ ' if len(ps) > 1 else ''}{probability(max(ps)).removeprefix('= ' if len(ps) > 1 else '')}" if ps else ""
    )
    return Printed(number(sum(nulls) / len(nulls), 2), said)
