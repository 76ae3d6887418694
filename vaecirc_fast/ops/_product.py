"""Matrix products on the CPU by oneDNN, which torch brings but gives few float32 products to: decision 007."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import is_traced


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (B, D), w (M, D), any strides -> x w', (B, M), new and contiguous. Rows do not depend on their neighbours."""
    if 0 in x.shape or 0 in w.shape:  # oneDNN refuses some of these
        return torch.mm(x, w.T)
    if x.dtype == torch.float32 and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
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
