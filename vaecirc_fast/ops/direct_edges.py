"""Op `direct_edges`: exact effect of each unit of a layer on each unit of the next, all pairs of units at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import direct_edges as reference
from ..reference.latent_sweep import ACTIVATIONS
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one

_SLOPES = {"leaky_relu": 0.01, "elu": 1.0}


def direct_edges(
    base: Tensor,
    source: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str = "identity",
    kind: str = "l1",
    *,
    slope: float | None = None,
    parent_sd: Tensor | None = None,
    child_sd: Tensor | None = None,
) -> Tensor:
    """Direct effects of U parents on V children: each parent alone takes the source's value, all else stays at base.

    base, source: (B, U) the parents' activations in B pairs, as the children's layer reads them; weight: (V, U) that
    layer's, as nn.Linear has it; pre: (B, V) the children's pre-activations at base, bias included. float32 or float64,
    all alike, on one device. activation: the children's own f, one of "identity", "relu", "leaky_relu", "elu",
    "sigmoid", "tanh", "silu"; slope: of leaky_relu (0.01), or elu's alpha (1).

    Returns (V, U): with d = f(pre[b, v] + weight[v, u] (source[b, u] - base[b, u])) - f(pre[b, v]), over the pairs b,
    kind "l1" mean |d|, "mse" mean d^2, "rms" sqrt(mean d^2), "signed" mean d; in units of the child (mse: squared).
    parent_sd (U,) and child_sd (V,), both or neither: in child sd per parent sd instead, see `in_sd`.

    B U V evaluations of f and no tensor of that size. Deterministic for any number of threads. A NaN makes the edges
    that it enters NaN. No gradients: NotImplementedError in a backward pass. InputError for wrong shapes, dtypes,
    devices or names.
    """
    _check(base, source, weight, pre)
    if activation not in ACTIVATIONS:
        raise InputError(f"activation: {activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    if kind not in reference.KINDS:
        raise InputError(f"kind: {kind!r} is unknown; known: {', '.join(reference.KINDS)}")
    if slope is not None and activation not in _SLOPES:
        raise InputError(f"slope: is of {' and '.join(_SLOPES)}, not of {activation!r}")
    if (parent_sd is None) != (child_sd is None):
        raise InputError("parent_sd, child_sd: give both or neither")
    slope = _SLOPES.get(activation, 0.0) if slope is None else float(slope)
    out = _forward(base, source, weight, pre, ACTIVATIONS.index(activation), slope, reference.KINDS.index(kind))
    if parent_sd is None or child_sd is None:
        return out
    number = reference.KINDS.index("l1" if kind == "signed" else kind)
    return in_sd(out, reference.reduced(source - base, number), parent_sd, child_sd, kind)


def in_sd(edges: Tensor, change: Tensor, parent_sd: Tensor, child_sd: Tensor, kind: str = "l1") -> Tensor:
    """Edges (V, U) in child sd per parent sd: edge[v, u] / child_sd[v] over change[u] / parent_sd[u].

    change: (U,) how much the parents changed, reduced over the pairs as the edges were ("signed": by "l1"). "mse"
    divides by squares. 0 for a parent that did not change; NaN where an sd is 0, since nothing can then be measured
    in it. InputError for other shapes, or an sd that is negative or NaN.
    """
    for name, sd, size in (("parent_sd", parent_sd, edges.shape[1]), ("child_sd", child_sd, edges.shape[0])):
        if not isinstance(sd, Tensor) or sd.shape != (size,) or not sd.is_floating_point():
            given = tuple(sd.shape) if isinstance(sd, Tensor) else type(sd).__name__
            raise InputError(f"{name}: expected {size} standard deviations, got {given}")
        if not bool((sd >= 0).all()):
            raise InputError(f"{name}: expected numbers >= 0, got {float(sd.min()):g}")
    power = 2 if kind == "mse" else 1
    per_parent = torch.where(change == 0, 0, parent_sd.to(edges) ** power / change.to(edges))
    per_parent = torch.where(parent_sd.to(edges) == 0, torch.nan, per_parent)
    per_child = torch.where(child_sd.to(edges) == 0, torch.nan, 1 / child_sd.to(edges) ** power)
    return edges * per_child[:, None] * per_parent


def _check(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor) -> None:
    given = {"base": base, "source": source, "weight": weight, "pre": pre}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name}: expected a tensor of two dimensions, got {what}")
    pairs, parents = base.shape
    children = weight.shape[0]
    if not pairs:
        raise InputError("base: expected at least one pair, got none")
    for name, shape in (("source", (pairs, parents)), ("weight", (children, parents)), ("pre", (pairs, children))):
        if given[name].shape != shape:
            raise InputError(
                f"{name}: expected shape {shape} for base {tuple(base.shape)} and weight {tuple(weight.shape)}, "
                f"got {tuple(given[name].shape)}"
            )
    dtypes = {tensor.dtype for tensor in given.values()}
    if len(dtypes) > 1 or base.dtype not in _FLOATS:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise InputError(f"base, source, weight, pre: expected one dtype, float32 or float64, got {found}")
    if len({tensor.device for tensor in given.values()}) > 1:
        raise InputError(
            "base, source, weight, pre: expected one device, got "
            + ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        )


def _forward(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, *rest: Any) -> Tensor:
    tensors = (base, source, weight, pre)
    if is_traced(*tensors):
        return torch.ops.vaecirc_fast.direct_edges(*tensors, *rest)
    return (_run if is_plain_call(*tensors) else _Function.apply)(*tensors, *rest)


def _run(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, activation: int, slope: float, kind: int) -> Tensor:
    return ROW.function("direct_edges", base)(base, source, weight, pre, activation, slope, kind)


def _no_backward(ctx: Any, *grads: Tensor):
    raise NotImplementedError(
        "direct_edges has no gradient; call it under torch.no_grad(), or differentiate "
        "vaecirc_fast.reference.direct_edges.forward"
    )


def _vmap(call: Callable, info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    (out,), _ = one_by_one(lambda *one: (call(*one),), info, in_dims, *arguments)
    return out, 0


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    backward = staticmethod(_no_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap(_Function.apply, info, in_dims, *arguments)


LIBRARY.define(
    "direct_edges(Tensor base, Tensor source, Tensor weight, Tensor pre, int activation, float slope, int kind) "
    "-> Tensor"
)
LIBRARY.impl("direct_edges", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::direct_edges", lib=LIBRARY)
def _fake(base, source, weight, pre, activation, slope, kind):
    return weight.new_empty(weight.shape)


torch.library.register_autograd("vaecirc_fast::direct_edges", _no_backward, lib=LIBRARY)
torch.library.register_vmap(
    "vaecirc_fast::direct_edges", partial(_vmap, torch.ops.vaecirc_fast.direct_edges), lib=LIBRARY
)


def _without_activation(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, kind: int) -> Tensor:
    """Edges into linear children: weight times what the parent does, whatever the child is at base."""
    change = source - base
    spoilt = (pre - pre).mean(0)[:, None]  # 0, or NaN for a child that is not finite
    if reference.KINDS[kind] == "signed":
        return weight * change.mean(0) + spoilt
    if reference.KINDS[kind] == "l1":
        return weight.abs() * change.abs().mean(0) + spoilt
    root = weight.abs() * change.square().mean(0).sqrt() + spoilt
    return root if reference.KINDS[kind] == "rms" else root.square()


def _cpp(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, activation: int, slope: float, kind: int):
    if ACTIVATIONS[activation] == "identity":
        return _without_activation(base, source, weight, pre, kind)
    change, weight, pre = (source - base).contiguous(), weight.contiguous(), pre.T.contiguous()
    (pairs, parents), children = change.shape, len(weight)
    out = torch.empty(children, parents, dtype=weight.dtype)
    _native.cpp().direct_edges(
        *(change.data_ptr(), weight.data_ptr(), pre.data_ptr(), pairs, parents, children),
        *(activation, slope, kind, out.data_ptr(), _native.threads(pairs * parents * children)),
    )
    return out


def _load_reference():
    return {"direct_edges": reference.forward}


def _load_cpp():
    return {"direct_edges": _cpp}


def _load_triton():
    from ..triton_kernels import direct_edges as kernels  # pyright: ignore[reportMissingImports]

    def run(base: Tensor, source: Tensor, weight: Tensor, pre: Tensor, activation: int, slope: float, kind: int):
        if ACTIVATIONS[activation] == "identity":
            return _without_activation(base, source, weight, pre, kind)
        return kernels.forward(source - base, weight, pre, activation, slope, kind)

    return {"direct_edges": run}


_FLOATS = (torch.float32, torch.float64)
ROW = _registry.Row(
    "direct_edges",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32,), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), (torch.float32,), _registry.triton_reason),
        "cuda": _registry.Absent(
            "is left to Triton: the loop is arithmetic on registers, which its compiler schedules"
        ),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
