"""The page: one HTML file that holds its style, tables and figures and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from .._files import write_text
from . import circuits, disentanglement, figures, inputs
from .abstract import abstract, sizes
from .aggregate import Group, definitions, groups
from .circuits import MediationTable
from .figures import Figure
from .results import Study, read
from .tables import ROWS, LatentTable, Places, latent_table, machines, main_blocks, run_rows, settings, sweep_plans
from .words import data_name, listed, metric_name, typeset

LIMIT = 2_850_000  # bytes of a page, about: below 3 MB
DETAILED = 24  # configurations that figures show

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
    detail = _detail(found, metrics)
    return environment.get_template("page.html").render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=f"Causal effects of latents: {listed(data)}",
        abstract=abstract(study, found, places),
        notes=[*study.notes, *(f"{r.path.name}: {note}" for r in study.runs for note in r.notes), *detail.notes],
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
        disentanglement=disentanglement.shown(found),
        inputs=inputs.blocks(inputs.measured(found)),
        sections=detail.sections,
        latents=detail.tables,
        mediation=detail.mediation,
        plans=sweep_plans(found[:DETAILED]),
        single=any(len(group.trained) == 1 for group in found),
        yardsticks=[
            YARDSTICKS[name]
            for name in dict.fromkeys(r.config["architecture"] for r in study.runs)
            if name in YARDSTICKS
        ],
    )


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


def _detail(found: Sequence[Group], metrics: Mapping[str, tuple[str, str]]) -> Detail:
    """The figures and the tables of latents, as many as fit on one page."""
    by_data: dict[str, list[Group]] = {}
    for group in found:
        by_data.setdefault(group.data, []).append(group)
    most = max(1, DETAILED // len(by_data))
    by_data = {data: members[:most] for data, members in by_data.items()}
    chosen = [group for members in by_data.values() for group in members]
    notes = []
    if len(chosen) < len(found):
        notes.append(
            f"Figures and tables of latents show {len(chosen)} of {len(found)} configurations, the first {most} of "
            "each data set; Tables 1 and 2 have them all."
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
    for table in circuits.mediation_tables(circuits.measured(chosen)):
        size += 1_200 * sum(len(block.rows) for block in table.blocks)
        if size < LIMIT / 2:
            mediation.append(table)

    names = ("results", "training", "pictures", "inputs", "effects", "circuits")
    sections: dict[str, list[tuple[int, Figure]]] = {name: [] for name in names}
    left_out = []
    for section, figure in _figures(by_data, chosen, metrics):
        weight = sum(len(panel.drawing) for panel in figure.panels)
        if size + weight > LIMIT:
            left_out.append(figure.title.rstrip("."))
            continue
        size += weight
        sections[section].append((1 + sum(map(len, sections.values())), figure))
    left_out += ["tables of latents"] * (len(tables) < len(chosen))
    left_out += ["tables of mediation"] * (len(mediation) < len(circuits.measured(chosen)))
    if left_out:
        notes.append(f"Left out to keep this page below 3 MB: {listed(left_out)}. The runs' directories hold the data.")
    return Detail(sections, tables, mediation, notes)


def _figures(
    by_data: Mapping[str, Sequence[Group]], chosen: Sequence[Group], metrics: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, Figure]]:
    """Section and figure, in the order of the page."""
    if any(group.trained for group in chosen):
        yield "results", figures.against_untrained(chosen, metrics)
    yield "training", figures.training_curves(chosen)
    for make in (figures.reconstructions, figures.traversals):
        for data, members in by_data.items():
            yield "pictures", make(data, members)
    for data, members in by_data.items():
        if having := inputs.measured(members):
            yield "inputs", inputs.matrices(data, having)
    for make in (figures.strengths, figures.step_curves, figures.effect_maps):
        for data, members in by_data.items():
            yield "effects", make(data, members)

    for make in (circuits.patching, circuits.mediators, circuits.graph):
        for data, members in by_data.items():
            if having := circuits.measured(members):
                yield "circuits", make(data, having)


def _letters() -> Iterator[str]:
    yield from "abcdefghijklmnopqrstuvwxyz"
