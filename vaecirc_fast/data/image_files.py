"""Reading image files: upright, in colour, 8 bits a channel, and an error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(file: Path, fit: Callable[[Image], Image], data: str, remedy: str) -> np.ndarray:
    """`fit` of the image, upright and in RGB: uint8 (H, W, 3). InputError of the data set `data` if it is damaged."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I" and image.format == "PNG":
                # 16 bits: `convert` would clip them at 255
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            elif upright.mode in ("I", "F"):
                raise ValueError("32 bits a pixel, whose range is unknown")
            return np.asarray(fit(upright.convert("RGB")))
    except Exception as error:  # on damaged files the decoders raise anything, struct.error among others
        raise InputError(f"{data}: {file} is not a readable image ({error}); {remedy}") from error


def centred_square(image: Image, side: int) -> Image:
    """The largest centred square, resized."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
