"""Planted encoders: inputs made from factors by a fixed rule, and units whose answer to each factor is known."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from .circuit import dense, eighths, plant


@dataclass(frozen=True)
class PlantedEncoder:
    """A network whose units answer to known factors of its inputs.

    name, shows: what it is called and, in one sentence, what it shows. encoder: a module (N, ...) -> units, float64.
    base: (N, ...) float64 inputs, every combination of the factors' levels once. variants: by name, the same inputs
    with one thing changed: a factor moved on to its next level (the last to the first), or a rectangle of the image set
    to 0. sites: the submodules whose units count, in this order; unit: "channel" or "element".
    effects: (variant, unit) float64, the closed form of the mean over inputs and positions of |change of the unit|, in
    sd of the unit over the base inputs and positions; 0 for a unit that never varies, as none of those here ever moves.
    It is arithmetic on the planted weights and levels and never runs the encoder.
    target: (unit,) the variant that each unit was planted for, -1 for none or several.

    Weights and inputs are small multiples of powers of two, so that float32 holds them exactly.
    """

    name: str
    shows: str
    encoder: nn.Module
    base: Tensor
    variants: dict[str, Tensor]
    sites: tuple[str, ...]
    effects: np.ndarray
    target: np.ndarray
    unit: str = "channel"

    def polysemanticity(self) -> np.ndarray:
        """exp(H) of each unit's shares of effect among the variants, (U,) in [1, K]; NaN for a unit nothing moves."""
        values = []
        for column in self.effects.T:
            p = column[column > 0] / column.sum() if column.any() else np.array([np.nan])
            values.append(np.exp(-(p * np.log(p)).sum()))
        return np.array(values)

    def isolation(self) -> np.ndarray:
        """Share of each variant's effect that falls on units planted for something else, (K,) in [0, 1]."""
        off = [row[self.target != k].sum() for k, row in enumerate(self.effects)]
        return np.array(off) / self.effects.sum(1)

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> PlantedEncoder:
        """The same circuit in `dtype` and on `device`, encoder copied. The closed form stays in float64."""
        return replace(
            self,
            encoder=copy.deepcopy(self.encoder).to(device, dtype),
            base=self.base.to(device, dtype),
            variants={name: x.to(device, dtype) for name, x in self.variants.items()},
        )


def all() -> list[PlantedEncoder]:
    """Every planted encoder, made anew, float64 on the CPU."""
    return [
        monosemantic(),
        polysemantic(),
        leak(),
        dead(),
        relu(),
        logic(),
        conv_regions(),
        conv_parts(),
        conv_elements(),
    ]


# --- linear: x = A v, units W x + b = M v + b with M = W A -----------------------------------------------------------

BINARY = np.array([-1.0, 1.0])
A = np.array([[1.0, 1, 0], [0, 1, 1], [0, 0, 1]])  # what the factors do to the inputs
A_INVERSE = np.array([[1.0, -1, 1], [0, 1, -1], [0, 0, 1]])


def monosemantic() -> PlantedEncoder:
    """Three factors of 2, 3 and 4 levels; unit u is a multiple of factor u."""
    return _linear(
        "monosemantic",
        "Each factor reaches several inputs, and each unit answers to one factor: polysemanticity 1, isolation 0.",
        [np.array([0.0, 1]), np.array([-1.0, 0, 1]), np.array([-1.5, -0.5, 0.5, 1.5])],
        np.diag([2.0, -0.25, 8.0]) @ A_INVERSE,
        np.array([0.0, 3.0, -64.0]),
        target=[0, 1, 2],
    )


def polysemantic() -> PlantedEncoder:
    """Three factors of 2 levels; rows of M: all three alike, two alike, two as 3 to 1, one."""
    return _linear(
        "polysemantic",
        "Units that answer to three factors alike, to two, to two unequally and to one: 3, 2, 1.75 and 1 factors.",
        [BINARY] * 3,
        np.array([[1.0, 1, 1], [1, -1, 1], [0, 0.5, -0.5], [3, 0, 1], [0, 4, 0]]) @ A_INVERSE,
        np.zeros(5),
        target=[-1, -1, -1, -1, 1],
    )


