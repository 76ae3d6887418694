"""Planted mediators: networks whose mediation terms and path effects are known in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .circuit import dense, eighths

Terms = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PlantedMediator:
    """A network with a mediator whose effects are known.

    name, shows: what it is called and, in one sentence, what it shows. module: (N, D) -> (N, P), float64. base, source:
    (N, D) float64 inputs x0 and x1. mediator: the site and units that mediate. cut: whether all that reaches the output
    passes it. terms: the closed form, te, nde_pure, nde_total, nie_pure, nie_total and interaction of the mean output,
    (N,) float64 each. path: sites and "output"; paths: its pse, te, complement and interaction, (N, P) float64 each.
    Both are written out in numpy and never run the module.

    Weights and inputs are small multiples of powers of two: every number is exact in float64.
    """

    name: str
    shows: str
    module: nn.Module
    base: Tensor
    source: Tensor
    mediator: str
    cut: bool
    terms: Terms
    path: str
    paths: Terms


def all() -> list[PlantedMediator]:
    """Every planted mediator, made anew, float64 on the CPU."""
    return [two_paths(), product(), gate(), off_path(), chain(), detour()]


class TwoPaths(nn.Module):
    """y = out(inner(x)) + skip(x)."""

    def __init__(self, inner: nn.Module, out: nn.Module, skip: nn.Module):
        super().__init__()
        self.inner, self.out, self.skip = inner, out, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)) + self.skip(x)


class Moderated(nn.Module):
    """y = out(inner(x) * moderator(x)) + skip(x): the treatment also decides how strongly its mediator acts."""

    def __init__(self, inner: nn.Module, moderator: nn.Module, out: nn.Module, skip: nn.Module):
        super().__init__()
        self.inner, self.moderator, self.out, self.skip = inner, moderator, out, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) * self.moderator(x)) + self.skip(x)


class Detour(nn.Module):
    """y = out(relu(second(first(x)))) + around(first(x)): a second layer with a way around it."""

    def __init__(self, first: nn.Module, second: nn.Module, out: nn.Module, around: nn.Module):
        super().__init__()
        self.first, self.second, self.relu = first, second, nn.ReLU()
        self.out, self.around = out, around

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(self.relu(self.second(h))) + self.around(h)


def two_paths() -> PlantedMediator:
    """y = A W x + S x: units 0 and 1 of W x mediate A[:, :2] W[:2] d, all the rest is direct, nothing interacts."""
    w, a, s = eighths(41, 4, 3), eighths(42, 4, 4), eighths(43, 4, 3)
    base, source = eighths(44, 8, 3), eighths(45, 8, 3)
    d = source - base
    through, rest = d @ w[:2].T @ a[:, :2].T, d @ w[2:].T @ a[:, 2:].T + d @ s.T
    return PlantedMediator(
        name="two_paths",
        shows="A linear net with a way around its mediator: direct and mediated effects add up to the total.",
        module=TwoPaths(dense(w, eighths(46, 4)), dense(a, eighths(47, 4)), dense(s)),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="inner[:2]",
        cut=False,
        terms=_terms(through + rest, rest, rest, through, through),
        path="inner[:2] -> output",
        paths=_paths(through, through, 0 * through),
    )


def product() -> PlantedMediator:
    """y = A (m t) + S x with m = W x and t = V x: INT = A (dm dt), pure NDE = A (m0 dt) + S d, pure NIE = A (dm t0)."""
    w, v, a, s = eighths(51, 3, 4), eighths(52, 3, 4), eighths(53, 2, 3), eighths(54, 2, 4)
    base, source = eighths(55, 8, 4), eighths(56, 8, 4)
    m0, m1, t0, t1, d = base @ w.T, source @ w.T, base @ v.T, source @ v.T, source - base
    direct = d @ s.T
    te = (m1 * t1 - m0 * t0) @ a.T + direct
    nde_pure, nde_total = (m0 * (t1 - t0)) @ a.T + direct, (m1 * (t1 - t0)) @ a.T + direct
    nie_pure, nie_total = ((m1 - m0) * t0) @ a.T, ((m1 - m0) * t1) @ a.T
    return PlantedMediator(
        name="mediator_product",
        shows="The treatment multiplies what its mediator does: pure and total effects differ by the interaction.",
        module=Moderated(dense(w), dense(v), dense(a), dense(s)),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="inner[*]",
        cut=False,
        terms=_terms(te, nde_pure, nde_total, nie_pure, nie_total),
        path="inner[*] -> output",
        paths=_paths(nie_pure, nie_pure, 0 * nie_pure),
    )


def gate() -> PlantedMediator:
    """y = A (m t) with t = 0 for x0 and 1 for x1: the mediator acts only under treatment, so its pure NIE is 0.

    The first input is the treatment, m = W x of the others.
    """
    w, a = eighths(61, 3, 4), eighths(62, 2, 3)
    base, source = eighths(63, 8, 4), eighths(64, 8, 4)
    w[:, 0], base[:, 0], source[:, 0] = 0, 0, 1
    v, s = np.zeros((3, 4)), np.zeros((2, 4))
    v[:, 0] = 1
    m0, m1 = base @ w.T, source @ w.T
    te, nde = m1 @ a.T, m0 @ a.T
    nie = (m1 - m0) @ a.T
    return PlantedMediator(
        name="mediator_gate",
        shows="A mediator that acts only under treatment: no pure indirect effect, all of it interaction.",
        module=Moderated(dense(w), dense(v), dense(a), dense(s)),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="inner[*]",
        cut=False,
        terms=_terms(te, nde, te, 0 * nie, nie),
        path="moderator[*] -> output",
        paths=_paths(nde, nde, 0 * nde),
    )


def off_path() -> PlantedMediator:
    """y = A W x where column 2 of A is 0: unit 2 moves with the input, and nothing moves with it."""
    w, a = eighths(71, 4, 3), eighths(72, 4, 4)
    a[:, 2] = 0
    base, source = eighths(73, 8, 3), eighths(74, 8, 3)
    d = source - base
    te = d @ w.T @ a.T
    return PlantedMediator(
        name="off_path",
        shows="A unit that answers to the input and that nothing reads: its indirect effect is 0.",
        module=nn.Sequential(dense(w), dense(a, eighths(75, 4))),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="0[2]",
        cut=False,
        terms=_terms(te, te, te, 0 * te, 0 * te),
        path="0[2] -> output",
        paths=_paths(0 * te, 0 * te, 0 * te),
    )


def chain() -> PlantedMediator:
    """y = A max(W x + b, 0): the whole layer is a cut, so all of the effect is mediated, on either side of the kinks.

    The path is unit 1 of W x alone.
    """
    w, b, a = eighths(81, 5, 3), eighths(82, 5), eighths(83, 4, 5)
    base, source = eighths(84, 8, 3), eighths(85, 8, 3)
    h0, h1 = (np.maximum(x @ w.T + b, 0) for x in (base, source))
    te = (h1 - h0) @ a.T
    one = (h1 - h0)[:, 1:2] * a[:, 1]
    return PlantedMediator(
        name="chain",
        shows="A layer that everything passes: its direct effect is 0, kinks or not.",
        module=nn.Sequential(dense(w, b), nn.ReLU(), dense(a)),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="0[*]",
        cut=True,
        terms=_terms(te, 0 * te, 0 * te, te, te),
        path="0[1] -> 1[*] -> output",
        paths=_paths(one, one, 0 * one),
    )


def detour() -> PlantedMediator:
    """y = A max(W h, 0) + S h with h = F x: the path is units 1 and 2 of h through units 1 and 2 of the second layer.

    Of the change e of h in units 1 and 2, A[:, 1:3] (max(W (h0 + e), 0) - max(W h0, 0))[1:3] goes along the path; the
    other units of the second layer and S e are its complement. Behind W outputs add up, so nothing interacts.
    """
    f, w, a, s = eighths(91, 4, 3), eighths(92, 4, 4), eighths(93, 4, 4), eighths(94, 4, 4)
    base, source = eighths(95, 8, 3), eighths(96, 8, 3)
    h0, h1 = base @ f.T, source @ f.T
    on = np.array([False, True, True, False])
    e = (h1 - h0) * on

    def second(h: np.ndarray) -> np.ndarray:
        return np.maximum(h @ w.T, 0)

    def y(through: np.ndarray, h: np.ndarray) -> np.ndarray:
        """The output where the second layer's units 1 and 2 answer to `through` and all else to `h`."""
        return np.where(on, second(through), second(h)) @ a.T + h @ s.T

    y00, y01, y10, y11 = y(h0, h0), y(h1, h0), y(h0, h1), y(h1, h1)
    moved = second(h0 + e) - second(h0)
    pse, complement = (moved * on) @ a.T, (moved * ~on) @ a.T + e @ s.T
    return PlantedMediator(
        name="detour",
        shows="Two layers with a way around the second: a path through some units of both, and what goes around.",
        module=Detour(dense(f), dense(w), dense(a), dense(s)),
        base=torch.from_numpy(base),
        source=torch.from_numpy(source),
        mediator="second[1:3]",
        cut=False,
        terms=_terms(y11 - y00, y10 - y00, y11 - y01, y01 - y00, y11 - y10),
        path="first[1:3] -> second[1:3] -> output",
        paths=_paths(pse, pse + complement, complement),
    )


def _terms(te: np.ndarray, *others: np.ndarray) -> Terms:
    """Terms of the mean output from those of each output (N, P): te, pure and total nde, pure and total nie."""
    names = ("te", "nde_pure", "nde_total", "nie_pure", "nie_total")
    found = {name: t.mean(-1) for name, t in zip(names, (te, *others), strict=True)}
    return found | {"interaction": found["te"] - found["nde_pure"] - found["nie_pure"]}


def _paths(pse: np.ndarray, te: np.ndarray, complement: np.ndarray) -> Terms:
    return {"pse": pse, "te": te, "complement": complement, "interaction": te - pse - complement}
