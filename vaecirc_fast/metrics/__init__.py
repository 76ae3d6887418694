"""Metrics: arrays in, numbers out. They import neither models nor training."""

from . import statistics
from .activity import active_units, posterior_scale_from
from .causal import ces, model_ces, model_specificity, specificity
from .dci import Dci, DisentanglementCompleteness, dci, disentanglement_completeness
from .graph import CircuitGraph, CircuitModularity, circuit_graph, circuit_modularity
from .mig import Mig, mig
from .reconstruction import (
    ReconstructionReport,
    loss_floor,
    mean_image_loss,
    reconstruction_loss,
    reconstruction_report,
)
from .sap import Sap, sap
from .statistics import Estimate
from .units import assignment, isolation, polysemanticity

__all__ = [
    "CircuitGraph",
    "CircuitModularity",
    "Dci",
    "DisentanglementCompleteness",
    "Estimate",
    "Mig",
    "ReconstructionReport",
    "Sap",
    "active_units",
    "assignment",
    "ces",
    "circuit_graph",
    "circuit_modularity",
    "dci",
    "disentanglement_completeness",
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
    "sap",
    "specificity",
    "statistics",
]
