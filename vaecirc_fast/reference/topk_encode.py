"""Reference of `topk_encode`: linear map, activation and the k largest, of each row or of all rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import topk

# The order is the numbering that the kernels use.
ACTIVATIONS = ("relu", "identity")
ENTRIES = 1 << 20  # numbers gathered at once by the gradient


def activations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, activation: int) -> Tensor:
    """x (B, D), w_enc (M, D), b_enc (M,) -> act(x @ w_enc.T + b_enc) (B, M): of 16-bit products as float32."""
    pre = x @ w_enc.T
    if x.dtype in (torch.bfloat16, torch.float16):
        pre = pre.float()
    if b_enc is not None:
        pre = pre + b_enc.to(pre.dtype)
    return torch.relu(pre) if ACTIVATIONS[activation] == "relu" else pre


def forward(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: Tensor | None,
    k_max: int,
    activation: int,
    count: bool,
    dead: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and indices (B, k_max); fired (M,) if asked to count; aux values and indices (B, k_aux) among the dead."""
    act = activations(x, w_enc, b_enc, activation)
    order = topk.descending(act)
    values, indices = topk.first(act, order, k_max if k is None else k, k_max, False)
    fired = torch.empty(0, dtype=torch.int32, device=x.device)
    if count:
        fired = torch.zeros(act.shape[1], dtype=torch.int32, device=x.device)
        fired = fired.index_add(0, indices.flatten(), (values > 0).flatten().int())
    if dead is None:
        aux_values, aux_indices = act.new_empty(act.shape[0], 0), indices.new_empty(act.shape[0], 0)
    else:
        # The dead first, among them the order as it was.
        order = order.gather(1, torch.sort((~dead)[order].byte(), dim=1, stable=True).indices)
        aux_values, aux_indices = topk.first(act, order, dead.sum().clamp(max=k_aux), k_aux, False)
    return values.to(x.dtype), indices, fired, aux_values.to(x.dtype), aux_indices


def batch(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k B largest of all rows: values and indices (k B,), row by row in order of index, and offsets (B + 1,)."""
    act = activations(x, w_enc, b_enc, activation)
    rows, M = act.shape
    flat = topk.descending(act.flatten())[: k * rows].sort().values
    counts = torch.zeros(rows, dtype=torch.int64, device=x.device).index_add(0, flat // M, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return act.flatten()[flat].to(x.dtype), (flat % M).int(), offsets


def backward(
    grad: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w_enc and b_enc from those of the values before the activation; no (B, M) and no (B, K, D).

    grad and indices (B, K), or with offsets (N,): entries of one row beside each other.
    """
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    rows = torch.arange(x.shape[0], device=x.device)
    if offsets is None:
        rows = rows.repeat_interleave(grad.shape[1])
    else:
        rows = rows.repeat_interleave(offsets.diff(), output_size=grad.shape[0])
    grad, indices = grad.flatten().to(dtype), indices.flatten().long()
    grad_x, grad_w = torch.zeros(x.shape, dtype=dtype, device=x.device), torch.zeros_like(w_enc, dtype=dtype)
    step = max(1, ENTRIES // max(1, x.shape[1]))
    for g, i, row in zip(grad.split(step), indices.split(step), rows.split(step), strict=True):
        grad_x = grad_x.index_add(0, row, g[:, None] * w_enc[i].to(dtype))
        grad_w = grad_w.index_add(0, i, g[:, None] * x[row].to(dtype))
    grad_b = torch.zeros(w_enc.shape[0], dtype=dtype, device=x.device).index_add(0, indices, grad)
    return grad_x.to(x.dtype), grad_w.to(w_enc.dtype), grad_b.to(x.dtype)
