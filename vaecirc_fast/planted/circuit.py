"""A planted circuit: a decoder built by hand together with the closed form of what every latent does to its output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..groups import Groups

FIXED = np.array([i * 0.6 for i in range(-5, 6) if i])
POSTERIOR = np.array([i * 0.5 for i in range(-4, 5) if i])

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": lambda dy: np.abs(dy).mean(-1),
    "mse": lambda dy: (dy**2).mean(-1),
    "rms": lambda dy: np.sqrt((dy**2).mean(-1)),
    "tv": lambda dy: np.abs(dy).sum(-1) / 2,
    "signed": lambda dy: dy.mean(-1),
}


@dataclass(frozen=True)
class Planted:
    """A network whose causal effects are known.

    name, shows: what it is called and, in one sentence, what it shows. decoder: a module (N, L) -> (N, ...) of P
    outputs, float64. z: (N, L) float64 codes. scale: (L,) float64, the scale s_i of each latent. groups: partition of
    the outputs. effect: the kind of effect that suits its outputs, "l1", or "tv" where they are probabilities.
    change: the closed form, (z (N, L), latent, shift (N, S)) -> (N, S, P) float64: how far each output moves when the
    latent alone is shifted. It is written out from the planted weights in numpy and never runs the decoder.
    interaction: likewise what two latents shifted together add to what each does alone, (z, latent, other latent, shift
    (N, S), shift of the other) -> (N, S, P); None where no two latents interact.

    Weights, codes and scales are small multiples of powers of two, so that float32 holds them exactly.
    """

    name: str
    shows: str
    decoder: nn.Module
    z: Tensor
    scale: Tensor
    groups: Groups
    change: Callable[[np.ndarray, int, np.ndarray], np.ndarray]
    effect: str = "l1"
    interaction: Callable[[np.ndarray, int, int, np.ndarray, np.ndarray], np.ndarray] | None = None

    def effects(self, grid: str | np.ndarray | Tensor = "posterior", effect: str | None = None) -> np.ndarray:
        """Mean effect over samples: (latent, step, group) float64.

        grid: "fixed" (shifts of .6, ..., 3 to both sides), "posterior" (.5, ..., 2 times `scale`), shifts (S,) or
        (L, S), or shifts (N, L, S) of each sample, as `resample` makes. effect: l1, mse, rms, tv, signed or None, this
        circuit's own. Raises InputError for others.
        """
        shifts, _ = self._steps(grid)
        reduction = self._reduction(effect)
        labels = self.groups.labels.cpu().numpy()
        z = self.z.detach().double().cpu().numpy()
        out = np.empty((shifts.shape[1], shifts.shape[2], len(self.groups)))
        for i in range(shifts.shape[1]):
            dy = self.change(z, i, shifts[:, i])
            for g in range(len(self.groups)):
                out[i, :, g] = reduction(dy[..., labels == g]).mean(0)
        return out

    def interactions(
        self, pairs: Sequence[tuple[int, int]], grid: str | np.ndarray | Tensor = "posterior", effect: str | None = None
    ) -> np.ndarray:
        """Mean effects over samples of pairs shifted together, (pair, measure, step, group) float64.

        Measures: joint, of both shifts; additive, of the sum of what each does alone; interaction, of the difference of
        the two. Arguments as in `effects`.
        """
        shifts, _ = self._steps(grid)
        reduction = self._reduction(effect)
        labels = self.groups.labels.cpu().numpy()
        z = self.z.detach().double().cpu().numpy()
        out = np.empty((len(pairs), 3, shifts.shape[2], len(self.groups)))
        for n, (i, j) in enumerate(pairs):
            alone = self.change(z, i, shifts[:, i]) + self.change(z, j, shifts[:, j])
            more = 0 * alone
            if self.interaction is not None:
                more = self.interaction(z, i, j, shifts[:, i], shifts[:, j])
            for m, dy in enumerate((alone + more, alone, more)):
                for g in range(len(self.groups)):
                    out[n, m, :, g] = reduction(dy[..., labels == g]).mean(0)
        return out

    def strengths(self, grid: str | np.ndarray | Tensor = "posterior", effect: str | None = None) -> np.ndarray:
        """E[i, g], mean over samples and steps of effect / |step|: (latent, group) float64.

        |step| is the shift itself, in units of `scale` for "posterior"; shifts (N, L, S) are not divided, as resampling
        is not.
        """
        _, sizes = self._steps(grid)
        return (self.effects(grid, effect) / sizes[..., None]).mean(1)

    def ces(self, grid: str | np.ndarray | Tensor = "posterior", effect: str | None = None) -> np.ndarray:
        """Causal effect strength of each latent, (L,): `strengths` averaged over groups by size, for "tv" equally."""
        if (effect or self.effect) in ("mse", "signed"):
            raise InputError(f"effect: CES is defined for l1, rms and tv, not for {effect!r}")
        sizes = self.groups.sizes.double().cpu().numpy()
        weights = np.ones_like(sizes) if (effect or self.effect) == "tv" else sizes
        return self.strengths(grid, effect) @ weights / weights.sum()

    def specificity(self, grid: str | np.ndarray | Tensor = "posterior", effect: str | None = None) -> np.ndarray:
        """1 - H(p_i) / log G of each latent, (L,), p_i its share of `strengths` in each group; NaN without effect."""
        if len(self.groups) < 2:
            raise InputError("groups: specificity needs at least two groups")
        values = []
        for row in self.strengths(grid, effect):
            p = row[row > 0] / row.sum() if row.any() else np.array([np.nan])
            values.append(1 + float((p * np.log(p)).sum()) / np.log(len(self.groups)))
        return np.array(values)

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Planted:
        """The same circuit in `dtype` and on `device`, decoder copied. The closed form stays in float64."""
        return replace(
            self,
            decoder=copy.deepcopy(self.decoder).to(device, dtype),
            z=self.z.to(device, dtype),
            scale=self.scale.to(device, dtype),
            groups=self.groups if device is None else self.groups.to(device),
        )

    def _reduction(self, effect: str | None) -> Callable[[np.ndarray], np.ndarray]:
        if (effect or self.effect) not in REDUCTIONS:
            raise InputError(f"effect: expected one of {', '.join(REDUCTIONS)}, got {effect!r}")
        return REDUCTIONS[effect or self.effect]

    def _steps(self, grid: str | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Shifts (N, L, S) and the step sizes (L, S) that strengths divide by."""
        samples, latents = self.z.shape
        if isinstance(grid, str):
            if grid not in ("fixed", "posterior"):
                raise InputError(f"grid: expected 'fixed', 'posterior' or an array of shifts, got {grid!r}")
            scale = self.scale.detach().double().cpu().numpy()[:, None]
            steps, shifts = (FIXED, FIXED) if grid == "fixed" else (POSTERIOR, POSTERIOR * scale)
            sizes = np.abs(np.broadcast_to(steps, (latents, len(steps))))
        else:
            shifts = np.asarray(grid.detach().cpu() if isinstance(grid, Tensor) else grid, dtype=np.float64)
            if shifts.ndim not in (1, 2, 3) or shifts.shape[-1] == 0:
                raise InputError(f"grid: expected shifts (S,), (L, S) or (N, L, S), got shape {shifts.shape}")
            if shifts.ndim == 3:
                sizes = np.ones((latents, shifts.shape[2]))
            else:
                sizes = np.abs(np.broadcast_to(shifts, (latents, shifts.shape[-1])))
        if (sizes == 0).any():
            raise InputError("grid: a step of zero has no strength")
        return np.broadcast_to(shifts, (samples, *sizes.shape)), sizes


def dense(weight: np.ndarray, bias: np.ndarray | None = None) -> nn.Linear:
    """nn.Linear of the given weight (out, in) and bias (out,), float64."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    plant(layer, weight, np.zeros(len(weight)) if bias is None else bias)
    return layer


def plant(layer: nn.Module, weight: np.ndarray, bias: np.ndarray) -> None:
    """Set the weight and bias of `layer`."""
    layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})


def eighths(seed: int, *shape: int, span: int = 2) -> np.ndarray:
    """Random multiples of 1/8 in [-span, span]."""
    return np.random.default_rng(seed).integers(-8 * span, 8 * span + 1, shape) / 8


def rise(x: np.ndarray, d: np.ndarray, kink: np.ndarray | float = 0.0) -> np.ndarray:
    """How far max(x - kink, 0) moves when x moves by d, piece by piece."""
    start, end = x - kink, x + d - kink
    right, left = (start >= 0) & (end >= 0), (start <= 0) & (end <= 0)
    return np.select([right, left, end > 0], [d + 0 * start, 0 * start, end], default=-start)
