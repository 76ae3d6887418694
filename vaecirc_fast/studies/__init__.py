"""The studies: each reads like its protocol, a configuration and a few steps."""

from . import image
from .controls import Controls, controls
from .examined import ModelMeasurement, Protocol, measure_model

__all__ = ["Controls", "ModelMeasurement", "Protocol", "controls", "image", "measure_model"]
