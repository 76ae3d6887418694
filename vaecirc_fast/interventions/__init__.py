"""Interventions on any module: sites, input manipulation, latent sweeps, activation patching."""

from .codes import Codes, code_sweep
from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .interactions import Interactions, latent_interactions
from .latents import latent_sweep, posterior_scale
from .patch_sweeps import PatchEffects, ablate, patch_sweep
from .patching import Cache, patch, run_with_cache, run_with_hooks
from .sites import Wrapped, wrap

__all__ = [
    "Cache",
    "Codes",
    "Effects",
    "InputEffects",
    "Interactions",
    "PatchEffects",
    "Wrapped",
    "ablate",
    "code_sweep",
    "factor_pairs",
    "input_effects",
    "latent_interactions",
    "latent_sweep",
    "mask_region",
    "noise_region",
    "patch",
    "patch_sweep",
    "posterior_scale",
    "redraw_columns",
    "run_with_cache",
    "run_with_hooks",
    "wrap",
]
