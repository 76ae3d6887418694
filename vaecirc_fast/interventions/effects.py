"""The result of a latent sweep: an effect tensor with named dimensions, its bootstrap replicates and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._tensor_files import read_tensors, write_tensors
from ..errors import MissingExtra
from ..metrics import causal
from .effect_tables import read_table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Effects:
    """Effects of do(z_i := ...) on groups of output elements.

    tensor: (latent, step, group) means over samples, or (sample, latent, step, group); `dims` names the axes, `coords`
    labels them. effect: which effect (its unit is that of the outputs; squared for mse). grid: which interventions.
    step_size: (latent, step) |step| that CES divides by, 0 where nothing was decoded; None where it divides by nothing.
    group_weights: (group,) weights by which groups average to the whole output; they sum to 1.
    replicates: (replicate, latent, group) Poisson-bootstrap replicates of the step-normalised effect, samples
    resampled;
    step_replicates: (replicate, latent, step) of the effect on the whole output. None where samples are kept.
    path: the file that the effects of every sample were written to, if one was.
    """

    tensor: Tensor
    dims: tuple[str, ...]
    coords: Mapping[str, list]
    effect: str
    grid: str
    samples: int
    group_weights: Tensor
    step_size: Tensor | None = None
    replicates: Tensor | None = None
    step_replicates: Tensor | None = None
    plan: str = field(default="", repr=False)
    path: str | None = None

    def mean(self) -> Tensor:
        """(latent, step, group) effects averaged over samples."""
        return self.tensor.mean(0) if self.dims[0] == "sample" else self.tensor

    def step_normalised(self) -> Tensor:
        """(..., latent, group): mean over steps of effect / |step|; of the effect itself where nothing is divided."""
        return causal.step_normalised(self.tensor, self.step_size)

    def ces(self, level: float = 0.95) -> pandas.DataFrame:
        """Causal effect strength per latent with its interval; see `vf.metrics.ces`."""
        return causal.ces(self, level)

    def specificity(self, level: float = 0.95) -> pandas.DataFrame:
        """Intervention specificity per latent over the groups, with its interval; see `vf.metrics.specificity`."""
        return causal.specificity(self, level)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per entry of the tensor, with a column per dimension and the column `effect`."""
        import pandas

        index = pandas.MultiIndex.from_product([self.coords[d] for d in self.dims], names=list(self.dims))
        return pandas.DataFrame({"effect": self.tensor.cpu().reshape(-1).numpy()}, index=index).reset_index()

    def to_xarray(self) -> Any:
        """The tensor as an xarray.DataArray with the same dimensions and labels."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        return xarray.DataArray(self.tensor.cpu().numpy(), dims=self.dims, coords=dict(self.coords), name=self.effect)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically."""
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        facts = {name: getattr(self, name) for name in ("dims", "coords", "effect", "grid", "samples", "plan", "path")}
        write_tensors(Path(path), "effects", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """Read what `save` wrote; InputError names a damaged or foreign file."""
        tensors, facts = read_tensors(Path(path), "effects", "delete it and measure again")
        facts["dims"] = tuple(facts["dims"])
        return cls(**tensors, **facts)

    @classmethod
    def from_table(cls, path: str | Path) -> Effects:
        """The effects of every sample, dims (sample, latent, step, group), from a file that a sweep wrote to `out`.

        To the bit those that `reduce=None` keeps in memory. InputError for a missing, damaged or foreign file, and for
        one larger than the memory that is free.
        """
        tensor, facts = read_table(path)
        dims = ("sample", *facts["dims"])
        sizes = facts["step_size"]
        return cls(
            tensor,
            dims,
            {"sample": list(range(facts["samples"])), **facts["coords"]},
            effect=facts["effect"],
            grid=facts["grid"],
            samples=facts["samples"],
            group_weights=torch.tensor(facts["group_weights"], dtype=torch.float64),
            step_size=None if sizes is None else torch.tensor(sizes, dtype=getattr(torch, facts["step_dtype"])),
            plan=facts["plan"],
            path=str(path),
        )


_TENSORS = ("tensor", "group_weights", "step_size", "replicates", "step_replicates")
