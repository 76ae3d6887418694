"""Levels 3 and 4 of the image study: what units pass on, what goes through each latent, the graph."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Dataset
from ..groups import mosaic
from ..interventions import direct_edges, mediate, patch_sweep, run_with_cache
from ..interventions.mediation import TERMS, Mediation
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from ..models import ImageModel
from ..ops.direct_edges import in_sd
from .manipulation import varied_pairs

CELLS = 4  # the circuit graph's output nodes are a mosaic of 4 x 4 cells
HEAD = "encoder.mu"

# Name, unit and definition of what is added to the main table.
DEFINITIONS = {
    "circuit_q": (
        "",
        "Newman's Q of the graph of direct effects from latents by the decoder's units to 4 x 4 image cells",
    ),
    "circuit_modularity": ("", "Q - mean Q of 50 graphs whose weights are permuted within each pair of layers"),
}


@dataclass(frozen=True)
class Circuits:
    """What is found on a model and its untrained twin.

    found: plain values for the run's result. tensors, for the file beside it: "effect SITE", "low SITE" and "high
    SITE", (variant, unit) each, and the weights (V, U) of the graphs, "graph PARENT > CHILD" and "control PARENT >
    CHILD". metrics, control: of the model and the twin, name -> {value, low, high, resampled, n, level}. seconds: of
    each part. plan: of the first patch sweep.
    """

    found: dict[str, Any]
    tensors: dict[str, Tensor]
    metrics: dict[str, dict[str, Any]]
    control: dict[str, dict[str, Any]]
    definitions: dict[str, tuple[str, str]]
    seconds: dict[str, float]
    plan: str


@dataclass(frozen=True)
class Graph:
    """`found`: layers, units, communities, Q and nulls as plain values, empty where a pair of layers has no effect at
    all; `weights` by "PARENT > CHILD", (V, U) float64; `metrics` as in `Circuits`."""

    found: dict[str, Any]
    weights: dict[str, Tensor]
    metrics: dict[str, dict[str, Any]]


@torch.no_grad()
def find_circuits(
    model: ImageModel, untrained: ImageModel, ds: Dataset, *, pairs: int, units: int, active: list[int], seed: int
) -> Circuits:
    """Patch every unit of `patched_sites`, mediate through each of the `active` latents (all if there are none), and
    draw up the circuit graph of the model and of its untrained twin, with `units` units a layer.

    As in `manipulate` each factor of an image is redrawn alone, or each quadrant masked. `pairs` pairs of a change are
    patched; mediation is measured on `pairs` others, so that the unit chosen by the first is judged on the second.
    """
    model.eval()
    untrained.eval()
    kind, base, variants = varied_pairs(ds, 2 * pairs, seed)
    times = [time.perf_counter()]
    patched = {name: _patched(model, base[:pairs], x[:pairs], seed) for name, x in variants.items()}
    times.append(time.perf_counter())
    mediated = []
    for name, x in variants.items():
        unit = _strongest_unit(patched[name], _middle_site(model))
        mediated.append({"variant": name, **_mediated(model, base[pairs:], x[pairs:], active, unit, seed)})
    times.append(time.perf_counter())
    graphs = []
    for m in (model, untrained):
        graphs.append(circuit_graph_of(m, ds, pairs=pairs, units=units, seed=seed))
        times.append(time.perf_counter())
    first = next(iter(patched.values()))
    tensors = {}
    for site in dict.fromkeys(first["sites"]):
        at = [u for u, name in enumerate(first["sites"]) if name == site]
        for part in ("effect", "low", "high"):
            tensors[f"{part} {site}"] = torch.stack([patched[name][part][at] for name in variants])
    for name, graph in zip(("graph", "control"), graphs, strict=True):
        tensors |= {f"{name} {pair}": w for pair, w in graph.weights.items()}
    found = {
        "kind": kind,
        "pairs": pairs,
        "variants": list(variants),
        "sites": [{"site": site, "units": first["sites"].count(site)} for site in dict.fromkeys(first["sites"])],
        "change": [patched[name]["change"] for name in variants],
        "mediation": mediated,
        "graph": graphs[0].found,
        "control": graphs[1].found,
    }
    parts = ("patching", "mediation", "graph", "untrained graph")
    seconds = {part: after - before for part, before, after in zip(parts, times, times[1:], strict=False)}
    return Circuits(found, tensors, graphs[0].metrics, graphs[1].metrics, DEFINITIONS, seconds, first["plan"])


def _strongest_unit(patched: dict[str, Any], site: str) -> str:
    """The unit of a site with the greatest effect, as "site[number]"."""
    at = [u for u, name in enumerate(patched["sites"]) if name == site]
    return f"{site}[{patched['units'][max(at, key=lambda u: float(patched['effect'][u]))]}]"


def patched_sites(model: ImageModel) -> list[str]:
    """Where units are patched: of the encoder's convolutions the last and every second before it (those in front are
    the dearest), or its hidden layers; the means of the latents; the decoder's layers before the last, but of a
    convolutional decoder not those that make its first grid."""
    encoder, decoder = _layers(model.encoder), _layers(model.decoder)
    convolutions = [name for name, layer in encoder.items() if isinstance(layer, nn.Conv2d)]
    before = convolutions[::-1][::2][::-1] or [name for name in encoder if name not in ("mu", "logvar")]
    after = list(decoder)[:-1]
    after = [name for name in after if isinstance(decoder[name], nn.ConvTranspose2d)] or after
    if len(after) == 2 and isinstance(list(decoder.values())[-1], nn.ConvTranspose2d):
        after = after[:1]  # images of one convolution: its grid is wide, the layer before it is not
    return [*(f"encoder.{name}" for name in before), HEAD, *(f"decoder.{name}" for name in after)]


def _middle_site(model: ImageModel) -> str:
    """The decoder's first patched site, of which a unit is a mediator beside the latents."""
    return next(site for site in patched_sites(model) if site.startswith("decoder."))


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_children() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)}


