"""`python -m benchmarks.peers`: the same measurements with the real packages of others, for equal numbers and ratios.

Runs in an environment of its own (`make peers`), because peers bring heavy dependencies.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vaecirc_fast as vf
from vaecirc_fast.interventions.grids import symmetric

from . import peer_autoencoders, peer_patching, tables
from .harness import commit, machine, peak_bytes

SAMPLES, LATENTS, ROUNDS = 64, 10, 5
DELTAS = symmetric(5, 0.6)
GROUPS = vf.groups.cells(64, 64, 8)


def _mean_effect(y: Tensor, base: Tensor) -> Tensor:
    return (y - base).abs().view(SAMPLES, 8, 8, 8, 8).mean((0, 2, 4)).flatten()


def nnsight_sweep(decoder: nn.Module, z: Tensor) -> Tensor:
    """The sweep as nnsight's documentation writes one: a trace per latent and step, all samples at once."""
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    model = NNsight(decoder)
    base = decoder(z)
    effects = []
    for i in range(LATENTS):
        for delta in DELTAS.tolist():
            with model.trace(z):
                moved = model.fc1.input.clone()
                moved[:, i] += delta
                model.fc1.input = moved
                y = model.output.save()
            effects.append(_mean_effect(y, base))
    return torch.stack(effects).view(LATENTS, len(DELTAS), -1)


def pyvene_sweep(decoder: nn.Module, z: Tensor) -> Tensor:
    """The sweep with pyvene: an intervenable model per latent and step, all samples at once."""
    import pyvene  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    decoder.config = transformers.PretrainedConfig()  # pyvene asks every model for one
    base = decoder(z)
    effects = []
    for i in range(LATENTS):
        for delta in DELTAS.tolist():

            def shift(base: Tensor, source: Any = None, *rest: Any, i: int = i, delta: float = delta) -> Tensor:
                moved = base.clone()
                moved[:, i] += delta
                return moved

            model = pyvene.IntervenableModel({"component": "fc1.input", "intervention": shift}, model=decoder)
            _, y = model({"z": z.clone()})  # it writes into its input
            effects.append(_mean_effect(y, base))
    return torch.stack(effects).view(LATENTS, len(DELTAS), -1)


def ours(decoder: nn.Module, z: Tensor) -> Tensor:
    return vf.latent_sweep(decoder, z, groups=GROUPS, replicates=0).tensor


PEERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"nnsight": nnsight_sweep, "pyvene": pyvene_sweep}


def sweeps() -> tuple[list[dict[str, Any]], list[str]]:
    """Latent sweeps: figures, and which forms differ from the truth."""
    cases: list[dict[str, Any]] = []
    complaints: list[str] = []
    for net in ("conv", "mlp"):
        torch.manual_seed(0)
        decoder = vf.models.build("vae", (1, 64, 64), latents=LATENTS, net=net).decoder.eval()
        z = torch.randn(SAMPLES, LATENTS)
        case = f"{net} decoder, latent sweep of {SAMPLES} samples x {LATENTS} latents x {len(DELTAS)} steps"
        forms = {"ours": ours, **PEERS}
        times: dict[str, list[float]] = {name: [] for name in forms}
        memory: dict[str, int] = {}
        with torch.no_grad():
            truth = ours(decoder.double(), z.double())
            decoder.float()
            tolerance = 10 * float((ours(decoder, z) - truth).abs().max())
            for name, form in forms.items():
                form(decoder, z)
                memory[name] = peak_bytes(functools.partial(form, decoder, z))
            for _ in range(ROUNDS):  # in turn, so that a drift of the machine's speed meets all alike
                for name, form in forms.items():
                    started = time.perf_counter()
                    result = form(decoder, z)
                    times[name].append(time.perf_counter() - started)
                    error = float((result - truth).abs().max())
                    if error > tolerance:
                        complaints.append(f"{case}: {name} differs from the float64 truth by {error:.2g}")
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            version = "" if name == "ours" else f" {metadata.version(name)}"
            facts = {"case": case, "form": name + version, "ours": name == "ours", "rounds": ROUNDS}
            decodes = SAMPLES * LATENTS * len(DELTAS)
            figures = {"decodes": decodes, "median_s": middle, "iqr_s": high - low, "peak_bytes": memory[name]}
            cases.append({**facts, **figures})
    return cases, complaints


MEASURED = {
    "peers": sweeps,
    "peer_autoencoders": peer_autoencoders.measure,
    "peer_patching": peer_patching.measure,
}


def main(names: list[str]) -> int:
    """Measure `names` of MEASURED, all by default; 1 where numbers differ, 2 for unknown names."""
    if unknown := [name for name in names if name not in MEASURED]:
        print(f"peers: {', '.join(unknown)} unknown; known: {', '.join(MEASURED)}", file=sys.stderr)
        return 2
    unequal = False
    for name in names or MEASURED:
        cases, complaints = MEASURED[name]()
        _write(name, cases)
        ours_s = {c["case"]: c["median_s"] for c in cases if c["ours"]}
        for c in cases:
            ratio = c["median_s"] / ours_s[c["case"]]
            print(f"{c['case']}: {c['form']} {1e3 * c['median_s']:.0f} ms, {ratio:.2f}x ours")
        print("\n".join(complaints), file=sys.stderr)
        unequal = unequal or bool(complaints)
    print("numbers equal" if not unequal else "numbers DIFFER")
    return int(unequal)


def _write(name: str, cases: list[dict[str, Any]]) -> None:
    root = Path(__file__).parent.parent
    out = root / "benchmarks" / "results" / machine() / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out.write_text(json.dumps({"commit": commit(root), "versions": versions, "cases": cases}, indent=1) + "\n")
    tables.write(root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
