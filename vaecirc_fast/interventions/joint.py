"""Joint patches of many sets of units: how far from the source's output each leaves the base's run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..groups import Groups
from ..ops import effect_reduction
from .engine import slices
from .forcing import Held, Holding, Pairs, mixed
from .patch_sweeps import Target, Weights
from .selection import Selection
from .trace import Trace, Value

Unit = tuple[int, int]  # number of the site, in the order in which sites run, and number of its unit
KEPT_BYTES = 1 << 28  # of base and source runs that are kept from one call to the next


def plain(n: int, _first: int) -> Tensor:
    """Every pair once."""
    return torch.ones(1, n)


@dataclass(frozen=True)
class Candidate:
    """A site with the units that may be patched. target: of all its selections."""

    target: Target

    @property
    def site(self) -> str:
        return self.target.site

    def mask(self, units: Sequence[int], device: torch.device) -> Tensor:
        """(E,) bool: the elements of these units."""
        labels = self.target.labels
        return torch.isin(labels, torch.tensor(list(units), dtype=labels.dtype)).to(device)


@dataclass(frozen=True)
class _Shape:
    """What depends on the number of rows alone: a trace, the sites' values in it, and what runs of it need."""

    trace: Trace
    values: tuple[Value, ...]
    needs: frozenset[Value]
    holdings: dict[tuple[int, ...], Holding] = field(default_factory=dict)

    def holding(self, sites: tuple[int, ...]) -> Holding:
        if sites not in self.holdings:
            self.holdings[sites] = Holding(self.trace, [self.values[s] for s in sites])
        return self.holdings[sites]


@dataclass(frozen=True)
class _Part:
    """Some pairs: x_base's run, and the sites' values and the output of x_source's."""

    pairs: slice
    shape: _Shape
    base: Mapping[Value, Tensor]
    source: Mapping[Value, Tensor]

    @property
    def size(self) -> int:
        return self.pairs.stop - self.pairs.start


@dataclass(frozen=True)
class _Patched:
    """A run in which some units are patched: all values, and those of the sites before their units were set."""

    values: Mapping[Value, Tensor]
    before: Mapping[Value, Tensor]


