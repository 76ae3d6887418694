"""Circuit discovery: the few units whose joint patch recovers what tells x_source's output from x_base's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..groups import Groups, from_labels, whole
from ..metrics.causal import REPLICATES
from ..metrics.statistics import FEW, Estimate, resampled_interval, resampling_weights
from .circuits import Circuit, Edge, Motifs
from .forcing import Pairs
from .joint import Joint, Unit, candidates_of
from .patching import Readout, device_of, inputs_of, quiet
from .paths import DISTANCES
from .selection import is_pattern, parse, resolve

METHODS = ("greedy", "ranked", "eliminate")
HELD_OUT = 0.5  # share of the pairs that are, where there are enough
# Recoveries nearer than this are the same: sums of rounded numbers, in another order for another tile.
_TIES = {torch.float64: 1e-12}
_TIE = 1e-6

Target = int | str | Callable[[Any], Tensor] | None


@torch.no_grad()
def discover(
    module: nn.Module,
    x_base: Any,
    x_source: Any,
    target: Target = None,
    *,
    sites: Sequence[str] = ("*",),
    unit: str = "channel",
    heads: int | None = None,
    faithfulness: float = 0.9,
    ablation: str = "resample",
    effect: str = "mse",
    groups: Groups | None = None,
    method: str = "greedy",
    readout: Readout | None = None,
    max_units: int | None = None,
    holdout: float | None = None,
    edges: bool = True,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> Circuit:
    """The smallest set of units found whose joint patch recovers `faithfulness` of what x_source does to the output.

    x_base receives, x_source gives, pair by pair, and should differ in one thing, a factor: tensors (N, ...) or tuples
    of arguments. Recovery of a set S of units is 1 - d(y_S, y_source) / d(y_base, y_source), means over pairs divided:
    y_S is the output where the units of S jointly take their values of x_source's run and all else is computed.

    target: what of the output counts: all of it (None), elements of it ("output[0, 4:8]"), its mean ("output.mean"), a
    group of `groups` by number or name, or a function of the output that gives a tensor (rows,) or (rows, ...). effect:
    d, "l1", "mse", "rms" or "tv". sites, unit, heads: the candidates, as in `patch_sweep`; of a pattern, sites that are
    the input or the output itself (no product or convolution before, or behind them) are left out. They may lie in
    several layers: a unit of the set has its source's value whatever comes before it. readout: chooses the tensor of an
    output that is none.

    method: "greedy" adds the unit of largest joint recovery until the goal is reached, then prunes; where no unit adds
    anything and yet all candidates jointly reach the goal (units that act only together), it starts from all of them
    and eliminates. "ranked" adds units in the order of what they recover alone, one round for all. "eliminate" starts
    from all candidates. Ties go to the unit that comes first. No unit can be left out of what is returned without
    falling below the goal; whether a smaller set exists is not known (it is as hard as set cover). max_units: the most
    to add.

    holdout: share of the pairs, drawn by `seed`, that the search does not see and faithfulness, completeness,
    minimality, gains and losses are measured on; half of them by default, none below 16 pairs. Intervals are a Poisson
    bootstrap over these pairs. edges: also the direct effects between the units. Memory grows neither with the number
    of candidates nor with that of pairs beyond the inputs.

    In eval mode, without gradients. InputError names the site or option and the remedy, and pairs whose outputs do not
    differ. Result: a Circuit, with `reached` False, and the number, where the goal was not.
    """
    _check(faithfulness, ablation, effect, method, max_units, holdout, replicates, seed)
    started = time.perf_counter()
    args, rows = inputs_of(x_base)
    source, source_rows = inputs_of(x_source)
    if source_rows != rows:
        raise InputError(f"x_source: has {source_rows} rows, x_base {rows}; they are pairs")
    searched, judged = _split(rows, holdout, seed)
    named = _named(module, sites)
    found, name = _measured(target, readout)

    def joint(numbers: tuple[int, ...]) -> tuple[Joint, list[str]]:
        pairs = Pairs(
            module,
            _rows(args, rows, numbers),
            _rows(source, rows, numbers),
            sites,
            unit=unit,
            heads=heads,
            readout=found,
            tile=tile,
        )
        candidates, left = candidates_of(pairs, named)
        if not candidates:
            raise InputError(
                f"sites: only the input or output itself matches ({', '.join(left)}); name sites to search"
            )
        return Joint(pairs, candidates, effect, _group(target, groups, pairs)), left

    with quiet(module, device_of(args)):
        search, left = joint(searched)
        chosen, how, recovery = _Search(search, faithfulness, max_units).run(method)
        judge = search if judged == searched else joint(judged)[0]
        judgement = _Judgement(judge, replicates, seed)
        facts = judgement.of(chosen)
        facts["edges"] = judgement.edges(chosen) if edges else ()
    seconds = time.perf_counter() - started
    label = name if groups is None or not isinstance(target, int | str) else f"group {_group_name(target, groups)}"
    return Circuit(
        sites=tuple(search.candidates[s].site for s, _ in chosen),
        units=tuple(u for _, u in chosen),
        unit=unit,
        goal=float(faithfulness),
        found=recovery,
        reached=recovery >= faithfulness - _tie(search),
        effect=effect,
        target=label,
        method=method,
        candidates=len(search.units),
        searched=searched,
        judged=judged,
        plan=_plan(search, judge, how, left, seconds),
        **facts,
    )


@torch.no_grad()
def motifs(
    module: nn.Module, x_base: Any, variants: Mapping[str, Any], target: Target = None, **options: Any
) -> Motifs:
    """The circuit of each factor: `discover` on pairs that differ in that factor alone.

    variants: x_source by the factor's name, as `vf.interventions.factor_pairs` makes them; x_base: inputs, or inputs by
    the factor's name. target: as in `discover`, or by the factor's name. options: of `discover`.
    """
    if not isinstance(variants, Mapping) or not variants:
        raise InputError("variants: expected inputs by name of at least one factor")
    found = {}
    for factor, x_source in variants.items():
        given = []
        for what, value in (("x_base", x_base), ("target", target)):
            if isinstance(value, Mapping):
                if factor not in value:
                    raise InputError(f"{what}: has nothing for the factor {factor!r}")
                value = value[factor]
            given.append(value)
        try:
            found[str(factor)] = discover(module, given[0], x_source, given[1], **options)
        except InputError as error:
            raise InputError(f"{factor}: {error}") from error
    return Motifs(found)


class _Search:
    """Sets of candidates, by their recovery."""

    def __init__(self, joint: Joint, goal: float, most: int | None):
        self.joint, self.goal, self.tie = joint, goal, _tie(joint)
        self.most = len(joint.units) if most is None else most
        self.apart = float(joint.distances(frozenset(), [frozenset()])[0, 0])
        _refuse_no_effect(joint, self.apart)

    def recoveries(self, common: frozenset[Unit], toggles: Sequence[frozenset[Unit]]) -> Tensor:
        """(V,) of `common` with each of the toggles."""
        return 1 - self.joint.distances(common, toggles)[0] / self.apart

    def run(self, method: str) -> tuple[list[Unit], str, float]:
        """The circuit, how it was found, and its recovery."""
        every = self.joint.units
        found = {"greedy": self._greedy, "ranked": self._ranked, "eliminate": lambda: list(every)}[method]()
        recovery = self._recovery(found)
        how = f"{method}: {len(found)} units"
        if method == "greedy" and not self._enough(recovery) and len(found) < self.most:
            everything = self._recovery(every)
            how += f", where no unit adds to {recovery:.3g} and all {len(every)} reach {everything:.3g}"
            if self._enough(everything):
                kept = self._pruned(self._eliminated(list(every), everything), everything)
                if len(kept) <= self.most:
                    return kept, f"{how}; {len(kept)} are left of these by elimination", self._recovery(kept)
        if method == "eliminate":
            found = self._eliminated(found, recovery)
            recovery = self._recovery(found)
        kept = self._pruned(found, recovery)
        how += f", {len(kept)} after pruning" if len(kept) < len(every) else ""
        return kept, how, self._recovery(kept)

    def _recovery(self, units: Sequence[Unit]) -> float:
        return float(self.recoveries(frozenset(units), [frozenset()])[0])

    def _enough(self, recovery: float) -> bool:
        return recovery >= self.goal - self.tie

    def _greedy(self) -> list[Unit]:
        chosen: list[Unit] = []
        now = 0.0
        rest = list(self.joint.units)
        while rest and not self._enough(now) and len(chosen) < self.most:
            r = self.recoveries(frozenset(chosen), [frozenset([u]) for u in rest])
            best = int((r >= r.max() - self.tie).nonzero()[0])
            if float(r[best]) <= now + self.tie:
                break
            now = float(r[best])
            chosen.append(rest.pop(best))
        return chosen

    def _ranked(self) -> list[Unit]:
        alone = self.recoveries(frozenset(), [frozenset([u]) for u in self.joint.units])
        ranks = (alone / self.tie).round().neg().argsort(stable=True).tolist()
        order = [self.joint.units[n] for n in ranks][: self.most]
        chosen: list[Unit] = []
        while len(chosen) < len(order):
            ahead = order[len(chosen) : len(chosen) + self.joint.repeats]
            r = self.recoveries(frozenset(chosen), [frozenset(ahead[: k + 1]) for k in range(len(ahead))])
            enough = [k for k in range(len(ahead)) if self._enough(float(r[k]))]
            chosen += ahead[: enough[0] + 1] if enough else ahead
            if enough:
                break
        return chosen

    def _eliminated(self, units: list[Unit], recovery: float) -> list[Unit]:
        """What is left when units are left out one after the other, those first whose loss is least to begin with, as
        long as the recovery is enough; over and over until none can be. Several are tried ahead in one pass."""
        floor = min(self.goal, recovery) - self.tie
        losing = True
        while losing and units:
            r = self.recoveries(frozenset(units), [frozenset([u]) for u in units])
            ranks = (r.flip(0) / self.tie).round().neg().argsort(stable=True).tolist()
            order = [units[len(units) - 1 - n] for n in ranks]
            kept, losing, at = set(units), False, 0
            while at < len(order):
                ahead = order[at : at + self.joint.repeats]
                r = self.recoveries(frozenset(kept), [frozenset(ahead[: k + 1]) for k in range(len(ahead))])
                good = next((k for k in range(len(ahead)) if float(r[k]) < floor), len(ahead))
                kept -= set(ahead[:good])
                losing |= good > 0
                at += good + (good < len(ahead))
            units = [u for u in units if u in kept]
        return units

    def _pruned(self, units: list[Unit], recovery: float) -> list[Unit]:
        """Without units that the goal, or what is reached of it, does not need: the one whose loss is least first."""
        floor = min(self.goal, recovery) - self.tie
        while units:
            r = self.recoveries(frozenset(units), [frozenset([u]) for u in units])
            best = max(int(n) for n in (r >= r.max() - self.tie).nonzero()[:, 0])
            if float(r[best]) < floor:
                break
            units = [u for n, u in enumerate(units) if n != best]
        return units


class _Judgement:
    """The measures of a circuit with their intervals, over the pairs of a Joint."""

    def __init__(self, joint: Joint, replicates: int, seed: int):
        self.joint, self.replicates, self.seed, self.rows = joint, replicates, seed, joint.pairs.rows
        apart = joint.distances(frozenset(), [frozenset()], self._weights)[:, 0]
        _refuse_no_effect(joint, float(apart[0]))
        self.apart = apart

    def _weights(self, n: int, first: int) -> Tensor:
        """Every pair once, then those of the replicates."""
        w = resampling_weights(self.replicates, n, self.seed, first, self.rows)
        return torch.cat([torch.ones(1, n), w if self.replicates else w[:0]])

    def _recoveries(self, common: frozenset[Unit], toggles: Sequence[frozenset[Unit]]) -> Tensor:
        """(1 + R, V): first of all pairs, then the replicates'."""
        return 1 - self.joint.distances(common, toggles, self._weights) / self.apart[:, None]

    def _estimate(self, drawn: Tensor, unit: str = "of the effect") -> Estimate:
        value, replicates = float(drawn[0]), drawn[1:].numpy()
        low, high = resampled_interval(value, replicates, self.rows)
        return Estimate(value, low, high, unit=unit, resampled="pairs", n=self.rows)

    def of(self, units: list[Unit]) -> dict[str, Any]:
        """What `Circuit` has of it."""
        circuit, nothing = frozenset(units), frozenset()
        r = self._recoveries(circuit, [nothing, *(frozenset([u]) for u in units)])
        grown = self._recoveries(nothing, [frozenset(units[: k + 1]) for k in range(len(units))])[0]
        losses = r[:, :1] - r[:, 1:]
        everything = self._recoveries(nothing, [frozenset(self.joint.units)])[:, 0]
        rest = self.joint.without(circuit, self._weights)[:, 0] / self.apart
        gains = grown.diff(prepend=torch.zeros(1, dtype=grown.dtype))
        return {
            "gains": tuple(gains.tolist()),
            "losses": tuple(self._estimate(losses[:, n]) for n in range(len(units))),
            "faithfulness": self._estimate(r[:, 0]),
            "completeness": self._estimate(rest),  # 1 - (1 - rest)
            "minimality": self._estimate(losses.amin(1)) if units else None,
            "ceiling": self._estimate(everything),
        }

    def edges(self, units: list[Unit]) -> tuple[Edge, ...]:
        names, sums = self.joint.edges(units, self._weights)
        found = []
        for n, (parent, child) in enumerate(names):
            alone, total, weights = sums[:, n].unbind(1)
            effect = self._estimate(alone / weights, "" if child is not None else self.joint.effect)
            share = float(alone[0] / total[0]) if float(total[0]) else math.nan
            found.append(Edge(self._node(parent), None if child is None else self._node(child), effect, share))
        return tuple(found)

    def _node(self, unit: Unit) -> tuple[str, int]:
        return self.joint.candidates[unit[0]].site, unit[1]


