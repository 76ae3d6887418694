"""Sites of a module: where one can look and intervene, by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import patching
from .attribution import Attribution, attribute
from .circuits import Circuit, Motifs
from .discovery import discover, motifs
from .edges import DirectEdges, direct_edges
from .mediation import Mediation, mediate
from .patch_effects import PatchEffects
from .patch_sweeps import ablate, patch_sweep
from .patching import Cache
from .paths import PathEffects, path_patch
from .selection import matching_sites
from .streams import patch_sweep_over

if TYPE_CHECKING:
    import pandas


def wrap(module: nn.Module, example: Any = None) -> Wrapped:
    """A view of any module by its sites. `example`: an input to trace shapes with; our models bring their own.

    Of a compiled module the sites are those of the module that was compiled, which runs as it was written.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    return Wrapped(getattr(module, "_orig_mod", module), example)


class Wrapped:
    """A module seen by its sites; it changes nothing in the module."""

    def __init__(self, module: nn.Module, example: Any = None):
        self.module = module
        self._example = example

    def sites(self, pattern: str = "*", example: Any = None) -> pandas.DataFrame:
        """The sites whose path matches the shell-style `pattern`, in the order in which they run.

        Columns: site (dotted path); type; shape (of the output without the batch axis); units (its channels or
        features: the size of the first axis after the batch); downstream_flops (operations of the rest of the forward
        pass after the site, for one row, as torch's FLOP counter has them: matrix products and convolutions). Shapes
        need an example input,
        given here or to `wrap`; without one they are missing. InputError if nothing matches.
        """
        import pandas

        found = matching_sites(self.module, pattern)
        traced = self._trace(example)
        order = [name for name in traced if name in found] + [name for name in found if name not in traced]
        modules = dict(self.module.named_modules())
        lines = []
        for name in order:
            shape, flops = traced.get(name, (None, None))
            units = None if not shape else shape[0]
            lines.append((name, type(modules[name]).__name__, shape, units, flops))
        table = pandas.DataFrame(lines, columns=["site", "type", "shape", "units", "downstream_flops"])
        return table.astype({"units": "Int64", "downstream_flops": "Int64"})

    def run_with_cache(self, x: Any, sites: Sequence[str] = ("*",)) -> tuple[Any, Cache]:
        """The output for x and the activations at the sites; see `interventions.run_with_cache`."""
        return patching.run_with_cache(self.module, x, sites)

    def run_with_hooks(self, x: Any, hooks: Mapping[str, Callable[[Tensor], Tensor]]) -> Any:
        """The output where each site's activation passes through its hook; see `interventions.run_with_hooks`."""
        return patching.run_with_hooks(self.module, x, hooks)

    def patch(self, x_base: Any, patches: Mapping[str, Any], *, reference: Any = None, seed: int = 0) -> Any:
        """The output with the chosen units of all these sites patched jointly; see `interventions.patch`."""
        return patching.patch(self.module, x_base, patches, reference=reference, seed=seed)

    def patch_sweep(
        self, x_base: Any = None, x_source: Any = None, sites: Sequence[str] = ("*",), **options: Any
    ) -> PatchEffects:
        """The effect of patching every unit of every site by itself; see `interventions.patch_sweep`."""
        return patch_sweep(self.module, x_base, x_source, sites, **options)

    def patch_sweep_over(self, pairs: Iterable[Any], sites: Sequence[str] = ("*",), **options: Any) -> PatchEffects:
        """`patch_sweep` over batches of any data set, resumable; see `interventions.patch_sweep_over`."""
        return patch_sweep_over(self.module, pairs, sites, **options)

    def ablate(self, x: Any, sites: Sequence[str] = ("*",), **options: Any) -> PatchEffects:
        """The effect of ablating every unit of every site by itself; see `interventions.ablate`."""
        return ablate(self.module, x, sites, **options)

    def attribute(self, x_base: Any, x_source: Any, sites: Sequence[str] = ("*",), **options: Any) -> Attribution:
        """The effect of every unit to first order, by one backward pass; see `interventions.attribute`."""
        return attribute(self.module, x_base, x_source, sites, **options)

    def mediate(
        self, x_base: Any, x_source: Any, mediators: str | Sequence[str], outcome: Any = "output.mean", **options: Any
    ) -> Mediation:
        """How much of the change from x_base to x_source passes through units; see `interventions.mediate`."""
        return mediate(self.module, x_base, x_source, mediators, outcome, **options)

    def path_patch(self, x_base: Any, x_source: Any, path: str, **options: Any) -> PathEffects:
        """What the change does along a path of sites alone; see `interventions.path_patch`."""
        return path_patch(self.module, x_base, x_source, path, **options)

    def direct_edges(self, x_base: Any, x_source: Any, parent: str, child: str, **options: Any) -> DirectEdges:
        """Direct effects of every unit of a layer on every unit of the next; see `interventions.direct_edges`."""
        return direct_edges(self.module, x_base, x_source, parent, child, **options)

    def discover(self, x_base: Any, x_source: Any, target: Any = None, **options: Any) -> Circuit:
        """The few units whose joint patch recovers the change from x_base to x_source; see `interventions.discover`."""
        return discover(self.module, x_base, x_source, target, **options)

    def motifs(self, x_base: Any, variants: Mapping[str, Any], target: Any = None, **options: Any) -> Motifs:
        """The circuit of each factor; see `interventions.motifs`."""
        return motifs(self.module, x_base, variants, target, **options)

    def _trace(self, example: Any) -> dict[str, tuple[tuple[int, ...] | None, int]]:
        """Shape and downstream FLOPs of each site that a forward pass on the example reaches, in order of execution."""
        from torch.utils.flop_counter import FlopCounterMode

        example = self._example if example is None else example
        if example is None and hasattr(self.module, "example_input"):
            example = self.module.example_input()  # pyright: ignore[reportCallIssue]
        if example is None:
            return {}
        seen: dict[str, tuple[tuple[int, ...] | None, int]] = {}
        counter = FlopCounterMode(display=False)

        def record(name: str):
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
                seen.setdefault(name, (shape, counter.get_total_flops()))

            return hook

        handles = [m.register_forward_hook(record(name)) for name, m in self.module.named_modules() if name]
        was_training = [m for m in self.module.modules() if m.training]
        try:
            self.module.eval()
            with torch.no_grad(), patching.as_written(), counter:
                self.module(*example if isinstance(example, tuple) else (example,))
        finally:
            for handle in handles:
                handle.remove()
            for m in was_training:
                m.training = True
        rows = (example[0] if isinstance(example, tuple) else example).shape[0]
        total = counter.get_total_flops()
        return {name: (shape, (total - flops) // max(rows, 1)) for name, (shape, flops) in seen.items()}
