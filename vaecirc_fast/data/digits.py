"""Digits: the 1,797 real 8x8 scans of handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .dataset import Dataset


class Digits(Dataset):
    """Handwritten digits (Alpaydin and Kaynak 1998, the test part of the UCI set): grey values 0...16, divided by 16.

    A value counts the set pixels of a 4x4 block of the original 32x32 bitmap, hence 16 trials a pixel.

    The one factor is the digit. Many scans share it, so `index_of` is refused.
    """

    name = "digits"
    shape = (1, 8, 8)
    factor_names = ("digit",)
    factor_sizes = (10,)
    complete = False
    likelihood = "bernoulli"
    trials = 16
    takes_root = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is not None:
            raise InputError("digits ships with scikit-learn and takes no root")
        from sklearn.datasets import load_digits  # a second of import time that only this data set pays

        images, digits = load_digits(return_X_y=True)
        self._images = torch.tensor(images / 16, dtype=torch.float32, device=self.device).view(-1, *self.shape)
        self._digits = torch.tensor(digits, dtype=torch.int64, device=self.device).view(-1, 1)

    def __len__(self) -> int:
        return len(self._images)

    def _render(self, indices: Tensor) -> Tensor:
        return self._images[indices]

    def _unravel(self, indices: Tensor) -> Tensor:
        return self._digits[indices]
