"""Shapes, module names and padding of the encoders and decoders."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.models.networks import stages

SIZES = [(8, 8), (12, 12), (28, 28), (32, 32), (48, 64), (64, 64), (96, 96)]


def check_shapes(shape, net, latents=3, width=0.25):
    torch.manual_seed(0)  # at each of hypothesis' examples
    model = models.build("vae", shape, latents, net=net, width=width)
    x = torch.rand(2, *shape)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (2, latents)
    y = model.decode(mu)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    assert model(x).shape == x.shape
    assert model.decoder.logits(mu).shape == x.shape
    assert model.encode(model.example_input())[0].shape == (1, latents)
    terms = model.loss(x)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shapes(size, channels, net):
    check_shapes((channels, *size), net)


@settings(max_examples=8, deadline=None)
@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from([1, 3, 4]))
def test_any_size(height, width, channels):
    check_shapes((channels, height, width), "conv")


@given(st.integers(8, 5000))
def test_stages_halve_until_four(side):
    n, expected = side, 0
    while n > 4:
        n, expected = -(-n // 2), expected + 1
    assert stages(side, 8) == expected


def modules(model):
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def test_pinned_conv_names_and_sizes():
    m = modules(models.build("vae", (1, 64, 64), 10))
    assert list(m) == [
        *("encoder.conv1", "encoder.conv2", "encoder.conv3", "encoder.conv4", "encoder.fc", "encoder.mu"),
        *("encoder.logvar", "decoder.fc1", "decoder.fc2", "decoder.ct1", "decoder.ct2", "decoder.ct3", "decoder.ct4"),
    ]
    convolutions = {
        name: (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0])
        for name, c in m.items()
        if hasattr(c, "kernel_size")
    }
    assert convolutions == {
        "encoder.conv1": (1, 32, 4, 2, 1),
        "encoder.conv2": (32, 32, 4, 2, 1),
        "encoder.conv3": (32, 64, 2, 2, 0),
        "encoder.conv4": (64, 64, 2, 2, 0),
        "decoder.ct1": (64, 64, 4, 2, 1),
        "decoder.ct2": (64, 32, 4, 2, 1),
        "decoder.ct3": (32, 32, 4, 2, 1),
        "decoder.ct4": (32, 1, 4, 2, 1),
    }
    linear = {name: (f.in_features, f.out_features) for name, f in m.items() if hasattr(f, "in_features")}
    assert linear == {
        "encoder.fc": (1024, 256),
        "encoder.mu": (256, 10),
        "encoder.logvar": (256, 10),
        "decoder.fc1": (10, 256),
        "decoder.fc2": (256, 1024),
    }


def test_pinned_mlp_names_and_sizes():
    m = modules(models.build("vae", (1, 64, 64), 10, net="mlp"))
    assert {name: (f.in_features, f.out_features) for name, f in m.items()} == {
        "encoder.fc1": (4096, 256),
        "encoder.fc2": (256, 256),
        "encoder.mu": (256, 10),
        "encoder.logvar": (256, 10),
        "decoder.fc1": (10, 256),
        "decoder.fc2": (256, 256),
        "decoder.fc3": (256, 256),
        "decoder.fc4": (256, 4096),
    }


@pytest.mark.parametrize(
    ("side", "encoder", "decoder"),
    [
        (8, [32], [1]),
        (16, [32, 32], [32, 1]),
        (32, [32, 32, 64], [32, 32, 1]),
        (96, [32, 32, 64, 64, 64], [64, 64, 32, 32, 1]),
        (256, [32, 32, 64, 64, 64, 64], [64, 64, 64, 32, 32, 1]),
    ],
)
def test_channels_of_other_sizes(side, encoder, decoder):
    m = modules(models.build("vae", (1, side, side)))
    assert [c.out_channels for name, c in m.items() if name.startswith("encoder.conv")] == encoder
    assert [c.out_channels for name, c in m.items() if name.startswith("decoder.ct")] == decoder


def test_width_multiplies_hidden_sizes():
    wide, base = (modules(models.build("vae", (1, 16, 16), width=w)) for w in (4, 1))
    assert wide["encoder.conv1"].out_channels == 4 * base["encoder.conv1"].out_channels
    assert wide["encoder.fc"].out_features == 4 * base["encoder.fc"].out_features
    assert wide["decoder.fc2"].out_features == 4 * base["decoder.fc2"].out_features
    assert wide["encoder.mu"].out_features == base["encoder.mu"].out_features == 10


def test_small_images_are_padded_and_the_output_cropped():
    """A 27 x 30 model is the 32 x 32 model on a canvas: zeros below and on the right, the output cut."""
    small = models.build("vae", (1, 27, 30)).double()
    canvas = models.build("vae", (1, 32, 32)).double()
    canvas.load_state_dict(small.state_dict())
    x = torch.rand(2, 1, 27, 30, dtype=torch.float64)
    padded = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    padded[:, :, :27, :30] = x
    for a, b in zip(small.encode(x), canvas.encode(padded), strict=True):
        torch.testing.assert_close(a, b)
    z = torch.randn(2, 10, dtype=torch.float64)
    torch.testing.assert_close(small.decode(z), canvas.decode(z)[:, :, :27, :30])


def test_activations_are_functional():
    """A module's output is a pre-activation: what interventions patch may be negative."""
    model = models.build("vae", (1, 16, 16))
    seen = {}
    for name, module in modules(model).items():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output.min().item()}))
    model(torch.rand(8, 1, 16, 16))
    assert set(seen) == set(modules(model))
    assert all(low < 0 for name, low in seen.items() if name not in ("encoder.mu", "encoder.logvar", "decoder.ct2"))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_decoder_mean_is_the_linked_logits(net, likelihood):
    decoder = models.build("vae", (1, 12, 10), 4, net=net, likelihood=likelihood).double().decoder
    z = torch.randn(5, 4, dtype=torch.float64)
    logits = decoder.logits(z)
    assert decoder.link == {"bernoulli": "sigmoid", "gaussian": "identity"}[likelihood]
    torch.testing.assert_close(decoder(z), 1 / (1 + torch.exp(-logits)) if likelihood == "bernoulli" else logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vea"}, "known are vae, beta_vae"),
        ({"gamma": 2.0}, "unknown option gamma of model 'vae'; known are net, likelihood, width"),
        ({"name": "beta_vae", "gamma": 2.0}, "known are beta"),
        ({"name": "beta_vae", "beta": -1.0}, "beta: expected a positive number"),
        ({"name": "beta_vae", "beta": math.nan}, "beta: expected a positive number"),
        ({"net": "cnn"}, "net: unknown 'cnn'; known are conv, mlp"),
        ({"likelihood": "poisson"}, "likelihood: unknown 'poisson'"),
        ({"latents": 0}, "latents: expected an integer of at least 1, got 0"),
        ({"width": 0}, "width: expected a positive number, got 0"),
        ({"shape": (1, 7, 64)}, "sides >= 8"),
        ({"shape": (64, 64)}, r"expected \(C, H, W\)"),
        ({"shape": (0, 64, 64)}, "C >= 1"),
        ({"shape": (1.0, 64, 64)}, r"expected \(C, H, W\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        models.build(**{"name": "vae", "shape": (1, 16, 16), **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 16, 16), r"x: expected shape \(B, 1, 16, 16\), got \(2, 16, 16\)"),
        (torch.rand(2, 3, 16, 16), r"got \(2, 3, 16, 16\)"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "x: expected torch.float32 .* got torch.uint8"),
        (torch.rand(2, 1, 16, 16).double(), "got torch.float64"),
    ],
)
def test_wrong_images(x, message):
    model = models.build("vae", (1, 16, 16))
    for method in (model.encode, model.forward, model.loss):
        with pytest.raises(InputError, match=message):
            method(x)


def test_wrong_values():
    model = models.build("vae", (1, 16, 16))
    for bad in (-0.01, 1.01, 255.0, math.nan):
        x = torch.rand(2, 1, 16, 16)
        x[1, 0, 3, 4] = bad
        with pytest.raises(InputError, match=r"x: the bernoulli likelihood needs values in \[0, 1\]"):
            model.loss(x)
    gaussian = models.build("vae", (1, 16, 16), likelihood="gaussian")
    assert gaussian.loss(torch.full((1, 1, 16, 16), -3.0))["loss"].isfinite()
    with pytest.raises(InputError, match="x: expected finite values"):
        gaussian.loss(torch.full((1, 1, 16, 16), math.nan))
    with pytest.raises(InputError, match="at least one image"):
        model.loss(torch.rand(0, 1, 16, 16))


def test_wrong_latents():
    model = models.build("vae", (1, 16, 16), 10)
    for z in (torch.randn(2, 9), torch.randn(10), torch.zeros(2, 10, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"z: expected floats of shape \(B, 10\)"):
            model.decode(z)
