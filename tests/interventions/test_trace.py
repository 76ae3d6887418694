"""Traces: a site's value is its own, as a hook's is, and the steps between values."""

import pytest
import torch
from close import assert_close
from torch import nn

from vaecirc_fast.interventions.passes import Passes, value_at
from vaecirc_fast.interventions.patch_sweeps import patch_sweep
from vaecirc_fast.interventions.patching import patch, run_with_cache


class Around(nn.Module):
    """A residual sum around a module that passes its input on, and around one whose input is a site."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop, self.f = nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = self.fc(x)
        return self.f(self.drop(h)).tanh() + h[:, :3]


@pytest.mark.parametrize("site", ["drop", "drop.input", "f.input", "fc", "fc.input"])
def test_patching_a_site_leaves_what_goes_around_it(site):
    module, base, source = Around().eval(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    swept = patch_sweep(module, base, source, [site], effect="l1")
    _, cache = run_with_cache(module, source, [site])
    plain = module(base)
    patched = [patch(module, base, {f"{site}[{unit}]": cache}) for unit in range(4)]
    truth = torch.stack([(y - plain).detach().abs().mean() for y in patched])
    assert_close(swept.tensor[:, 0], truth.float(), truth, terms=20)


def test_the_steps_between_two_values_give_the_second_and_nothing_else():
    module, x = Around().eval(), torch.randn(5, 4).double()
    traced = Passes(module, (x,), 5, None).trace(slice(0, 5), 1, ["fc", "drop", "f"])
    fc, drop, f = (value_at(traced.places[name].outputs, name) for name in ("fc", "drop", "f"))
    with torch.no_grad():
        values = traced.everything().run({traced.inputs[0]: x}, {fc, drop, f})
        found = traced.between([fc], f).run({fc: values[fc] + 1}, {f})
        assert torch.equal(found[f], module.f(values[fc] + 1)) and traced.output not in found
    assert not traced.between([f], fc).chosen and not traced.between([fc], fc).chosen
    assert traced.output in traced.reached([fc], [drop]) and f not in traced.reached([fc], [drop])
    assert traced.output in traced.reached([drop]) and fc not in traced.reached([drop])
