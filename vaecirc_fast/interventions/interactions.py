"""Pairs of latents moved together: how far their joint effect differs from the sum of what each does alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval
from . import grids
from .accumulate import Accumulator, Axes
from .engine import Calls, check_options, most_bytes, slices
from .latents import check_codes, intervened

if TYPE_CHECKING:
    import pandas

EFFECTS = ("l1", "mse", "rms", "tv", "signed")
MEASURES = ("joint", "additive", "interaction")


@dataclass(frozen=True)
class Interactions:
    """Effects of pairs of latents, both moved by their own step s of a grid, means over samples.

    tensor: (pair, measure, step, group); measures: "joint", the effect of y_ij against y_0; "additive", of
    y_i + y_j - y_0 against y_0; "interaction", of y_ij against y_i + y_j - y_0. pairs: the latents (i, j) of each pair.
    singles: (latent, step, group), the effect of each latent of a pair alone, in the order of `latents`.
    share: (pair, step, group), interaction / joint, NaN where there is no joint effect.
    replicates: (replicate, pair, measure, group) of the mean over steps, samples resampled; None if not asked for.
    group_weights: (group,) weights by which groups average to the whole output. `dims` and `coords` label the tensor.
    """

    tensor: Tensor
    pairs: tuple[tuple[int, int], ...]
    latents: tuple[int, ...]
    singles: Tensor
    coords: Mapping[str, list]
    effect: str
    grid: str
    samples: int
    group_weights: Tensor
    replicates: Tensor | None = None
    plan: str = field(default="", repr=False)
    dims: tuple[str, ...] = ("pair", "measure", "step", "group")

    @property
    def share(self) -> Tensor:
        """(pair, step, group): interaction / joint; NaN where there is no joint effect."""
        return _share(self.tensor.movedim(1, 0))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per pair, step and group: first, second, step, group, joint, additive, interaction, share."""
        import pandas

        names, steps, groups = list(self.pairs), self.coords["step"], self.coords["group"]
        rows = [(i, j, step, group) for (i, j), step, group in itertools.product(names, steps, groups)]
        table = pandas.DataFrame(rows, columns=["first", "second", "step", "group"])
        for name, values in zip(MEASURES, self.tensor.cpu().movedim(1, 0), strict=True):
            table[name] = values.reshape(-1).numpy()
        table["share"] = self.share.cpu().reshape(-1).numpy()
        return table

    def table(self, level: float = 0.95, by_group: bool = False) -> pandas.DataFrame:
        """Pairs by their interaction, the largest (of "signed": in magnitude) first: means over steps, with intervals.

        Columns: first, second, with `by_group` group, joint, additive, interaction, low, high (of the interaction),
        share (the mean interaction over the mean joint effect), share_low, share_high. Without `by_group` groups
        average to the whole output. Intervals are Poisson bootstraps over samples (a jackknife with t below 8).
        """
        import pandas

        point = self.tensor.double().cpu().mean(2)[None]  # (1, pair, measure, group)
        drawn = point[:0] if self.replicates is None else self.replicates.double().cpu()
        names = self.coords["group"]
        if not by_group:
            weights = self.group_weights.double().cpu()
            point, drawn, names = (point @ weights)[..., None], (drawn @ weights)[..., None], ["output"]
        rows = []
        for n, (i, j) in enumerate(self.pairs):
            for g, group in enumerate(names):
                joint, additive, interaction = point[0, n, :, g].tolist()
                share = float(_share(point[0, n, :, g]))
                bounds = [
                    resampled_interval(value, replicates.numpy(), self.samples, level)
                    for value, replicates in (
                        (interaction, drawn[:, n, 2, g]),
                        (share, _share(drawn[:, n, :, g].T)),
                    )
                ]
                rows.append((i, j, group, joint, additive, interaction, *bounds[0], share, *bounds[1]))
        columns = ["first", "second", "group", *MEASURES, "low", "high", "share", "share_low", "share_high"]
        table = pandas.DataFrame(rows, columns=columns)
        table = table.sort_values("interaction", key=abs, ascending=False, kind="stable", ignore_index=True)
        return table if by_group else table.drop(columns="group")

    def second_order(self) -> pandas.DataFrame:
        """(latent, latent): the interaction of each pair, on the diagonal the effect of the latent alone; symmetric.

        Means over steps, groups averaged to the whole output; NaN for pairs that were not asked for.
        """
        import pandas

        weights = self.group_weights.double().cpu()
        place = {latent: n for n, latent in enumerate(self.latents)}
        values = torch.full((len(place), len(place)), torch.nan, dtype=torch.float64)
        values.diagonal().copy_(self.singles.double().cpu().mean(1) @ weights)
        for (i, j), value in zip(self.pairs, self.tensor[:, 2].double().cpu().mean(1) @ weights, strict=True):
            values[place[i], place[j]] = values[place[j], place[i]] = value
        return pandas.DataFrame(values.numpy(), index=list(self.latents), columns=list(self.latents))