def _patched(model: ImageModel, base: Tensor, source: Tensor, seed: int) -> dict[str, Any]:
    """Effects (U,) of all units with bounds, the sites and numbers of the units, and the whole change."""
    P = patch_sweep(model, base, source, patched_sites(model), effect="l1", seed=seed)
    table = P.to_dataframe()
    low, high = (torch.tensor(table[end].to_numpy(), dtype=torch.float32) for end in ("low", "high"))
    change = (model(source) - model(base)).abs().flatten(1).mean(1).double().cpu()
    w = resampling_weights(REPLICATES, len(base), seed, 0, len(base)).double()
    w = w[w.sum(1) > 0]
    drawn = (w @ change) / w.sum(1)
    bounds = resampled_interval(float(change.mean()), drawn.numpy(), len(base))
    return {
        "effect": P.whole().float().cpu(),
        "low": low,
        "high": high,
        "sites": list(P.sites),
        "units": list(P.units),
        "change": _estimate(float(change.mean()), *bounds),
        "plan": P.plan,
    }


class _Toward(nn.Module):
    """(x, way) -> (B, 1): the output for x, added up along `way`, (B, C, H, W)."""

    def __init__(self, model: ImageModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, way: Tensor) -> Tensor:
        return (self.model(x) * way).flatten(1).sum(1, keepdim=True)


