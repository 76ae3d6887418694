"""Path patching on random networks against runs by hooks, and what it refuses."""

import itertools

import pytest
import torch
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st
from random_nets import Residual, hooked, mask_of, random_net
from torch import nn

from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions.paths import MEASURES, path_patch

UNITS = {"": None, "[*]": None, "[0]": (0,), "[:2]": (0, 1)}


def by_hooks(net, path):
    """pse, te and complement (N, ...) of a path, [(site, units)], by a run of the module for each step."""
    module, base = net.module, net.base
    plain, cache = hooked(module, base, record=[site for site, _ in path])
    first, units = path[0]
    source = hooked(module, net.source, record=[first])[1][first]
    value = start = torch.where(mask_of(source, units), source, cache[first])
    for (site, _), (after, units) in itertools.pairwise(path):
        # all else is that of the base's run, so what arrives at `after` comes from `site` alone
        arrived = hooked(module, base, [(site, None, value)], [after])[1][after]
        value = torch.where(mask_of(arrived, units), arrived, cache[after])
    pse = hooked(module, base, [(path[-1][0], None, value)])[0] - plain
    te = hooked(module, base, [(first, None, start)])[0] - plain
    held = [(site, units, cache[site]) for site, units in path[1:]]
    complement = hooked(module, base, [(first, None, start), *held])[0] - plain if held else torch.zeros_like(pse)
    return {"pse": pse, "te": te, "complement": complement, "interaction": te - pse - complement}, plain


def agree(found, truth, net, plain):
    unit = torch.full_like(truth, float(plain.abs().max() + truth.abs().max()) + 1)
    assert_close(found, truth, truth, terms=net.terms, unit=unit)


def draw_path(net, data):
    """Sites in their order; of a residual net some run one after the other in different blocks."""
    picked = data.draw(st.lists(st.sampled_from(range(len(net.sites))), min_size=1, max_size=3, unique=True))
    return [(net.sites[k], data.draw(st.sampled_from(list(UNITS)))) for k in sorted(picked)]


@given(random_net(), st.data())
def test_effects_of_a_path_are_those_of_runs_by_hooks(net, data):
    path = draw_path(net, data)
    spec = " -> ".join(site + units for site, units in path)
    tile = data.draw(st.sampled_from([None, 1, 4]))
    Q = path_patch(net.module, net.base, net.source, f"{spec} -> output", per_sample=True, tile=tile)
    truth, plain = by_hooks(net, [(site, UNITS[units]) for site, units in path])
    for measure in MEASURES:
        agree(Q.per_sample[measure], truth[measure].flatten(1), net, plain)
        agree(getattr(Q, measure), truth[measure].flatten(1).mean(0), net, plain)
        agree(Q.distances[measure], truth[measure].abs().mean(), net, plain)
    assert Q.output_shape == plain.shape[1:] and Q.sites == (*spec.split(" -> "), "output")


