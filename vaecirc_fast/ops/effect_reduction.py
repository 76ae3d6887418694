"""Op `effect_reduction`: base and perturbed outputs -> effects on groups of output elements, in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..groups import Groups, whole
from ..reference import effect_reduction as reference
from ._library import LIBRARY, is_plain_call, is_traced


def effect_reduction(
    base: Tensor,
    perturbed: Tensor,
    effect: str | Sequence[str] = "l1",
    *,
    groups: Groups | None = None,
    link: str = "identity",
    reduce: str | None = None,
) -> Tensor:
    """Effects of I interventions on B outputs, per group of output elements.

    base: (B, ...) outputs without intervention, P elements a sample after flattening; perturbed: (B, I, ...) outputs
    under intervention. float32, bfloat16, float16 or float64, both alike, on one device.
    effect: one name or several of, with dy = perturbed - base over the n elements of a group: "l1" mean |dy|,
    "mse" mean dy^2, "rms" sqrt(mean dy^2), "tv" half of sum |dy| (total variation of two probability vectors),
    "signed" mean dy, "logit_mse" mean squared difference before the link.
    groups: the partition of P; all elements in one group by default.
    link: "identity", or "sigmoid" where the tensors hold logits: dy is then taken after the link, except for
    "logit_mse", which needs it.
    reduce: None, or "sum" over samples.

    Returns (B, I, G) for one effect, (B, I, E, G) for several, in the units of the outputs (mse: squared); without B if
    summed. float32 for inputs of 16 bits. Differentiable in base and perturbed; the gradient of "rms" at dy = 0 is 0.
    Deterministic for any number of threads. NaN in a group makes that group's effect NaN. InputError for wrong shapes,
    dtypes, devices or names.
    """
    names = (effect,) if isinstance(effect, str) else effect
    if not isinstance(names, Sequence) or any(name in names[:n] for n, name in enumerate(names)):
        raise InputError(f"effect: expected a name or a sequence of different names, got {effect!r}")
    for name in names:
        if name not in reference.KINDS:
            raise InputError(f"effect: {name!r} is unknown; known: {', '.join(reference.KINDS)}")
    if not names:
        raise InputError("effect: expected at least one name")
    if link not in reference.LINKS:
        raise InputError(f"link: {link!r} is unknown; known: {', '.join(reference.LINKS)}")
    if "logit_mse" in names and link == "identity":
        raise InputError(
            'effect: "logit_mse" is taken before the link, so pass logits with link="sigmoid" (or use "mse")'
        )
    if reduce not in (None, "sum"):
        raise InputError(f'reduce: expected None or "sum", got {reduce!r}')
    if groups is not None and not isinstance(groups, Groups):
        raise InputError(f"groups: expected Groups, as vf.groups.cells makes them, got {type(groups).__name__}")
    _check_outputs(base, perturbed)
    samples, interventions = perturbed.shape[:2]
    base, perturbed = base.reshape(samples, base[:1].numel() or perturbed.shape[2:].numel()), perturbed.flatten(2)
    elements = perturbed.shape[2]
    groups = (whole(elements) if groups is None else groups).to(base.device)
    if groups.labels.numel() != elements:
        raise InputError(f"groups: partition {groups.labels.numel()} elements, but an output has {elements}")

    kinds = [reference.KINDS.index(name) for name in names]
    arguments = (
        base,
        perturbed,
        groups.labels,
        groups.order,
        groups.offsets,
        kinds,
        reference.LINKS.index(link),
        reduce == "sum",
    )
    out = _forward(*arguments)
    return out.squeeze(-2) if isinstance(effect, str) else out


def _check_outputs(base: Tensor, perturbed: Tensor) -> None:
    if not isinstance(base, Tensor) or not isinstance(perturbed, Tensor):
        raise InputError(f"base, perturbed: expected tensors, got {type(base).__name__} and {type(perturbed).__name__}")
    if base.ndim < 2 or perturbed.ndim != base.ndim + 1 or perturbed.shape[:1] + perturbed.shape[2:] != base.shape:
        raise InputError(
            "perturbed: expected shape (B, I, ...) for base (B, ...), "
            f"got {tuple(perturbed.shape)} for {tuple(base.shape)}"
        )
    if base.shape[1:].numel() == 0:
        raise InputError(f"base: an output must have at least one element, got shape {tuple(base.shape)}")
    if base.dtype != perturbed.dtype or not base.dtype.is_floating_point:
        raise InputError(f"base, perturbed: expected one floating dtype, got {base.dtype} and {perturbed.dtype}")
    if base.device != perturbed.device:
        raise InputError(f"base, perturbed: expected one device, got {base.device} and {perturbed.device}")


def _forward(base: Tensor, perturbed: Tensor, *rest: Any) -> Tensor:
    if is_traced(base, perturbed):
        return torch.ops.vaecirc_fast.effect_reduction(base, perturbed, *rest)
    return (_run if is_plain_call(base, perturbed) else _Function.apply)(base, perturbed, *rest)


def _run(
    base: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: list[int],
    link: int,
    sum_samples: bool,
):
    kernel = ROW.function("effect_reduction", base)
    return kernel(base, perturbed, labels, order, offsets, kinds, link, sum_samples)


def _run_backward(
    base: Tensor, perturbed: Tensor, labels: Tensor, order: Tensor, offsets: Tensor, factors: Tensor, link: int
):
    kernel = ROW.function("effect_reduction_backward", base)
    return kernel(base, perturbed, labels, order, offsets, factors, link)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _out_shape(perturbed: Tensor, offsets: Tensor, kinds: Sequence[int], sum_samples: bool) -> tuple[int, ...]:
    shape = (perturbed.shape[0], perturbed.shape[1], len(kinds), offsets.shape[0] - 1)
    return shape[1:] if sum_samples else shape


def _factors(grad: Tensor, saved: tuple[Tensor, ...], kinds: Sequence[int], link: int, sum_samples: bool) -> Tensor:
    """What multiplies sign(dy), dy, 1 and the raw difference per group: (B or 1, I, 4, G)."""
    base, perturbed, labels, order, offsets = saved
    if sum_samples:
        grad = grad[None]
    per_element = grad / offsets.diff().to(grad.dtype)
    zero = torch.zeros_like(grad[:, :, 0])
    sign, linear, one, raw = zero, zero, zero, zero
    for e, kind in enumerate(kinds):
        match reference.KINDS[kind]:
            case "l1":
                sign = sign + per_element[:, :, e]
            case "tv":
                sign = sign + grad[:, :, e] / 2
            case "mse":
                linear = linear + 2 * per_element[:, :, e]
            case "rms":
                rms = _forward(base, perturbed, labels, order, offsets, [kind], link, False)[:, :, 0]
                linear = linear + torch.where(rms == 0, 0, per_element[:, :, e] / rms)
            case "signed":
                one = one + per_element[:, :, e]
            case "logit_mse":
                raw = raw + 2 * per_element[:, :, e]
    return torch.stack(torch.broadcast_tensors(sign, linear, one, raw), 2)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    base, perturbed, labels, order, offsets, ctx.kinds, ctx.link, ctx.sum_samples = inputs
    ctx.save_for_backward(base, perturbed, labels, order, offsets)
    ctx.forced = _registry.forced()


def _backward(ctx: Any, *grads: Tensor):
    (grad,) = grads
    saved = ctx.saved_tensors
    with _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
        factors = _factors(grad, saved, ctx.kinds, ctx.link, ctx.sum_samples)
        traced = is_traced(grad, *saved)
        call = torch.ops.vaecirc_fast.effect_reduction_backward if traced else _BackwardFunction.apply
        grad_base, grad_perturbed = call(*saved, factors, ctx.link)
    return grad_base, grad_perturbed, None, None, None, None, None, None


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(V, B, ...) as (V B, ...), whether or not the tensor is batched."""
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    return tensor.flatten(0, 1)