def _mediated(
    model: ImageModel, base: Tensor, source: Tensor, active: list[int], unit: str, seed: int
) -> dict[str, Any]:
    """TE and a row of terms for each active latent and for `unit`, a site of the decoder with a number.

    The outcome of a pair is the mean over pixels of y sign(y(x1) - y(x0)): how far y has gone from the base's output
    to the source's. TE is then the mean of |y(x1) - y(x0)|, and what goes the other way is negative.
    """
    before, after = model(base), model(source)
    way = (after - before).sign() / before[0].numel()
    toward = _Toward(model)
    latents = active or list(range(model.latents))
    given = ((base, way), (source, way))
    M = mediate(toward, *given, [f"model.{HEAD}", f"model.{unit}"], each=True, per_sample=False, seed=seed)
    bounds = {term: M.interval(term) for term in TERMS}
    rows = [{"site": HEAD, "unit": i, **_terms(M, bounds, i)} for i in latents]
    site, _, number = unit.rstrip("]").partition("[")
    rows.append({"site": site, "unit": int(number), **_terms(M, bounds, model.latents)})
    low, high = (float(end[0]) for end in bounds["te"])
    return {"te": _estimate(float(M.te[0]), low, high), "rows": rows}


def _terms(M: Mediation, bounds: dict[str, tuple[Tensor, Tensor]], n: int) -> dict[str, Any]:
    """The terms of the n-th mediator but for TE, and its share: total NIE / TE."""
    found = {
        term: _estimate(float(getattr(M, term)[n]), *(float(end[n]) for end in bounds[term]))
        for term in TERMS
        if term != "te"
    }
    te, nie = float(M.te[n]), float(M.nie_total[n])
    if te == 0 or M.replicates is None:
        return found | {"share": _estimate(None, None, None)}
    tes, ndes = M.replicates[0, :, n], M.replicates[1, :, n]
    drawn = ((tes - ndes) / tes)[tes != 0]
    return found | {"share": _estimate(nie / te, *resampled_interval(nie / te, drawn.numpy(), M.samples))}


@torch.no_grad()
def circuit_graph_of(model: ImageModel, ds: Dataset, *, pairs: int, units: int, seed: int) -> Graph:
    """The graph of direct effects of the decoder and its circuit modularity, over `pairs` pairs of images.

    Nodes: the latents; of every layer before the last the `units` units, features or channels, through which paths of
    the greatest weight lead; a 4 x 4 mosaic of the output. Effects are `l1`, in child sd per parent sd. A base takes
    the latents of another image. "kept": the share of the weight of all paths that leads through these units alone.
    """
    model.eval()
    x, _ = ds.sample(2 * pairs, torch.Generator().manual_seed(seed))
    z = model.encode(x)[0]
    layers, measured = _direct_effects(model.decoder, z[:pairs], z[pairs:])
    edges = {pair: w.nan_to_num(0.0) for pair, w in measured.items()}
    if any(not bool((w > 0).any()) for w in edges.values()):
        return Graph({}, {}, _unbounded(dict.fromkeys(DEFINITIONS), pairs))
    through, everything = path_weights(layers, edges)
    kept = {}
    for name, weight in through.items():
        most = len(weight) if name in ("latents", "cells") else units
        kept[name] = weight.argsort(descending=True, stable=True)[:most].sort().values
    some = {(parent, child): w[kept[child]][:, kept[parent]] for (parent, child), w in edges.items()}
    if any(not bool((w > 0).any()) for w in some.values()):
        return Graph({}, {}, _unbounded(dict.fromkeys(DEFINITIONS), pairs))
    graph = metrics.circuit_graph(*((*pair, w) for pair, w in some.items()))
    M = metrics.circuit_modularity(graph, seed=seed)
    carried = torch.ones(layers["latents"], dtype=torch.float64)
    for pair, w in some.items():
        carried = w @ carried / edges[pair].sum()
    found = {
        "pairs": pairs,
        "layers": [{"layer": name, "units": kept[name].tolist(), "of": layers[name]} for name in layers],
        "communities": M.communities.tolist(),
        "q": M.q,
        "null": float(M.null_q.mean()),
        "null_sd": float(M.null_q.std(ddof=1)),
        "z": _plain(M.z),
        "nulls": len(M.null_q),
        "kept": float(carried.sum()) / everything,
        "unmeasured": sum(int(w.isnan().sum()) for w in measured.values()),
    }
    weights = {f"{parent} > {child}": w.contiguous() for (parent, child), w in graph.weights.items()}
    values = {"circuit_q": M.q, "circuit_modularity": M.excess}
    return Graph(found, weights, _unbounded(values, pairs))


