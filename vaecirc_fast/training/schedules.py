"""Learning-rate schedules: a pure function of the step, so a resumed run follows the same curve."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(step: int, *, lr: float, steps: int, schedule: str = "constant", warmup: int = 0) -> float:
    """Learning rate of update `step` in [0, steps).

    The first `warmup` updates rise linearly to `lr`; then it stays ("constant"), or falls over the remaining updates
    along a line or half a cosine towards zero, which update number `steps` would reach.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    return lr
