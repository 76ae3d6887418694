"""Reference of `vq_assign`: nearest codes, and what a moving average of the codebook needs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """z (N, D), codebook (K, D) -> (N,) int64, the lowest k of least |e_k|^2 / 2 - z . e_k.

    That is |z - e_k|^2 / 2 without |z|^2 / 2, which is the same for every code. A code whose number is NaN is nearest
    to nothing; code 0 is the answer for a row that is not finite, and where no code is nearest.
    """
    scores = codebook.square().sum(1) / 2 - z @ codebook.T
    scores = torch.where(scores.isnan() | ~z.isfinite().all(1)[:, None], torch.inf, scores)
    codes = torch.arange(len(codebook), device=z.device)
    return torch.where(scores == scores.amin(1, keepdim=True), codes, len(codebook)).amin(1)


def totals(z: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Of z (N, D) with codes (N,): how many rows each code has (K,) int64, and their sum (K, D)."""
    counts = torch.zeros(K, dtype=torch.int64, device=z.device).scatter_add_(0, indices, torch.ones_like(indices))
    return counts, z.new_zeros(K, z.shape[1]).index_add_(0, indices, z)


def forward(z: Tensor, codebook: Tensor, with_totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z (N, D), codebook (K, D) -> z_q (N, D), indices (N,) int64, distances (N,), counts (K,) int64, sums (K, D).

    distance[n] = |z_n - z_q_n|^2. Without totals the last two are empty.
    """
    indices = nearest(z, codebook)
    z_q = codebook[indices]
    counts, sums = totals(z, indices, len(codebook)) if with_totals else (indices.new_empty(0), z.new_empty(0))
    return z_q, indices, (z - z_q).square().sum(1), counts, sums
