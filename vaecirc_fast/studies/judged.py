"""The images that models are judged on: drawn and rendered once a data set, the same for every model."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import metrics
from ..data import Dataset
from ..metrics.reconstruction import Likelihood

RECONSTRUCTED = 2_000  # of the judged images: decoding is dearer than encoding, and the ratio needs no more
_CHUNK = 250


@dataclass(frozen=True)
class Judged:
    """Images x (N, C, H, W) with factors v (N, K); `references` by loss: what the mean image and a perfect
    reconstruction of the first `RECONSTRUCTED` images lose, (n,) each."""

    x: Tensor
    v: Tensor
    references: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def labelled(self) -> bool:
        """Whether any factor varies."""
        return bool(self.v.shape[1]) and bool((self.v != self.v[0]).any())

    @property
    def reconstructed(self) -> Tensor:
        """The images that reconstruction is judged on."""
        return self.x[:RECONSTRUCTED]

    def losses(self, kind: Likelihood) -> tuple[Tensor, Tensor]:
        """Loss of the mean image and of a perfect reconstruction, for "bernoulli" or "squared_error"."""
        if kind not in self.references:
            x = self.reconstructed
            mean = x.double().mean(0)
            parts = [
                (metrics.mean_image_loss(part, mean, kind), metrics.loss_floor(part, kind)) for part in x.split(_CHUNK)
            ]
            constant, floor = (torch.cat(column) for column in zip(*parts, strict=True))
            self.references[kind] = constant, floor
        return self.references[kind]


# The last one of a data set only: 10,000 colour images are half a gigabyte.
_KEPT: MutableMapping[Dataset, tuple[tuple[int, int], Judged]] = weakref.WeakKeyDictionary()


def judged_images(ds: Dataset, images: int, seed: int) -> Judged:
    """`images` images of `ds` drawn by `seed`, all in a drawn order where it has no more; kept for the next model."""
    kept = _KEPT.get(ds)
    if kept is None or kept[0] != (images, seed):
        _KEPT.clear()
        generator = torch.Generator().manual_seed(seed)
        if len(ds) <= images:
            order = torch.randperm(len(ds), generator=generator)
            x, v = ds.images(order), ds.factors(order)
        else:
            x, v = ds.sample(images, generator)
        kept = (images, seed), Judged(x, v)
        _KEPT[ds] = kept
    return kept[1]


def forget_images() -> None:
    """Let the kept images go."""
    _KEPT.clear()
