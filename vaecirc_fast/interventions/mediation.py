"""Causal mediation (level 4): how much of what a change of the input does passes through some units."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._allocator import kept_memory
from ..errors import InputError, MissingExtra
from ..groups import Groups, from_labels
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from .engine import slices
from .forcing import GroupMeans, Held, Holding, Pairs, chosen_units, chosen_whole
from .patch_kernels import Kernel, kernels_behind
from .patching import Readout, device_of, inputs_of, quiet
from .selection import parse, units
from .trace import Trace, Value

if TYPE_CHECKING:
    import pandas

TERMS = {
    "te": "Y(x1, M(x1)) - Y(x0, M(x0))",
    "nde_pure": "Y(x1, M(x0)) - Y(x0, M(x0))",
    "nde_total": "Y(x1, M(x1)) - Y(x0, M(x1))",
    "nie_pure": "Y(x0, M(x1)) - Y(x0, M(x0))",
    "nie_total": "Y(x1, M(x1)) - Y(x1, M(x0))",
    "interaction": "TE - pure NDE - pure NIE",
}
Outcome = str | Groups | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mediation:
    """What the change from x0 = x_base to x1 = x_source does to an outcome Y, split by a mediator M.

    te, nde_pure, nde_total, nie_pure, nie_total, interaction: means over samples in the outcome's unit, float64; their
    formulas are in `TERMS`. Of shape (), or (group,) where the outcome is a value per group; with a mediation per unit
    (unit,) or (unit, group). `dims` and `coords` label them.
    outcomes: (4, ...) means of Y(x0, M(x0)), Y(x0, M(x1)), Y(x1, M(x0)), Y(x1, M(x1)). samples: how many.
    cut: by mediator, whether everything that reaches the output passes it, so that its NDE is 0; reaches: whether
    anything of it reaches the output; where not its NIE is 0. Both are read off the executed operations.
    replicates: (term, replicate, ...) of te, nde_pure and nie_pure, samples resampled (Poisson bootstrap, below 8
    samples the jackknife). per_sample: by term (sample, ...), None where not asked for.
    InputError where terms break the identities TE = pure NDE + total NIE = total NDE + pure NIE and INT = TE - pure NDE
    - pure NIE.
    """

    te: Tensor
    nde_pure: Tensor
    nde_total: Tensor
    nie_pure: Tensor
    nie_total: Tensor
    interaction: Tensor
    outcomes: Tensor = field(repr=False)
    outcome: str
    mediators: tuple[str, ...]
    units: tuple[str, ...] | None
    groups: tuple[str, ...] | None
    samples: int
    cut: Mapping[str, bool]
    reaches: Mapping[str, bool]
    replicates: Tensor | None = field(default=None, repr=False)
    per_sample: Mapping[str, Tensor] | None = field(default=None, repr=False)
    plan: str = field(default="", repr=False)

    def __post_init__(self):
        # differences of four float64 numbers, each added up over the samples
        rounding = 16 * torch.finfo(torch.float64).eps * self.outcomes.abs().amax()
        for name, left, right in (
            ("te = nde_pure + nie_total", self.te, self.nde_pure + self.nie_total),
            ("te = nde_total + nie_pure", self.te, self.nde_total + self.nie_pure),
            ("interaction = te - nde_pure - nie_pure", self.interaction, self.te - self.nde_pure - self.nie_pure),
        ):
            if not bool(((left - right).abs() <= rounding).all()):
                raise InputError(f"Mediation: the terms break the identity {name}")

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of a term."""
        return ("unit",) * (self.units is not None) + ("group",) * (self.groups is not None)

    @property
    def coords(self) -> dict[str, list]:
        """Labels of the axes: (site, unit) pairs and group names."""
        found: dict[str, list] = {}
        if self.units is not None:
            found["unit"] = list(zip(self.mediators, self.units, strict=True))
        if self.groups is not None:
            found["group"] = list(self.groups)
        return found

    @property
    def tensor(self) -> Tensor:
        """(term, ...) all terms in the order of `TERMS`."""
        return torch.stack([getattr(self, term) for term in TERMS])

    @property
    def bypass_share(self) -> Tensor:
        """Pure NDE / TE: the share of the effect that does not pass the mediator; 1 less the share mediated, total NIE
        / TE. Outside [0, 1] where the two parts oppose each other; NaN where there is no effect."""
        share = self.nde_pure / torch.where(self.te != 0, self.te, 1) + 0.0  # no -0
        return torch.where(self.te != 0, share, torch.nan)

    def interval(self, term: str, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of a term, of its shape: over the samples. NaN where no replicates were asked for."""
        if term not in TERMS:
            raise InputError(f"term: expected one of {', '.join(TERMS)}, got {term!r}")
        value = getattr(self, term).reshape(-1)
        drawn = self._drawn(term)
        bounds = torch.full((2, len(value)), torch.nan, dtype=torch.float64)
        if drawn is not None:
            flat = drawn.reshape(len(drawn), -1).numpy()
            for n, v in enumerate(value.tolist()):
                bounds[:, n] = torch.tensor(resampled_interval(v, flat[:, n], self.samples, level))
        return bounds[0].view_as(getattr(self, term)), bounds[1].view_as(getattr(self, term))

    def _drawn(self, term: str) -> Tensor | None:
        if self.replicates is None:
            return None
        te, nde, nie = self.replicates
        return {
            "te": te,
            "nde_pure": nde,
            "nde_total": te - nie,
            "nie_pure": nie,
            "nie_total": te - nde,
            "interaction": te - nde - nie,
        }[term]

    def to_dataframe(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per mediator, group and term: mediator (site), unit ("all" where they are jointly it), group, term,
        value, low, high (over samples), measured_in (the outcome), definition."""
        import pandas

        mediators = [(", ".join(self.mediators), "all")] if self.units is None else self.coords["unit"]
        groups = ["output"] if self.groups is None else self.groups
        values = {term: (getattr(self, term).reshape(-1), *self.interval(term, level)) for term in TERMS}
        rows = []
        for n, ((site, unit), group) in enumerate(itertools.product(mediators, groups)):
            for term, definition in TERMS.items():
                numbers = (float(t.reshape(-1)[n]) for t in values[term])
                rows.append((site, unit, group, term, *numbers, self.outcome, definition))
        columns = ["mediator", "unit", "group", "term", "value", "low", "high", "measured_in", "definition"]
        return pandas.DataFrame(rows, columns=columns)

    def top(self, n: int = 10, by: str = "nie_total") -> pandas.DataFrame:
        """The n units with the greatest magnitude of a term (over groups its mean magnitude): site, unit and terms."""
        import pandas

        if self.units is None:
            raise InputError("top: ranks units; mediate(..., each=True) measures them one by one")
        if by not in TERMS:
            raise InputError(f"by: expected one of {', '.join(TERMS)}, got {by!r}")
        wide = {term: getattr(self, term).view(len(self.units), -1) for term in TERMS}
        order = wide[by].abs().mean(1).argsort(descending=True, stable=True)[:n].tolist()
        rows = [(*self.coords["unit"][u], *(float(wide[term][u].mean()) for term in TERMS)) for u in order]
        return pandas.DataFrame(rows, columns=["mediator", "unit", *TERMS])

    def to_xarray(self) -> Any:
        """The terms as an xarray.DataArray over term and `dims`."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        coords: dict[str, Any] = {"term": list(TERMS)}
        if self.units is not None:
            names = [f"{site} {unit}" for site, unit in self.coords["unit"]]
            coords |= {"unit": names, "site": ("unit", list(self.mediators))}
        if self.groups is not None:
            coords["group"] = list(self.groups)
        return xarray.DataArray(self.tensor.numpy(), dims=("term", *self.dims), coords=coords, name=self.outcome)

    def __str__(self) -> str:
        many = self.units is not None or self.groups is not None
        table = (self.top() if self.units is not None else self.to_dataframe()).to_string(index=False)
        lines = [f"mediation of {self.outcome} over {self.samples} samples", table]
        if not many:
            lines.append(f"bypass share (pure NDE / TE): {float(self.bypass_share):.4g}")
        return "\n".join([*lines, self.plan])


def _position(name: str, cut: bool, reaches: bool, each: bool) -> str:
    if each:
        name = f"all of {name}"
    if not reaches:
        return f"{name}: nothing of it reaches the output, its NIE is 0"
    return f"{name}: {'a' if cut else 'no'} cut between input and output{', its NDE is 0' if cut else ''}"


@torch.no_grad()
def mediate(
    module: nn.Module,
    x_base: Any,
    x_source: Any,
    mediators: str | Sequence[str],
    outcome: Outcome = "output.mean",
    *,
    each: bool = False,
    unit: str = "channel",
    heads: int | None = None,
    readout: Readout | None = None,
    per_sample: bool = True,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
) -> Mediation:
    """TE, pure and total NDE and NIE and their interaction of the change from x_base to x_source, through mediators.

    x_base (x0), x_source (x1): pairs of tensors (N, ...) or tuples of arguments. mediators: sites with chosen units,
    one spec or several, which mediate jointly; each=True measures every unit of theirs (`unit`, `heads`: see
    `selection.units`) as a mediator by itself, in one call. outcome: "output.mean"; "output[...]", the mean of the
    chosen elements; a callable that makes (rows,) of an output (rows, ...); or Groups, the mean of each group.
    readout: chooses the tensor of an output that is none. per_sample=False keeps means alone. tile: rows of one pass.

    Y(x, M(x')) is a run of x in which the mediator's units are forced to their values in the run of x'; other units of
    a mediator's site answer to x and to the mediators before them. The forced Y(x1, M(x1)) and Y(x0, M(x0)) are
    compared with plain runs of the module. Only what depends on a mediator runs again. Working memory grows neither
    with N nor with the number of units; results do with both, with per_sample=False with units only.

    Returns Mediation. InputError names the site and the remedy, or the module that is not reproduced.
    """
    specs = [mediators] if isinstance(mediators, str) else list(mediators)
    if not specs:
        raise InputError("mediators: expected at least one site")
    if not isinstance(replicates, int) or replicates < 0:
        raise InputError(f"replicates: expected an integer of at least 0, got {replicates!r}")
    args, _ = inputs_of(x_base)
    started = time.perf_counter()
    device = device_of(args)
    with quiet(module, device), kept_memory(device.type == "cpu"):
        pairs = Pairs(
            module, x_base, x_source, specs, unit=unit, heads=heads, reaching=False, readout=readout, tile=tile
        )
        reading = _Reading(outcome, pairs.shape, pairs.device)
        variants = _each(pairs, unit, heads) if each else [_jointly(pairs)]
        sums = _Sums(pairs.rows, sum(len(v.units) for v in variants), len(reading.names), per_sample, replicates, seed)
        flops, known = _measure(pairs, reading, variants, sums)
        return _result(pairs, reading, variants, sums, each, flops, known, time.perf_counter() - started)


@dataclass(frozen=True)
class _Variant:
    """A mediator, or the units of a site that are mediators one by one (their numbers and names)."""

    name: str
    targets: tuple
    units: tuple[int | None, ...]
    unit_names: tuple[str, ...]

    def values(self, traced: Trace) -> set[Value]:
        return {t.value(traced) for t in self.targets}

    def holding(self, traced: Trace) -> Holding:
        sites = self.values(traced)
        full = {t.value(traced) for t in self.targets if self.units == (None,) and bool((t.labels >= 0).all())}
        return Holding(traced, sites, full)


def _jointly(pairs: Pairs) -> _Variant:
    name = ", ".join(str(t.selection) for t in pairs.targets)
    return _Variant(name, tuple(pairs.targets), (None,), ("all",))


def _each(pairs: Pairs, unit: str, heads: int | None) -> list[_Variant]:
    found = []
    for t in pairs.targets:
        names = units(pairs.shapes[t.site], unit, heads).names
        found.append(_Variant(t.site, (t,), t.units, tuple(names[u] for u in t.units)))
    return found


class _Reading:
    """The outcome as a function of outputs (rows, ...) to (rows, G) float64."""

    def __init__(self, outcome: Outcome, shape: tuple[int, ...], device: torch.device):
        self.outcome, self.elements = outcome, 1
        self.names: tuple[str, ...] = ("output",)
        for n in shape:
            self.elements *= n
        self._means: GroupMeans | None = None
        self.groups: Groups | None = None  # whose means it is
        self.name = "outcome"
        if isinstance(outcome, str):
            self.name = outcome
            self.groups = from_labels(torch.where(_chosen(outcome, shape), 0, -1))
        elif isinstance(outcome, Groups):
            self.name, self.names = "mean of each group of the output", outcome.names
            if outcome.labels.numel() != self.elements:
                raise InputError(
                    f"outcome: groups partition {outcome.labels.numel()} elements, but the output has {self.elements}"
                )
            self.groups = outcome
        elif callable(outcome):
            self.name = getattr(outcome, "__name__", "outcome")
        else:
            raise InputError(
                'outcome: expected "output.mean", "output[...]", a callable y -> (rows,) or Groups, '
                f"got {type(outcome).__name__}"
            )
        if self.groups is not None:
            self.groups = self.groups.to(device)
            self._means = GroupMeans(self.groups, device)

    @property
    def grouped(self) -> bool:
        return isinstance(self.outcome, Groups)

    def __call__(self, y: Tensor) -> Tensor:
        if self._means is not None:
            found = self._means(y.flatten(1))
        else:
            assert callable(self.outcome)
            made = self.outcome(y)
            if not isinstance(made, Tensor) or made.shape != y.shape[:1]:
                given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise InputError(f"outcome: {self.name} gives {given} for {len(y)} rows, expected (rows,), one a row")
            found = made.double()[:, None]
        return self.checked(found)

    def checked(self, found: Tensor) -> Tensor:
        """The same outcomes; InputError where they are not finite."""
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"outcome: {self.name} is NaN or infinite where a mediator is forced")
        return found


def _chosen(outcome: str, shape: tuple[int, ...]) -> Tensor:
    """The elements that "output.mean" or "output[...]" means."""
    selection = parse("output" if outcome == "output.mean" else outcome)
    if selection.site != "output" or selection.side != "output":
        raise InputError(f'outcome: expected "output.mean" or "output[...]", got {outcome!r}')
    if selection.each:
        raise InputError(f"outcome: {outcome!r} is several; give Groups for a value of each")
    return selection.mask(shape)


class _Sums:
    """Terms added up over samples, and kept where asked for."""

    def __init__(self, rows: int, count: int, groups: int, per_sample: bool, replicates: int, seed: int):
        self._rows, self._replicates, self._seed = rows, replicates, seed
        self.terms = torch.zeros(len(TERMS), count, groups, dtype=torch.float64)
        self.outcomes = torch.zeros(4, count, groups, dtype=torch.float64)
        self.kept = torch.zeros(len(TERMS), rows, count, groups, dtype=torch.float64) if per_sample else None
        drawn = len(resampling_weights(replicates, 1, seed, 0, rows)) if replicates else 0
        self.drawn = torch.zeros(3, drawn, count, groups, dtype=torch.float64)
        self.weights = torch.zeros(drawn, dtype=torch.float64)

    def start(self, part: slice) -> Tensor:
        """The bootstrap weights (R, B) of some samples."""
        w = resampling_weights(self._replicates, part.stop - part.start, self._seed, part.start, self._rows).double()
        w = w[: len(self.weights)]
        self.weights += w.sum(1)
        return w

    def add(self, part: slice, where: slice, w: Tensor, y: Sequence[Tensor]) -> None:
        """y: Y(x0, M(x0)), Y(x0, M(x1)), Y(x1, M(x0)), Y(x1, M(x1)), each (B, units, G) float64."""
        y00, y01, y10, y11 = y = [a.cpu() for a in y]
        te, nde, nie = y11 - y00, y10 - y00, y01 - y00
        terms = torch.stack([te, nde, y11 - y01, nie, y11 - y10, (y11 - y10) - nie])
        self.terms[:, where] += terms.sum(1)
        self.outcomes[:, where] += torch.stack(y).sum(1)
        if self.kept is not None:
            self.kept[:, part, where] = terms
        if len(self.drawn[0]):
            self.drawn[:, :, where] += torch.einsum("rb,tbug->trug", w, torch.stack([te, nde, nie]))


def _measure(pairs: Pairs, reading: _Reading, variants: Sequence[_Variant], sums: _Sums) -> tuple[int, list[str]]:
    """All mediations, tile by tile of the samples; the operations they took, and the sites behind which are kernels."""
    alone = [v.targets[0] for v in variants if v.units != (None,) and reading.groups is not None]
    kernels = kernels_behind(pairs.passes, alone)
    by_kernel = [v.units != (None,) and v.targets[0].selection in kernels for v in variants]
    most = max((len(v.units) for v, known in zip(variants, by_kernel, strict=True) if not known), default=1)
    repeats = pairs.repeats(most)
    traced: dict[int, tuple[Trace, list[Holding]]] = {}
    flops = 0
    for part in slices(pairs.rows, pairs.samples):
        size = part.stop - part.start
        if size not in traced:
            now = pairs.trace(part, repeats)
            traced[size] = now, [v.holding(now) for v in variants]
        now, holdings = traced[size]
        keep = {v for h in holdings for v in h.needs}
        runs = [pairs.run(now, part, repeats, keep, source) for source in (False, True)]
        w = sums.start(part)
        offset = 0
        for variant, holding, known in zip(variants, holdings, by_kernel, strict=True):
            masks = {value: _union(variant, now, value, pairs.device) for value in variant.values(now)}
            own = []
            for source, run in enumerate(runs):
                # M(x) forced in the run of x itself: the row order of the forced runs, whose rounding it then shares
                y = holding.output(run, {v: Held(masks[v], run[v]) for v in masks})
                if not offset:
                    pairs.check_reproduced(y, part, repeats, bool(source))
                own.append(reading(y).view(size, repeats, -1))
            flops += 2 * holding.flops
            if known:
                (value,) = masks
                acts = [run[value][::repeats] for run in runs]
                crossed, ran = _by_kernel(kernels[variant.targets[0].selection], variant, acts, reading)
                flops += ran
                here = [a[:, :1].expand_as(crossed[0]) for a in own]
                where = slice(offset, offset + len(variant.units))
                sums.add(part, where, w, [here[0], *(a + c for a, c in zip(here, crossed, strict=True)), here[1]])
                offset += len(variant.units)
                continue
            for chunk in slices(len(variant.units), repeats):
                n = chunk.stop - chunk.start
                if variant.units != (None,):
                    (value,) = masks
                    numbers = [u for u in variant.units[chunk] if u is not None]
                    masks = {value: chosen_units(variant.targets[0], numbers, repeats, size, pairs.device)}
                crossed = []
                for run, other in ((0, 1), (1, 0)):
                    held = {v: Held(m, runs[other][v]) for v, m in masks.items()}
                    crossed.append(reading(holding.output(runs[run], held)).view(size, repeats, -1)[:, :n])
                flops += 2 * holding.flops
                where = slice(offset + chunk.start, offset + chunk.stop)
                sums.add(part, where, w, [own[0][:, :n], *crossed, own[1][:, :n]])
            offset += len(variant.units)
    return flops, [v.name for v, known in zip(variants, by_kernel, strict=True) if known]


def _by_kernel(
    kernel: Kernel, variant: _Variant, acts: Sequence[Tensor], reading: _Reading
) -> tuple[list[Tensor], int]:
    """Y(x0, M(x1)) - Y(x0, M(x0)) and Y(x1, M(x0)) - Y(x1, M(x1)) of every unit, (B, units, G) float64, of means of
    groups; and the operations. acts: the site's activations in both runs."""
    (target,) = variant.targets
    assert reading.groups is not None
    pairs = ((acts[0], acts[1]), (acts[1], acts[0]))
    changes = [kernel.effects(a, b, target, "signed", reading.groups).double() for a, b in pairs]
    return [reading.checked(c) for c in changes], 2 * len(acts[0]) * len(variant.units) * kernel.flops


def _union(variant: _Variant, traced: Trace, value: Value, device: torch.device) -> Tensor:
    """The units chosen of a value, which several specs may name: (1, E)."""
    masks = [chosen_whole(t, device) for t in variant.targets if t.value(traced) == value]
    return torch.stack(masks).any(0)


def _result(
    pairs: Pairs,
    reading: _Reading,
    variants: Sequence[_Variant],
    sums: _Sums,
    each: bool,
    flops: int,
    known: Sequence[str],
    seconds: float,
) -> Mediation:
    one, cut, reaches = pairs.one, {}, {}
    for v in variants:
        values = v.values(one)
        whole = all(bool(_union(v, one, value, pairs.device).all()) for value in values)
        cut[v.name] = (each or whole) and one.output not in one.reached(one.inputs, values)
        reaches[v.name] = one.output in one.reached(values)

    def shaped(t: Tensor) -> Tensor:
        t = t if reading.grouped else t[..., 0]
        return t if each else t.select(-2 if reading.grouped else -1, 0)

    terms = {name: shaped(t / pairs.rows) for name, t in zip(TERMS, sums.terms, strict=True)}
    some = sums.weights > 0  # all weights are zero once in e^N replicates
    count = sum(len(v.units) for v in variants)
    share = 100 * flops / max(1, 4 * count * sum(one.flops) * pairs.rows) if each else None
    positions = "; ".join(_position(v.name, cut[v.name], reaches[v.name], each) for v in variants)
    plan = (
        f"{count} mediation{'s' if count > 1 else ''} of {pairs.rows} samples, tiles of {pairs.tile} rows; "
        + (f"{share:.0f} % of the operations of whole passes; " if share is not None else "")
        + (f"kernels behind {', '.join(known)}; " if known else "")
        + f"{positions}; {1e6 * seconds / (count * pairs.rows):.1f} us a sample and mediation"
    )
    return Mediation(
        **terms,
        outcomes=shaped(sums.outcomes / pairs.rows),
        outcome=reading.name,
        mediators=tuple(v.name for v in variants for _ in v.units) if each else tuple(map(str, _specs(pairs))),
        units=tuple(name for v in variants for name in v.unit_names) if each else None,
        groups=reading.names if reading.grouped else None,
        samples=pairs.rows,
        cut=cut,
        reaches=reaches,
        replicates=shaped(sums.drawn[:, some] / sums.weights[some, None, None]) if len(some) else None,
        per_sample=None if sums.kept is None else {name: shaped(t) for name, t in zip(TERMS, sums.kept, strict=True)},
        plan=plan,
    )


def _specs(pairs: Pairs) -> list:
    return [t.selection for t in pairs.targets]
