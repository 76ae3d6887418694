"""What every op shares: the torch.library namespace, and when a call must pass through autograd or a transform."""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("vaecirc_fast", "DEF")


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether a kernel can be called at once: eager, no gradient wanted, no vmap or other transform around."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
