"""Direct edges between neighbouring layers of any module: what each unit alone does to each unit of the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import InputError, MissingExtra
from ..metrics.statistics import FEW, resampled_interval, resampling_weights
from ..ops.direct_edges import in_sd
from ..reference.direct_edges import KINDS, reduced
from .engine import most_bytes, slices
from .networks import ACTIVATIONS, RESHAPES
from .passes import value_at
from .patching import device_of, inputs_of, quiet, run_with_cache, taken
from .trace import Place, Step, Trace, Value, trace

if TYPE_CHECKING:
    import pandas

aten = torch.ops.aten
# Activations that the op does not know; they run as the trace has them.
_OTHERS = (
    *(aten.gelu.default, aten.gelu_.default, aten.softplus.default, aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.mish.default, aten.mish_.default),
    *(aten.log_sigmoid_forward.default, aten.clamp_min.default, aten.clamp.default, aten.threshold.default),
)
_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)
PAIRS = 256  # of one pass
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class DirectEdges:
    """Effects of each unit of `parent` on each unit of `child` when that unit alone takes the source's value.

    tensor: (V, U) in units of the child's activation (mse: squared). parent_sd (U,), child_sd (V,): standard deviations
    of the activations over the base and source inputs (and positions); change (U,): how much the parents changed,
    reduced as the edges were. activation: the child's own. replicates: (R, V, U) bootstrap over pairs, or None.
    """

    tensor: Tensor
    parent: str
    child: str
    kind: str
    activation: str
    pairs: int
    parent_sd: Tensor
    child_sd: Tensor
    change: Tensor
    replicates: Tensor | None = field(default=None, repr=False)
    plan: str = field(default="", repr=False)
    dims: tuple[str, ...] = ("child", "parent")

    @property
    def coords(self) -> dict[str, list]:
        """Numbers of the units on each axis."""
        return {"child": list(range(self.tensor.shape[0])), "parent": list(range(self.tensor.shape[1]))}

    def in_sd(self) -> Tensor:
        """(V, U) in child sd per parent sd: what rescaling a ReLU unit does not change. NaN where an sd is 0."""
        sds = (self.change.double(), self.parent_sd.double(), self.child_sd.double())
        return in_sd(self.tensor.double(), *sds, self.kind)

    def to_dataframe(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per edge: parent, child (numbers of units), edge, in_sd, low, high (of edge, from replicates)."""
        import pandas

        children, parents = self.tensor.shape
        low, high = self._bounds(level)
        return pandas.DataFrame(
            {
                "parent": np.tile(np.arange(parents), children),
                "child": np.repeat(np.arange(children), parents),
                "edge": self.tensor.flatten().cpu().numpy(),
                "in_sd": self.in_sd().flatten().cpu().numpy(),
                "low": low.ravel(),
                "high": high.ravel(),
            }
        )

    def _bounds(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        values = self.tensor.double().cpu().numpy()
        if self.replicates is None:
            return np.full(values.shape, np.nan), np.full(values.shape, np.nan)
        drawn = self.replicates.double().cpu().numpy()
        if self.pairs >= FEW:
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
            return low, high
        bounds = np.empty((2, *values.shape))
        for at in np.ndindex(*values.shape):
            bounds[(slice(None), *at)] = resampled_interval(
                float(values[at]), drawn[(slice(None), *at)], self.pairs, level
            )
        return bounds[0], bounds[1]

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The n edges that are largest in size."""
        return self.to_dataframe().sort_values("edge", ascending=False, key=abs, ignore_index=True).head(n)

    def to_xarray(self) -> Any:
        """The tensor as an xarray.DataArray over child and parent."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        return xarray.DataArray(self.tensor.cpu().numpy(), dims=self.dims, coords=self.coords, name=self.kind)


@torch.no_grad()
def direct_edges(
    module: nn.Module,
    x_base: Any,
    x_source: Any,
    parent: str,
    child: str,
    *,
    kind: str = "l1",
    replicates: int = 0,
    seed: int = 0,
    tile: int | None = None,
) -> DirectEdges:
    """Effect of each unit of site `parent` on each unit of `child`, the next linear layer or convolution, exactly.

    One unit of the parent takes its value from x_source's run, all else is frozen at x_base's, and the child is read
    after its own activation: x_base receives, x_source gives, pair by pair, tensors (N, ...) or tuples of arguments.
    parent: a module whose output, or "path.input" whose input, the child's layer reads through nothing but activations,
    eval-mode batch norm and reshapes; child: a Linear, Conv or ConvTranspose module that runs once. Units: elements of
    a vector, channels otherwise; of several positions the child's mean is taken. kind: "l1", "mse", "rms" or "signed",
    over pairs and positions. replicates: of a bootstrap over pairs, (R, V, U) floats. tile: pairs of one pass, 256.

    Linear children with known activations take the op `vf.ops.direct_edges`; the rest is unrolled in torch, in tiles.
    In eval mode, without gradients. InputError names what lies between the sites, or which site does not fit.
    """
    started = time.perf_counter()
    if kind not in KINDS:
        raise InputError(f"kind: {kind!r} is unknown; known: {', '.join(KINDS)}")
    if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 0:
        raise InputError(f"replicates: expected a whole number >= 0, got {replicates!r}")
    args, rows = inputs_of(x_base)
    source_args, source_rows = inputs_of(x_source)
    if source_rows != rows:
        raise InputError(f"x_source: has {source_rows} rows, x_base {rows}; they are pairs")
    layer = _layer(module, parent, child)
    with quiet(module, device_of(args)):
        joined = _joined(module, args, rows, parent, child)
    engine = _Engine(layer, joined)
    squares = kind == "rms"  # means of squares add up, roots do not
    number = KINDS.index("mse" if squares else kind)
    sums: dict[str, Tensor] = {}
    weights_sum = torch.zeros(0)
    site = f"{child}.input"
    for part in slices(rows, PAIRS if tile is None else tile):
        size = part.stop - part.start
        cache = run_with_cache(module, taken(args, rows, part), [site, child])[1]
        given = run_with_cache(module, taken(source_args, rows, part), [site, child])[1]
        base, source, pre = cache[site], given[site], cache[child]
        if source.shape != base.shape:
            raise InputError(f"{parent}: gives {tuple(source.shape)} for x_source, {tuple(base.shape)} for x_base")
        if not all(bool(torch.isfinite(t).all()) for t in (base, source, pre)):
            raise InputError(f"{child}: its input or output is NaN or infinite")
        if base.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"module: computes in {base.dtype}; edges need float32 or float64: convert it with .float()"
            )
        if part.start == 0:
            _refuse_other_layers(layer, child, source - base, given[child] - pre)
        update = {"edges": size * engine.edges(base, source, pre, number)}
        change = joined.by_unit(source - base)
        of_change = "l1" if kind == "signed" else KINDS[number]
        update["change"] = size * reduced(change, KINDS.index(of_change), (0, 2)).double()
        for name, both in (
            ("parent", joined.by_unit(torch.cat([base, source]))),
            ("child", _channels(joined.after(torch.cat([pre, given[child]])), joined.last)),
        ):
            # Moments about the first value: those of a unit that never varies are 0, without rounding.
            first = sums.setdefault(f"{name} first", both[0, :, 0].double())
            moved = both.double() - first[:, None]
            update |= {f"{name} sum": moved.sum((0, 2)), f"{name} squares": moved.square().sum((0, 2))}
            update[f"{name} count"] = torch.tensor(float(both.shape[0] * both.shape[2]))
        if replicates:
            w = resampling_weights(replicates, size, seed, part.start, rows)
            drawn = [engine.weighted(base, source, pre, number, one) for one in w]
            update["drawn"] = torch.stack(drawn)
            weights_sum = w.sum(1) if not len(weights_sum) else weights_sum + w.sum(1)
        for name, value in update.items():
            sums[name] = sums[name] + value if name in sums else value
    edges, change = sums["edges"] / rows, sums["change"] / rows
    drawn = None
    if replicates:
        some = weights_sum > 0
        drawn = (sums["drawn"][some] / weights_sum[some].to(edges)[:, None, None]).cpu()
    if squares:
        edges, change, drawn = edges.sqrt(), change.sqrt(), None if drawn is None else drawn.sqrt()
    seconds = time.perf_counter() - started
    return DirectEdges(
        edges.to(base.dtype),
        parent,
        child,
        kind,
        joined.name,
        rows,
        _sd(sums, "parent"),
        _sd(sums, "child"),
        change,
        replicates=drawn,
        plan=engine.plan(rows, edges.numel(), seconds),
    )


