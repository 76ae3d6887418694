"""Circuits that discovery found: their units, how faithful, complete and minimal they are, their edges, and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import read_json, write_text, write_with
from ..errors import InputError, MissingExtra
from ..metrics.statistics import Estimate, Verdict, verdict

if TYPE_CHECKING:
    import networkx
    import pandas

FORMAT = "vaecirc circuit 1"
OUTPUT = "output"


@dataclass(frozen=True)
class Edge:
    """What the parent alone does to the child, in the run of x_base with the circuit's other units held there.

    parent, child: (site, unit), or None for the output. effect: mean over pairs of |change| of the child's activation,
    in its unit; of the output the distance to x_base's, in the circuit's effect. share: effect over the mean of what
    x_source changes of the child; NaN where it changes nothing.
    """

    parent: tuple[str, int]
    child: tuple[str, int] | None
    effect: Estimate
    share: float


@dataclass(frozen=True)
class Circuit:
    """Units whose joint patch recovers an effect, in the order in which they were chosen.

    sites, units: of each. gains: what each adds to the recovery of those before it. losses: what the circuit loses
    without each alone. faithfulness: recovery of the circuit; completeness: 1 - recovery of all other candidates while
    the circuit is held at base; minimality: the least of the losses, None of an empty circuit; ceiling: recovery of all
    candidates jointly; all are shares of the distance between x_base's and x_source's outputs (docs/definitions.md),
    over `judged` pairs. goal: the faithfulness that was asked for. found: the recovery over the pairs that were
    searched; reached: whether that is the goal. searched, judged: numbers of pairs; the same where none were held out,
    and faithfulness is then biased upward. edges: direct effects between the units, and on the output.
    """

    sites: tuple[str, ...]
    units: tuple[int, ...]
    unit: str
    gains: tuple[float, ...]
    losses: tuple[Estimate, ...]
    faithfulness: Estimate
    completeness: Estimate
    minimality: Estimate | None
    ceiling: Estimate
    goal: float
    found: float
    reached: bool
    effect: str
    target: str
    method: str
    candidates: int
    searched: tuple[int, ...] = field(repr=False)
    judged: tuple[int, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(default=(), repr=False)
    plan: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def nodes(self) -> list[tuple[str, int]]:
        """(site, unit) of every unit, in order."""
        return list(zip(self.sites, self.units, strict=True))

    @property
    def held_out(self) -> bool:
        """Whether it is judged on pairs that the search has not seen."""
        return self.searched != self.judged

    @property
    def verdict(self) -> Verdict:
        """Whether the faithfulness is above the goal: "holds" if all of its interval is."""
        return verdict(self.faithfulness, "above", self.goal)

    def __str__(self) -> str:
        pairs = f"{len(self.judged)} pairs held out" if self.held_out else "the pairs of the search"
        names = ", ".join(f"{site}[{unit}]" for site, unit in self.nodes) or "no units"
        lines = [
            f"{names}: {len(self)} of {self.candidates} units, for {self.target}",
            f"faithfulness {self.faithfulness} on {pairs}; goal {self.goal:g} "
            f"{'reached' if self.reached else 'not reached'} in the search ({self.found:.3g})",
            f"completeness {self.completeness}, minimality {self.minimality}, all candidates {self.ceiling}",
        ]
        return "\n".join([*lines, self.plan] if self.plan else lines)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per unit, in order: site, unit, gain, loss, with low and high of the loss."""
        import pandas

        rows = [
            (site, unit, gain, loss.value, loss.low, loss.high)
            for (site, unit), gain, loss in zip(self.nodes, self.gains, self.losses, strict=True)
        ]
        return pandas.DataFrame(rows, columns=["site", "unit", "gain", "loss", "low", "high"])

    def edge_table(self) -> pandas.DataFrame:
        """One row per edge: parent and child ("site[unit]" or "output"), effect, low, high, share."""
        import pandas

        rows = [
            (_name(e.parent), _name(e.child), e.effect.value, e.effect.low, e.effect.high, e.share) for e in self.edges
        ]
        return pandas.DataFrame(rows, columns=["parent", "child", "effect", "low", "high", "share"])

    def to_networkx(self) -> networkx.DiGraph:
        """A networkx.DiGraph: nodes "site[unit]" with site, unit, order, gain and loss, and "output"; edges that are
        not 0 with weight (the effect), low, high and, where there is one, share; the graph's attributes are the
        measures. MissingExtra without networkx."""
        G = _networkx("to_networkx").DiGraph()
        G.graph.update(self._facts())
        for order, (node, gain, loss) in enumerate(zip(self.nodes, self.gains, self.losses, strict=True)):
            G.add_node(_name(node), site=node[0], unit=node[1], order=order, gain=gain, loss=loss.value)
        G.add_node(OUTPUT, site=OUTPUT)
        for e in self.edges:
            if e.effect.value:
                share = {} if math.isnan(e.share) else {"share": e.share}
                bounds = {"low": e.effect.low, "high": e.effect.high}
                G.add_edge(_name(e.parent), _name(e.child), weight=e.effect.value, **bounds, **share)
        return G

    def _facts(self) -> dict[str, Any]:
        facts = {
            name: getattr(self, name) for name in ("goal", "found", "reached", "effect", "target", "method", "unit")
        }
        facts |= {"candidates": self.candidates, "pairs": len(self.judged), "held_out": self.held_out}
        for name in ("faithfulness", "completeness", "minimality", "ceiling"):
            estimate = getattr(self, name)
            if estimate is not None:
                facts |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return facts

    def to_graphml(self, path: str | Path) -> None:
        """Write the graph as GraphML, for Gephi, yEd and Cytoscape. MissingExtra without networkx."""
        nx, G = _networkx("to_graphml"), self.to_networkx()
        write_with(Path(path), lambda temporary: nx.write_graphml_xml(G, temporary))

    def to_json(self, path: str | Path | None = None) -> str:
        """The circuit as strict JSON text, which `from_json` reads; also written to `path` if given."""
        text = json.dumps({"format": FORMAT, **_written(asdict(self))}, allow_nan=False)
        if path is not None:
            write_text(Path(path), text)
        return text

    @staticmethod
    def from_json(text: str) -> Circuit:
        """The circuit that `to_json` gave. InputError for other text."""
        try:
            return _circuit(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"text: is no circuit of to_json ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write it to a file whose name ends in .json, which `load` reads, or in .graphml."""
        suffix = Path(path).suffix
        if suffix not in (".json", ".graphml"):
            raise InputError(f"path: expected a name that ends in .json or .graphml, got {str(path)!r}")
        (self.to_json if suffix == ".json" else self.to_graphml)(path)

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Read what `save` wrote to a .json file. InputError names a missing, damaged or foreign one."""
        try:
            return _circuit(read_json(Path(path)))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no circuit that save wrote ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Motifs:
    """The circuit of each factor, by name."""

    circuits: Mapping[str, Circuit]

    def __getitem__(self, factor: str) -> Circuit:
        return self.circuits[factor]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per factor: factor, size, reached, faithfulness with low and high, completeness, minimality (NaN of
        an empty circuit), ceiling, units."""
        import pandas

        rows = []
        for factor, c in self.circuits.items():
            minimality = math.nan if c.minimality is None else c.minimality.value
            rows.append(
                (
                    *(factor, len(c), c.reached, c.faithfulness.value, c.faithfulness.low, c.faithfulness.high),
                    *(c.completeness.value, minimality, c.ceiling.value, ", ".join(map(_name, c.nodes))),
                )
            )
        columns = ["factor", "size", "reached", "faithfulness", "low", "high", "completeness", "minimality", "ceiling"]
        return pandas.DataFrame(rows, columns=[*columns, "units"])

    def overlap(self) -> pandas.DataFrame:
        """Jaccard index of every two factors' units, |both| / |either|, factor by factor; NaN of two empty circuits."""
        import pandas

        sets = {factor: set(c.nodes) for factor, c in self.circuits.items()}
        values = [[len(a & b) / len(a | b) if a | b else math.nan for b in sets.values()] for a in sets.values()]
        return pandas.DataFrame(values, index=list(sets), columns=list(sets))

    def to_networkx(self) -> networkx.MultiDiGraph:
        """All circuits as one networkx.MultiDiGraph: nodes with `factors`, their names joined by commas, edges with
        `factor`. MissingExtra without networkx."""
        G = _networkx("to_networkx").MultiDiGraph()
        for factor, circuit in self.circuits.items():
            one = circuit.to_networkx()
            for name, facts in one.nodes(data=True):
                before = f"{G.nodes[name]['factors']}, " if name in G else ""
                shared = {key: facts[key] for key in ("site", "unit") if key in facts}
                G.add_node(name, **shared, factors=f"{before}{factor}")
            for parent, child, facts in one.edges(data=True):
                G.add_edge(parent, child, key=factor, factor=factor, **facts)
        return G

    def __str__(self) -> str:
        return self.to_dataframe().to_string(index=False)


def _name(node: tuple[str, int] | None) -> str:
    return OUTPUT if node is None else f"{node[0]}[{node[1]}]"


def _written(value: Any) -> Any:
    """As JSON has it: numbers that it has no form for as their names."""
    if isinstance(value, dict):
        return {key: _written(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_written(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return None
    numbers = {name: float(given[name]) for name in ("value", "low", "high", "level")}
    return Estimate(**numbers, unit=str(given["unit"]), resampled=str(given["resampled"]), n=int(given["n"]))


def _circuit(given: Any) -> Circuit:
    given = dict(given)
    if given.pop("format", None) != FORMAT:
        raise InputError("text: is no circuit of to_json; its format is another")
    for name in ("faithfulness", "completeness", "minimality", "ceiling"):
        given[name] = _estimate(given[name])
    for name in ("sites", "units", "searched", "judged"):
        given[name] = tuple(given[name])
    for name in ("goal", "found"):
        given[name] = float(given[name])
    given["gains"] = tuple(map(float, given["gains"]))
    given["losses"] = tuple(map(_estimate, given["losses"]))
    given["edges"] = tuple(
        Edge(tuple(e["parent"]), e["child"] and tuple(e["child"]), _estimate(e["effect"]), float(e["share"]))
        for e in given["edges"]
    )
    return Circuit(**given)


def _networkx(what: str) -> Any:
    try:
        import networkx
    except ImportError as error:
        raise MissingExtra(f"{what} needs networkx: pip install 'vaecirc-fast[graph]'") from error
    return networkx
