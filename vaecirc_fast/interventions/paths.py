"""Path-specific patching (level 3): what a change does along one path, everything off it frozen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._allocator import kept_memory
from ..errors import InputError, MissingExtra
from ..groups import Groups, from_labels
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from ..ops import effect_reduction
from .engine import slices
from .forcing import GroupMeans, Held, Holding, Pairs, chosen_units, chosen_whole, mixed
from .patch_sweeps import Target
from .patching import Readout, device_of, inputs_of, quiet
from .selection import Selection, is_pattern, parse, units
from .trace import Program, Trace, Value

if TYPE_CHECKING:
    import pandas

MEASURES = {
    "pse": "y(only the path carries the change) - y(x_base)",
    "te": "y(first site patched, all else recomputed) - y(x_base)",
    "complement": "y(first site patched, later units of the path held at base) - y(x_base)",
    "interaction": "TE - PSE - complement",
}
DISTANCES = ("l1", "mse", "rms", "tv")
MOST_NUMBERS = 1 << 25  # of one measure: 256 MiB


@dataclass(frozen=True)
class PathEffects:
    """Effects of a change along a path: signed vectors over outputs, means over samples, float64.

    pse, te, complement, interaction: (group,) or, of one path per unit, (path, group); their definitions are in
    `MEASURES`. A group is an output element (in the order of the flattened output) unless `groups` were given, whose
    mean it then is. sites: of the path, with "output". units: by path the names of its units at the sites with [*].
    bypass: where a site is no cut between the one before it and the output, what the change at the one before it does
    around it, all of it held at base: (group,) by site; of all chosen units jointly. Empty where every site is a cut.
    distances: by measure and, as "bypass <site>", by bypass, the mean over samples of the distance `effect` of the
    whole vector: () or (path,); taken last. They do not add up.
    replicates: (replicate, ...) of the distance of pse, samples resampled. per_sample: by measure
    (sample, ..., group), None where not asked for.
    """

    pse: Tensor
    te: Tensor
    complement: Tensor
    interaction: Tensor
    sites: tuple[str, ...]
    units: tuple[tuple[str, ...], ...] | None
    groups: tuple[str, ...]
    output_shape: tuple[int, ...]
    bypass: Mapping[str, Tensor]
    distances: Mapping[str, Tensor]
    effect: str
    samples: int
    replicates: Tensor | None = field(default=None, repr=False)
    per_sample: Mapping[str, Tensor] | None = field(default=None, repr=False)
    plan: str = field(default="", repr=False)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of a measure."""
        return (*(("path",) if self.units is not None else ()), "group")

    @property
    def coords(self) -> dict[str, list]:
        """Labels of the axes."""
        return ({"path": list(self.units)} if self.units is not None else {}) | {"group": list(self.groups)}

    @property
    def tensor(self) -> Tensor:
        """(measure, ...) in the order of `MEASURES`."""
        return torch.stack([getattr(self, name) for name in MEASURES])

    def _names(self) -> list[str]:
        return [" -> ".join(self.sites)] if self.units is None else [" -> ".join(names) for names in self.units]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per path and group: path, group, and the signed pse, te, complement and interaction."""
        import pandas

        rows = list(itertools.product(self._names(), self.groups))
        table = pandas.DataFrame(rows, columns=["path", "group"])
        for name in MEASURES:
            table[name] = getattr(self, name).reshape(-1).numpy()
        return table

    def table(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per path: path, the distances of its pse with low and high (over samples), te, complement and
        interaction."""
        import pandas

        flat = {name: self.distances[name].reshape(-1).tolist() for name in MEASURES}
        rows = []
        for n, path in enumerate(self._names()):
            low = high = float("nan")
            if self.replicates is not None:
                drawn = self.replicates.reshape(len(self.replicates), -1)[:, n].numpy()
                low, high = resampled_interval(flat["pse"][n], drawn, self.samples, level)
            rows.append((path, flat["pse"][n], low, high, *(flat[name][n] for name in list(MEASURES)[1:])))
        return pandas.DataFrame(rows, columns=["path", "pse", "low", "high", "te", "complement", "interaction"])

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The n paths of greatest path-specific distance."""
        return self.table().sort_values("pse", ascending=False, ignore_index=True, kind="stable").head(n)

    def to_xarray(self) -> Any:
        """The measures as an xarray.DataArray over measure and `dims`."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        coords: dict[str, Any] = {"measure": list(MEASURES), "group": list(self.groups)}
        if self.units is not None:
            coords["path"] = self._names()
        return xarray.DataArray(self.tensor.numpy(), dims=("measure", *self.dims), coords=coords, name="signed effect")

    def __str__(self) -> str:
        lines = [f"{' -> '.join(self.sites)}: {self.effect} of signed effects, means over {self.samples} samples"]
        lines.append(self.top().to_string(index=False))
        lines += [
            f"bypass: {float(self.distances[f'bypass {site}']):.4g} goes around {site}, which is no cut"
            for site in self.bypass
        ]
        return "\n".join([*lines, self.plan])


