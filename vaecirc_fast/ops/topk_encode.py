"""Op `topk_encode`: linear encoder, activation and the k largest latents, a tile of rows at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import topk_encode as reference
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one
from ._product import linear
from .sparse_decode import accumulate, gather
from .topk import checked, count_of, entries

TILE_BYTES = 1 << 20  # of products on the CPU: what stays in cache between their GEMM and their selection ...
TILE_ROWS = 128  # ... but at least so many rows, or the GEMM would read the weights too often


class Encoded(NamedTuple):
    """Sparse codes and what was counted on the way; None for what was not asked for."""

    values: Tensor  # (..., K)
    indices: Tensor  # (..., K) int32
    fired: Tensor | None  # (M,) int32: rows in which a latent was chosen with a value > 0
    aux_values: Tensor | None  # (..., k_aux): the largest among the dead latents
    aux_indices: Tensor | None  # (..., k_aux) int32


class Csr(NamedTuple):
    """Sparse codes with different numbers of entries a row: row b has those from offsets[b] to offsets[b + 1]."""

    values: Tensor  # (N,)
    indices: Tensor  # (N,) int32, ascending in a row
    offsets: Tensor  # (B + 1,) int32


def topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: int | Tensor,
    *,
    activation: str = "relu",
    k_max: int | None = None,
    fired: bool = False,
    dead: Tensor | None = None,
    k_aux: int = 0,
    scope: str = "row",
) -> tuple[Tensor, Tensor] | Encoded | Csr:
    """The k largest latents act(x @ w_enc.T + b_enc) of each row, without the (B, M) matrix of all of them.

    x: (..., D), float32, bfloat16, float16 or float64; w_enc: (M, D) as of nn.Linear, in any memory order (the view
    W.T of a (D, M) matrix is used as it is); b_enc: (M,) or None. One dtype and device.
    k: 1 <= k <= M, an integer, or an integer tensor of one element together with k_max, which may change without
    recompiling. k_max: how many entries a row has; k by default.
    activation: "relu" or "identity". relu(NaN) is NaN. With fewer than k positive latents, zeros fill up, from the
    lowest index.
    fired: count in how many rows each latent is chosen with a value > 0.
    dead: (M,) bool, with k_aux: a second list of the k_aux largest among these latents (AuxK); where fewer are dead,
    the rest is 0 at index 0, without gradient.
    scope: "row", or "batch" for the k B largest of all B rows together (BatchTopK), ties to the lowest row and index;
    k is then an integer, and fired, dead and k_max are not taken.

    Returns (values (..., K) in the dtype of x, indices (..., K) int32), entries of a row in ascending order of index,
    from entry k on 0; Encoded where fired or dead is asked for; Csr for scope="batch". Products are taken in the dtype
    of x; of 16 bits the bias is added and the choice made in float32. Differentiable in x, w_enc and b_enc, through the
    auxiliary values too; a chosen zero of a ReLU has no gradient. InputError for wrong shapes, dtypes, devices or k.
    """
    _check(x, w_enc, b_enc, activation, fired, dead, k_aux, scope)
    M = w_enc.shape[0]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    act = reference.ACTIVATIONS.index(activation)
    if scope == "batch":
        if isinstance(k, Tensor) or k_max is not None or fired or dead is not None:
            raise InputError('scope: "batch" takes an integer k, and neither k_max, fired nor dead')
        size, _ = entries(k, None, M, x.device)
        return Csr(*_batch(rows, w_enc, b_enc, size, act))
    size, count = entries(k, k_max, M, x.device)
    values, indices, counts, aux_values, aux_indices = _forward(
        rows, w_enc, b_enc, count, size, act, fired, dead, k_aux
    )
    shape = x.shape[:-1]
    values, indices = values.reshape(*shape, size), indices.reshape(*shape, size)
    if not fired and dead is None:
        return values, indices
    aux = (None, None)
    if dead is not None:
        aux = aux_values.reshape(*shape, k_aux), aux_indices.reshape(*shape, k_aux)
    return Encoded(values, indices, counts if fired else None, *aux)


def _check(x: Any, w_enc: Any, b_enc: Any, activation: Any, fired: Any, dead: Any, k_aux: Any, scope: Any) -> None:
    if activation not in reference.ACTIVATIONS:
        raise InputError(f"activation: {activation!r} is unknown; known: {', '.join(reference.ACTIVATIONS)}")
    if scope not in ("row", "batch"):
        raise InputError(f'scope: expected "row" or "batch", got {scope!r}')
    given = {"x": x, "w_enc": w_enc} | ({} if b_enc is None else {"b_enc": b_enc})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point or tensor.dtype != x.dtype:
            raise InputError(f"{name}: expected the floating dtype of x, got {tensor.dtype} with x {x.dtype}")
        if tensor.device != x.device:
            raise InputError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    if x.ndim == 0 or w_enc.ndim != 2 or w_enc.shape[1] != x.shape[-1]:
        turned = w_enc.ndim == 2 and x.ndim > 0 and w_enc.shape[0] == x.shape[-1]
        raise InputError(
            f"w_enc: expected shape (M, D) for x (..., D), got {tuple(w_enc.shape)} for {tuple(x.shape)}"
            + ("; a (D, M) matrix is given as its view w_enc.T" if turned else "")
        )
    M = w_enc.shape[0]
    if M == 0 or x.shape[-1] == 0:
        raise InputError(f"w_enc: expected shape (M, D) with M > 0 and D > 0, got {tuple(w_enc.shape)}")
    if b_enc is not None and b_enc.shape != (M,):
        raise InputError(f"b_enc: expected shape (M,) = ({M},), got {tuple(b_enc.shape)}")
    if not isinstance(fired, bool):
        raise InputError(f"fired: expected True or False, got {fired!r}")
    if isinstance(k_aux, bool) or not isinstance(k_aux, int | torch.SymInt):
        raise InputError(f"k_aux: expected an integer, got {k_aux!r}")
    if dead is None:
        if k_aux != 0:
            raise InputError("k_aux: needs dead, the (M,) bool mask of the latents to choose from")
        return
    if not isinstance(dead, Tensor) or dead.dtype != torch.bool or dead.shape != (M,) or dead.device != x.device:
        got = f"{dead.dtype} {tuple(dead.shape)} on {dead.device}" if isinstance(dead, Tensor) else type(dead).__name__
        raise InputError(f"dead: expected a bool tensor (M,) = ({M},) on {x.device}, got {got}")
    if not 1 <= k_aux <= M:
        raise InputError(f"k_aux: expected 1 <= k_aux <= M = {M}, got {k_aux}")


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _forward(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: Tensor | None,
    k_max: int,
    activation: int,
    count: bool,
    dead: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = _given(x, w_enc, b_enc, k, dead)
    call = torch.ops.vaecirc_fast.topk_encode
    if not is_traced(*tensors):
        call = _run if is_plain_call(*tensors) else _Function.apply
    return call(x, w_enc, b_enc, k, k_max, activation, count, dead, k_aux)


def _batch(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _given(x, w_enc, b_enc)
    call = torch.ops.vaecirc_fast.batch_topk_encode
    if not is_traced(*tensors):
        call = _run_batch if is_plain_call(*tensors) else _BatchFunction.apply
    return call(x, w_enc, b_enc, k, activation)


def _run(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: Tensor | None,
    k_max: int,
    activation: int,
    count: bool,
    dead: Tensor | None,
    k_aux: int,
):
    kernel = ROW.function("topk_encode", x)
    return kernel(x, w_enc, b_enc, checked(k, k_max), k_max, activation, count, dead, k_aux)


def _run_batch(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, activation: int):
    return ROW.function("batch_topk_encode", x)(x, w_enc, b_enc, k, activation)


# --- gradients -------------------------------------------------------------------------------------------------------


def _sparse_gradients(
    ctx: Any, grad_values: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w_enc and b_enc, where they are needed, from those of the chosen values before the activation."""
    of_x, of_w, of_b = ctx.needs_input_grad[:3]
    grad_x = grad_w = grad_b = None
    with _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
        if of_x:
            grad_x = gather(grad_values, indices, w_enc, offsets)
        if of_w or of_b:
            grad_w, grad_b = accumulate(grad_values, indices, x, w_enc.shape[0], offsets)
    return grad_x, grad_w if of_w else None, grad_b if of_b else None


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w_enc, _, k, _, ctx.activation, _, dead, _ = inputs
    values, indices, fired, aux_values, aux_indices = output
    ctx.save_for_backward(x, w_enc, k, dead, values, indices, aux_values, aux_indices)
    ctx.mark_non_differentiable(indices, fired, aux_indices)
    ctx.forced = _registry.forced()


