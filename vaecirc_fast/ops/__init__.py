"""The ops: one file each, with its checks, its schema, its gradient and its table of kernels."""

from .boosted_importance import boosted_importance
from .direct_edges import direct_edges
from .effect_reduction import effect_reduction
from .histogram_mi import histogram_mi
from .latent_sweep import latent_sweep
from .patch_mix import patch_mix
from .render_scene import render_scene
from .render_sprites import render_sprites
from .sparse_adam import sparse_adam
from .sparse_decode import sparse_decode
from .tc_logsumexp import tc_logsumexp
from .threshold_encode import threshold_encode
from .topk import topk
from .topk_encode import topk_encode
from .vq_assign import vq_assign

__all__ = [
    "boosted_importance",
    "direct_edges",
    "effect_reduction",
    "histogram_mi",
    "latent_sweep",
    "patch_mix",
    "render_scene",
    "render_sprites",
    "sparse_adam",
    "sparse_decode",
    "tc_logsumexp",
    "threshold_encode",
    "topk",
    "topk_encode",
    "vq_assign",
]
