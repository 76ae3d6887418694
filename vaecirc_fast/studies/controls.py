"""Null and stability controls of a metric on a model, in one call: is it above chance, and does it stay put?"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import models, training
from ..data import Dataset
from ..errors import InputError
from ..metrics.statistics import (
    Estimate,
    equivalence,
    latent_agreement,
    matched_latents,
    prediction_interval,
    t_interval,
)
from ..sweeps import RunStore
from ..training.settings import checked_settings
from .control_metrics import Evaluation, Metric, Value, evaluation, named
from .control_models import half_frozen, of_constant_sigma, permuted, reinitialised

if TYPE_CHECKING:
    import pandas

NULLS = ("untrained", "permuted")
STABILITY = ("decoder retrained", "encoder retrained", "constant sigma")
TRAINED_RATIO = 0.5
_BOUNDS = ("", "_low", "_high")
COLUMNS = (
    *("control", "kind", "value", "low", "high"),
    *(f"difference{bound}" for bound in _BOUNDS),
    *("margin", "p", "verdict"),
    *(f"rank_correlation{bound}" for bound in _BOUNDS),
    *("n", "resampled", "note"),
)
MODEL_COLUMNS = (
    *("control", "seed", "value", "low", "high", "n", "resampled"),
    *("rank_correlation", "reconstruction"),
)
FIRST_SEED = 1_000_003  # far from the seeds that models are usually made with: a control must not start as they did


@dataclass(frozen=True)
class Controls:
    """What `controls` found. `result`: the metric on the model itself; `table`: a row a control; `models`: a row for
    each model that was compared; `left_out`: control -> why it says nothing of this metric."""

    metric: str
    result: Estimate
    table: pandas.DataFrame
    models: pandas.DataFrame
    left_out: dict[str, str]
    level: float = 0.95

    @property
    def passed(self) -> bool:
        """Whether every null was cleared and every stability control came out equivalent."""
        return set(self.table["verdict"][1:]) <= {"cleared", "equivalent"}

    def __str__(self) -> str:
        columns = ("control", "kind", "value", "difference", "margin", "verdict", "rank correlation", "n", "resampled")
        rows: list[tuple[str, ...]] = [columns]
        for row in self.table.to_dict("records"):
            numbers = (_bounded(row, "value"), _bounded(row, "difference"), _cell(row["margin"]), row["verdict"])
            agreement = _bounded(row, "rank_correlation")
            rows.append((row["control"], row["kind"], *numbers, agreement, str(row["n"]), row["resampled"]))
        widths = [max(len(row[c]) for row in rows) for c in range(len(columns))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes = [f"{row['control']}: {row['note']}" for row in self.table.to_dict("records") if row["note"]]
        notes += [f"{control}: left out, {why}" for control, why in self.left_out.items()]
        unit = f" in {self.result.unit}" if self.result.unit else ""
        notes.append(
            f"intervals at {100 * self.level:g} %, of a null where one more such model falls; of a difference at 90 %, "
            "for two one-sided tests against the margin"
        )
        return "\n".join([f"controls of {self.metric}{unit}", *lines, *notes])


def controls(
    model: Any,
    ds: Dataset,
    metric: str | Callable[..., Any],
    *,
    only: Sequence[str] = (),
    seeds: int = 3,
    nulls: int = 5,
    margin: float | None = None,
    side: str | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 1e-3,
    precision: str = "auto",
    images: int = 2000,
    sweep_images: int = 64,
    seed: int = 0,
    level: float = 0.95,
    out: str | Path | None = None,
    progress: bool = True,
) -> Controls:
    """Compare `metric` of `model` on `ds` with its null and its stability controls. The model is not changed.

    metric: "mig", "ces_raw", "ces_posterior", "ces_resample", "specificity", "reconstruction" or a score of
    `metrics.battery` that needs factors, on `images` images (all where there are fewer) and the first `sweep_images` of
    them for sweeps; or a function of (model, ds) that gives
    a number, an `Estimate`, or a pair of that and an array (L,) of values of the latents, for the rank correlation.

    *Null* controls, `nulls` models each: "untrained", the architecture drawn anew; "permuted", unit-wise permuted
    activations: the encoder's codes, each latent over the images by itself; for "specificity", which codes do not
    enter, the effects, in each image by itself over the latents. A strength (ces) has no such null. A null's interval
    is the one in which one more such model falls. It is "cleared" if the whole interval of the result lies on the
    better `side` of it: "above", or "below" where less is better ("reconstruction").
    *Stability* controls, `seeds` trainings each, of `steps` updates: "decoder retrained" from scratch against the
    frozen encoder, "encoder retrained" against the frozen decoder, and "constant sigma", the architecture trained from
    scratch with the posterior's sd of each latent held at sqrt(E_x[sigma_i^2]) of `model`. Two one-sided t tests over
    the trainings say whether the difference from the result is within `margin`, in the metric's unit (None: a tenth of
    the result): "equivalent", "different" or "undecided"; "not trained" where a model kept more than half of the
    reducible loss, though the given model did not: give it more `steps`. Take the steps, batch_size and lr that the
    model was trained with.
    only: the names of the controls to run; all five by default.

    out: a directory in which trainings are kept and resumed, whatever the metric; `progress`: lines on stderr.
    Nulls work on any module with encode, decode, encoder and decoder whose layers know `reset_parameters`; stability
    controls train, so they need one of `models.build`. InputError for what cannot be had, before anything is trained.
    """
    measured = named(metric)
    wanted, left_out = _wanted(measured, only)
    counts = {"seeds": seeds, "nulls": nulls, "images": images, "sweep_images": sweep_images}
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "precision": precision}
    _checked(model, ds, wanted, side, level, counts, settings | {"seed": seed})
    on = evaluation(ds, images, sweep_images, seed)
    kept = copy.deepcopy(model).eval()
    result = _measured(kept, ds, measured, on, "the model itself")
    if margin is None:
        margin = 0.1 * abs(result.estimate.value)
    needs_margin = any(control in STABILITY for control in wanted)
    if needs_margin and not (isinstance(margin, int | float) and 0 < margin < math.inf):
        raise InputError(f"margin: expected a positive number in the metric's unit, got {margin!r}")
    work = _Work(kept, ds, on, settings, seed, progress)
    rows, each = [_result_row(result)], []
    with work.kept_in(out):
        for control in wanted:
            compared = work.compared(control, nulls if control in NULLS else seeds, measured, result)
            if control in NULLS:
                rows.append(_null_row(control, result, compared, side or measured.side, level))
            else:
                trained = work.ratio > TRAINED_RATIO or all(m.ratio <= TRAINED_RATIO for m in compared)
                rows.append(_stability_row(control, result, compared, margin, level, trained))
            each += [_model_row(control, k, m) for k, m in enumerate(compared)]
    tables = _frame(rows, COLUMNS), _frame(each, MODEL_COLUMNS)
    return Controls(measured.name, _with_unit(result, measured), *tables, left_out, level)


@dataclass(frozen=True)
class _Compared:
    """One model that was compared: its value, its rank correlation with the result if any, and what is left of its
    reducible loss, where it was trained."""

    value: Value
    agreement: float | None = None
    ratio: float = math.nan


class _Work:
    """Makes the models to compare with, training and storing those that must be trained."""

    def __init__(self, model: Any, ds: Dataset, on: Evaluation, settings: dict[str, Any], seed: int, progress: bool):
        self.model_itself, self.ds, self.settings, self.progress = model, ds, settings, progress
        self.first = FIRST_SEED + 1000 * seed
        self.store: RunStore | None = None
        self.on = on

    @functools.cached_property
    def codes(self) -> tuple[Tensor, Tensor | None]:
        """Posterior means and log-variances (N, L) of the model itself; None for codes without a posterior."""
        with torch.no_grad():
            return self.on.codes(self.model_itself)

    @property
    def sigma(self) -> Tensor:
        """The sd of the model's posteriors, root mean square over the images that it is judged on: (L,)."""
        logvar = self.codes[1]
        if logvar is None:
            raise InputError("constant sigma: the model's codes have no posterior; leave this control out")
        return logvar.double().exp().mean(0).sqrt()

    @functools.cached_property
    def ratio(self) -> float:
        """What is left of the reducible loss by the model itself."""
        with torch.no_grad():
            return self.on.ratio(self.model_itself)

    @contextlib.contextmanager
    def kept_in(self, out: str | Path | None):
        """Within, trainings are kept under `out`, which no other process then works in."""
        if out is None:
            yield
            return
        self.store = RunStore(out)
        with self.store.lock():
            yield

    def compared(self, control: str, count: int, metric: Metric, result: Value) -> list[_Compared]:
        """The metric on each of the `count` models of a control."""
        found = []
        for k in range(count):
            if self.progress:
                print(f"controls: {control}, {k + 1} of {count}", file=sys.stderr)
            if control == "permuted" and metric.permuted is not None:
                with torch.no_grad():
                    found.append(_Compared(metric.permuted(self.model_itself, self.ds, self.on, self.first + k)))
                continue
            other = self.model(control, k)
            value = _measured(other, self.ds, metric, self.on, control)
            if control in NULLS:
                found.append(_Compared(value))
                continue
            with torch.no_grad():
                order = self.order(other) if control == "constant sigma" else None
                found.append(_Compared(value, _agreement(result, value, order), self.on.ratio(other)))
        return found

    def model(self, control: str, k: int) -> Any:
        """The k-th model of a control, in eval mode."""
        seed = self.first + k
        if control == "untrained":
            return reinitialised(self.model_itself, seed).eval()
        if control == "permuted":
            return permuted(self.model_itself, seed).eval()
        if control == "constant sigma":
            twin = of_constant_sigma(self.model_itself, self.sigma, seed)
        else:
            twin = half_frozen(self.model_itself, seed, control.removesuffix(" retrained"))
        out = None
        if self.store is not None:
            run = self.store.run(f"{control.replace(' ', '-')}-s{k}", self._config(control, seed))
            run.begin()
            out = run.path
        fitted = training.fit(twin, self.ds, seed=seed, out=out, progress=self.progress, **self.settings)
        return fitted.model.eval()

    def order(self, other: Any) -> np.ndarray:
        """The latent of `other` that each latent of the model corresponds to."""
        return matched_latents(self.codes[0], self.on.codes(other)[0])

    def _config(self, control: str, seed: int) -> dict[str, Any]:
        """Everything that the trained model's weights depend on."""
        digest = hashlib.sha256()
        for name, tensor in self.model_itself.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        where = {"data": self.ds.name, "contents": self.ds.contents, "images": len(self.ds)}
        # which depends on the images judged on
        sigma = self.sigma.tolist() if control == "constant sigma" else None
        what = {"study": "controls", "control": control, "seed": seed, "weights": digest.hexdigest(), "sigma": sigma}
        return {**what, **where, "model": self.model_itself.config(), **self.settings}


