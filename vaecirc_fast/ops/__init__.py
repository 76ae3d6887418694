"""The ops: one file each, with its checks, its schema, its gradient and its table of kernels."""

from .effect_reduction import effect_reduction
from .render_sprites import render_sprites
from .topk import topk
from .topk_encode import topk_encode

__all__ = ["effect_reduction", "render_sprites", "topk", "topk_encode"]
