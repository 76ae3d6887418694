"""Circuit discovery: planted circuits come out exactly; every number equals a naive loop of hooks; honest where not."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions.live_memory import LiveMemory
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import direct_edges, discover, motifs
from vaecirc_fast.interventions.forcing import Pairs
from vaecirc_fast.interventions.joint import Joint, candidates_of
from vaecirc_fast.metrics.statistics import resampled_interval, resampling_weights

EXACT = {"faithfulness": 1.0, "holdout": 0}


def moved(p, latent):
    """A planted decoder's codes with one latent at a step of the other sign, so that all of it changes."""
    z = p.z.clone()
    z[:, latent] = torch.where(z[:, latent] >= 1, -3.0, 5.0).to(z)
    return z


# --- planted circuits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "ranked", "eliminate"])
@pytest.mark.parametrize(
    ("make", "site", "unit", "expected"),
    [
        (planted.relu.kink, "0", "channel", [{0, 1}, {2}]),
        (planted.relu.kink, "1", "channel", [{0, 1}, {2}]),
        (planted.relu.gate, "2", "channel", [{0, 1}, {0}]),
        (planted.conv.quadrants, "fc", "channel", "places"),
        (planted.conv.thresholds, "relu", "element", "places"),
    ],
)
def test_planted_circuits_and_nothing_else(make, site, unit, expected, method):
    p = make()
    if expected == "places":
        places = planted.conv.PLACES
        expected = [{np.ravel_multi_index(place[:3], (2, 8, 8)) for place in of} for of in places]
    for latent, units in enumerate(expected):
        if method != "greedy" and latent in (1, 2, 3) and len(expected) == 5:
            continue  # a latent of two places and one of one are enough
        C = vf.wrap(p.decoder).discover(p.z, moved(p, latent), sites=[site], unit=unit, method=method, **EXACT)
        assert set(C.nodes) == {(site, u) for u in units} and len(C) == len(units)
        assert C.reached and C.found == C.faithfulness.value == pytest.approx(1, abs=1e-12)
        assert C.completeness.value == pytest.approx(1, abs=1e-12) and C.minimality.value > 1e-9
        assert sum(C.gains) == pytest.approx(1) and C.ceiling.value == pytest.approx(1)


def test_motifs_of_factors_share_nothing_where_they_are_drawn_apart():
    p = planted.conv.quadrants()
    variants = {f"latent {i}": moved(p, i) for i in range(5)}
    M = motifs(p.decoder, p.z, variants, sites=["grid"], unit="element", **EXACT)
    assert np.array_equal(M.overlap().to_numpy(), np.eye(5))
    table = M.to_dataframe()
    assert table.factor.tolist() == list(variants) and table["size"].tolist() == [2, 1, 1, 2, 1] and table.reached.all()
    assert M["latent 1"].nodes == [("grid", 64 + 6)] and "latent 4" in str(M)
    G = M.to_networkx()
    assert G.nodes["output"]["factors"] == ", ".join(variants) and G.number_of_edges() == 7
    by_name = motifs(p.decoder, {"a": p.z}, {"a": moved(p, 0)}, {"a": lambda y: y.flatten(1)[:, :64]}, sites=["fc"])
    assert len(by_name["a"]) > 0
    with pytest.raises(InputError, match="x_base: has nothing for the factor 'b'"):
        motifs(p.decoder, {"a": p.z}, {"b": p.z}, sites=["fc"])
    with pytest.raises(InputError, match="b: x_source: gives the same output"):
        motifs(p.decoder, p.z, {"b": p.z}, sites=["fc"])