def leak() -> PlantedEncoder:
    """Unit u is factor u and a quarter of the next: a fifth of what each factor does falls on another's unit."""
    return _linear(
        "leak",
        "A fifth of each factor's effect leaks to another factor's unit: isolation 0.2.",
        [BINARY] * 3,
        np.array([[1.0, 0.25, 0], [0, 2, 0.5], [-1, 0, 4]]) @ A_INVERSE,
        np.array([1.0, 0, 0]),
        target=[0, 1, 2],
    )


def dead() -> PlantedEncoder:
    """Units without weights, with weights that cancel under the rule, and a live one."""
    doubled = np.array([[1.0, 0], [1, 0], [0, 1]])  # the first two inputs always agree
    return _linear(
        "dead",
        "Nothing moves a unit without weights, nor one that takes the difference of two inputs that always agree: "
        "effect 0 and no polysemanticity, not 0 or 1.",
        [BINARY, np.array([0.0, 1, 2])],
        np.array([[0.0, 0, 0], [2, -2, 0], [0.5, 0.5, 1]]),
        np.array([0.625, 0.25, 0.0]),
        target=[-1, -1, -1],
        rule=doubled,
    )


def _linear(
    name: str,
    shows: str,
    levels: Sequence[np.ndarray],
    weight: np.ndarray,
    bias: np.ndarray,
    target: Sequence[int],
    rule: np.ndarray = A,
) -> PlantedEncoder:
    """Factors are independent over the grid, so Var(M v) = sum_k M_k^2 Var(v_k), and factor k moves by |M_k| |dv_k|."""
    mixed = weight @ rule
    variance = mixed**2 @ np.array([level.var() for level in levels])
    moves = np.array([_step(level) for level in levels])[:, None] * np.abs(mixed.T)
    return _planted(
        name,
        shows,
        nn.Sequential(OrderedDict(units=dense(weight, bias))),
        levels,
        lambda v: v @ rule.T,
        ("units",),
        moves / np.sqrt(np.where(variance > 0, variance, 1)),
        target,
    )


# --- ReLU ------------------------------------------------------------------------------------------------------------


def relu() -> PlantedEncoder:
    """Each unit follows one factor, through max(w v + b, 0): 2 v_0; -v_1; v_0 + 8, always on; v_0 - 8, never."""
    levels = [np.array([-1.5, -0.5, 0.5, 1.5]), np.array([-1.0, 0, 1])]
    factors, slopes, bias = [0, 1, 0, 0], np.array([2.0, -1, 1, 1]), np.array([0.0, 0, 8, -8])
    rule, back = np.array([[1.0, 1], [0, 1]]), np.array([[1.0, -1], [0, 1]])
    effects = np.zeros((2, 8))
    for u, k in enumerate(factors):
        line = slopes[u] * levels[k] + bias[u]
        rectified = np.where(line > 0, line, 0.0)
        effects[k, u] = _step(line) / line.std()
        effects[k, 4 + u] = _step(rectified) / rectified.std() if rectified.any() else 0.0
    return _planted(
        "relu",
        "A unit that is off for half of the inputs, one for two thirds, one never and one always, before and after "
        "a ReLU that overwrites what it is given.",
        nn.Sequential(
            OrderedDict(linear=dense(slopes[:, None] * np.eye(2)[factors] @ back, bias), relu=nn.ReLU(inplace=True))
        ),
        levels,
        lambda v: v @ rule.T,
        ("linear", "relu"),
        effects,
        [0, 1, 0, 0, 0, 1, 0, -1],
    )


