"""Op `vq_assign`: the nearest code of each row, its distance and the usage of the codes, without the (N, K) matrix."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import vq_assign as reference
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one


class Assigned(NamedTuple):
    """What `vq_assign` finds; counts and sums are None where they were not asked for."""

    indices: Tensor  # (...) int64
    z_q: Tensor  # (..., D)
    distance: Tensor  # (...)
    counts: Tensor | None  # (K,) int64
    sums: Tensor | None  # (K, D)


def vq_assign(z: Tensor, codebook: Tensor, *, totals: bool = False) -> Assigned:
    """The nearest of K codes for each row of z: Euclidean, ties to the lowest index.

    z: (..., D) and codebook: (K, D), K >= 1, D >= 1, both float32 or both float64, on one device.
    totals: also count each code's rows and add them up, as a codebook by moving averages needs.

    Returns Assigned: indices (...) int64; z_q (..., D) = codebook[indices], exactly; distance (...) = |z - z_q|^2;
    counts (K,) int64 and sums (K, D) over the rows of each code, the same to the bit for any number of threads.
    Nearest is by |e|^2 / 2 - z . e in the dtype of z: of codes whose distances differ by less than its rounding, either
    may be chosen. Equal codes are equally near.

    Gradients: that of z_q goes to z unchanged (straight-through) and not to the codebook; that of distance is exact,
    2 (z - z_q) for z and the opposite for the code. counts and sums have none.
    A row with NaN or infinity is given code 0, and its distance is NaN or infinite; a code with NaN is nearest to
    nothing. K D numbers of memory besides the results. InputError for wrong shapes, dtypes or devices.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), equations 1 and 2, appendix A.1.
    """
    _check(z, codebook, totals)
    rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    call = torch.ops.vaecirc_fast.vq_assign
    if not is_traced(z, codebook):
        call = _run if is_plain_call(z, codebook) else _Function.apply
    z_q, indices, distance, counts, sums = call(rows, codebook, totals)
    shape = z.shape[:-1]
    found = indices.reshape(shape), z_q.reshape(z.shape), distance.reshape(shape)
    return Assigned(*found, *((counts, sums) if totals else (None, None)))


def _check(z: Any, codebook: Any, totals: Any) -> None:
    for name, tensor in (("z", z), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise InputError(f"{name}: expected float32 or float64, got {tensor.dtype}")
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise InputError(f"codebook: expected shape (K, D) with K > 0 and D > 0, got {tuple(codebook.shape)}")
    if z.ndim == 0 or z.shape[-1] != codebook.shape[1]:
        raise InputError(f"z: expected shape (..., {codebook.shape[1]}), the codebook's D, got {tuple(z.shape)}")
    if z.dtype != codebook.dtype:
        raise InputError(f"codebook: expected the dtype of z, {z.dtype}, got {codebook.dtype}")
    if z.device != codebook.device:
        raise InputError(f"codebook: expected the device of z, {z.device}, got {codebook.device}")
    if not isinstance(totals, bool):
        raise InputError(f"totals: expected True or False, got {totals!r}")


def _run(z: Tensor, codebook: Tensor, totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return ROW.function("vq_assign", z)(z, codebook, totals)


# --- gradients -------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _ = inputs
    z_q, indices, _, counts, sums = output
    # a codebook that is moved between forward and backward, as moving averages do, is not looked at again
    ctx.save_for_backward(z, codebook if ctx.needs_input_grad[1] else None, indices, z_q)
    ctx.mark_non_differentiable(indices, counts, sums)


def _backward(ctx: Any, *grads: Tensor):
    grad_z_q, _, grad_distance, _, _ = grads
    z, codebook, indices, z_q = ctx.saved_tensors
    of_z, of_codebook, _ = ctx.needs_input_grad
    codes = codebook[indices] if of_codebook else z_q.detach()  # constant: its straight-through gradient is not asked
    towards = 2 * grad_distance[:, None] * (z - codes)
    grad_codebook = torch.zeros_like(codebook).index_add(0, indices, -towards) if of_codebook else None
    return grad_z_q + towards if of_z else None, grad_codebook, None


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap(_Function.apply, info, in_dims, *arguments)


def _vmap(call: Any, info: Any, in_dims: tuple, z: Tensor, codebook: Tensor, totals: bool):
    if totals or in_dims[0] is None or in_dims[1] is not None or info.batch_size == 0:
        return one_by_one(call, info, in_dims, z, codebook, totals)
    z = z.movedim(in_dims[0], 0)
    z_q, indices, distance, counts, sums = call(z.flatten(0, 1), codebook, totals)
    found = (out.unflatten(0, z.shape[:2]) for out in (z_q, indices, distance))
    return (*found, counts, sums), (0, 0, 0, None, None)


LIBRARY.define("vq_assign(Tensor z, Tensor codebook, bool totals) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.impl("vq_assign", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::vq_assign", lib=LIBRARY)
def _fake(z, codebook, totals):
    rows, indices = z.shape[0], z.new_empty(z.shape[:1], dtype=torch.int64)
    of_codes = (len(codebook), codebook.shape[1]) if totals else (0,)
    return (
        *(z.new_empty((rows, codebook.shape[1])), indices, z.new_empty((rows,))),
        *(indices.new_empty(of_codes[:1]), z.new_empty(of_codes)),
    )


torch.library.register_autograd("vaecirc_fast::vq_assign", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_vmap("vaecirc_fast::vq_assign", partial(_vmap, torch.ops.vaecirc_fast.vq_assign), lib=LIBRARY)


# --- C++ -------------------------------------------------------------------------------------------------------------


def _cpp(z: Tensor, codebook: Tensor, totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, codebook = z.contiguous(), codebook.contiguous()
    (N, D), K = z.shape, len(codebook)
    indices, z_q, distance = z.new_empty(N, dtype=torch.int64), z.new_empty(N, D), z.new_empty(N)
    counts, sums = z.new_empty(K if totals else 0, dtype=torch.int64), z.new_empty((K, D) if totals else 0)
    out = [t.data_ptr() if t.numel() else 0 for t in (indices, z_q, distance, counts, sums)]
    threads = _native.threads(max(N * K * D // 16, N * D))
    _native.cpp().vq_assign(_native.DTYPES[z.dtype], z.data_ptr(), codebook.data_ptr(), (N, K, D), out, threads)
    return z_q, indices, distance, counts, sums


def _load_reference():
    return {"vq_assign": reference.forward}


def _load_cpp():
    return {"vq_assign": _cpp}


def _load_triton():
    from ..triton_kernels import vq_assign as kernels  # pyright: ignore[reportMissingImports]

    return {"vq_assign": kernels.forward}


_FLOATS = (torch.float32, torch.float64)
ROW = _registry.Row(
    "vq_assign",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), _FLOATS, _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), (torch.float32,), _registry.triton_reason),
        "cuda": _registry.Absent("is left to Triton: a product in blocks with a running minimum, which it schedules"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
