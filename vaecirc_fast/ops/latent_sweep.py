"""Op `latent_sweep`: effects of latent interventions through a decoder of dense and transposed-convolution layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import BackendError, InputError
from ..groups import Groups, whole
from ..reference import latent_sweep as reference
from ..reference.effect_reduction import KINDS
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one


@dataclass(frozen=True, eq=False)
class Dense:
    """activation(x W' + b): weight (N, K) as of nn.Linear, bias (N,) or None.

    activation: one of reference.ACTIVATIONS; `slope`: of leaky_relu, alpha of elu.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class TransposedConvolution:
    """activation(conv_transpose2d(x)): weight (C_in, C_out, kh, kw) as of nn.ConvTranspose2d, bias (C_out,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    slope: float = 0.0
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Network:
    """A decoder, layer by layer: dense ones if any, then transposed convolutions if any, then the link.

    grid: (C, h, w) as which the last dense layer's outputs, or the input, enter the convolutions; None without these.
    crop: (H, W),
    the top left part of the canvas that is the output; all of it if None. link: "identity", "sigmoid", or "softmax"
    over consecutive spans of the elements, of the sizes `spans`. The last layer has no activation.
    """

    layers: tuple[Dense | TransposedConvolution, ...]
    grid: tuple[int, int, int] | None = None
    crop: tuple[int, int] | None = None
    link: str = "identity"
    spans: tuple[int, ...] = ()

    def shapes(self) -> list[tuple[int, ...]]:
        """The output's shape after each layer, a row's, the last one cropped: (N,) or (C, H, W). InputError if layers
        do not fit together."""
        shapes: list[tuple[int, ...]] = []
        if not self.layers:
            raise InputError("network: it has no layer")
        if not isinstance(self.layers[0], Dense) and self.grid is None:
            raise InputError("network: its first layer is a transposed convolution, which needs a grid (C, h, w)")
        for n, layer in enumerate(self.layers):
            dense = isinstance(layer, Dense)
            if layer.weight.ndim != (2 if dense else 4):
                raise InputError(f"network: layer {n} has a weight of shape {tuple(layer.weight.shape)}")
            taken = layer.weight.shape[1 if dense else 0]
            given = shapes[-1] if shapes else (taken,) if dense else tuple(self.grid or ())
            if dense and len(given) == 3:
                raise InputError(f"network: layer {n} is Dense, behind a transposed convolution")
            if not dense and len(given) == 1:
                if self.grid is None or math.prod(self.grid) != given[0]:
                    raise InputError(f"network: grid {self.grid} does not hold the {given[0]} outputs of layer {n - 1}")
                given = tuple(self.grid)
            if given[0] != taken:
                before = f"layer {n - 1}" if n else "the grid"
                raise InputError(f"network: layer {n} takes {taken} inputs, but {before} gives {given[0]}")
            made = layer.weight.shape[0 if dense else 1]
            if layer.bias is not None and tuple(layer.bias.shape) != (made,):
                raise InputError(f"network: layer {n} has a bias {tuple(layer.bias.shape)} for {made} outputs")
            if layer.activation not in reference.ACTIVATIONS:
                raise InputError(f"network: layer {n}: activation {layer.activation!r} is unknown")
            if isinstance(layer, Dense):
                shapes.append((made,))
            else:
                geometry = (*layer.stride, *layer.padding, *layer.output_padding)
                height, width = reference.output_grid(given[1:], layer.weight.shape[2:], geometry)
                if min(height, width, *layer.stride) < 1:
                    raise InputError(f"network: layer {n} would make a grid of {height} x {width}")
                shapes.append((made, height, width))
        if self.layers[-1].activation != "identity":
            raise InputError("network: its last layer has an activation; the link stands for it")
        if len(shapes[-1]) == 3 and self.crop is not None:
            if not all(1 <= c <= s for c, s in zip(self.crop, shapes[-1][1:], strict=True)):
                raise InputError(f"network: crop {self.crop} does not fit the canvas {shapes[-1][1:]}")
            shapes[-1] = (shapes[-1][0], *self.crop)
        if self.link not in reference.LINKS:
            raise InputError(f"network: link {self.link!r} is unknown; known: {', '.join(reference.LINKS)}")
        if self.link == "softmax" and (sum(self.spans) != math.prod(shapes[-1]) or min(self.spans, default=0) < 1):
            raise InputError(f"network: spans {self.spans} do not cover the {math.prod(shapes[-1])} elements")
        return shapes

    def inputs(self) -> int:
        """Elements of a row of the input."""
        first = self.layers[0]
        return first.weight.shape[1] if isinstance(first, Dense) else math.prod(self.grid or ())

    def multiplications(self) -> list[int]:
        """Multiply-adds of each layer for one row; those of transposed convolutions that fall off the canvas count."""
        counts, before = [], self.grid or ()
        for layer, shape in zip(self.layers, self.shapes(), strict=True):
            pixels = 1 if isinstance(layer, Dense) else math.prod(before[1:])
            counts.append(pixels * layer.weight.numel())
            before = shape if len(shape) == 3 else self.grid or ()
        return counts


def latent_sweep(
    z: Tensor,
    latents: Tensor,
    shifts: Tensor,
    network: Network,
    effect: str | Sequence[str] = "l1",
    *,
    groups: Groups | None = None,
    precision: str = "float32",
) -> Tensor:
    """Effects of J interventions on the decoder's outputs for B codes, without ever forming these outputs.

    z: (B, L) codes. latents: (J, K) integers and shifts: (B, J, K) of z's dtype: intervention j adds shifts[b, j, k] to
    latent latents[j, k] of code b, for all k; the first layer is updated by rank K. network: the decoder.
    effect: one name or several of `effect_reduction`; "logit_mse" is taken before the link. groups: the partition of
    the P output elements (row-major); all in one group by default.
    precision: "float32" (z's own dtype), or operands of the products rounded to "tf32" or "bf16", sums in float32; the
    first layer is always exact. A CPU has neither, and rounds in the reference.

    Returns (B, J, G) for one effect, (B, J, E, G) for several, in the units of the outputs (mse: squared); float64 for
    float64, else float32. Differentiable in z, shifts and the network's tensors: the gradient computes tiles anew.
    Deterministic. NaN in a group makes its effect NaN. InputError for wrong shapes, dtypes, devices or names.
    """
    names = checked_names(effect, precision, network)
    if not network.layers or not isinstance(network.layers[0], Dense):
        raise InputError("network: its first layer must be Dense")
    elements = math.prod(network.shapes()[-1])
    _check(z, latents, shifts, network)
    groups = (whole(elements) if groups is None else groups).to(z.device)
    if groups.labels.numel() != elements:
        raise InputError(f"groups: partition {groups.labels.numel()} elements, but an output has {elements}")
    weights, biases, *rest = flattened(network, groups, names, precision)
    out = _forward(z.contiguous(), latents.contiguous(), shifts.contiguous(), weights, biases, *rest)
    return out.squeeze(-2) if isinstance(effect, str) else out


def checked_names(effect: str | Sequence[str], precision: str, network: Network) -> tuple[str, ...]:
    """The effects' names. InputError for one of them, or a precision, that is none."""
    names = (effect,) if isinstance(effect, str) else tuple(effect)
    for n, name in enumerate(names):
        if name not in KINDS or name in names[:n]:
            raise InputError(f"effect: {name!r} is unknown or given twice; known: {', '.join(KINDS)}")
    if not names:
        raise InputError("effect: expected at least one name")
    if precision not in reference.PRECISIONS:
        raise InputError(f"precision: {precision!r} is unknown; known: {', '.join(reference.PRECISIONS)}")
    if "logit_mse" in names and network.link == "identity":
        raise InputError('effect: "logit_mse" is taken before the link, and this network has none (use "mse")')
    return names


def flattened(network: Network, groups: Groups, names: Sequence[str], precision: str) -> tuple:
    """What registered ops take of a network: weights, biases, layout, ..., precision."""
    softmax = network.link == "softmax"
    return (
        [layer.weight.contiguous() for layer in network.layers],
        [_bias(layer) for layer in network.layers],
        [number for layer in network.layers for number in _numbers(layer)],
        [float(layer.slope) for layer in network.layers],
        _shape(network),
        groups.labels,
        groups.order,
        groups.offsets,
        [KINDS.index(name) for name in names],
        reference.LINKS.index(network.link),
        torch.tensor([0, *network.spans]).cumsum(0).int() if softmax else torch.empty(0, dtype=torch.int32),
        reference.PRECISIONS.index(precision),
    )


def outputs(network: Network, z: Tensor) -> Tensor:
    """The network's outputs (R, P), after the link, for inputs z (R, L); in plain torch."""
    weights = [layer.weight for layer in network.layers]
    biases = [_bias(layer) for layer in network.layers]
    layout = [number for layer in network.layers for number in _numbers(layer)]
    slopes = [layer.slope for layer in network.layers]
    y = reference.network(z.flatten(1), weights, biases, layout, slopes, _shape(network))
    return reference.linked(y, reference.LINKS.index(network.link), torch.tensor([0, *network.spans]).cumsum(0))


def _numbers(layer: Dense | TransposedConvolution) -> tuple[int, ...]:
    activation = reference.ACTIVATIONS.index(layer.activation)
    if isinstance(layer, Dense):
        return (reference.DENSE, activation, 0, 0, 0, 0, 0, 0)
    return (reference.TRANSPOSED, activation, *layer.stride, *layer.padding, *layer.output_padding)


def _shape(network: Network) -> list[int]:
    out = network.shapes()[-1]
    return [0] * 5 if len(out) == 1 or network.grid is None else [*network.grid, *out[1:]]


def _bias(layer: Dense | TransposedConvolution) -> Tensor:
    if layer.bias is not None:
        return layer.bias.contiguous()
    return layer.weight.new_zeros(layer.weight.shape[0 if isinstance(layer, Dense) else 1])


def _check(z: Tensor, latents: Tensor, shifts: Tensor, network: Network) -> None:
    width = network.layers[0].weight.shape[1]
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or z.shape[1] != width:
        given = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"z: expected floats of shape (B, {width}), got {given}")
    if not isinstance(latents, Tensor) or latents.ndim != 2 or latents.dtype != torch.int64 or not latents.shape[1]:
        given = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents: expected int64 of shape (J, K), K > 0, got {given}")
    if not isinstance(shifts, Tensor) or shifts.dtype != z.dtype or shifts.shape != (len(z), *latents.shape):
        given = f"{shifts.dtype} {tuple(shifts.shape)}" if isinstance(shifts, Tensor) else type(shifts).__name__
        raise InputError(
            f"shifts: expected {z.dtype} of shape ({len(z)}, {', '.join(map(str, latents.shape))}), got {given}"
        )
    tensors = {"latents": latents, "shifts": shifts}
    for n, layer in enumerate(network.layers):
        tensors[f"network: layer {n}"] = layer.weight
        if layer.weight.dtype != z.dtype or (layer.bias is not None and layer.bias.dtype != z.dtype):
            raise InputError(f"network: layer {n} is {layer.weight.dtype}, but z is {z.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != z.device:
            raise InputError(f"{name} is on {tensor.device}, but z is on {z.device}")
    if not is_traced(z, latents) and latents.numel() and not 0 <= int(latents.min()) <= int(latents.max()) < width:
        raise InputError(f"latents: expected numbers of 0..{width - 1}, got {int(latents.min())}..{int(latents.max())}")


def _forward(
    z: Tensor, latents: Tensor, shifts: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any
) -> Tensor:
    if is_traced(z, shifts, *weights, *biases):
        return torch.ops.vaecirc_fast.latent_sweep(z, latents, shifts, weights, biases, *rest)
    if is_plain_call(z, shifts, *weights, *biases):
        return _run(z, latents, shifts, weights, biases, *rest)
    return _Function.apply(z, latents, shifts, len(weights), rest, *weights, *biases)


def _kernel(z: Tensor, precision: int) -> Callable:
    if precision and z.device.type == "cpu":
        forced = _registry.forced()
        if forced == "cpp":
            raise BackendError(
                f"latent_sweep: backend 'cpp' was asked for but has no {reference.PRECISIONS[precision]}"
            )
        with _registry.backend(forced or "reference"):
            return ROW.function("latent_sweep", z)
    return ROW.function("latent_sweep", z)


def _run(z: Tensor, latents: Tensor, shifts: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any) -> Tensor:
    return _kernel(z, rest[-1])(z, latents, shifts, weights, biases, *rest)


def _run_backward(
    grad: Tensor,
    z: Tensor,
    latents: Tensor,
    shifts: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return reference.backward(grad, z, latents, shifts, weights, biases, *rest)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, latents, shifts, weights, biases, *ctx.rest = inputs
    _save(ctx, z, latents, shifts, weights, biases)


def _save(ctx: Any, z: Tensor, latents: Tensor, shifts: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]):
    tables = [r for r in ctx.rest if isinstance(r, Tensor)]
    ctx.count, ctx.rest = len(weights), [None if isinstance(r, Tensor) else r for r in ctx.rest]
    ctx.save_for_backward(z, latents, shifts, *weights, *biases, *tables)


def _backward(ctx: Any, *grads: Tensor):
    z, latents, shifts, *others = ctx.saved_tensors
    weights, biases, tables = others[: ctx.count], others[ctx.count : 2 * ctx.count], iter(others[2 * ctx.count :])
    rest = [next(tables) if r is None else r for r in ctx.rest]
    traced = is_traced(grads[0], z, *weights)
    call = torch.ops.vaecirc_fast.latent_sweep_backward if traced else _run_backward
    grad_z, grad_shifts, of_weights, of_biases = call(grads[0], z, latents, shifts, weights, biases, *rest)
    return grad_z, None, grad_shifts, of_weights, of_biases, *[None] * len(rest)


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    @staticmethod
    def forward(z: Tensor, latents: Tensor, shifts: Tensor, count: int, rest: tuple, *tensors: Tensor) -> Tensor:
        return _run(z, latents, shifts, list(tensors[:count]), list(tensors[count:]), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        z, latents, shifts, count, rest, *tensors = inputs
        ctx.rest = rest
        _save(ctx, z, latents, shifts, tensors[:count], tensors[count:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        grad_z, _, grad_shifts, of_weights, of_biases, *_ = _backward(ctx, *grads)
        return grad_z, None, grad_shifts, None, None, *of_weights, *of_biases

    @staticmethod
    def vmap(info: Any, in_dims: tuple, z: Tensor, latents: Tensor, shifts: Tensor, count: int, rest: tuple, *tensors):
        dims = (*in_dims[:3], *in_dims[5:])

        def call(z: Tensor, latents: Tensor, shifts: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            return (_Function.apply(z, latents, shifts, count, rest, *tensors),)

        (out,), _ = one_by_one(call, info, dims, z, latents, shifts, *tensors)
        return out, 0


_ARGUMENTS = (
    "Tensor z, Tensor latents, Tensor shifts, Tensor[] weights, Tensor[] biases, int[] layout, float[] slopes, "
    "int[] shape, Tensor labels, Tensor order, Tensor offsets, int[] kinds, int link, Tensor spans, int precision"
)
LIBRARY.define(f"latent_sweep({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"latent_sweep_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor[], Tensor[])")
LIBRARY.impl("latent_sweep", _run, "CompositeExplicitAutograd")
LIBRARY.impl("latent_sweep_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::latent_sweep", lib=LIBRARY)
def _fake(z, latents, shifts, weights, biases, layout, slopes, shape, labels, order, offsets, kinds, *rest):
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((*shifts.shape[:2], len(kinds), offsets.shape[0] - 1), dtype=dtype)


@torch.library.register_fake("vaecirc_fast::latent_sweep_backward", lib=LIBRARY)
def _fake_backward(grad, z, latents, shifts, weights, biases, *rest):
    like = torch.empty_like
    return like(z), like(shifts), [like(w) for w in weights], [like(b) for b in biases]


torch.library.register_autograd("vaecirc_fast::latent_sweep", _backward, setup_context=_setup_context, lib=LIBRARY)


def _cpp_forward(
    z: Tensor,
    latents: Tensor,
    shifts: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    spans: Tensor,
    precision: int,
) -> Tensor:
    samples, interventions, at_once = shifts.shape
    given = [t.contiguous() for t in (z, latents, shifts)]
    out = torch.empty((samples, interventions, len(kinds), offsets.numel() - 1), dtype=torch.float32)
    with_network = (weights, biases, layout, slopes, shape, labels, kinds, link, spans, out)
    with cpp_network(*with_network) as network:
        _native.cpp().latent_sweep(*(_native.address(t) for t in given), z.shape[1], at_once, network)
    return out


@contextlib.contextmanager
def cpp_network(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: Sequence[int],
    slopes: Sequence[float],
    shape: Sequence[int],
    labels: Tensor,
    kinds: Sequence[int],
    link: int,
    spans: Tensor,
    out: Tensor,
) -> Iterator[tuple]:
    """What C++ kernels take of a network whose effects go to `out` (B, J, E, G); its addresses hold within."""
    samples, interventions, _, groups = out.shape
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    labels, spans = labels.contiguous(), spans.contiguous()
    layers, products, pixels, grid = [], 0, 1, shape[1:3]
    for n, weight in enumerate(weights):
        kind, activation, *geometry = layout[reference.LAYER * n : reference.LAYER * (n + 1)]
        if kind == reference.DENSE:
            (made, taken), kernel = weight.shape, (1, 1)
        else:
            (taken, made), kernel, pixels = weight.shape[:2], weight.shape[2:], grid[0] * grid[1]
            grid = reference.output_grid(grid, kernel, geometry)
        layers.append((kind, activation, taken, made, *kernel, *geometry))
        products += pixels * weight.numel()
    yield (
        (samples, interventions, labels.numel(), groups),
        *([_native.address(w) for w in weights], [_native.address(b) for b in biases], layers, slopes, shape),
        *(_native.address(labels), kinds, link, _native.address(spans), max(spans.numel() - 1, 0)),
        # One element's worth of work is about as long as 32 products.
        *(_native.address(out), _native.threads(samples * interventions * products // 32)),
    )


def _load_reference():
    return {"latent_sweep": reference.forward}


def _load_cpp():
    return {"latent_sweep": _cpp_forward}


def _load_triton():
    from ..triton_kernels import latent_sweep as kernels  # pyright: ignore[reportMissingImports]

    return {"latent_sweep": kernels.forward}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "latent_sweep",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32,), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), (torch.float32,), _registry.triton_reason),
        "cuda": _registry.Absent("is not written: a product with a fused end is what Triton is for; not measured"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
