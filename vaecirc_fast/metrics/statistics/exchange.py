"""Which rows may be exchanged with which under a null hypothesis: blocked permutations of runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError

EXACT = 10_000  # permutations up to which all are gone through


@dataclass(frozen=True)
class Blocks:
    """`units` (n,) index of the exchangeable unit that each row belongs to; `strata` (n,) index of its stratum.

    Units are exchanged as wholes: the rows of one take, stratum by stratum and in their order, the places of another's.
    So only units with equally many rows in every stratum are exchanged, and a unit of one row stays in its stratum.
    """

    units: np.ndarray
    strata: np.ndarray

    @property
    def count(self) -> int:
        """How many units there are."""
        return int(self.units.max()) + 1

    def classes(self) -> list[np.ndarray]:
        """Rows of units that may be exchanged with one another: (units, rows a unit) each."""
        layouts: dict[tuple[int, ...], list[np.ndarray]] = {}
        for unit in range(self.count):
            rows = np.flatnonzero(self.units == unit)
            rows = rows[np.argsort(self.strata[rows], kind="stable")]
            layouts.setdefault(tuple(self.strata[rows].tolist()), []).append(rows)
        return [np.stack(rows) for rows in layouts.values()]


def permutations(blocks: Blocks, replicates: int, seed: int) -> tuple[np.ndarray, bool]:
    """Row orders (R, n) in which units are exchanged, and whether these are all there are (at most 10,000).

    InputError where no unit can be exchanged with another.
    """
    classes = blocks.classes()
    total = math.prod(math.factorial(len(c)) for c in classes)
    if total == 1:
        raise InputError(
            "permute, within: no two units have equally many rows in every stratum, so nothing can be exchanged"
        )
    n = len(blocks.units)
    if total <= EXACT:
        orders = np.empty((total, n), dtype=np.int64)
        choices = itertools.product(*(itertools.permutations(range(len(c))) for c in classes))
        for order, chosen in zip(orders, choices, strict=True):
            for rows, moved in zip(classes, chosen, strict=True):
                order[rows] = rows[list(moved)]
        return orders, True
    rng = np.random.default_rng(seed)
    orders = np.empty((replicates, n), dtype=np.int64)
    for rows in classes:
        moved = rng.permuted(np.tile(np.arange(len(rows)), (replicates, 1)), axis=1)
        orders[:, rows] = rows[moved]
    return orders, False


def blocks_of(n: int, permute: Sequence | None, within: Sequence | None) -> Blocks:
    """Blocks of n rows from one label a row: `permute` of its unit (None: each row is one), `within` of its stratum."""
    units = np.arange(n) if permute is None else _indices("permute", permute, n)
    return Blocks(units, np.zeros(n, dtype=np.int64) if within is None else _indices("within", within, n))


def _indices(name: str, labels: Sequence, n: int) -> np.ndarray:
    import pandas

    if len(labels) != n:
        raise InputError(f"{name}: expected a label for each of the {n} rows, got {len(labels)}")
    codes, _ = pandas.factorize(pandas.Index(labels))
    if (codes < 0).any():
        raise InputError(f"{name}: expected a label for each row, got {int((codes < 0).sum())} missing")
    return codes.astype(np.int64)
