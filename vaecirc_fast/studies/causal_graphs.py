"""From computational graph to causal graph: the factor graph of causal data, recovered through a model's codes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..metrics import GraphRecovery, graph_recovery, reachable
from ..metrics.statistics import resampled_intervals, resampling_weights
from .measuring import plain

THRESHOLD = 0.2  # sd of a factor; Cohen's small effect
PROBE_IMAGES = 1_500  # that a probe is fitted on; a quarter as many are held out
# Of the probe's kernel, in total variances of the codes; chosen by the error on held-out images.
WIDTHS = (0.03, 0.1, 0.3, 1.0)
RIDGE: Any = 1e-3
REPLICATES = 200
FARTHEST = 4.0  # sd that a held latent may be moved
DEFINITIONS = {
    "total": "change of the mean reading of factor b, in sd of b, from do(a := low) to do(a := high)",
    "direct": "the same with all factors but a and b held",
}


@dataclass(frozen=True)
class Effects:
    """Effects of each factor (row) on the reading of each factor (column): (K, K) float64, signed, in sd of the
    latter; `low`, `high`: their intervals; `score`: of their sizes against the true graph (direct) or its closure
    (total)."""

    effect: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    score: GraphRecovery


@dataclass(frozen=True)
class Recovered:
    """What `recover` found.

    names: the factors. truth (K, K) bool. probe: factor -> R^2 of its reading on held-out images. data, latents:
    "total" and "direct" effects; latents is empty where `left_out` says why. assigned: factor -> its latent. held: by
    how much, in sd and as a mean over pairs, factors moved that were to be held at the latents. images: how many an
    intervention; seconds.
    """

    names: tuple[str, ...]
    truth: np.ndarray
    probe: Mapping[str, float]
    data: Mapping[str, Effects]
    latents: Mapping[str, Effects]
    assigned: Mapping[str, int]
    held: float
    left_out: str
    images: int
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "factors": list(self.names),
            "truth": self.truth.tolist(),
            "images": self.images,
            "threshold": THRESHOLD,
            "probe": plain(dict(self.probe)),
            "data": {name: _plain_effects(effects) for name, effects in self.data.items()},
            "latents": {name: _plain_effects(effects) for name, effects in self.latents.items()},
            "assigned": dict(self.assigned),
            **plain({"held": self.held}),
            "left_out": self.left_out,
            "definitions": DEFINITIONS,
            "unit": "sd of the factor",
            "seconds": self.seconds,
        }


@torch.no_grad()
def recover(
    model: Any,
    ds: Any,
    *,
    images: int = 64,
    probe_images: int = PROBE_IMAGES,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Recovered:
    """The causal graph of the factors of `ds`, from interventions at the data and at the latents of `model`.

    model: `encode(x)` gives (mu, logvar) or codes (B, L), or `interventions.Codes`; `decode(z)` an image. ds: as
    `data.scm_sprites`: `graph` (K, K) bool, `intervene`, and a full grid of factors. images: how many an intervention;
    probe_images: how many the probe is fitted on.

    *Reading*: kernel ridge regression from codes to factors, fitted on images whose factors are drawn independently and
    then frozen, so it cannot read an effect off its cause.

    *At the data*: total[a, b] = mean reading of b under do(a := high) less that under do(a := low), with the same
    noise; low and high are a's levels at a quarter and three quarters. direct[a, b]: all factors but a and b are held,
    by do(), at the values of an undisturbed draw. So a cause of a cause has a total and no direct effect: a chain is no
    fork.

    *At the latents*: each factor has the latent that answers to it most, one each. do(latent of a := mean -+ sd), all
    other latents as encoded; decode, encode, read. That is what the model's own mechanism passes on: none, if its
    latents are the factors. direct: the latents of all factors but a and b are moved jointly so that their readings
    stay, as far as the matrix of total effects can say; `held` says how well they did.

    Effects are in sd of the factor over undisturbed images: what is read poorly shows small effects. An edge is found
    above .2; scores by
    `metrics.graph_recovery`, intervals over `images` sets of counterfactuals, of this one model and probe.
    InputError for a data set without a graph, fewer than 8 images or 100 of the probe.
    """
    began = time.perf_counter()
    if not all(hasattr(ds, name) for name in ("graph", "intervene")) or not ds.complete:
        raise InputError("ds: expected a data set with a causal graph and all combinations of factors, as scm_sprites")
    for name, value, least in (("images", images, 8), ("probe_images", probe_images, 100)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected at least {least}, got {value!r}")
    if isinstance(model, torch.nn.Module):
        model.eval()
    probe = _Probe(model, ds, probe_images, seed)
    frame = _Frame(ds, images, seed, replicates, probe)
    data = _at_data(frame)
    latents, assigned, held, left_out = _at_latents(frame, model)
    return Recovered(
        tuple(ds.factor_names),
        frame.truth,
        dict(zip(ds.factor_names, probe.explained.tolist(), strict=True)),
        data,
        latents,
        assigned,
        held,
        left_out,
        images,
        time.perf_counter() - began,
    )


def recovered(trained: Any, untrained: Any, ds: Any, *, seed: int, **options: Any) -> dict[str, Any] | None:
    """`recover` of a model and its untrained control as plain values for a run's result; None for data without a known
    causal graph."""
    if not hasattr(ds, "graph"):
        return None
    models = {"trained": trained, "untrained": untrained}
    return {name: recover(model, ds, seed=seed, **options).plain() for name, model in models.items()}


class _Probe:
    """Reads factors off codes. `sd` (K,): of the factors over undisturbed images; `codes`: of those images (N, L);
    `explained` (K,): R^2 on held-out ones."""

    def __init__(self, model: Any, ds: Any, images: int, seed: int):
        from sklearn.kernel_ridge import KernelRidge

        self.model = model
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(ds), (images + images // 4,), generator=generator).to(ds.device)
        codes, v = self.encoded(ds.images(rows)), ds.factors(rows).double().cpu().numpy()
        self.centre, self.size = codes.mean(0), math.sqrt(float(codes.var(0).sum())) or 1.0
        codes = self._scaled(codes)
        self.middle, self.spread = v.mean(0), np.where(v.std(0) > 0, v.std(0), 1.0)
        targets = (v - self.middle) / self.spread
        fitted = []
        for width in WIDTHS:
            machine = KernelRidge(alpha=RIDGE, kernel="rbf", gamma=1 / (2 * width))
            machine.fit(codes[:images], targets[:images])
            missed = (machine.predict(codes[images:]) - targets[images:]).var(0)
            fitted.append((float(missed.mean()), machine, missed))
        _, self.machine, missed = min(fitted, key=lambda entry: entry[0])
        self.explained = 1 - missed / np.maximum(targets[images:].var(0), 1e-300)
        x, v = ds.sample(images, generator)
        self.codes, self.sd = self.encoded(x), v.double().cpu().numpy().std(0)

    def encoded(self, x: Tensor) -> np.ndarray:
        """Codes (N, L) of images."""
        return codes_of(self.model, x).double().cpu().numpy()

    def _scaled(self, codes: np.ndarray) -> np.ndarray:
        return (codes - self.centre) / self.size  # one scale for all: latents that say nothing stay small

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Readings (N, K), as levels of the factors."""
        return self.middle + self.spread * self.machine.predict(self._scaled(codes))

    def of(self, x: Tensor) -> np.ndarray:
        """Readings (N, K) of images."""
        return self(self.encoded(x))


