"""Op `topk`: the k largest of each row, ties to the lowest index; k may be a tensor, so that nothing recompiles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import topk as reference
from ._library import LIBRARY, is_plain_call, is_traced


def topk(a: Tensor, k: int | Tensor, *, sorted: bool = False, k_max: int | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `a`, and where they are.

    a: (..., M), float32, bfloat16, float16 or float64.
    k: how many, 1 <= k <= M: an integer, or an integer tensor of one element on the device of `a` together with k_max.
    As a tensor it may change from call to call without recompiling, also of a captured graph.
    k_max: how many entries a result has, k <= k_max <= M; k by default.
    sorted: whether a row's entries are in descending order of value (ties by index), or in ascending order of index.

    Returns values (..., K) in the dtype of `a` and indices (..., K) int32, K = k_max or k; from entry k on both are 0.
    Chosen are the first k of a stable descending sort, to the bit and on every backend: NaN is above every number as in
    torch.topk, -0.0 equals 0.0, ties go to the lowest index. Differentiable in `a`, twice. InputError for wrong shapes,
    dtypes, devices or k; of a tensor k on a GPU, which is not read, what is out of [0, k_max] is clamped.
    """
    if not isinstance(a, Tensor):
        raise InputError(f"a: expected a tensor, got {type(a).__name__}")
    if not a.dtype.is_floating_point:
        raise InputError(f"a: expected a floating dtype, got {a.dtype}")
    if a.ndim == 0 or a.shape[-1] == 0:
        raise InputError(f"a: expected shape (..., M) with M > 0, got {tuple(a.shape)}")
    size, count = entries(k, k_max, a.shape[-1], a.device)
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    values, indices = _forward(rows, count, size, bool(sorted))
    return values.reshape(*a.shape[:-1], size), indices.reshape(*a.shape[:-1], size)


