"""All that is measured on one model: the four levels, every metric, and the controls, as a run's result keeps it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__, _native, models, report
from .._tensor_files import write_tensors
from ..data import Dataset
from ..errors import InputError
from ..interventions import Effects
from ..metrics import Encoded
from ..sweeps import RunStore
from .circuits import circuit_graph_of, find_circuits
from .control_models import reinitialised
from .disentanglement import ON, disentanglement, encoded_grid, tabled
from .foreign import adapted
from .manipulation import manipulate
from .measuring import Measurement, measure

if TYPE_CHECKING:
    import pandas

EVALUATION_SEED = 2025  # the images that models are judged on, the same for every model of a data set


@dataclass(frozen=True)
class Protocol:
    """How much a model is measured. images: how many it is judged on; sweep_images: how many of them its latents are
    swept on; pairs: of inputs, for level 1; circuit_pairs: of inputs, a change, for levels 3 and 4 and the circuit
    graph, 0 to leave these out; circuit_units: of each layer in that graph; battery: what the disentanglement metrics
    are computed on, "samples", these images, "grid", every image of the data set, or "none"; seed: of the images."""

    images: int = 10_000
    sweep_images: int = 64
    pairs: int = 256
    circuit_pairs: int = 16
    circuit_units: int = 16
    battery: str = "samples"
    seed: int = EVALUATION_SEED

    def __post_init__(self) -> None:
        for key, least in (("images", 2), ("sweep_images", 2), ("pairs", 4), ("circuit_units", 1), ("seed", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{key}: expected a whole number of at least {least}, got {value!r}")
        if not isinstance(self.circuit_pairs, int) or (self.circuit_pairs < 2 and self.circuit_pairs != 0):
            raise InputError(f"circuit_pairs: expected at least 2, or 0 for none, got {self.circuit_pairs!r}")
        if self.battery not in ON:
            raise InputError(f"battery: expected {', '.join(ON[:-1])} or {ON[-1]}, got {self.battery!r}")


@dataclass(frozen=True)
class Examined:
    """`result`: what of a run's result is of its measurement, plain values. `effects` by grid, `pictures` and
    `circuits` (None where left out): what is kept in files beside it. `plans`: how the sweeps were computed, by grid,
    and the first patch sweep. `seconds`: of each part."""

    result: dict[str, Any]
    effects: dict[str, Effects]
    pictures: dict[str, Tensor]
    circuits: dict[str, Tensor] | None
    plans: dict[str, str] = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

    def write(self, directory: Path) -> None:
        """The files beside result.json."""
        for grid, effects in self.effects.items():
            effects.save(directory / f"effects-{grid}.safetensors")
        write_tensors(directory / "pictures.safetensors", "pictures", self.pictures, {})
        if self.circuits is not None:
            write_tensors(directory / "circuits.safetensors", "circuits", self.circuits, {})


@dataclass(frozen=True)
class _Control:
    """What is measured on an untrained twin, which models of one architecture, data set and seed share."""

    measured: Measurement
    inputs: dict[str, Any]


_CONTROLS: dict[tuple, Any] = {}  # of the last data set; the numbers of a twin, some 2 MB each
_MOST_CONTROLS = 8


def examine(model: Any, untrained: Any | None, ds: Dataset, protocol: Protocol, progress: bool = True) -> Examined:
    """Measure `model`, of `vf.models` or adapted, and its twin before training, None where it has none.

    A twin of the same weights that was measured before on the same data in this process is not measured again.
    """
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = run()
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started
        return found

    p = protocol
    judged: dict[str, Any] = {"images": p.images, "sweep_images": p.sweep_images, "seed": p.seed}
    measured = timed("measuring", lambda: measure(model, ds, **judged))
    inputs = {"trained": timed("inputs", lambda: manipulate(model, ds, pairs=p.pairs, seed=p.seed))}
    control = None
    if untrained is not None:
        control = timed("untrained", lambda: _kept(untrained, ds, p, "measured", lambda: _control(untrained, ds, p)))
        inputs["untrained"] = control.inputs
    circuits = None
    if p.circuit_pairs:
        active = [row["latent"] for row in measured.latents if row["active"]]
        sizes = {"pairs": p.circuit_pairs, "units": p.circuit_units}
        graph = None
        if untrained is not None:
            at = {"seed": p.seed, **sizes}
            graph = timed(
                "untrained", lambda: _kept(untrained, ds, p, "graph", lambda: circuit_graph_of(untrained, ds, **at))
            )
        circuits = find_circuits(model, graph, ds, active=active, seed=p.seed, **sizes)
        seconds |= circuits.seconds
    table = None
    if p.battery != "none":

        def codes(m: Any, of: Measurement) -> Encoded:
            return of.encoded if p.battery == "samples" else encoded_grid(m, ds, progress)

        ours = timed("encoding", lambda: codes(model, measured))
        theirs = None
        if untrained is not None and control is not None:
            of = control.measured
            theirs = timed(
                "untrained",
                lambda: _kept(untrained, ds, p, "battery", lambda: tabled(codes(untrained, of), p.seed)),
            )
        table = timed("disentanglement", lambda: disentanglement(ours, theirs, p.seed))
    seconds["all"] = time.perf_counter() - began
    definitions = measured.definitions | (circuits.definitions if circuits else {})
    missing = {name: _nothing(entry) for name, entry in measured.metrics.items()}
    result = {
        "trained": measured.trained,
        "metrics": measured.metrics | (circuits.metrics if circuits else {}),
        "replicates": measured.replicates,
        "latents": measured.latents,
        "inputs": inputs,
        **({"circuits": circuits.found} if circuits else {}),
        **({"disentanglement": table.found} if table else {}),
        "control": {
            "untrained": (control.measured.metrics if control else missing) | (circuits.control if circuits else {}),
            "permuted": measured.permuted,
        },
        "definitions": {name: {"unit": unit, "definition": text} for name, (unit, text) in definitions.items()},
    }
    plans = {grid: effects.plan for grid, effects in measured.effects.items()}
    return Examined(
        result,
        measured.effects,
        measured.pictures,
        circuits.tensors if circuits else None,
        plans | ({"patching": circuits.plan} if circuits else {}),
        seconds,
    )


def _control(untrained: Any, ds: Dataset, p: Protocol) -> _Control:
    sizes = {"images": p.images, "sweep_images": p.sweep_images, "seed": p.seed}
    return _Control(
        measure(untrained, ds, **sizes, permute=False), manipulate(untrained, ds, pairs=p.pairs, seed=p.seed)
    )


def _nothing(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "value": None, "low": None, "high": None, "n": 0}


def _kept(model: nn.Module, ds: Dataset, protocol: Protocol, part: str, make: Callable[[], Any]) -> Any:
    """What was found before for the same weights of encoder and decoder, or what `make` finds."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(model.encoder).__name__ if hasattr(model, 'encoder') else ''}".encode())
    for name, tensor in model.state_dict().items():
        if name.split(".")[0] in ("encoder", "decoder", "quantiser", "model"):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(repr((getattr(model, "likelihood", ""), getattr(model, "sigma", None))).encode())
    key = (id(ds), ds.name, ds.contents, protocol, part, digest.hexdigest())
    if key not in _CONTROLS:
        if len(_CONTROLS) >= _MOST_CONTROLS or any(kept[0] != id(ds) for kept in _CONTROLS):
            _CONTROLS.clear()
        _CONTROLS[key] = ds, make()  # ds, so that its id is not given to another
    return _CONTROLS[key][1]


