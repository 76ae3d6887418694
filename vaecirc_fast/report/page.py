"""The page: one HTML file that holds its style, tables and figures and loads nothing."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from .._files import write_text
from . import causal, circuits, disentanglement, figures, inputs, relations
from .abstract import abstract, size, sizes
from .aggregate import Group, definitions, groups
from .circuits import MediationTable
from .claims import Findings, read_findings
from .figures import Figure
from .latents import quantised
from .methods import methods
from .overview import overview
from .results import Study, read
from .tables import ROWS, LatentTable, Places, latent_table, machines, main_blocks, run_rows, settings, sweep_plans
from .words import data_name, listed, metric_name, typeset

LIMIT = 2_940_000  # bytes of a page, less the figures' captions: below 3 MB
DETAILED = 30  # configurations that figures show
FEW = 12  # configurations up to which pictures keep their size and every graph stands beside its untrained twin
SMALL = 48  # pixels of a picture beyond that
SECTIONS = ("results", "training", "pictures", "inputs", "effects", "circuits", "recovered")

# arXiv 2505.03530, first version, from its public text: disentanglement and effect, on that paper's own scale.
YARDSTICKS = {"vae": ("VAE", ".064", "3.99"), "beta_vae": ("β-VAE", ".051", "3.43")}


def write(directory: Path) -> Path:
    """Write directory/report.html and return its path; see `vaecirc_fast.report.write`."""
    file = directory / "report.html"
    write_text(file, render(read(directory)))
    return file


def render(study: Study) -> str:
    """The page of a study."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = groups(study.runs)
    metrics = definitions(study.runs)
    places = Places(found)
    shared = [name for name in metrics if any(name in run.result["replicates"] for run in study.runs if run.trained)]
    data = list(dict.fromkeys(group.data for group in found))
    title = f"Causal effects of latents: {listed(data)}"
    stated, troubles = read_findings(study.directory)
    chosen = _chosen(found)
    latents, mediation, left_out = _tables(found, chosen)
    parts = dict(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=title,
        abstract=abstract(study, found, places),
        settings=settings(study.runs),
        machines=machines(study.runs),
        metrics=[
            (letter, metric_name(name), unit or "dimensionless", typeset(text + _dropped(study, name)))
            for letter, (name, (unit, text)) in zip(_letters(), metrics.items(), strict=False)
        ],
        blocks=main_blocks(found, metrics, places),
        hierarchical=[metric_name(name) for name in shared],
        resampled=_resampled(study),
        runs=run_rows(found, metrics, places),
        more_runs=max(0, len(study.runs) - ROWS),
        findings=stated,
        overview=overview(found),
        methods=methods(study, title),
        recovered=causal.scores(causal.measured(found)),
        recovered_notes=causal.left_out(causal.measured(found)),
        disentanglement=disentanglement.shown(found),
        inputs=inputs.blocks(inputs.measured(found)),
        latents=latents,
        mediation=mediation,
        brief=len(chosen) > FEW,
        slots=any(quantised(run) for run in study.runs),
        plans=sweep_plans(found[:DETAILED]),
        single=any(len(group.trained) == 1 for group in found),
        yardsticks=[
            YARDSTICKS[name]
            for name in dict.fromkeys(r.config["architecture"] for r in study.runs)
            if name in YARDSTICKS
        ],
    )
    notes = [*study.notes, *troubles, *(f"{r.path.name}: {note}" for r in study.runs for note in r.notes)]
    template = environment.get_template("page.html")
    bare = "".join(_finished(template.render(**parts, notes=notes, sections={name: [] for name in SECTIONS})))
    every = itertools.chain(_related(found, stated), _figures(chosen, metrics))
    sections, too_much = _fitting(every, LIMIT - len(bare.encode()))
    notes += _left_out(found, chosen, [*too_much, *left_out])
    return "".join(_finished(template.render(**parts, notes=notes, sections=sections)))


def _finished(page: str) -> Iterator[str]:
    """The page without the indentation of its template, as it has many rows, and with letters' indices below; but for
    drawings, tags, and what is <pre>."""
    page = "".join(
        part if part.startswith("<pre") else re.sub(r"\n\s+", "\n", part)
        for part in re.split(r"(<pre.*?</pre>)", page, flags=re.DOTALL)
    )
    for part in re.split(r"(<pre.*?</pre>|<svg.*?</svg>|<[^>]*>)", page, flags=re.DOTALL):
        yield part if part.startswith("<") else re.sub(r"λ_(od|d)\b", r"λ<sub>\1</sub>", part)


def _dropped(study: Study, metric: str) -> str:
    """Which factors a metric leaves out, because they have one value."""
    found: dict[str, list[str]] = {}
    for run in study.runs:
        for factor in run.result["metrics"].get(metric, {}).get("dropped", ()):
            found.setdefault(str(factor), []).append(data_name(run.config["data"]))
    names = [f"{factor} ({listed(dict.fromkeys(data))})" for factor, data in found.items()]
    return f"; one-valued factors left out: {listed(names)}" if names else ""


