"""Planted encoders: their closed forms against a plain loop over inputs, and input_effects against them."""

import math

import numpy as np
import pytest
import torch

from vaecirc_fast import planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import input_effects, mask_region
from vaecirc_fast.metrics import assignment, isolation, polysemanticity
from vaecirc_fast.planted import inputs

CIRCUITS = {circuit.name: circuit for circuit in planted.input_circuits()}
MONOSEMANTIC = ("inputs_monosemantic", "inputs_conv_regions")


@pytest.fixture(params=CIRCUITS, name="circuit")
def _circuit(request):
    return CIRCUITS[request.param]


def measured(circuit, **options):
    return input_effects(circuit.encoder, circuit.base, circuit.variants, circuit.sites, unit=circuit.unit, **options)


# --- the closed forms, by definition ---------------------------------------------------------------------------------


def looped(circuit):
    """Effects (variant, unit) by the definition: one run for each input, python arithmetic."""
    modules = dict(circuit.encoder.named_modules())

    def units(x):
        """For each unit the list of its values over positions."""
        seen = {}
        handles = [
            modules[s].register_forward_hook(lambda m, a, out, s=s: seen.update({s: out[0].clone()}))
            for s in circuit.sites
        ]
        circuit.encoder(x[None])
        for handle in handles:
            handle.remove()
        channels = [channel.flatten().tolist() for s in circuit.sites for channel in seen[s]]
        return channels if circuit.unit == "channel" else [[value] for values in channels for value in values]

    with torch.no_grad():
        base = [units(x) for x in circuit.base]
        result = np.zeros((len(circuit.variants), len(base[0])))
        for k, variant in enumerate(circuit.variants.values()):
            for before, after in zip(base, (units(x) for x in variant), strict=True):
                for u, (p, q) in enumerate(zip(before, after, strict=True)):
                    result[k, u] += sum(abs(a - b) for a, b in zip(p, q, strict=True)) / len(p) / len(base)
    for u in range(result.shape[1]):
        values = [v for sample in base for v in sample[u]]
        mean = math.fsum(values) / len(values)
        sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        assert sd > 0 or not result[:, u].any()
        result[:, u] /= sd or 1
    return result


def test_the_closed_form_is_what_the_network_does(circuit):
    np.testing.assert_allclose(circuit.effects, looped(circuit), rtol=1e-12, atol=0)
    assert circuit.effects.any(1).all()  # every variant moves something


def test_the_truth_never_runs_the_network():
    watch = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: pytest.fail("ran a module"))
    try:
        for circuit in planted.input_circuits():
            circuit.polysemanticity(), circuit.isolation()
    finally:
        watch.remove()


def test_what_the_circuits_show():
    poly = {name: circuit.polysemanticity() for name, circuit in CIRCUITS.items()}
    isolated = {name: circuit.isolation() for name, circuit in CIRCUITS.items()}
    for name in MONOSEMANTIC:
        assert poly[name].tolist() == [1, 1, 1] and isolated[name].tolist() == [0, 0, 0]
    assert poly["inputs_polysemantic"] == pytest.approx([3, 3, 2, 4 / 3**0.75, 1])
    assert isolated["inputs_leak"] == pytest.approx([0.2] * 3)
    assert poly["inputs_leak"] == pytest.approx([5 / 4**0.8] * 3)
    assert np.isnan(poly["inputs_dead"]).tolist() == [True, True, False]
    assert not CIRCUITS["inputs_dead"].effects[:, :2].any()
    assert poly["inputs_logic"] == pytest.approx([2, 2, 2, 1])
    # by hand: levels -3, -1, 1, 3 move by 3 on average, of sd sqrt(5); behind the ReLU 0, 0, 1, 3 by 1.5 of sqrt(1.5)
    relu = CIRCUITS["inputs_relu"]
    assert relu.effects[0, [0, 4]] == pytest.approx([3 / 5**0.5, 1.5**0.5])
    assert relu.effects[0, 3] > 0 and not relu.effects[:, 7].any() and np.isnan(poly["inputs_relu"][7])


def test_the_relu_is_off_for_half_of_the_inputs():
    circuit = CIRCUITS["inputs_relu"]
    on = (circuit.encoder(circuit.base) > 0).double().mean(0)
    assert on.tolist() == pytest.approx([1 / 2, 1 / 3, 1, 0])


def test_xor_is_correlated_with_no_factor():
    circuit = CIRCUITS["inputs_logic"]
    gates = circuit.encoder(circuit.base).detach()
    a, b, c = (circuit.base.double() @ torch.from_numpy(inputs.A_INVERSE).T).T
    expected = torch.stack([a * b, torch.maximum(a, b), (a - b).abs(), c], 1)
    assert torch.equal(gates, expected)
    assert float((gates[:, 2] - 0.5) @ (a - 0.5)) == 0


@pytest.mark.parametrize("name", ["inputs_monosemantic", "inputs_polysemantic", "inputs_leak", "inputs_logic"])
def test_a_variant_moves_one_factor_of_every_combination(name):
    circuit = CIRCUITS[name]
    factors = (circuit.base @ torch.from_numpy(inputs.A_INVERSE).T).tolist()
    assert len({tuple(v) for v in factors}) == len(factors) == math.prod(len({v[k] for v in factors}) for k in range(3))
    for k, x in enumerate(circuit.variants.values()):
        moved = x @ torch.from_numpy(inputs.A_INVERSE).T
        assert (moved != torch.tensor(factors).double()).any(0).tolist() == [k == j for j in range(3)]
        assert (moved[:, k] != torch.tensor(factors).double()[:, k]).all()


