"""Mediation: the tests of its definition on random networks, against forced runs by hooks, and what it refuses."""

import pytest
import torch
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st
from random_nets import hooked, random_net
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions.mediation import TERMS, Mediation, mediate


def of(outcomes, found, net, truth):
    """Asserts that differences of outcomes agree, in units of the outcomes."""
    unit = torch.full_like(truth, float(outcomes.abs().max()) + 1)
    assert_close(found, truth, truth, terms=net.terms, unit=unit)


def by_hooks(net, sites):
    """Y(x0, M(x0)), Y(x0, M(x1)), Y(x1, M(x0)), Y(x1, M(x1)), (4, N, ...), sites = {site: units} forced jointly."""
    runs = [net.base, net.source]
    recorded = [hooked(net.module, x, record=sites)[1] for x in runs]
    return torch.stack(
        [
            hooked(net.module, x, [(site, units, recorded[m][site]) for site, units in sites.items()])[0]
            for x, m in ((runs[0], 0), (runs[0], 1), (runs[1], 0), (runs[1], 1))
        ]
    )


def terms_of(y):
    y00, y01, y10, y11 = y
    nde, nie = y10 - y00, y01 - y00
    return {
        "te": y11 - y00,
        "nde_pure": nde,
        "nde_total": y11 - y01,
        "nie_pure": nie,
        "nie_total": y11 - y10,
        "interaction": y11 - y00 - nde - nie,
    }


@given(random_net(), st.data())
def test_every_term_is_that_of_forced_runs(net, data):
    sites = data.draw(st.lists(st.sampled_from(net.sites), min_size=1, max_size=2, unique=True))
    chosen = {site: data.draw(st.sampled_from([None, (0,), (0, 1)])) for site in sites}
    specs = [site + {None: "", (0,): "[0]", (0, 1): "[:2]"}[units] for site, units in chosen.items()]
    outputs = by_hooks(net, chosen)
    y, first = outputs.flatten(2), outputs[:, :, 0].reshape(4, len(net.base), -1).mean(2)
    tile = data.draw(st.sampled_from([None, 1, 4]))
    M = mediate(net.module, net.base, net.source, specs, "output[0]", tile=tile)
    whole = mediate(net.module, net.base, net.source, specs, "output", per_sample=False)
    of(first, M.outcomes, net, first.mean(1))
    for term, truth in terms_of(first).items():
        of(first, M.per_sample[term], net, truth)
        of(first, getattr(M, term), net, truth.mean())
    for term, truth in terms_of(y.mean(2)).items():
        of(y, getattr(whole, term), net, truth.mean())
    assert whole.per_sample is None


@given(random_net(), st.data())
def test_one_mediation_per_unit_is_that_of_each_unit(net, data):
    site = data.draw(st.sampled_from(net.sites))
    M = mediate(
        net.module, net.base, net.source, f"{site}[*]", each=True, tile=data.draw(st.sampled_from([None, 3, 9]))
    )
    channels = hooked(net.module, net.base, record=[site])[1][site].shape[1]
    assert M.units == tuple(f"channel {u}" for u in range(channels)) and M.te.shape == (channels,)
    for u in range(channels):
        y = by_hooks(net, {site: (u,)}).flatten(2).mean(2)
        for term, truth in terms_of(y).items():
            of(y, getattr(M, term)[u], net, truth.mean())
            of(y, M.per_sample[term][:, u], net, truth)


@pytest.mark.parametrize("grouped", [False, True])
def test_kernels_behind_mediators(grouped):
    """Units one by one of a site with a kernel and of one without, against the module's own layers."""
    torch.manual_seed(2)
    module = models.build("vae", (1, 16, 16), 3, width=0.25).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3)
    x0, x1 = torch.rand(2, 7, 1, 16, 16)
    outcome = partitions.cells(16, 16, 2) if grouped else "output.mean"
    given_ = {"outcome": outcome, "each": True, "replicates": 0, "tile": 4}
    sites = ["decoder.fc1", "encoder.conv2", "decoder.ct1[:, :2]"]
    M = mediate(module, x0, x1, sites, **given_)
    assert "kernels behind decoder.fc1, decoder.ct1" in M.plan
    with vf.backend("reference"):
        plain = mediate(module, x0, x1, sites, **given_)
    exact = mediate(module.double(), x0.double(), x1.double(), sites, **given_)
    assert "kernels" not in plain.plan + exact.plan and M.coords == exact.coords
    for term in TERMS:
        truth = exact.per_sample[term]
        unit = torch.full_like(truth, 2.0)  # outcomes are probabilities
        assert_close(M.per_sample[term].float(), plain.per_sample[term].float(), truth, terms=656, unit=unit)
    assert float(exact.nie_pure.abs().max()) > 1e-3