@dataclass
class _Frame:
    """What both levels share."""

    ds: Any
    images: int
    seed: int
    replicates: int
    probe: _Probe

    def __post_init__(self) -> None:
        self.truth = self.ds.graph.cpu().numpy()
        self.closure = reachable(self.truth)
        self.k = len(self.ds.factor_names)
        self.weights = resampling_weights(self.replicates, self.images, self.seed).double().cpu().numpy()

    def levels(self, a: int) -> tuple[int, int]:
        size = self.ds.factor_sizes[a]
        return size // 4, 3 * size // 4

    def in_sd(self, change: np.ndarray) -> np.ndarray:
        """Changes of readings (..., K) in sd of the factors."""
        sd = self.probe.sd
        return np.where(sd > 1e-9, change / np.where(sd > 1e-9, sd, 1), 0.0)

    def drawn(self, do: Mapping[str, Any]) -> np.ndarray:
        """Readings (N, K) under do(), always of the same noise."""
        x, _ = self.ds.intervene(do, self.images, torch.Generator().manual_seed(self.seed + 1))
        return self.probe.of(x)

    def scored(self, changes: np.ndarray, truth: np.ndarray) -> Effects:
        """Effects of changes (N, K, K) in sd: means over images."""
        flat = changes.reshape(len(changes), -1)
        effect = flat.mean(0)
        drawn = self.weights @ flat / np.maximum(self.weights.sum(1), 1)[:, None]
        low, high = resampled_intervals(effect, drawn, self.images)
        form = (self.k, self.k)
        found = graph_recovery(
            *(np.abs(effect).reshape(form), truth, THRESHOLD, np.abs(drawn).reshape(-1, *form)),
            n=self.images,
            resampled="images",
        )
        return Effects(effect.reshape(form), np.reshape(low, form), np.reshape(high, form), found)


