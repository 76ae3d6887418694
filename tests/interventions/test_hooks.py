"""What a user put on a module stays and works: hooks of every kind fire on every row, and nothing is left changed."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

import vaecirc_fast as vf
from vaecirc_fast.interventions import Codes, latent_interactions, latent_sweep

L, N = 4, 3
ROWS = 1 + N + N * L * 10  # one to look at, the bases, the interventions


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(L, 8), nn.ReLU(), nn.Linear(8, 6))


def codes():
    return torch.randn(N, L, generator=torch.Generator().manual_seed(4))


HOOKS = {
    "forward": lambda module, count: module.register_forward_hook(lambda m, args, out: count(args[0])),
    "forward with kwargs": lambda module, count: module.register_forward_hook(
        lambda m, args, kwargs, out: count(args[0]), with_kwargs=True
    ),
    "forward, always": lambda module, count: module.register_forward_hook(
        lambda m, args, out: count(args[0]), always_call=True
    ),
    "pre": lambda module, count: module.register_forward_pre_hook(lambda m, args: count(args[0])),
    "pre with kwargs": lambda module, count: module.register_forward_pre_hook(
        lambda m, args, kwargs: count(args[0]), with_kwargs=True
    ),
    "global forward": lambda module, count: modules.register_module_forward_hook(
        lambda m, args, out: count(args[0]) if m is module else None
    ),
    "global pre": lambda module, count: modules.register_module_forward_pre_hook(
        lambda m, args: count(args[0]) if m is module else None
    ),
}


class Holder:
    """Calls a module that is no submodule of anything."""

    def __init__(self, net):
        self.net = net

    def __call__(self, z):
        return self.net(z)

    def decode(self, z):
        return self.net(z)


CALLS = {
    "module": lambda net: net,
    "submodule": lambda net: nn.Sequential(nn.Identity(), net),
    "bound method": lambda net: net.forward,
    "function": lambda net: lambda z: net(z),
    "partial": lambda net: functools.partial(lambda net, z: net(z), net),
    "object": lambda net: Holder(net),
    "method of an object": lambda net: Holder(net).decode,
}


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_fire_on_every_row(kind, call, where):
    net, z = network(), codes()
    expected = latent_sweep(net, z, engine="generic")
    rows = []
    handle = HOOKS[kind](net[where], lambda x: rows.append(len(x)))
    try:
        E = latent_sweep(CALLS[call](net), z)
        assert sum(rows) == ROWS and "hooks" in E.plan and E.plan.startswith("generic engine")
        assert torch.allclose(E.tensor, expected.tensor, rtol=1e-5, atol=1e-7)
        rows.clear()
        latent_interactions(CALLS[call](net), z, grid=torch.tensor([1.0]))
        assert sum(rows) == 1 + N * (1 + L + 6)
    finally:
        handle.remove()
    assert "fused engine" in latent_sweep(CALLS[call](net), z).plan and not modules._has_any_global_hook()


@pytest.mark.parametrize("call", CALLS)
def test_a_hook_may_change_what_passes(call):
    net, z = network(), codes()
    with torch.no_grad():
        doubled = network()
        doubled[2].weight.mul_(2)
    net[1].register_forward_hook(lambda module, args, out: 2 * out)
    E = latent_sweep(CALLS[call](net), z)
    assert torch.allclose(E.tensor, latent_sweep(doubled, z).tensor, rtol=1e-5)


def test_hooks_fire_in_a_sweep_over_codes():
    circuit = vf.planted.codebooks()[0]
    rows = []
    circuit.decoder.relu.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    E = vf.code_sweep(circuit.decoder, Codes(circuit.indices, circuit.z_e, circuit.z_q), circuit.codebook)
    assert sum(rows) == 1 + 9 + 9 * 4 * 4 and E.tensor.any()


# --- what is put back ------------------------------------------------------------------------------------------------


class Image(nn.Sequential):
    """Transposed convolutions that fail at the n-th call of their last layer."""

    def __init__(self, error=None, at=0):
        super().__init__(
            nn.Linear(L, 16),
            nn.Unflatten(1, (4, 2, 2)),
            nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
            nn.BatchNorm2d(6).eval(),
            nn.Conv2d(6, 3, 3),
        )
        self.error, self.at, self.calls = error, at, 0
        self[4].weight.requires_grad_(False)

    def forward(self, z):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("stopped")
        return super().forward(z)


def state(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (
        [(name, id(t), t.data_ptr(), t.stride(), t.requires_grad, t.tolist()) for name, t in tensors],
        [(name, m.training) for name, m in module.named_modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        modules._has_any_global_hook(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


def latents_of(net):
    return latent_sweep(net, codes(), tile=7, engine="generic")


def pairs_of(net):
    return latent_interactions(net, codes(), tile=7)


def codes_of(net):
    book = torch.randn(5, L, generator=torch.Generator().manual_seed(5))
    indices = torch.tensor([0, 3, 4])
    return vf.code_sweep(net, Codes(indices, book[indices], book[indices]), book)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("sweep", [latents_of, pairs_of, codes_of])
def test_a_module_is_put_back_whatever_stops_the_sweep(sweep, error, layout):
    for at in (1, 2, 3):
        net = Image(error, at if error else 0).to(memory_format=layout)
        before = state(net)
        if error is None:
            assert sweep(net).tensor.any()
        else:
            with pytest.raises(error, match="stopped"):
                sweep(net)
            assert net.calls == at
        assert state(net) == before
