"""Training and test samples of the protocols that fit something: drawn by a seed, smaller where samples are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .labelled import Labelled, labelled


@dataclass(frozen=True)
class Split:
    """`codes` (N, L) and `levels` (N, K) of the training samples, `codes_test` (T, L) and `levels_test` (T, K) of the
    test samples; the K factors that vary among the training samples are `names`, the others `dropped`. `text` says how
    many samples there are, and of a smaller split why."""

    codes: np.ndarray
    levels: np.ndarray
    codes_test: np.ndarray
    levels_test: np.ndarray
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    text: str


def split_samples(
    codes: Any,
    factors: Any,
    train: int,
    test: int,
    seed: int,
    factor_names: Sequence[str] | None = None,
    codes_test: Any = None,
    factors_test: Any = None,
) -> Split:
    """`train` and `test` of the samples, drawn without replacement; of fewer, 2/3 and 1/3. Samples of one's own to test
    on (`codes_test` with `factors_test`) leave all of `codes` to train on.

    Raises InputError as `labelled` does, and on counts below 1, a test set that does not fit, fewer than 3 samples, or
    no factor that varies among the training samples.
    """
    for name, count in (("train", train), ("test", test)):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise InputError(f"{name}: expected a whole number >= 1, got {count!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed: expected a whole number >= 0, got {seed!r}")
    if (codes_test is None) != (factors_test is None):
        raise InputError("codes_test, factors_test: expected both or neither, got one")
    if codes_test is None:
        data = labelled(codes, factors, factor_names)
        first, second, text = _drawn(len(data.codes), int(train), int(test), int(seed))
    else:
        data, n = _joined(codes, factors, codes_test, factors_test, factor_names)
        first, second = np.arange(n), np.arange(n, len(data.codes))
        text = f"{n:,} training and {len(second):,} test samples, as given"
    levels = data.levels[first]
    varies = (levels != levels[:1]).any(0)
    if not varies.any():
        raise InputError(f"factors: expected one that varies among the {len(first)} training samples, got none")
    return Split(
        data.codes[first],
        levels[:, varies],
        data.codes[second],
        data.levels[second][:, varies],
        tuple(name for name, kept in zip(data.names, varies, strict=True) if kept),
        (*data.dropped, *(name for name, kept in zip(data.names, varies, strict=True) if not kept)),
        text,
    )


def _drawn(n: int, train: int, test: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    if n < 3:
        raise InputError(f"codes: expected at least 3 samples, to train and test on, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    if n >= train + test:
        return order[:train], order[train : train + test], f"{train:,} training and {test:,} test samples"
    first = round(n * 2 / 3)
    text = f"{first:,} training and {n - first:,} test samples: 2/3 and 1/3, fewer than {train:,} and {test:,}"
    return order[:first], order[first:], text


def _joined(
    codes: Any, factors: Any, codes_test: Any, factors_test: Any, names: Sequence[str] | None
) -> tuple[Labelled, int]:
    """Training samples first, under ids that both have in common, and how many they are."""
    from torch import Tensor

    parts = []
    for pair in ((codes, codes_test), (factors, factors_test)):
        arrays = [np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a) for a in pair]
        if arrays[0].ndim != 2 or arrays[1].ndim != 2 or arrays[0].shape[1] != arrays[1].shape[1]:
            raise InputError(
                f"codes_test, factors_test: expected the columns of codes and factors, "
                f"got {arrays[1].shape} beside {arrays[0].shape}"
            )
        parts.append(arrays)
    for name, array, other in (("factors", parts[1][0], parts[0][0]), ("factors_test", parts[1][1], parts[0][1])):
        if len(array) != len(other) or len(array) == 0:
            raise InputError(f"{name}: expected as many samples as codes, at least one, got {len(array)}, {len(other)}")
    return labelled(np.concatenate(parts[0]), np.concatenate(parts[1]), names), len(parts[0][0])
