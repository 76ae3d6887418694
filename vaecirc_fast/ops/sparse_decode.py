"""Op `sparse_decode`: sparse codes -> their reconstruction, and the two sums that its gradients are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import sparse_decode as reference
from ._library import LIBRARY, is_plain_call, is_traced

MOST = 2**31 - 1  # rows, entries and latents: indices are int32


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The decoder of a sparse layer, from the codes that are not zero: y = b_dec + sum value * w_dec[index].

    values, indices: (..., K), K entries a row; or with offsets (B + 1,) both (N,): row b has the entries
    [offsets[b], offsets[b + 1]). w_dec: (M, D); b_dec: (D,). float32, bfloat16, float16 or float64, all alike, on one
    device; indices and offsets int32 or int64. Any strides; what is not contiguous is copied.
    target: (..., D), or (B, D) with offsets: then the squared error is returned too, in the same pass.

    Returns y (..., D), or (y, squared_error) with squared_error (...,), the sum over D of (y - target)^2; both of the
    dtype of values, added up in float32 for 16 bits. Equal indices in a row add up. An entry of value 0 adds nothing,
    even where w_dec is not finite: codes may be padded with (0, 0). Differentiable, to any order, in all but indices
    and offsets; latents that no entry names have gradient 0. Deterministic for any number of threads. InputError for
    wrong shapes, dtypes or devices, and on a CPU for an index outside [0, M) or offsets that do not ascend from 0 to N.
    On a GPU nobody waits to look: an entry with such an index is left out, and offsets must be right.
    """
    _check_matrix("w_dec", w_dec)
    check_entries(values, indices, offsets, w_dec)
    rows = values.shape[:-1] if offsets is None else (offsets.shape[0] - 1,)
    of = {"values": values, "indices": indices, "offsets": offsets, "b_dec": b_dec, "target": target}
    check_alike(w_dec, "w_dec", {name: tensor for name, tensor in of.items() if tensor is not None})
    width = w_dec.shape[1]
    if b_dec is not None and b_dec.shape != (width,):
        raise InputError(f"b_dec: expected shape ({width},) for w_dec {tuple(w_dec.shape)}, got {tuple(b_dec.shape)}")
    if target is not None:
        if target.shape != (*rows, width):
            raise InputError(f"target: expected the shape of y, {(*rows, width)}, got {tuple(target.shape)}")
        target = target.reshape(rows.numel() if isinstance(rows, torch.Size) else rows[0], width)
    values, indices, offsets = flat_entries(values, indices, offsets)
    y, squared_error = _decode(values, indices, w_dec, b_dec, offsets, target)
    y = y.view(*rows, width)
    return y if target is None else (y, squared_error.view(rows))