class Joint:
    """Runs of x_base in which sets of units of several sites jointly take the values of x_source's run.

    A unit of the set has its value of x_source's run, whatever comes before it; all else is computed. pairs: with the
    candidates' sites; measured: the group of output elements whose distance counts, in the kind `effect`.
    evaluations: joint patches of all pairs so far; unchanged: those of them, by pair, that were known without a run.
    """

    def __init__(self, pairs: Pairs, candidates: Sequence[Candidate], effect: str, measured: Groups):
        self.pairs, self.candidates, self.effect = pairs, candidates, effect
        self.measured = measured.to(pairs.device)
        self.units: list[Unit] = [(s, u) for s, c in enumerate(candidates) for u in c.target.units]
        self.evaluations = self.ran = self.asked = 0
        self.repeats = pairs.repeats(len(self.units))
        self._shapes: dict[int, _Shape] = {}
        self._kept: dict[int, _Part] = {}
        self._checked: set[int] = set()
        largest = 0.0
        self.dtype = torch.float32
        for part in self._parts():
            y = part.base[part.shape.trace.output]
            self.dtype, largest = y.dtype, max(largest, float(y.abs().max()))
        rounding = 8 * torch.finfo(self.dtype).eps * largest
        self.rounding = rounding**2 if effect == "mse" else rounding  # distances up to it say nothing

    def distances(
        self, common: frozenset[Unit], toggles: Sequence[frozenset[Unit]], weights: Weights = plain
    ) -> Tensor:
        """(R, V) weighted sums over pairs of d(patched, source), float64; the set of variant v is `common` with the
        units of toggles[v] put in or left out."""
        self.evaluations += len(toggles)
        sums = torch.zeros(0)
        for part in self._parts():
            run = self._patched(part, part.base, part.source, common)
            d = self._of_part(part, run, common, toggles)
            self._refuse_not_finite(d, toggles)
            sums = self._added(sums, weights, part, d)
        return sums

    def without(self, circuit: frozenset[Unit], weights: Weights = plain) -> Tensor:
        """(R, 1) likewise, where all candidates take the values of the run of x_source in which the circuit's units are
        held at base."""
        self.evaluations += 1
        sums = torch.zeros(0)
        everything = frozenset(self.units)
        for part in self._parts():
            inside = part.shape.needs | set(part.shape.values)
            source = self.pairs.run(part.shape.trace, part.pairs, self.repeats, inside, True)
            held = self._patched(part, source, part.base, circuit)
            y = self._patched(part, part.base, held.values, everything).values[part.shape.trace.output]
            sums = self._added(sums, weights, part, self._distance(part, y)[:, :1])
        return sums

    def edges(self, circuit: Sequence[Unit], weights: Weights = plain) -> tuple[list[tuple[Unit, Unit | None]], Tensor]:
        """Pairs of units (parent, child), and of a unit and the output (None), where one reaches the other; and (R,
        edges, 3) weighted sums over pairs: what the parent alone changes of the child, the circuit's other units held
        at base; what x_source changes of it; and the weights."""
        sites = sorted({s for s, _ in circuit})
        children = {s: [u for t, u in circuit if t == s] for s in sites}
        names: list[tuple[Unit, Unit | None]] = []
        sums = torch.zeros(0)
        for part in self._parts():
            names, found = [], []
            for at, site in enumerate(sites):
                for chunk in slices(len(children[site]), self.repeats):
                    parents = children[site][chunk]
                    for child, alone, total in self._direct(part, site, parents, sites[at + 1 :], children):
                        names += [((site, u), child) for u in parents]
                        one = torch.ones_like(total)
                        found += [torch.stack([alone[:, r], total, one], 1) for r in range(len(parents))]
            d = torch.stack(found, 1) if found else torch.zeros(part.size, 0, 3)
            sums = self._added(sums, weights, part, d)
        return names, sums

    # --- one part ------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[_Part]:
        for pairs in slices(self.pairs.rows, self.pairs.samples):
            part = self._kept.get(pairs.start)
            if part is None:
                part = self._run(pairs)
                tensors = [*part.base.values(), *part.source.values()]
                if -(-self.pairs.rows // part.size) * sum(t.nbytes for t in tensors) <= KEPT_BYTES:
                    self._kept[pairs.start] = part
            yield part

    def _run(self, pairs: slice) -> _Part:
        size = pairs.stop - pairs.start
        if size not in self._shapes:
            traced = self.pairs.trace(pairs, self.repeats)
            values = tuple(c.target.value(traced) for c in self.candidates)
            needs = {v for value in values for v in traced.downstream([value]).needs}
            self._shapes[size] = _Shape(traced, values, frozenset(needs | {*values, traced.output}))
        shape = self._shapes[size]
        base = self.pairs.run(shape.trace, pairs, self.repeats, shape.needs, False)
        source = self.pairs.run(shape.trace, pairs, self.repeats, set(shape.values), True)
        if pairs.start not in self._checked:
            self.pairs.check_reproduced(base[shape.trace.output], pairs, self.repeats, False)
            self.pairs.check_reproduced(source[shape.trace.output], pairs, self.repeats, True)
            self._checked.add(pairs.start)
        return _Part(pairs, shape, base, source)

    def _patched(
        self, part: _Part, values: Mapping[Value, Tensor], new: Mapping[Value, Tensor], units: frozenset[Unit]
    ) -> _Patched:
        """The run of these values with the units set to what they are in `new`."""
        shape, now, before = part.shape, {}, {}
        if not units:
            return _Patched(values, values)
        for site in sorted({s for s, _ in units}):
            value = shape.values[site]
            program = shape.trace.between(list(now), value)
            current = program.run({**values, **now}, {value})[value] if program.chosen else values[value]
            before[value] = current
            now[value] = mixed(self._mask(units, site)[None], new[value], current)
        rest = shape.trace.downstream(list(now)).run({**values, **now}, shape.needs)
        after = {**values, **rest, **now}
        return _Patched(after, {**{v: after[v] for v in shape.values}, **before})

    def _of_part(
        self, part: _Part, run: _Patched, common: frozenset[Unit], toggles: Sequence[frozenset[Unit]]
    ) -> Tensor:
        """(size, V) distances."""
        same = self._distance(part, run.values[part.shape.trace.output])[:, :1]
        out = same.expand(-1, len(toggles)).clone()
        by_first: dict[int, list[int]] = {}
        changes: dict[int, set[int]] = {}
        for v, toggle in enumerate(toggles):
            for site in sorted({s for s, _ in toggle}):
                if site not in changes:
                    changes[site] = self._changing(part, run, site)
                if any(u in changes[site] for s, u in toggle if s == site):
                    by_first.setdefault(site, []).append(v)
                    break
        for first, variants in by_first.items():
            for chunk in slices(len(variants), self.repeats):
                here = variants[chunk]
                sets = [common ^ toggles[v] for v in here]
                y = self._variants(part, run, first, sets, {s for v in here for s, _ in toggles[v]})
                out[:, here] = self._distance(part, y)[:, : len(here)]
        self.ran += part.size * sum(map(len, by_first.values()))
        self.asked += part.size * len(toggles)
        return out

    def _changing(self, part: _Part, run: _Patched, site: int) -> set[int]:
        """Units of the site whose value the patch would change; all that follows of the others is as it was."""
        value = part.shape.values[site]
        differ = (run.before[value] != part.source[value]).flatten(1).any(0).cpu()
        return set(self.candidates[site].target.labels[differ].tolist())

    def _variants(
        self, part: _Part, run: _Patched, first: int, sets: Sequence[frozenset[Unit]], toggled: set[int]
    ) -> Tensor:
        """Outputs (rows, ...), each set in a row of every pair; up to the site `first` all is as in `run`."""
        later = {s for s in {s for units in sets for s, _ in units} | toggled if s > first}
        sites = (first, *sorted(later))
        values = {**run.values, **{part.shape.values[s]: run.before[part.shape.values[s]] for s in sites}}
        held = {}
        for s in sites:
            masks = torch.stack([self._mask(units, s) for units in sets])
            if bool((masks == masks[0]).all()):
                masks = masks[:1]
            else:
                spare = masks.new_zeros(self.repeats - len(masks), masks.shape[1])
                masks = torch.cat([masks, spare]).repeat(part.size, 1)
            held[part.shape.values[s]] = Held(masks, part.source[part.shape.values[s]])
        return part.shape.holding(sites).output(values, held)

    def _mask(self, units: frozenset[Unit], site: int) -> Tensor:
        return self.candidates[site].mask([u for s, u in units if s == site], self.pairs.device)

    def _distance(self, part: _Part, y: Tensor, given: Tensor | None = None) -> Tensor:
        """(size, repeats) float64 distances of outputs (rows, ...) to the source's (or `given`)."""
        given = part.source[part.shape.trace.output] if given is None else given
        given = given.flatten(1)[:: self.repeats].contiguous()
        y = y.flatten(1).view(part.size, self.repeats, -1)
        return effect_reduction(given, y, self.effect, groups=self.measured)[..., 0].double().cpu()

    def _direct(
        self,
        part: _Part,
        site: int,
        parents: Sequence[int],
        later: Sequence[int],
        children: Mapping[int, Sequence[int]],
    ) -> Iterator[tuple[Unit | None, Tensor, Tensor]]:
        """For each child: itself, (size, parents) what each parent alone changes of it, (size,) its whole change."""
        traced, values = part.shape.trace, part.shape.values
        start = values[site]
        one = torch.stack([self.candidates[site].mask([u], self.pairs.device) for u in parents])
        spare = one.new_zeros(self.repeats - len(one), one.shape[1])
        masks = torch.cat([one, spare]).repeat(part.size, 1)
        now = {start: mixed(masks, part.source[start], part.base[start])}
        reached = traced.reached([start])
        for s in later:
            value = values[s]
            program = traced.between(list(now), value)
            if value not in reached or not program.chosen:
                continue
            arrived = program.run({**part.base, **now}, {value})[value]
            for u in children[s]:
                mask = self.candidates[s].mask([u], self.pairs.device)
                moved = (arrived - part.base[value]).flatten(1)[:, mask].abs().double().mean(1)
                whole = (part.source[value] - part.base[value]).flatten(1)[:, mask].abs().double().mean(1)
                by_row = moved.view(part.size, self.repeats)[:, : len(parents)].cpu()
                yield (s, u), by_row, whole[:: self.repeats].cpu()
            held = self.candidates[s].mask(children[s], self.pairs.device)
            now[value] = mixed(held[None], part.base[value], arrived)
        base = part.base[traced.output]
        rest = traced.downstream(list(now))
        y = rest.run({**part.base, **now})[traced.output] if rest.reaches else base
        whole = self._distance(part, part.source[traced.output], base)[:, 0]
        yield None, self._distance(part, y, base)[:, : len(parents)], whole

    def _added(self, sums: Tensor, weights: Weights, part: _Part, d: Tensor) -> Tensor:
        w = weights(part.size, part.pairs.start).double()
        update = torch.tensordot(w, d.double(), 1)
        return update if sums.ndim == 1 else sums + update  # at first there are none

    def _refuse_not_finite(self, d: Tensor, toggles: Sequence[frozenset[Unit]]) -> None:
        bad = (~torch.isfinite(d)).any(0)
        if bool(bad.any()):
            site, unit = sorted(toggles[int(bad.nonzero()[0])] or {self.units[0]})[0]
            name = f"{self.candidates[site].site}[{unit}]"
            raise InputError(f"{name}: the output is NaN or infinite in a joint patch with it")


def candidates_of(pairs: Pairs, named: Callable[[str], bool]) -> tuple[list[Candidate], list[str]]:
    """The sites to choose units of, in the order in which they run; and those that were left out.

    Selections of one site are joined; of sites with the very same activation the first counts. Left out, unless
    `named` by itself: sites that no product or convolution precedes, which are the input, and that none follows, which
    are the output.
    """
    one, found, left = pairs.one, {}, []
    for target in pairs.targets:
        value = target.value(one)
        before, after = one.between(one.inputs, value).flops, one.downstream([value]).flops
        if not named(target.site) and (not before or not after):
            left.append(target.site)
            continue
        if value not in found:
            found[value] = replace(target, selection=Selection(target.selection.site, target.selection.side))
        elif found[value].site == target.site:
            labels = torch.where(found[value].labels >= 0, found[value].labels, target.labels)
            units = tuple(labels[labels >= 0].unique().tolist())
            found[value] = replace(found[value], labels=labels, units=units)
    return [Candidate(found[value]) for value in sorted(found, key=lambda v: v.number)], left
