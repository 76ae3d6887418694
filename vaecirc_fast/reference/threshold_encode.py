"""Reference of `threshold_encode`: a linear layer and a thresholding activation, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# The order is the numbering that the kernels use.
KINDS = ("relu", "soft", "jump")


def activation(pre: Tensor, threshold: Tensor, kind: int) -> Tensor:
    """relu: pre where pre > max(threshold, 0), else 0; jump: pre where pre > threshold, else 0; soft: sign(pre) times
    max(|pre| - threshold, 0). NaN stays NaN."""
    if KINDS[kind] == "soft":
        return torch.where(pre.abs() <= threshold, 0, pre - torch.copysign(threshold, pre))
    return torch.where(pre <= (threshold.clamp(min=0) if KINDS[kind] == "relu" else threshold), 0, pre)


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x (B, D), w (M, D), b (M,) or None -> x w' + b, (B, M)."""
    pre = x @ w.T
    return pre if b is None else pre + b


def forward(
    x: Tensor, w: Tensor, b: Tensor | None, threshold: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, D), w (M, D), b (M,) or None, threshold (M,) -> activations a (B, M), penalty sum |a| (B,), number of a
    that are not 0 (B,), and in how many rows each a is > 0, (M,) int32."""
    acts = activation(linear(x, w, b), threshold, kind)
    dtype = torch.float64 if acts.dtype == torch.float64 else torch.float32
    penalty = acts.abs().sum(1, dtype=dtype)
    return acts, penalty, (acts != 0).sum(1).to(dtype), (acts > 0).sum(0, dtype=torch.int32)


def backward(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    threshold: Tensor,
    acts: Tensor | None,
    kind: int,
    bandwidth: float,
    grad_acts: Tensor | None,
    grad_penalty: Tensor,
    grad_l0: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless needed), w, b and threshold, from those of activations (B, M), penalty and l0 (B,).

    jump: the straight-through estimates of Rajamanoharan et al. 2024 (arXiv 2407.14435): the step at the threshold has
    the derivative 1 / bandwidth within bandwidth / 2 of it; pre-activations are made again for that. The other kinds
    read their activations: relu, whose threshold is a constant, and soft need to know no more of what was before.
    """
    jump = KINDS[kind] == "jump"
    if jump:
        pre = linear(x, w, b)
        on, sign = ~(pre <= threshold) & (pre != 0), pre.sign()
    else:
        assert acts is not None
        on, sign = acts != 0, acts.sign()
    through = grad_penalty[:, None].to(sign.dtype) * sign
    through = through if grad_acts is None else through + grad_acts
    grad_pre = torch.where(on, through, 0)
    grad_threshold = torch.zeros_like(threshold)
    if KINDS[kind] == "soft":
        grad_threshold = -(grad_pre * sign).sum(0)
    if jump:
        near = ((pre - threshold) / bandwidth).abs() < 0.5
        step = threshold * through + grad_l0[:, None].to(sign.dtype)
        grad_threshold = -torch.where(near, step, 0).sum(0) / bandwidth
    grad_x = grad_pre @ w if need_x else x.new_empty(0)
    return grad_x, grad_pre.T @ x, grad_pre.sum(0), grad_threshold
