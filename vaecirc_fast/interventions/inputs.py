"""Input manipulation (level 1): inputs that differ in one thing, and what that does to the units of every site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.dataset import Dataset
from ..errors import InputError
from ..groups import Groups, channels, from_labels
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from ..ops import effect_reduction
from .selection import matching_sites

if TYPE_CHECKING:
    import pandas


def factor_pairs(
    ds: Dataset, n: int, generator: torch.Generator | None = None, factors: Sequence[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`n` images of `ds`, and for each factor the same images with that factor redrawn to another value, all else
    equal.

    Returns base (n, C, H, W) and a tensor of the same shape per factor name. Factors with one value cannot be varied
    and are left out, unless `factors` asks for them by name: InputError. Only for data sets whose factors determine the
    image.
    """
    sizes = dict(zip(ds.factor_names, ds.factor_sizes, strict=True))
    names = [name for name, size in sizes.items() if size > 1] if factors is None else list(factors)
    for name in names:
        if name not in sizes:
            raise InputError(f"factors: {name!r} is unknown; {ds.name} has {', '.join(sizes)}")
        if sizes[name] < 2:
            raise InputError(f"factors: {name!r} has one value, so it cannot be varied")
    if not ds.complete:
        raise InputError(
            f"factor_pairs: the factors of {ds.name!r} do not determine the image, so none can be varied alone"
        )
    base, v = ds.sample(n, generator)
    variants = {}
    for name in names:
        k = ds.factor_names.index(name)
        device = generator.device if generator is not None else torch.device("cpu")
        step = torch.randint(1, sizes[name], (n,), generator=generator, device=device).to(v.device)
        changed = v.clone()
        changed[:, k] = (v[:, k] + step) % sizes[name]
        variants[name] = ds.images(ds.index_of(changed))
    return base, variants


def mask_region(x: Tensor, rows: slice, columns: slice, value: float | Tensor = 0.0) -> Tensor:
    """Images x (N, C, H, W) with a rectangle set to `value`: a number, or an image (C, H, W) such as the mean."""
    _check_region(x, rows, columns)
    if isinstance(value, Tensor) and value.ndim and value.shape != x.shape[1:]:
        raise InputError(f"value: expected a number or an image {tuple(x.shape[1:])}, got {tuple(value.shape)}")
    changed = x.clone()
    fill = value[:, rows, columns] if isinstance(value, Tensor) and value.ndim else value
    changed[:, :, rows, columns] = fill
    return changed


def noise_region(x: Tensor, rows: slice, columns: slice, sd: float, generator: torch.Generator | None = None) -> Tensor:
    """Images x (N, C, H, W) in [0, 1] with Gaussian noise of standard deviation `sd` in a rectangle, clamped."""
    _check_region(x, rows, columns)
    if not sd > 0:
        raise InputError(f"sd: expected a positive number, got {sd}")
    changed = x.clone()
    here = changed[:, :, rows, columns]
    device = generator.device if generator is not None else x.device
    noise = torch.randn(here.shape, generator=generator, device=device).to(here)
    changed[:, :, rows, columns] = (here + sd * noise).clamp(0, 1)
    return changed


def redraw_columns(
    table: Tensor,
    columns: Sequence[int],
    how: str = "marginal",
    generator: torch.Generator | None = None,
    neighbours: int = 10,
) -> Tensor:
    """A table (N, F) with `columns`, one feature or a feature group, taken jointly from other rows.

    how: "marginal", from a random other row. how="neighbour": from a random one of the `neighbours` rows nearest in the
    remaining columns (Euclidean, each column in its sd), so that the change stays plausible given the rest.
    """
    if table.ndim != 2 or table.shape[0] < 2 or not table.is_floating_point():
        raise InputError(f"table: expected floats of shape (N >= 2, F), got {table.dtype} {tuple(table.shape)}")
    n, width = table.shape
    chosen = list(dict.fromkeys(columns))
    if not chosen or min(chosen) < 0 or max(chosen) >= width:
        raise InputError(f"columns: expected some of 0..{width - 1}, got {list(columns)}")
    if neighbours < 1:
        raise InputError(f"neighbours: expected at least 1, got {neighbours}")
    device = generator.device if generator is not None else torch.device("cpu")
    if how == "marginal":
        cycle = torch.randperm(n, generator=generator, device=device)
        donors = torch.empty_like(cycle)
        donors[cycle] = cycle.roll(1)  # a random cycle: nobody gives to itself
    elif how == "neighbour":
        rest = [c for c in range(width) if c not in chosen]
        if not rest:
            raise InputError("columns: how='neighbour' needs a column outside the group to be near in")
        donors = _near_rows(table[:, rest], min(neighbours, n - 1), generator)
    else:
        raise InputError(f"how: expected 'marginal' or 'neighbour', got {how!r}")
    changed = table.clone()
    changed[:, chosen] = table[donors.to(table.device)][:, chosen]
    return changed


