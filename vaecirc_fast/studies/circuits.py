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
from ..errors import InputError
from ..groups import mosaic
from ..interventions import direct_edges, mediate, patch, patch_sweep, run_with_cache
from ..interventions.mediation import TERMS, Mediation
from ..metrics.causal import REPLICATES
from ..metrics.statistics import resampled_interval, resampling_weights
from ..models import ImageModel
from ..ops.direct_edges import in_sd
from .manipulation import varied_pairs
from .subjects import Subject, subject_of

CELLS = 4  # the circuit graph's output nodes are a mosaic of 4 x 4 cells

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
    all or where it cannot be drawn up (`why`); `weights` by "PARENT > CHILD", (V, U) float64; `metrics` as in
    `Circuits`."""

    found: dict[str, Any]
    weights: dict[str, Tensor]
    metrics: dict[str, dict[str, Any]]
    why: str = ""

    @classmethod
    def missing(cls, pairs: int, why: str = "") -> Graph:
        """No graph, and why there is none."""
        return cls({}, {}, _unbounded(dict.fromkeys(DEFINITIONS), pairs), why)


@torch.no_grad()
def find_circuits(
    model: Any, untrained: Any, ds: Dataset, *, pairs: int, units: int, active: list[int], seed: int
) -> Circuits:
    """Patch every unit of `patched_sites`, mediate through each of the `active` latents (all if there are none), and
    draw up the circuit graph of the model and of its untrained twin, with `units` units a layer. untrained: the twin,
    its graph if that is known, or None.

    As in `manipulate` each factor of an image is redrawn alone, or each quadrant masked. `pairs` pairs of a change are
    patched; mediation is measured on `pairs` others, so that the unit chosen by the first is judged on the second.
    """
    subject = subject_of(model)
    subject.module.eval()
    kind, base, variants = varied_pairs(ds, 2 * pairs, seed)
    times = [time.perf_counter()]
    patched = {name: _patched(subject, base[:pairs], x[:pairs], seed) for name, x in variants.items()}
    times.append(time.perf_counter())
    mediated = []
    for name, x in variants.items():
        unit = _strongest_unit(patched[name], subject.after[0]) if subject.after else None
        mediated.append({"variant": name, **_mediated(subject, base[pairs:], x[pairs:], active, unit, seed)})
    times.append(time.perf_counter())
    graphs = []
    for m in (subject, untrained):
        found = Graph.missing(pairs) if m is None else m
        graphs.append(
            found if isinstance(found, Graph) else circuit_graph_of(found, ds, pairs=pairs, units=units, seed=seed)
        )
        times.append(time.perf_counter())
    first = next(iter(patched.values()))
    tensors = {}
    for site in dict.fromkeys(first["sites"]):
        at = [u for u, name in enumerate(first["sites"]) if name == site]
        for part in ("effect", "low", "high"):
            tensors[f"{part} {subject.shown(site)}"] = torch.stack([patched[name][part][at] for name in variants])
    for name, graph in zip(("graph", "control"), graphs, strict=True):
        tensors |= {f"{name} {pair}": w for pair, w in graph.weights.items()}
    found = {
        "kind": kind,
        "pairs": pairs,
        "variants": list(variants),
        "sites": [
            {"site": subject.shown(site), "units": first["sites"].count(site)} for site in dict.fromkeys(first["sites"])
        ],
        "change": [patched[name]["change"] for name in variants],
        "mediation": mediated,
        "graph": graphs[0].found,
        "control": graphs[1].found,
        **({"left_out": {"graph": graphs[0].why}} if graphs[0].why else {}),
    }
    parts = ("patching", "mediation", "graph", "untrained graph")
    seconds = {part: after - before for part, before, after in zip(parts, times, times[1:], strict=False)}
    return Circuits(found, tensors, graphs[0].metrics, graphs[1].metrics, DEFINITIONS, seconds, first["plan"])


def _strongest_unit(patched: dict[str, Any], site: str) -> str:
    """The unit of a site with the greatest effect, as "site[number]"."""
    at = [u for u, name in enumerate(patched["sites"]) if name == site]
    return f"{site}[{patched['units'][max(at, key=lambda u: float(patched['effect'][u]))]}]"


def patched_sites(model: Any) -> list[str]:
    """Where units are patched: of the encoder's convolutions the last and every second before it, or its hidden layers;
    the means of the latents, or the slots; the decoder's layers before the last, but of a convolutional decoder not
    those that make its first grid."""
    return subject_of(model).patched


def _patched(subject: Subject, base: Tensor, source: Tensor, seed: int) -> dict[str, Any]:
    """Effects (U,) of all units with bounds, the sites and numbers of the units, and the whole change."""
    model = subject.module
    P = patch_sweep(model, base, source, subject.patched, effect="l1", seed=seed)
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

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, way: Tensor) -> Tensor:
        return (self.model(x) * way).flatten(1).sum(1, keepdim=True)


def _mediated(
    subject: Subject, base: Tensor, source: Tensor, active: list[int], unit: str | None, seed: int
) -> dict[str, Any]:
    """TE and a row of terms for each active latent and for `unit`, a site of the decoder with a number, if any.

    The outcome of a pair is the mean over pixels of y sign(y(x1) - y(x0)): how far y has gone from the base's output
    to the source's. TE is then the mean of |y(x1) - y(x0)|, and what goes the other way is negative.
    """
    model, head = subject.module, subject.head
    before, after = model(base), model(source)
    way = (after - before).sign() / before[0].numel()
    toward = _Toward(model)
    latents = active or list(range(subject.latents))
    given = ((base, way), (source, way))
    M = mediate(
        toward, *given, [f"model.{site}" for site in (head, unit) if site], each=True, per_sample=False, seed=seed
    )
    bounds = {term: M.interval(term) for term in TERMS}
    rows = [{"site": subject.shown(head), "unit": i, **_terms(M, bounds, i)} for i in latents]
    if unit:
        site, _, number = unit.rstrip("]").partition("[")
        rows.append({"site": subject.shown(site), "unit": int(number), **_terms(M, bounds, subject.latents)})
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
def circuit_graph_of(model: Any, ds: Dataset, *, pairs: int, units: int, seed: int) -> Graph:
    """The graph of direct effects of the decoder and its circuit modularity, over `pairs` pairs of images.

    Nodes: the latents; of every layer before the last the `units` units, features or channels, through which paths of
    the greatest weight lead; a 4 x 4 mosaic of the output. Effects are `l1`, in child sd per parent sd. A base takes
    the latents of another image. "kept": the share of the weight of all paths that leads through these units alone.
    """
    subject = subject_of(model)
    subject.module.eval()
    x, _ = ds.sample(2 * pairs, torch.Generator().manual_seed(seed))
    codes = subject.encode(x)
    z = codes.z_q if subject.quantised else codes[0]
    try:
        if not isinstance(subject.module, ImageModel):
            _check_chain(subject, z[:pairs], z[pairs:])
        layers, measured = _direct_effects(subject, z[:pairs], z[pairs:])
    except InputError as error:
        if isinstance(subject.module, ImageModel):
            raise
        return Graph.missing(pairs, str(error))
    edges = {pair: w.nan_to_num(0.0) for pair, w in measured.items()}
    if any(not bool((w > 0).any()) for w in edges.values()):
        return Graph.missing(pairs)
    through, everything = path_weights(layers, edges)
    kept = {}
    for name, weight in through.items():
        most = len(weight) if name in ("latents", "cells") else units
        kept[name] = weight.argsort(descending=True, stable=True)[:most].sort().values
    some = {(parent, child): w[kept[child]][:, kept[parent]] for (parent, child), w in edges.items()}
    if any(not bool((w > 0).any()) for w in some.values()):
        return Graph.missing(pairs)
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


def _direct_effects(
    subject: Subject, z: Tensor, others: Tensor
) -> tuple[dict[str, int], dict[tuple[str, str], Tensor]]:
    """Sizes of the layers by name, and (V, U) direct effects of each pair of neighbours in child sd per parent sd."""
    decoder = subject.decoder
    if len(subject.chain) < 2:
        raise InputError(f"decoder: a graph needs at least 2 layers in a row, found {len(subject.chain)}")
    *names, last = subject.chain
    inputs = [f"{name}.input" for name in subject.chain]
    both, cache = run_with_cache(decoder, torch.cat([z, others]), inputs)
    read = {name: by_channel(cache[f"{name}.input"]) for name in subject.chain}  # (2 N, units, places)
    layers, edges = {"latents": subject.latents}, {}
    parent = "latents"
    for site, after in zip(names, [*names[1:], last], strict=True):
        child, channels = subject.shown(site), read[after].shape[1]
        if parent == "latents" and subject.quantised:
            w = _slot_edges(decoder, site, z, others, read[after][..., 0])
        else:
            E = direct_edges(decoder, z, others, f"{site}.input", site)
            w = E.in_sd()
            if (
                len(w) != channels
            ):  # features that become the places of channels: the mean over them, as of convolutions
                edge = E.tensor.double().unflatten(0, (channels, -1)).mean(1)
                w = in_sd(edge, E.change.double(), E.parent_sd.double(), _sd(read[after]).double(), "l1")
        layers[child], edges[parent, child] = channels, w.cpu()
        parent = child
    cells = mosaic(*subject.shape[1:], rows=CELLS, columns=CELLS, channels=subject.shape[0])
    P = patch_sweep(decoder, z, others, [f"{last}.input"], effect="l1", groups=cells, replicates=0)
    a = read[last]
    change = (a[len(z) :] - a[: len(z)]).abs().mean((0, 2))
    y = both.flatten(1)
    inside = [y[:, (cells.labels == g).to(y.device)] for g in range(len(cells))]
    child_sd = torch.stack([part.double().std(correction=0) for part in inside])
    w = in_sd(P.tensor.T.double(), change.double(), _sd(a).double(), child_sd, "l1")
    layers["cells"], edges[parent, "cells"] = len(cells), w.cpu()
    return layers, edges


def _check_chain(subject: Subject, z: Tensor, others: Tensor) -> None:
    """InputError unless all that reaches the output of a decoder from elsewhere goes through each of its layers: what
    one of them reads, taken from other codes, then gives the output of those."""
    decoder = subject.decoder
    inputs = [f"{name}.input" for name in subject.chain]
    after, cache = run_with_cache(decoder, others, inputs)
    for site in inputs:
        forced = patch(decoder, z, {site: cache})
        off = float((forced - after).abs().max())
        if off > 1e-4 * float(after.abs().max()):
            name = subject.shown(site.removesuffix(".input"))
            raise InputError(f"decoder: something goes past {name}, so its layers are no chain to draw a graph of")


def _slot_edges(decoder: nn.Module, site: str, z: Tensor, others: Tensor, after: Tensor) -> Tensor:
    """(V, L) effects of slots of z (N, D, L) on the activations (2 N, V) behind the linear layer that reads them
    flattened. A slot changes as a whole; its change and sd are over its channels, as a channel's are over places."""
    layer = decoder.get_submodule(site)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.view(len(layer.weight), *z.shape[1:])  # (V, D, L)
    base = layer(z.flatten(1))
    moved = base[:, None] + torch.einsum("vdl,ndl->nlv", weight, others - z)
    edge = (moved.relu() - base.relu()[:, None]).abs().mean(0).T
    change = (others - z).abs().mean((0, 1))
    sd = torch.cat([z, others]).double().std((0, 1), correction=0)
    return in_sd(edge.double(), change.double(), sd, _sd(by_channel(after)), "l1")


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
