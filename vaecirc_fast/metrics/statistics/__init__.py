"""Statistics over samples, seeds and runs: every result says what was resampled, how many, and by which method.

`estimate`: estimates and verdicts; `resampling`: the Poisson bootstrap over samples; `seeds`: intervals over few seeds
and seeds needed; `comparisons`: two groups; `effect_sizes`; `families`: Holm-Sidak; `correlations`, and `exchange`: the
runs they permute; `mixed`: slopes over data sets; `agreement`: of the latents of two models.
"""

from .agreement import latent_agreement, matched_latents
from .comparisons import Equivalence, equivalence, permutation_test, welch
from .correlations import PartialCorrelation, partial_correlation, pearson, spearman
from .effect_sizes import cliffs_delta, cohens_d, hedges_g
from .estimate import FEW, Estimate, Inference, Verdict, verdict
from .families import family, holm_sidak
from .mixed import MixedSlope, mixed_slope
from .resampling import (
    bootstrap,
    percentile_interval,
    poisson_weights,
    resampled_interval,
    resampled_intervals,
    resampling_weights,
)
from .seeds import hierarchical_interval, prediction_interval, seeds_needed, seeds_table, t_interval

__all__ = [
    "FEW",
    "Equivalence",
    "Estimate",
    "MixedSlope",
    "PartialCorrelation",
    "Inference",
    "Verdict",
    "bootstrap",
    "cliffs_delta",
    "cohens_d",
    "equivalence",
    "family",
    "hedges_g",
    "hierarchical_interval",
    "holm_sidak",
    "latent_agreement",
    "matched_latents",
    "mixed_slope",
    "partial_correlation",
    "pearson",
    "percentile_interval",
    "permutation_test",
    "poisson_weights",
    "prediction_interval",
    "resampled_interval",
    "resampled_intervals",
    "resampling_weights",
    "seeds_needed",
    "seeds_table",
    "spearman",
    "t_interval",
    "verdict",
    "welch",
]
