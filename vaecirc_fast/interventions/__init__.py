"""Interventions on any module: sites, input manipulation, latent sweeps."""

from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .latents import latent_sweep, posterior_scale
from .sites import Wrapped, wrap

__all__ = ["Effects", "Wrapped", "latent_sweep", "posterior_scale", "wrap"]