def _check(
    faithfulness: Any,
    ablation: str,
    effect: str,
    method: str,
    max_units: int | None,
    holdout: Any,
    replicates: int,
    seed: int,
) -> None:
    if isinstance(faithfulness, bool) or not isinstance(faithfulness, int | float) or not 0 < faithfulness <= 1:
        raise InputError(f"faithfulness: expected a share of the effect in (0, 1], got {faithfulness!r}")
    if ablation != "resample":
        raise InputError(f"ablation: recovery is of 'resample', which has a source to come near to; got {ablation!r}")
    if effect not in DISTANCES:
        raise InputError(f"effect: {effect!r} is no distance; known: {', '.join(DISTANCES)}")
    if method not in METHODS:
        raise InputError(f"method: {method!r} is unknown; known: {', '.join(METHODS)}")
    if holdout is not None and (
        isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 <= holdout < 1
    ):
        raise InputError(f"holdout: expected a share of the pairs in [0, 1), got {holdout!r}")
    for name, value, least in (("max_units", max_units, 1), ("replicates", replicates, 0), ("seed", seed, 0)):
        if value is None and name == "max_units":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _split(rows: int, holdout: float | None, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the pairs to search and of those to judge by, all of them for both where none are held out."""
    share = (HELD_OUT if rows >= 2 * FEW else 0.0) if holdout is None else float(holdout)
    if not share:
        return tuple(range(rows)), tuple(range(rows))
    count = round(share * rows)
    if not 0 < count < rows:
        raise InputError(
            f"holdout: {share:g} of {rows} pairs leaves none to search or none to judge by; give holdout=0"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return tuple(order[count:].sort().values.tolist()), tuple(order[:count].sort().values.tolist())


def _rows(args: tuple, rows: int, numbers: tuple[int, ...]) -> tuple:
    if len(numbers) == rows:
        return args
    picked = torch.tensor(numbers)
    return tuple(a[picked.to(a.device)] if isinstance(a, Tensor) and a.ndim and len(a) == rows else a for a in args)


def _named(module: nn.Module, sites: Sequence[str]) -> Callable[[str], bool]:
    """Whether a site is named by itself and not by a pattern."""
    if isinstance(sites, str) or not len(sites):
        raise InputError(f"sites: expected a list of paths or patterns, got {sites!r}")
    exact = {(s.site, s.side) for spec in sites if not is_pattern(spec) for s in resolve(module, spec)}

    def named(site: str) -> bool:
        entering = site.endswith(".input")
        return (site.removesuffix(".input"), "input" if entering else "output") in exact

    return named


def _measured(target: Target, readout: Readout | None) -> tuple[Readout | None, str]:
    """What gives the tensor that counts, or of which a group does, and its name."""
    if target is None or isinstance(target, int | str) and target != "output.mean":
        return readout, "output" if target is None else str(target)
    if isinstance(target, str):

        def mean(y: Any) -> Tensor:
            y = y if readout is None else readout(y)
            if not isinstance(y, Tensor):
                raise InputError(f"module: its output is {type(y).__name__}; readout= must choose a tensor of it")
            return y.flatten(1).mean(1, keepdim=True)

        return mean, target
    if not callable(target):
        raise InputError(
            f"target: expected None, a group of groups= by number or name, or a function, got {type(target).__name__}"
        )

    def measured(y: Any) -> Tensor:
        value = target(y if readout is None else readout(y))
        if not isinstance(value, Tensor) or not value.ndim:
            given = "a number" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"target: expected a tensor (rows,) or (rows, ...) of its function, got {given}")
        return value[:, None] if value.ndim == 1 else value

    return measured, getattr(target, "__name__", type(target).__name__)


def _group(target: Target, groups: Groups | None, pairs: Pairs) -> Groups:
    """The one group of output elements that counts."""
    elements = math.prod(pairs.shape)
    if groups is None and isinstance(target, str) and target.startswith("output["):
        chosen = parse(target).mask(pairs.shape)
        return from_labels(torch.where(chosen, 0, -1), [target])
    if not isinstance(target, int | str) or target == "output.mean":
        if groups is not None:
            raise InputError("groups: are for a target that is one of them, by number or name")
        return whole(elements)
    if not isinstance(groups, Groups):
        raise InputError(f"target: group {target!r} needs groups=, as vf.groups.cells makes them")
    if groups.labels.numel() != elements:
        raise InputError(f"groups: partition {groups.labels.numel()} elements, but the output has {elements}")
    name = _group_name(target, groups)
    labels = torch.where(groups.labels == groups.names.index(name), 0, -1)
    return from_labels(labels, [name])


def _group_name(target: int | str, groups: Groups) -> str:
    if isinstance(target, str) and target in groups.names:
        return target
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(groups):
        return groups.names[target]
    shown = ", ".join(groups.names[:8]) + (", ..." if len(groups) > 8 else "")
    raise InputError(f"target: no group is {target!r}; there are {len(groups)}: {shown}")


def _refuse_no_effect(joint: Joint, apart: float) -> None:
    if apart <= joint.rounding * joint.pairs.rows:
        raise InputError(
            "x_source: gives the same output as x_base, on the target and these pairs; there is no effect to recover"
        )


def _tie(joint: Joint) -> float:
    return _TIES.get(joint.dtype, _TIE)


def _plan(search: Joint, judge: Joint, how: str, left: Sequence[str], seconds: float) -> str:
    asked, ran = search.asked, search.ran
    out = f"; left out as the input or output itself: {', '.join(left)}" if left else ""
    held = f"judged on {judge.pairs.rows} others" if judge is not search else "judged on the same"
    return (
        f"{how}; {search.evaluations} joint patches of {search.pairs.rows} pairs, {held}; "
        f"{100 * (1 - ran / max(asked, 1)):.0f} % of the runs known beforehand, tiles of {search.pairs.tile} rows; "
        f"{1e6 * seconds / max(asked, 1):.1f} us a patched pair, {seconds:.2f} s in all{out}"
    )