def _vmap(call: Callable, info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    base, perturbed, labels, order, offsets, kinds, link, sum_samples = arguments
    base, perturbed = _fold(base, in_dims[0], info.batch_size), _fold(perturbed, in_dims[1], info.batch_size)
    out = call(base, perturbed, labels, order, offsets, kinds, link, False)
    out = out.unflatten(0, (info.batch_size, out.shape[0] // info.batch_size))
    return (out.sum(1) if sum_samples else out), 0


def _vmap_backward(
    call: Callable, info: Any, in_dims: tuple, *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    base, perturbed, labels, order, offsets, factors, link = arguments
    samples = base.shape[0] if in_dims[0] is None else base.movedim(in_dims[0], 0).shape[1]
    base, perturbed = _fold(base, in_dims[0], info.batch_size), _fold(perturbed, in_dims[1], info.batch_size)
    factors = (
        factors.movedim(in_dims[5], 0) if in_dims[5] is not None else factors.expand(info.batch_size, *factors.shape)
    )
    factors = factors.expand(-1, samples, -1, -1, -1).flatten(0, 1)
    grads = call(base, perturbed, labels, order, offsets, factors, link)
    return tuple(grad.unflatten(0, (info.batch_size, samples)) for grad in grads), (0, 0)


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
        return _vmap_backward(_BackwardFunction.apply, info, in_dims, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise NotImplementedError(
            'effect_reduction has no second derivative; use vf.backend("reference") on its formula'
        )


LIBRARY.define(
    "effect_reduction(Tensor base, Tensor perturbed, Tensor labels, Tensor order, Tensor offsets, int[] kinds, "
    "int link, bool sum_samples) -> Tensor"
)
LIBRARY.define(
    "effect_reduction_backward(Tensor base, Tensor perturbed, Tensor labels, Tensor order, Tensor offsets, "
    "Tensor factors, int link) -> (Tensor, Tensor)"
)
LIBRARY.impl("effect_reduction", _run, "CompositeExplicitAutograd")
LIBRARY.impl("effect_reduction_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::effect_reduction", lib=LIBRARY)
def _fake(base, perturbed, labels, order, offsets, kinds, link, sum_samples):
    return perturbed.new_empty(_out_shape(perturbed, offsets, kinds, sum_samples), dtype=_result_dtype(perturbed.dtype))


@torch.library.register_fake("vaecirc_fast::effect_reduction_backward", lib=LIBRARY)
def _fake_backward(base, perturbed, labels, order, offsets, factors, link):
    return base.new_empty(base.shape), perturbed.new_empty(perturbed.shape)


torch.library.register_autograd("vaecirc_fast::effect_reduction", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_vmap(
    "vaecirc_fast::effect_reduction", partial(_vmap, torch.ops.vaecirc_fast.effect_reduction), lib=LIBRARY
)
torch.library.register_vmap(
    "vaecirc_fast::effect_reduction_backward",
    partial(_vmap_backward, torch.ops.vaecirc_fast.effect_reduction_backward),
    lib=LIBRARY,
)


def _cpp_forward(
    base: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    sum_samples: bool,
) -> Tensor:
    base, perturbed = base.contiguous(), perturbed.contiguous()
    samples, interventions, elements = perturbed.shape
    out = torch.empty(_out_shape(perturbed, offsets, kinds, sum_samples), dtype=_result_dtype(base.dtype))
    _native.cpp().effect_reduction(
        *(base.data_ptr(), perturbed.data_ptr(), labels.data_ptr(), _native.DTYPES[base.dtype], link),
        *(samples, interventions, elements, offsets.numel() - 1, kinds, sum_samples, out.data_ptr()),
        _native.threads(perturbed.numel()),
    )
    return out


def _cpp_backward(
    base: Tensor, perturbed: Tensor, labels: Tensor, order: Tensor, offsets: Tensor, factors: Tensor, link: int
) -> tuple[Tensor, Tensor]:
    base, perturbed, factors = (
        base.contiguous(),
        perturbed.contiguous(),
        factors.to(_result_dtype(base.dtype)).contiguous(),
    )
    samples, interventions, elements = perturbed.shape
    groups = offsets.numel() - 1
    grad_base, grad_perturbed = torch.empty_like(base), torch.empty_like(perturbed)
    _native.cpp().effect_reduction_backward(
        *(base.data_ptr(), perturbed.data_ptr(), labels.data_ptr(), _native.DTYPES[base.dtype], link),
        *(
            samples,
            interventions,
            elements,
            groups,
            factors.data_ptr(),
            interventions * 4 * groups if factors.shape[0] > 1 else 0,
        ),
        *(grad_base.data_ptr(), grad_perturbed.data_ptr(), _native.threads(perturbed.numel())),
    )
    return grad_base, grad_perturbed


def _cuda_forward(
    base: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    sum_samples: bool,
) -> Tensor:
    base, perturbed = base.contiguous(), perturbed.contiguous()
    samples, interventions, elements = perturbed.shape
    groups = offsets.numel() - 1
    # Blocks of samples are summed apart: how many follows from the shapes alone, so results do not depend on the GPU.
    outer = min(samples, max(8, 1024 // max(interventions, 1))) if sum_samples else samples
    shape = (outer, interventions, len(kinds), groups)
    out = torch.empty(shape, dtype=_result_dtype(base.dtype), device=base.device)
    if out.numel():
        _native.cuda().effect_reduction(
            *(base.data_ptr(), perturbed.data_ptr(), order.data_ptr(), offsets.data_ptr()),
            *(_native.DTYPES[base.dtype], link, samples, interventions, elements, groups, order.numel()),
            *(kinds, sum_samples, outer, out.data_ptr(), *_native.cuda_place(base)),
        )
    return out.sum(0) if sum_samples else out


def _cuda_backward(
    base: Tensor, perturbed: Tensor, labels: Tensor, order: Tensor, offsets: Tensor, factors: Tensor, link: int
) -> tuple[Tensor, Tensor]:
    base, perturbed = base.contiguous(), perturbed.contiguous()
    factors = factors.to(_result_dtype(base.dtype)).contiguous()
    samples, interventions, elements = perturbed.shape
    groups = offsets.numel() - 1
    grad_perturbed = torch.empty_like(perturbed)
    if perturbed.numel() == 0:
        return torch.zeros_like(base), grad_perturbed
    # Few threads, each with many interventions, would leave most of the GPU idle.
    parts = max(1, min(-(-interventions // 4), (1 << 18) // base.numel()))
    grad_base = (
        torch.empty_like(base)
        if parts == 1
        else torch.empty(parts, samples, elements, dtype=factors.dtype, device=base.device)
    )
    _native.cuda().effect_reduction_backward(
        *(base.data_ptr(), perturbed.data_ptr(), labels.data_ptr(), _native.DTYPES[base.dtype], link),
        *(samples, interventions, elements, groups, factors.data_ptr()),
        *(interventions * 4 * groups if factors.shape[0] > 1 else 0, grad_perturbed.data_ptr()),
        *(parts, grad_base.data_ptr(), *_native.cuda_place(base)),
    )
    return (grad_base if parts == 1 else grad_base.sum(0).to(base.dtype)), grad_perturbed


def _load_reference():
    return {"effect_reduction": reference.forward, "effect_reduction_backward": reference.backward}


def _load_cpp():
    return {"effect_reduction": _cpp_forward, "effect_reduction_backward": _cpp_backward}


def _load_cuda():
    return {"effect_reduction": _cuda_forward, "effect_reduction_backward": _cuda_backward}


def _load_triton():
    from ..triton_kernels import effect_reduction as kernels  # pyright: ignore[reportMissingImports]

    return {"effect_reduction": kernels.forward, "effect_reduction_backward": kernels.backward}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = _registry.Row(
    "effect_reduction",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(
            _load_cpp, ("cpu",), (torch.float32, torch.bfloat16, torch.float64), _registry.cpp_reason
        ),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS, _registry.triton_reason),
        "cuda": _registry.Kernel(_load_cuda, ("cuda",), _FLOATS, _registry.cuda_reason),
    },
    # On CUDA the order is not measured yet. By the bytes they move, both are alike on regular partitions, and CUDA C++
    # should be ahead on scattered ones.
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")},
)
