"""Findings that compare architectures: whether one is best everywhere, which differ, and which clear their controls."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..metrics.statistics import Estimate, Inference, family, t_interval, welch
from .claims import (
    BETTER,
    CES,
    DCI,
    EVERYWHERE,
    LEVEL,
    UNITS,
    Finding,
    Table,
    attempted,
    data_sets,
    left_out,
    metric_words,
    paired_p,
    reference,
    seeds_note,
    usable,
)

COMPARED = (DCI, "mig", CES, "specificity", "circuit_modularity")
DIFFERING = (CES, "specificity", "circuit_modularity", DCI)
DRAWS = 10_000
NO_NULL = {("permuted", CES), ("permuted", "circuit_modularity")}  # by definition


@dataclass(frozen=True)
class _Cells:
    """Values by data set and architecture, of the architectures that all data sets have. means, counts: (D, A);
    variance, freedom: (D,), between seeds, pooled over architectures; freedom 0 where there is one seed each."""

    data: list[str]
    architectures: list[str]
    means: np.ndarray
    counts: np.ndarray
    variance: np.ndarray
    freedom: np.ndarray
    notes: list[str]


def no_overall_winner(table: Table) -> list[Finding]:
    """Whether some architecture is best on every data set, for each of the compared metrics.

    quantity = min over architectures of max over data sets and rivals of (rival's mean - its own): how far even the
    best of them falls behind somewhere. Above 0 nothing wins everywhere; below 0 one does, by at least that. The
    interval is that of simultaneous t intervals of all differences (Sidak), which min and max preserve.
    """
    return [_winner(table, metric) for metric in COMPARED]


def _winner(table: Table, metric: str) -> Finding:
    claim = Finding(
        f"no_overall_winner_{metric}",
        f"No architecture has the best {metric_words(metric)} on all data sets",
        f"{metric_words(metric)} that every architecture falls behind by on some data set",
        UNITS.get(metric, ""),
        yardstick="published: no architecture wins everywhere",
    )

    def conclude() -> Finding:
        cells = _complete_cells(table, metric)
        count, rivals = cells.means.shape
        if count < 2:
            raise InputError("one data set: whether one architecture is best on all needs at least two")
        behind = cells.means[:, None, :] - cells.means[:, :, None]  # (D, a, rival)
        own = np.eye(rivals, dtype=bool)
        value = float(np.where(own, -np.inf, behind).max((0, 2)).min())
        best = [cells.architectures[a] for a in cells.means.argmax(1)]
        said = "best: " + ", ".join(f"{name} on {data}" for data, name in zip(cells.data, best, strict=True))
        if not (cells.freedom > 0).all():
            why = "one seed an architecture on a data set: how seeds vary is unknown, so nothing bounds the differences"
            return replace(claim, estimate=value, n=count, resampled="data sets").noting(why, said, *cells.notes)
        found = _least_shortfall(cells, behind, own, value)
        drawn = _chances(cells)
        sd = math.sqrt(float(cells.variance.mean()))
        done = claim.concluded(found, "above", 0.0, said, drawn, *cells.notes)
        return done.noting(seeds_note(sd, value) if done.verdict == "undecided" else "")

    return attempted(claim, conclude)


def _least_shortfall(cells: _Cells, behind: np.ndarray, own: np.ndarray, value: float) -> Inference:
    from scipy import stats

    count, rivals = cells.means.shape
    family_size = count * rivals * (rivals - 1) // 2
    error = np.sqrt(cells.variance[:, None, None] * (1 / cells.counts[:, :, None] + 1 / cells.counts[:, None, :]))
    quantile = stats.t.ppf((1 + LEVEL ** (1 / family_size)) / 2, cells.freedom)[:, None, None]
    low, high = (float(np.where(own, -np.inf, behind + sign * quantile * error).max((0, 2)).min()) for sign in (-1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, np.abs(behind) / error, np.where(behind != 0, np.inf, 0.0))
    p = 2 * stats.t.sf(t, cells.freedom[:, None, None])
    adjusted = -np.expm1(family_size * np.log1p(-np.minimum(p, 1 - 1e-16)))
    # Either each architecture falls behind somewhere, or one is ahead of all rivals everywhere.
    fails = np.where(own | (behind <= 0), 1.0, adjusted).min((0, 2)).max()
    wins = np.where(own, 0.0, np.where(behind < 0, adjusted, 1.0)).max((0, 2)).min()
    runs = int(cells.counts.sum())
    how = "simultaneous t intervals of all differences (Sidak)"
    return Inference(value, low, high, LEVEL, "", "seeds in data sets x architectures", runs, min(fails, wins), how)


def _chances(cells: _Cells) -> str:
    """The probability that one architecture is best on all data sets, as a note."""
    rng = np.random.default_rng(0)
    count, rivals = cells.means.shape
    winners = np.empty((DRAWS, count), dtype=int)
    for d in range(count):
        scale = np.sqrt(cells.variance[d] * cells.freedom[d] / rng.chisquare(cells.freedom[d], DRAWS))
        noise = rng.normal(size=(DRAWS, rivals)) / np.sqrt(cells.counts[d])
        winners[:, d] = (cells.means[d] + scale[:, None] * noise).argmax(1)
    same = float((winners == winners[:, :1]).all(1).mean())
    return (
        f"over seeds (Student's draws of each mean) one is best on all data sets with probability {same:.2f}; if all "
        f"were alike, {rivals ** (1 - count):.2g}"
    )


def _complete_cells(table: Table, metric: str) -> _Cells:
    main = reference(table)
    rows, notes = usable(main, [metric])
    notes.append(left_out(table, main))
    groups = {key: values.to_numpy() for key, values in rows.groupby(["data", "architecture"], sort=False)[metric]}
    data = list(dict.fromkeys(key[0] for key in groups))
    every = list(dict.fromkeys(key[1] for key in groups))
    common = [name for name in every if all((d, name) in groups for d in data)]
    if len(common) < len(every):
        out = ", ".join(name for name in every if name not in common)
        notes.append(f"not trained on every data set, so left out: {out}")
    if len(common) < 2:
        raise InputError(f"fewer than two architectures are trained on all of {', '.join(data)}")
    means, counts = (
        np.array([[f(groups[d, name]) for name in common] for d in data], dtype=float) for f in (np.mean, len)
    )
    squares = [sum(float(((v := groups[d, a]) - v.mean()) @ (v - v.mean())) for a in common) for d in data]
    freedom = counts.sum(1) - len(common)
    variance = np.array(squares) / np.maximum(freedom, 1)
    return _Cells(data, common, means, counts, variance, freedom, notes)


def differences(table: Table) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Whether architectures differ, by metric and data set, and the families of all pairs behind it as plain rows.

    The family of a metric is every pair of architectures on every data set, by Welch's t over seeds, adjusted by
    Holm-Sidak; a finding is of the pair that differs most clearly, with its Sidak interval. With one seed an
    architecture the replicates are data sets: paired differences, one family of pairs a metric.
    """
    findings, families = [], []
    for metric in DIFFERING:
        some, rows = _differences(table, metric)
        findings += some
        families += rows
    return findings, families


def _differences(table: Table, metric: str) -> tuple[list[Finding], list[dict[str, Any]]]:
    words = metric_words(metric)
    blank = Finding(
        f"architectures_differ_{metric}",
        f"Architectures differ in {words}",
        f"difference in {words} of the pair that differs most clearly",
        UNITS.get(metric, ""),
    )
    try:
        main = reference(table)
        rows, notes = usable(main, [metric])
        notes.append(left_out(table, main))
        seeded = rows.groupby(["data", "architecture"], sort=False)[metric].count().max() > 1
        tests = _by_seeds(rows, metric) if seeded else _by_data_sets(rows, metric)
    except InputError as error:
        return [blank.noting(str(error))], []
    name = f"{words}: pairs of architectures" + (" x data sets" if seeded else "")
    corrected = family({" / ".join(key): test for key, test in tests.items()}, name, 1 - LEVEL)
    adjusted = corrected["p_adjusted"].tolist()
    findings = []
    scopes = dict.fromkeys(key[0] for key in tests)
    for scope in scopes:
        of = [(key, p) for key, p in zip(tests, adjusted, strict=True) if key[0] == scope]
        (_, a, b), p = min(of, key=lambda pair: pair[1])
        clear = sum(p <= 1 - LEVEL for _, p in of)
        said = f"{a} less {b}; {clear} of {len(of)} pairs differ by Holm-Sidak over a family of {len(tests)}"
        id = f"{blank.id}_{scope}" if seeded else f"{blank.id}_across"
        claim = replace(blank, id=id, claim=f"{blank.claim} on {scope}", scope=scope)
        findings.append(_differing(claim, tests[scope, a, b]).noting(said, *notes))
        findings[-1] = replace(findings[-1], p_adjusted=float(p))
    if seeded:
        alone = [d for d in data_sets(table) if d not in scopes]
        why = "fewer than two architectures with two or more trained seeds"
        findings += [replace(blank, id=f"{blank.id}_{d}", scope=d).noting(why, *notes) for d in alone]
    # A number that is not finite is null.
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in corrected.to_dict("records")
    ]
    return findings, plain


