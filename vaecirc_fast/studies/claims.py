"""What a finding is, and the rows of a result table that may take part in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..metrics.statistics import Estimate, Inference, Verdict, seeds_needed, verdict

Table = Any  # a pandas.DataFrame; its stubs do not know what its methods return
LEVEL = 0.95
POWER = 0.8
AXES = ("latents", "width", "net", "options")  # of a study, that a main design holds constant
RUN = ("data", "architecture", "trained", "seed", "latents", "options")
EVERYWHERE = "all data sets"
CES, DCI = "ces_posterior", "dci_disentanglement"
# Metrics of which more is better, as the tables of the study have them.
BETTER = (
    "mig",
    "dci_disentanglement",
    "dci_completeness",
    "sap",
    "factor_vae_score",
    "beta_vae_score",
    "modularity",
    "explicitness",
    "irs",
    "specificity",
    "circuit_modularity",
    "ces_posterior",
)
NAMES = {
    "ces_posterior": "CES",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "DCI completeness",
    "mig": "MIG",
    "sap": "SAP",
    "irs": "IRS",
    "specificity": "intervention specificity",
    "circuit_modularity": "circuit modularity",
    "reconstruction": "reconstruction ratio",
}
UNITS = {"ces_posterior": "intensity per posterior sd", "ces_code_swap": "intensity", "ces_resample": "intensity"}


@dataclass(frozen=True)
class Finding:
    """A claim about a study with what its runs say.

    claim: in words, true or false of `quantity` in `unit`; `estimate` with its interval (low, high) at `level`, None
    where the runs give none or do not bound it; `n` and `resampled`: the replicates; `verdict`: "holds" if the whole
    interval lies on the claim's side, "does not hold" if wholly on the other, else "undecided"; `p`, of the hypothesis
    of no effect, and `p_adjusted` over its family, None where there is no test; `scope`: the data set, or "all data
    sets"; `yardstick`: what is published, never a target; `notes`: what the runs could not support.
    """

    id: str
    claim: str
    quantity: str
    unit: str = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    n: int = 0
    resampled: str = ""
    verdict: Verdict = "undecided"
    p: float | None = None
    p_adjusted: float | None = None
    scope: str = EVERYWHERE
    yardstick: str = ""
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"notes": list(self.notes)}

    def noting(self, *notes: str) -> Finding:
        """The same with more notes; empty and repeated ones are left out."""
        return replace(self, notes=tuple(dict.fromkeys(note for note in (*self.notes, *notes) if note)))

    def concluded(
        self, found: Estimate, side: Literal["above", "below"], threshold: float = 0.0, *notes: str
    ) -> Finding:
        """This claim with an estimate, and the verdict that its interval gives for `side` of `threshold`. Replicates
        that do not vary bound nothing."""
        alike = not_varying(found)
        if alike:
            found = replace(found, low=-math.inf, high=math.inf)
            notes = (*notes, f"{found.resampled} do not vary, which bounds nothing")
        value, low, high = (v if math.isfinite(v) else None for v in (found.value, found.low, found.high))
        p = found.p if isinstance(found, Inference) and math.isfinite(found.p) else None
        filled = replace(
            self,
            estimate=value,
            low=low,
            high=high,
            level=found.level,
            n=found.n,
            resampled=found.resampled,
            unit=self.unit or found.unit,
            p=p,
            verdict=verdict(found, side, threshold),
        )
        bounded = low is not None and high is not None
        unbounded = "" if bounded or alike else f"{found.n} {found.resampled} cannot bound it"
        return filled.noting(found.note if isinstance(found, Inference) else "", unbounded, *notes)


def not_varying(found: Estimate) -> bool:
    """Whether an interval is a point but for rounding: replicates that are all alike say nothing of how they vary."""
    return math.isfinite(found.low) and found.high - found.low <= 1e-9 * max(abs(found.low), abs(found.high))


def metric_words(name: str) -> str:
    """A metric or a column of a table as one says it."""
    for prefix, words in (("untrained_", "untrained "), ("permuted_", "permuted ")):
        if name.startswith(prefix):
            return words + metric_words(name.removeprefix(prefix))
    if name.startswith("ces_") and name not in NAMES:
        return f"CES ({name.removeprefix('ces_').replace('_', ' ')})"
    return NAMES.get(name, name.replace("_", " "))


def attempted(claim: Finding, conclude: Callable[[], Finding]) -> Finding:
    """What `conclude` makes of `claim`; where the runs do not support the statistic, undecided with its reason."""
    try:
        return conclude()
    except InputError as error:
        return claim.noting(str(error))


def data_sets(table: Table) -> list[str]:
    """The data sets of a table in their order; none of a table without runs."""
    return [str(name) for name in table["data"].unique()] if "data" in table else []


def usable(table: Table, columns: Sequence[str]) -> tuple[Table, list[str]]:
    """The trained runs that have all of `columns`, and notes on those left out; InputError where none is left."""
    missing = [name for name in ("data", "architecture", "trained", *columns) if name not in table]
    if missing:
        raise InputError(f"the runs have no {', '.join(map(metric_words, missing))}")
    trained = table[table["trained"].astype(bool)]
    if not len(trained):
        raise InputError("no run is trained" if len(table) else "there are no runs")
    # Only what findings read, as tables are wide.
    ends = (f"{name}_{end}" for name in columns for end in ("low", "high"))
    wanted = [name for name in (*RUN, *columns, *ends) if name in table]
    trained = trained[list(dict.fromkeys(wanted))]
    numbers = np.array([[_finite(v) for v in trained[name]] for name in columns], dtype=bool).reshape(-1, len(trained))
    kept = trained[numbers.all(0)]
    if not len(kept):
        raise InputError(f"no trained run has {' and '.join(map(metric_words, columns))}")
    notes = []
    if len(trained) < len(table):
        notes.append(f"{len(table) - len(trained)} of {len(table)} runs are not trained and take no part")
    if len(kept) < len(trained):
        what = " or ".join(map(metric_words, columns))
        notes.append(f"{len(trained) - len(kept)} trained runs lack {what} and take no part")
    return kept.astype(dict.fromkeys(columns, float)), notes


def reference(table: Table, axes: Sequence[str] = AXES) -> Table:
    """The runs of the main design: those at the most frequent latents, width and net, and of each architecture those
    with its most frequent options (ties: the first). Axes that the table lacks are left alone."""
    for axis in axes:
        if axis not in table or not len(table):
            continue
        groups = table.groupby("architecture", sort=False)[axis] if axis == "options" else [(None, table[axis])]
        keep = {name: values.value_counts(sort=False, dropna=False) for name, values in groups}
        common = {name: counts.idxmax() for name, counts in keep.items()}
        wanted = table["architecture"].map(common) if axis == "options" else common[None]
        same = (table[axis] == wanted) | (table[axis].isna() & (wanted != wanted))
        table = table[same]
    return table


def left_out(table: Table, kept: Table) -> str:
    """A note on the runs that are off the main design."""
    count = len(table) - len(kept)
    return f"{count} runs off the main design (latents, width, net or options) take no part" if count else ""


def replicates(rows: Table, columns: Sequence[str]) -> tuple[Table, str]:
    """The independent replicates behind rows of one data set and their name: means of architectures where there are
    two or more, else the runs of the one."""
    if rows["architecture"].nunique() > 1:
        return rows.groupby("architecture", sort=False)[list(columns)].mean(), "architectures"
    return rows[list(columns)], "seeds"


def paired_p(gaps: Any) -> float:
    """Two-sided p of Student's t test that differences (n >= 2,) have mean 0; 1 where they do not vary, as nothing then
    says how much they would."""
    from scipy import stats

    if len(gaps) < 2 or float(gaps.max()) == float(gaps.min()):
        return 1.0
    found: Any = stats.ttest_1samp(gaps, 0.0)
    return float(found.pvalue)


def seeds_note(sd: float, effect: float, of: str = "seeds an architecture", level: float = LEVEL) -> str:
    """How many replicates in each of two groups of spread `sd` would find `effect`; "" where that has no answer."""
    if not (math.isfinite(sd) and math.isfinite(effect) and sd > 0 and effect):
        return ""
    try:
        needed = seeds_needed([-sd, sd], effect, level, POWER)  # a difference of two has sd sqrt(2) times as large
    except InputError:
        return ""
    return f"{needed:,} {of} would find a difference of this size with {POWER:.0%} power"


def units_note(r: float, of: str) -> str:
    """How many units would find a correlation of size r, by Fisher's transformation."""
    from scipy import stats

    if not 1e-6 < abs(r) < 1:
        return ""
    quantiles = float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER))
    needed = math.ceil((quantiles / math.atanh(r)) ** 2 + 3)
    return f"{needed:,} {of} would find a correlation of this size with {POWER:.0%} power"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