@torch.no_grad()
def latent_interactions(
    decoder: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    grid: str | Tensor = "fixed",
    scale: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    effect: str = "l1",
    groups: Groups | None = None,
    on: str = "output",
    draws: int = grids.DRAWS,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> Interactions:
    """Effects of do(z_i := ..., z_j := ...) on pairs of latents, beside those of each alone, at every step of a grid.

    pairs: (i, j) of different latents; all i < j by default. At step s both take the value that the grid has for them
    at s; under "resample" that is one donor's. effect: "l1", "mse", "rms", "tv" or "signed". The rest as in
    `latent_sweep`. An output under one latent is decoded once and serves all its pairs; where a latent's step is 0 the
    pair is the other one alone and is not decoded. Memory does not grow with N; it does with the number of pairs times
    (groups + steps) times replicates.

    Returns Interactions. InputError as in `latent_sweep`, for pairs that repeat, are out of range or of one latent, and
    for fewer than two latents.
    """
    check_codes(z)
    if effect not in EFFECTS:
        raise InputError(f"effect: latent_interactions knows {', '.join(EFFECTS)}, not {effect!r}")
    check_options(effect=effect, groups=groups, reduce="mean", on=on, replicates=replicates, tile=tile, draws=draws)
    chosen = _checked(pairs, z.shape[1])
    spec = grids.make(grid, z, scale, seed, draws)
    started = time.perf_counter()
    latents = sorted({latent for pair in chosen for latent in pair})
    used = torch.tensor(latents)
    place = {latent: n for n, latent in enumerate(latents)}
    first, second = torch.tensor([[place[i], place[j]] for i, j in chosen]).T
    moves = spec.decoded.cpu()[used]  # (latents, S)
    count, steps = moves.shape
    labels = [*map(str, latents), *[f"{i} and {j}" for i, j in chosen] * len(MEASURES)]
    axes = Axes(
        spec.name, "latents", "step", labels, spec.coordinates, torch.ones(len(labels), steps, dtype=torch.bool)
    )
    singles = 0
    call = Calls(decoder, z, effect, on, tile)
    groups = call.partition(groups)
    with call:
        accumulator = Accumulator(
            axes,
            len(z),
            groups,
            effect=effect,
            reduce="mean",
            replicates=replicates,
            seed=seed,
            dtype=call.dtype,
            device=z.device,
        )

        def outputs(part: slice, *moved: Tensor, step: int) -> Tensor:
            """Outputs (B, J, P) where for each j the latents moved[...][j] take their values of this step."""
            batch = intervened(z, spec, part, [used[m] for m in moved], torch.full_like(moved[0], step))
            return _wide(call(batch.flatten(0, 1))).unflatten(0, batch.shape[:2])

        fitting = most_bytes(z.device) // (8 * len(labels) * steps * len(groups))
        for part in slices(len(z), max(1, min(call.rows // count, fitting, len(z)))):
            base = _wide(call(z[part]))
            wide = max(1, call.rows // len(base))
            effects = base.new_zeros(len(base), len(labels), steps, len(groups), dtype=accumulator.dtype)
            for s in range(steps):
                alone = base[:, None].repeat(1, count, 1)
                for some in _chunks(moves[:, s], wide):
                    alone[:, some.to(z.device)] = outputs(part, some, step=s)
                    singles += len(base) * len(some)
                effects[:, :count, s] = call.effects(base, alone, groups)
                of_pairs = effects[:, count:, s].unflatten(1, (len(MEASURES), len(chosen)))
                # what a pair does where one of the two does not move; overwritten where both do
                of_pairs[:, :2] = (effects[:, first, s] + effects[:, second, s])[:, None]
                for some in _chunks(moves[first, s] & moves[second, s], wide):
                    i, j = first[some], second[some]
                    joint = outputs(part, i, j, step=s)
                    additive = alone[:, i].add_(alone[:, j]).sub_(base[:, None])
                    of_pairs[:, 0, some] = call.effects(base, joint, groups)
                    of_pairs[:, 1, some] = call.effects(base, additive, groups)
                    more = call.effects(additive.flatten(0, 1), joint.flatten(0, 1)[:, None], groups)
                    of_pairs[:, 2, some] = more.view(len(base), len(some), -1)
            accumulator.add(part, effects.flatten(1, 2))
    seconds = time.perf_counter() - started
    plan = (
        f"generic engine: {call.decodes} decodes in tiles of {call.rows} rows, {singles} of them of one latent, each "
        f"decoded once for all its pairs; {1e6 * seconds / call.decodes:.1f} us a decode"
    )
    E = accumulator.result(plan)
    shape = (len(MEASURES), len(chosen))
    return Interactions(
        E.tensor[count:].unflatten(0, shape).transpose(0, 1).contiguous(),
        tuple(chosen),
        tuple(latents),
        E.tensor[:count],
        {"pair": list(chosen), "measure": list(MEASURES), "step": E.coords["step"], "group": E.coords["group"]},
        effect,
        spec.name,
        len(z),
        E.group_weights,
        None if E.replicates is None else E.replicates[:, count:].unflatten(1, shape).transpose(1, 2).contiguous(),
        plan,
    )


def _chunks(chosen: Tensor, size: int) -> Sequence[Tensor]:
    """The indices of what is chosen, at most `size` at a time."""
    return [part for part in chosen.nonzero()[:, 0].split(size) if len(part)]


def _share(measures: Tensor) -> Tensor:
    """interaction / joint of (measure, ...); NaN where there is no joint effect."""
    joint, _, interaction = measures
    return torch.where(joint != 0, interaction / torch.where(joint != 0, joint, 1), torch.nan)


def _wide(y: Tensor) -> Tensor:
    """Outputs of 16 bits as float32: their sums would round."""
    return y.float() if y.dtype in (torch.bfloat16, torch.float16) else y


def _checked(pairs: Sequence[tuple[int, int]] | None, latents: int) -> list[tuple[int, int]]:
    if latents < 2:
        raise InputError(f"z: pairs need at least 2 latents, got {latents}")
    if pairs is None:
        return list(itertools.combinations(range(latents), 2))
    found: list[tuple[int, int]] = []
    try:
        for i, j in pairs:
            i, j = int(i), int(j)
            if not (0 <= i < latents and 0 <= j < latents) or i == j:
                raise InputError(f"pairs: expected two different latents of 0..{latents - 1}, got ({i}, {j})")
            found.append((i, j))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"pairs: expected a sequence of pairs (i, j) of latents ({error})") from error
    twice = [pair for n, pair in enumerate(found) if set(pair) in map(set, found[:n])]
    if not found or twice:
        raise InputError(f"pairs: expected at least one, none twice, got {f'{twice[0]} again' if twice else 'none'}")
    return found
