"""Op `sparse_adam`: a step of Adam on a sparse layer's matrix, from its codes: the gradient is never formed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import sparse_adam as reference
from ._library import LIBRARY, is_traced
from .sparse_decode import check_alike, check_entries, check_indices, flat_entries, raise_wrong, sizes


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor,
    indices: Tensor,
    g: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    decoupled: bool = False,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    bias_exp_avg: Tensor | None = None,
    bias_exp_avg_sq: Tensor | None = None,
) -> None:
    """One step of Adam, in place, on a matrix whose gradient is a sum over sparse codes.

    param, exp_avg, exp_avg_sq: (M, D), contiguous, changed. The gradient of row m is the sum of value * g[row] over the
    entries with index m: values, indices (..., K) and g (..., D), or with offsets (B + 1,) values, indices (N,) and
    g (B, D), as in `sparse_decode`. For a decoder values are the codes and g is the gradient of its output; for an
    encoder values are the gradients of the codes and g is its input, and the gradient of its bias (M,) is the sum of
    the values: bias, bias_exp_avg, bias_exp_avg_sq, all three or none, are then changed in the same pass.
    step: the number of this step, from 1. lr, betas, eps, weight_decay: as torch.optim.Adam, or with decoupled AdamW,
    has them; every row is changed as there, also one without entries. float32, bfloat16, float16 or float64, all alike;
    16 bits are computed in float32, and the gradient is not rounded.

    The gradient is read and written nowhere: parameter and moments pass through memory once. Returns nothing and has no
    gradient. Deterministic for any number of threads. InputError for wrong shapes, dtypes, devices or numbers and, on a
    CPU, wrong indices or offsets; nothing is changed then. Under vmap the batch cannot be joined: that is an error too.
    """
    _check_state("param", {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, 2)
    check_entries(values, indices, offsets, param)
    biases = {"bias": bias, "bias_exp_avg": bias_exp_avg, "bias_exp_avg_sq": bias_exp_avg_sq}
    given = {name: tensor for name, tensor in biases.items() if tensor is not None}
    if given:
        if len(given) < 3:
            raise InputError(f"bias, bias_exp_avg, bias_exp_avg_sq: expected all three or none, got {', '.join(given)}")
        _check_state("bias", given, 1)
        if given["bias"].shape != param.shape[:1]:
            raise InputError(f"bias: expected shape ({param.shape[0]},), got {tuple(given['bias'].shape)}")
    of = {"values": values, "indices": indices, "g": g, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, **given}
    check_alike(param, "param", of if offsets is None else {**of, "offsets": offsets})
    rows = tuple(values.shape[:-1]) if offsets is None else (offsets.shape[0] - 1,)
    if g.shape != (*rows, param.shape[1]):
        raise InputError(f"g: expected shape {(*rows, param.shape[1])}, got {tuple(g.shape)}")
    numbers = {"lr": lr, "betas[0]": betas[0], "betas[1]": betas[1], "eps": eps, "weight_decay": weight_decay}
    for name, number in numbers.items():
        most = 1 if name.startswith("betas") else math.inf
        if not 0 <= number < most:
            raise InputError(f"{name}: expected a number in [0, {most}), got {number}")
    if step < 1:
        raise InputError(f"step: expected the number of this step, from 1, got {step}")
    values, indices, offsets = flat_entries(values, indices, offsets)
    arguments = (
        *(param, exp_avg, exp_avg_sq, values, indices, g.reshape(math.prod(rows), param.shape[1]), offsets),
        *(lr, *betas, eps, weight_decay, step, decoupled, bias, bias_exp_avg, bias_exp_avg_sq),
    )
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    watched = is_traced(*tensors) or torch._C._are_functorch_transforms_active()
    with torch.no_grad():
        (torch.ops.vaecirc_fast.sparse_adam if watched else _run)(*arguments)


def _check_state(name: str, tensors: dict[str, Tensor], dimensions: int) -> None:
    shape = None
    for own, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{own}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim != dimensions or tensor.shape[0] == 0 or not tensor.dtype.is_floating_point:
            expected = "(M, D) with M > 0" if dimensions == 2 else "(M,)"
            raise InputError(f"{own}: expected floating {expected}, got {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise InputError(f"{own}: expected a contiguous tensor, which is changed, got strides {tensor.stride()}")
        shape = shape or tensor.shape
        if tensor.shape != shape:
            raise InputError(f"{own}: expected the shape of {name}, {tuple(shape)}, got {tuple(tensor.shape)}")


def _run(
    param,
    exp_avg,
    exp_avg_sq,
    values,
    indices,
    g,
    offsets,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    step,
    decoupled,
    bias,
    bias_exp_avg,
    bias_exp_avg_sq,
) -> None:
    kernel = ROW.function("sparse_adam", param)
    state, biases = (param, exp_avg, exp_avg_sq), (bias, bias_exp_avg, bias_exp_avg_sq)
    kernel(*state, values, indices, g, offsets, lr, beta1, beta2, eps, weight_decay, step, decoupled, *biases)
    for tensor in (*state, *biases):
        # Kernels write behind torch's back: a graph that has saved one of these must hear of it.
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


LIBRARY.define(
    "sparse_adam(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor values, Tensor indices, Tensor g, "
    "Tensor? offsets, float lr, float beta1, float beta2, float eps, float weight_decay, SymInt step, bool decoupled, "
    "Tensor(d!)? bias, Tensor(e!)? bias_exp_avg, Tensor(f!)? bias_exp_avg_sq) -> ()"
)
LIBRARY.impl("sparse_adam", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::sparse_adam", lib=LIBRARY)
def _fake(*arguments):
    return None


def _vmap(info: Any, in_dims: tuple, *arguments: Any):
    raise InputError("param: sparse_adam cannot be called under vmap, which changes nothing in place")


torch.library.register_vmap("vaecirc_fast::sparse_adam", _vmap, lib=LIBRARY)


def _reference(param, exp_avg, exp_avg_sq, values, indices, g, offsets, *rest) -> None:
    check_indices(indices, len(param), offsets)
    reference.forward(param, exp_avg, exp_avg_sq, values, indices, g, offsets, *rest)


def _cpp(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor,
    indices: Tensor,
    g: Tensor,
    offsets: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    bias: Tensor | None,
    bias_exp_avg: Tensor | None,
    bias_exp_avg_sq: Tensor | None,
) -> None:
    values, indices, g = values.contiguous(), indices.contiguous(), g.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    wrong = _native.cpp().sparse_adam(
        [param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()],
        [_native.address(bias), _native.address(bias_exp_avg), _native.address(bias_exp_avg_sq)],
        *(values.data_ptr(), indices.data_ptr(), g.data_ptr(), _native.address(offsets), _native.DTYPES[param.dtype]),
        *(sizes(indices, offsets, param.shape[1], len(param)), [lr, beta1, beta2, eps, weight_decay], step, decoupled),
        _native.threads(max(param.numel(), indices.numel() * param.shape[1])),
    )
    raise_wrong(wrong, indices, len(param), offsets)


def _load_reference():
    return {"sparse_adam": _reference}


def _load_cpp():
    return {"sparse_adam": _cpp}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "sparse_adam",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32, torch.bfloat16), _registry.cpp_reason),
        "triton": _registry.Absent(
            "is not written: on a GPU sparse_decode forms the gradient and torch's fused Adam reads it; not measured"
        ),
        "cuda": _registry.Absent("is not written: as for Triton; not measured"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("reference",)},
)
