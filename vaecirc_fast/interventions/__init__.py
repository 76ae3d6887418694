"""Interventions on any module: sites, latent sweeps."""

from .effects import Effects
from .latents import latent_sweep, posterior_scale
from .sites import Wrapped, wrap

__all__ = ["Effects", "Wrapped", "latent_sweep", "posterior_scale", "wrap"]
