"""The one interface of every image data set: images and factors by index, on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError


class Dataset:
    """Images with ground-truth factors.

    Attributes: `name`; `shape` (C, H, W); `factor_names` and `factor_sizes` (K each); `complete`: whether every
    combination of factors occurs exactly once, so that factors determine the index; `likelihood` that suits the pixels,
    and `trials`, how many binary pixels a grey value is the mean of; `device` of what is returned; `takes_root`,
    whether it can be read from files; `contents`, a digest of the user's own files where the name alone does not say
    what the images are.
    A subclass gives `_render` and, where the factors are no full grid, `factors` and `__len__`.
    """

    name: str
    shape: tuple[int, int, int]
    factor_names: tuple[str, ...]
    factor_sizes: tuple[int, ...]
    complete: bool = True
    trials: int = 1
    likelihood: str = "bernoulli"
    takes_root: bool = True
    contents: str = ""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images of `indices` (B,): float32 (B, C, H, W) in [0, 1]."""
        return self._render(self._checked(indices))

    def factors(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Factor indices of `indices` (B,): int64 (B, K); the last factor varies fastest."""
        return self._unravel(self._checked(indices))

    def index_of(self, v: Tensor) -> Tensor:
        """Indices (B,) of the images with factors `v` (B, K); only where the factors determine the image."""
        if not self.complete:
            raise InputError(f"index_of: the factors of {self.name!r} do not determine the image")
        v = torch.as_tensor(v, device=self.device)
        if v.ndim != 2 or v.shape[1] != len(self.factor_sizes) or not _holds_integers(v):
            raise InputError(
                f"v: expected integers of shape (B, {len(self.factor_sizes)}) in the order "
                f"{', '.join(self.factor_names)}, got {v.dtype} {tuple(v.shape)}"
            )
        sizes = torch.tensor(self.factor_sizes, device=self.device)
        if bool(((v < 0) | (v >= sizes)).any()):
            raise InputError(f"v: factor indices must lie in [0, size) with sizes {self.factor_sizes}")
        strides = [math.prod(self.factor_sizes[k + 1 :]) for k in range(len(self.factor_sizes))]
        return (v.long() * torch.tensor(strides, device=self.device)).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` images drawn uniformly with replacement: x (n, C, H, W) float32 in [0, 1], factors v (n, K) int64."""
        if n < 1:
            raise InputError(f"n: expected at least 1 image, got {n}")
        device = generator.device if generator is not None else torch.device("cpu")
        indices = torch.randint(len(self), (n,), generator=generator, device=device).to(self.device)
        return self._render(indices), self.factors(indices)

    def _render(self, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def _unravel(self, indices: Tensor) -> Tensor:
        columns = []
        for size in reversed(self.factor_sizes):
            columns.append(indices % size)
            indices = indices // size
        return torch.stack(columns[::-1], 1)

    def _checked(self, indices: Tensor | Sequence[int]) -> Tensor:
        indices = torch.as_tensor(indices, device=self.device)
        if indices.ndim != 1 or not _holds_integers(indices):
            raise InputError(f"indices: expected integers of shape (B,), got {indices.dtype} {tuple(indices.shape)}")
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise InputError(f"indices: must lie in [0, {len(self)}) for {self.name!r}")
        return indices.long()


def _holds_integers(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
