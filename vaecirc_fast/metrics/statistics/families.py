"""Several tests at once: the Holm-Sidak correction over a named family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from .estimate import Inference, as_array

if TYPE_CHECKING:
    import pandas


def holm_sidak(p: Any) -> Any:
    """Holm-Sidak adjusted p values of a family of tests: reject where the adjusted p is at most alpha.

    `p`: the unadjusted ones, an array (m,) or a mapping from a test's name to its p (a pandas Series too); the result
    is of the same form. With p_(1) <= ... <= p_(m): adjusted p_(j) = max over i <= j of 1 - (1 - p_(i))^(m - i + 1),
    which keeps the probability of any false rejection at alpha for independent (and many dependent) tests.

    Source: Sidak 1967 and Holm 1979. Raises InputError on none, or on p that are not in [0, 1].
    """
    import pandas

    if isinstance(p, pandas.Series):
        return pandas.Series(_adjusted(p.to_numpy(dtype=float)), index=p.index, name=p.name)
    if isinstance(p, Mapping):
        return dict(zip(p, _adjusted(np.array([float(v) for v in p.values()])).tolist(), strict=True))
    return _adjusted(as_array(p))


def family(tests: Mapping[str, Inference], name: str, alpha: float = 0.05) -> pandas.DataFrame:
    """A named family of tests as one table, corrected by Holm-Sidak.

    Columns: "family" (`name`), "test", "value", "low", "high", "unit", "n", "resampled", "method", "p", "p_adjusted"
    over all of `tests`, "significant" (p_adjusted <= `alpha`) and "note". Intervals are not adjusted: each is at its
    own level. Raises InputError on no tests, or an `alpha` outside (0, 1).
    """
    import pandas

    if not 0 < alpha < 1:
        raise InputError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    if not isinstance(tests, Mapping) or not all(isinstance(test, Inference) for test in tests.values()):
        raise InputError("tests: expected a mapping from names to results with a p, as of welch or spearman")
    adjusted = holm_sidak({key: test.p for key, test in tests.items()})
    fields = ("value", "low", "high", "unit", "n", "resampled", "method", "p")
    rows = [
        {"family": name, "test": key, **{f: getattr(test, f) for f in fields}}
        | {"p_adjusted": adjusted[key], "significant": adjusted[key] <= alpha, "note": test.note}
        for key, test in tests.items()
    ]
    return pandas.DataFrame(rows)


def _adjusted(p: np.ndarray) -> np.ndarray:
    if p.ndim != 1 or not p.size or not ((p >= 0) & (p <= 1)).all():  # NaN is in no interval
        raise InputError(f"p: expected at least one number in [0, 1], shape (m,), got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    with np.errstate(divide="ignore"):
        # 1 - (1 - p)^k without the loss of digits for small p
        steps = -np.expm1(np.arange(len(p), 0, -1) * np.log1p(-p[order]))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted
