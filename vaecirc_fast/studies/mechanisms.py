"""Findings on mechanisms: isolation of targeted interventions, the capacity of latents, and discrete latents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..metrics.statistics import Estimate, Inference, equivalence, holm_sidak, t_interval
from .claims import (
    CES,
    DCI,
    EVERYWHERE,
    LEVEL,
    Finding,
    Table,
    attempted,
    data_sets,
    left_out,
    metric_words,
    not_varying,
    paired_p,
    reference,
    replicates,
    seeds_note,
    usable,
)
from .result_table import ISOLATION

NEAR_ZERO = 0.1  # share of the continuous architectures' CES below which one counts as none
CAPACITY = {DCI: "below", "mig": "below", "reconstruction": "above"}  # where crowding would push it


def isolation(table: Table) -> list[Finding]:
    """Whether an intervention on a factor stays with the latents that are the factor's own, by data set: at all (less
    than half of its effect elsewhere), and against the untrained network, factor by factor with Holm-Sidak over them.
    """
    found = []
    for data in data_sets(table):
        main = reference(table[table["data"] == data])
        off = left_out(table[table["data"] == data], main)
        factors = [
            name.removeprefix(ISOLATION)
            for name in main
            if name.startswith(ISOLATION) and not name.endswith(("_low", "_high")) and main[name].notna().any()
        ]
        found.append(_isolated(main, data).noting(off))
        gains = [_gain(main, data, factor) for factor in ("", *factors)]
        tested = {g.id: g.p for g in gains[1:] if g.p is not None}
        adjusted = holm_sidak(tested) if tested else {}
        found += [replace(g, p_adjusted=adjusted.get(g.id)).noting(off) for g in gains]
    return found


def _isolated(rows: Table, data: str) -> Finding:
    words = f"On {data}, most of what changing one factor does to the latents is done to its own"
    claim = Finding(
        f"isolation_{data}", words, "share of a factor's effect off its own latents, mean over factors", scope=data
    )

    def conclude() -> Finding:
        kept, notes = usable(rows, ["isolation"])
        values, of = replicates(kept, ["isolation"])
        found = t_interval(values["isolation"].to_numpy(), LEVEL, resampled=of)
        return _shares(claim, found, notes).noting("0: isolated, 1: all of it elsewhere")

    return attempted(claim, conclude)


def _shares(claim: Finding, found: Estimate, notes: list[str]) -> Finding:
    if math.isfinite(found.low) and not not_varying(found):
        found = replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return claim.concluded(found, "below", 0.5, *notes)


def _gain(rows: Table, data: str, factor: str) -> Finding:
    words = f"On {data}, training isolates interventions" + (f" on {factor}" if factor else "")
    quantity = "share of the effect off its own latents, trained less untrained" + (
        "" if factor else ", mean of factors"
    )
    claim = Finding(f"isolation_gain_{data}" + (f"_{factor}" if factor else ""), words, quantity, scope=data)
    name = f"{ISOLATION}{factor}" if factor else "isolation"

    def conclude() -> Finding:
        kept, notes = usable(rows, [name, f"untrained_{name}"])
        values, of = replicates(kept, [name, f"untrained_{name}"])
        gaps = (values[name] - values[f"untrained_{name}"]).to_numpy()
        e = t_interval(gaps, LEVEL, resampled=of)
        found = Inference(e.value, e.low, e.high, LEVEL, "", of, e.n, paired_p(gaps), "paired t test")
        levels = f"trained {values[name].mean():.2f}, untrained {values[f'untrained_{name}'].mean():.2f}"
        if kept.groupby("seed")[f"untrained_{name}"].nunique().lt(kept.groupby("seed").size()).any():
            notes.append("architectures of a seed start from one network: how untrained ones vary is hardly known")
        done = claim.concluded(found, "below", 0.0, levels, *notes)
        more = seeds_note(float(gaps.std(ddof=1)) / math.sqrt(2), e.value, of) if len(gaps) > 1 else ""
        return done.noting(more if done.verdict == "undecided" else "")

    return attempted(claim, conclude)


def capacity(table: Table) -> list[Finding]:
    """Whether beta-VAE degrades as the number of factors approaches that of latents, more than VAE does.

    x = factors / latents of runs at two or more numbers of latents; least squares of a metric on x with an intercept
    for each architecture on each data set, and a slope for each architecture. quantity = slope of beta-VAE less slope
    of VAE; replicates are runs, with Student's t.
    """
    return [_capacity(table, metric) for metric in CAPACITY]


def _capacity(table: Table, metric: str) -> Finding:
    words = metric_words(metric)
    worse = "falls" if CAPACITY[metric] == "below" else "rises"
    claim = Finding(
        f"capacity_{metric}",
        f"As factors approach latents, beta-VAE's {words} {worse} more than VAE's",
        f"slope of {words} on factors / latents, beta-VAE less VAE",
        f"{words} per factor a latent",
        scope=EVERYWHERE,
        yardstick="published: beta-VAE degrades when the number of factors approaches that of latents",
    )

    def conclude() -> Finding:
        main = reference(table, ("width", "net", "options"))
        rows, notes = usable(main, [metric, "factors", "latents"])
        if not len(rows := rows[rows["architecture"].isin(["vae", "beta_vae"])]):
            raise InputError("no such runs: neither vae nor beta_vae is trained")
        rows = rows.assign(x=rows["factors"] / rows["latents"])
        several = rows.groupby(["data", "architecture"])["latents"].transform("nunique") > 1
        rows = rows[several]
        if set(rows["architecture"]) != {"vae", "beta_vae"}:
            raise InputError("no such runs: vae and beta_vae need two or more numbers of latents on one data set")
        found, slopes = _interaction(rows, metric)
        untrained = main[~main["trained"].astype(bool) & main["architecture"].isin(["vae", "beta_vae"])]
        if len(untrained):
            at = ", ".join(
                f"{a} at {l:g}" for a, l in zip(untrained["architecture"], untrained["latents"], strict=True)
            )
            notes.append(f"not trained, which crowding itself may cause: {at} latents")
        steps = f"latents {', '.join(f'{n:g}' for n in sorted(rows['latents'].unique()))}"
        on = f"on {', '.join(data_sets(rows))}"
        side: Any = CAPACITY[metric]
        return claim.concluded(found, side, 0.0, slopes, f"{steps} {on}", left_out(table, main), *notes)

    return attempted(claim, conclude)


def _interaction(rows: Table, metric: str) -> tuple[Inference, str]:
    """Slope of beta-VAE less that of VAE, and a note on both."""
    from scipy import stats

    cells = rows.groupby(["data", "architecture"], sort=False).ngroup().to_numpy()
    beta = (rows["architecture"] == "beta_vae").to_numpy()
    x, y = rows["x"].to_numpy(), rows[metric].to_numpy()
    design = np.column_stack([np.eye(cells.max() + 1)[cells], np.where(beta, 0, x), np.where(beta, x, 0)])
    freedom = len(y) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError(f"{len(y)} runs are too few for slopes of two architectures")
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    residual = y - design @ coefficients
    variance = float(residual @ residual) / freedom
    contrast = np.zeros(design.shape[1])
    contrast[-2:] = -1, 1
    value, error = float(contrast @ coefficients), math.sqrt(variance * float(contrast @ inverse @ contrast))
    if error <= 1e-12 * max(float(np.abs(y).max()), 1e-300):
        raise InputError("the runs lie on two exact lines, so nothing says how far they vary")
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    note = f"only {len(y)} runs: the interval rests on normal residuals of one spread" if len(y) < 20 else ""
    how = f"least squares, t with {freedom} degrees of freedom"
    slopes = f"slopes: VAE {coefficients[-2]:.3g}, beta-VAE {coefficients[-1]:.3g}"
    return Inference(value, value - half, value + half, LEVEL, "", "runs", len(y), p, how, note), slopes


def vq_continuous_discrete(table: Table) -> list[Finding]:
    """VQ-VAE's causal effect strength against the mean of the continuous architectures', as ratios: under continuous
    interventions near zero (below .1), under discrete ones not."""
    continuous = Finding(
        "vq_continuous",
        f"VQ-VAE has next to no CES under continuous interventions: under {NEAR_ZERO:g} of the others'",
        "CES (posterior) of VQ-VAE, z_e moved and quantised again / mean of the continuous architectures'",
        "of the others' CES",
        yardstick="published: VQ-VAE's CES is near zero under continuous interventions",
    )
    found = [_ratio(table, continuous, CES, CES, "below")]
    for metric, how in (("ces_code_swap", "exchanged by usage"), ("ces_code_neighbour", "set to a near one")):
        claim = Finding(
            f"vq_discrete_{metric.removeprefix('ces_code_')}",
            f"Under discrete interventions (a code {how}) VQ-VAE has CES: over {NEAR_ZERO:g} of the others' (resample)",
            f"CES ({metric.removeprefix('ces_').replace('_', ' ')}) of VQ-VAE / mean CES (resample) of the others",
            "of the others' CES",
        )
        found.append(_ratio(table, claim, metric, "ces_resample", "above"))
    return found


def _ratio(table: Table, claim: Finding, metric: str, other: str, side: Any) -> Finding:
    def conclude() -> Finding:
        main = reference(table)
        if "architecture" not in main or not (main["architecture"] == "vq_vae").any():
            raise InputError("no such runs: vq_vae was not run")
        ours, notes = usable(main[main["architecture"] == "vq_vae"], [metric])
        theirs, more = usable(main[main["architecture"] != "vq_vae"], [other])
        ratios, of = _ratios(ours, theirs, metric, other)
        e = t_interval(ratios, LEVEL, resampled=of)
        p, tested = None, ""
        if side == "below" and len(ratios) > 1:
            test = equivalence(ratios, margin=NEAR_ZERO, resampled=of)
            p, tested = test.p, f"{test.verdict} to 0 within {NEAR_ZERO:g} by two one-sided t tests"
        done = claim.concluded(e, side, NEAR_ZERO, tested, left_out(table, main), *notes, *more)
        done = replace(done, p=p)
        if done.low is not None and done.low < 0:
            return replace(done, low=0.0)  # a ratio of strengths is never negative
        return done

    return attempted(claim, conclude)


def _ratios(ours: Table, theirs: Table, metric: str, other: str) -> tuple[np.ndarray, str]:
    """VQ-VAE's metric over the mean of the others' by data set, or on one data set by seed."""
    shared = [data for data in data_sets(ours) if (theirs["data"] == data).any()]
    if not shared:
        raise InputError("VQ-VAE and a continuous architecture are trained on no data set in common")
    key, of = ("data", "data sets") if len(shared) > 1 else ("seed", "seeds")
    ours, theirs = (rows[rows["data"].isin(shared)] for rows in (ours, theirs))
    means = theirs.groupby([key, "architecture"])[other].mean().groupby(level=0).mean()
    values = ours.groupby(key, sort=False)[metric].mean()
    pairs = [(value, means[name]) for name, value in values.items() if name in means.index and means[name] > 0]
    if not pairs:
        raise InputError(f"no {of} with an effect of the continuous architectures in common")
    return np.array([a / b for a, b in pairs]), of