def _sd(sums: dict[str, Tensor], name: str) -> Tensor:
    mean = sums[f"{name} sum"] / sums[f"{name} count"]
    return (sums[f"{name} squares"] / sums[f"{name} count"] - mean.square()).clamp(min=0).sqrt()


def _site(parent: str) -> tuple[str, bool]:
    """The path of a parent, and whether it is what goes into that module."""
    path = parent.removesuffix(".input")
    return path, path != parent


def _layer(module: nn.Module, parent: str, child: str) -> nn.Module:
    modules = {name: m for name, m in module.named_modules() if name}
    for name, site in (("parent", _site(parent)[0]), ("child", child)):
        if site not in modules:
            known = ", ".join(list(modules)[:20]) or "no submodules"
            raise InputError(f"{name}: no module is called {site!r}; the module has {known}")
    layer = modules[child]
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        raise InputError(f"child: {child} is a {type(layer).__name__}, expected a Linear, Conv or ConvTranspose module")
    return layer


@dataclass(frozen=True)
class _Joined:
    """How a parent and a child are joined. labels: (E,) the parent's unit of each element of a row of the child's
    input; last: whether the child's channels are its last axis; steps: what follows the child at once; name: of it."""

    labels: Tensor
    units: int
    last: bool
    steps: tuple[Step, ...]
    activation: str
    slope: float
    name: str

    def after(self, c: Tensor) -> Tensor:
        """The child's activation of pre-activations of any batch size."""
        for step in self.steps:
            out = step.func(c.clone() if step.written else c, *step.args[1:], **step.kwargs)
            c = out[0] if isinstance(out, tuple) else out
        return c

    def by_unit(self, a: Tensor) -> Tensor:
        """Activations that the child reads, as (B, U, elements of a unit)."""
        order = torch.argsort(self.labels, stable=True).to(a.device)
        return a.flatten(1)[:, order].unflatten(1, (self.units, -1))