def _differing(claim: Finding, test: Inference) -> Finding:
    """The claim with the interval of a pair, at the level at which those of the family hold together."""
    done = claim.concluded(test, "above")
    away = done.low is not None and done.high is not None and (done.low > 0 or done.high < 0)
    verdict = "holds" if away else "undecided"  # no test says that two are the same
    more = "" if away else _more(test)
    return replace(done, verdict=verdict).noting(more)


def _more(test: Inference) -> str:
    """How many replicates would do, their sd read off the interval: of pairs, or of two groups of equal size."""
    from scipy import stats

    pairs = test.resampled == "data sets"
    each, freedom = (test.n, test.n - 1) if pairs else (test.n / 2, test.n - 2)
    if not math.isfinite(test.high) or freedom < 1:
        return ""
    error = (test.high - test.low) / 2 / float(stats.t.ppf((1 + test.level) / 2, freedom))
    of = "data sets" if pairs else "seeds an architecture"
    return seeds_note(error * math.sqrt(each / 2), test.value, of, test.level)


def _by_seeds(rows: Table, metric: str) -> dict[tuple[str, str, str], Inference]:
    """(data set, a, b) -> Welch's test over seeds, at the level of the family."""
    cells = {key: values.to_numpy() for key, values in rows.groupby(["data", "architecture"], sort=False)[metric]}
    cells = {key: values for key, values in cells.items() if len(values) > 1}
    pairs = [
        (d, a, b)
        for d in dict.fromkeys(key[0] for key in cells)
        for a, b in itertools.combinations([key[1] for key in cells if key[0] == d], 2)
        if cells[d, a].var() > 0 or cells[d, b].var() > 0  # seeds that give one number are no replicates
    ]
    if not pairs:
        raise InputError("no two architectures have two or more trained seeds that vary")
    level = LEVEL ** (1 / len(pairs))
    return {(d, a, b): welch(cells[d, a], cells[d, b], level) for d, a, b in pairs}


