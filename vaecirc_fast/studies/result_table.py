"""The finished runs of an image study as one table: a row a run, its metrics beside those of its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.results import Run, Study, read
from ..report.words import model_name

if TYPE_CHECKING:
    import pandas

# The option that says how strongly an architecture regularises.
STRENGTH = {
    "beta_vae": "beta",
    "annealed_vae": "gamma",
    "factor_vae": "gamma",
    "beta_tcvae": "beta",
    "dip_vae_i": "lambda_od",
    "dip_vae_ii": "lambda_od",
}
ISOLATION = "isolation."  # before the name of a factor


def result_table(source: str | Path | Study) -> pandas.DataFrame:
    """The finished runs of a study's directory, a row each.

    Columns: run, data, architecture, label (with its options), options (JSON), strength (of the regulariser; missing
    where there is none), seed, latents, width, net, trained, factors (how many vary; missing where factors do not
    determine the image). Then each metric x as x, x_low, x_high, the interval within the run; the same of its untrained
    control as untrained_x, and of permuted codes or effects as permuted_x. `isolation.<factor>` is the share of the
    factor's effect off its own latents, `isolation` its mean over factors. What a run lacks is NaN.

    A metric that is both in the study's list and in the battery is the study's. InputError as `report.results.read`.
    """
    import pandas

    study = source if isinstance(source, Study) else read(Path(source))
    return pandas.DataFrame([_row(run) for run in study.runs])


def _row(run: Run) -> dict[str, Any]:
    config, result = run.config, run.result
    options = config.get("options", {})
    inputs = result.get("inputs", {})
    changed = inputs.get("trained", {})
    row: dict[str, Any] = {
        "run": run.path.name,
        "data": config["data"],
        "architecture": config["architecture"],
        "label": model_name(config),
        "options": json.dumps(options, sort_keys=True),
        "strength": _number(options.get(STRENGTH.get(config["architecture"], ""))),
        "seed": config["seed"],
        "latents": _number(config.get("latents")),
        "width": _number(config.get("width", 1)),
        "net": config.get("net", ""),
        "trained": run.trained,
        "factors": float(len(changed["variants"])) if changed.get("kind") == "factors" else math.nan,
    }
    battery = result.get("disentanglement", {})
    control = result["control"]
    for prefix, found in (
        ("", {**battery.get("trained", {}), **result["metrics"]}),
        ("untrained_", {**battery.get("untrained", {}), **control["untrained"]}),
        ("permuted_", {**battery.get("permuted", {}), **control.get("permuted", {})}),
    ):
        for name, entry in found.items():
            _put(row, f"{prefix}{name}", entry)
    for prefix, state in (("", "trained"), ("untrained_", "untrained")):
        rows = inputs.get(state, {}).get("isolation", [])
        for entry in rows:
            _put(row, f"{prefix}{ISOLATION}{entry['variant']}", entry)
        values = [v for v in (_number(entry["value"]) for entry in rows) if math.isfinite(v)]
        if values:
            row[f"{prefix}isolation"] = sum(values) / len(values)
    return row


def _put(row: dict[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    row[name] = _number(entry.get("value"))
    for end in ("low", "high"):
        row[f"{name}_{end}"] = _number(entry.get(end))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