def _joined(module: nn.Module, args: tuple, rows: int, parent: str, child: str) -> _Joined:
    """Reads the trace of one row: InputError names what lies between parent and child."""
    one = taken(args, rows, slice(0, 1))
    where = [n for n, a in enumerate(one) if isinstance(a, Tensor) and a.ndim]

    def call(*tensors: Tensor) -> Any:
        full = list(one)
        for n, t in zip(where, tensors, strict=True):
            full[n] = t
        y = module(*full)
        return y if isinstance(y, Tensor) else _first_tensor(y)

    path, entering = _site(parent)
    made, _ = trace(module, call, [one[n] for n in where], list({path, child}))
    above, below = (made.places.get(name, Place()) for name in (path, child))
    start = value_at(above.inputs if entering else above.outputs, parent)
    read = value_at(below.inputs, f"{child}.input")
    pre = value_at(below.outputs, child)
    _refuse_what_lies_between(made, start, read, parent, child)
    inputs = dict(zip(made.inputs, [one[n] for n in where], strict=True))
    values = made.everything().run(inputs, {start, read, pre})
    shape = tuple(values[start].shape[1:])
    if math.prod(shape) != values[read][0].numel() or not shape:
        raise InputError(f"{parent}: gives {shape} and {child} reads {tuple(values[read].shape[1:])}: no unit for unit")
    modules = dict(module.named_modules())
    # Features are last in what a Linear reads and gives, first in images.
    same = shape == tuple(values[read].shape[1:])
    axis = len(shape) - 1 if isinstance(modules[child if same else path], nn.Linear) else 0
    numbers = torch.arange(shape[axis]).view([-1 if n == axis else 1 for n in range(len(shape))])
    last = isinstance(modules[child], nn.Linear)
    steps, activation, slope, name = _activation(made, pre)
    return _Joined(numbers.expand(shape).reshape(-1), shape[axis], last, steps, activation, slope, name)


