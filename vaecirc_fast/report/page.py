"""The page: one HTML file that holds its style, tables and figures and loads nothing."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from .._files import write_text
from . import causal, circuits, disentanglement, figures, inputs, relations
from .abstract import abstract, sizes
from .aggregate import Group, definitions, groups
from .circuits import MediationTable
from .figures import Figure
from .findings import Findings, read_findings
from .methods import methods
from .overview import overview
from .results import Study, read
from .tables import ROWS, LatentTable, Places, latent_table, machines, main_blocks, run_rows, settings, sweep_plans
from .words import data_name, listed, metric_name, typeset

LIMIT = 2_850_000  # bytes of a page, about: below 3 MB
DETAILED = 30  # configurations that figures show
FEW = 12  # configurations up to which pictures keep their size and every graph stands beside its untrained twin
SMALL = 48  # pixels of a picture beyond that

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
    detail = _detail(found, metrics, stated)
    page = environment.get_template("page.html").render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=title,
        abstract=abstract(study, found, places),
        notes=[*study.notes, *troubles, *(f"{r.path.name}: {note}" for r in study.runs for note in r.notes), *detail.notes],
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
        sections=detail.sections,
        latents=detail.tables,
        mediation=detail.mediation,
        mediators=circuits.LATENTS if len(found) <= FEW else 1,
        plans=sweep_plans(found[:DETAILED]),
        single=any(len(group.trained) == 1 for group in found),
        yardsticks=[
            YARDSTICKS[name]
            for name in dict.fromkeys(r.config["architecture"] for r in study.runs)
            if name in YARDSTICKS
        ],
    )
    return "".join(_unindented(page))


def _unindented(page: str) -> Iterator[str]:
    """The page without the indentation of its template, as it has many rows; but for what is <pre>."""
    for part in re.split(r"(<pre.*?</pre>)", page, flags=re.DOTALL):
        yield part if part.startswith("<pre") else re.sub(r"\n\s+", "\n", part)


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
    return f"{judged} images for reconstruction and MIG, the {swept} swept ones for CES and specificity"


@dataclass(frozen=True)
class Detail:
    """What is shown of single runs: figures by section, with their numbers; tables of latents; notes on what is not."""

    sections: dict[str, list[tuple[int, Figure]]]
    tables: list[LatentTable]
    mediation: list[MediationTable]
    notes: list[str]


def _detail(found: Sequence[Group], metrics: Mapping[str, tuple[str, str]], stated: Findings) -> Detail:
    """The figures and the tables of latents, as many as fit on one page."""
    chosen = _chosen(found)
    by_data: dict[str, list[Group]] = {}
    for group in chosen:
        by_data.setdefault(group.data, []).append(group)
    notes = []
    if len(chosen) < len(found):
        notes.append(
            f"Figures and tables of single runs show {len(chosen)} of {len(found)} configurations, of each data set "
            "first one of each architecture; Tables 1 and 2 have them all."
        )
    runs = sum(len(group.runs) for group in found)
    tables, size = [], 1_300 * min(runs, ROWS) + 4_000 * len(found)  # what Tables 1 and 2 take, about
    size += 9_000 * min(len(found), disentanglement.MOST)
    for group in chosen:
        table = latent_table(group)
        size += 700 * len(table.rows)  # what a row takes as HTML, about
        if size < LIMIT / 2:
            tables.append(table)

    mediation = []
    latents = circuits.LATENTS if len(chosen) <= FEW else 1
    for table in circuits.mediation_tables(circuits.measured(chosen), latents):
        size += 1_200 * sum(len(block.rows) for block in table.blocks)
        if size < LIMIT / 2:
            mediation.append(table)

    names = ("results", "training", "pictures", "inputs", "effects", "circuits", "recovered")
    sections: dict[str, list[tuple[int, Figure]]] = {name: [] for name in names}
    left_out = []
    for section, figure in itertools.chain(_related(found, stated), _figures(by_data, chosen, metrics)):
        if size + figure.weight > LIMIT:
            left_out.append(figure.title.rstrip("."))
            continue
        size += figure.weight
        sections[section].append((1 + sum(map(len, sections.values())), figure))
    left_out += ["tables of latents"] * (len(tables) < len(chosen))
    left_out += ["tables of mediation"] * (len(mediation) < len(circuits.measured(chosen)))
    if left_out:
        notes.append(f"Left out to keep this page below 3 MB: {listed(left_out)}. The runs' directories hold the data.")
    return Detail(sections, tables, mediation, notes)


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
    remarks = {group.data: stated.correlations(group.data) for group in found}
    remarks = {data: said for data, said in remarks.items() if said}
    made = (
        relations.effect_against_disentanglement(found, looks, remarks),
        relations.capacity(found, looks),
        relations.strength(found, looks),
    )
    yield from (("results", figure) for figure in made if figure is not None)


def _figures(
    by_data: Mapping[str, Sequence[Group]], chosen: Sequence[Group], metrics: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, Figure]]:
    """Section and figure, in the order of the page."""
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

    for make in (circuits.patching, circuits.mediators, functools.partial(circuits.graph, twins=not many)):
        for data, members in by_data.items():
            if having := circuits.measured(members):
                yield "circuits", make(data, having)
    for data, members in by_data.items():
        if having := causal.measured(members):
            yield "recovered", causal.graphs(data, having)


def _letters() -> Iterator[str]:
    yield from "abcdefghijklmnopqrstuvwxyz"
