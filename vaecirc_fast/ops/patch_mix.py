"""Op `patch_mix`: effects of patching units of an activation, through the layers behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import BackendError, InputError
from ..groups import Groups, whole
from ..reference import patch_mix as reference
from ..reference.latent_sweep import PRECISIONS
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one
from .latent_sweep import Network, checked_names, cpp_network, flattened


def patch_mix(
    base: Tensor,
    source: Tensor,
    labels: Tensor,
    units: Tensor,
    network: Network,
    effect: str | Sequence[str] = "l1",
    *,
    groups: Groups | None = None,
    precision: str = "float32",
    against: str = "base",
) -> Tensor:
    """Effects of setting one unit of an activation at a time, without ever forming patched activations or outputs.

    base, source: (B, L) activations, images row-major, as they enter the network's first layer. labels: (L,) int32, the
    unit of each element, or -1. units: (U,) int64, at least 0: patch u sets the elements labelled units[u] of base[b]
    to source[b]'s; a unit that no element has changes nothing. network: the layers behind; of convolutions alone with
    its grid (C, h, w), C h w = L. effect, groups, precision: as in `latent_sweep`. against: effects are changes from
    the output for "base", or for "source".

    Returns (B, U, G) for one effect, (B, U, E, G) for several, in the units of the outputs (mse: squared); float64 for
    float64, else float32. Not differentiable. Deterministic. NaN in a group makes its effect NaN. InputError for wrong
    shapes, dtypes, devices or names, or where a gradient is wanted.
    """
    names = checked_names(effect, precision, network)
    elements = math.prod(network.shapes()[-1])
    _check(base, source, labels, units, network)
    if against not in ("base", "source"):
        raise InputError(f'against: expected "base" or "source", got {against!r}')
    groups = (whole(elements) if groups is None else groups).to(base.device)
    if groups.labels.numel() != elements:
        raise InputError(f"groups: partition {groups.labels.numel()} elements, but an output has {elements}")
    given = [t.contiguous() for t in (base, source, labels, units)]
    weights, biases, *rest = flattened(network, groups, names, precision)
    out = _forward(*given, weights, biases, against == "source", *rest)
    return out.squeeze(-2) if isinstance(effect, str) else out


def _check(base: Tensor, source: Tensor, labels: Tensor, units: Tensor, network: Network) -> None:
    def given(t: Any) -> str:
        return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__

    width = network.inputs()
    if not isinstance(base, Tensor) or base.ndim != 2 or not base.is_floating_point() or base.shape[1] != width:
        raise InputError(f"base: expected floats of shape (B, {width}), got {given(base)}")
    if not isinstance(source, Tensor) or source.shape != base.shape or source.dtype != base.dtype:
        raise InputError(f"source: expected {base.dtype} of shape {tuple(base.shape)}, got {given(source)}")
    if not isinstance(labels, Tensor) or labels.shape != (width,) or labels.dtype != torch.int32:
        raise InputError(f"labels: expected int32 of shape ({width},), got {given(labels)}")
    if not isinstance(units, Tensor) or units.ndim != 1 or units.dtype != torch.int64:
        raise InputError(f"units: expected int64 of shape (U,), got {given(units)}")
    tensors = {"source": source, "labels": labels, "units": units}
    for n, layer in enumerate(network.layers):
        tensors[f"network: layer {n}"] = layer.weight
        if layer.weight.dtype != base.dtype or (layer.bias is not None and layer.bias.dtype != base.dtype):
            raise InputError(f"network: layer {n} is {layer.weight.dtype}, but base is {base.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != base.device:
            raise InputError(f"{name} is on {tensor.device}, but base is on {base.device}")
    biases = [layer.bias for layer in network.layers if layer.bias is not None]
    wanted = any(t.requires_grad for t in (base, *tensors.values(), *biases))
    if torch.is_grad_enabled() and wanted:
        raise InputError("base: a gradient is wanted, and patch_mix has none; call it under torch.no_grad(), or patch")
    if not is_traced(base, units) and not _transformed() and units.numel() and int(units.min()) < 0:
        raise InputError(f"units: expected numbers from 0 on, got {int(units.min())}")


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _forward(*given: Any) -> Tensor:
    base, source, labels, units, weights, biases, *rest = given
    if is_traced(base, source, units, *weights, *biases):
        return torch.ops.vaecirc_fast.patch_mix(*given)
    if is_plain_call(base, source, *weights, *biases):
        return _run(*given)
    return _Function.apply(base, source, labels, units, len(weights), rest, *weights, *biases)


def _kernel(base: Tensor, precision: int) -> Callable:
    if precision and base.device.type == "cpu":
        forced = _registry.forced()
        if forced == "cpp":
            raise BackendError(f"patch_mix: backend 'cpp' was asked for but has no {PRECISIONS[precision]}")
        with _registry.backend(forced or "reference"):
            return ROW.function("patch_mix", base)
    return ROW.function("patch_mix", base)


def _run(base: Tensor, *rest: Any) -> Tensor:
    return _kernel(base, rest[-1])(base, *rest)


class _Function(torch.autograd.Function):
    """The eager path under a transform."""

    @staticmethod
    def forward(
        base: Tensor, source: Tensor, labels: Tensor, units: Tensor, count: int, rest: tuple, *tensors: Tensor
    ) -> Tensor:
        return _run(base, source, labels, units, list(tensors[:count]), list(tensors[count:]), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise InputError("base: patch_mix has no gradient; call it under torch.no_grad()")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *given: Any):
        *four, count, rest = given[:6]

        def call(base: Tensor, source: Tensor, labels: Tensor, units: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            return (_Function.apply(base, source, labels, units, count, rest, *tensors),)

        (out,), _ = one_by_one(call, info, (*in_dims[:4], *in_dims[6:]), *four, *given[6:])
        return out, 0


LIBRARY.define(
    "patch_mix(Tensor base, Tensor source, Tensor owner, Tensor units, Tensor[] weights, Tensor[] biases, "
    "bool against_source, int[] layout, float[] slopes, int[] shape, Tensor labels, Tensor order, Tensor offsets, "
    "int[] kinds, int link, Tensor spans, int precision) -> Tensor"
)
LIBRARY.impl("patch_mix", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::patch_mix", lib=LIBRARY)
def _fake(base, source, owner, units, weights, biases, against_source, layout, slopes, shape, *partition):
    _labels, _order, offsets, kinds, *_rest = partition
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    return base.new_empty((base.shape[0], units.shape[0], len(kinds), offsets.shape[0] - 1), dtype=dtype)


def _cpp_forward(
    base: Tensor,
    source: Tensor,
    owner: Tensor,
    units: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    against_source: bool,
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
    if bool((owner[1:] >= owner[:-1]).all()):  # as those of channels are
        order = torch.arange(len(owner))
    else:
        owner, order = owner.sort(stable=True)
    starts, stops = (torch.searchsorted(owner.long(), units, right=right) for right in (False, True))
    given = [t.contiguous() for t in (base, source, order, starts, stops)]
    reference = _native.address(given[1]) if against_source else 0
    out = torch.empty((len(base), len(units), len(kinds), offsets.numel() - 1), dtype=torch.float32)
    with_network = (weights, biases, layout, slopes, shape, labels, kinds, link, spans, out)
    with cpp_network(*with_network) as network:
        _native.cpp().patch_mix(*(_native.address(t) for t in given), reference, base.shape[1], network)
    return out


def _load_reference():
    return {"patch_mix": reference.forward}


def _load_cpp():
    return {"patch_mix": _cpp_forward}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "patch_mix",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32,), _registry.cpp_reason),
        "triton": _registry.Absent("is not written: patches run on GPUs through torch's layers; not measured"),
        "cuda": _registry.Absent("is not written: patches run on GPUs through torch's layers; not measured"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("reference",)},
)