def _at_data(frame: _Frame) -> dict[str, Effects]:
    names, n = frame.ds.factor_names, frame.images
    _, v = frame.ds.intervene({}, n, torch.Generator().manual_seed(frame.seed + 1))
    total, direct = np.zeros((2, n, frame.k, frame.k))
    for a, cause in enumerate(names):
        low, high = frame.levels(a)
        total[:, a] = frame.in_sd(frame.drawn({cause: high}) - frame.drawn({cause: low}))
        for b in range(frame.k):
            held = {name: v[:, j] for j, name in enumerate(names) if j not in (a, b)}
            if a != b:
                change = frame.drawn({**held, cause: high}) - frame.drawn({**held, cause: low})
                direct[:, a, b] = frame.in_sd(change)[:, b]
    return {"total": frame.scored(total, frame.closure), "direct": frame.scored(direct, frame.truth)}


def _at_latents(frame: _Frame, model: Any) -> tuple[dict[str, Effects], dict[str, int], float, str]:
    """Effects, latents assigned, how far held factors moved, and why there is nothing, if there is not."""
    codes = frame.probe.codes
    if not isinstance(_encode(model, frame.ds.images([0])), Tensor):
        return {}, {}, math.nan, "codes of a vector quantiser are discrete: they have no low and high"
    if codes.shape[1] < frame.k:
        return {}, {}, math.nan, f"{codes.shape[1]} latents cannot hold {frame.k} factors one each"
    latent, sign = _assigned(frame)
    middle, sd = codes.mean(0), codes.std(0)
    base = frame.probe.encoded(frame.ds.sample(frame.images, torch.Generator().manual_seed(frame.seed + 2))[0])

    def read(a: int, moves: np.ndarray | None = None) -> np.ndarray:
        """Change (N, K) of all readings from low to high of a's latent; `moves` (K,), sd by which others move too."""
        ends = []
        for end in (-1.0, 1.0):
            z = base.copy()
            z[:, latent[a]] = middle[latent[a]] + end * sign[a] * sd[latent[a]]
            if moves is not None:
                for j in np.flatnonzero(moves):
                    z[:, latent[j]] += end * moves[j] * sign[j] * sd[latent[j]]
            ends.append(frame.probe.of(_decode(model, torch.from_numpy(z))))
        return frame.in_sd(ends[1] - ends[0])

    total, direct = np.zeros((2, frame.images, frame.k, frame.k))
    for a in range(frame.k):
        total[:, a] = read(a)
    means = total.mean(0)
    moved = []
    for a in range(frame.k):
        for b in range(frame.k):
            rest = [j for j in range(frame.k) if j not in (a, b)]
            if a == b:
                continue
            moves = np.zeros(frame.k)
            # What the rest would move by is undone: sum over j of moves_j total[j, k] = -total[a, k] for all k in rest.
            moves[rest] = np.linalg.lstsq(means[np.ix_(rest, rest)].T, -means[a, rest], rcond=0.1)[0]
            change = read(a, moves.clip(-FARTHEST, FARTHEST))
            direct[:, a, b] = change[:, b]
            moved.append(np.abs(change[:, rest].mean(0)).mean())
    effects = {"total": frame.scored(total, frame.closure), "direct": frame.scored(direct, frame.truth)}
    return effects, dict(zip(frame.ds.factor_names, latent.tolist(), strict=True)), float(np.mean(moved)), ""