def _resampled(study: Study) -> str:
    judged, swept = sizes(study)
    drawn = size(study, "reconstruction")
    images = f"{judged} images for reconstruction and MIG"
    if drawn != judged:
        images = f"{judged} images for MIG, {drawn} for reconstruction"
    return f"{images}, the {swept} swept ones for CES and specificity"


def _tables(
    found: Sequence[Group], chosen: Sequence[Group]
) -> tuple[list[LatentTable], list[MediationTable], list[str]]:
    """The tables of latents and of mediation of the configurations that are shown, as many as leave half of the page to
    figures, and what is left out."""
    runs = sum(len(group.runs) for group in found)
    size = 800 * min(runs, ROWS) + 12_000 * min(len(found), disentanglement.MOST)  # of the other tables, about
    tables = []
    for table in map(latent_table, chosen):
        size += 500 * len(table.rows)  # what a row takes as HTML, about
        if size < LIMIT / 2:
            tables.append(table)
    mediation = []
    having = circuits.measured(chosen)
    for table in circuits.mediation_tables(having, len(chosen) > FEW):
        size += 450 * sum(len(block.rows) for block in table.blocks)
        if size < LIMIT / 2:
            mediation.append(table)
    left_out = ["tables of latents"] * (len(tables) < len(chosen))
    return tables, mediation, left_out + ["tables of mediation"] * (len(mediation) < len(having))


def _fitting(drawn: Iterable[tuple[str, Figure]], room: int) -> tuple[dict[str, list[tuple[int, Figure]]], list[str]]:
    """Figures by section, numbered, as many as fit into `room` bytes, and the titles of the others."""
    sections: dict[str, list[tuple[int, Figure]]] = {name: [] for name in SECTIONS}
    left_out = []
    for section, figure in drawn:
        if figure.weight > room:
            left_out.append(figure.title.rstrip("."))
            continue
        room -= figure.weight
        sections[section].append((1 + sum(map(len, sections.values())), figure))
    return sections, left_out


def _left_out(found: Sequence[Group], chosen: Sequence[Group], left_out: Sequence[str]) -> Iterator[str]:
    """Notes on what the page does not show."""
    if len(chosen) < len(found):
        yield (
            f"Figures and tables of single runs show {len(chosen)} of {len(found)} configurations, of each data set "
            "first one of each architecture; Tables 1 and 2 have them all."
        )
    if left_out:
        yield f"Left out to keep this page below 3 MB: {listed(left_out)}. The runs' directories hold the data."


def _chosen(found: Sequence[Group]) -> list[Group]:
    """The configurations that figures show: as many rounds as fit of one configuration of every architecture on every
    data set, those of most seeds first."""
    waiting: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        waiting.setdefault((group.data, group.architecture), []).append(group)
    for members in waiting.values():
        members.sort(key=lambda group: -len(group.runs))
    order = [group for round in itertools.zip_longest(*waiting.values()) for group in round if group is not None]
    kept = {id(group) for group in order[:DETAILED]}
    return [group for group in found if id(group) in kept]


def _related(found: Sequence[Group], stated: Findings) -> Iterator[tuple[str, Figure]]:
    """Figures of all configurations together, for the section of results."""
    looks = relations.styles(found)
    remarks = {group.data: stated.correlation(group.config["data"]) for group in found}
    remarks = {data: said for data, said in remarks.items() if said}
    made = (
        relations.effect_against_disentanglement(found, looks, remarks),
        relations.capacity(found, looks),
        relations.strength(found, looks),
    )
    yield from (("results", figure) for figure in made if figure is not None)


def _figures(chosen: Sequence[Group], metrics: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Figure]]:
    """Section and figure, in the order of the page."""
    by_data: dict[str, list[Group]] = {}
    for group in chosen:
        by_data.setdefault(group.data, []).append(group)
    many = len(chosen) > FEW
    side = SMALL if many else None
    if any(group.trained for group in chosen) and not many:  # the overview has it all, in less room
        yield "results", figures.against_untrained(chosen, metrics)
    yield "training", figures.training_curves(chosen)
    for make in (figures.reconstructions, figures.traversals):
        for data, members in by_data.items():
            yield "pictures", make(data, members, side)
    for data, members in by_data.items():
        if having := inputs.measured(members):
            yield "inputs", inputs.matrices(data, having)
    step_curves = functools.partial(figures.step_curves, grids=figures.GRIDS[-1:] if many else figures.GRIDS)
    for make in (figures.strengths, step_curves, figures.effect_maps):
        for data, members in by_data.items():
            yield "effects", make(data, members)

    patching = functools.partial(circuits.patching, most=circuits.FEWER_UNITS if many else circuits.UNITS)
    for make in (patching, circuits.mediators, functools.partial(circuits.graph, twins=not many)):
        for data, members in by_data.items():
            if having := circuits.measured(members):
                yield "circuits", make(data, having)
    for data, members in by_data.items():
        if having := causal.measured(members):
            yield "recovered", causal.graphs(data, having)


def _letters() -> Iterator[str]:
    yield from "abcdefghijklmnopqrstuvwxyz"