def _wanted(metric: Metric, only: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The controls to run, in their order, and those left out with the reason."""
    known = (*NULLS, *STABILITY)
    only = (only,) if isinstance(only, str) else tuple(only)
    for control in only:
        if control not in known:
            raise InputError(f"only: {control!r} is unknown; known: {', '.join(known)}")
        if control in metric.why_not:
            raise InputError(f"only: {control!r} is not defined for {metric.name}: {metric.why_not[control]}")
    left_out = {} if only else dict(metric.why_not)
    return [c for c in known if (c in only or not only) and c not in left_out], left_out


def _checked(
    model: Any,
    ds: Dataset,
    wanted: Sequence[str],
    side: str | None,
    level: float,
    counts: dict[str, int],
    settings: dict[str, Any],
) -> None:
    """InputError for whatever would only fail after minutes of training."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise InputError(f"{name}: expected a whole number of at least 2, got {value!r}")
    if side not in (None, "above", "below"):
        raise InputError(f"side: expected 'above' or 'below', got {side!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a coverage between 0 and 1, such as 0.95, got {level!r}")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "encode") or not hasattr(model, "decode"):
        raise InputError(f"model: expected a module with encode and decode, got {type(model).__name__}")
    training_needed = [control for control in wanted if control in STABILITY]
    if training_needed and not isinstance(model, models.ImageModel):
        raise InputError(
            f"model: {', '.join(training_needed)} train one of models.build, got {type(model).__name__}; "
            f"pass only={NULLS} for the null controls alone"
        )
    if isinstance(model, models.ImageModel) and training_needed:
        checked_settings(model, ds, schedule="constant", warmup=0, **settings)
    if isinstance(model, models.ImageModel) and tuple(model.shape) != tuple(ds.shape):
        raise InputError(f"model: is for images {tuple(model.shape)}, but data set {ds.name!r} has {tuple(ds.shape)}")


