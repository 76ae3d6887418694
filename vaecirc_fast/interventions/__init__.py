"""Interventions on any module: sites, input manipulation, latent sweeps."""

from .codes import Codes, code_sweep
from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .interactions import Interactions, latent_interactions
from .latents import latent_sweep, posterior_scale
from .mediation import Mediation, mediate
from .paths import PathEffects, path_patch
from .sites import Wrapped, wrap

__all__ = [
    "Codes",
    "Effects",
    "InputEffects",
    "Interactions",
    "Mediation",
    "PathEffects",
    "Wrapped",
    "code_sweep",
    "factor_pairs",
    "input_effects",
    "latent_interactions",
    "latent_sweep",
    "mask_region",
    "mediate",
    "noise_region",
    "path_patch",
    "posterior_scale",
    "redraw_columns",
    "wrap",
]