@torch.no_grad()
def path_patch(
    module: nn.Module,
    x_base: Any,
    x_source: Any,
    path: str,
    *,
    freeze: str = "others",
    each: bool = False,
    unit: str = "channel",
    heads: int | None = None,
    groups: Groups | None = None,
    effect: str = "l1",
    readout: Readout | None = None,
    per_sample: bool = False,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> PathEffects:
    """Path-specific effect of a change from x_base to x_source, e.g. "decoder.fc1[*] -> decoder.fc2[3] -> output".

    x_base receives, x_source gives, pair by pair: tensors (N, ...) or tuples of arguments. path: sites with chosen
    units, in the order in which they run, and "output". The first site's units take their values of x_source's run;
    what is between it and the second site is computed with all else at base; there only the chosen units take the new
    values, every other unit is frozen at base (freeze="others"); and so on to the output. [*] is all units jointly,
    with each=True one path per unit of the sites with [*], per pair of units where two have it (`unit`, `heads`: see
    `selection.units`).

    Beside it stand the total effect of the first site's units, the complement (the same, with the path's later units
    held at base) and their interaction TE - PSE - complement, all signed vectors over outputs; and where a site is no
    cut, the bypass around it. groups: their means in place of output elements. effect: "l1", "mse", "rms" or "tv", the
    distance that is taken of the vectors last. per_sample: keeps them. tile: rows of one pass.

    Only what is between two sites runs again. Working memory grows neither with N nor with the number of paths.
    InputError names the site and the remedy: sites out of order, units that do not exist, sites that run twice.
    """
    if freeze != "others":
        raise InputError(f'freeze: expected "others", got {freeze!r}')
    if effect not in DISTANCES:
        raise InputError(f"effect: {effect!r} is no distance; known: {', '.join(DISTANCES)}")
    if not isinstance(replicates, int) or replicates < 0:
        raise InputError(f"replicates: expected an integer of at least 0, got {replicates!r}")
    chosen = _parsed(path)
    if each and not any(s.each for s in chosen):
        raise InputError(f"each: expected a site with [*] in the path, got {path!r}")
    args, _ = inputs_of(x_base)
    started = time.perf_counter()
    device = device_of(args)
    with quiet(module, device), kept_memory(device.type == "cpu"):
        specs = [str(s) for s in chosen]
        pairs = Pairs(module, x_base, x_source, specs, unit=unit, heads=heads, readout=readout, tile=tile)
        bypassed = _check_order(pairs)
        stages = [_Stage.of(pairs, t, each and s.each, unit, heads) for t, s in zip(pairs.targets, chosen, strict=True)]
        count = 1
        for stage in stages:
            count *= len(stage.units)
        groups = _partition(groups, pairs, count, per_sample)
        sums = _Sums(pairs.rows, count, groups, effect, per_sample, replicates, seed, bypassed)
        walk = _Walk(pairs, stages, bypassed, sums)
        walk.run()
        return sums.result(pairs, stages, each, walk.flops, time.perf_counter() - started)


def _parsed(path: str) -> list[Selection]:
    """The sites of a path, without "output"."""
    parts = [part.strip() for part in path.split("->")] if isinstance(path, str) else []
    if len(parts) < 2 or parts[-1] != "output":
        raise InputError(f'path: expected "site[*] -> site[3] -> output", got {path!r}')
    found = [parse(part) for part in parts[:-1]]
    for s in found:
        if is_pattern(s):
            raise InputError(f"path: {s} is a pattern; name one site")
    if len({(s.site, s.side) for s in found}) < len(found):
        raise InputError(f"path: a site is in {path!r} twice; choose its units in one place")
    return found


def _check_order(pairs: Pairs) -> tuple[int, ...]:
    """The sites (by number) around which something reaches the output; InputError for sites out of order."""
    one = pairs.one
    values = [t.value(one) for t in pairs.targets]
    bypassed = []
    for n, (before, after) in enumerate(itertools.pairwise(values), 1):
        names = [pairs.targets[k].selection for k in (n - 1, n)]
        if before == after:
            raise InputError(f"path: {names[0]} and {names[1]} are the same activation; leave one out")
        if after not in one.reached([before]):
            if before in one.reached([after]):
                raise InputError(f"path: {names[1]} runs before {names[0]}; write {names[1]} -> {names[0]}")
            raise InputError(f"path: nothing of {names[0]} reaches {names[1]}; choose a site behind it")
        if one.output in one.reached([before], [after]):
            bypassed.append(n)
    return tuple(bypassed)


def _partition(groups: Groups | None, pairs: Pairs, count: int, per_sample: bool) -> Groups:
    elements = 1
    for n in pairs.shape:
        elements *= n
    if groups is None:
        groups = from_labels(torch.arange(elements), [f"output {p}" for p in range(elements)])
    elif not isinstance(groups, Groups):
        raise InputError(f"groups: expected Groups, as vf.groups.cells makes them, got {type(groups).__name__}")
    if groups.labels.numel() != elements:
        raise InputError(f"groups: partition {groups.labels.numel()} elements, but the output has {elements}")
    numbers = count * len(groups) * (pairs.rows if per_sample else 1)
    if numbers > MOST_NUMBERS:
        given = f"{count} paths, {len(groups)} groups" + (f", {pairs.rows} samples" if per_sample else "")
        raise InputError(f"groups: {given} are too many numbers to keep; give fewer groups=, units or per_sample=False")
    return groups.to(pairs.device)


@dataclass(frozen=True)
class _Stage:
    """A site of the path: its units, one by one where `names` are given, else jointly."""

    target: Target
    units: tuple[int | None, ...]
    names: tuple[str, ...] | None

    @staticmethod
    def of(pairs: Pairs, target: Target, each: bool, unit: str, heads: int | None) -> _Stage:
        if not each:
            return _Stage(target, (None,), None)
        names = units(pairs.shapes[target.site], unit, heads).names
        return _Stage(target, target.units, tuple(f"{target.site} {names[u]}" for u in target.units))

    def masks(self, chunk: slice, repeats: int, samples: int, device: torch.device) -> Tensor:
        """(rows, E) or (1, E): which elements each of these variants chooses."""
        if self.names is None:
            return chosen_whole(self.target, device)
        numbers = [u for u in self.units[chunk] if u is not None]
        return chosen_units(self.target, numbers, repeats, samples, device)


@dataclass(frozen=True)
class _Plans:
    """What runs, for tiles of one size."""

    trace: Trace
    values: tuple[Value, ...]
    between: tuple[Program, ...]
    last: Program
    first: Holding
    complement: Holding | None
    around: Mapping[int, Holding]
    needs: frozenset[Value]


@dataclass
class _Front:
    """Paths up to a site, a row per path in each sample's rows: `now` is the site's value, with the units on the path
    changed; `count` of the rows are used; masks are those of the sites so far."""

    count: int
    now: Tensor
    total: Tensor
    first: Tensor
    masks: list[Tensor]


class _Walk:
    """All paths, tile by tile of the samples and site by site."""

    def __init__(self, pairs: Pairs, stages: Sequence[_Stage], bypassed: Sequence[int], sums: _Sums):
        self.pairs, self.stages, self.bypassed, self.sums = pairs, stages, bypassed, sums
        self.repeats = pairs.repeats(max(len(s.units) for s in stages))
        self.flops = 0

    def run(self) -> None:
        plans: dict[int, _Plans] = {}
        for part in slices(self.pairs.rows, self.pairs.samples):
            self.size = part.stop - part.start
            if self.size not in plans:
                plans[self.size] = self._plans(self.pairs.trace(part, self.repeats))
            self.plan = plans[self.size]
            now = self.plan.trace
            self.base = self.pairs.run(now, part, self.repeats, self.plan.needs, False)
            source = self.pairs.run(now, part, self.repeats, {self.plan.values[0]}, True)
            self.pairs.check_reproduced(self.base[now.output], part, self.repeats, False)
            self.pairs.check_reproduced(source[now.output], part, self.repeats, True)
            self.y = self.base[now.output].flatten(1)
            given = source[self.plan.values[0]]
            self.sums.start(part)
            self._bypass(given)
            for chunk in slices(len(self.stages[0].units), self.repeats):
                for front in self._onward(self._start(given, chunk), 0):
                    self._finish(front)

    def _plans(self, now: Trace) -> _Plans:
        values = tuple(s.target.value(now) for s in self.stages)
        between = tuple(now.between([a], b) for a, b in itertools.pairwise(values))
        whole = {v for v, s in zip(values, self.stages, strict=True) if bool((s.target.labels >= 0).all())}
        whole = {v for v, s in zip(values, self.stages, strict=True) if v in whole and s.names is None} | {values[0]}
        last, first = now.downstream([values[-1]]), Holding(now, values[:1], values[:1])
        complement = Holding(now, values, whole) if len(values) > 1 else None
        around = {n: Holding(now, values[n - 1 : n + 1], values[n - 1 : n + 1]) for n in self.bypassed}
        programs = (*between, last, first, *([complement] if complement else []), *around.values())
        needs = {v for p in programs for v in p.needs} | {*values, now.output}
        return _Plans(now, values, between, last, first, complement, around, frozenset(needs))

    def _start(self, given: Tensor, chunk: slice) -> _Front:
        """The paths' first site, patched."""
        value = self.plan.values[0]
        mask = self.stages[0].masks(chunk, self.repeats, self.size, self.pairs.device)
        now = mixed(mask, given, self.base[value])
        everything = torch.ones_like(mask[:1])
        total = self._change(self.plan.first.output(self.base, {value: Held(everything, now)}))
        self.flops += self.plan.first.flops
        return _Front(chunk.stop - chunk.start, now, total, now, [mask])

    def _onward(self, front: _Front, n: int) -> Iterator[_Front]:
        """The paths of `front`, at site n, at the last site."""
        if n == len(self.stages) - 1:
            yield front
            return
        stage, value = self.stages[n + 1], self.plan.values[n + 1]
        arrived = self._arriving(front.now, n)
        base = self.base[value]
        if len(stage.units) == 1:
            mask = stage.masks(slice(0, 1), self.repeats, self.size, self.pairs.device)
            mask = mask if len(mask) == 1 else mask[:1]  # the one unit, for every variant
            next_ = _Front(front.count, mixed(mask, arrived, base), front.total, front.first, [*front.masks, mask])
            yield from self._onward(next_, n + 1)
            return
        for variant in range(front.count):

            def of(t: Tensor, variant: int = variant) -> Tensor:
                return self._spread(t, variant)

            for chunk in slices(len(stage.units), self.repeats):
                mask = stage.masks(chunk, self.repeats, self.size, self.pairs.device)
                masks = [m if len(m) == 1 else of(m) for m in front.masks]
                now = mixed(mask, of(arrived), base)
                next_ = _Front(chunk.stop - chunk.start, now, of(front.total), of(front.first), [*masks, mask])
                yield from self._onward(next_, n + 1)

    def _arriving(self, now: Tensor, n: int) -> Tensor:
        """What site n + 1 becomes when site n alone is `now`."""
        program = self.plan.between[n]
        self.flops += program.flops
        value = self.plan.values[n + 1]
        return program.run({**self.base, self.plan.values[n]: now}, {value})[value]

    def _spread(self, t: Tensor, variant: int) -> Tensor:
        """One variant of each sample, in all of the sample's rows."""
        rows = t.reshape(self.size, self.repeats, *t.shape[1:])
        return rows[:, variant : variant + 1].expand_as(rows).reshape(t.shape)

    def _finish(self, front: _Front) -> None:
        """From the last site to the output, and the complement."""
        plan = self.plan
        y = plan.last.run({**self.base, plan.values[-1]: front.now})[plan.trace.output]
        self.flops += plan.last.flops
        pse = self._change(y)
        complement = torch.zeros_like(pse)
        if plan.complement is not None:
            held = {plan.values[0]: Held(torch.ones_like(front.masks[0][:1]), front.first)}
            for value, mask in zip(plan.values[1:], front.masks[1:], strict=True):
                held[value] = Held(mask, self.base[value])
            complement = self._change(plan.complement.output(self.base, held))
            self.flops += plan.complement.flops
        self.sums.add(*(self._used(t, front.count) for t in (pse, front.total, complement)))

    def _bypass(self, given: Tensor) -> None:
        """What goes around each site that is no cut, all chosen units jointly."""
        if not self.plan.around:
            return
        now = given
        for n, stage in enumerate(self.stages):
            value = self.plan.values[n]
            now = mixed(chosen_whole(stage.target, self.pairs.device), now, self.base[value])
            if n + 1 in self.plan.around:
                after, holding = self.plan.values[n + 1], self.plan.around[n + 1]
                everything = {v: torch.ones(1, self.base[v][0].numel(), dtype=torch.bool) for v in (value, after)}
                held = {value: Held(everything[value], now), after: Held(everything[after], self.base[after])}
                change = self._change(holding.output(self.base, held))
                self.sums.add_bypass(n + 1, self._used(change, 1)[:, 0])
                self.flops += holding.flops
            if n + 1 < len(self.stages):
                now = self._arriving(now, n)

    def _change(self, y: Tensor) -> Tensor:
        """(rows, P) float64."""
        return y.flatten(1).double() - self.y.double()

    def _used(self, change: Tensor, count: int) -> Tensor:
        """(B, count, P) of the rows that hold variants."""
        return change.view(self.size, self.repeats, -1)[:, :count]


class _Sums:
    """Signed vectors by group and distances, added up over samples."""

    def __init__(
        self,
        rows: int,
        count: int,
        groups: Groups,
        effect: str,
        per_sample: bool,
        replicates: int,
        seed: int,
        bypassed: Sequence[int],
    ):
        self.rows, self.count, self.groups, self.effect = rows, count, groups, effect
        self._replicates, self._seed = replicates, seed
        size = len(groups)
        self.vectors = torch.zeros(len(MEASURES), count, size, dtype=torch.float64)
        self.distances = torch.zeros(len(MEASURES), count, dtype=torch.float64)
        self.kept = torch.zeros(len(MEASURES), rows, count, size, dtype=torch.float64) if per_sample else None
        drawn = len(resampling_weights(replicates, 1, seed, 0, rows)) if replicates else 0
        self.drawn = torch.zeros(drawn, count, dtype=torch.float64)
        self.weights = torch.zeros(drawn, dtype=torch.float64)
        self.around = {n: torch.zeros(size, dtype=torch.float64) for n in bypassed}
        self.around_distances = {n: 0.0 for n in bypassed}
        self._means = GroupMeans(groups, groups.labels.device)

    def start(self, part: slice) -> None:
        """What is added next is of these samples, the first path first."""
        self._part, self._at = part, 0
        w = resampling_weights(self._replicates, part.stop - part.start, self._seed, part.start, self.rows)
        self._w = w.double()[: len(self.weights)]
        self.weights += self._w.sum(1)

    def add(self, pse: Tensor, te: Tensor, complement: Tensor) -> None:
        """The next paths' changes (B, n, P)."""
        where = slice(self._at, self._at + pse.shape[1])
        self._at = where.stop
        for m, change in enumerate((pse, te, complement, te - pse - complement)):
            vectors, distances = self._by_group(change), self._distance(change)
            self.vectors[m, where] += vectors.sum(0)
            self.distances[m, where] += distances.sum(0)
            if self.kept is not None:
                self.kept[m, self._part, where] = vectors
            if m == 0 and len(self.drawn):
                self.drawn[:, where] += self._w @ distances

    def add_bypass(self, n: int, change: Tensor) -> None:
        """The change (B, P) that goes around site n."""
        self.around[n] += self._by_group(change[:, None])[:, 0].sum(0)
        self.around_distances[n] += float(self._distance(change[:, None]).sum())

    def _by_group(self, change: Tensor) -> Tensor:
        """(B, n, G) float64: means of the groups' elements."""
        return self._means(change).cpu()

    def _distance(self, change: Tensor) -> Tensor:
        """(B, n) of the whole vectors."""
        change = change.contiguous()
        return effect_reduction(torch.zeros_like(change[:, 0]), change, self.effect)[..., 0].double().cpu()

    def result(self, pairs: Pairs, stages: Sequence[_Stage], each: bool, flops: int, seconds: float) -> PathEffects:
        def shaped(t: Tensor, axis: int) -> Tensor:
            return t if each else t.select(axis, 0)

        names = [str(s.target.selection) for s in stages]
        listed = [s.names for s in stages if s.names is not None]
        vectors = dict(zip(MEASURES, self.vectors / self.rows, strict=True))
        some = self.weights > 0  # all weights are zero once in e^N replicates
        distances = {m: shaped(d, 0) for m, d in zip(MEASURES, self.distances / self.rows, strict=True)}
        for n, total in self.around_distances.items():
            distances[f"bypass {names[n]}"] = torch.tensor(total / self.rows, dtype=torch.float64)
        share = 100 * flops / max(1, 3 * self.count * sum(pairs.one.flops) * self.rows)
        around = [names[n] for n in self.around]
        where = f"no cut: {', '.join(around)}, see .bypass" if around else "every site is a cut behind the first"
        plan = (
            f"{self.count} path{'s' if self.count > 1 else ''} of {self.rows} samples, tiles of {pairs.tile} rows; "
            f"{share:.0f} % of the operations of three whole passes a path; {where}; "
            f"{1e6 * seconds / (self.count * self.rows):.1f} us a sample and path"
        )
        return PathEffects(
            **{m: shaped(v, 0) for m, v in vectors.items()},
            sites=(*names, "output"),
            units=tuple(itertools.product(*listed)) if each else None,
            groups=self.groups.names,
            output_shape=pairs.shape,
            bypass={names[n]: total / self.rows for n, total in self.around.items()},
            distances=distances,
            effect=self.effect,
            samples=self.rows,
            replicates=shaped(self.drawn[some] / self.weights[some, None], 1) if len(some) else None,
            per_sample=None
            if self.kept is None
            else {m: shaped(k, 1) for m, k in zip(MEASURES, self.kept, strict=True)},
            plan=plan,
        )