def _first_tensor(y: Any) -> Any:
    from torch.utils._pytree import tree_iter

    return next((t for t in tree_iter(y) if isinstance(t, Tensor)), y)


def _refuse_what_lies_between(made: Trace, start: Value, read: Value, parent: str, child: str) -> None:
    """Goes from what the child reads back to the parent's output."""
    makers = {v: step for step in made.steps for v in (*step.made, *(v for _, v in step.written)) if v is not None}
    value = read
    while value != start:
        step = makers.get(value)
        if step is None or not _comes_from(makers, value, start):
            raise InputError(f"{child}: does not read what {parent} gives; expected neighbouring layers")
        known = step.func in ACTIVATIONS or step.func in _OTHERS or step.func in RESHAPES or step.func in _NORMS
        if not known or len(step.reads) != 1:
            raise InputError(
                f"{parent} -> {child}: {step.func} lies between them; edges are of neighbouring layers, joined by "
                "activations, batch norm and reshapes alone"
            )
        value = step.reads[0]


def _comes_from(makers: dict[Value, Step], value: Value, start: Value) -> bool:
    found, todo = {value}, [value]
    while todo:
        step = makers.get(todo.pop())
        fresh = [v for v in (step.reads if step else ()) if v not in found]
        found.update(fresh)
        todo += fresh
    return start in found


def _activation(made: Trace, pre: Value) -> tuple[tuple[Step, ...], str, float, str]:
    """The steps that follow a layer at once, up to its first activation; and the op's name and slope for them."""
    steps: list[Step] = []
    value = pre
    while True:
        readers = [step for step in made.steps if value in step.reads]
        if len(readers) != 1 or len(readers[0].reads) != 1:
            break
        (step,) = readers
        if step.func not in ACTIVATIONS and step.func not in _OTHERS and step.func not in _NORMS:
            break
        steps.append(step)
        if step.func not in _NORMS:
            break
        following = next((v for v in (*step.made, *(v for _, v in step.written)) if v is not None), None)
        if following is None:
            break
        value = following
    names = " ".join(str(step.func).split(".")[1].rstrip("_") for step in steps) or "identity"
    if not steps:
        return (), "identity", 0.0, names
    (first, *rest), extra = steps, [float(a) for a in steps[0].args[1:] if isinstance(a, int | float)]
    known = ACTIVATIONS.get(first.func, "")
    if rest or not known or (known == "elu" and any(scale != 1 for scale in extra[1:])):
        return tuple(steps), "", 0.0, names
    slope = {"leaky_relu": 0.01, "elu": 1.0}.get(known, 0.0)
    return tuple(steps), known, extra[0] if extra and slope else slope, names


def _channels(a: Tensor, last: bool) -> Tensor:
    """(B, V, positions) of a layer's output, whose channels are the last axis or the first."""
    return a.flatten(1, -2).movedim(-1, 1) if last and a.ndim > 2 else a.unsqueeze(-1) if last else a.flatten(2)