def _passed(grad: Tensor, values: Tensor, n: Tensor | None, activation: int) -> Tensor:
    """The gradient where a value passes one: of a ReLU where it is positive, of n entries where they are no padding."""
    if reference.ACTIVATIONS[activation] == "relu":
        return torch.where(values > 0, grad, 0)
    return grad if n is None else torch.where(torch.arange(grad.shape[-1], device=grad.device) < n, grad, 0)


def _backward(ctx: Any, *grads: Tensor):
    grad, _, _, grad_aux, _ = grads
    x, w_enc, k, dead, values, indices, aux_values, aux_indices = ctx.saved_tensors
    grad = _passed(grad, values, k, ctx.activation)
    if dead is not None:
        grad_aux = _passed(grad_aux, aux_values, dead.sum(), ctx.activation)
        grad, indices = torch.cat([grad, grad_aux], 1), torch.cat([indices, aux_indices], 1)
    return *_sparse_gradients(ctx, grad, indices, x, w_enc, None), None, None, None, None, None, None


def _setup_batch_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w_enc, _, _, ctx.activation = inputs
    values, indices, offsets = output
    ctx.save_for_backward(x, w_enc, values, indices, offsets)
    ctx.mark_non_differentiable(indices, offsets)
    ctx.forced = _registry.forced()


