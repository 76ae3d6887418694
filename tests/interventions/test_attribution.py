"""Attribution patching: exact where the module is linear behind a site, its error stated where it is not."""

import pytest
import torch
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import attribute, patch_sweep


def linear_behind(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 4)).to(dtype)


def pairs(rows=6, width=5):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("outcome", [None, lambda y: y[:, 1] - y[:, 3]])
@pytest.mark.parametrize("tile", [None, 2])
def test_exact_where_all_behind_is_linear(outcome, tile):
    module, (base, source) = linear_behind(), pairs()
    A = attribute(module, base, source, ["1", "2", "3.input"], outcome=outcome, exact=100, tile=tile)
    assert len(A.units) == 7 + 6 + 6 and not A.exact.isnan().any()
    assert torch.allclose(A.tensor, A.exact, rtol=1e-5, atol=1e-8) and A.error < 1e-5
    assert A.exact.abs().min() > 0


@pytest.mark.parametrize("seed", range(4))
def test_only_the_drawn_units_are_computed_exactly(seed):
    module, (base, source) = linear_behind(), pairs()
    A = attribute(module, base, source, ["1", "2", "3"], exact=4, seed=seed)
    known = ~A.exact.isnan()
    assert int(known.sum()) == 4 and torch.allclose(A.tensor[known], A.exact[known], rtol=1e-5, atol=1e-8)


def test_against_the_formula():
    """Gradient times change, by autograd of the written-out network."""
    module, (base, source) = linear_behind(), pairs()
    a = module[0](base).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module[1:](a).mean(1).sum(), a)
    expected = (gradient * (module[0](source) - a)).detach().mean(0)
    A = attribute(module, base, source, ["0"], exact=3, seed=2)
    assert torch.allclose(A.tensor, expected, rtol=1e-12)
    assert int((~A.exact.isnan()).sum()) == 3 and A.error > 0.01 and "on 3 of them, exact too" in A.plan
    swept = patch_sweep(module, base, source, ["0"], effect="signed").tensor[:, 0]
    known = ~A.exact.isnan()
    assert torch.allclose(A.exact[known], swept.double()[known], rtol=1e-5)


def test_images_in_place_activations_and_restored_state():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)).double().train()
    base, source = (torch.randn(4, 2, 5, 5, dtype=torch.float64) for _ in range(2))
    A = vf.wrap(module).attribute(base, source, ["0", "2"], exact=5)
    a = module[0](base).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module[2](torch.relu(a)).flatten(1).mean(1).sum(), a)
    expected = (gradient * (module[0](source) - a)).detach().sum((2, 3)).mean(0)
    assert torch.allclose(A.tensor[:3], expected, rtol=1e-9)
    assert torch.allclose(A.tensor[3:], A.exact[3:], rtol=1e-5)
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    top = A.top(2)
    assert list(top.columns) == ["site", "unit", "attribution", "exact"] and len(A.to_dataframe()) == 5
    assert abs(top.attribution[0]) >= abs(top.attribution[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["7"]}, "nothing matches '7'"),
        ({"x_source": torch.randn(3, 5).double()}, "x_source: has 3 rows, x_base 6"),
        ({"outcome": lambda y: y}, r"outcome: expected \(rows,\) for an output"),
        ({"outcome": lambda y: 1.0}, "outcome: expected .* got float"),
        ({"exact": -1}, "exact: expected an integer of at least 0"),
        ({"unit": "cell"}, "have no cells"),
    ],
)
def test_bad_input(options, message):
    base, source = pairs()
    given = {"x_base": base, "x_source": source, "sites": ["0"], **options}
    with pytest.raises(InputError, match=message):
        attribute(linear_behind(), **given)
