"""Planted codebooks: nearest codes known by hand, and a decoder that paints a patch for each code."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..groups import Groups, cells
from .circuit import POSTERIOR, REDUCTIONS, eighths, plant, rise

# Codes lie on a grid of levels, so that each channel is quantised alone: the nearest level, ties to the lower one.
LEVELS = (np.array([0.0, 1, 3]), np.array([0.0, 2]))
CODEBOOK = np.array([[a, b] for a in LEVELS[0] for b in LEVELS[1]])
# The other codes by distance, ties to the lowest index; squared distances in the comments.
NEIGHBOURS = np.array(
    [
        [2, 1, 3, 4, 5],  # (0, 0): 1 4 5 9 13
        [3, 0, 2, 5, 4],  # (0, 2): 1 4 5 9 13
        [0, 3, 4, 1, 5],  # (1, 0): 1 4 4 5 8
        [1, 2, 5, 0, 4],  # (1, 2): 1 4 4 5 8
        [2, 5, 3, 0, 1],  # (3, 0): 4 4 5 9 13, where (1, 2) is 8
        [3, 4, 2, 1, 0],  # (3, 2): 4 4 8 9 13
    ]
)
PATCHES = eighths(13, 2, 2, 2)  # what each channel adds to the 2 x 2 pixels of its position
BIAS = 0.125
SIDE = 2  # positions a side


@dataclass(frozen=True)
class PlantedCodes:
    """A quantised latent whose causal effects are known.

    name, shows: what it is called and, in one sentence, what it shows. decoder: a module (N, D, H, W) -> (N, 1, 2 H,
    2 W), float64. codebook (K, D), indices (N, H, W) int64, z_e and z_q (N, D, H, W). groups: a cell for each position,
    in their order. The closed forms are written out from the planted weights in numpy; they never run the decoder, nor
    search for a nearest code.

    Weights and codes are small multiples of powers of two, so that float32 holds them exactly.
    """

    name: str
    shows: str
    decoder: nn.Module
    codebook: Tensor
    indices: Tensor
    z_e: Tensor
    z_q: Tensor
    groups: Groups
    effect: str = "l1"

    def effects(self, grid: str | np.ndarray, draws: int = 4, effect: str | None = None) -> np.ndarray:
        """Mean effect over samples: (position, draw, group) or, for "z_e" and "z_q", (channel, step, group) float64.

        grid: "code_neighbour", the 1st to `draws`-th; "code_swap" where two codes are in use, so that every draw is the
        other one; codes (N, position, draw) that replace the present ones; "z_e" or "z_q", t = +-.5, ..., +-2 times the
        channel's standard deviation. effect: l1, mse, rms, tv, signed. Raises InputError for others.
        """
        if (effect or self.effect) not in REDUCTIONS:
            raise InputError(f"effect: expected one of {', '.join(REDUCTIONS)}, got {effect!r}")
        reduction = REDUCTIONS[effect or self.effect]
        z_e, z_q = (v.detach().double().cpu().numpy().reshape(len(v), v.shape[1], -1) for v in (self.z_e, self.z_q))
        if isinstance(grid, str) and grid in ("z_e", "z_q"):
            dy = np.stack([[_shifted(grid, z_e, z_q, c, t) for t in POSTERIOR] for c in range(z_e.shape[1])])
        else:
            dy = self._replaced(self._codes(grid, draws))
        return np.moveaxis(reduction(dy).mean(2), -1, 2)

    def ces(self, grid: str | np.ndarray, draws: int = 4, effect: str | None = None) -> np.ndarray:
        """Causal effect strength of each position or channel: the mean of `effects` over draws and equal groups, for
        "z_e" and "z_q" of effect / |t|."""
        effects = self.effects(grid, draws, effect).mean(-1)
        if isinstance(grid, str) and grid in ("z_e", "z_q"):
            effects = effects / np.abs(POSTERIOR)
        return effects.mean(1)

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> PlantedCodes:
        """The same circuit in `dtype` and on `device`, decoder copied. The closed form stays in float64."""
        return replace(
            self,
            decoder=copy.deepcopy(self.decoder).to(device, dtype),
            codebook=self.codebook.to(device, dtype),
            indices=self.indices.to(device),
            z_e=self.z_e.to(device, dtype),
            z_q=self.z_q.to(device, dtype),
            groups=self.groups if device is None else self.groups.to(device),
        )

    def _codes(self, grid: str | np.ndarray, draws: int) -> np.ndarray:
        present = self.indices.cpu().numpy().reshape(len(self.indices), -1)
        if not isinstance(grid, str):
            codes = np.asarray(grid)
            if codes.ndim != 3 or codes.shape[:2] != present.shape:
                raise InputError(f"grid: expected codes {(*present.shape, 'draws')}, got shape {codes.shape}")
            return codes
        if grid == "code_neighbour":
            return NEIGHBOURS[present][..., :draws]
        used = np.unique(present)
        if grid != "code_swap" or len(used) != 2:
            raise InputError(
                f"grid: expected code_neighbour, z_e, z_q, code_swap with 2 codes in use, or codes; got {grid!r}"
            )
        return np.repeat((used.sum() - present)[..., None], draws, 2)

    def _replaced(self, codes: np.ndarray) -> np.ndarray:
        """Changes (position, draw, N, group, pixel) where one position's code is replaced: in its own cell only."""
        present = self.indices.cpu().numpy().reshape(len(self.indices), -1)
        count = present.shape[1]
        dy = np.zeros((count, codes.shape[2], len(present), count, PATCHES[0].size))
        for p in range(count):
            dy[p, :, :, p] = np.swapaxes(_painted(codes[:, p]) - _painted(present[:, p])[:, None], 0, 1)
        return dy