def _unbounded(values: Mapping[str, float | None], n: int) -> dict[str, dict[str, Any]]:
    """Modularity has no interval within a run: each replicate would cost as much as the estimate (decision 022)."""
    return {
        name: {"value": value, "low": None, "high": None, "resampled": "", "n": n, "level": 0.95}
        for name, value in values.items()
    }


def _direct_effects(decoder: Any, z: Tensor, others: Tensor) -> tuple[dict[str, int], dict[tuple[str, str], Tensor]]:
    """Sizes of the layers by name, and (V, U) direct effects of each pair of neighbours in child sd per parent sd."""
    chain = _layers(decoder)
    *names, last = chain
    inputs = [f"{name}.input" for name in chain]
    both, cache = run_with_cache(decoder, torch.cat([z, others]), inputs)
    read = {name: by_channel(cache[f"{name}.input"]) for name in chain}  # (2 N, units, places)
    layers, edges = {"latents": z.shape[1]}, {}
    parent = "latents"
    for child, after in zip(names, [*names[1:], last], strict=True):
        E = direct_edges(decoder, z, others, f"{child}.input", child)
        w, channels = E.in_sd(), read[after].shape[1]
        if len(w) != channels:  # features that become the places of channels: the mean over places, as of a convolution
            edge = E.tensor.double().unflatten(0, (channels, -1)).mean(1)
            w = in_sd(edge, E.change.double(), E.parent_sd.double(), _sd(read[after]).double(), "l1")
        layers[child], edges[parent, child] = channels, w.cpu()
        parent = child
    cells = mosaic(*decoder.shape[1:], rows=CELLS, columns=CELLS, channels=decoder.shape[0])
    P = patch_sweep(decoder, z, others, [f"{last}.input"], effect="l1", groups=cells, replicates=0)
    a = read[last]
    change = (a[len(z) :] - a[: len(z)]).abs().mean((0, 2))
    y = both.flatten(1)
    inside = [y[:, (cells.labels == g).to(y.device)] for g in range(len(cells))]
    child_sd = torch.stack([part.double().std(correction=0) for part in inside])
    w = in_sd(P.tensor.T.double(), change.double(), _sd(a).double(), child_sd, "l1")
    layers["cells"], edges[parent, "cells"] = len(cells), w.cpu()
    return layers, edges


def by_channel(a: Tensor) -> Tensor:
    """Activations (B, U) or (B, U, H, W) as (B, U, places)."""
    return a.flatten(2) if a.ndim > 2 else a[..., None]


def _sd(a: Tensor) -> Tensor:
    """(U,) standard deviation over inputs and places."""
    return a.double().std((0, 2), correction=0)


def path_weights(layers: dict[str, int], edges: dict[tuple[str, str], Tensor]) -> tuple[dict[str, Tensor], float]:
    """(U,) for each layer of a chain: the sum over all paths from the first layer to the last through a unit of the
    product of their edges (V, U) >= 0; and the sum over all paths. Each pair of layers is normalised to sum 1."""
    weights = {pair: w / w.sum() for pair, w in edges.items()}
    names = list(layers)
    ahead = {names[0]: torch.ones(layers[names[0]], dtype=torch.float64)}
    behind = {names[-1]: torch.ones(layers[names[-1]], dtype=torch.float64)}
    for parent, child in weights:
        ahead[child] = weights[parent, child] @ ahead[parent]
    for parent, child in reversed(weights):
        behind[parent] = weights[parent, child].T @ behind[child]
    return {name: ahead[name] * behind[name] for name in names}, float(ahead[names[-1]].sum())


def _estimate(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": _plain(value), "low": _plain(low), "high": _plain(high)}


def _plain(value: float | None) -> float | None:
    """A number as JSON has it: what is not finite is null."""
    return value if value is not None and abs(value) < float("inf") else None