# --- models from elsewhere -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelMeasurement:
    """What `measure_model` found: `result` as a run of the image study keeps it; `left_out`: part -> why."""

    examined: Examined
    config: dict[str, Any]
    left_out: dict[str, str]
    machine: dict[str, Any] = field(repr=False)

    @property
    def result(self) -> dict[str, Any]:
        """The result as `vf.report` reads it."""
        timing = {"training_seconds": None, "sweeps": self.examined.plans, "parts": self.examined.seconds}
        return {**self.examined.result, "history": [], "machine": self.machine, "timing": timing}

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each number: metric, value, low, high, resampled, n, the untrained and the permuted control, unit
        and definition."""
        import pandas

        found = self.examined.result
        untrained, permuted = (found["control"][key] for key in ("untrained", "permuted"))
        parts = [(found["metrics"], untrained, permuted, found["definitions"])]
        if "disentanglement" in found:
            d = found["disentanglement"]
            parts.append((d["trained"], d["untrained"], d["permuted"], d["definitions"]))
        rows: dict[str, tuple] = {}
        for values, twin, null, definitions in parts:
            for name, entry in values.items():
                controls = (of.get(name, {}).get("value") for of in (twin, null))
                numbers = (entry[key] for key in ("value", "low", "high", "resampled", "n"))
                text = (definitions[name][key] for key in ("unit", "definition"))
                rows.setdefault(name, (name, *numbers, *controls, *text))
        names = ["metric", "value", "low", "high", "resampled", "n", "untrained", "permuted", "unit", "definition"]
        return pandas.DataFrame(list(rows.values()), columns=names)

    def __str__(self) -> str:
        table = self.to_dataframe().drop(columns=["definition", "resampled"]).to_string(index=False)
        notes = [f"{part}: left out, {why}" for part, why in self.left_out.items()]
        trained = "" if self.examined.result["trained"] else ["not trained by the rule of docs/definitions.md"]
        return "\n".join([f"{self.config['architecture']} on {self.config['data']}", table, *notes, *trained])

    def save(self, out: str | Path, name: str | None = None) -> Path:
        """Keep it as a run of the directory `out`, beside those of a study or of other models, and write the report of
        all of them; the report's path."""
        store = RunStore(out)
        run = store.run(
            name or f"{self.config['data']}-{self.config['architecture']}-s{self.config['seed']}", self.config
        )
        with store.lock():
            run.begin()
            self.examined.write(run.path)
            run.finish(self.result)
        return report.write(store.root)


