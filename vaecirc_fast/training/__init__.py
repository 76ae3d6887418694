"""Training of the image models: `fit`, exact to the bit when resumed, and the `Run` it returns."""

from .loop import Run, fit

__all__ = ["Run", "fit"]