def all() -> list[PlantedCodes]:
    """Every planted codebook, made anew, float64 on the CPU."""
    z_e = eighths(14, 9, 2, SIDE, SIDE) + np.array([1.5, 1.0])[:, None, None]
    pair = np.stack([np.where(z_e[:, 0] > 1.5, 3.0, 0.0), np.where(z_e[:, 0] > 1.5, 2.0, 0.0)], 1) + z_e[:, :1] / 16
    return [
        _planted(
            "patches", "All codes in use: a code paints its patch in the cell of its position and nowhere else.", z_e
        ),
        _planted(
            "pair",
            "Two codes in use, (0, 0) and (3, 2): a swap by usage is always the other one, however it is drawn.",
            pair,
        ),
    ]


def _painted(codes: np.ndarray) -> np.ndarray:
    """The patch of each code: max(sum over channels of value times pattern + bias, 0), (..., 4)."""
    return np.maximum(CODEBOOK[codes] @ PATCHES.reshape(2, -1) + BIAS, 0)


def _shifted(grid: str, z_e: np.ndarray, z_q: np.ndarray, channel: int, t: float) -> np.ndarray:
    """Changes (N, group, pixel) where a channel of z_e or z_q (N, D, position) moves by t sd."""
    patterns = PATCHES.reshape(2, -1)
    before = np.swapaxes(z_q, 1, 2) @ patterns + BIAS
    if grid == "z_q":
        moved = np.full_like(z_q[:, channel], t * z_q[:, channel].std())
    else:
        moved = _level(z_e[:, channel] + t * z_e[:, channel].std(), channel) - z_q[:, channel]
    return rise(before, moved[..., None] * patterns[channel])


def _level(values: np.ndarray, channel: int) -> np.ndarray:
    """The nearest level of a channel: the next one only above the middle."""
    levels = LEVELS[channel]
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values, side="left")]


def _planted(name: str, shows: str, z_e: np.ndarray) -> PlantedCodes:
    z_q = np.stack([_level(z_e[:, c], c) for c in range(2)], 1)
    index = [np.searchsorted(levels, z_q[:, c]) for c, levels in enumerate(LEVELS)]
    ct = nn.ConvTranspose2d(2, 1, 2, stride=2, dtype=torch.float64)
    plant(ct, PATCHES[:, None], np.array([BIAS]))
    return PlantedCodes(
        name=f"codebook_{name}",
        shows=shows,
        decoder=nn.Sequential(OrderedDict(ct=ct, relu=nn.ReLU())),
        codebook=torch.from_numpy(CODEBOOK.copy()),
        indices=torch.from_numpy(index[0] * len(LEVELS[1]) + index[1]),
        z_e=torch.from_numpy(z_e),
        z_q=torch.from_numpy(z_q),
        groups=cells(2 * SIDE, 2 * SIDE, 2),
    )
