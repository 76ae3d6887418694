"""Reference of `sparse_decode`: sums of a matrix's rows weighted by sparse codes, and their gradients, in plain torch.

Rows of entries: values and indices are (B, K), or with offsets (B + 1,) both are (N,) and row b has the entries
[offsets[b], offsets[b + 1]). An entry of value 0 adds nothing, even where what it multiplies is not finite; nor does
one whose index is not in [0, M).
"""

from __future__ import annotations

import torch
from torch import Tensor


def working(x: Tensor) -> Tensor:
    """x in the precision that is computed in: float32 for 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """The row of each entry, (N,)."""
    if offsets is None:
        rows = torch.arange(indices.shape[0], device=indices.device)
        return rows[:, None].expand_as(indices).flatten()
    rows = torch.arange(len(offsets) - 1, device=indices.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=indices.numel())


def _latents(indices: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """The latent of each entry, (N,), and whether there is such a one."""
    flat = indices.flatten().long()
    return flat.clamp(0, latents - 1), (flat >= 0) & (flat < latents)


def forward(
    values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None, offsets: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = b_dec + sum over a row's entries of value * w_dec[index]: (B, D), and sum (y - target)^2: (B,), or empty."""
    at, known = _latents(indices, len(w_dec))
    weights = working(values).flatten()[:, None]
    terms = torch.where(known[:, None] & (weights != 0), weights * working(w_dec)[at], 0)
    rows = indices.shape[0] if offsets is None else len(offsets) - 1
    y = terms.new_zeros(rows, w_dec.shape[1]) if b_dec is None else working(b_dec).repeat(rows, 1)
    y = y.index_add(0, _rows(indices, offsets), terms).to(values.dtype)
    if target is None:
        return y, y.new_empty(0)
    return y, (working(y) - working(target)).square().sum(1).to(y.dtype)


def grad_values(indices: Tensor, w: Tensor, g: Tensor, offsets: Tensor | None) -> Tensor:
    """For each entry w[index] . g[row], w (M, D), g (B, D); of the shape of indices."""
    at, known = _latents(indices, len(w))
    products = (working(w)[at] * working(g)[_rows(indices, offsets)]).sum(1)
    return torch.where(known, products, 0).to(g.dtype).view(indices.shape)


def accumulate(values: Tensor, indices: Tensor, g: Tensor, M: int, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each latent the sum over its entries of value * g[row]: (M, D), and of the values alone: (M,)."""
    at, known = _latents(indices, M)
    weights = torch.where(known, working(values).flatten(), 0)
    g = working(g)
    terms = torch.where(weights[:, None] != 0, weights[:, None] * g[_rows(indices, offsets)], 0)
    sums = g.new_zeros(M, g.shape[1]).index_add(0, at, terms)
    return sums.to(values.dtype), weights.new_zeros(M).index_add(0, at, weights).to(values.dtype)
