"""What is read off a decoder's one call: its layers, or why the kernels cannot stand for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import models, planted
from vaecirc_fast.interventions.networks import record
from vaecirc_fast.ops.latent_sweep import outputs

L = 4
W, V = (torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate([(L, 7), (7, 6)]))


def with_statistics(module):
    """In eval mode, batch norm's statistics far from their start."""
    torch.manual_seed(0)
    module.train()
    for _ in range(3):
        module(3 * torch.randn(30, L) + 1)
    return module.eval()


def inline(z):
    """Weights in a function, all products written out."""
    return torch.softmax(torch.tanh(z @ W + torch.ones(7)) @ V, dim=-1)


class Columns(nn.Module):
    """Softmaxes of a table's columns."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(L, 9)

    def forward(self, z):
        return torch.cat([part.softmax(1) for part in self.fc(z).split([2, 4, 3], dim=1)], 1)


def images(**options):
    torch.manual_seed(1)
    return models.build("vae", latents=L, **options).eval()


KNOWN = {
    "conv": lambda: images(shape=(1, 16, 16), width=0.25).decoder,
    "conv, cropped, gaussian": lambda: images(shape=(3, 12, 20), width=0.25, likelihood="gaussian").decoder,
    "mlp": lambda: images(shape=(1, 8, 8), net="mlp", width=0.25).decoder,
    "bound method": lambda: images(shape=(1, 8, 8), net="mlp", width=0.25).decode,
    "logits": lambda: images(shape=(1, 16, 16), width=0.25).decoder.logits,
    "function": lambda: inline,
    "columns": Columns,
    "one layer": lambda: nn.Linear(L, 3, bias=False),
    "batch norm, dropout, plain convolution": lambda: with_statistics(
        nn.Sequential(
            *(nn.Linear(L, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(), nn.Linear(8, 32, bias=False)),
            *(nn.ELU(1.5), nn.Unflatten(1, (2, 4, 4)), nn.ConvTranspose2d(2, 3, 3, 2, 1, 1, bias=False)),
            *(nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Sigmoid()),
        )
    ),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(L, 5), nn.Tanh(), nn.Linear(5, 3)), backend="eager"),
}


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_layers_are_read_off(name):
    decoder = KNOWN[name]()
    recorded = record(decoder, torch.zeros(1, L))
    assert recorded.network is not None, recorded.reason
    codes = torch.randn(6, L, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(outputs(recorded.network, codes), decoder(codes).flatten(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(recorded.output, decoder(torch.zeros(1, L)))


@torch.no_grad()
def test_what_is_read_off():
    network = record(KNOWN["conv, cropped, gaussian"](), torch.zeros(1, L)).network
    assert (network.grid, network.crop, network.link) == ((16, 2, 3), (12, 20), "identity")
    assert [layer.activation for layer in network.layers][-2:] == ["relu", "identity"]
    assert record(Columns(), torch.zeros(1, L)).network.spans == (2, 4, 3)
    folded = record(KNOWN["batch norm, dropout, plain convolution"](), torch.zeros(1, L)).network
    assert [layer.slope for layer in folded.layers][:2] == [0.2, 1.5] and folded.link == "sigmoid"
    decoder = KNOWN["mlp"]()
    assert record(decoder, torch.zeros(1, L)).network.layers[0].weight.data_ptr() == decoder.fc1.weight.data_ptr()


@pytest.mark.parametrize("circuit", planted.all(), ids=lambda circuit: circuit.name)
@torch.no_grad()
def test_planted_circuits_are_known(circuit):
    network = record(circuit.decoder, circuit.z[:1]).network
    assert (network is None) == (circuit.name == "product")  # of two latents, which no layer makes
    if network is None:
        return
    assert torch.allclose(outputs(network, circuit.z), circuit.decoder(circuit.z).flatten(1), rtol=1e-12, atol=1e-12)


class Hooked(nn.Sequential):
    def __init__(self, register):
        super().__init__(nn.Linear(L, 3))
        getattr(self[0], register)(lambda *_: None)


UNKNOWN = {
    "residual": (lambda z: z @ W + torch.relu(z @ W), "branches off the chain"),
    "codes twice": (lambda z: z @ W + z.sum(), "branches off the chain"),
    "depends on values": (lambda z: (z @ W) * (2 if (z > 0).any() else 1), "branches off the chain"),
    "scaled": (lambda z: 2 * (z @ W), "mul.Tensor is no layer"),
    "clamped, though within bounds": (lambda z: (z @ W).clamp(-50, 50) @ V, "clamp.default is no layer"),
    "transposed": (lambda z: (z @ V.new_ones(L, 6)).view(-1, 2, 3).transpose(1, 2), "transpose.int is no layer"),
    "every other": (lambda z: (z @ W)[:, ::2], "slice.Tensor is no layer"),
    "activation first": (lambda z: torch.relu(z) @ W, "relu comes before the first layer"),
    "two activations": (lambda z: torch.tanh(torch.relu(z @ W)), "tanh follows relu"),
    "ends with tanh": (lambda z: torch.tanh(z @ W), "its last layer has an activation"),
    "after the link": (lambda z: torch.softmax(z @ W, 1) @ V, "follows the softmax"),
    "softmax over rows": (lambda z: torch.softmax(z @ W, 0), "softmax is not over the elements"),
    "half a softmax": (
        lambda z: torch.cat([p.softmax(1) if n else p for n, p in enumerate((z @ W).split([3, 4], 1))], 1),
        "some columns of a row have a softmax",
    ),
    "pieces in another order": (
        lambda z: torch.cat([p.softmax(1) for p in (z @ W).split([3, 4], 1)][::-1], 1),
        "takes a row apart",
    ),
    "constant": (lambda z: torch.ones(len(z), 3), "the output is not the end"),
    "identity": (lambda z: z, "there is no layer"),
    "grouped convolution": (
        nn.Sequential(nn.Linear(L, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 2, 2, groups=2)),
        "groups or dilation",
    ),
    "dilated convolution": (
        nn.Sequential(nn.Linear(L, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 2, 2, dilation=2)),
        "groups or dilation",
    ),
    "strided convolution": (
        nn.Sequential(nn.Linear(L, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 2, stride=2)),
        "a convolution has a stride",
    ),
    "upsampled": (
        nn.Sequential(nn.Linear(L, 16), nn.Unflatten(1, (1, 4, 4)), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3)),
        "is no layer",
    ),
    "dense behind convolution": (
        nn.Sequential(
            nn.Linear(L, 4), nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 2), nn.Flatten(), nn.Linear(9, 2)
        ),
        "is no linear layer on a row",
    ),
    "layer norm": (nn.Sequential(nn.Linear(L, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "native_layer_norm"),
    "batch norm after an activation": (
        nn.Sequential(nn.Linear(L, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval(),
        "batch norm does not follow a layer directly",
    ),
    "hooks": (Hooked("register_forward_hook"), "0 has hooks, which must fire"),
    "pre-hooks": (Hooked("register_forward_pre_hook"), "0 has hooks, which must fire"),
    "half precision": (lambda z: z @ W.bfloat16(), "codes are torch.bfloat16"),
}


@pytest.mark.parametrize("name", UNKNOWN)
@torch.no_grad()
def test_what_is_not_such_a_network_says_why(name):
    decoder, reason = UNKNOWN[name]
    dtype = torch.bfloat16 if name == "half precision" else torch.float32
    recorded = record(decoder, torch.full((1, L), 0.5, dtype=dtype))
    assert recorded.network is None and reason in recorded.reason


@torch.no_grad()
def test_autocast_and_global_hooks_are_left_alone():
    decoder = nn.Linear(L, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert record(decoder, torch.zeros(1, L)).reason == "autocast is on"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert record(decoder, torch.zeros(1, L)).reason == "global module hooks are set"
    finally:
        handle.remove()
    assert record(decoder, torch.zeros(1, L)).network is not None


def test_with_gradients_and_in_inference_mode():
    decoder = nn.Sequential(nn.Linear(L, 5), nn.ReLU(), nn.Linear(5, 2))
    assert record(decoder, torch.zeros(1, L, requires_grad=True)).network is not None
    with torch.inference_mode():
        assert record(decoder, torch.zeros(1, L)).network is not None


def test_a_module_of_its_own_forward_is_read_as_it_runs():
    """An instance's own forward replaces the class's; the operations tell."""
    decoder = nn.Linear(L, 3)
    decoder.forward = lambda z: F.linear(z, decoder.weight, 2 * decoder.bias)
    with torch.no_grad():
        network = record(decoder, torch.zeros(1, L)).network
    assert network is not None and torch.equal(network.layers[0].bias, 2 * decoder.bias)


def test_hooks_fire_in_a_sweep():
    decoder, rows = nn.Sequential(nn.Linear(L, 5), nn.ReLU(), nn.Linear(5, 2)), []
    decoder[1].register_forward_hook(lambda module, args, out: (rows.append(len(out)), 2 * out)[1])
    z = torch.randn(3, L)
    E = vf.latent_sweep(decoder, z)
    assert sum(rows) == 1 + 3 + 3 * L * 10 and "hooks, which must fire" in E.plan
    twice = nn.Sequential(decoder[0], nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        twice[2].weight.copy_(2 * decoder[2].weight)
        twice[2].bias.copy_(decoder[2].bias)
    assert torch.allclose(E.tensor, vf.latent_sweep(twice, z, engine="fused").tensor, rtol=1e-5)