@torch.no_grad()
def _measured(model: Any, ds: Dataset, metric: Metric, on: Evaluation, of: str) -> Value:
    try:
        found = metric.measure(model, ds, on)
    except InputError as error:
        raise InputError(f"{of}: {error}") from error
    if not math.isfinite(found.estimate.value):
        raise InputError(f"{of}: {metric.name} is {found.estimate.value} and cannot be compared")
    return found


def _agreement(result: Value, other: Value, order: np.ndarray | None) -> float | None:
    """Rank correlation over the latents that have a value in both models; None where there is none."""
    if result.latents is None or other.latents is None or len(result.latents) != len(other.latents):
        return None
    a, b = result.latents, other.latents if order is None else other.latents[order]
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 4 or a.min() == a.max() or b.min() == b.max():
        return None
    return latent_agreement(a, b).value


def _result_row(result: Value) -> dict[str, Any]:
    e = result.estimate
    note = "" if e.low < e.high else "the metric gave no interval, so the result is taken as exact"
    row = {"control": "the model itself", "kind": "result", "value": e.value, "low": e.low, "high": e.high}
    return row | {"verdict": "", "n": e.n, "resampled": e.resampled, "note": note}


def _null_row(control: str, result: Value, compared: list[_Compared], side: str, level: float) -> dict[str, Any]:
    null = prediction_interval([m.value.estimate.value for m in compared], level)
    e = result.estimate
    cleared = e.low > null.high if side == "above" else e.high < null.low
    row = {"control": control, "kind": "null", "value": null.value, "low": null.low, "high": null.high}
    row |= {"difference": e.value - null.value, "verdict": "cleared" if cleared else "not cleared"}
    resampled = "draws of the weights" if control == "untrained" else "permutations"
    return row | {"n": null.n, "resampled": resampled, "note": ""}


