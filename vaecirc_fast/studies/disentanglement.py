"""The disentanglement metrics of one image model: all of the battery, with the untrained and the permuted control."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import metrics
from ..data import Dataset
from ..metrics import Encoded
from ..metrics.battery import METRICS
from ..metrics.statistics import prediction_interval
from .control_models import unit_wise_order
from .measuring import PERMUTATIONS, plain
from .subjects import slot_numbers, subject_of

ON = ("samples", "grid", "none")  # what a study may ask for
DEAR = ("dci", "sap", "beta_vae_score", "explicitness")  # metrics that fit something
FEW_PERMUTATIONS, MANY_IMAGES = 2, 2_000  # of those, on more images than that
NEED_VARIANCE = tuple(METRICS["active_units"].definitions)
GRID_BATCH = 64  # images a call, by which a CPU's activations stay in its cache
UNMOVED = ("active_units",)  # which no permutation of a latent's codes changes

_LOCATELLO = "Locatello et al. 2019 (arXiv 1811.12359)"
_RIDGEWAY = "Ridgeway and Mozer 2018 (arXiv 1802.05312)"
SOURCES = {
    "active_units": "this project, after Burda et al. 2016 (arXiv 1509.00519)",
    "mig": "Chen et al. 2018 (arXiv 1802.04942)",
    "dci": "Eastwood and Williams 2018",
    "sap": "Kumar, Sattigeri and Balakrishnan 2018",
    "factor_vae_score": "Kim and Mnih 2018 (arXiv 1802.05983)",
    "beta_vae_score": "Higgins et al. 2017",
    "modularity": _RIDGEWAY,
    "explicitness": _RIDGEWAY,
    "irs": "Suter et al. 2019 (arXiv 1811.00007)",
    **dict.fromkeys(
        (
            "gaussian_total_correlation",
            "wasserstein_correlation",
            "wasserstein_correlation_normalised",
            "mean_pairwise_mi",
        ),
        _LOCATELLO,
    ),
}


@dataclass(frozen=True)
class Disentanglement:
    """`found`, as the result of a run keeps it: `trained`, `untrained` and `permuted`, metric -> {value, low, high,
    resampled, n, ...}; `definitions`, metric -> {unit, definition, source}; `left_out`, metric -> why; `unmoved`, the
    metrics that have no permuted control; `images`, `whole_grid`: what all are of. `seconds`: what it took.
    """

    found: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Tabled:
    """The battery on some codes: `rows`, and `left_out`, metric -> why."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]


def tabled(encoded: Encoded, seed: int) -> Tabled:
    """The battery on the codes of a model, which `disentanglement` takes for the untrained ones."""
    rows, left_out = _battery(encoded, seed)
    if encoded.logvar is None:
        rows = [row for row in rows if row["metric"] not in NEED_VARIANCE]
        left_out |= dict.fromkeys(NEED_VARIANCE, "these codes have no posterior variance to compare with")
    return Tabled(rows, left_out)


def disentanglement(trained: Encoded, untrained: Encoded | Tabled | None, seed: int) -> Disentanglement:
    """The battery on the codes of a model and of its untrained twin, if it has one, and on the model's codes permuted
    unit-wise: each latent over the images by itself.

    Images without labels have the metrics that need none. Intervals are over images or votes, within the run; those of
    the permuted codes are the ones in which one more permutation falls.
    """
    began = time.perf_counter()
    tables, left_out = {}, {}
    for name, codes in (("untrained", untrained), ("trained", trained)):
        table = tabled(codes, seed) if isinstance(codes, Encoded) else codes or Tabled([], {})
        tables[name] = table.rows
        left_out |= table.left_out
    found = {name: {row["metric"]: _entry(row) for row in tables[name]} for name in ("trained", "untrained")}
    units = {row["metric"]: row["unit"] for rows in tables.values() for row in rows}
    definitions = {
        name: {"unit": units.get(name, ""), "definition": text, "source": SOURCES[key]}
        for key, metric in METRICS.items()
        for name, text in metric.definitions.items()
        if trained.labelled is not None or not metric.labels
    }
    return Disentanglement(
        {
            **found,
            "permuted": _permuted(trained, seed, left_out),
            "definitions": definitions,
            "left_out": left_out,
            "unmoved": [name for key in UNMOVED for name in METRICS[key].definitions],
            "images": len(trained.codes),
            "whole_grid": trained.complete,
        },
        time.perf_counter() - began,
    )


def encoded_grid(model: Any, ds: Dataset, progress: bool) -> Encoded:
    """The codes of every image of the data set; of slots of codes, one number each (see `subjects.slot_numbers`)."""
    subject = subject_of(model)
    if subject.codebook is None:
        return metrics.encode_grid(subject.module, ds, batch=GRID_BATCH, progress=progress)
    found = metrics.encode_grid(_Indices(subject.module), ds, batch=GRID_BATCH, progress=progress)
    numbers, _ = slot_numbers(torch.from_numpy(found.codes).long(), subject.codebook.cpu())
    return replace(found, codes=numbers.numpy())


class _Indices(nn.Module):
    """A model of quantised codes that encodes to their numbers in the codebook."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.model.encode(x).indices.float(), None


def _battery(encoded: Encoded, seed: int, **options: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows, and why the metrics that are missing are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "battery: left out")  # the reasons are kept
        table = metrics.battery(None, None, encoded=encoded, seed=seed, progress=False, **options)
    labelled = encoded.labelled is not None
    left_out = {key: why for key, why in table.attrs["left_out"].items() if labelled or not METRICS[key].labels}
    return table.to_dict("records"), {name: why for key, why in left_out.items() for name in METRICS[key].definitions}


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    # what holds for all metrics, or is the study's choice, is said once
    notes = [note for note in row["note"].split("; ") if note and not note.startswith(("no interval:", "on "))]
    entry = {key: row[key] for key in ("value", "low", "high", "resampled", "n")}
    dropped = [name for name in row["dropped"].split(", ") if name]
    return plain(entry) | {"dropped": dropped, "notes": notes}


def _permuted(encoded: Encoded, seed: int, left_out: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Each metric on permuted codes: the mean over permutations, fewer of the metrics that fit something."""
    codes = torch.from_numpy(encoded.codes)
    drawn: dict[str, list[float]] = {}
    for k in range(PERMUTATIONS):
        moved = replace(encoded, codes=codes.gather(0, unit_wise_order(codes, seed + k)).numpy())
        wanted = _wanted(encoded, left_out, dear=k < FEW_PERMUTATIONS or len(codes) <= MANY_IMAGES)
        rows, _ = _battery(moved, seed, replicates=0, only=wanted) if wanted else ([], {})
        for row in rows:
            drawn.setdefault(row["metric"], []).append(row["value"])
    return {
        name: plain({"value": e.value, "low": e.low, "high": e.high, "resampled": "permutations", "n": e.n})
        for name, values in drawn.items()
        if all(map(math.isfinite, values))
        for e in [prediction_interval(values, resampled="permutations")]
    }


def _wanted(encoded: Encoded, left_out: dict[str, str], dear: bool) -> Sequence[str]:
    """The metrics to permute for: those that could be had at all."""
    return [
        key
        for key, metric in METRICS.items()
        if key not in UNMOVED
        and (dear or key not in DEAR)
        and not metric.definitions.keys() & left_out.keys()
        and (encoded.labelled is not None or not metric.labels)
    ]