def _batch_backward(ctx: Any, *grads: Tensor):
    x, w_enc, values, indices, offsets = ctx.saved_tensors
    grad = _passed(grads[0], values, None, ctx.activation)
    return *_sparse_gradients(ctx, grad, indices, x, w_enc, offsets), None, None


# --- transforms ------------------------------------------------------------------------------------------------------


def _vmap(call: Callable, info: Any, in_dims: tuple, *arguments: Any):
    x, *rest = arguments
    count = rest[5]
    if count or any(dim is not None for dim in in_dims[1:]) or info.batch_size == 0:
        return one_by_one(call, info, in_dims, *arguments)
    x = x.movedim(in_dims[0], 0)
    values, indices, fired, aux_values, aux_indices = call(x.flatten(0, 1), *rest)
    values, indices, aux_values, aux_indices = (
        out.unflatten(0, x.shape[:2]) for out in (values, indices, aux_values, aux_indices)
    )
    return (values, indices, fired.expand(x.shape[0], 0), aux_values, aux_indices), (0, 0, 0, 0, 0)


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap(_Function.apply, info, in_dims, *arguments)


class _BatchFunction(torch.autograd.Function):
    """The same of all rows together."""

    forward = staticmethod(_run_batch)
    setup_context = staticmethod(_setup_batch_context)
    backward = staticmethod(_batch_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return one_by_one(_BatchFunction.apply, info, in_dims, *arguments)


LIBRARY.define(
    "topk_encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? k, SymInt k_max, int activation, bool count, "
    "Tensor? dead, SymInt k_aux) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "batch_topk_encode(Tensor x, Tensor w_enc, Tensor? b_enc, SymInt k, int activation) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("topk_encode", _run, "CompositeExplicitAutograd")
LIBRARY.impl("batch_topk_encode", _run_batch, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::topk_encode", lib=LIBRARY)
def _fake(x, w_enc, b_enc, k, k_max, activation, count, dead, k_aux):
    rows, aux = x.shape[0], 0 if dead is None else k_aux
    return (
        x.new_empty((rows, k_max)),
        x.new_empty((rows, k_max), dtype=torch.int32),
        x.new_empty((w_enc.shape[0] if count else 0,), dtype=torch.int32),
        x.new_empty((rows, aux)),
        x.new_empty((rows, aux), dtype=torch.int32),
    )


@torch.library.register_fake("vaecirc_fast::batch_topk_encode", lib=LIBRARY)
def _fake_batch(x, w_enc, b_enc, k, activation):
    entries = (x.shape[0] * k,)
    offsets = x.new_empty((x.shape[0] + 1,), dtype=torch.int32)
    return x.new_empty(entries), x.new_empty(entries, dtype=torch.int32), offsets


torch.library.register_autograd("vaecirc_fast::topk_encode", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "vaecirc_fast::batch_topk_encode", _batch_backward, setup_context=_setup_batch_context, lib=LIBRARY
)
torch.library.register_vmap(
    "vaecirc_fast::topk_encode", partial(_vmap, torch.ops.vaecirc_fast.topk_encode), lib=LIBRARY
)
torch.library.register_vmap(
    "vaecirc_fast::batch_topk_encode", partial(one_by_one, torch.ops.vaecirc_fast.batch_topk_encode), lib=LIBRARY
)


# --- C++ -------------------------------------------------------------------------------------------------------------


def products(x: Tensor, w_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """x @ w_enc.T a tile of rows at a time, as the C++ kernel selects from it: first row and (rows, M)."""
    rows, M = x.shape[0], w_enc.shape[0]
    if 1 not in w_enc.stride():
        w_enc = w_enc.contiguous()  # or every tile's GEMM would copy it
    size = max(1, min(rows, max(TILE_ROWS, TILE_BYTES // (M * x.element_size()))))
    for start in range(0, rows, size):
        yield start, linear(x[start : start + size], w_enc)


def _bias(b_enc: Tensor | None) -> Tensor | None:
    return None if b_enc is None else b_enc.detach().float().contiguous()


@torch.no_grad()
def _cpp_forward(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: Tensor | None,
    k_max: int,
    activation: int,
    count: bool,
    dead: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, M = x.shape[0], w_enc.shape[0]
    n, relu, bias = count_of(k, k_max), reference.ACTIVATIONS[activation] == "relu", _bias(b_enc)
    k_aux = 0 if dead is None else k_aux
    values, aux_values = torch.empty(rows, k_max, dtype=x.dtype), torch.empty(rows, k_aux, dtype=x.dtype)
    indices = torch.empty(rows, k_max, dtype=torch.int32)
    aux_indices = torch.empty(rows, k_aux, dtype=torch.int32)
    threads = _native.threads(rows * M)
    fired = torch.zeros(M * threads if count else 0, dtype=torch.int32)
    members = None if dead is None else dead.nonzero().flatten().int()
    for start, pre in products(x, w_enc):
        _native.cpp().topk_encode(
            *(pre.data_ptr(), _native.DTYPES[x.dtype], len(pre), M, _native.address(bias), relu, n, k_max),
            *(values[start:].data_ptr(), indices[start:].data_ptr(), fired.data_ptr() if count else 0),
            *(_native.address(members), 0 if members is None else len(members), k_aux),
            *(aux_values[start:].data_ptr(), aux_indices[start:].data_ptr(), threads),
        )
    if count and threads > 1:
        fired = fired.view(threads, M).sum(0, dtype=torch.int32)
    return values, indices, fired, aux_values, aux_indices


@torch.no_grad()
def _cpp_batch(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    cpp = _native.cpp()
    rows, M = x.shape[0], w_enc.shape[0]
    relu, bias, keep = reference.ACTIVATIONS[activation] == "relu", _bias(b_enc), k * rows
    threads = _native.threads(rows * M)
    counts = torch.empty(rows, dtype=torch.int32)
    values, columns, found = torch.empty(0), torch.empty(0, dtype=torch.int32), 0
    beyond = cpp.CUT_ZERO if relu else cpp.CUT_ALL
    for start, pre in products(x, w_enc):
        if start == 0:  # twice what is kept, so that cutting costs little, and a tile
            room = min(rows * M, 2 * keep + pre.numel()) + 64 * threads
            values, columns = torch.empty(room), torch.empty(room, dtype=torch.int32)
        found = cpp.batch_append(
            *(pre.data_ptr(), _native.DTYPES[x.dtype], len(pre), M, _native.address(bias), beyond),
            *(values.data_ptr(), columns.data_ptr(), found, counts[start:].data_ptr(), threads),
        )
        end = start + len(pre)
        if found > 2 * keep or (found > keep and end == rows):
            beyond = cpp.batch_cut(values.data_ptr(), columns.data_ptr(), found, keep, counts.data_ptr(), end)
            found = keep
    if found < keep:
        filled = torch.empty(keep), torch.empty(keep, dtype=torch.int32)
        cpp.batch_fill(
            *(values.data_ptr(), columns.data_ptr(), counts.data_ptr(), rows, M, found, keep),
            *(filled[0].data_ptr(), filled[1].data_ptr()),
        )
        values, columns = filled
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    return values[:keep].to(x.dtype, copy=True), columns[:keep].clone(), offsets


def _load_reference():
    return {"topk_encode": reference.forward, "batch_topk_encode": reference.batch}


def _load_cpp():
    return {"topk_encode": _cpp_forward, "batch_topk_encode": _cpp_batch}


def _load_triton():
    from ..triton_kernels import topk_encode as kernels  # pyright: ignore[reportMissingImports]

    return {"topk_encode": kernels.forward, "batch_topk_encode": kernels.batch}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "topk_encode",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32, torch.bfloat16), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS[:3], _registry.triton_reason),
        "cuda": _registry.Absent("is not written: Triton is meant to be at the GEMM's speed; not measured"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