def _stability_row(
    control: str,
    result: Value,
    compared: list[_Compared],
    margin: float,
    level: float,
    trained: bool,
) -> dict[str, Any]:
    numbers = np.array([m.value.estimate.value for m in compared])
    mean, test = t_interval(numbers, level), equivalence(numbers - result.estimate.value, margin=margin)
    row = {"control": control, "kind": "stability", "value": mean.value, "low": mean.low, "high": mean.high}
    row |= {"difference": test.value, "difference_low": test.low, "difference_high": test.high, "margin": margin}
    row |= {"p": test.p, "verdict": test.verdict if trained else "not trained"}
    ranked = [m.agreement for m in compared if m.agreement is not None]
    if len(ranked) > 1:
        agreement = t_interval(ranked, level)
        row |= {"rank_correlation": agreement.value}
        row |= {"rank_correlation_low": max(-1.0, agreement.low), "rank_correlation_high": min(1.0, agreement.high)}
    note = "" if trained else "a retrained model kept more than half of the reducible loss; give it more steps"
    return row | {"n": mean.n, "resampled": "trainings", "note": note}


def _model_row(control: str, k: int, model: _Compared) -> dict[str, Any]:
    e = model.value.estimate
    ratio = None if math.isnan(model.ratio) else model.ratio
    row = {"control": control, "seed": k, "value": e.value, "low": e.low, "high": e.high, "n": e.n}
    return row | {"resampled": e.resampled, "rank_correlation": model.agreement, "reconstruction": ratio}


def _with_unit(result: Value, metric: Metric) -> Estimate:
    e = result.estimate
    return Estimate(e.value, e.low, e.high, e.level, e.unit or metric.unit, e.resampled, e.n)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """The rows as a table in which what does not apply is missing (NA)."""
    import pandas

    return pandas.DataFrame(rows, columns=pandas.Index(columns)).convert_dtypes()


def _bounded(row: dict[str, Any], name: str) -> str:
    import pandas

    prefix = "" if name == "value" else f"{name}_"
    low, high = row.get(f"{prefix}low", pandas.NA), row.get(f"{prefix}high", pandas.NA)
    text = _cell(row.get(name, pandas.NA))
    if pandas.isna(low) or pandas.isna(high):
        return text
    return f"{text} [{low:.4g}, {high:.4g}]"


def _cell(number: Any) -> str:
    import pandas

    return "-" if pandas.isna(number) else f"{number:.4g}"
