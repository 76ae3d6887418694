"""The page's first paragraph, in sentences made from the runs."""

from __future__ import annotations

from collections.abc import Sequence

from .aggregate import Group
from .results import Study
from .tables import Places, ranged
from .words import counted, data_name, decimals, listed, model_name, number, plain

RULE = "its reconstruction error is at most half of the mean image's and at least three latents are active"


def abstract(study: Study, found: Sequence[Group], places: Places) -> list[str]:
    """What was done and found, in sentences made from the runs."""
    runs = study.runs
    models = listed(dict.fromkeys(model_name(run.config) for run in runs))
    data = listed(dict.fromkeys(group.data for group in found))
    steps = " or ".join(dict.fromkeys(plain(run.config.get("steps")) for run in runs))
    batch = " or ".join(dict.fromkeys(plain(run.config.get("batch_size")) for run in runs))
    judged, swept = sizes(study)
    sentences = [
        f"{counted(len(runs), 'autoencoder').capitalize()} ({models} on {data}; "
        f"{counted(len({run.seed for run in runs}), 'seed')}) "
        f"{'was' if len(runs) == 1 else 'were'} trained for {steps} steps of {batch} images, judged on {judged} "
        f"images, and swept latent by latent on {swept} of them: each latent was set to other values, everything else "
        "kept, and the change of the decoded image measured."
    ]
    good = [run for run in runs if run.trained]
    bad = [
        f"{g.data}, {g.label}, seed{'s' * (len(_untrained(g)) > 1)} {ranged(_untrained(g))}"
        for g in found
        if _untrained(g)
    ]
    if not bad:
        all_ = {1: "It counts", 2: "Both count"}.get(len(runs), f"All {_bare(len(runs))} count")
        sentences.append(f"{all_} as trained{':' if len(runs) == 1 else '; of each,'} {RULE}.")
    elif good:
        share = f"{_bare(len(good)).capitalize()} of {_bare(len(runs))}"
        sentences.append(
            f"{share} count as trained (of each, {RULE}). Not trained, and so marked below and part of no aggregate: "
            f"{'; '.join(bad)}."
        )
    else:
        sentences.append(
            f"None counts as trained (of each, {RULE}), so there is no aggregate; what follows shows single runs, "
            "each so marked."
        )
    return sentences + _strengths(found, places)


def _strengths(found: Sequence[Group], places: Places) -> list[str]:
    """Posterior CES of the trained groups against their controls."""
    name = "ces_posterior"
    unit = next((_unit(group, name) for group in found if name in group.cells), "")
    cells = [(group, group.cells[name]) for group in found if name in group.cells and _unit(group, name) == unit]
    measured = [(g, c.estimate.value, c.control.value) for g, c in cells if c.estimate and c.control]
    if not measured:
        return []

    def shown(group: Group, value: float) -> str:
        return number(value, places.mean(group.data, name))

    ranked = sorted(measured, key=lambda entry: entry[1])
    where = [f"{shown(group, value)} for {group.label} on {group.data}" for group, value, _ in (ranked[0], ranked[-1])]
    span = f"is {where[0]}" if len(measured) == 1 else f"runs from {where[0]} to {where[1]}"
    ratios = [value / control for _, value, control in measured if control > 0]
    against = ""
    if ratios:
        p = decimals([min(ratios)], 2)
        ends = [number(min(ratios), p), number(max(ratios), p)]
        against = f", or {ends[0] if ends[0] == ends[1] else ' to '.join(ends)} times that of the untrained networks"
    sentences = [f"Posterior CES, the mean over all latents, in {unit}, {span}{against}."]
    bounded = [cell for _, cell in cells if cell.side != "unknown"]
    if bounded:
        clear = sum(cell.side == "above" for cell in bounded)
        if len(bounded) == 1:
            verb = "lies" if clear else "does not lie"
            sentences.append(f"Its 95 % interval over seeds {verb} wholly above the control's.")
        else:
            configurations = f"{_bare(clear)} of {_bare(len(bounded))} configurations"
            sentences.append(f"Its 95 % interval over seeds lies wholly above the control's in {configurations}.")
    if min(len(group.trained) for group, _, _ in measured) < 4:
        sentences.append(
            "With so few seeds an interval over seeds is wide, and a difference that does not clear it is open."
        )
    return sentences


def _unit(group: Group, metric: str) -> str:
    """Codes that have no posterior have another unit, and are not compared with others here."""
    return group.runs[0].result["definitions"][metric]["unit"]


def sizes(study: Study) -> tuple[str, str]:
    """How many images models were judged and swept on, in words; by data set where they differ."""
    return size(study, "mig"), size(study, "ces_resample")


def size(study: Study, metric: str) -> str:
    """How many images a metric is of, in words; by data set where they differ."""
    found: dict[str, list[str]] = {}
    for run in study.runs:
        n = run.result["metrics"].get(metric, {}).get("n")
        if n is not None:
            found.setdefault(plain(n), []).append(data_name(run.config["data"]))
    if len(found) < 2:
        return next(iter(found), "some")
    return " or ".join(f"{n} ({listed(dict.fromkeys(data))})" for n, data in found.items())


def _untrained(group: Group) -> list[int]:
    return [run.seed for run in group.runs if not run.trained]


def _bare(count: int) -> str:
    return counted(count, "", " ").strip() if count else "none"
