"""The result of a patch sweep: effects of single units, with their intervals and their plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import MissingExtra
from ..metrics.statistics import resampled_intervals

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class PatchEffects:
    """Effects of patching single units, one at a time.

    tensor: (unit, group) mean over samples of the effect on the output, in the units of `effect`. table: site and
    number of each unit, in the same order. recovery: (unit,) 1 - d(patched, source) / d(base, source), means divided;
    None where there is no source run. replicates: (replicate, unit) Poisson bootstrap over samples of the effect on the
    whole output. plan: how it was computed.
    """

    tensor: Tensor
    sites: tuple[str, ...]
    units: tuple[int, ...]
    groups: tuple[str, ...]
    effect: str
    ablation: str
    samples: int
    group_weights: Tensor
    recovery: Tensor | None = None
    replicates: Tensor | None = field(default=None, repr=False)
    plan: str = field(default="", repr=False)
    dims: tuple[str, ...] = ("unit", "group")

    @property
    def coords(self) -> dict[str, list]:
        """Labels of the axes: (site, unit) pairs and group names."""
        return {"unit": list(zip(self.sites, self.units, strict=True)), "group": list(self.groups)}

    def whole(self) -> Tensor:
        """(unit,) effect on the whole output."""
        return self.tensor.double() @ self.group_weights.double()

    def to_dataframe(self, level: float = 0.95) -> pandas.DataFrame:
        """One row per unit: site, unit, effect on the whole output, low, high (bootstrap over samples), recovery."""
        import pandas

        values = self.whole().cpu().numpy()
        low = high = recovered = np.full(len(values), np.nan)
        if self.replicates is not None:
            low, high = resampled_intervals(values, self.replicates.numpy(), self.samples, level)
        if self.recovery is not None:
            recovered = self.recovery.cpu().numpy()
        columns = {"site": self.sites, "unit": self.units, "effect": values}
        return pandas.DataFrame(columns | {"low": low, "high": high, "recovery": recovered})

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The n units of greatest effect."""
        return self.to_dataframe().sort_values("effect", ascending=False, ignore_index=True).head(n)

    def to_xarray(self) -> Any:
        """The tensor as an xarray.DataArray over unit and group, with the coordinate `site`."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtra("to_xarray needs xarray: pip install 'vaecirc-fast[xarray]'") from error
        coords = {"site": ("unit", list(self.sites)), "number": ("unit", list(self.units)), "group": list(self.groups)}
        return xarray.DataArray(self.tensor.cpu().numpy(), dims=self.dims, coords=coords, name=self.effect)
