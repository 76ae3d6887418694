"""The studies: each reads like its protocol, a configuration and a few steps."""

from . import image

__all__ = ["image"]