def entries(k: Any, k_max: Any, M: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """The entries K of a result and k as a tensor, None where it is K. InputError unless 1 <= k <= K <= M."""
    if k_max is not None and (isinstance(k_max, bool) or not isinstance(k_max, int | torch.SymInt)):
        raise InputError(f"k_max: expected an integer, got {k_max!r}")
    if k_max is not None and not 1 <= k_max <= M:
        raise InputError(f"k_max: expected 1 <= k_max <= M = {M}, got {k_max}")
    if isinstance(k, Tensor):
        if k.dtype not in _COUNTS or k.numel() != 1:
            raise InputError(f"k: expected an integer tensor of one element, got {k.dtype} {tuple(k.shape)}")
        if k.device != device:
            raise InputError(f"k: expected a tensor on the device of the input, {device}, got {k.device}")
        if k_max is None:
            raise InputError("k: a tensor needs k_max, the number of entries of the result")
        return k_max, k.reshape(())
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise InputError(f"k: expected an integer or an integer tensor, got {k!r}")
    most = M if k_max is None else k_max
    if not 1 <= k <= most:
        raise InputError(f"k: expected 1 <= k <= {'M' if k_max is None else 'k_max'} = {most}, got {k}")
    if k_max is None or k == k_max:
        return k, None
    return k_max, torch.full((), int(k), dtype=torch.int32, device=device)


_COUNTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def checked(k: Tensor | None, k_max: int) -> Tensor | None:
    """k, of a GPU clamped to [0, k_max] without waiting for it; of the CPU InputError if it is out of [1, k_max]."""
    if k is None:
        return None
    if k.device.type == "cpu":
        count_of(k, k_max)
        return k
    return k.clamp(0, k_max)


def count_of(k: Tensor | None, k_max: int) -> int:
    """k on the CPU as an integer."""
    count = k_max if k is None else int(k)
    if not 1 <= count <= k_max:
        raise InputError(f"k: expected 1 <= k <= k_max = {k_max}, got a tensor of {count}")
    return count


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _forward(a: Tensor, k: Tensor | None, k_max: int, sorted: bool) -> tuple[Tensor, Tensor]:
    tensors = _given(a, k)
    if is_traced(*tensors):
        return torch.ops.vaecirc_fast.topk(a, k, k_max, sorted)
    return (_run if is_plain_call(*tensors) else _Function.apply)(a, k, k_max, sorted)


def _run(a: Tensor, k: Tensor | None, k_max: int, sorted: bool) -> tuple[Tensor, Tensor]:
    return ROW.function("topk", a)(a, checked(k, k_max), k_max, sorted)


def _run_backward(grad: Tensor, indices: Tensor, k: Tensor | None, M: int) -> Tensor:
    return ROW.function("topk_backward", grad)(grad, indices, checked(k, grad.shape[1]), M)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    a, k, _, _ = inputs
    ctx.M = a.shape[1]
    ctx.save_for_backward(output[1], k)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.forced = _registry.forced()


def _backward(ctx: Any, *grads: Tensor | None):
    grad = grads[0]
    if grad is None:
        return None, None, None, None
    indices, k = ctx.saved_tensors
    with _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
        traced = is_traced(*_given(grad, indices, k))
        call = torch.ops.vaecirc_fast.topk_backward if traced else _BackwardFunction.apply
        return call(grad, indices, k, ctx.M), None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, indices, k, _ = inputs
    ctx.save_for_backward(indices, k)


def _second_backward(ctx: Any, *grads: Tensor):
    """The gradient is linear in what it is given: each entry reads its element."""
    indices, k = ctx.saved_tensors
    out = grads[0].gather(1, indices.long())
    if k is not None:
        out = torch.where(torch.arange(out.shape[1], device=out.device) < k, out, 0)
    return out, None, None, None


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(V, B, ...) as (V B, ...), whether or not the tensor is batched."""
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    return tensor.flatten(0, 1)


def _one_k(dim: int | None) -> None:
    if dim is not None:
        raise InputError("k: must be the same for the whole batch of vmap, expected an unbatched tensor")


def _vmap(call: Callable, info: Any, in_dims: tuple, a: Tensor, k: Tensor | None, k_max: int, sorted: bool):
    _one_k(in_dims[1])
    values, indices = call(_fold(a, in_dims[0], info.batch_size), k, k_max, sorted)
    rows = (info.batch_size, values.shape[0] // info.batch_size)
    return (values.unflatten(0, rows), indices.unflatten(0, rows)), (0, 0)


def _vmap_backward(call: Callable, info: Any, in_dims: tuple, grad: Tensor, indices: Tensor, k: Tensor | None, M: int):
    _one_k(in_dims[2])
    grad, indices = _fold(grad, in_dims[0], info.batch_size), _fold(indices, in_dims[1], info.batch_size)
    out = call(grad, indices, k, M)
    return out.unflatten(0, (info.batch_size, out.shape[0] // info.batch_size)), 0


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap(_Function.apply, info, in_dims, *arguments)


class _BackwardFunction(torch.autograd.Function):
    """The gradient as a function of its own, so that it too can be transformed and differentiated."""

    forward = staticmethod(_run_backward)
    setup_context = staticmethod(_setup_backward_context)
    backward = staticmethod(_second_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap_backward(_BackwardFunction.apply, info, in_dims, *arguments)


LIBRARY.define("topk(Tensor a, Tensor? k, SymInt k_max, bool sorted) -> (Tensor, Tensor)")
LIBRARY.define("topk_backward(Tensor grad, Tensor indices, Tensor? k, SymInt M) -> Tensor")
LIBRARY.impl("topk", _run, "CompositeExplicitAutograd")
LIBRARY.impl("topk_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::topk", lib=LIBRARY)
def _fake(a, k, k_max, sorted):
    shape = (a.shape[0], k_max)
    return a.new_empty(shape), a.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("vaecirc_fast::topk_backward", lib=LIBRARY)
def _fake_backward(grad, indices, k, M):
    return grad.new_empty((grad.shape[0], M))


torch.library.register_autograd("vaecirc_fast::topk", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "vaecirc_fast::topk_backward", _second_backward, setup_context=_setup_backward_context, lib=LIBRARY
)
torch.library.register_vmap("vaecirc_fast::topk", partial(_vmap, torch.ops.vaecirc_fast.topk), lib=LIBRARY)
torch.library.register_vmap(
    "vaecirc_fast::topk_backward", partial(_vmap_backward, torch.ops.vaecirc_fast.topk_backward), lib=LIBRARY
)


def _cpp_forward(a: Tensor, k: Tensor | None, k_max: int, sorted: bool) -> tuple[Tensor, Tensor]:
    if a.stride(1) != 1:
        a = a.contiguous()
    rows, M = a.shape
    values = torch.empty(rows, k_max, dtype=a.dtype)
    indices = torch.empty(rows, k_max, dtype=torch.int32)
    _native.cpp().topk(
        *(a.data_ptr(), _native.DTYPES[a.dtype], rows, M, a.stride(0), count_of(k, k_max), k_max, sorted),
        *(values.data_ptr(), indices.data_ptr(), _native.threads(a.numel())),
    )
    return values, indices


def _cpp_backward(grad: Tensor, indices: Tensor, k: Tensor | None, M: int) -> Tensor:
    grad, indices = grad.contiguous(), indices.contiguous()
    out = torch.empty(grad.shape[0], M, dtype=grad.dtype)
    _native.cpp().topk_backward(
        *(grad.data_ptr(), indices.data_ptr(), grad.element_size(), grad.shape[0], M, count_of(k, grad.shape[1])),
        *(grad.shape[1], out.data_ptr(), _native.threads(out.numel())),
    )
    return out


def _load_reference():
    return {"topk": reference.forward, "topk_backward": reference.backward}


def _load_cpp():
    return {"topk": _cpp_forward, "topk_backward": _cpp_backward}


def _load_triton():
    from ..triton_kernels import topk as kernels  # pyright: ignore[reportMissingImports]

    return {"topk": kernels.forward, "topk_backward": kernels.backward}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "topk",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32, torch.bfloat16), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS[:3], _registry.triton_reason),
        "cuda": _registry.Absent("is not written: Triton is meant to be at the memory's speed; not measured"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
