"""Planted mediators: their closed forms against networks run by hand, and mediation and path patching against them."""

import pytest
import torch

from vaecirc_fast import planted
from vaecirc_fast.interventions.mediation import TERMS, mediate
from vaecirc_fast.interventions.paths import MEASURES, path_patch

CIRCUITS = {circuit.name: circuit for circuit in planted.mediation_circuits()}


@pytest.fixture(params=CIRCUITS, name="circuit")
def _circuit(request):
    return CIRCUITS[request.param]


def test_the_total_effect_is_that_of_the_network(circuit):
    with torch.no_grad():
        change = circuit.module(circuit.source) - circuit.module(circuit.base)
    assert torch.equal(change.mean(1), torch.from_numpy(circuit.terms["te"]))
    assert bool(change.any())


def test_mediation_is_exact(circuit):
    M = mediate(circuit.module, circuit.base, circuit.source, circuit.mediator)
    assert M.per_sample is not None
    for term in TERMS:
        truth = torch.from_numpy(circuit.terms[term])
        assert torch.equal(M.per_sample[term], truth), term
        assert torch.equal(getattr(M, term), truth.mean()), term
    assert M.cut == {circuit.mediator: circuit.cut}


def test_paths_are_exact(circuit):
    Q = path_patch(circuit.module, circuit.base, circuit.source, circuit.path, per_sample=True)
    assert Q.per_sample is not None
    for measure in MEASURES:
        truth = torch.from_numpy(circuit.paths[measure])
        assert torch.equal(Q.per_sample[measure], truth), measure
        assert torch.equal(getattr(Q, measure), truth.mean(0)), measure
        assert torch.equal(Q.distances[measure], truth.abs().mean()), measure


def test_what_each_circuit_is_made_to_show():
    def terms(name):
        return {term: torch.from_numpy(t) for term, t in CIRCUITS[name].terms.items()}

    assert not terms("chain")["nde_pure"].any() and not terms("chain")["nde_total"].any() and CIRCUITS["chain"].cut
    assert not terms("off_path")["nie_pure"].any() and not terms("off_path")["nie_total"].any()
    assert not terms("two_paths")["interaction"].any() and terms("two_paths")["nie_pure"].all()
    assert terms("mediator_product")["interaction"].all()
    gate = terms("mediator_gate")
    assert not gate["nie_pure"].any() and torch.equal(gate["interaction"], gate["nie_total"])
    detour = CIRCUITS["detour"].paths
    assert detour["pse"].any() and detour["complement"].any()


def test_the_way_around_a_layer_is_told():
    circuit = CIRCUITS["detour"]
    Q = path_patch(circuit.module, circuit.base, circuit.source, "first[*] -> second[*] -> output")
    around = (circuit.source - circuit.base) @ circuit.module.first.weight.T @ circuit.module.around.weight.T
    assert torch.equal(Q.bypass["second[*]"], around.detach().mean(0)) and torch.equal(Q.complement, around.mean(0))
    assert torch.equal(Q.distances["bypass second[*]"], around.detach().abs().mean())
    assert "goes around second[*], which is no cut" in str(Q)
    chain = CIRCUITS["chain"]
    Q = path_patch(chain.module, chain.base, chain.source, "0[*] -> 1[*] -> output")
    assert Q.bypass == {} and not Q.complement.any() and "no cut" not in str(Q)


def test_float32_has_the_same_numbers(circuit):
    """Weights and inputs are small multiples of 1/8, so float32 rounds nothing either."""
    module = circuit.module.float()
    try:
        M = mediate(
            module, circuit.base.float(), circuit.source.float(), circuit.mediator, lambda y: y.double().mean(1)
        )
    finally:
        module.double()
    for term in TERMS:
        assert torch.equal(getattr(M, term), torch.from_numpy(circuit.terms[term]).mean()), term