def _by_data_sets(rows: Table, metric: str) -> dict[tuple[str, str, str], Inference]:
    """("all data sets", a, b) -> paired t test over data sets, at the level of the family."""
    wide = rows.pivot_table(index="data", columns="architecture", values=metric, sort=False)
    found = {}
    for a, b in itertools.combinations(wide.columns, 2):
        gaps = (wide[a] - wide[b]).dropna().to_numpy()
        if len(gaps) > 1 and gaps.std() > 0:
            found[EVERYWHERE, str(a), str(b)] = gaps
    if not found:
        raise InputError("one seed an architecture on a data set, and no two architectures on two or more data sets")
    level = LEVEL ** (1 / len(found))
    tests = {}
    for key, gaps in found.items():
        e = t_interval(gaps, level, resampled="data sets")
        p = paired_p(gaps)
        note = "one seed an architecture: replicates are data sets, so it is a difference over them, not on any one"
        tests[key] = Inference(e.value, e.low, e.high, level, "", "data sets", e.n, p, "paired t test", note)
    return tests


def clearing(table: Table) -> list[Finding]:
    """How many runs clear their untrained and their permuted control, for each metric of which more is better: the
    whole interval within the run lies above the control's whole interval. What has no interval within a run is taken by
    its value, and the finding says so. Replicates are architectures: Wilson's interval of their mean share."""
    wanted = [
        (metric, control)
        for metric in BETTER
        for control in ("untrained", "permuted")
        if f"{control}_{metric}" in table or (metric in COMPARED and (control, metric) not in NO_NULL)
    ]
    return [_clears(table, metric, control) for metric, control in wanted]


def _clears(table: Table, metric: str, control: str) -> Finding:
    words = metric_words(metric)
    against = "an untrained network" if control == "untrained" else "permuted codes or effects"
    claim = Finding(f"clears_{control}_{metric}", f"Most runs have a higher {words} than {against}", "share of runs")

    def conclude() -> Finding:
        from statsmodels.stats.proportion import proportion_confint

        rows, notes = usable(table, [metric, f"{control}_{metric}"])
        ours, blank = _end(rows, metric, "low")
        theirs, blank_too = _end(rows, f"{control}_{metric}", "high")
        for which, count in (("run", blank), ("control", blank_too)):
            if count:
                notes.append(f"{count} of {len(rows)} have no interval within the {which}: its value is taken")
        clears = ours > theirs
        share = clears.groupby(rows["architecture"]).mean()
        value, n = float(share.mean()), len(share)
        bounds: Any = proportion_confint(value * n, n, 1 - LEVEL, method="wilson")
        low, high = (float(end) for end in bounds)
        by_data = clears.groupby(rows["data"], sort=False).agg(["sum", "count"])
        said = "; ".join(f"{data}: {int(r['sum'])} of {int(r['count'])} runs" for data, r in by_data.iterrows())
        found = Estimate(value, min(low, value), max(high, value), LEVEL, "", "architectures", n)
        return claim.concluded(found, "above", 0.5, said, *notes)

    return attempted(claim, conclude)


def _end(rows: Table, name: str, end: str) -> tuple[Any, int]:
    """One end of the intervals of a column, its value where there is none, and how often there is none."""
    ends = rows[f"{name}_{end}"] if f"{name}_{end}" in rows else rows[name] * math.nan
    return ends.fillna(rows[name]), int(ends.isna().sum())
