"""Activation patching on the planted circuits: what a unit does that takes its value from another sample."""

import numpy as np
import pytest
import torch
from close import assert_close
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import planted
from vaecirc_fast.planted.circuit import REDUCTIONS

CIRCUITS = {circuit.name: circuit for circuit in planted.all()}


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("effect", ["l1", "mse", "signed"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_latents_patched_at_the_input_do_what_is_planted(name, effect, tile):
    """Unit i of the decoder's input takes z_i of the next sample: the closed form of a shift by the difference."""
    circuit = CIRCUITS[name]
    source = circuit.z.roll(1, 0)
    module = nn.Sequential(nn.Identity(), circuit.decoder)  # a site even where the decoder is one bare layer
    P = vf.wrap(module).patch_sweep(
        circuit.z, source, ["0"], unit="element", effect=effect, groups=circuit.groups, tile=tile
    )
    shifts, labels = (source - circuit.z).numpy(), circuit.groups.labels.numpy()
    truth = torch.zeros(circuit.z.shape[1], len(circuit.groups), dtype=torch.float64)
    for i in range(circuit.z.shape[1]):
        dy = circuit.change(circuit.z.numpy(), i, shifts[:, i : i + 1])[:, 0]
        for g in range(len(circuit.groups)):
            truth[i, g] = float(REDUCTIONS[effect](dy[:, labels == g]).mean())
    largest = 1 + float(np.abs(circuit.decoder(circuit.z).detach().numpy()).max()) + float(truth.abs().max())
    unit = torch.full_like(truth, largest * (largest if effect == "mse" else 1))
    assert P.units == tuple(range(circuit.z.shape[1]))
    assert_close(P.tensor, truth.to(P.tensor), truth, terms=256, unit=unit)


@pytest.mark.parametrize("name", [c.name for c in planted.mediation_circuits()])
def test_a_joint_patch_of_a_mediator_is_its_pure_indirect_effect(name):
    """x0's run with M(x1) in place of M(x0) is what the pure NIE compares with x0's run."""
    circuit = next(c for c in planted.mediation_circuits() if c.name == name)
    wrapped, site = vf.wrap(circuit.module), circuit.mediator.split("[")[0]
    _, cache = wrapped.run_with_cache(circuit.source, [site])
    whole = circuit.mediator.replace("[*]", "")
    with torch.no_grad():
        change = wrapped.patch(circuit.base, {whole: cache}) - circuit.module(circuit.base)
    assert torch.equal(change.mean(1), torch.from_numpy(circuit.terms["nie_pure"]))