@given(random_net(), st.data())
def test_one_path_per_unit_is_that_of_each_unit(net, data):
    path = draw_path(net, data)
    stars = data.draw(st.lists(st.sampled_from(range(len(path))), min_size=1, max_size=2, unique=True))
    path = [(site, "[*]" if n in stars else "[0]" if units == "[*]" else units) for n, (site, units) in enumerate(path)]
    spec = " -> ".join(site + units for site, units in path)
    tile = data.draw(st.sampled_from([None, 3, 8]))
    effect = data.draw(st.sampled_from(["l1", "mse", "rms"]))
    Q = path_patch(
        net.module, net.base, net.source, f"{spec} -> output", each=True, per_sample=True, tile=tile, effect=effect
    )
    _, cache = hooked(net.module, net.base, record=[site for site, _ in path])
    options = [
        [(site, (u,)) for u in range(cache[site].shape[1])] if units == "[*]" else [(site, UNITS[units])]
        for site, units in path
    ]
    paths = list(itertools.product(*options))
    assert Q.pse.shape[0] == len(paths) == len(Q.units) and len(Q.units[0]) == len(stars)
    distance = {
        "l1": lambda d: d.abs().mean(1),
        "mse": lambda d: d.square().mean(1),
        "rms": lambda d: d.square().mean(1).sqrt(),
    }[effect]
    for n, one in enumerate(paths[:: max(1, len(paths) // 6)]):
        n *= max(1, len(paths) // 6)
        truth, plain = by_hooks(net, list(one))
        for measure in MEASURES:
            agree(Q.per_sample[measure][:, n], truth[measure].flatten(1), net, plain)
        assert Q.units[n] == tuple(
            f"{site} channel {units[0]}" for (site, units), (_, text) in zip(one, path, strict=True) if text == "[*]"
        )
        if effect != "rms":  # whose kink at 0 turns rounding into its root
            agree(Q.distances["pse"][n], distance(truth["pse"].flatten(1)).mean(), net, plain.square())


@given(random_net(), st.data())
def test_the_bypass_is_told_where_there_is_one(net, data):
    if not isinstance(net.module, Residual):
        a, b = sorted(data.draw(st.lists(st.sampled_from(range(len(net.sites))), min_size=2, max_size=2, unique=True)))
        Q = path_patch(net.module, net.base, net.source, f"{net.sites[a]} -> {net.sites[b]}[*] -> output")
        assert Q.bypass == {} and not Q.complement.any() and "every site is a cut" in Q.plan
        return
    site = data.draw(st.sampled_from([s for s in net.sites if s.startswith("blocks")]))
    Q = path_patch(net.module, net.base, net.source, f"stem -> {site}[0] -> output")
    plain, cache = hooked(net.module, net.base, record=[site])
    source = hooked(net.module, net.source, record=["stem"])[1]["stem"]
    held = hooked(net.module, net.base, [("stem", None, source), (site, None, cache[site])])[0] - plain
    agree(Q.bypass[f"{site}[0]"], held.mean(0), net, plain)
    assert f"goes around {site}[0], which is no cut" in str(Q)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(name="net")
def _net():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    return module, torch.randn(12, 3).double(), torch.randn(12, 3).double()


def test_tables_name_paths_and_groups(net):
    groups = partitions.from_labels([0, 0, 1, -1, 1, 1], ["left", "right"])
    Q = path_patch(*net, "0[*] -> 2[:2] -> output", each=True, groups=groups, replicates=100)
    assert Q.dims == ("path", "group") and Q.tensor.shape == (4, 4, 2) and Q.coords["group"] == ["left", "right"]
    whole = path_patch(*net, "0[*] -> 2[:2] -> output", each=True)
    left = whole.pse[:, :2].mean(1)
    assert_close(Q.pse[:, 0], left, left, terms=12, unit=1 + left.abs())
    table = Q.to_dataframe()
    assert list(table.columns) == ["path", "group", *MEASURES] and len(table) == 8
    assert table["path"][2] == "0 channel 1" and table["group"][3] == "right"
    ranked = Q.top(3)
    assert list(ranked["pse"]) == sorted(Q.distances["pse"].tolist(), reverse=True)[:3]
    assert bool((ranked["low"] <= ranked["pse"]).all() and (ranked["pse"] <= ranked["high"]).all())
    pairs = path_patch(*net, "0[*] -> 2[*] -> output", each=True, replicates=0)
    assert pairs.units[7] == ("0 channel 1", "2 channel 2") and pairs.table()["low"].isna().all()


def test_paths_of_linear_units_add_up(net):
    """Without activations what goes along all pairs of units is the total effect: signed vectors do add up."""
    module = nn.Sequential(net[0][0], net[0][2], net[0][4])
    Q = path_patch(module, *net[1:], "0[*] -> 1[*] -> output", each=True)
    whole = path_patch(module, *net[1:], "0[*] -> 1[*] -> output")
    assert_close(Q.pse.sum(0), whole.te, whole.te, terms=100, unit=1 + whole.te.abs())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("2 -> 0 -> output", {}, r"path: 0 runs before 2; write 0 -> 2"),
        ("0 -> 2", {}, r'path: expected "site\[\*\] -> site\[3\] -> output"'),
        ("output", {}, r"path: expected"),
        ("0[9] -> output", {}, r"0\[9\]: index 9 is out of range, axis 0 has 4"),
        ("0 -> 0[1] -> output", {}, r"a site is in .* twice"),
        ("nowhere -> output", {}, r"nothing matches 'nowhere'"),
        ("* -> output", {}, r"is a pattern; name one site"),
        ("0 -> output", {"each": True}, r"each: expected a site with \[\*\]"),
        ("0 -> output", {"freeze": "none"}, r'freeze: expected "others"'),
        ("0 -> output", {"effect": "signed"}, r"effect: 'signed' is no distance"),
        ("0 -> output", {"groups": partitions.whole(5)}, r"partition 5 elements, but the output has 6"),
        ("0 -> output", {"x_source": torch.zeros(3, 3)}, r"x_source: has 3 rows, x_base 12"),
    ],
)
def test_bad_input_is_refused_in_one_line(net, path, options, message):
    module, base, source = net
    with pytest.raises(InputError, match=message) as error:
        path_patch(module, base, **{"x_source": source, "path": path, **options})
    assert "\n" not in str(error.value)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.twice = nn.Linear(3, 2), nn.Linear(3, 2), nn.Tanh()

    def forward(self, x):
        return self.twice(self.twice(self.left(x))) + self.right(x)


def test_sites_beside_each_other_and_sites_that_run_twice_are_named():
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="nothing of left reaches right; choose a site behind it"):
        path_patch(Parallel(), x, x + 1, "left -> right -> output")
    with pytest.raises(InputError, match="twice: runs 2 times"):
        path_patch(Parallel(), x, x + 1, "left -> twice -> output")


def test_too_many_numbers_are_refused():
    module = nn.Sequential(nn.Linear(3, 600), nn.Linear(600, 600), nn.Linear(600, 500))
    with pytest.raises(InputError, match="360000 paths, 500 groups are too many numbers to keep"):
        path_patch(module, torch.randn(2, 3), torch.randn(2, 3), "0[*] -> 1[*] -> output", each=True)
