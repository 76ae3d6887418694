"""Result tables with planted truths: what `studies.result_table` would make of runs that differ as asked for."""

import itertools
import math

import numpy as np
import pandas as pd

ARCHITECTURES = ("vae", "beta_vae", "factor_vae", "beta_tcvae", "dip_vae_ii", "vq_vae")
DATA = ("dsprites", "shapes3d_like", "mpi3d_like", "norb_like", "faces_like")
FACTORS = {"dsprites": 5, "shapes3d_like": 6, "mpi3d_like": 7, "norb_like": 4, "faces_like": math.nan}
METRICS = (
    "reconstruction",
    "mig",
    "ces_posterior",
    "ces_resample",
    "specificity",
    "circuit_modularity",
    "dci_disentanglement",
    "sap",
)


def result_rows(seed=0, data=DATA, architectures=ARCHITECTURES, seeds=1, latents=(10,), noise=0.02):
    """Runs whose metrics are .3 (reconstruction .2) and noise of seeds; controls at half of that."""
    rng = np.random.default_rng(seed)
    rows = []
    for d, a, s, count in itertools.product(data, architectures, range(seeds), latents):
        row = {
            "run": f"{d}-{a}-s{s}-l{count}",
            "data": d,
            "architecture": a,
            "label": a,
            "options": "{}",
            "strength": math.nan,
            "seed": s,
            "latents": float(count),
            "width": 1.0,
            "net": "conv",
            "trained": True,
            "factors": float(FACTORS.get(d, 5)),
        }
        for name in METRICS:
            value = (0.2 if name == "reconstruction" else 0.3) + noise * rng.normal()
            put(row, name, value)
            put(row, f"untrained_{name}", value / 2 + noise * rng.normal())
            if name in ("mig", "specificity", "dci_disentanglement"):
                put(row, f"permuted_{name}", 0.05 + noise * rng.normal())
        for factor in ("scale", "posX"):
            put(row, f"isolation.{factor}", 0.3 + noise * rng.normal())
            put(row, f"untrained_isolation.{factor}", 0.7 + noise * rng.normal())
        for prefix in ("", "untrained_"):
            row[f"{prefix}isolation"] = (row[f"{prefix}isolation.scale"] + row[f"{prefix}isolation.posX"]) / 2
        rows.append(row)
    return rows


def put(row, name, value):
    row |= {name: value, f"{name}_low": value - 0.02, f"{name}_high": value + 0.02}


def result_frame(change=None, **design):
    """The table of `result_rows`, each first given to `change(row, rng)`."""
    rng = np.random.default_rng(design.get("seed", 0) + 1)
    rows = result_rows(**design)
    for row in rows:
        if change is not None:
            change(row, rng)
    return pd.DataFrame(rows)
