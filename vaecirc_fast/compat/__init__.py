"""Sparse autoencoders of other packages: `accelerate` makes them fast in place, and one module each reads their files.

`sae_lens`, `dictionary_learning`, `sparsify` and `openai` have `load(path)` and `save(path, weights)` between the files
of that package and `Weights`, which `to_module` and `from_module` link with `vaecirc_fast.nn`. None of the packages is
imported, or needed, for that.
"""

from . import dictionary_learning, openai, sae_lens, sparsify
from .accelerate import Report, accelerate
from .modules import from_module, to_module
from .weights import Weights

__all__ = [
    "Report",
    "Weights",
    "accelerate",
    "dictionary_learning",
    "from_module",
    "openai",
    "sae_lens",
    "sparsify",
    "to_module",
]