def measure_model(
    model: nn.Module,
    ds: Dataset,
    *,
    name: str | None = None,
    likelihood: str | None = None,
    encode: Callable[[Tensor], Any] | None = None,
    decode: Callable[[Tensor], Any] | None = None,
    untrained: nn.Module | None = None,
    seed: int = 0,
    progress: bool = True,
    **protocol: Any,
) -> ModelMeasurement:
    """Everything that the image study measures, on any trained autoencoder of images: one of `vf.models`, or a module
    from elsewhere with `encode` and `decode` (see `studies.foreign.adapted` for what they may give).

    likelihood: "bernoulli" or "gaussian", by default the data set's. untrained: the model before training, the control;
    by default it is drawn anew from `seed` where every module with parameters can be (`reset_parameters`), and left out
    otherwise, which `left_out` says. The circuit graph needs a decoder of linear and convolutional layers in a row, and
    is left out elsewhere. protocol: the fields of `Protocol`: images, sweep_images, pairs, circuit_pairs,
    circuit_units, battery. The model is not changed, but for evaluation mode.
    InputError for a model that gives other shapes, NaN, or means outside [0, 1] for "bernoulli".
    """
    unknown = protocol.keys() - Protocol.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(Protocol.__dataclass_fields__)
        raise InputError(f"measure_model: {', '.join(sorted(unknown))} is unknown; known: {known}")
    asked = Protocol(**protocol)
    left_out: dict[str, str] = {}
    if isinstance(model, models.ImageModel):
        if likelihood not in (None, model.likelihood):
            raise InputError(f"likelihood: the model's is {model.likelihood!r}, got {likelihood!r}")
        subject: Any = model
        twin: Any = untrained
        if twin is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                twin = models.build(**model.config()).to(next(model.parameters()).device)
    else:
        kind = likelihood or ds.likelihood
        subject = adapted(model, ds.shape, likelihood=kind, encode=encode, decode=decode)
        twin = None
        if untrained is not None:
            twin = adapted(untrained, ds.shape, likelihood=kind)
        elif encode is not None or decode is not None:
            left_out["untrained"] = (
                "encode and decode were given as functions, so give untrained= as a model of its own"
            )
        else:
            try:
                twin = adapted(reinitialised(model, seed), ds.shape, likelihood=kind)
            except InputError as error:
                left_out["untrained"] = str(error)
    mode = [(part, part.training) for part in model.modules()]
    try:
        examined = examine(subject, twin, ds, asked, progress)
    finally:
        for part, training in mode:
            part.training = training
    left_out |= examined.result.get("circuits", {}).get("left_out", {})
    weights = hashlib.blake2b(digest_size=8)
    for key, tensor in model.state_dict().items():
        weights.update(key.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    config = {
        "study": "image",
        "data": ds.name,
        "architecture": name or getattr(model, "name", None) or type(model).__name__,
        "options": {},
        "seed": seed,
        "latents": len(examined.result["latents"]),
        "weights": weights.hexdigest(),
        **{key: value for key, value in asdict(asked).items() if key != "seed"},
    }
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    machine = {
        "version": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _native.processor(),
        "instruction_set": _native.instruction_set(),
        "threads": torch.get_num_threads(),
        "precision": "fp32",
    }
    return ModelMeasurement(examined, config, left_out, machine)
