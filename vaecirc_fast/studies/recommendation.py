"""Which architecture to take for a data set: by the others, with the regret that this advice has on held-out ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..metrics.statistics import Estimate, t_interval, verdict
from .claims import BETTER, DCI, LEVEL, Table, left_out, metric_words, not_varying, reference, usable

METRICS = (DCI, "mig", "specificity", "circuit_modularity")
LEAST = 3  # data sets that a held-out regret needs: two to rank by, one to hold out


@dataclass(frozen=True)
class Recommendation:
    """`architecture` for `data` ("a new data set" if none was named) by `metric`, None where nothing can be said.

    ranks: mean rank of each architecture on the data sets it is recommended by, 1 the best. regret: best mean on a
    held-out data set less that of the architecture which the others recommend, mean over held-out data sets; random:
    of an architecture drawn at random; always: of each one taken everywhere; gain: random less regret. held_out: data
    set, recommended, best and regret of each. verdict: whether the gain is above 0, as of a finding. All with Student's
    intervals over data sets, in the metric's unit.
    """

    metric: str
    data: str
    architecture: str | None
    ranks: dict[str, float]
    regret: Estimate | None
    random: Estimate | None
    gain: Estimate | None
    always: dict[str, Estimate]
    held_out: list[dict[str, Any]]
    verdict: str
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "metric": self.metric,
            "data": self.data,
            "architecture": self.architecture,
            "verdict": self.verdict,
            "regret": _entry(self.regret),
            "random": _entry(self.random),
            "gain": _entry(self.gain),
            "ranks": {name: round(rank, 4) for name, rank in self.ranks.items()},
            "always": {name: e.value for name, e in self.always.items()},
            "held_out": [f"{row['data']}: {row['recommended']}, regret {row['regret']:.3g}" for row in self.held_out],
            "notes": list(self.notes),
        }


def recommend(table: Table, data: str | None = None, metric: str = DCI) -> Recommendation:
    """Which architecture to take for `data`, or for a data set that is not in the table, by `metric`, more is better.

    The architecture of the least mean rank over the other data sets (ties: the greater mean, as a share of each data
    set's spread, then the name), on means over trained seeds of the main design. Its worth is tested by leaving out one
    data set at a time: recommend by the others, regret = best mean there less the recommended one's. What is best is
    itself estimated, so regrets are too high where seeds are few; that is so for random choice too.

    Too few data sets or architectures: no architecture or no regret, and notes say why. InputError for a data set that
    is not in the table, or a metric of which more is not better.
    """
    if metric not in BETTER:
        raise InputError(f"metric: expected one of which more is better, {', '.join(BETTER)}, got {metric!r}")
    if data is not None and ("data" not in table or data not in set(table["data"])):
        raise InputError(f"data: {data!r} is not in the table")
    try:
        wide, notes = _means(table, metric)
    except InputError as error:
        return _nothing(metric, data, str(error))
    others = wide.drop(index=data, errors="ignore") if data is not None else wide
    if not len(others):
        return _nothing(metric, data, "there is no other data set to recommend by", *notes)
    ranks = _ranks(others)
    chosen = _best(others)
    held_out, randoms, always = [], [], {name: [] for name in wide.columns}
    for left in wide.index if len(wide) >= LEAST else []:
        scores = wide.loc[left]
        pick = _best(wide.drop(index=left))
        best = str(scores.idxmax())
        regret = float(scores.max() - scores[pick])
        held_out.append({"data": str(left), "recommended": pick, "best": best, "regret": regret})
        randoms.append(float((scores.max() - scores).mean()))
        for name in always:
            always[name].append(float(scores.max() - scores[name]))
    if not held_out:
        notes.append(f"{len(wide)} data sets: a held-out regret needs at least {LEAST}")
        return Recommendation(metric, data or NEW, chosen, ranks, None, None, None, {}, [], "undecided", tuple(notes))
    regrets = np.array([row["regret"] for row in held_out])
    gain = _over(np.array(randoms) - regrets)
    said = verdict(gain)
    if len(wide) < 8:
        notes.append(f"only {len(wide)} data sets: intervals rest on regrets being normally distributed")
    constant = min(always, key=lambda name: float(np.mean(always[name])))
    notes.append(
        f"always {constant}, the best such choice in hindsight, has regret {float(np.mean(always[constant])):.3g}"
    )
    return Recommendation(
        *(metric, data or NEW, chosen, ranks, _over(regrets), _over(np.array(randoms)), gain),
        {name: _over(np.array(values)) for name, values in always.items()},
        held_out,
        said,
        tuple(notes),
    )


NEW = "a new data set"


def _nothing(metric: str, data: str | None, *notes: str) -> Recommendation:
    return Recommendation(metric, data or NEW, None, {}, None, None, None, {}, [], "undecided", notes)


def _means(table: Table, metric: str) -> tuple[Any, list[str]]:
    """Means (data set, architecture) of architectures that are on every data set."""
    main = reference(table)
    rows, notes = usable(main, [metric])
    wide = rows.pivot_table(index="data", columns="architecture", values=metric, sort=False)
    out = [str(name) for name in wide.columns[wide.isna().any()]]
    wide = wide.dropna(axis=1)
    if out:
        notes.append(f"not trained on every data set, so left out: {', '.join(out)}")
    if wide.shape[1] < 2:
        raise InputError(f"fewer than two architectures are trained on all of {', '.join(map(str, wide.index))}")
    if rows.groupby(["data", "architecture"]).size().max() < 2:
        notes.append(f"one seed each: what is best in {metric_words(metric)} may be a matter of the seed")
    notes.append(left_out(table, main))
    return wide, [note for note in notes if note]


def _ranks(wide: Any) -> dict[str, float]:
    return {str(name): float(rank) for name, rank in wide.rank(axis=1, ascending=False).mean().items()}


def _best(wide: Any) -> str:
    spread = wide.max(axis=1) - wide.min(axis=1)
    shares = wide.sub(wide.min(axis=1), axis=0).div(spread.where(spread > 0, 1.0), axis=0).mean()
    ranks = _ranks(wide)
    return min(ranks, key=lambda name: (round(ranks[name], 9), -round(float(shares[name]), 9), name))


def _over(values: np.ndarray) -> Estimate:
    found = t_interval(values, LEVEL, resampled="data sets")
    if not_varying(found):
        found = replace(found, low=-math.inf, high=math.inf)
    return found


def _entry(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    ends = {name: getattr(estimate, name) for name in ("value", "low", "high")}
    finite = {name: v if math.isfinite(v) else None for name, v in ends.items()}
    return {**finite, "level": estimate.level, "n": estimate.n, "resampled": estimate.resampled}