def logic() -> PlantedEncoder:
    """Bits a, b, c; with h = max(a + b, 0) and g = max(a + b - 1, 0): AND = g, OR = h - g, XOR = h - 2 g, and c.

    AND and OR change with either bit in half of the inputs and have sd sqrt(3)/4; XOR and c always, with sd 1/2.
    """
    bits = np.array([0.0, 1])
    half = 0.5 / (np.sqrt(3) / 4)
    return _planted(
        "logic",
        "AND, OR and XOR of two bits: XOR is correlated with neither, and each of them moves it always.",
        nn.Sequential(
            OrderedDict(
                hidden=dense(np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]) @ A_INVERSE, np.array([0.0, -1, 0])),
                relu=nn.ReLU(),
                gates=dense(np.array([[0.0, 1, 0], [1, -1, 0], [1, -2, 0], [0, 0, 1]])),
            )
        ),
        [bits] * 3,
        lambda v: v @ A.T,
        ("gates",),
        np.array([[half, half, 2, 0], [half, half, 2, 0], [0, 0, 0, 2]]),
        [-1, -1, -1, 2],
    )


# --- convolutional: images in three bands of rows, and one channel that sees each band -------------------------------

BANDS = (slice(0, 2), slice(2, 5), slice(5, 9))
HEIGHT, WIDTH, POSITIONS = 9, 10, 8
BRIGHTNESS = np.array([0.25, 0.5, 1.0])
TEXTURE = np.abs(eighths(11, 2, HEIGHT, WIDTH, span=1))
KERNELS = eighths(12, len(BANDS), 2, HEIGHT, 3, span=1) * np.stack(
    [np.isin(np.arange(HEIGHT), np.arange(HEIGHT)[band])[None, :, None] for band in BANDS]
)
# rows and columns of each rectangle that is set to 0
BAND_MASKS = {f"band {c}": (band, slice(0, WIDTH)) for c, band in enumerate(BANDS)}
PART_MASKS = {
    "upper two bands": (slice(0, 5), slice(0, WIDTH)),
    "left of band 1": (BANDS[1], slice(0, 4)),
    "a row of band 2": (slice(6, 7), slice(0, WIDTH)),
    "a corner": (slice(7, 9), slice(8, 10)),
}


def conv_regions() -> PlantedEncoder:
    """Channel c at position j is v_c R_c[j] + b_c: brightness of the band times what the kernel makes of its texture.

    Without the band it is b_c. So a mask moves it by mean |v_c| mean_j |R_c[j]|, and its variance over inputs and
    positions is E[v_c^2] E[R_c^2] - E[v_c]^2 E[R_c]^2.
    """
    effects = np.stack([_of_channels(BRIGHTNESS.mean(), _response(*mask)) for mask in BAND_MASKS.values()])
    return _conv(
        "conv_regions",
        "One channel sees one band of the image: a mask of a band moves exactly its channel.",
        BAND_MASKS,
        [],
        ("conv",),
        effects,
        [0, 1, 2],
    )


def conv_parts() -> PlantedEncoder:
    """Masks of parts take away the part's response; a factor moves v_c; the mean over positions is a second site."""
    whole = _response(slice(0, HEIGHT), slice(0, WIDTH))
    moves = [(np.full(3, BRIGHTNESS.mean()), _response(*mask)) for mask in PART_MASKS.values()]
    moves += [(_step(BRIGHTNESS) * np.eye(3)[c], whole) for c in range(3)]
    pooled = [v * np.abs(r.mean(1)) / (np.abs(whole.mean(1)) * BRIGHTNESS.std()) for v, r in moves]
    effects = np.stack([np.concatenate([_of_channels(v, r), pool]) for (v, r), pool in zip(moves, pooled, strict=True)])
    return _conv(
        "conv_parts",
        "Masks of two bands and of parts of one, and the brightness of each band, on channels and on their means: "
        "a mask moves only the positions that see it.",
        PART_MASKS,
        range(3),
        ("conv", "pool"),
        effects,
        [4, 5, 6, 4, 5, 6],
    )


