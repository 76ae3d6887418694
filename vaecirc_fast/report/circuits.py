"""Levels 3 and 4 on the page: units patched one by one, what goes through each latent, and the circuit graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from . import graphs, pictures, svg
from .aggregate import Group
from .figures import Figure, Panel, slug
from .graphs import Edge, Node
from .inputs import KINDS
from .latents import ordered_latents, subscript
from .pictures import Strip
from .results import Run
from .tables import Printed
from .words import decimals, interval, listed, number

FILE = "circuits.safetensors"
UNITS, FEWER_UNITS = 64, 32  # of each site in the heatmap; fewer where configurations are many
EDGES, FEWER_EDGES = 16, 8  # drawn of each pair of layers, likewise
LATENTS = 3  # of each change in the table of mediation
TERMS = ("nie_pure", "nie_total", "nde_pure", "interaction", "share")


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups whose runs have circuits; those of an earlier protocol, or without pairs for them, have not."""
    return [group for group in groups if all("circuits" in run.result for run in group.runs)]


def _change(groups: Sequence[Group]) -> str:
    kind = groups[0].shown.result["circuits"]["kind"]
    return KINDS.get(kind, ("", "one thing in the image is changed"))[1]


def patching(data: str, groups: Sequence[Group], most: int = UNITS) -> Figure:
    """Site by site, at most `most` units by changes: the share of the output's change that a unit makes alone."""
    shares = {id(group): _shares(group.shown) for group in groups}
    highest = [float(np.nanmax(values, initial=0.0)) for found in shares.values() for values in found.values()]
    top = svg.rounded_up(max(highest, default=1.0))

    def draw(group: Group) -> str:
        found, drawn = shares[id(group)], []
        for site, values in found.items():
            order = np.argsort(-np.nansum(values, 0), kind="stable")
            remark = f"{values.shape[1]} units, strongest {number(100 * float(np.nanmax(values, initial=0.0)), 0)} %"
            drawn.append(Strip(site, values[:, order[:most]], remark))
        variants = group.shown.result["circuits"]["variants"]
        return pictures.strips(drawn, variants, top, f"{data}: what each unit does alone when it is patched")

    pairs = groups[0].shown.result["circuits"]["pairs"]
    caption = Markup(
        "Activation patching: in the run of an image, one unit alone takes the value that it has in the run of the "
        "image in which {}, and all that follows is computed again. Shade: the change that this makes in the output, "
        "as a share of the change between the two outputs (mean <span class='formula'>|Δ<i>y</i>|</span> of both over "
        "pixels and {} pairs, then divided). 1: the unit alone changes as much as everything together, though perhaps "
        "elsewhere. Sites in the order in which they run; units from the strongest to the weakest over all changes, of "
        "a site the first {}. Small shares are spread out: the scale goes by the square root. Intervals of every unit "
        "are in the runs’ {}."
    ).format(_change(groups), pairs, most, FILE)
    ticks = [0.0, *(t for t in (0.01, 0.05, 0.2, 0.5, 1.0, 2.0) if t <= top)]
    labels = [number(t, 2) if t else "0" for t in ticks]
    bar = pictures.shade_bar(top, ticks, labels, "share of the whole change, dimensionless", root=True)
    title = f"{data}: what single units pass on."
    return Figure(f"patching-{slug(data)}", title, caption, _panels(groups, draw), extra=bar)


def _shares(run: Run) -> dict[str, np.ndarray]:
    """(variant, unit) effects by site, each divided by the whole change; NaN where a change changes nothing."""
    found = run.circuits()
    if found is None:
        return {}
    circuits = run.result["circuits"]
    whole = np.array([change["value"] or np.nan for change in circuits["change"]], dtype=float)
    return {
        site["site"]: found[f"effect {site['site']}"].double().numpy() / whole[:, None] for site in circuits["sites"]
    }


