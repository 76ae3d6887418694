"""Interventions on any module: sites, input manipulation, latent sweeps."""

from .codes import Codes, code_sweep
from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .interactions import Interactions, latent_interactions
from .latents import latent_sweep, posterior_scale
from .linearised import Linearised, linearised
from .sites import Wrapped, wrap
from .strength import effect_strength

__all__ = [
    "Codes",
    "Effects",
    "InputEffects",
    "Interactions",
    "Linearised",
    "Wrapped",
    "code_sweep",
    "effect_strength",
    "factor_pairs",
    "input_effects",
    "latent_interactions",
    "latent_sweep",
    "linearised",
    "mask_region",
    "noise_region",
    "posterior_scale",
    "redraw_columns",
    "wrap",
]
