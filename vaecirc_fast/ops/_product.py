"""Matrix products on the CPU by oneDNN, which torch brings but gives few float32 products to: decision 007."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._library import is_traced


@functools.cache
def _onednn() -> Callable | None:
    """oneDNN's linear(x, w, bias, activation, ...) where torch has it and it is what we take it for."""
    try:
        call = torch.ops.mkldnn._linear_pointwise
        x, w = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3)
        return call if torch.equal(call(x, w, None, "none", [], ""), x @ w.T) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (B, D), w (M, D), any strides -> x w', (B, M), new and contiguous. Rows do not depend on their neighbours."""
    if x.dtype == torch.float32 and x.numel() and w.numel():  # oneDNN refuses some empty ones
        call = _onednn() if torch.backends.mkldnn.enabled else None  # pyright: ignore[reportAttributeAccessIssue]
        if call is not None:
            return call(x, w, None, "none", [], "")
    return torch.mm(x, w.T)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return linear(a, b.T)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        a, b = ctx.saved_tensors
        grad_a = linear(grads[0], b) if ctx.needs_input_grad[0] else None
        return grad_a, linear(a.T, grads[0].T) if ctx.needs_input_grad[1] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., K), b (K, D) -> a b, with a gradient; the same product for both."""
    if a.device.type != "cpu" or is_traced(a, b) or torch._C._are_functorch_transforms_active():
        return a @ b
    rows = a.reshape(-1, a.shape[-1])
    return _Product.apply(rows, b).view(*a.shape[:-1], b.shape[1])