@dataclass(frozen=True)
class InputEffects:
    """What each manipulation of the input does to each unit: the factor x unit matrix.

    tensor: (variant, unit), mean over pairs of mean |change of the unit's activation|, in sd of that activation over
    the base inputs. A unit that does not vary over them has no such unit of measurement: 0 if no variant moves it
    either, NaN in every row if one does. float64 where a site's activations are, else float32.
    variants: names; sites, units: of each column.
    replicates: (replicate, variant, unit), Poisson bootstrap over pairs.
    """

    tensor: Tensor
    variants: tuple[str, ...]
    sites: tuple[str, ...]
    units: tuple[int, ...]
    samples: int
    replicates: Tensor | None = field(default=None, repr=False)

    def to_dataframe(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per variant and unit: variant, site, unit, effect, low, high."""
        import pandas

        rows = []
        for k, variant in enumerate(self.variants):
            for u, (site, unit) in enumerate(zip(self.sites, self.units, strict=True)):
                value, low, high = float(self.tensor[k, u]), float("nan"), float("nan")
                if self.replicates is not None:
                    low, high = resampled_interval(value, self.replicates[:, k, u].numpy(), self.samples, level)
                rows.append((variant, site, unit, value, low, high))
        return pandas.DataFrame(rows, columns=["variant", "site", "unit", "effect", "low", "high"])


@torch.no_grad()
def input_effects(
    module: nn.Module,
    base: Tensor,
    variants: Mapping[str, Tensor],
    sites: Sequence[str],
    *,
    unit: str = "channel",
    batch_size: int = 256,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> InputEffects:
    """Effects of replacing `base` (N, ...) by each of `variants` (name -> (N, ...)) on the units of the sites of
    `module`.

    sites: dotted paths or shell-style patterns. unit: "channel", the first axis of a site's output after the batch, or
    "element". The module is called as module(x) in eval mode; its modes are restored. Of a site that runs more than
    once in a call, the last output counts. Memory does not grow with N.
    InputError for shapes that differ from the base's, a site that matches nothing, is not reached, gives no float
    tensor (N, ...), or gives NaN.
    """
    if unit not in ("channel", "element"):
        raise InputError(f"unit: expected 'channel' or 'element', got {unit!r}")
    if not variants:
        raise InputError("variants: expected at least one")
    if base.ndim < 2 or len(base) < 2:
        raise InputError(f"base: expected at least 2 inputs (N, ...), got shape {tuple(base.shape)}")
    for name, x in variants.items():
        if x.shape != base.shape or x.dtype != base.dtype:
            raise InputError(
                f"variants: {name!r} is {x.dtype} {tuple(x.shape)}, the base {base.dtype} {tuple(base.shape)}"
            )
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    names = list(dict.fromkeys(name for pattern in sites for name in matching_sites(module, pattern)))
    if not names:
        raise InputError("sites: expected at least one")
    total = pivots = None
    labels: list[tuple[str, int]] = []
    dtype = torch.float32
    with _recording(module, names) as record:
        for start in range(0, len(base), batch_size):
            rows = slice(start, start + batch_size)
            before = record(base[rows])
            partitions = {name: _units(before[name], unit) for name in names}
            if pivots is None:
                pivots = {name: _first(before[name], partitions[name]) for name in names}
                labels = [(name, u) for name in names for u in range(len(partitions[name]))]
            moments = torch.cat([_moments(before[name], partitions[name], pivots[name]) for name in names], 1)
            moved = []
            for x in variants.values():
                after = record(x[rows])
                parts = (_moved(before[name], after[name], partitions[name]) for name in names)
                moved.append(torch.cat(list(parts), 1))
            stacked = torch.stack(moved, 1)
            dtype, effects = stacked.dtype, stacked.double().cpu()
            broken = (~torch.isfinite(effects)).any(0).any(0)
            if bool(broken.any()):
                raise InputError(f"sites: {labels[int(broken.nonzero()[0])][0]!r} gives NaN or infinity")
            weights = resampling_weights(replicates, len(effects), seed, start, len(base)).double()
            drawn = torch.einsum("rn,nku->rku", weights, effects)
            update = [effects.sum(0), moments, drawn, weights.sum(1)]
            total = update if total is None else [a + b for a, b in zip(total, update, strict=True)]
    assert total is not None and pivots is not None
    effects, (count, first, second), drawn, weight = total
    effects = effects / len(base)
    sd = (second / count - (first / count).square()).clamp(min=0).sqrt()
    mean = torch.cat([pivots[name] for name in names]) + first / count
    rounding = torch.finfo(dtype).eps * torch.hypot(mean, sd)
    varies, moves = sd > rounding, (effects > rounding).any(0)

    def in_sd(effects: Tensor) -> Tensor:
        constant = torch.where(moves, torch.nan, torch.zeros_like(effects))
        return torch.where(varies, effects / torch.where(varies, sd, 1), constant).to(dtype)

    any_drawn = weight > 0  # all weights are zero once in e^N replicates
    return InputEffects(
        in_sd(effects),
        tuple(variants),
        tuple(site for site, _ in labels),
        tuple(u for _, u in labels),
        len(base),
        in_sd(drawn[any_drawn] / weight[any_drawn, None, None]) if replicates else None,
    )


@contextmanager
def _recording(module: nn.Module, names: Sequence[str]) -> Iterator[Any]:
    """Within, a function that runs the module in eval mode and returns the output of each site."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(f"sites: {name!r} gives {type(output).__name__}, expected a tensor")
            if not output.is_floating_point() or 0 in output.shape:
                raise InputError(
                    f"sites: {name!r} gives {output.dtype} {tuple(output.shape)}, expected floats (N, ...)"
                )
            found[name] = output.detach().clone()  # a later module may change it in place

        return hook

    def record(x: Tensor) -> dict[str, Tensor]:
        found.clear()
        module(x)
        for name in names:
            if name not in found:
                raise InputError(f"sites: {name!r} is not reached when the module runs; choose another site")
            if found[name].shape[:1] != x.shape[:1]:
                raise InputError(
                    f"sites: {name!r} gives shape {tuple(found[name].shape)} for {len(x)} inputs, expected (N, ...)"
                )
        return {name: y if y.ndim > 1 else y[:, None] for name, y in found.items()}

    modules = dict(module.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    was_training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for m in was_training:
            m.training = True


def _units(activation: Tensor, unit: str) -> Groups:
    """The units of a site as a partition of its output's elements."""
    size = activation[0].numel()
    if unit == "element" or activation.ndim == 2:
        return from_labels(torch.arange(size))
    return channels(activation.shape[1], 1, size // activation.shape[1])


def _first(activation: Tensor, units: Groups) -> Tensor:
    """The first activation of each unit, (U,) float64: sums are taken from there, so that a large mean cancels."""
    return activation[0].reshape(len(units), -1)[:, 0].double().cpu()


def _moments(activation: Tensor, units: Groups, pivot: Tensor) -> Tensor:
    """Number, sum and sum of squares of each unit's activations over samples and positions, less the unit's pivot:
    (3, U) float64."""
    by_unit = activation.double().reshape(len(activation), len(units), -1)
    by_unit = by_unit - pivot.to(by_unit.device)[:, None]
    count = torch.full((len(units),), float(by_unit.shape[0] * by_unit.shape[2]), dtype=torch.float64)
    return torch.stack([count, by_unit.sum((0, 2)).cpu(), by_unit.square().sum((0, 2)).cpu()])


def _moved(before: Tensor, after: Tensor, units: Groups) -> Tensor:
    """Mean |change| of each unit: (B, U)."""
    return effect_reduction(before.flatten(1), after.flatten(1)[:, None], "l1", groups=units)[:, 0]


def _check_region(x: Tensor, rows: slice, columns: slice) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x: expected floating images (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    if not x[:1, :1, rows, columns].numel():
        raise InputError(f"region: rows {rows}, columns {columns} hold no pixel of a {x.shape[2]} x {x.shape[3]} image")


def _near_rows(rest: Tensor, neighbours: int, generator: torch.Generator | None) -> Tensor:
    """For each row a random one of its nearest others."""
    from sklearn.neighbors import NearestNeighbors

    rest = rest.double().cpu()
    if not bool(torch.isfinite(rest).all()):
        raise InputError("table: how='neighbour' needs finite numbers in the remaining columns")
    sd = rest.std(0)
    scaled = (rest / torch.where(sd > 0, sd, 1)).numpy()
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(scaled).kneighbors(return_distance=False)
    device = generator.device if generator is not None else torch.device("cpu")
    pick = torch.randint(neighbours, (len(rest),), generator=generator, device=device).cpu()
    return torch.from_numpy(nearest)[torch.arange(len(rest)), pick]
