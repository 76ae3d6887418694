"""Faces-like: procedural portraits with ten attributes, a stand-in for CelebA where its files are not at hand."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from . import portrait
from .dataset import Dataset

# sRGB, 0 to 255.
_SKIN = ((245, 212, 190), (233, 188, 158), (211, 157, 117), (178, 122, 84), (134, 86, 58), (92, 58, 43))
_HAIR = ((30, 26, 30), (72, 46, 33), (124, 70, 38), (184, 88, 40), (224, 184, 112), (190, 190, 196))
_BACKGROUND = (
    (196, 110, 104),
    (202, 156, 92),
    (180, 184, 100),
    (112, 176, 112),
    (96, 180, 172),
    (98, 146, 200),
    (132, 118, 196),
    (186, 112, 178),
)
_LIGHT = (-1.0, -0.5, 0.0, 0.5, 1.0)  # where the light comes from, left to right
_FIXED = {
    "cloth": (66, 74, 98),
    "white": (255, 255, 255),
    "dark": (34, 24, 26),
    "iris": (86, 62, 46),
    "lens": (30, 32, 38),
}


class FacesLike(Dataset):
    """Portraits in colour, 64 x 64: 10,886,400 images, one for each combination of ten attributes.

    A stand-in that is drawn, not CelebA: its faces are stylised, its attributes exact and independent of each other.
    Geometry and colours: docs/definitions.md and decision 028. An image is a sum of the colours of a palette (by
    background, skin tone, hair colour and light) with weights from three tables (by all other attributes). Both are
    multiples of 1/256, or 1/128 where tables meet, so that every sum is exact in float32 and an image has the same
    bits in any batch and on any device. The tables are drawn once a process, in under a second, and take 54 MB.
    """

    name = "faces_like"
    shape = (3, portrait.SIDE, portrait.SIDE)
    factor_names = (
        "background_hue",
        "skin_tone",
        "hair_colour",
        "hair_style",
        "face_width",
        "yaw",
        "smile",
        "eyeglasses",
        "beard",
        "light",
    )
    factor_sizes = (
        len(_BACKGROUND),
        len(_SKIN),
        len(_HAIR),
        len(portrait.HAIR_STYLES),
        len(portrait.WIDTHS),
        len(portrait.YAWS),
        len(portrait.SMILES),
        len(portrait.EYEGLASSES),
        len(portrait.BEARDS),
        len(_LIGHT),
    )
    takes_root = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is not None:
            raise InputError("faces_like is drawn and takes no root; the photographs are the data set celeba")
        self._head, self._eyes, self._mouth = (t.to(self.device) for t in _tables())
        self._palettes = {
            names: tuple(c.to(self.device) for c in _palette(names))
            for names in (portrait.HEAD, portrait.EYES, portrait.MOUTH)
        }

    def _render(self, indices: Tensor) -> Tensor:
        x = torch.empty(len(indices), self.shape[0], portrait.SIDE**2, device=self.device)
        block = 32 if self.device.type == "cpu" else 1024  # weights gathered at a time: 7 MB stay in the cache
        for part, drawn in zip(indices.split(block), x.split(block), strict=True):
            self._draw(self._unravel(part), drawn)
        return x.view(-1, *self.shape)

    def _draw(self, v: Tensor, x: Tensor) -> None:
        """Into `x` (B, 3, pixels)."""
        hue, skin, hair, style, width, yaw, smile, glasses, beard, light = v.unbind(1)
        place = width * len(portrait.YAWS) + yaw
        places = math.prod(portrait.PLACES)

        def colours(names: tuple[str, ...]) -> Tensor:
            """(B, 3, colours of the table)."""
            by_skin, by_hair, by_hue = self._palettes[names]
            return by_skin[skin, light] + by_hair[hair, light] + by_hue[hue]

        torch.bmm(colours(portrait.HEAD), self._head.index_select(0, style * places + place), out=x)
        for names, table, state, rows in (
            (portrait.EYES, self._eyes, glasses, portrait.EYE_ROWS),
            (portrait.MOUTH, self._mouth, smile * len(portrait.BEARDS) + beard, portrait.MOUTH_ROWS),
        ):
            weights = table.index_select(0, state * places + place)
            part = x[:, :, rows[0] * portrait.SIDE : rows[1] * portrait.SIDE]
            part.mul_(weights[:, :1]).baddbmm_(colours(names), weights[:, 1:])
        x.clamp_(0, 1)


@functools.cache
def _tables() -> tuple[Tensor, ...]:
    """Head, eyes and mouth, each (states, planes, pixels) float32; drawn once a process."""
    head, eyes, mouth = portrait.head(), portrait.eyes(), portrait.mouth()
    for table in (head, eyes[..., 1:, :, :], mouth[..., 1:, :, :]):
        table.mul_(256).round_().div_(256)
    for table in (eyes[..., 0, :, :], mouth[..., 0, :, :]):  # these meet sums of products of two multiples of 1/256
        table.mul_(128).round_().div_(128)
    return tuple(t.reshape(-1, t.shape[-3], t.shape[-2] * t.shape[-1]) for t in (head, eyes, mouth))


@functools.cache
def _palette(names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The colours of a table as a sum: by skin tone and light (S, L, 3, J), by hair colour and light, by background."""
    light = torch.tensor(_LIGHT)[:, None]
    away = {"left": light.clamp(min=0), "right": (-light).clamp(min=0)}  # these sides lie in the dark
    skin, hair = torch.tensor(_SKIN)[:, None] / 255, torch.tensor(_HAIR)[:, None] / 255
    shadow, hair_dark = skin * torch.tensor([0.66, 0.52, 0.48]), hair * 0.55
    lip = 0.52 * skin + 0.40 * torch.tensor([0.78, 0.26, 0.28])
    of_skin = {"skin": skin, "shadow": shadow, "lip": lip, "lip_dark": lip * 0.62}
    of_skin |= {side: 0.85 * dark * (shadow * 0.8 - skin) for side, dark in away.items()}
    of_hair = {"hair": hair, "hair_dark": hair_dark}
    of_hair |= {f"hair_{side}": 0.8 * dark * (0.45 * hair - hair) for side, dark in away.items()}
    of_hue = {"background": torch.tensor(_BACKGROUND) / 255}
    of_hue |= {name: torch.tensor(colour).expand(len(_BACKGROUND), 3) / 255 for name, colour in _FIXED.items()}

    def stack(colours: dict[str, Tensor], *shape: int) -> Tensor:
        planes = [colours.get(name, torch.zeros(3)).expand(*shape, 3) for name in names]
        return torch.stack(planes, -1).mul(256).round().div(256)

    lights = len(_LIGHT)
    return stack(of_skin, len(_SKIN), lights), stack(of_hair, len(_HAIR), lights), stack(of_hue, len(_BACKGROUND))
