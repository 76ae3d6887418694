"""The page: one HTML file that holds its style, tables and figures and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from .._files import write_text
from . import figures
from .abstract import abstract, sizes
from .aggregate import Group, definitions, groups
from .figures import Figure
from .results import Study, read
from .tables import ROWS, LatentTable, Places, latent_table, machines, main_blocks, run_rows, settings
from .words import counted, data_name, listed, metric_name, typeset

LIMIT = 2_700_000  # characters of figures and tables of latents, which leaves the rest of 3 MB to text and runs

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
    sections, tables, left_out = _detail(found, metrics)
    return environment.get_template("page.html").render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=f"Causal effects of latents: {listed(data)}",
        abstract=abstract(study, found, places),
        notes=_notes(study, left_out),
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
        sections=sections,
        latents=tables,
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


def _notes(study: Study, left_out: int) -> list[str]:
    notes = [*study.notes, *(f"{run.path.name}: {note}" for run in study.runs for note in run.notes)]
    if left_out:
        notes.append(
            f"{counted(left_out, 'figure').capitalize()} left out to keep this page below 3 MB; the files that "
            "they are drawn from are in the runs' directories."
        )
    return notes


def _detail(
    found: Sequence[Group], metrics: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, list[tuple[int, Figure]]], list[LatentTable], int]:
    """The figures by section, numbered, as many as fit; the tables of latents; how many figures do not fit."""
    by_data = {data: [group for group in found if group.data == data] for data in dict.fromkeys(g.data for g in found)}
    makers = [
        *([("results", lambda: figures.against_untrained(found, metrics))] if any(g.trained for g in found) else []),
        ("training", lambda: figures.training_curves(found)),
        *(("pictures", lambda a=a, g=g: figures.reconstructions(a, g)) for a, g in by_data.items()),
        *(("pictures", lambda a=a, g=g: figures.traversals(a, g)) for a, g in by_data.items()),
        *(("effects", lambda a=a, g=g: figures.strengths(a, g)) for a, g in by_data.items()),
        *(("effects", lambda a=a, g=g: figures.step_curves(a, g)) for a, g in by_data.items()),
        *(("effects", lambda a=a, g=g: figures.effect_maps(a, g)) for a, g in by_data.items()),
    ]
    sections: dict[str, list[tuple[int, Figure]]] = {"results": [], "training": [], "pictures": [], "effects": []}
    size = count = left_out = 0
    tables = []
    for group in found:
        table = latent_table(group)
        size += 700 * len(table.rows)  # what a row takes as HTML, about
        if size < LIMIT / 3:
            tables.append(table)
    for section, make in makers:
        figure = make()
        weight = sum(len(panel.drawing.encode()) for panel in figure.panels)
        if size + weight > LIMIT:
            left_out += 1
            continue
        size, count = size + weight, count + 1
        sections[section].append((count, figure))
    return sections, tables, left_out


def _letters() -> Iterator[str]:
    yield from "abcdefghijklmnopqrstuvwxyz"
