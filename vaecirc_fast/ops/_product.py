"""Matrix products on the CPU by oneDNN, which torch brings but gives few float32 products to: decision 007."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (B, D), w (M, D), any strides -> x w', (B, M), new and contiguous. Rows do not depend on their neighbours."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.T)