@pytest.mark.parametrize("method", ["greedy", "ranked", "eliminate"])
def test_a_layer_whose_units_add_up(method):
    """Recovery of every set in closed form; the circuit is one of the smallest sets that reach the goal, or is minimal.
    Unit 2 of `off_path` moves and is read by nothing."""
    for make, unread in ((planted.mediators.chain, set()), (planted.mediators.off_path, {2})):
        p = make()
        h0, h1 = (p.module[:-1](x).detach() for x in (p.base, p.source))
        A = p.module[-1].weight.detach()

        def recovery(units, h0=h0, h1=h1, A=A):
            on = torch.zeros(h0.shape[1], dtype=torch.bool)
            on[list(units)] = True
            y = torch.where(on, h1, h0) @ A.T
            return 1 - float((y - h1 @ A.T).square().mean() / ((h0 - h1) @ A.T).square().mean())

        C = discover(p.module, p.base, p.source, sites=["0"], method=method, faithfulness=0.9)
        units = set(C.units)
        assert C.faithfulness.value == pytest.approx(recovery(units), abs=1e-12) and C.reached and not units & unread
        for u, loss in zip(C.units, C.losses, strict=True):
            assert loss.value == pytest.approx(recovery(units) - recovery(units - {u}), abs=1e-12)
            assert recovery(units - {u}) < 0.9
        assert C.minimality.value == pytest.approx(min(loss.value for loss in C.losses), abs=1e-12)
        assert C.completeness.value == pytest.approx(1 - recovery(set(range(h0.shape[1])) - units), abs=1e-12)
        sets = (s for k in range(6) for s in itertools.combinations(range(h0.shape[1]), k))
        smallest = min(len(s) for s in sets if recovery(s) >= 0.9)
        assert len(C) == smallest


def test_the_earliest_of_equal_candidates_in_several_layers():
    """A latent of the gate reaches all behind it through one unit of the first layer, of its activation too."""
    p = planted.relu.gate()
    C = discover(p.decoder, p.z, moved(p, 0), sites=["0", "1", "2", "3"], **EXACT)
    assert C.nodes == [("0", 0)] and C.completeness.value == pytest.approx(1)
    D = discover(p.decoder, p.z, moved(p, 0), **EXACT)  # "*": the last layer is the output itself
    assert D.nodes == [("0", 0)] and "left out as the input or output itself: 4" in D.plan
    last = discover(p.decoder, p.z, moved(p, 0), sites=["4"], **EXACT)
    assert set(last.nodes) == {("4", 0), ("4", 1), ("4", 2), ("4", 3)}


class Larger(nn.Module):
    """y = max(h0, h1) + h2 / 4 where h0 = h1: either of two units does what both do."""

    def __init__(self):
        super().__init__()
        self.h = nn.Linear(2, 3, dtype=torch.float64)
        self.h.load_state_dict({"weight": torch.tensor([[1.0, 0], [1, 0], [0, 1]]), "bias": torch.zeros(3)})
        self.out = nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, x):
        h = self.h(x)
        return self.out((torch.maximum(h[:, 0], h[:, 1]) + h[:, 2] / 4)[:, None])


def test_of_redundant_units_one_is_left_and_completeness_tells():
    x = torch.zeros(6, 2, dtype=torch.float64)
    source = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2) * torch.arange(1, 7)[:, None]
    for method in ("greedy", "ranked", "eliminate"):
        C = discover(Larger(), x, source, sites=["h"], method=method, **EXACT)
        assert C.nodes == [("h", 0)] and C.faithfulness.value == 1 and C.minimality.value == 1
        assert C.completeness.value == pytest.approx(0, abs=1e-12)  # the other unit does it without this one


class Both(nn.Module):
    """y = relu(h0 + h1 - 1) + h2 / 8: two units that do nothing alone, one that does a little, others nothing."""

    def __init__(self, units=7):
        super().__init__()
        self.h, self.act, self.out = nn.Identity(), nn.ReLU(), nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.out.weight)

    def forward(self, x):
        h = self.h(x)
        return self.out((self.act(h[:, 3] + h[:, 5] - 1) + h[:, 2] / 8)[:, None])


def test_units_that_act_only_together_defeat_greedy_and_not_the_search():
    x, source = torch.zeros(4, 7, dtype=torch.float64), torch.ones(4, 7, dtype=torch.float64)
    options = {"sites": ["h"], "effect": "l1", "holdout": 0}
    C = discover(Both(), x, source, faithfulness=0.85, **options)
    assert set(C.units) == {3, 5} and C.reached and C.found == pytest.approx(1 / 1.125)
    assert "no unit adds to 0.111 and all 7 reach 1" in C.plan and "elimination" in C.plan
    short = discover(Both(), x, source, faithfulness=0.85, max_units=1, **options)
    assert short.units == (2,) and not short.reached and short.found == pytest.approx(1 / 9)
    assert short.ceiling.value == 1 and short.verdict == "does not hold" and "not reached" in str(short)
    ranked = discover(Both(), x, source, faithfulness=0.85, method="ranked", **options)
    assert set(ranked.units) == {3, 5}


