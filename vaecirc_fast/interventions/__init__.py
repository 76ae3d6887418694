"""Interventions on any module: sites, input manipulation, latent sweeps, activation patching, paths, mediation."""

from .attribution import Attribution, attribute
from .circuits import Circuit, Motifs
from .codes import Codes, code_sweep
from .discovery import discover, motifs
from .edges import DirectEdges, direct_edges
from .effects import Effects
from .inputs import InputEffects, factor_pairs, input_effects, mask_region, noise_region, redraw_columns
from .interactions import Interactions, latent_interactions
from .latents import latent_sweep, posterior_scale
from .linearised import Linearised, linearised
from .mediation import Mediation, mediate
from .patch_effects import PatchEffects
from .patch_sweeps import ablate, patch_sweep
from .patching import Cache, patch, run_with_cache, run_with_hooks
from .paths import PathEffects, path_patch
from .sites import Wrapped, wrap
from .streams import patch_sweep_over
from .strength import effect_strength

__all__ = [
    "Attribution",
    "Cache",
    "Circuit",
    "Codes",
    "DirectEdges",
    "Effects",
    "InputEffects",
    "Interactions",
    "Linearised",
    "Mediation",
    "Motifs",
    "PatchEffects",
    "PathEffects",
    "Wrapped",
    "ablate",
    "attribute",
    "code_sweep",
    "direct_edges",
    "discover",
    "effect_strength",
    "factor_pairs",
    "input_effects",
    "latent_interactions",
    "latent_sweep",
    "linearised",
    "mask_region",
    "mediate",
    "motifs",
    "noise_region",
    "patch",
    "patch_sweep",
    "patch_sweep_over",
    "path_patch",
    "posterior_scale",
    "redraw_columns",
    "run_with_cache",
    "run_with_hooks",
    "wrap",
]
