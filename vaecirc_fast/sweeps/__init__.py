"""Many runs: the store they live in and the engines that work through them."""

from .local import run_all
from .store import RunDirectory, RunStore

__all__ = ["RunDirectory", "RunStore", "run_all"]