def test_a_goal_that_no_candidates_reach_is_not_reached():
    """Units 0 and 1 of `two_paths` mediate a part; the rest goes around them."""
    p = planted.mediators.two_paths()
    C = discover(p.module, p.base, p.source, sites=["inner[:2]"], holdout=0)
    y0, y1 = p.module(p.base).detach(), p.module(p.source).detach()
    through = torch.from_numpy(p.paths["te"])
    ceiling = 1 - float((y0 + through - y1).square().mean() / (y0 - y1).square().mean())
    assert ceiling < 0.9 and C.ceiling.value == pytest.approx(ceiling, abs=1e-12)
    assert not C.reached and C.found < 0.9 and C.candidates == 2
    assert all(loss.value > 0 for loss in C.losses)
    y0 = torch.zeros(5, 3, dtype=torch.float64)
    wrong = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        wrong[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        wrong[1].weight.fill_(1)

    class Against(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.out = wrong, nn.Linear(1, 1, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.net(x) - 3 * x[:, :1])

    empty = discover(Against(), y0, y0 + 1, sites=["net.0"], holdout=0)  # every unit leads away from the source
    assert len(empty) == 0 and not empty.reached and empty.minimality is None and empty.faithfulness.value == 0
    assert empty.ceiling.value < 0 and empty.edges == () and empty.to_dataframe().empty


# --- against a naive loop of hooks -----------------------------------------------------------------------------------


class Branched(nn.Module):
    """Convolutions with a skip, an operation in place and two branches that meet."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.act, self.side, self.fc = nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1), nn.Linear(5, 4)

    def forward(self, x):
        h = self.act(self.c1(x))
        k = self.c2(h)
        k += h
        k = torch.tanh(k)
        return self.fc(torch.cat([k.mean((2, 3)), self.side(h).amax((2, 3))], 1))


SITES = ["c1", "c2", "side"]


def branched(n=9, seed=11):
    torch.manual_seed(seed)
    module = Branched().double().eval()
    x = torch.rand(n, 1, 5, 5, dtype=torch.float64)
    other = x.clone()
    other[:, :, 1:4, 1:4] = torch.rand(n, 1, 3, 3, dtype=torch.float64)
    return module, x, other


def hooked(module, x, values, sets, capture=()):
    """The module's output where units of sites take others' values, and what its sites gave."""
    modules, handles, seen = dict(module.named_modules()), [], {}
    for site in {*sets, *capture}:

        def hook(_m, _a, out, site=site):
            out = out.clone()
            for u in sets.get(site, ()):
                out[:, u] = values[site][:, u]
            seen[site] = out.clone()
            return out

        handles.append(modules[site].register_forward_hook(hook))
    with torch.no_grad():
        y = module(x)
    for handle in handles:
        handle.remove()
    return y, seen


def sets_of(nodes):
    return {site: [u for s, u in nodes if s == site] for site in {s for s, _ in nodes}}


class Naive:
    """Recoveries by one hooked pass each."""

    def __init__(self, module, x, other, sites=SITES):
        self.module, self.x, self.other = module, x, other
        self.y0, self.base = hooked(module, x, {}, {}, sites)
        self.y1, self.source = hooked(module, other, {}, {}, sites)
        self.every = [(site, u) for site in sites for u in range(self.base[site].shape[1])]

    def distances(self, nodes):
        y, _ = hooked(self.module, self.x, self.source, sets_of(nodes))
        return (y - self.y1).square().mean(1)

    def recovery(self, nodes):
        return 1 - float(self.distances(nodes).mean() / (self.y0 - self.y1).square().mean())

    def completeness(self, nodes):
        _, held = hooked(self.module, self.other, self.base, sets_of(nodes), self.base)
        y, _ = hooked(self.module, self.x, held, sets_of(self.every))
        return float((y - self.y1).square().mean() / (self.y0 - self.y1).square().mean())

    def greedy(self, goal):
        chosen = []
        while self.recovery(chosen) < goal:
            rest = [u for u in self.every if u not in chosen]
            chosen.append(max(rest, key=lambda u: self.recovery([*chosen, u])))
        while True:
            losing = max(chosen, key=lambda u: self.recovery([v for v in chosen if v != u]))
            if self.recovery([v for v in chosen if v != losing]) < goal:
                return chosen
            chosen.remove(losing)


@pytest.mark.parametrize("tile", [None, 1, 4])
def test_all_of_it_equals_a_loop_of_hooks(tile):
    module, x, other = branched()
    naive = Naive(module, x, other)
    C = vf.wrap(module).discover(x, other, sites=SITES, faithfulness=0.97, tile=tile)
    assert C.nodes == naive.greedy(0.97) and len({site for site, _ in C.nodes}) > 1
    assert C.faithfulness.value == pytest.approx(naive.recovery(C.nodes), abs=1e-12)
    assert C.completeness.value == pytest.approx(naive.completeness(C.nodes), abs=1e-12)
    grown = [naive.recovery(C.nodes[:k]) for k in range(len(C) + 1)]
    assert np.allclose(C.gains, np.diff(grown), rtol=0, atol=1e-12)
    without = [naive.recovery([v for v in C.nodes if v != u]) for u in C.nodes]
    assert np.allclose([loss.value for loss in C.losses], grown[-1] - np.array(without), rtol=0, atol=1e-12)
    assert C.ceiling.value == pytest.approx(naive.recovery(naive.every), abs=1e-12)


@pytest.mark.parametrize("tile", [None, 3])
def test_every_joint_patch_equals_a_hooked_pass(tile):
    """Any sets, as changes of any other set, put in and left out over several sites."""
    module, x, other = branched()
    naive = Naive(module, x, other)
    pairs = Pairs(module, x, other, SITES, tile=tile)
    with torch.no_grad():
        joint = Joint(pairs, candidates_of(pairs, lambda _: True)[0], "mse", partitions.whole(4))
    names = [(joint.candidates[s].site, u) for s, u in joint.units]
    assert names == naive.every
    rng = np.random.default_rng(0)
    for _ in range(6):
        common, *toggles = (frozenset(u for u in joint.units if rng.random() < q) for q in (0.4, *[0.3] * 6, 0))
        with torch.no_grad():
            found = joint.distances(common, toggles)[0]
        for d, toggle in zip(found.tolist(), toggles, strict=True):
            nodes = [names[joint.units.index(u)] for u in common ^ toggle]
            assert d == pytest.approx(float(naive.distances(nodes).sum()), abs=1e-13)


def test_intervals_resample_pairs():
    """Of few pairs by the jackknife, and of pairs held out as if they were all."""
    module, x, other = branched(40)
    C = discover(module, x, other, sites=SITES, seed=3, replicates=100)
    assert len(C.searched) == len(C.judged) == 20 and sorted(C.searched + C.judged) == list(range(40)) and C.held_out
    few = discover(module, x[:6], other[:6], sites=SITES)
    assert few.searched == few.judged == tuple(range(6)) and not few.held_out
    assert "on the pairs of the search" in str(few) and "on 20 pairs held out" in str(C)
    for circuit, rows, r, seed in ((C, list(C.judged), 100, 3), (few, list(range(6)), 6, 0)):
        naive = Naive(module, x[rows], other[rows])
        w = resampling_weights(r, len(rows), seed).double()
        d, apart = naive.distances(circuit.nodes), (naive.y0 - naive.y1).square().mean(1)
        low, high = resampled_interval(circuit.faithfulness.value, 1 - (w @ d) / (w @ apart), len(rows))
        assert (circuit.faithfulness.low, circuit.faithfulness.high) == pytest.approx((low, high), abs=1e-12)
        assert circuit.faithfulness.value == pytest.approx(naive.recovery(circuit.nodes), abs=1e-12)
        assert circuit.faithfulness.n == len(rows) and circuit.completeness.low < circuit.completeness.high
    seen = Naive(module, x[list(C.searched)], other[list(C.searched)])
    assert C.found == pytest.approx(seen.recovery(C.nodes), abs=1e-12) and C.found >= 0.9
    again = discover(module, x, other, sites=SITES, seed=3, replicates=100, holdout=0.5)
    assert dataclasses.replace(again, plan=C.plan) == C


def test_targets():
    """A group, and a function that is that group."""
    module, x, other = branched()
    parts = partitions.from_labels([0, 0, 1, 1], ["left", "right"])
    by_name = discover(module, x, other, "right", groups=parts, sites=SITES)
    by_number = discover(module, x, other, 1, groups=parts, sites=SITES)
    by_function = discover(module, x, other, lambda y: y[:, 2:], sites=SITES)
    alone = discover(module, x, other, lambda y: y[:, 2:].mean(1), sites=SITES)
    assert by_name.nodes == by_number.nodes == by_function.nodes and by_name.target == "group right"
    assert by_name.faithfulness.value == pytest.approx(by_function.faithfulness.value, abs=1e-12)
    assert alone.reached and by_function.target == "<lambda>"
    by_index = discover(module, x, other, "output[2:]", sites=SITES)
    assert by_index.nodes == by_name.nodes and by_index.target == "output[2:]"
    assert by_index.faithfulness.value == pytest.approx(by_name.faithfulness.value, abs=1e-12)
    mean = discover(module, x, other, "output.mean", sites=SITES)
    same = discover(module, x, other, lambda y: y.mean(1), sites=SITES)
    assert mean.nodes == same.nodes and mean.found == same.found and mean.target == "output.mean"


@settings(max_examples=10)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True), st.floats(0.05, 1))
def test_units_with_outputs_of_their_own(sizes, goal):
    """Then recoveries add up, more units never recover less, and greedy finds the smallest set: the largest shares."""
    net = nn.Sequential(nn.Linear(1, len(sizes)), nn.Linear(len(sizes), len(sizes), bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[1].weight.copy_(torch.diag(torch.tensor(sizes).double().sqrt()))
    x = torch.zeros(3, 1, dtype=torch.float64)
    C = discover(net, x, x + 1, sites=["0"], faithfulness=goal, edges=False)
    shares = np.sort(sizes)[::-1] / sum(sizes)
    assert np.allclose(C.gains, shares[: len(C)]) and all(gain > 0 for gain in C.gains)
    assert shares[: len(C)].sum() >= goal - 1e-9 and shares[: len(C) - 1].sum() < goal
    assert C.completeness.value == pytest.approx(C.faithfulness.value)
    assert C.minimality.value == pytest.approx(C.gains[-1])


def test_float32_and_what_stays_as_it_was():
    module, x, other = branched()
    exact = discover(module, x, other, sites=SITES)
    module.float().train()
    C = discover(module, x.float(), other.float(), sites=SITES)
    assert module.training and C.nodes == exact.nodes
    assert C.faithfulness.value == pytest.approx(exact.faithfulness.value, rel=1e-4)
    assert C.nodes == discover(module, x.float(), other.float(), sites=SITES).nodes


class Sequence(nn.Module):
    """A transformer that gives a dictionary and takes a scale beside its tokens."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, scale):
        return {"logits": self.head(scale * self.block(x)), "more": x}


@pytest.mark.parametrize(("unit", "specs"), [("token", ["[0]", "[1]", "[2]", "[3]"]), ("head", ["[:, :4]", "[:, 4:]"])])
def test_tokens_heads_arguments_and_readouts(unit, specs):
    """A circuit recovers what the joint patch of the same units does."""
    torch.manual_seed(1)
    module = Sequence().double()
    x, other = torch.randn(2, 6, 4, 8, dtype=torch.float64)
    site, m = "block.norm1", vf.wrap(module)
    C = m.discover(
        (x, 2.0), (other, 2.0), sites=[site], unit=unit, heads=2, faithfulness=0.7, readout=lambda out: out["logits"]
    )
    assert C.reached and C.unit == unit and C.candidates == len(specs)
    y1, cache = m.run_with_cache((other, 2.0), [site])
    y = m.patch((x, 2.0), {f"{site}{specs[u]}": cache for u in C.units})
    y0 = m.run_with_cache((x, 2.0), [site])[0]
    near, apart = ((z["logits"] - y1["logits"]).square().mean() for z in (y, y0))
    assert C.faithfulness.value == pytest.approx(1 - float(near / apart), abs=1e-12)
    with pytest.raises(InputError, match="x_source: argument 1 differs"):
        m.discover((x, 2.0), (other, 3.0), sites=[site], readout=lambda out: out["logits"])
    with pytest.raises(InputError, match="its output is dict; readout= must choose"):
        m.discover((x, 2.0), (other, 2.0), sites=[site])
    with pytest.raises(InputError, match="its output is dict; readout= must choose"):
        m.discover((x, 2.0), (other, 2.0), "output.mean", sites=[site])


# --- edges -----------------------------------------------------------------------------------------------------------


def test_edges_of_neighbouring_layers_are_direct_edges():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, other = torch.randn(2, 12, 3, dtype=torch.float64)
    E = direct_edges(net, x, other, "0", "2")
    pairs = Pairs(net, x, other, ["0", "3"])
    with torch.no_grad():
        joint = Joint(pairs, candidates_of(pairs, lambda _: True)[0], "mse", partitions.whole(2))
        names, sums = joint.edges(joint.units)
    found = {name: float(s[0] / s[2]) for name, s in zip(names, sums[0], strict=True)}
    for u, v in itertools.product(range(4), range(5)):
        assert found[(0, u), (1, v)] == pytest.approx(float(E.tensor[v, u]), rel=1e-6, abs=1e-12)
    assert len(found) == 4 * 5 + 4 + 5
    assert all(found[(0, u), None] == 0 for u in range(4))  # all that is between is held


@pytest.mark.parametrize("tile", [None, 2])
def test_edges_equal_a_loop_of_hooks(tile):
    """A parent alone takes the source's value; the circuit's other units are held where x_base has them."""
    module, x, other = branched()
    naive = Naive(module, x, other)
    C = discover(module, x, other, sites=SITES, faithfulness=0.97, tile=tile)
    for e in C.edges:
        whole = (naive.y1 - naive.y0).square().mean()
        if e.child is not None:
            whole = (naive.source[e.child[0]] - naive.base[e.child[0]])[:, e.child[1]].abs().mean()
        assert e.share == pytest.approx(e.effect.value / float(whole), rel=1e-9)
        assert e.effect.low <= e.effect.value <= e.effect.high and e.effect.n == 9
    found = {(e.parent, e.child): e.effect.value for e in C.edges}
    assert any(child is not None for _, child in found)
    some = [("c1", 0), ("c1", 1), ("c2", 0), ("c2", 2), ("side", 1)]
    pairs = Pairs(module, x, other, SITES, tile=tile)
    with torch.no_grad():
        joint = Joint(pairs, candidates_of(pairs, lambda _: True)[0], "mse", partitions.whole(4))
        names, sums = joint.edges([(SITES.index(site), u) for site, u in some])
    node = {None: None, **{(n, u): (site, u) for n, site in enumerate(SITES) for u in range(3)}}
    every = {(node[a], node[b]): float(s[0] / s[2]) for (a, b), s in zip(names, sums[0], strict=True)}
    for nodes, edges in ((C.nodes, found), (some, every)):
        expected = hooked_edges(naive, nodes)
        assert edges.keys() == expected.keys()
        for name, value in expected.items():
            assert edges[name] == pytest.approx(value, rel=1e-9, abs=1e-15)


def hooked_edges(naive, nodes):
    """c1 reaches c2 and side, which do not reach one another."""
    expected = {}
    for parent in nodes:
        values = {site: naive.base[site].clone() for site in SITES}
        values[parent[0]][:, parent[1]] = naive.source[parent[0]][:, parent[1]]
        later = [n for n in nodes if n[0] != "c1" and n[0] != parent[0]]
        for child in later if parent[0] == "c1" else ():
            others = [n for n in later if n[0] != child[0]]
            _, seen = hooked(naive.module, naive.x, values, sets_of([parent, *others]), SITES)
            expected[parent, child] = float((seen[child[0]] - naive.base[child[0]])[:, child[1]].abs().mean())
        y, _ = hooked(naive.module, naive.x, values, sets_of([parent, *later]))
        expected[parent, None] = float((y - naive.y0).square().mean())
    return expected


def test_selections_of_one_site_and_sites_of_one_activation():
    module, x, other = branched()
    joined = discover(module, x, other, sites=["c1[0]", "c1[2]", "c2"], faithfulness=0.5)
    assert joined.candidates == 5
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)), nn.Linear(4, 2)).double()
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    C = discover(nested, a, b, faithfulness=0.5)
    assert C.candidates == 2 + 4 and {site for site in C.sites} <= {"0.0", "0", "0.1"}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_source": None}, "x: expected a tensor"),
        ({"x_source": torch.rand(4, 3)}, "x_source: has 4 rows, x_base 5; they are pairs"),
        ({"x_source": torch.full((5, 3), torch.nan)}, "x: contains NaN"),
        ({"x_source": "same"}, "x_source: gives the same output as x_base"),
        ({"sites": ["9"]}, "nothing matches '9'"),
        ({"sites": "0"}, "sites: expected a list of paths or patterns"),
        ({"sites": []}, "sites: expected a list of paths or patterns"),
        ({"sites": ["0[7]"]}, "index 7 is out of range"),
        ({"sites": ["2*"]}, "only the input or output itself matches"),
        ({"faithfulness": 0}, r"faithfulness: expected a share of the effect in \(0, 1\], got 0"),
        ({"faithfulness": 1.1}, "faithfulness: expected a share"),
        ({"faithfulness": math.nan}, "faithfulness: expected a share"),
        ({"ablation": "zero"}, "ablation: recovery is of 'resample'"),
        ({"effect": "signed"}, "effect: 'signed' is no distance"),
        ({"method": "magic"}, "method: 'magic' is unknown; known: greedy, ranked, eliminate"),
        ({"max_units": 0}, "max_units: expected a whole number >= 1"),
        ({"holdout": 1.0}, r"holdout: expected a share of the pairs in \[0, 1\)"),
        ({"holdout": 0.01}, "holdout: 0.01 of 5 pairs leaves none"),
        ({"replicates": -1}, "replicates: expected a whole number >= 0"),
        ({"tile": 0}, "tile: expected an integer of at least 1"),
        ({"target": 1}, "target: group 1 needs groups="),
        ({"target": "c", "groups": partitions.from_labels([0, 1], ["a", "b"])}, "no group is 'c'; there are 2: a, b"),
        ({"target": True, "groups": partitions.from_labels([0, 1])}, "target: no group is True"),
        ({"target": 0, "groups": partitions.whole(3)}, "groups: partition 3 elements, but the output has 2"),
        ({"groups": partitions.whole(2)}, "groups: are for a target that is one of them"),
        ({"target": 1.5}, "target: expected None, a group"),
        ({"target": "output[5]"}, "index 5 is out of range"),
        ({"target": "logits"}, "target: group 'logits' needs groups="),
        ({"target": lambda y: float(y.sum())}, "target: expected a tensor"),
        ({"target": lambda y: y / 0}, "NaN or infinity"),
    ],
)
def test_bad_input(options, message):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.rand(5, 3)
    options = {"x_base": x, "x_source": torch.rand(5, 3), "sites": ["0"], **options}
    if isinstance(options["x_source"], str):
        options["x_source"] = x
    with pytest.raises(InputError, match=message):
        discover(net, **options)


def test_variants_are_named():
    with pytest.raises(InputError, match="variants: expected inputs by name"):
        motifs(nn.Linear(3, 2), torch.rand(3, 3), {})


@pytest.mark.deep
def test_memory_does_not_grow_with_candidates_or_rounds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 4))
    x, other = torch.randn(2, 8, 4)
    peaks = []
    for sites, most in ((["0[:16]"], 2), (["0"], 2), (["0"], 12)):
        options = {"sites": sites, "max_units": most, "faithfulness": 1, "replicates": 0, "edges": False, "tile": 16}
        with LiveMemory() as memory:
            C = discover(net, x, other, **options)
        assert len(C) == most
        peaks.append(memory.peak)
    numbers = 8 * 8 * 256 * 4  # of each pair and candidate, in float64, a few times
    assert peaks[1] < peaks[0] + numbers and peaks[2] < 1.1 * peaks[1]
