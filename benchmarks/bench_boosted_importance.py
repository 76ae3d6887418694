"""Benchmark of the row `boosted_importance`: DCI's trees for dSprites' five factors, against scikit-learn's boosting.

scikit-learn takes minutes for all 100 rounds of all factors; VAECIRC_BENCH_WHOLE=1 times them too. Without it, it grows
the first 10 rounds of all factors, as ours then does, and all rounds of the factor with the fewest classes.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

import vaecirc_fast as vf

from .harness import measure

SIZES = (3, 6, 40, 32, 32)  # shape, scale, orientation, posX, posY
TRAIN, TEST = 10_000, 5_000
WHOLE = os.environ.get("VAECIRC_BENCH_WHOLE") == "1"


def _codes(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n, 10) as an encoder of dSprites might give them, some latents of several factors; labels (n, 5)."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, size, n) for size in SIZES], 1)
    u = (labels + 0.5) / SIZES - 0.5
    angle = 2 * np.pi * u[:, 2]
    signal = [u[:, 0], u[:, 1], np.sin(angle), np.cos(angle), u[:, 3], u[:, 4]]
    signal += [u[:, 3] * u[:, 4], u[:, 0] * np.cos(2 * angle)]
    mixing = np.eye(8, 10) + 0.3 * rng.normal(size=(8, 10)) * (rng.random((8, 10)) < 0.3)
    codes = np.stack(signal, 1) @ mixing + 0.05 * rng.normal(size=(n, 10))
    return torch.from_numpy(codes), torch.from_numpy(labels)


@pytest.mark.parametrize("case", ["five factors", "five factors, 10 rounds", "shape"])
@pytest.mark.parametrize("form", ["ours", "scikit-learn", "scikit-learn, by histograms, no importance"])
def test_trees(benchmark, case: str, form: str) -> None:
    from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier

    if case == "five factors" and form == "scikit-learn" and not WHOLE:
        pytest.skip("five minutes; VAECIRC_BENCH_WHOLE=1 runs it")
    rounds = 10 if "10 rounds" in case else 100
    codes, labels = _codes(TRAIN + TEST)
    labels = labels[:TRAIN, :1] if case == "shape" else labels[:TRAIN]
    x, test = codes[:TRAIN], codes[TRAIN:]

    def ours() -> None:
        vf.ops.boosted_importance(x, labels, test, rounds=rounds)

    def exact() -> None:
        for v in labels.T.numpy():
            machine = GradientBoostingClassifier(n_estimators=rounds).fit(x.numpy(), v)
            machine.predict(x.numpy())
            machine.predict(test.numpy())

    def by_histograms() -> None:
        for v in labels.T.numpy():
            options: dict[str, Any] = {"max_depth": 3, "early_stopping": False, "min_samples_leaf": 1}
            machine = HistGradientBoostingClassifier(max_iter=rounds, **options).fit(x.numpy(), v)
            machine.predict(x.numpy())
            machine.predict(test.numpy())

    call = {"ours": ours, "scikit-learn": exact}.get(form, by_histograms)
    name = f"{case}, 10 latents, {TRAIN:,} training and {TEST:,} test samples"
    if form == "scikit-learn":  # long enough without warming up
        benchmark.extra_info.update(case=name, form=form, ours=False, calls=1)
        benchmark.pedantic(call, rounds=1, warmup_rounds=0)
    else:
        measure(benchmark, call, case=name, form=form, ours=form == "ours", rounds=5)
