"""Metrics: arrays in, numbers out. They import neither models nor training."""

from . import statistics
from .activity import active_units, posterior_scale_from
from .battery import battery
from .causal import ces, model_ces, model_specificity, specificity
from .dci import Dci, DisentanglementCompleteness, dci, disentanglement_completeness
from .effect_matrix import EffectDisentanglement, effect_disentanglement
from .encoded import Encoded, encode_grid
from .explicitness import Explicitness, explicitness
from .factor_vae import BetaVaeScore, FactorVaeScore, beta_vae_score, factor_vae_score
from .gaussian import gaussian_total_correlation, wasserstein_correlation
from .graph import CircuitGraph, CircuitModularity, circuit_graph, circuit_modularity
from .information import Modularity, mean_pairwise_mi, modularity
from .irs import Irs, irs
from .mig import Mig, mig
from .reconstruction import (
    ReconstructionReport,
    loss_floor,
    mean_image_loss,
    reconstruction_loss,
    reconstruction_report,
)
from .recovery import GraphRecovery, edge_auroc, graph_recovery, reachable, structural_hamming_distance
from .sap import Sap, sap
from .score import Score
from .statistics import Estimate
from .udr import Udr, udr
from .units import assignment, isolation, polysemanticity

__all__ = [
    "BetaVaeScore",
    "CircuitGraph",
    "CircuitModularity",
    "Dci",
    "DisentanglementCompleteness",
    "EffectDisentanglement",
    "Encoded",
    "Estimate",
    "Explicitness",
    "FactorVaeScore",
    "GraphRecovery",
    "Irs",
    "Mig",
    "Modularity",
    "ReconstructionReport",
    "Sap",
    "Score",
    "Udr",
    "active_units",
    "assignment",
    "battery",
    "beta_vae_score",
    "ces",
    "circuit_graph",
    "circuit_modularity",
    "dci",
    "disentanglement_completeness",
    "edge_auroc",
    "effect_disentanglement",
    "encode_grid",
    "explicitness",
    "factor_vae_score",
    "gaussian_total_correlation",
    "graph_recovery",
    "irs",
    "isolation",
    "loss_floor",
    "mean_image_loss",
    "mean_pairwise_mi",
    "mig",
    "model_ces",
    "model_specificity",
    "modularity",
    "polysemanticity",
    "posterior_scale_from",
    "reachable",
    "reconstruction_loss",
    "reconstruction_report",
    "sap",
    "specificity",
    "statistics",
    "structural_hamming_distance",
    "udr",
    "wasserstein_correlation",
]
