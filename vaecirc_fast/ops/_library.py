"""What every op shares: the torch.library namespace, and when a call must pass through it, autograd or a transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("vaecirc_fast", "DEF")


def is_traced(*tensors: Tensor) -> bool:
    """Whether something watches which ops are called, so that a call must be the registered op: torch.compile, any
    dispatch mode (make_fx, fake tensors, a flop counter), or a subclass of Tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors)


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether a kernel can be called at once: eager, no gradient wanted, no vmap or other transform around."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def one_by_one(call: Callable, info: Any, in_dims: tuple, *arguments: Any):
    """A loop over the batch of vmap: weights of their own share no product."""
    results = []
    for v in range(info.batch_size):
        pairs = zip(arguments, in_dims, strict=True)
        results.append(call(*(a if dim is None else a.select(dim, v) for a, dim in pairs)))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