def mediators(data: str, groups: Sequence[Group]) -> Figure:
    """Change x latent: the share of a change's effect that passes through each latent."""
    found = {id(group): _mediated(group.shown) for group in groups}
    top = svg.rounded_up(max((float(np.nanmax(m, initial=0.0)) for m, _ in found.values()), default=1.0))
    panels = []
    for group in groups:
        run, (values, latents) = group.shown, found[id(group)]
        active = {row["latent"]: row["active"] for row in run.result["latents"]}
        columns = [f"z{subscript(i)}" for i in latents]
        title = _title(group)
        faint = [not active.get(i, True) for i in latents]
        drawing = pictures.matrix(values, run.result["circuits"]["variants"], columns, faint, top, title)
        panels.append(Panel(title, drawing, "" if run.trained else "not trained"))
    caption = Markup(
        "Share of the effect of a change that passes through one latent’s mean: total NIE / TE, means over pairs "
        "divided; the outcome is that of the table below. Columns: active latents from the greatest posterior CES to "
        "the least. A row adds up to 1 where the decoder adds up what latents do, and to something else where they "
        "interact. Below 0: the latent works against the change. Intervals: of the greatest in the table, of all in "
        "the runs’ result.json."
    )
    ticks = svg.Scale(0, top, 0, 1).ticks(4)
    bar = pictures.shade_bar(top, ticks, svg.tick_labels(ticks), "share mediated, dimensionless")
    title = f"{data}: what goes through each latent."
    return Figure(f"mediation-{slug(data)}", title, caption, tuple(panels), extra=bar)


def _mediated(run: Run) -> tuple[np.ndarray, list[int]]:
    """(variant, latent) shares, NaN where there is no effect, and the latents in the order of the columns."""
    mediation = run.result["circuits"]["mediation"]
    rows = [{r["unit"]: r["share"]["value"] for r in entry["rows"][:-1]} for entry in mediation]
    latents = [row["latent"] for row in ordered_latents(run) if row["latent"] in rows[0]]
    return np.array([[row[i] for i in latents] for row in rows], dtype=float), latents


def graph(data: str, groups: Sequence[Group], twins: bool = True) -> Figure:
    """The circuit graph of each shown run, and, if `twins`, that of its untrained twin."""
    panels = []
    for group in groups:
        run = group.shown
        for name, words in (("graph", ""), ("control", ", before training"))[: 2 if twins else 1]:
            title = _title(group) + words
            mark = "" if run.trained or words else "not trained"
            if run.circuits() is None:
                panels.append(Panel(title, mark=mark, missing=f"{FILE} of {run.path.name} cannot be read."))
            elif not run.result["circuits"][name]:
                panels.append(Panel(title, mark=mark, missing="A pair of layers has no effect: there is no graph."))
            else:
                panels.append(Panel(title, _drawn(run, name, f"{data}: circuit graph of {title}", not twins), mark))
    first = groups[0].shown.result["circuits"]
    found = first["graph"] or first["control"]
    units = listed(dict.fromkeys(f"{len(row['units'])}" for row in found["layers"][1:-1])) if found else "some"
    caption = Markup(
        "The decoder as a graph. Nodes: the latents; of each layer the {} units through which paths of the greatest "
        "weight lead{}; a 4 × 4 mosaic of the image, each cell drawn as its place. An edge is the direct effect of a "
        "parent that alone takes its value for another image, in standard deviations of the child per standard "
        "deviation of the parent, over {} pairs of images; each pair of layers has total weight 1, and a path the "
        "product of its edges. Drawn are the {} strongest edges of each pair of layers. Colours: Louvain "
        "communities, the best of 20 partitions, in grey beyond six; an edge has the colour of the community that "
        "both its ends are in, else it is grey. <i>Q</i> and its difference from the nulls are those of Tables 1 and"
        " 2; <i>z</i>: this difference in standard deviations of the nulls, which is no interval: edges are measured"
        " on these pairs alone. Hollow: inactive latents."
    ).format(units, "" if twins else ", if an edge drawn joins them", first["pairs"], EDGES if twins else FEWER_EDGES)
    return Figure(f"graph-{slug(data)}", f"{data}: circuit graphs.", caption, tuple(panels))


