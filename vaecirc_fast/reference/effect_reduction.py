"""Reference of `effect_reduction`: effects of perturbed outputs on groups of elements, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The order is the numbering that the kernels use.
KINDS = ("l1", "mse", "rms", "logit_mse", "tv", "signed")
LINKS = ("identity", "sigmoid")


def _linked(x: Tensor, link: int) -> Tensor:
    return torch.sigmoid(x) if LINKS[link] == "sigmoid" else x


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def forward(
    base: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    order: Tensor,
    offsets: Tensor,
    kinds: Sequence[int],
    link: int,
    sum_samples: bool,
) -> Tensor:
    """base (B, P), perturbed (B, I, P), labels (P,) -> (B, I, E, G), or (I, E, G) summed over samples.

    With dy = link(perturbed) - link(base) over the n elements of a group: l1 = sum |dy| / n, mse = sum dy^2 / n,
    rms = sqrt(mse), logit_mse = sum (perturbed - base)^2 / n, tv = sum |dy| / 2, signed = sum dy / n.
    """
    base, perturbed = _working(base), _working(perturbed)
    dy = _linked(perturbed, link) - _linked(base, link)[:, None]
    sizes = offsets.diff().to(dy.dtype)
    kept = order.long()
    group = labels.long()[kept]

    def total(values: Tensor) -> Tensor:
        out = values.new_zeros(*values.shape[:2], sizes.numel())
        return out.index_add(2, group, values[:, :, kept])

    effects = []
    for kind in kinds:
        match KINDS[kind]:
            case "l1":
                effects.append(total(dy.abs()) / sizes)
            case "mse":
                effects.append(total(dy.square()) / sizes)
            case "rms":
                effects.append((total(dy.square()) / sizes).sqrt())
            case "logit_mse":
                effects.append(total((perturbed - base[:, None]).square()) / sizes)
            case "tv":
                effects.append(total(dy.abs()) / 2)
            case "signed":
                effects.append(total(dy) / sizes)
    out = torch.stack(effects, 2)
    return out.sum(0) if sum_samples else out


def _product(factor: Tensor, value: Tensor | float) -> Tensor:
    return torch.where(factor == 0, 0, factor * value)


def backward(
    base: Tensor, perturbed: Tensor, labels: Tensor, order: Tensor, offsets: Tensor, factors: Tensor, link: int
) -> tuple[Tensor, Tensor]:
    """Gradients (B, P) and (B, I, P) from `factors` (B or 1, I, 4, G).

    The factors multiply, per group: sign(dy), dy, 1 (all three then through the link) and the raw difference. A factor
    of zero adds nothing, even where what it multiplies is NaN or infinite.
    """
    dtype = base.dtype
    base, perturbed = _working(base), _working(perturbed)
    y0, y = _linked(base, link)[:, None], _linked(perturbed, link)
    dy = y - y0
    padded = torch.cat([factors, factors.new_zeros(*factors.shape[:3], 1)], 3)
    per_element = padded[..., torch.where(labels < 0, factors.shape[3], labels).long()]
    sign, linear, one, raw = per_element.unbind(2)
    direction = torch.where(dy.isnan(), dy, dy.sign())
    through = _product(sign, direction) + _product(linear, dy) + one
    raw = _product(raw, perturbed - base[:, None])
    slope, slope0 = (y * (1 - y), y0 * (1 - y0)) if LINKS[link] == "sigmoid" else (1.0, 1.0)
    grad_perturbed = _product(through, slope) + raw
    grad_base = -(_product(through, slope0) + raw).sum(1)
    return grad_base.to(dtype), grad_perturbed.to(dtype)
