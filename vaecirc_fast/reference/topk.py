"""Reference of `topk`: the k largest of each row by a stable sort, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def descending(a: Tensor) -> Tensor:
    """The order of each row (..., M), largest first: NaN above every number, -0.0 equal to 0.0, ties by index."""
    same = torch.where(a.isnan(), math.nan, a + 0)  # one NaN and one zero, also for sorts that compare bits
    return torch.sort(same, dim=-1, descending=True, stable=True).indices


def first(a: Tensor, order: Tensor, n: Tensor | int, size: int, by_value: bool) -> tuple[Tensor, Tensor]:
    """The first n <= size of each row's order: values (B, size) of a (B, M) and int32 indices, padded with zeros."""
    order = order[:, :size]
    kept = torch.arange(size, device=a.device) < n
    if not by_value:
        order = torch.where(kept, order, a.shape[1]).sort(1).values
    order = torch.where(kept, order, 0)
    return torch.where(kept, a.gather(1, order), 0), order.int()


def forward(a: Tensor, k: Tensor | None, k_max: int, by_value: bool) -> tuple[Tensor, Tensor]:
    """a (B, M) -> values and int32 indices (B, k_max), in order of index or by value; from entry k on zeros."""
    return first(a, descending(a), k_max if k is None else k, k_max, by_value)


def backward(grad: Tensor, indices: Tensor, k: Tensor | None, M: int) -> Tensor:
    """Gradient (B, M): grad (B, K) where its entry came from; entries from k on give nothing."""
    if k is not None:
        grad = torch.where(torch.arange(grad.shape[1], device=grad.device) < k, grad, 0)
    return grad.new_zeros(grad.shape[0], M).scatter_add(1, indices.long(), grad)