def gather(values: Tensor, indices: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """For each row sum value * w[index]: (B, D). For the gradients of other ops: nothing is checked, 2-D, int32."""
    return _decode(values, indices, w, None, offsets, None)[0]


def grad_values(indices: Tensor, w: Tensor, g: Tensor, offsets: Tensor | None = None) -> Tensor:
    """For each entry w[index] . g[row], of the shape of indices. As `gather`."""
    return _decode_values(indices, w, g, offsets)


def accumulate(
    values: Tensor, indices: Tensor, g: Tensor, M: int, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each latent sum value * g[row], (M, D), and sum value, (M,), in the order of rows. As `gather`."""
    return _accumulate(values, indices, g, M, offsets)


def _check_matrix(name: str, matrix: Any) -> None:
    if not isinstance(matrix, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.ndim != 2 or matrix.shape[0] == 0 or not matrix.dtype.is_floating_point:
        raise InputError(f"{name}: expected floating (M, D) with M > 0, got {matrix.dtype} {tuple(matrix.shape)}")


def check_entries(values: Any, indices: Any, offsets: Any, matrix: Tensor) -> None:
    """InputError where values, indices and offsets are not entries of rows."""
    for name, tensor in (("values", values), ("indices", indices)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if values.shape != indices.shape:
        raise InputError(f"indices: expected the shape of values, {tuple(values.shape)}, got {tuple(indices.shape)}")
    integers = (torch.int32, torch.int64)
    if indices.dtype not in integers:
        raise InputError(f"indices: expected int32 or int64, got {indices.dtype}")
    if values.ndim == 0:
        raise InputError("values: expected (..., K), got a single number")
    if offsets is not None:
        if not isinstance(offsets, Tensor):
            raise InputError(f"offsets: expected a tensor, got {type(offsets).__name__}")
        if offsets.ndim != 1 or offsets.shape[0] == 0 or offsets.dtype not in integers:
            raise InputError(f"offsets: expected int32 or int64 (B + 1,), got {offsets.dtype} {tuple(offsets.shape)}")
        if values.ndim != 1:
            raise InputError(f"values: expected (N,) with offsets, got {tuple(values.shape)}")
    if values.numel() > MOST or matrix.shape[0] > MOST:
        raise InputError(f"values: expected less than 2^31 entries and latents, got {values.numel()}")


def check_alike(matrix: Tensor, name: str, others: dict[str, Tensor]) -> None:
    """InputError where `others` are not on the device of `matrix` and, but for integers, of its dtype."""
    for other, tensor in others.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{other}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != matrix.device:
            raise InputError(f"{other}: expected the device of {name}, {matrix.device}, got {tensor.device}")
        if other not in ("indices", "offsets") and tensor.dtype != matrix.dtype:
            raise InputError(f"{other}: expected the dtype of {name}, {matrix.dtype}, got {tensor.dtype}")


def flat_entries(values: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Entries as kernels take them: (B, K) or (N,), and int32."""
    if offsets is None:
        shape = values.shape[:-1].numel(), values.shape[-1]
        return values.reshape(shape), _int32(indices).reshape(shape), None
    return values, _int32(indices), _int32(offsets)


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 else x.clamp(-1, MOST).int()  # what does not fit stays out of range


# --- the three registered ops: each is linear in its floats, and their gradients are one another ---------------------


def _run_decode(values, indices, w, b, offsets, target):
    return ROW.function("sparse_decode", values)(values, indices, w, b, offsets, target)


def _run_values(indices, w, g, offsets):
    return ROW.function("sparse_decode_values", g)(indices, w, g, offsets)


def _run_accumulate(values, indices, g, M, offsets):
    return ROW.function("accumulate", g)(values, indices, g, M, offsets)


def _row_count(entries: Tensor, offsets: Tensor | None) -> int:
    return entries.shape[0] if offsets is None else offsets.shape[0] - 1


LIBRARY.define(
    "sparse_decode(Tensor values, Tensor indices, Tensor w_dec, Tensor? b_dec, Tensor? offsets, Tensor? target) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("sparse_decode_values(Tensor indices, Tensor w, Tensor g, Tensor? offsets) -> Tensor")
LIBRARY.define(
    "sparse_accumulate(Tensor values, Tensor indices, Tensor g, SymInt M, Tensor? offsets) -> (Tensor, Tensor)"
)


@torch.library.register_fake("vaecirc_fast::sparse_decode", lib=LIBRARY)
def _fake_decode(values, indices, w_dec, b_dec, offsets, target):
    rows = _row_count(values, offsets)
    return values.new_empty(rows, w_dec.shape[1]), values.new_empty(0 if target is None else rows)


@torch.library.register_fake("vaecirc_fast::sparse_decode_values", lib=LIBRARY)
def _fake_values(indices, w, g, offsets):
    return g.new_empty(indices.shape)


@torch.library.register_fake("vaecirc_fast::sparse_accumulate", lib=LIBRARY)
def _fake_accumulate(values, indices, g, M, offsets):
    return g.new_empty(M, g.shape[1]), g.new_empty(M)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.forced = _registry.forced()


def _as_forward(ctx: Any) -> contextlib.AbstractContextManager:
    return _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext()


def _setup_decode(ctx: Any, inputs: tuple, output: tuple) -> None:
    target = inputs[-1]
    _keep(ctx, *inputs, None if target is None else output[0])


def _backward_decode(ctx: Any, grad_y: Tensor | None, grad_error: Tensor | None):
    values, indices, w, b, offsets, target, y = ctx.saved_tensors
    of_values = of_w = of_b = of_target = None
    g = grad_y
    if target is not None and grad_error is not None:
        difference = reference.working(y) - reference.working(target)
        slope = 2 * grad_error.to(difference.dtype)[:, None]
        if g is None:
            g = slope * difference
        else:
            g = torch.addcmul(reference.working(g), difference, slope)
        g = g.to(y.dtype)
        if ctx.needs_input_grad[5]:
            of_target = (-slope * difference).to(y.dtype)
    if g is not None:
        with _as_forward(ctx):
            if ctx.needs_input_grad[0]:
                of_values = _decode_values(indices, w, g, offsets)
            if ctx.needs_input_grad[2]:
                of_w = _accumulate(values, indices, g, w.shape[0], offsets)[0]
        if b is not None and ctx.needs_input_grad[3]:
            of_b = g.sum(0)
    return of_values, None, of_w, of_b, None, of_target


def _setup_values(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _keep(ctx, *inputs)


def _backward_values(ctx: Any, grad: Tensor | None):
    indices, w, g, offsets = ctx.saved_tensors
    of_w = of_g = None
    if grad is not None:
        with _as_forward(ctx):
            if ctx.needs_input_grad[1]:
                of_w = _accumulate(grad, indices, g, w.shape[0], offsets)[0]
            if ctx.needs_input_grad[2]:
                of_g = gather(grad, indices, w, offsets)
    return None, of_w, of_g, None


def _setup_accumulate(ctx: Any, inputs: tuple, output: tuple) -> None:
    values, indices, g, _, offsets = inputs
    _keep(ctx, values, indices, g, offsets)


def _backward_accumulate(ctx: Any, grad_sums: Tensor | None, grad_totals: Tensor | None):
    values, indices, g, offsets = ctx.saved_tensors
    of_values = of_g = None
    with _as_forward(ctx):
        if grad_sums is not None and ctx.needs_input_grad[2]:
            of_g = gather(values, indices, grad_sums, offsets)
        if ctx.needs_input_grad[0]:
            # The totals are one more column of the sums, whose g is 1.
            w, columns = grad_sums, g
            if grad_totals is not None:
                ones = g.new_ones(g.shape[0], 1)
                w = grad_totals[:, None] if w is None else torch.cat([w, grad_totals[:, None]], 1)
                columns = ones if grad_sums is None else torch.cat([g, ones], 1)
            if w is not None:
                of_values = _decode_values(indices, w, columns, offsets)
    return of_values, None, of_g, None, None


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) as (V B, ...), whether or not the tensor is batched."""
    if tensor is None:
        return None
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    return tensor.flatten(0, 1)


def _one_by_one(call: Callable, info: Any, in_dims: tuple, arguments: tuple):
    """Where rows of different calls cannot be joined: because they share no matrix, or are what is summed over."""
    results = [
        call(*(x if dim is None else x.select(dim, v) for x, dim in zip(arguments, in_dims, strict=True)))
        for v in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _vmap_decode(call: Callable, info: Any, in_dims: tuple, *arguments: Any):
    values, indices, w, b, offsets, target = arguments
    if offsets is not None or in_dims[2] is not None or in_dims[3] is not None:
        return _one_by_one(call, info, in_dims, arguments)
    size = info.batch_size
    values, indices, target = (_fold(arguments[n], in_dims[n], size) for n in (0, 1, 5))
    y, squared_error = call(values, indices, w, b, None, target)
    squared_error = y.new_empty(size, 0) if target is None else squared_error.unflatten(0, (size, len(y) // size))
    return (y.unflatten(0, (size, len(y) // size)), squared_error), (0, 0)


def _vmap_values(call: Callable, info: Any, in_dims: tuple, *arguments: Any):
    indices, w, g, offsets = arguments
    if offsets is not None or in_dims[1] is not None:
        return _one_by_one(call, info, in_dims, arguments)
    size = info.batch_size
    out = call(_fold(indices, in_dims[0], size), w, _fold(g, in_dims[2], size), None)
    return out.unflatten(0, (size, len(out) // size)), 0


def _vmap_accumulate(call: Callable, info: Any, in_dims: tuple, *arguments: Any):
    return _one_by_one(call, info, in_dims, arguments)


def _register(name: str, run: Callable, setup_context: Callable, backward: Callable, vmap: Callable) -> Callable:
    """Registers an op's parts, and returns it: the registered op where calls are watched, else its kernel at once."""
    operator = getattr(torch.ops.vaecirc_fast, name)
    of_run, of_setup, of_backward = run, setup_context, backward

    class Eager(torch.autograd.Function):
        """The eager path with gradient or under a transform."""

        forward = staticmethod(of_run)
        setup_context = staticmethod(of_setup)
        backward = staticmethod(of_backward)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *arguments: Any):
            return vmap(Eager.apply, info, in_dims, *arguments)

    def batched(info: Any, in_dims: tuple, *arguments: Any):
        return vmap(operator, info, in_dims, *arguments)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"vaecirc_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(f"vaecirc_fast::{name}", batched, lib=LIBRARY)

    def call(*arguments: Any):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if is_traced(*tensors):
            return operator(*arguments)
        return (run if is_plain_call(*tensors) else Eager.apply)(*arguments)

    return call


_decode = _register("sparse_decode", _run_decode, _setup_decode, _backward_decode, _vmap_decode)
_decode_values = _register("sparse_decode_values", _run_values, _setup_values, _backward_values, _vmap_values)
_accumulate = _register("sparse_accumulate", _run_accumulate, _setup_accumulate, _backward_accumulate, _vmap_accumulate)


# --- kernels ---------------------------------------------------------------------------------------------------------


def raise_wrong(wrong: int, indices: Tensor, M: int, offsets: Tensor | None) -> None:
    """InputError for what a CPU kernel found wrong: the position of an entry, or offsets; -1 is nothing."""
    if wrong == -1:
        return
    if wrong < 0:
        raise InputError(f"offsets: expected ascending numbers from 0 to N = {indices.numel()}, got {_short(offsets)}")
    place = f"entry {wrong}" if offsets is not None else f"row {wrong // indices.shape[1]}, {wrong % indices.shape[1]}"
    raise InputError(f"indices: {place} is {int(indices.flatten()[wrong])}, expected indices in [0, {M})")


def _short(offsets: Tensor | None) -> str:
    numbers = [] if offsets is None else offsets.tolist()
    return str(numbers) if len(numbers) < 9 else f"[{numbers[0]}, ..., {numbers[-1]}] of {len(numbers)}"


def check_indices(indices: Tensor, M: int, offsets: Tensor | None) -> None:
    """What the C++ kernels check, for others on CPU tensors."""
    if indices.device.type != "cpu":
        return
    if offsets is not None and not (
        int(offsets[0]) == 0 and int(offsets[-1]) == indices.numel() and bool((offsets.diff() >= 0).all())
    ):
        raise_wrong(-3, indices, M, offsets)
    wrong = ((indices < 0) | (indices >= M)).flatten()
    if bool(wrong.any()):
        raise_wrong(int(wrong.nonzero()[0]), indices, M, offsets)


def checked(kernels: dict[str, Callable]) -> dict[str, Callable]:
    """The row's functions, given those of a backend that does not look at indices itself."""

    def decode(values, indices, w, b, offsets, target):
        check_indices(indices, len(w), offsets)
        return kernels["sparse_decode"](values, indices, w, b, offsets, target)

    def of_values(indices, w, g, offsets):
        check_indices(indices, len(w), offsets)
        return kernels["sparse_decode_values"](indices, w, g, offsets)

    def of_latents(values, indices, g, M, offsets):
        check_indices(indices, M, offsets)
        return kernels["accumulate"](values, indices, g, M, offsets)

    return {"sparse_decode": decode, "sparse_decode_values": of_values, "accumulate": of_latents}


def sizes(indices: Tensor, offsets: Tensor | None, width: int, latents: int) -> tuple[int, int, int, int, int]:
    """B, K, N, D, M of csrc/cpu/sparse_decode.h."""
    entries = 0 if offsets is not None else indices.shape[1]
    return _row_count(indices, offsets), entries, indices.numel(), width, latents


def _cpp_decode(
    values: Tensor, indices: Tensor, w: Tensor, b: Tensor | None, offsets: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    values, indices, w = values.contiguous(), indices.contiguous(), w.contiguous()
    b, offsets, target = (None if x is None else x.contiguous() for x in (b, offsets, target))
    size = sizes(indices, offsets, w.shape[1], len(w))
    y = torch.empty(size[0], size[3], dtype=values.dtype, device="cpu")
    squared_error = torch.empty(0 if target is None else size[0], dtype=values.dtype, device="cpu")
    wrong = _native.cpp().sparse_decode(
        *(
            values.data_ptr(),
            indices.data_ptr(),
            w.data_ptr(),
            _native.address(b),
            _native.address(offsets),
            _native.address(target),
        ),
        *(_native.DTYPES[values.dtype], size, y.data_ptr(), squared_error.data_ptr()),
        _native.threads(indices.numel() * size[3]),
    )
    raise_wrong(wrong, indices, len(w), offsets)
    return y, squared_error


def _cpp_values(indices: Tensor, w: Tensor, g: Tensor, offsets: Tensor | None) -> Tensor:
    indices, w, g = indices.contiguous(), w.contiguous(), g.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    out = torch.empty(indices.shape, dtype=g.dtype, device="cpu")
    wrong = _native.cpp().sparse_decode_values(
        *(indices.data_ptr(), w.data_ptr(), g.data_ptr(), _native.address(offsets), _native.DTYPES[g.dtype]),
        *(sizes(indices, offsets, w.shape[1], len(w)), out.data_ptr(), _native.threads(indices.numel() * w.shape[1])),
    )
    raise_wrong(wrong, indices, len(w), offsets)
    return out


def _cpp_accumulate(
    values: Tensor, indices: Tensor, g: Tensor, M: int, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    values, indices, g = values.contiguous(), indices.contiguous(), g.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    out = torch.empty(M, g.shape[1], dtype=g.dtype, device="cpu")
    totals = torch.empty(M, dtype=g.dtype, device="cpu")
    wrong = _native.cpp().sparse_accumulate(
        *(values.data_ptr(), indices.data_ptr(), g.data_ptr(), _native.address(offsets), _native.DTYPES[g.dtype]),
        *(sizes(indices, offsets, g.shape[1], M), out.data_ptr(), totals.data_ptr()),
        _native.threads(indices.numel() * g.shape[1]),
    )
    raise_wrong(wrong, indices, M, offsets)
    return out, totals


def _load_reference():
    return checked(
        {
            "sparse_decode": reference.forward,
            "sparse_decode_values": reference.grad_values,
            "accumulate": reference.accumulate,
        }
    )


def _load_cpp():
    return {"sparse_decode": _cpp_decode, "sparse_decode_values": _cpp_values, "accumulate": _cpp_accumulate}


def _load_triton():
    from ..triton_kernels import sparse_decode as kernels  # pyright: ignore[reportMissingImports]

    return checked(
        {
            "sparse_decode": kernels.forward,
            "sparse_decode_values": kernels.grad_values,
            "accumulate": kernels.accumulate,
        }
    )


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "sparse_decode",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32, torch.bfloat16), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS, _registry.triton_reason),
        "cuda": _registry.Absent(
            "is not written: rows are read and added, at which Triton should reach the memory's speed; not measured"
        ),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
