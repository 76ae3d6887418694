"""Codes with the factors they are of: what every disentanglement metric is given, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError

_TABLE = 1 << 16  # the widest range of factor ids that is ranked by a table


@dataclass(frozen=True)
class Labelled:
    """Codes and factors. `codes` (N, L) float64, finite. `levels` (N, K) int64: the factors that vary, as 0..size-1
    whatever their ids were; `sizes` and `names` (K). `dropped`: names of the one-valued factors, of which no metric can
    say anything."""

    codes: np.ndarray
    levels: np.ndarray
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    dropped: tuple[str, ...]


def labelled(codes: Any, factors: Any = None, factor_names: Sequence[str] | None = None) -> Labelled:
    """`codes` (N, L) numbers and `factors` (N, K) integers, any ids, tensors or arrays.

    A `Labelled` in the place of `codes` is given back as it is: the battery checks its grid once.
    Raises InputError on wrong shapes, unequal N, no samples, NaN or infinite codes, factors that are not integers,
    names that do not fit, or no factor that varies.
    """
    if isinstance(codes, Labelled):
        return codes
    numbers = checked_codes(codes)
    ids = _checked_factors(factors, len(numbers))
    names = _checked_names(factor_names, ids.shape[1])
    levels = [_levels(column) for column in ids.T]
    kept = [k for k, (size, _) in enumerate(levels) if size > 1]
    if not kept:
        raise InputError(f"factors: expected at least one that varies, got one value each of {', '.join(names)}")
    return Labelled(
        numbers,
        np.stack([levels[k][1] for k in kept], 1),
        tuple(levels[k][0] for k in kept),
        tuple(names[k] for k in kept),
        tuple(name for k, name in enumerate(names) if k not in kept),
    )


def _levels(column: np.ndarray) -> tuple[int, np.ndarray]:
    """How many values a column (N,) has, and each value's rank among them, int64."""
    low, high = int(column.min()), int(column.max())
    if high - low > _TABLE:
        values, ranks = np.unique(column, return_inverse=True)
        return len(values), ranks.reshape(-1).astype(np.int64)
    # a table by value and not a sort: a whole grid of images is ranked at once
    places = (column.astype(object) - low).astype(np.int64) if high >= 1 << 63 else column.astype(np.int64) - low
    ranks = np.cumsum(np.bincount(places, minlength=high - low + 1) > 0) - 1
    return int(ranks[-1]) + 1, ranks[places]


def checked_codes(codes: Any) -> np.ndarray:
    """`codes` (N, L) as float64. InputError on wrong shapes, no samples, NaN, infinity or a range beyond float64."""
    array = np.asarray(codes.detach().double().cpu() if isinstance(codes, Tensor) else codes)
    if array.dtype.kind not in "fiub" or array.ndim != 2 or 0 in array.shape:
        raise InputError(f"codes: expected numbers of shape (N, L), got {array.dtype} {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).all(0))[0])
        raise InputError(f"codes: expected finite numbers, got NaN or infinity in latent {bad}")
    half = np.finfo(np.float64).max / 2
    # the range of all latents together first: it is found in a tenth of the time
    if array.max() / 2 - array.min() / 2 >= half and (array.max(0) / 2 - array.min(0) / 2).max() >= half:
        raise InputError("codes: expected latents whose range float64 can hold, got a range above 1.8e308")
    return array


def _checked_factors(factors: Any, n: int) -> np.ndarray:
    array = np.asarray(factors.detach().cpu() if isinstance(factors, Tensor) else factors)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "iub":
        raise InputError(
            f"factors: expected integers (indices of factor values) of shape (N, K), got {array.dtype} {array.shape}"
        )
    if len(array) != n:
        raise InputError(f"factors: expected as many samples as codes, N = {n}, got {len(array)}")
    return array


def _checked_names(names: Sequence[str] | None, k: int) -> tuple[str, ...]:
    names = tuple(f"factor {i}" for i in range(k)) if names is None else tuple(names)
    if len(names) != k or len(set(names)) != k:
        raise InputError(f"factor_names: expected {k} different names, one for each factor, got {names}")
    return names
