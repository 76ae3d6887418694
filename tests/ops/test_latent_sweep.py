"""The op latent_sweep: its reference against plain modules, gradients, transforms, precisions and bad input."""

import itertools
from dataclasses import replace

import pytest
import torch
from close import assert_close
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import _registry
from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops.latent_sweep import Dense, Network, TransposedConvolution, outputs
from vaecirc_fast.reference import latent_sweep as reference
from vaecirc_fast.reference.effect_reduction import KINDS

OP = torch.ops.vaecirc_fast.latent_sweep
REFERENCE = pytest.mark.usefixtures("on_reference")
B, L, J = 3, 4, 5


@pytest.fixture
def on_reference():
    with vf.backend("reference"):
        yield


def weight(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_network(dtype=torch.float64, link="identity", activation="tanh"):
    layers = (
        Dense(weight(7, L, seed=1, dtype=dtype), weight(7, seed=2, dtype=dtype), activation, 0.3),
        Dense(weight(6, 7, seed=3, dtype=dtype), None, activation, 0.3),
        Dense(weight(9, 6, seed=4, dtype=dtype), weight(9, seed=5, dtype=dtype)),
    )
    return Network(layers, link=link, spans=(2, 3, 4) if link == "softmax" else ())


def conv_network(dtype=torch.float64, link="sigmoid"):
    layers = (
        Dense(weight(12, L, seed=6, dtype=dtype), weight(12, seed=7, dtype=dtype), "relu"),
        TransposedConvolution(
            *(weight(2, 3, 3, 2, seed=8, dtype=dtype), weight(3, seed=9, dtype=dtype), "silu"),
            stride=(2, 1),
            padding=(1, 0),
            output_padding=(1, 0),
        ),
        TransposedConvolution(weight(3, 2, 2, 2, seed=10, dtype=dtype), None, stride=(2, 2)),
    )
    return Network(layers, grid=(2, 2, 3), crop=(7, 5), link=link)


NETWORKS = {"dense": dense_network, "convolution": conv_network}


def module_of(network):
    """The same decoder as torch modules."""
    parts = []
    for n, layer in enumerate(network.layers):
        made = layer.weight.shape[0 if isinstance(layer, Dense) else 1]
        if isinstance(layer, Dense):
            part = nn.Linear(layer.weight.shape[1], made, bias=layer.bias is not None)
        else:
            if n and isinstance(network.layers[n - 1], Dense):
                parts.append(nn.Unflatten(1, network.grid))
            geometry = (layer.weight.shape[2:], layer.stride, layer.padding, layer.output_padding)
            part = nn.ConvTranspose2d(layer.weight.shape[0], made, *geometry, bias=layer.bias is not None)
        part.to(layer.weight.dtype)
        with torch.no_grad():
            part.weight.copy_(layer.weight)
            if layer.bias is not None:
                part.bias.copy_(layer.bias)
        activation = {
            "identity": nn.Identity(),
            "relu": nn.ReLU(),
            "leaky_relu": nn.LeakyReLU(layer.slope),
            "elu": nn.ELU(layer.slope),
            "sigmoid": nn.Sigmoid(),
            "tanh": nn.Tanh(),
            "silu": nn.SiLU(),
        }[layer.activation]
        parts += [part, activation]
    return nn.Sequential(*parts)


def linked(y, network):
    if network.crop:
        y = y[..., : network.crop[0], : network.crop[1]]
    y = y.flatten(1)
    if network.link == "sigmoid":
        return y.sigmoid()
    if network.link == "softmax":
        return torch.cat([part.softmax(1) for part in y.split(network.spans, 1)], 1)
    return y


def problem(interventions=J, changes=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    latents = torch.randint(0, L, (interventions, changes), generator=generator)
    return weight(B, L, seed=12, dtype=dtype), latents, weight(B, interventions, changes, seed=13, dtype=dtype)


def partition(elements):
    labels = torch.randint(-1, 3, (elements,), generator=torch.Generator().manual_seed(elements))
    labels[:4] = torch.tensor([2, -1, 0, 1])
    return partitions.from_labels(labels)


def looped(z, latents, shifts, network, effect, groups):
    """By definition: a decoder call for each sample and intervention, and effect_reduction's formula by hand."""
    module = module_of(network)
    result = torch.zeros(len(z), len(latents), len(groups), dtype=torch.float64)
    with torch.no_grad():
        for b, j in itertools.product(range(len(z)), range(len(latents))):
            code = z[b].clone()
            for latent, shift in zip(latents[j], shifts[b, j], strict=True):
                code[latent] += shift
            y0, y = module(z[b : b + 1]), module(code[None])
            if effect == "logit_mse":
                y0, y = linked(y0, replace(network, link="identity")), linked(y, replace(network, link="identity"))
            else:
                y0, y = linked(y0, network), linked(y, network)
            for g in range(len(groups)):
                d = (y - y0)[0, groups.labels == g]
                result[b, j, g] = {
                    "l1": d.abs().mean(),
                    "mse": d.square().mean(),
                    "rms": d.square().mean().sqrt(),
                    "logit_mse": d.square().mean(),
                    "tv": d.abs().sum() / 2,
                    "signed": d.mean(),
                }[effect]
    return result


@REFERENCE
@pytest.mark.parametrize("changes", [1, 2])
@pytest.mark.parametrize(
    ("net", "link"), [("dense", "identity"), ("dense", "softmax"), ("dense", "sigmoid"), ("convolution", "sigmoid")]
)
def test_values(net, link, changes):
    network = NETWORKS[net](link=link)
    z, latents, shifts = problem(changes=changes)
    elements = outputs(network, z).shape[1]
    groups = partition(elements)
    names = [kind for kind in KINDS if kind != "logit_mse" or link != "identity"]
    all_of_them = vf.ops.latent_sweep(z, latents, shifts, network, names, groups=groups)
    assert all_of_them.shape == (B, J, len(names), 3)
    for n, name in enumerate(names):
        one = vf.ops.latent_sweep(z, latents, shifts, network, name, groups=groups)
        assert torch.equal(one, all_of_them[:, :, n])
        truth = looped(z, latents, shifts, network, name, groups)
        assert truth.abs().min() > 0
        # the truth here is float64 as well: two orders of additions
        assert_close(one, truth, truth, terms=64, unit=torch.full_like(truth, 4 * float(truth.abs().max()) + 4))


@REFERENCE
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation):
    network = dense_network(activation=activation)
    codes = weight(6, L, seed=20)
    assert torch.allclose(outputs(network, codes), module_of(network)(codes), rtol=1e-14, atol=1e-14)


@REFERENCE
def test_no_shift_no_effect_and_empty_problems():
    network = conv_network()
    z, latents, shifts = problem()
    # torch's products of few rows and of many may differ by a rounding
    assert vf.ops.latent_sweep(z, latents, torch.zeros_like(shifts), network).abs().max() < torch.finfo(z.dtype).eps
    assert vf.ops.latent_sweep(z[:0], latents, shifts[:0], network).shape == (0, J, 1)
    assert vf.ops.latent_sweep(z, latents[:0], shifts[:, :0], network).shape == (B, 0, 1)


@REFERENCE
@pytest.mark.parametrize("net", NETWORKS)
def test_gradients(net):
    network = NETWORKS[net]()
    z, latents, shifts = problem(changes=2)
    groups = partition(outputs(network, z).shape[1])
    tensors = [layer.weight for layer in network.layers] + [network.layers[0].bias]

    def effects(z, shifts, *tensors):
        layers = [replace(layer, weight=w) for layer, w in zip(network.layers, tensors, strict=False)]
        layers[0] = replace(layers[0], bias=tensors[-1])
        changed = replace(network, layers=tuple(layers))
        names = ["l1", "rms", "mse"] if network.link == "identity" else ["l1", "logit_mse"]
        return vf.ops.latent_sweep(z, latents, shifts, changed, names, groups=groups)

    inputs = [t.requires_grad_() for t in (z, shifts, *tensors)]
    assert torch.autograd.gradcheck(effects, inputs)
    (first,) = torch.autograd.grad(effects(*inputs).sum(), [inputs[2]])
    before = reference.BACKWARD_BYTES
    try:
        reference.BACKWARD_BYTES = 1  # one row at a time
        (tiled,) = torch.autograd.grad(effects(*inputs).sum(), [inputs[2]])
    finally:
        reference.BACKWARD_BYTES = before
    assert torch.allclose(first, tiled, rtol=1e-12, atol=1e-12)


def arguments(network, z, latents, shifts):
    """What the registered op takes."""
    seen = []

    class Stop(Exception):
        pass

    def catch(*given):
        seen.extend(given)
        raise Stop

    original = vf.ops.latent_sweep.__globals__["_forward"]
    vf.ops.latent_sweep.__globals__["_forward"] = catch
    try:
        vf.ops.latent_sweep(z, latents, shifts, network, ["l1", "rms"], groups=partition(outputs(network, z).shape[1]))
    except Stop:
        return tuple(seen)
    finally:
        vf.ops.latent_sweep.__globals__["_forward"] = original


@REFERENCE
@pytest.mark.parametrize("net", NETWORKS)
def test_opcheck(net):
    z, latents, shifts, weights, biases, *rest = arguments(NETWORKS[net](), *problem())
    z.requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    torch.library.opcheck(OP.default, (z, latents, shifts, weights, biases, *rest))


@REFERENCE
def test_compiled_and_vmapped():
    network, (z, latents, shifts) = dense_network(), problem()
    groups = partition(9)

    def effects(z):
        return vf.ops.latent_sweep(z, latents, shifts, network, "l1", groups=groups)

    compiled = torch.compile(effects, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z), effects(z))
    batch = torch.stack([z, -z])
    mapped = torch.vmap(effects)(batch)
    assert torch.equal(mapped, torch.stack([effects(z), effects(-z)]))


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bf16", 7)])
def test_rounding_of_operands(precision, bits):
    """To nearest, ties to even, and the gradient passes."""
    number = reference.PRECISIONS.index(precision)
    step = 2.0**-bits
    values = torch.tensor([1, 1 + step / 2, 1 + 1.5 * step, 1 + step / 4, -1 - 0.75 * step, 0.0, torch.inf, torch.nan])
    expected = torch.tensor([1, 1, 1 + 2 * step, 1, -1 - step, 0.0, torch.inf, torch.nan])
    assert torch.equal(reference.rounded(values, number).nan_to_num(7), expected.nan_to_num(7))
    x = torch.randn(50, requires_grad=True)
    near = reference.rounded(x, number)
    assert (near / x - 1).abs().max() <= step / 2
    (gradient,) = torch.autograd.grad(near.sum(), x)
    assert torch.equal(gradient, torch.ones(50))


