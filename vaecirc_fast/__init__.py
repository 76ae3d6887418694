"""vaecirc_fast: fused kernels and the whole measuring stack for causal interpretability of generative models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import errors, groups, ops
from ._registry import backend, backends

if TYPE_CHECKING:
    from . import compat, data, interventions, metrics, models, nn, planted, report, studies, sweeps, training
    from .compat import accelerate
    from .interventions import code_sweep, latent_sweep, posterior_scale, wrap

__all__ = [
    "accelerate",
    "backend",
    "backends",
    "code_sweep",
    "compat",
    "data",
    "errors",
    "groups",
    "interventions",
    "latent_sweep",
    "metrics",
    "models",
    "nn",
    "ops",
    "planted",
    "posterior_scale",
    "report",
    "studies",
    "sweeps",
    "training",
    "wrap",
]
__version__ = "0.1.0"

# Loaded when first used, so that `import vaecirc_fast` stays as quick as torch itself.
_MODULES = frozenset(
    {"compat", "data", "interventions", "metrics", "models", "nn", "planted", "report", "studies", "sweeps", "training"}
)
_FUNCTIONS = {name: "interventions" for name in ("code_sweep", "latent_sweep", "posterior_scale", "wrap")} | {
    "accelerate": "compat"
}


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_FUNCTIONS])