class _Engine:
    """Computes the edges of some pairs."""

    def __init__(self, layer: Any, joined: _Joined):
        self.layer, self.joined = layer, joined
        self.how = ""

    def weighted(self, base: Tensor, source: Tensor, pre: Tensor, number: int, weights: Tensor) -> Tensor:
        """Sum over pairs of weight times edges, for whole weights: pairs are repeated so often."""
        rows = torch.arange(len(base)).repeat_interleave(weights.long()).to(base.device)
        if not len(rows):
            return base.new_zeros(pre.shape[-1 if self.joined.last else 1], self.joined.units, dtype=torch.float64)
        return len(rows) * self.edges(base[rows], source[rows], pre[rows], number)

    def edges(self, base: Tensor, source: Tensor, pre: Tensor, number: int) -> Tensor:
        """(V, U) float64 means over the pairs, of the reduction `number`, which is not "rms"."""
        layer, joined = self.layer, self.joined
        alone = joined.units == base.shape[-1]  # each feature is a unit, at all positions of its own
        if isinstance(layer, nn.Linear) and alone and joined.activation and _is_last(joined, base):
            self.how = "the op direct_edges"
            operands = (base.flatten(0, -2), source.flatten(0, -2), layer.weight.detach(), pre.flatten(0, -2))
            slope = joined.slope if joined.activation in ("leaky_relu", "elu") else None
            return ops.direct_edges(*operands, joined.activation, KINDS[number], slope=slope).double()
        self.how = "torch, unrolled"
        change, before = source - base, joined.after(pre)
        parts = []
        width = max(1, most_bytes(base.device) // max(1, 4 * pre.numel() * pre.element_size()))
        shifted = self._single(change)
        for units in slices(joined.units, min(width, joined.units)):
            shift = shifted(units)  # (B, n, ...) what the child's input contributes, unit by unit
            n = shift.shape[1]
            moved = joined.after((pre[:, None] + shift).flatten(0, 1)).unflatten(0, (len(base), n))
            moved = _channels((moved - before[:, None]).flatten(0, 1), joined.last).unflatten(0, (len(base), n))
            parts.append(reduced(moved, number, (0, 3)).double())  # (n, V)
        return torch.cat(parts).T

    def _single(self, change: Tensor) -> Callable[[slice], Tensor]:
        """Given units, what their changes alone add to the child's pre-activations: (B, n, ...)."""
        layer, joined = self.layer, self.joined
        channels = change.shape[1] if change.ndim > 1 else 0
        whole_channels = channels == joined.units and torch.equal(
            joined.labels, torch.arange(channels).repeat_interleave(change[0, 0].numel())
        )
        plain = getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"
        if isinstance(layer, _CONVOLUTIONS) and whole_channels and plain and not isinstance(layer.padding, str):
            convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[change.ndim - 2]

            def single(units: slice) -> Tensor:
                weight = layer.weight.detach()[:, units].transpose(0, 1)  # (n, V, ...)
                out = convolve(
                    change[:, units],
                    weight.flatten(0, 1)[:, None],
                    None,
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    len(weight),
                )
                return out.unflatten(1, (len(weight), -1))

            return single
        if isinstance(layer, _TRANSPOSED) and whole_channels and plain:

            def single(units: slice) -> Tensor:
                weight = layer.weight.detach()[units]
                out = _transposed(layer, change[:, units], weight, len(weight))
                return out.unflatten(1, (len(weight), -1))

            return single

        def masked(units: slice) -> Tensor:
            numbers = torch.arange(units.start, units.stop)
            chosen = (joined.labels == numbers[:, None]).view(len(numbers), *change.shape[1:]).to(change)
            some = (change[:, None] * chosen).flatten(0, 1)
            return _product(layer, some).unflatten(0, (len(change), len(numbers)))

        return masked

    def plan(self, pairs: int, edges: int, seconds: float) -> str:
        return (
            f"{edges} edges over {pairs} pairs, {self.joined.name} children, by {self.how}; "
            f"{1e9 * seconds / max(1, pairs * edges):.2f} ns an edge and pair, the two runs included"
        )


def _product(layer: Any, x: Tensor) -> Tensor:
    """The layer without its bias."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if not isinstance(layer, _TRANSPOSED):
        return layer._conv_forward(x, weight, None)  # with any padding mode
    return _transposed(layer, x, weight, layer.groups)


def _transposed(layer: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[x.ndim - 2]
    return convolve(x, weight, None, layer.stride, layer.padding, layer.output_padding, groups, layer.dilation)


def _refuse_other_layers(layer: nn.Module, child: str, change: Tensor, moved: Tensor) -> None:
    """A subclass, or a hook, may do something else than the weight says."""
    product = _product(layer, change[:8])
    if product.shape != moved[:8].shape or not torch.allclose(
        product, moved[:8], rtol=0, atol=1e-3 * float(moved[:8].abs().max()) + 1e-30
    ):
        raise InputError(f"{child}: its output is not its weight times its input; hooks or a subclass change it")


def _is_last(joined: _Joined, base: Tensor) -> bool:
    """Whether a row's features, its last axis, are the units."""
    positions = math.prod(base.shape[1:-1])
    return torch.equal(joined.labels, torch.arange(base.shape[-1]).repeat(positions))