def test_lower_precision_stays_near_and_no_kernel_hides_it():
    network, (z, latents, shifts) = dense_network(torch.float32), problem(dtype=torch.float32)
    exact = vf.ops.latent_sweep(z, latents, shifts, network)
    for precision, error in (("tf32", 2**-8), ("bf16", 2**-5)):
        near = vf.ops.latent_sweep(z, latents, shifts, network, precision=precision)
        assert 0 < (near - exact).abs().max() < error * exact.abs().max()
        with vf.backend("cpp"), pytest.raises(BackendError, match=f"has no {precision}"):
            vf.ops.latent_sweep(z, latents, shifts, network, precision=precision)


def test_multiplications():
    assert dense_network().multiplications() == [28, 42, 54]
    # 2 x 3 pixels into 3 x 2 kernels of 2 x 3 channels, then (2*2 - 2 + 3 + 1) x (3 + 1) pixels
    assert conv_network().multiplications() == [48, 6 * 36, 4 * 4 * 24]


def changed(network, n, **fields):
    layers = list(network.layers)
    layers[n] = replace(layers[n], **fields)
    return replace(network, layers=tuple(layers))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (replace(dense_network(), layers=()), "first layer must be Dense"),
        (changed(dense_network(), 1, weight=weight(6, 5)), "layer 1 takes 5 inputs, but layer 0 gives 7"),
        (changed(dense_network(), 0, bias=weight(3)), r"layer 0 has a bias \(3,\) for 7 outputs"),
        (changed(dense_network(), 0, activation="gelu"), "activation 'gelu' is unknown"),
        (changed(dense_network(), 2, activation="relu"), "its last layer has an activation"),
        (replace(dense_network(), link="probit"), "link 'probit' is unknown"),
        (replace(dense_network(), link="softmax", spans=(3, 4)), r"spans \(3, 4\) do not cover the 9 elements"),
        (replace(conv_network(), grid=(3, 2, 3)), r"grid \(3, 2, 3\) does not hold the 12 outputs"),
        (replace(conv_network(), grid=None), "grid None does not hold"),
        (replace(conv_network(), crop=(9, 5)), r"crop \(9, 5\) does not fit"),
        (changed(conv_network(), 1, padding=(4, 0)), "layer 1 would make a grid of"),
        (changed(conv_network(), 2, weight=weight(4, 2)), "layer 2 has a weight of shape"),
        (changed(dense_network(), 1, weight=weight(6, 7, dtype=torch.float32)), "layer 1 is torch.float32, but z is"),
    ],
)
def test_bad_networks(network, message):
    with pytest.raises(InputError, match=message):
        vf.ops.latent_sweep(*problem(), network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(B, L + 1)}, r"z: expected floats of shape \(B, 4\), got torch.float32 \(3, 5\)"),
        ({"z": torch.ones(B, L, dtype=torch.int64)}, "z: expected floats"),
        ({"latents": torch.ones(J)}, r"latents: expected int64 of shape \(J, K\), K > 0, got torch.float32 \(5,\)"),
        ({"latents": torch.full((J, 1), L)}, "latents: expected numbers of 0..3, got 4..4"),
        ({"latents": torch.full((J, 1), -1)}, "latents: expected numbers of 0..3, got -1..-1"),
        ({"shifts": torch.ones(B, J, 2).double()}, r"shifts: expected torch.float64 of shape \(3, 5, 1\)"),
        ({"shifts": torch.ones(B, J, 1)}, "shifts: expected torch.float64"),
        ({"effect": "l2"}, "effect: 'l2' is unknown"),
        ({"effect": ["l1", "l1"]}, "effect: 'l1' is unknown or given twice"),
        ({"effect": []}, "effect: expected at least one name"),
        ({"effect": "logit_mse"}, '"logit_mse" is taken before the link'),
        ({"precision": "fp8"}, "precision: 'fp8' is unknown; known: float32, tf32, bf16"),
        ({"groups": partitions.whole(8)}, "groups: partition 8 elements, but an output has 9"),
    ],
)
def test_bad_arguments(change, message):
    z, latents, shifts = problem()
    given = {"z": z, "latents": latents, "shifts": shifts, "network": dense_network(), **change}
    with pytest.raises(InputError, match=message):
        vf.ops.latent_sweep(**given)


def test_the_row_says_what_it_can():
    row = _registry.rows["latent_sweep"]
    assert row.why_not("reference", "cpu", torch.float64) is None
    assert isinstance(row.cells["cuda"], _registry.Absent)