def _drawn(run: Run, name: str, what: str, lone: bool) -> str:
    """lone: whether the graph of the untrained twin is not drawn, and so gets a line here."""
    found = run.result["circuits"][name]
    tensors = run.circuits()
    assert tensors is not None
    active = {row["latent"]: row["active"] for row in run.result["latents"]}
    layers = [row["layer"] for row in found["layers"]]
    nodes, starts = [], {}
    for column, row in enumerate(found["layers"]):
        starts[row["layer"]] = len(nodes)
        side = round(len(row["units"]) ** 0.5)
        for n, unit in enumerate(row["units"]):
            community = found["communities"][len(nodes)]
            if column == 0:
                inactive = name == "graph" and not active.get(unit, True)
                nodes.append(Node(column, f"z{subscript(unit)}", f"z{subscript(unit)}", community, inactive))
            elif column == len(layers) - 1 and side * side == len(row["units"]):
                place = (n // side, n % side, side, side)
                nodes.append(Node(column, f"cell {place[0]},{place[1]}", "", community, place=place))
            else:
                nodes.append(Node(column, f"{row['layer']}[{unit}]", "", community))
    edges, count, pairs = [], 0, list(zip(layers, layers[1:], strict=False))
    for parent, child in pairs:
        weights = tensors[f"{name} {parent} > {child}"].numpy()
        count += int((weights > 0).sum())
        chosen = graphs.strongest(weights, FEWER_EDGES if lone else EDGES)
        edges += [Edge(starts[parent] + u, starts[child] + v, w) for u, v, w in chosen]
    share = sum(edge.weight for edge in edges) / len(pairs)
    if lone:
        nodes, edges = _joined(nodes, edges, len(layers) - 1)
    excess, kept = found["q"] - found["null"], 100 * found["kept"]
    z = "" if found["z"] is None else f" (z = {number(found['z'], 1)})"
    twin = run.result["circuits"]["control"]
    remarks = (
        f"Q = {number(found['q'], 3)}, nulls {number(found['null'], 3)}: difference {number(excess, 3)}{z}; "
        f"{max(found['communities']) + 1} communities",
        f"drawn: {len(edges)} of {count:,} edges with {100 * share:.0f} % of their weight",
        f"paths through these units alone: {number(kept, decimals([kept], 2))} % of the weight of all paths",
        *([f"before training: Q = {number(twin['q'], 3)}, nulls {number(twin['null'], 3)}"] if twin and lone else []),
    )
    return graphs.layered(layers, nodes, edges, what, remarks)


def _joined(nodes: Sequence[Node], edges: Sequence[Edge], last: int) -> tuple[list[Node], list[Edge]]:
    """Without the units between that no edge drawn leads to or from."""
    used = {n for edge in edges for n in (edge.start, edge.end)}
    kept = [n for n, node in enumerate(nodes) if node.column in (0, last) or n in used]
    at = {n: place for place, n in enumerate(kept)}
    return [nodes[n] for n in kept], [Edge(at[e.start], at[e.end], e.weight) for e in edges]


@dataclass(frozen=True)
class MediationBlock:
    """A change in the table of mediation: its total effect and `rows` of (mediator, unit or None, cells by `TERMS`)."""

    variant: str
    te: Printed
    rows: Sequence[tuple[str, int | None, Sequence[Printed]]]


@dataclass(frozen=True)
class MediationTable:
    """The shown run of a group."""

    title: str
    mark: str
    pairs: int
    blocks: Sequence[MediationBlock]


def mediation_tables(groups: Sequence[Group], brief: bool = False) -> list[MediationTable]:
    """Of each change the latents of greatest total NIE, and the decoder’s strongest unit; if `brief`, one latent."""
    return [_table(group, brief) for group in groups]


def _table(group: Group, brief: bool) -> MediationTable:
    run = group.shown
    circuits = run.result["circuits"]
    entries = circuits["mediation"]
    rows = [row for entry in entries for row in entry["rows"]]
    effects = [entry["te"]["value"] for entry in entries]
    p = decimals([*effects, *(row[term]["value"] for row in rows for term in TERMS[:-1])])
    blocks = []
    for entry in entries:
        *latents, unit = entry["rows"]
        chosen = sorted(latents, key=lambda row: -(row["nie_total"]["value"] or 0.0))[: 1 if brief else LATENTS]
        cells = [
            (
                "z" if row is not unit else f"{row['site']}[{row['unit']}]",
                row["unit"] if row is not unit else None,
                _row(row, p),
            )
            for row in (chosen if brief else (*chosen, unit))
        ]
        blocks.append(MediationBlock(entry["variant"], _printed(entry["te"], p), cells))
    return MediationTable(_title(group), "" if run.trained else "not trained", circuits["pairs"], blocks)


def _row(row: Mapping[str, Any], places: int) -> list[Printed]:
    return [_printed(row[term], 2 if term == "share" else places) for term in TERMS]


def _printed(entry: Mapping[str, Any], places: int) -> Printed:
    return Printed(number(entry["value"], places), interval(entry["low"], entry["high"], places))


def _title(group: Group) -> str:
    return f"{group.data}, {group.label}, seed {group.shown.seed}"


def _panels(groups: Sequence[Group], draw: Any) -> tuple[Panel, ...]:
    panels = []
    for group in groups:
        run, mark = group.shown, "" if group.shown.trained else "not trained"
        if run.circuits() is None:
            panels.append(Panel(_title(group), mark=mark, missing=f"{FILE} of {run.path.name} cannot be read."))
        else:
            panels.append(Panel(_title(group), draw(group), mark))
    return tuple(panels)
