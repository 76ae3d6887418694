"""A tiny data set for the training tests: a disc at 8 x 8 places in 3 sizes, rendered on the fly."""

import torch

from vaecirc_fast.data.dataset import Dataset


class Blobs(Dataset):
    """192 images (1, side, side), 1 inside the disc and 0 outside."""

    name = "blobs"
    factor_names = ("x", "y", "radius")
    factor_sizes = (8, 8, 3)

    def __init__(self, side: int = 16):
        super().__init__()
        self.shape = (1, side, side)

    def _render(self, indices):
        x, y, radius = (self._unravel(indices).float()[:, k, None, None] for k in range(3))
        pixel = (torch.arange(self.shape[1]) + 0.5) / self.shape[1]
        distance = (pixel[None, None, :] - (x + 0.5) / 8) ** 2 + (pixel[None, :, None] - (y + 0.5) / 8) ** 2
        return (distance < (0.1 + 0.08 * radius) ** 2).float()[:, None]
