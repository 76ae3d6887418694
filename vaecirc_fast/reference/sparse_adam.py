"""Reference of `sparse_adam`: a step of Adam on a matrix whose gradient is given by sparse codes, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sparse_decode import accumulate, working


def forward(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor,
    indices: Tensor,
    g: Tensor,
    offsets: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    bias: Tensor | None,
    bias_exp_avg: Tensor | None,
    bias_exp_avg_sq: Tensor | None,
) -> None:
    """Step number `step`, from 1, of param (M, D) with gradient sum value * g[row], and of bias (M,) with sum value.

    Changes param, bias and their moments, as torch.optim.Adam does (decoupled: AdamW).
    """

    def update(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> None:
        p, m, v = working(param), working(exp_avg), working(exp_avg_sq)
        if weight_decay:
            if decoupled:
                p = p * (1 - lr * weight_decay)
            else:
                grad = grad + weight_decay * p
        m = torch.lerp(m, grad, 1 - beta1)
        v = v * beta2 + (1 - beta2) * grad * grad
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        param.copy_(p - lr / (1 - beta1**step) * m / denominator)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)

    grad, totals = accumulate(working(values), indices, working(g), len(param), offsets)
    update(param, exp_avg, exp_avg_sq, grad)
    if bias is not None:
        assert bias_exp_avg is not None and bias_exp_avg_sq is not None
        update(bias, bias_exp_avg, bias_exp_avg_sq, totals)
