"""The studies: each reads like its protocol, a configuration and a few steps."""

from . import image
from .causal_graphs import recover
from .controls import Controls, controls
from .examined import ModelMeasurement, Protocol, measure_model
from .recommendation import Recommendation, recommend
from .result_table import result_table

__all__ = [
    "Controls",
    "ModelMeasurement",
    "Protocol",
    "Recommendation",
    "controls",
    "image",
    "measure_model",
    "recommend",
    "recover",
    "result_table",
]