def conv_elements() -> PlantedEncoder:
    """Element (c, j) is v_c R_c[j] + b_c: each position a unit, in its own sd |R_c[j]| sd(v_c)."""
    whole = _response(slice(0, HEIGHT), slice(0, WIDTH))
    sd = np.abs(whole) * BRIGHTNESS.std()
    masks = BAND_MASKS | PART_MASKS
    effects = np.stack([(BRIGHTNESS.mean() * np.abs(_response(*mask)) / sd).ravel() for mask in masks.values()])
    return _conv(
        "conv_elements",
        "The same masks with every position of a channel a unit of its own.",
        masks,
        [],
        ("conv",),
        effects,
        np.repeat([0, 1, 2], POSITIONS),
        unit="element",
    )


def _response(rows: slice, columns: slice) -> np.ndarray:
    """What the kernels make of this rectangle of the texture: (channel, position)."""
    response = np.zeros((len(BANDS), POSITIONS))
    for c, j in np.ndindex(response.shape):
        for plane, r, q in np.ndindex(KERNELS.shape[1:]):
            if rows.start <= r < rows.stop and columns.start <= j + q < columns.stop:
                response[c, j] += KERNELS[c, plane, r, q] * TEXTURE[plane, r, j + q]
    return response


def _of_channels(brightness: np.ndarray | float, response: np.ndarray) -> np.ndarray:
    """Mean |change| of each channel, brightness (3,) or one number times |response|, in sd of the channel: (3,)."""
    whole = _response(slice(0, HEIGHT), slice(0, WIDTH))
    variance = (BRIGHTNESS**2).mean() * (whole**2).mean(1) - (BRIGHTNESS.mean() * whole.mean(1)) ** 2
    return brightness * np.abs(response).mean(1) / np.sqrt(variance)


def _conv(
    name: str,
    shows: str,
    masks: dict[str, tuple[slice, slice]],
    factors: Sequence[int],
    sites: tuple[str, ...],
    effects: np.ndarray,
    target: Sequence[int] | np.ndarray,
    unit: str = "channel",
) -> PlantedEncoder:
    def image(v: np.ndarray) -> np.ndarray:
        x = np.empty((len(v), *TEXTURE.shape))
        for c, band in enumerate(BANDS):
            x[:, :, band] = v[:, c, None, None, None] * TEXTURE[:, band]
        return x

    conv = nn.Conv2d(2, len(BANDS), (HEIGHT, 3), dtype=torch.float64)
    plant(conv, KERNELS, np.array([0.25, -8.0, 0.0]))
    encoder = nn.Sequential(OrderedDict(conv=conv, pool=nn.AdaptiveAvgPool2d(1)))
    circuit = _planted(name, shows, encoder, [BRIGHTNESS] * 3, image, sites, effects, target, unit)
    variants = {}
    for mask, (rows, columns) in masks.items():
        variants[mask] = circuit.base.clone()
        variants[mask][:, :, rows, columns] = 0
    return replace(circuit, variants=variants | {f"factor {k}": circuit.variants[f"factor {k}"] for k in factors})


# --- shared ----------------------------------------------------------------------------------------------------------


def _step(values: np.ndarray) -> float:
    """Mean |change| from each level to the next, from the last to the first."""
    return float(np.abs(np.roll(values, -1) - values).mean())


def _planted(name, shows, encoder, levels, rule, sites, effects, target, unit="channel") -> PlantedEncoder:
    """The circuit over all combinations of the levels, each factor in turn moved to its next level."""
    grid = np.array(list(itertools.product(*(range(len(level)) for level in levels))))

    def inputs(indices: np.ndarray) -> Tensor:
        v = np.stack([level[indices[:, k]] for k, level in enumerate(levels)], 1)
        return torch.from_numpy(rule(v))

    variants = {}
    for k, level in enumerate(levels):
        moved = grid.copy()
        moved[:, k] = (moved[:, k] + 1) % len(level)
        variants[f"factor {k}"] = inputs(moved)
    return PlantedEncoder(
        f"inputs_{name}", shows, encoder, inputs(grid), variants, sites, effects, np.asarray(target), unit
    )
