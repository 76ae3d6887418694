"""Findings on whether causal effect strength and disentanglement go together, within data sets and pooled over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..metrics.statistics import Inference, PartialCorrelation, mixed_slope, partial_correlation
from .claims import CES, DCI, LEVEL, Finding, Table, attempted, data_sets, left_out, reference, units_note, usable

LEAST = 4  # architectures that a correlation over them needs
PUBLISHED = "published: negative within each data set"


def ces_dci(table: Table) -> list[Finding]:
    """All of CES (posterior) against DCI disentanglement: within each data set, given reconstruction, given the
    architecture, among untrained networks; then pooled. Of the most frequent latents, width and net, all options."""
    found = []
    whole, table = table, reference(table, ("latents", "width", "net"))
    off = left_out(whole, table)
    for data in data_sets(table):
        rows = table[table["data"] == data]
        untrained = _untrained(rows, data)
        plain = _within(rows, data)
        if untrained.verdict == "holds":
            plain = plain.noting("untrained networks show it too: it is of the architectures, not of what they learned")
        found += [plain, _given_reconstruction(rows, data), _given_architecture(rows, data), untrained]
    return [finding.noting(off) for finding in (*found, *_pooled(table))]


def _claim(kind: str, data: str, quantity: str, words: str) -> Finding:
    return Finding(f"ces_dci_{kind}_{data}", words, quantity, scope=data, yardstick=PUBLISHED)


def _within(rows: Table, data: str) -> Finding:
    words = f"On {data}, architectures of stronger causal effects are less disentangled"
    claim = _claim("within", data, "Spearman's r of CES and DCI disentanglement", words)

    def conclude() -> Finding:
        kept, notes = usable(rows, [CES, DCI])
        found = _over_architectures(kept, CES, DCI)
        beside = _over_architectures(kept, CES, DCI, method="pearson")
        also = f"Pearson's r {beside.value:.2f} [{beside.low:.2f}, {beside.high:.2f}]"
        return _concluded(claim, found, *notes, also)

    return attempted(claim, conclude)


def _given_reconstruction(rows: Table, data: str) -> Finding:
    words = f"On {data}, the same holds among architectures that reconstruct equally well"
    claim = _claim("within_given_reconstruction", data, "partial Spearman's r given the reconstruction ratio", words)

    def conclude() -> Finding:
        kept, notes = usable(rows, [CES, DCI, "reconstruction"])
        found = _over_architectures(kept, CES, DCI, ["reconstruction"])
        return _concluded(claim, found, *notes)

    return attempted(claim, conclude)


def _given_architecture(rows: Table, data: str) -> Finding:
    words = f"On {data}, the same holds among runs of one architecture"
    claim = _claim("within_given_architecture", data, "partial Spearman's r given the architecture", words)

    def conclude() -> Finding:
        kept, notes = usable(rows, [CES, DCI])
        if kept["architecture"].value_counts().max() < 2:
            raise InputError("one run an architecture: nothing varies within architectures")
        found = partial_correlation(
            kept, CES, DCI, method="spearman", within="architecture", resampled="runs within architectures"
        )
        return _concluded(claim, found, *notes)

    return attempted(claim, conclude)


def _untrained(rows: Table, data: str) -> Finding:
    words = f"On {data}, untrained networks of stronger causal effects are less disentangled as well"
    claim = _claim("within_untrained", data, "Spearman's r of CES and DCI disentanglement before training", words)
    claim = replace(claim, yardstick="", id=f"ces_dci_within_untrained_{data}")
    x, y = f"untrained_{CES}", f"untrained_{DCI}"

    def conclude() -> Finding:
        kept, notes = usable(rows, [x, y])
        once = kept.drop_duplicates([x, y])
        if len(once) < len(kept):
            notes.append(f"{len(kept)} runs start from {len(once)} different networks, which count once")
        return _concluded(claim, _over_architectures(once, x, y), *notes)

    return attempted(claim, conclude)


def _pooled(table: Table) -> list[Finding]:
    words = "Over all data sets, architectures of stronger causal effects are less disentangled, within a data set"
    pooled = Finding("ces_dci_pooled", words, "partial Spearman's r given the data set", yardstick=PUBLISHED)
    words = "Over all data sets, factors and reconstruction equal, stronger effects mean less disentanglement"
    quantity = "partial Spearman's r given the number of factors and the reconstruction ratio"
    given = Finding("ces_dci_pooled_given_factors", words, quantity, yardstick=PUBLISHED)
    words = "DCI disentanglement falls with CES, at one slope on all data sets"
    unit = "DCI disentanglement per intensity per posterior sd"
    slope = Finding("ces_dci_slope", words, "mixed slope of DCI on CES, intercepts by data set", unit)

    def correlated(columns: Sequence[str], claim: Finding, **how: Any) -> Callable[[], Finding]:
        def conclude() -> Finding:
            kept, notes = usable(table, columns)
            cells, complete = _cells(kept, columns)
            notes.append(complete)
            _enough(cells)
            found = partial_correlation(
                cells, CES, DCI, method="spearman", permute="architecture", resampled="architectures", **how
            )
            dropped = f"not controlled for: {', '.join(found.dropped)}" if found.dropped else ""
            return _concluded(claim, found, *notes, dropped)

        return conclude

    def sloped() -> Finding:
        kept, notes = usable(table, [CES, DCI])
        found = mixed_slope(kept, DCI, CES, "data", level=LEVEL)
        independent = (
            "runs are taken to be independent within a data set; ces_dci_pooled permutes architectures instead"
        )
        return slope.concluded(replace(found, unit=""), "below", 0.0, *notes, independent)

    return [
        attempted(pooled, correlated([CES, DCI], pooled, within="data")),
        attempted(
            given, correlated([CES, DCI, "reconstruction", "factors"], given, given=["factors", "reconstruction"])
        ),
        attempted(slope, sloped),
    ]


def _concluded(claim: Finding, found: Inference, *notes: str) -> Finding:
    """With an interval that reaches 0 wherever the permutation test does not reject it."""
    if found.p > 1 - found.level and (found.low > 0 or found.high < 0):
        found = replace(found, low=min(found.low, 0.0), high=max(found.high, 0.0))
        notes = (*notes, f"interval extended to 0, which the test does not reject (p = {found.p:.2g})")
    done = claim.concluded(found, "below", 0.0, *notes)
    return done.noting(units_note(found.value, found.resampled) if done.verdict == "undecided" else "")


def _over_architectures(
    rows: Table, x: str, y: str, given: Sequence[str] = (), method: Any = "spearman"
) -> PartialCorrelation:
    """The correlation of the architectures' means: they are the replicates, whatever number of runs each has."""
    _enough(rows)
    means = rows.groupby("architecture", sort=False)[[x, y, *given]].mean().reset_index()
    options: dict[str, Any] = {"permute": "architecture", "resampled": "architectures"}
    return partial_correlation(means, x, y, given, method=method, **options)


def _cells(rows: Table, columns: Sequence[str]) -> tuple[Table, str]:
    """Means of data set and architecture, of the architectures that every data set has; a note on the others."""
    cells = rows.groupby(["data", "architecture"], sort=False)[list(columns)].mean().reset_index()
    counts = cells["architecture"].value_counts()
    incomplete = sorted(str(name) for name in counts.index[counts < cells["data"].nunique()])
    note = f"not on every data set, so left out: {', '.join(incomplete)}" if incomplete else ""
    return cells[~cells["architecture"].isin(incomplete)], note


def _enough(rows: Table) -> None:
    count = rows["architecture"].nunique()
    if count < LEAST:
        raise InputError(f"a correlation over architectures needs at least {LEAST} of them, there are {count}")
