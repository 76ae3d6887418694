"""The studies: each reads like its protocol, a configuration and a few steps."""

from . import image
from .controls import Controls, controls

__all__ = ["Controls", "controls", "image"]
