"""Op `threshold_encode`: a linear layer, a thresholding activation, its penalty and its counts, in one pass."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import threshold_encode as reference
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one
from ._product import linear

TILE_BYTES = 2 << 20  # of pre-activations: the pass over a tile finds it in cache
BANDWIDTH = 1e-3


class Thresholded(NamedTuple):
    """Activations with what was counted on the way; see `threshold_encode`."""

    acts: Tensor
    penalty: Tensor
    l0: Tensor
    fired: Tensor


@overload
def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = ...,
    threshold: float | Tensor = ...,
    kind: str = ...,
    *,
    bandwidth: float = ...,
    counts: Literal[False] = ...,
) -> Tensor: ...
@overload
def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = ...,
    threshold: float | Tensor = ...,
    kind: str = ...,
    *,
    bandwidth: float = ...,
    counts: Literal[True],
) -> Thresholded: ...
def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    threshold: float | Tensor = 0.0,
    kind: str = "relu",
    *,
    bandwidth: float = BANDWIDTH,
    counts: bool = False,
) -> Tensor | Thresholded:
    """Activations a = f(x w_enc' + b_enc) of M latents, of which many are exactly 0.

    x: (..., D); w_enc: (M, D) of any strides (the view W.T of a (D, M) matrix costs no copy); b_enc: (M,) or None.
    threshold: a number, or (M,) one for each latent. All floats of one dtype on one device.
    kind, with p the pre-activation and t the threshold: "relu", p where p > max(t, 0), else 0, t a constant;
    "jump" (JumpReLU), p where p > t, else 0; "soft", sign(p) max(|p| - t, 0), t >= 0.
    bandwidth: of the straight-through gradient of "jump": the step at t has the derivative 1 / bandwidth where
    |p - t| < bandwidth / 2 (a rectangle; Rajamanoharan et al. 2024, arXiv 2407.14435).

    Returns a (..., M); with counts=True `Thresholded`: a; penalty (...,) = sum of |a| over latents; l0 (...,) = the
    number of a that are not 0, as a float, whose gradient ("jump" only) is the straight-through one; fired int32 (M,),
    in how many rows a > 0. penalty and l0 are float32 for 16-bit inputs.
    Differentiable in x, w_enc, b_enc and threshold; pre-activations are not kept: the gradient of "jump" makes them
    again, a tile of rows at a time. NaN stays NaN. Deterministic for any number of threads. InputError for other
    shapes, dtypes, devices, names, or a negative threshold of "soft" on the CPU.
    """
    if kind not in reference.KINDS:
        raise InputError(f"kind: {kind!r} is unknown; known: {', '.join(reference.KINDS)}")
    if not 0 < bandwidth < float("inf"):
        raise InputError(f"bandwidth: expected a positive number, got {bandwidth}")
    check_linear(x, w_enc, b_enc)
    latents = w_enc.shape[0]
    if not isinstance(threshold, Tensor):
        threshold = torch.full((latents,), float(threshold), dtype=x.dtype, device=x.device)
    elif threshold.shape not in ((), (1,), (latents,)):
        raise InputError(f"threshold: expected a number or ({latents},), got {tuple(threshold.shape)}")
    elif threshold.dtype != x.dtype or threshold.device != x.device:
        raise InputError(
            f"threshold: expected {x.dtype} on {x.device} as x, got {threshold.dtype} on {threshold.device}"
        )
    threshold = threshold.expand(latents)
    if kind == "soft" and x.device.type == "cpu" and not is_traced(threshold) and not _transformed():
        if bool((threshold < 0).any()):
            raise InputError(f"threshold: expected none below 0 for 'soft', got {float(threshold.min())}")
    rows = x.reshape(-1, x.shape[-1])
    arguments = (rows, w_enc, b_enc, threshold, reference.KINDS.index(kind), float(bandwidth))
    tensors = [t for t in arguments[:4] if isinstance(t, Tensor)]
    if is_traced(*tensors):
        found = torch.ops.vaecirc_fast.threshold_encode(*arguments)
    else:
        found = (_run if is_plain_call(*tensors) else _Function.apply)(*arguments)
    acts, penalty, l0, fired = found
    acts = acts.view(*x.shape[:-1], latents) if x.ndim != 2 else acts
    if not counts:
        return acts
    return Thresholded(acts, penalty.view(x.shape[:-1]), l0.view(x.shape[:-1]), fired)


def check_linear(x: Tensor, w_enc: Tensor, b_enc: Tensor | None) -> None:
    """InputError unless x (..., D), w_enc (M, D) and b_enc (M,) fit together."""
    for name, t in (("x", x), ("w_enc", w_enc), ("b_enc", b_enc)):
        if t is None and name == "b_enc":
            continue
        if not isinstance(t, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(t).__name__}")
        if not t.is_floating_point() or t.dtype != x.dtype:
            raise InputError(f"{name}: expected floats of x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise InputError(f"{name}: expected the device of x, {x.device}, got {t.device}")
    if w_enc.ndim != 2 or 0 in w_enc.shape:
        raise InputError(f"w_enc: expected (M, D) with M, D > 0, got {tuple(w_enc.shape)}")
    if x.ndim < 1 or x.shape[-1] != w_enc.shape[1]:
        raise InputError(f"x: expected (..., {w_enc.shape[1]}) for w_enc {tuple(w_enc.shape)}, got {tuple(x.shape)}")
    if b_enc is not None and b_enc.shape != w_enc.shape[:1]:
        raise InputError(f"b_enc: expected ({w_enc.shape[0]},), got {tuple(b_enc.shape)}")


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _run(x: Tensor, w: Tensor, b: Tensor | None, threshold: Tensor, kind: int, bandwidth: float):
    return ROW.function("threshold_encode", x)(x, w, b, threshold, kind)


def _run_backward(x, w, b, threshold, acts, kind, bandwidth, grad_acts, grad_penalty, grad_l0, need_x):
    kernel = ROW.function("threshold_encode_backward", x)
    return kernel(x, w, b, threshold, acts, kind, bandwidth, grad_acts, grad_penalty, grad_l0, need_x)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w, b, threshold, ctx.kind, ctx.bandwidth = inputs
    ctx.save_for_backward(x, w, b, threshold, None if reference.KINDS[ctx.kind] == "jump" else output[0])
    ctx.forced = _registry.forced()
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None):
    x, w, b, threshold, acts = ctx.saved_tensors
    grad_acts, grad_penalty, grad_l0, _ = grads
    dtype = _counts_dtype(x.dtype)
    grad_penalty = x.new_zeros(len(x), dtype=dtype) if grad_penalty is None else grad_penalty
    grad_l0 = x.new_zeros(len(x), dtype=dtype) if grad_l0 is None else grad_l0
    arguments = (x, w, b, threshold, acts, ctx.kind, ctx.bandwidth, grad_acts, grad_penalty, grad_l0)
    need_x = ctx.needs_input_grad[0]
    with _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
        traced = is_traced(*(t for t in arguments if isinstance(t, Tensor)))
        call = torch.ops.vaecirc_fast.threshold_encode_backward if traced else _BackwardFunction.apply
        grad_x, grad_w, grad_b, grad_threshold = call(*arguments, need_x)
    return grad_x if need_x else None, grad_w, None if b is None else grad_b, grad_threshold, None, None


def _vmap(call: Any, info: Any, in_dims: tuple, *arguments: Any):
    x, w, b, threshold, kind, bandwidth = arguments
    if any(dim is not None for dim in in_dims[1:4]):
        raise InputError("threshold_encode: under vmap only x can be batched; call it once for each weight")
    acts, penalty, l0, fired = call(x.movedim(in_dims[0], 0).flatten(0, 1), w, b, threshold, kind, bandwidth)
    each = acts.unflatten(0, (info.batch_size, -1))
    fired = (each > 0).sum(1, dtype=torch.int32)
    return (each, penalty.view(info.batch_size, -1), l0.view(info.batch_size, -1), fired), (0, 0, 0, 0)


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return _vmap(_Function.apply, info, in_dims, *arguments)


class _BackwardFunction(torch.autograd.Function):
    """The gradient as a function of its own, so that it too can be transformed; it has no second derivative."""

    forward = staticmethod(_run_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return one_by_one(_BackwardFunction.apply, info, in_dims, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        raise NotImplementedError("threshold_encode has no second derivative")


LIBRARY.define(
    "threshold_encode(Tensor x, Tensor w, Tensor? b, Tensor threshold, int kind, float bandwidth) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "threshold_encode_backward(Tensor x, Tensor w, Tensor? b, Tensor threshold, Tensor? acts, int kind, "
    "float bandwidth, Tensor? grad_acts, Tensor grad_penalty, Tensor grad_l0, bool need_x) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("threshold_encode", _run, "CompositeExplicitAutograd")
LIBRARY.impl("threshold_encode_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::threshold_encode", lib=LIBRARY)
def _fake(x, w, b, threshold, kind, bandwidth):
    row = x.new_empty(x.shape[0], dtype=_counts_dtype(x.dtype))
    fired = x.new_empty(w.shape[0], dtype=torch.int32)
    return x.new_empty(x.shape[0], w.shape[0]), row, torch.empty_like(row), fired


@torch.library.register_fake("vaecirc_fast::threshold_encode_backward", lib=LIBRARY)
def _fake_backward(x, w, b, threshold, acts, kind, bandwidth, grad_acts, grad_penalty, grad_l0, need_x):
    latents = x.new_empty(w.shape[0])
    return x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape), latents, torch.empty_like(latents)


torch.library.register_autograd("vaecirc_fast::threshold_encode", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_vmap(
    "vaecirc_fast::threshold_encode", partial(_vmap, torch.ops.vaecirc_fast.threshold_encode), lib=LIBRARY
)


def _counts_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(rows: int, latents: int) -> list[slice]:
    size = max(256, TILE_BYTES // (4 * latents))  # with fewer rows the product would read the weights too often
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _cpp_forward(x: Tensor, w: Tensor, b: Tensor | None, threshold: Tensor, kind: int):
    b, threshold = None if b is None else b.contiguous(), threshold.contiguous()
    (rows, _), latents = x.shape, w.shape[0]
    acts = torch.empty(rows, latents)
    penalty, l0, fired = torch.empty(rows), torch.empty(rows), torch.zeros(latents, dtype=torch.int32)
    for tile in _tiles(rows, latents):
        pre = linear(x[tile], w)
        _native.cpp().threshold_encode(
            *(pre.data_ptr(), acts[tile].data_ptr(), len(pre), latents, _native.address(b), threshold.data_ptr(), kind),
            *(penalty[tile].data_ptr(), l0[tile].data_ptr(), fired.data_ptr(), _native.threads(pre.numel())),
        )
    return acts, penalty, l0, fired


def _cpp_backward(x, w, b, threshold, acts, kind, bandwidth, grad_acts, grad_penalty, grad_l0, need_x):
    b, threshold = None if b is None else b.contiguous(), threshold.contiguous()
    acts, grad_acts = (None if t is None else t.contiguous() for t in (acts, grad_acts))
    grad_penalty, grad_l0 = grad_penalty.contiguous(), grad_l0.contiguous()
    (rows, _), latents = x.shape, w.shape[0]
    grad_x, grad_w = torch.empty(x.shape if need_x else 0), torch.zeros(w.shape)
    grad_b, grad_threshold = torch.zeros(latents), torch.zeros(latents)
    for tile in _tiles(rows, latents):
        pre = linear(x[tile], w) if acts is None else torch.empty(tile.stop - tile.start, latents)
        _native.cpp().threshold_encode_backward(
            *(pre.data_ptr(), 0 if acts is None else acts[tile].data_ptr(), len(pre), latents, _native.address(b)),
            *(threshold.data_ptr(), kind, bandwidth),
            *(_native.address(None if grad_acts is None else grad_acts[tile]), grad_penalty[tile].data_ptr()),
            *(grad_l0[tile].data_ptr(), grad_b.data_ptr(), grad_threshold.data_ptr(), _native.threads(pre.numel())),
        )
        if need_x:
            grad_x[tile] = linear(pre, w.T)
        grad_w += linear(pre.T, x[tile].T)
    return grad_x, grad_w, grad_b, grad_threshold


def _load_reference():
    return {"threshold_encode": reference.forward, "threshold_encode_backward": reference.backward}


def _load_cpp():
    return {"threshold_encode": _cpp_forward, "threshold_encode_backward": _cpp_backward}


def _load_triton():
    from ..triton_kernels import threshold_encode as kernels  # pyright: ignore[reportMissingImports]

    # On a GPU the gradient's products are the library's, and what is left reads and writes once.
    return {"threshold_encode": kernels.forward, "threshold_encode_backward": reference.backward}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "threshold_encode",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float32,), _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS[:3], _registry.triton_reason),
        "cuda": _registry.Absent("is not written: the product is the work, and Triton reaches the tensor cores"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
