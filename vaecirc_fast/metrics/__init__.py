"""Metrics: arrays in, numbers out. They import neither models nor training."""

from . import statistics
from .activity import active_units, posterior_scale_from
from .causal import ces, model_ces, model_specificity, specificity
from .graph import CircuitGraph, CircuitModularity, circuit_graph, circuit_modularity
from .mig import Mig, mig
from .reconstruction import (
    ReconstructionReport,
    loss_floor,
    mean_image_loss,
    reconstruction_loss,
    reconstruction_report,
)
from .statistics import Estimate
from .units import assignment, isolation, polysemanticity

__all__ = [
    "CircuitGraph",
    "CircuitModularity",
    "Estimate",
    "Mig",
    "ReconstructionReport",
    "active_units",
    "assignment",
    "ces",
    "circuit_graph",
    "circuit_modularity",
    "isolation",
    "loss_floor",
    "mean_image_loss",
    "mig",
    "model_ces",
    "model_specificity",
    "polysemanticity",
    "posterior_scale_from",
    "reconstruction_loss",
    "reconstruction_report",
    "specificity",
    "statistics",
]