@pytest.mark.parametrize("name", ["inputs_conv_regions", "inputs_conv_parts", "inputs_conv_elements"])
def test_the_masks_are_those_of_mask_region(name):
    circuit = CIRCUITS[name]
    for mask, region in (inputs.BAND_MASKS | inputs.PART_MASKS).items():
        if mask in circuit.variants:
            assert torch.equal(mask_region(circuit.base, *region), circuit.variants[mask]), mask
    assert 0 <= circuit.base.min() and circuit.base.max() <= 1


def test_float32_holds_every_circuit_exactly(circuit):
    single = circuit.to(torch.float32)
    for name, value in circuit.encoder.state_dict().items():
        assert torch.equal(single.encoder.state_dict()[name].double(), value)
    for name, x in {"base": circuit.base, **circuit.variants}.items():
        y = single.base if name == "base" else single.variants[name]
        assert torch.equal(y.double(), x) and y.dtype == torch.float32 and x.dtype == torch.float64
    assert single.effects is circuit.effects


def test_names_differ_and_every_circuit_says_what_it_shows():
    assert len(CIRCUITS) == len(planted.input_circuits()) >= 9
    assert not CIRCUITS.keys() & {circuit.name for circuit in planted.all()}
    for circuit in CIRCUITS.values():
        assert circuit.shows.endswith(".") and len(circuit.shows) > 30
        assert len(circuit.target) == circuit.effects.shape[1]


# --- input_effects against the truth ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_input_effects_recovers_every_circuit(circuit, dtype):
    found = measured(circuit.to(dtype), replicates=0)
    rtol = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert found.tensor.dtype == dtype and found.variants == tuple(circuit.variants)
    np.testing.assert_allclose(found.tensor.double().numpy(), circuit.effects, rtol=rtol, atol=0)
    assert tuple(dict.fromkeys(found.sites)) == circuit.sites


def test_the_metrics_recover_every_circuit(circuit):
    found = measured(circuit, replicates=0).tensor
    np.testing.assert_allclose(polysemanticity(found).numpy(), circuit.polysemanticity(), rtol=1e-12)
    target = torch.from_numpy(circuit.target)
    np.testing.assert_allclose(isolation(found, target).numpy(), circuit.isolation(), rtol=1e-12, atol=1e-15)


def test_assignment_finds_the_planted_unit_of_each_factor():
    for name in MONOSEMANTIC + ("inputs_leak", "inputs_relu"):
        assert assignment(measured(CIRCUITS[name], replicates=0).tensor).tolist() == CIRCUITS[name].target.tolist()


# --- the score -------------------------------------------------------------------------------------------------------


def right(p):
    return measured(p, replicates=0).tensor


def test_score_is_zero_for_input_effects():
    table = planted.score_inputs(right)
    assert table["circuit"].tolist() == list(CIRCUITS)
    assert (table["max_error"] <= 1e-12 * table["largest"]).all() and (table["largest"] > 0.5).all()


def naive(p, reduce=lambda d: d.abs(), sd=lambda a: a.std(0, unbiased=False), rows=slice(None), copy=torch.clone):
    """Effects by hooks; its arguments are where mistakes can be planted."""
    seen = []
    modules = dict(p.encoder.named_modules())
    handles = [modules[s].register_forward_hook(lambda m, a, out: seen.append(copy(out))) for s in p.sites]
    with torch.no_grad():
        for x in [p.base, *p.variants.values()]:
            p.encoder(x[rows])
    for handle in handles:
        handle.remove()
    sites = len(p.sites)
    parts = []
    for site in range(sites):
        base, *variants = seen[site::sites]
        shape = (len(base), base.shape[1], -1) if p.unit == "channel" else (len(base), base[0].numel(), 1)
        base, variants = base.reshape(shape), [v.reshape(shape) for v in variants]
        spread = sd(base.movedim(1, 2).flatten(0, 1))
        change = torch.stack([reduce(v - base).mean((0, 2)).abs() for v in variants])
        parts.append(torch.where(spread > 0, change / spread, 0))
    return torch.cat(parts, 1)


MISTAKES = {
    "sample variance": lambda p: naive(p, sd=lambda a: a.std(0)),
    "no sd": lambda p: naive(p, sd=lambda a: torch.ones(a.shape[1])),
    "root mean square for sd": lambda p: naive(p, sd=lambda a: a.square().mean(0).sqrt()),
    "signed change": lambda p: naive(p, reduce=lambda d: d),
    "squared change": lambda p: naive(p, reduce=lambda d: d.square()),
    "a neighbour's row": lambda p: right(p).roll(1, 0),
    "a neighbour's unit": lambda p: right(p).roll(1, 1),
    "units backwards": lambda p: right(p).flip(1),
    "half of the inputs": lambda p: naive(p, rows=slice(0, len(p.base) // 2)),
    "scale": lambda p: right(p) * (1 + 1e-6),
    "read after the next layer overwrote it": lambda p: naive(p, copy=lambda out: out),
    "nothing": lambda p: torch.zeros(p.effects.shape),
}


def test_the_naive_method_is_right_without_a_mistake():
    assert (planted.score_inputs(naive)["max_error"] < 1e-12 * 40).all()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_score_notices(mistake):
    errors = planted.score_inputs(MISTAKES[mistake])["max_error"]
    assert errors.max() > (1e-7 if mistake == "scale" else 1e-2)
    assert np.isinf(planted.score_inputs(lambda p: MISTAKES[mistake](p) * math.nan)["max_error"]).all()


def test_score_refuses_a_wrong_shape():
    with pytest.raises(InputError, match=r"\(variant, unit\) \(3, 5\) for inputs_polysemantic, got \(5, 3\)"):
        planted.score_inputs(lambda p: p.effects.T)
