"""Attribution patching: the effects of all units of all sites from one backward pass, with the error it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .engine import slices
from .passes import Passes, Target, targets_at
from .patch_sweeps import Sources, Sweep
from .patching import Readout, device_of, inputs_of, quiet, read_out, run_with_cache, taken
from .selection import Selection

if TYPE_CHECKING:
    import pandas

TILE = 64  # rows of one pass, whose activations are all kept for the backward pass


@dataclass(frozen=True)
class Attribution:
    """First-order effects of setting units to the source's values, one at a time, on a scalar outcome.

    tensor: (unit,) mean over samples of the sum over the unit's elements of dY/da (a_source - a_base), in the outcome's
    unit. sites, units: of each. exact: (unit,) the true mean effect, NaN where it was not computed. plan: how far off
    the attributions are where both are known.
    """

    tensor: Tensor
    sites: tuple[str, ...]
    units: tuple[int, ...]
    exact: Tensor
    samples: int
    plan: str = field(default="", repr=False)

    @property
    def error(self) -> float:
        """Root mean square of attribution - exact over that of exact, on the sampled units; NaN without any."""
        known = ~self.exact.isnan()
        if not bool(known.any()):
            return float("nan")
        return float((self.tensor - self.exact)[known].norm() / self.exact[known].norm())

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per unit: site, unit, attribution, exact."""
        import pandas

        columns = {"site": self.sites, "unit": self.units, "attribution": self.tensor, "exact": self.exact}
        return pandas.DataFrame({name: list(map(_plain, column)) for name, column in columns.items()})

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The n units of greatest absolute attribution."""
        table = self.to_dataframe()
        return table.reindex(table.attribution.abs().sort_values(ascending=False).index).head(n).reset_index(drop=True)


def _plain(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) else x


def attribute(
    module: nn.Module,
    x_base: Any,
    x_source: Any,
    sites: Sequence[str] = ("*",),
    *,
    unit: str = "channel",
    heads: int | None = None,
    outcome: Callable[[Tensor], Tensor] | None = None,
    readout: Readout | None = None,
    exact: int = 16,
    seed: int = 0,
    tile: int | None = None,
) -> Attribution:
    """What patching each unit would do to a scalar outcome, to first order, by one backward pass for all of them.

    x_base, x_source, sites, unit, heads, readout, tile: as in `patch_sweep`. outcome: (rows, ...) -> (rows,), the mean
    of a row's output by default. exact: on so many units, drawn by `seed`, the true effect is computed as well, and the
    plan states the error. In eval mode; modes and gradients are left as they were (attribution patching: Nanda 2023).
    InputError names the site and the remedy, and an outcome of a wrong shape.
    """
    if not isinstance(exact, int) or exact < 0:
        raise InputError(f"exact: expected an integer of at least 0, got {exact!r}")
    args, rows = inputs_of(x_base)
    source_args, source_rows = inputs_of(x_source)
    if source_rows != rows:
        raise InputError(f"x_source: has {source_rows} rows, x_base {rows}; they are pairs")
    started = time.perf_counter()

    def scalar(y: Any) -> Tensor:
        y = read_out(y, readout)
        value = y.flatten(1).mean(1) if outcome is None else outcome(y)
        if not isinstance(value, Tensor) or value.shape != (len(y),):
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"outcome: expected (rows,) for an output (rows, ...), got {given} for {len(y)} rows")
        return value

    with quiet(module, device_of(args)):
        passes = Passes(module, args, rows, lambda y: scalar(y)[:, None])
        targets = targets_at(passes, sites, unit, heads)
        total = torch.zeros(sum(len(t.units) for t in targets), dtype=torch.float64)
        for part in slices(rows, min(rows, tile or TILE)):
            cache = run_with_cache(module, taken(source_args, rows, part), [t.site for t in targets])[1]
            total += _attributed(module, taken(args, rows, part), targets, cache, scalar)
        labels = [(n, u) for n, t in enumerate(targets) for u in t.units]
        picks = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:exact].sort().values
        truth = torch.full_like(total, torch.nan)
        if len(picks):
            by_target: dict[int, list[int]] = {}
            for n, u in (labels[at] for at in picks.tolist()):
                by_target.setdefault(n, []).append(u)
            picked = [replace(targets[n], units=tuple(numbers)) for n, numbers in by_target.items()]
            sources = Sources(module, source_args, rows, "resample", None, seed)
            with torch.no_grad():
                sweep = Sweep(passes, picked, sources, "signed", None, False, tile)
                truth[picks] = sweep.run(0, seed, started).whole()
    result = Attribution(
        total / rows, tuple(targets[n].site for n, _ in labels), tuple(u for _, u in labels), truth, rows
    )
    plan = f"one backward pass for {len(labels)} units"
    if len(picks):
        plan += f"; on {len(picks)} of them, exact too, it is off by {100 * result.error:.0f} % (root mean square)"
    return replace(result, plan=f"{plan}; {time.perf_counter() - started:.2f} s")


def _attributed(
    module: nn.Module,
    args: tuple,
    targets: Sequence[Target],
    source: dict[str, Tensor],
    scalar: Callable[[Any], Tensor],
) -> Tensor:
    """Sums over these samples of gradient times change, (units of all targets,) float64."""
    modules, seen = dict(module.named_modules()), {}
    parameters = [p for p in module.parameters() if p.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for p in parameters:
            p.requires_grad_(False)
            stack.callback(p.requires_grad_, True)
        for site, selection in {t.site: Selection(t.selection.site, t.selection.side) for t in targets}.items():

            def noted(a: Tensor, site: str = site) -> Tensor:
                if not a.requires_grad:
                    a = a.detach().requires_grad_()
                seen[site] = a
                return a.clone()  # a later module may change what it is given in place

            def before(_module: nn.Module, args: tuple, noted: Callable = noted) -> tuple:
                return noted(args[0]), *args[1:]

            def after(_module: nn.Module, _args: tuple, out: Tensor, noted: Callable = noted) -> Tensor:
                return noted(out)

            part = modules[selection.site]
            handle = (
                part.register_forward_pre_hook(before)
                if selection.side == "input"
                else part.register_forward_hook(after)
            )
            stack.callback(handle.remove)
        value = scalar(module(*args))
        names = list(seen)
        gradients = dict(zip(names, torch.autograd.grad(value.sum(), [seen[n] for n in names]), strict=True))
    parts = []
    for t in targets:
        change = gradients[t.site] * (source[t.site] - seen[t.site].detach())
        by_element = change.detach().flatten(1).double().sum(0).cpu()
        kept = t.labels >= 0
        sums = torch.zeros(int(t.labels.max()) + 1, dtype=torch.float64)
        sums.index_add_(0, t.labels[kept].long(), by_element[kept])
        parts.append(sums[list(t.units)])
    return torch.cat(parts)
