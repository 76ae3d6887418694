"""Interventions on any module: sites, input manipulation, latent sweeps."""

from .codes import Codes, code_sweep
from .edges import DirectEdges, direct_edges
from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .interactions import Interactions, latent_interactions
from .latents import latent_sweep, posterior_scale
from .sites import Wrapped, wrap

__all__ = [
    "Codes",
    "DirectEdges",
    "Effects",
    "InputEffects",
    "Interactions",
    "Wrapped",
    "code_sweep",
    "direct_edges",
    "factor_pairs",
    "input_effects",
    "latent_interactions",
    "latent_sweep",
    "mask_region",
    "noise_region",
    "posterior_scale",
    "redraw_columns",
    "wrap",
]
