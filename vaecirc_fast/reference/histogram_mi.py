"""Reference of `histogram_mi`: joint histograms of binned codes and factors, entropies and mutual information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cut(codes: Tensor, edges: Tensor) -> Tensor:
    """codes (N, L), edges (L, bins) float64, the left ones -> bin of each code, (L, N) int32."""
    return (torch.searchsorted(edges, codes.T.double().contiguous(), right=True) - 1).int()


def entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of counts (cells, R): (R,) float64. Exactly 0 where at most one cell has any."""
    total = counts.sum(0).clamp(min=1).double()
    spread = total.log() - torch.special.xlogy(counts.double(), counts.double()).sum(0) / total
    return torch.where((counts > 0).sum(0) > 1, spread, 0.0)


def forward(
    binned: Tensor, levels: Tensor, bins: int, sizes: Sequence[int], weights: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """binned (N, L) in [0, bins), levels (N, K) in [0, sizes[k]), weights (R, N) or None for R = 1 of ones.

    Returns, in nats and float64: I(code; level) (R, L, K), H(code) (R, L), H(level) (R, K) and I(code; code) (R, L, L),
    without rows unless `pairs`. I(a; b) = H(a) + H(b) - H(a, b), at least 0.
    """
    binned, levels = binned.long(), levels.long()
    (N, L), K = binned.shape, len(sizes)
    repeated = binned.new_ones(N, 1) if weights is None else weights.T.long()
    R = repeated.shape[1]

    def count(cell: Tensor, cells: int) -> Tensor:
        return cell.new_zeros(cells, R).index_add_(0, cell, repeated)

    of_codes = [entropy(count(binned[:, i], bins)) for i in range(L)]
    of_levels = [entropy(count(levels[:, k], sizes[k])) for k in range(K)]

    def information(a: Tensor, b: Tensor, size: int, of_a: Tensor, of_b: Tensor) -> Tensor:
        shared = (of_a + of_b - entropy(count(a * size + b, bins * size))).clamp(min=0)
        return torch.where((of_a == 0) | (of_b == 0), 0.0, shared)

    with_levels = torch.empty(R, L, K, dtype=torch.float64, device=binned.device)
    for i in range(L):
        for k in range(K):
            with_levels[:, i, k] = information(binned[:, i], levels[:, k], sizes[k], of_codes[i], of_levels[k])
    between = torch.empty(R, L if pairs else 0, L, dtype=torch.float64, device=binned.device)
    for i in range(L if pairs else 0):
        between[:, i, i] = of_codes[i]
        for j in range(i):
            shared = information(binned[:, i], binned[:, j], bins, of_codes[i], of_codes[j])
            between[:, i, j] = between[:, j, i] = shared
    return with_levels, torch.stack(of_codes, 1), torch.stack(of_levels, 1), between