def _assigned(frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """The latent (K,) of each factor, one each, and the sign of its answer: by images of independently drawn factors in
    which one changes alone."""
    from scipy.optimize import linear_sum_assignment

    ds, n = frame.ds, frame.images
    rows = torch.randint(len(ds), (n,), generator=torch.Generator().manual_seed(frame.seed + 3)).to(ds.device)
    v, sd = ds.factors(rows), frame.probe.codes.std(0)
    answers = np.zeros((frame.k, len(sd)))
    for a in range(frame.k):
        ends = []
        for level in frame.levels(a):
            changed = v.clone()
            changed[:, a] = level
            ends.append(frame.probe.encoded(ds.images(ds.index_of(changed))))
        answers[a] = np.where(sd > 1e-9, (ends[1] - ends[0]).mean(0) / np.where(sd > 1e-9, sd, 1), 0.0)
    latent = linear_sum_assignment(-np.abs(answers))[1]
    sign = np.sign(answers[np.arange(frame.k), latent])
    return latent, np.where(sign == 0, 1.0, sign)


def codes_of(model: Any, x: Tensor, batch: int = 250) -> Tensor:
    """Codes (N, L) of images: posterior means, or of a vector quantiser the quantised vectors, flattened."""
    parts = []
    for rows in x.split(batch):
        found = _encode(model, rows)
        parts.append(found if isinstance(found, Tensor) else found.z_q.flatten(1))
    return torch.cat(parts)


def _encode(model: Any, x: Tensor) -> Any:
    """Means (B, L), or the `Codes` of a vector quantiser."""
    found = model.encode(_on_device(model, x))
    found = found[0] if isinstance(found, tuple) else found
    if not hasattr(found, "z_q") and not (isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(x)):
        raise InputError(f"model: expected encode(x) to give codes (B, L) or (mu, logvar), got {type(found).__name__}")
    return found


def _decode(model: Any, z: Tensor, batch: int = 250) -> Tensor:
    return torch.cat([model.decode(_on_device(model, rows.float())) for rows in z.split(batch)])


def _on_device(model: Any, x: Tensor) -> Tensor:
    first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return x if first is None else x.to(first.device)


def _plain_effects(effects: Effects) -> dict[str, Any]:
    score = effects.score

    def entry(estimate: Any) -> dict[str, Any]:
        return plain({key: asdict(estimate)[key] for key in ("value", "low", "high", "unit", "resampled", "n")})

    return {
        **{name: _rows(getattr(effects, name)) for name in ("effect", "low", "high")},
        "found": score.found.tolist(),
        "shd": entry(score.shd) | {"null": entry(score.null_shd), "p": score.shd_p},
        "auroc": entry(score.auroc) | {"null": entry(score.null_auroc), **plain({"p": score.auroc_p})},
        **plain({"precision": score.precision, "recall": score.recall}),
        "nulls": score.nulls,
        "exact": score.exact,
    }


def _rows(matrix: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if math.isfinite(v) else None for v in row] for row in matrix]