@given(random_net(), st.data())
def test_forcing_a_mediator_to_its_own_values_changes_nothing(net, data):
    site = data.draw(st.sampled_from(net.sites))
    M = mediate(net.module, net.base, net.source, f"{site}[0]")
    with torch.no_grad():
        plain = torch.stack([net.module(net.base).flatten(1).mean(), net.module(net.source).flatten(1).mean()])
    of(plain, M.outcomes[[0, 3]], net, plain)


@given(random_net(), st.data())
def test_a_full_cut_has_no_direct_effect(net, data):
    site = data.draw(st.sampled_from(net.cuts))
    M = mediate(net.module, net.base, net.source, site)
    assert M.cut == {site: True} and M.reaches == {site: True}
    assert not M.nde_pure.any() and not M.nde_total.any() and not M.interaction.any()
    assert torch.equal(M.nie_pure, M.te) and bool(M.te.any())
    for other in set(net.sites) - set(net.cuts):
        assert mediate(net.module, net.base, net.source, other, replicates=0).cut == {other: False}


@given(random_net(), st.data())
def test_a_mediator_off_every_path_has_no_indirect_effect(net, data):
    if hasattr(net.module, "unread"):
        M = mediate(net.module, net.base, net.source, "unread")
        assert M.reaches == {"unread": False} and "nothing of it reaches the output" in M.plan
        assert not M.nie_pure.any() and not M.nie_total.any() and torch.equal(M.nde_pure, M.te)
    readers = [m for m in net.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = readers[-1]
    with torch.no_grad():
        last.weight[:, 0] = 0  # nobody reads channel 0 of its input
    name = next(name for name, m in net.module.named_modules() if m is last)
    M = mediate(net.module, net.base, net.source, f"{name}.input[0]")
    assert not M.nie_pure.any() and not M.nie_total.any() and bool(M.te.any())


# --- outcomes and results ---------------------------------------------------------------------------------------------


@pytest.fixture(name="net")
def _net():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    return module, torch.randn(12, 3).double(), torch.randn(12, 3).double()


def test_outcomes_of_groups_callables_and_elements_agree(net):
    groups = partitions.from_labels([0, 0, 1, -1, 1, 1], ["left", "right"])
    M = mediate(*net, "0[1:3]", groups)
    assert M.dims == ("group",) and M.coords == {"group": ["left", "right"]}
    left = mediate(*net, "0[1:3]", "output[:2]")
    right = mediate(*net, "0[1:3]", lambda y: y[:, [2, 4, 5]].mean(1))
    for term in TERMS:
        one, other = getattr(left, term), getattr(right, term)
        truth = torch.stack([one, other])
        assert_close(getattr(M, term), truth, truth, terms=12, unit=torch.ones_like(truth) + truth.abs())
    each = mediate(*net, "0[*]", groups, each=True)
    assert each.dims == ("unit", "group") and each.te.shape == (4, 2) and each.tensor.shape == (6, 4, 2)
    assert each.per_sample["te"].shape == (12, 4, 2) and len(each.to_dataframe()) == 48
    assert list(each.top(2)["unit"]) == [
        f"channel {u}" for u in each.nie_total.abs().mean(1).argsort(descending=True)[:2].tolist()
    ]


def test_the_table_has_definitions_units_and_intervals(net):
    M = mediate(*net, ["0[0]", "1[2]"], replicates=100)
    table = M.to_dataframe()
    assert list(table["term"]) == list(TERMS) and list(table["definition"]) == list(TERMS.values())
    assert set(table["measured_in"]) == {"output.mean"} and set(table["mediator"]) == {"0[0], 1[2]"}
    assert bool((table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all())
    assert torch.equal(M.tensor, torch.stack([getattr(M, term) for term in TERMS]))
    assert "no cut between input and output" in str(M) and "bypass share" in str(M)
    assert float(M.bypass_share) == float(M.nde_pure / M.te)
    without = mediate(*net, "0[0]", replicates=0).to_dataframe()
    assert without["low"].isna().all() and not without["value"].isna().any()


def test_intervals_are_the_bootstrap_of_the_samples(net):
    from vaecirc_fast.metrics.statistics import resampled_interval, resampling_weights

    M = mediate(*net, "0[0]", replicates=50, seed=3, tile=5)
    w = resampling_weights(50, 12, 3).double()
    for term in TERMS:
        drawn = (w @ M.per_sample[term]) / w.sum(1)
        low, high = M.interval(term)
        truth = torch.tensor(resampled_interval(float(getattr(M, term)), drawn.numpy(), 12))
        assert_close(torch.stack([low, high]).double(), truth.double(), truth.double(), terms=12, unit=1 + truth.abs())


def test_broken_identities_are_refused(net):
    from dataclasses import replace

    M = mediate(*net, "0[0]")
    assert isinstance(M, Mediation)
    with pytest.raises(InputError, match="identity te = nde_pure"):
        replace(M, nde_pure=M.nde_pure + 1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps a count between calls and adds it."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Outside(nn.Module):
    """Computes outside torch."""

    def forward(self, x):
        return x * float(x.detach().numpy().sum())


@pytest.mark.parametrize("bad", [Counting, Outside])
def test_a_module_that_is_not_reproduced_is_named(bad):
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), bad()), nn.Linear(4, 2))
    with pytest.raises(InputError, match=rf"1\.1 \({bad.__name__}\) gives other numbers"):
        mediate(module, torch.randn(4, 3), torch.randn(4, 3), "0[1]")


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mediators": "fc"}, r"fc: runs 2 times"),
        ({"mediators": "unused"}, r"unused: is not reached"),
        ({"mediators": "none"}, r"nothing matches 'none'"),
        ({"mediators": []}, r"mediators: expected at least one site"),
        ({"mediators": "fc.input"}, r"fc\.input: runs 2 times"),
    ],
)
def test_sites_that_do_not_mediate_are_named(options, message):
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match=message):
        mediate(Twice(), x, x + 1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mediators": "0[7]"}, r"0\[7\]: index 7 is out of range, axis 0 has 4"),
        ({"mediators": "0[1, 2]"}, r"has 2 indices"),
        ({"mediators": "0[4:]"}, r"selects nothing"),
        ({"x_source": torch.zeros(11, 3)}, r"x_source: has 11 rows, x_base 12"),
        ({"x_source": torch.zeros(12, 4).double()}, r"x_source: argument 0 is torch.float64 \(12, 4\)"),
        ({"x_source": torch.zeros(12, 3)}, r"x_source: argument 0 is torch.float32"),
        ({"x_source": None}, r"x_source: expected inputs like x_base"),
        ({"x_source": torch.full((12, 3), torch.nan).double()}, r"NaN"),
        ({"outcome": "logits"}, r'expected "output.mean" or "output\[...\]", got \'logits\''),
        ({"outcome": "output[9]"}, r"index 9 is out of range"),
        ({"outcome": "output[*]"}, r"give Groups"),
        ({"outcome": lambda y: y}, r"gives \(12, 6\) for 12 rows, expected \(rows,\)"),
        ({"outcome": lambda y: y.mean(1).log()}, r"is NaN or infinite"),
        ({"outcome": partitions.whole(5)}, r"partition 5 elements, but the output has 6"),
        ({"outcome": 3}, r"outcome: expected .* got int"),
        ({"tile": 0}, r"tile: expected"),
        ({"replicates": -1}, r"replicates: expected"),
        ({"unit": "head"}, r"have no heads"),
    ],
)
def test_bad_input_is_refused_in_one_line(net, options, message):
    module, base, source = net
    with pytest.raises(InputError, match=message) as error:
        mediate(module, base, **{"x_source": source, "mediators": "0[0]", **options})
    assert "\n" not in str(error.value)
