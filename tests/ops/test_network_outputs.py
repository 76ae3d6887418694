"""Outputs of networks by the C++ kernel, on every instruction set: values, bits of a row, what is not finite."""

from dataclasses import replace

import pytest
import torch
from backends import CPP, parameters
from close import assert_close
from hypothesis import given, settings
from ops.network_problems import any_problem, dense, doubled, numbers, rounding_scale, terms, transposed

from vaecirc_fast.ops._network_outputs import network_outputs
from vaecirc_fast.ops.latent_sweep import Network, outputs


@pytest.fixture(params=parameters(CPP))
def backend(request):
    with request.param.forced() as backend:
        yield backend


@pytest.fixture(autouse=True)
def memory_is_poisoned(poisoned_memory):
    """What is not written is NaN."""


def check(network, z, most_terms):
    truth, yardstick = outputs(doubled(network), z.double()), outputs(network, z)
    first = doubled(network).layers[0]
    pre = torch.nn.functional.linear(z.double(), first.weight, first.bias)
    bias = 0 if first.bias is None else first.bias.square()
    _, unit = rounding_scale(doubled(network), pre, (z.double().square() @ first.weight.square().T + bias).sqrt())
    unit = torch.maximum(unit, truth.abs())
    assert_close(network_outputs(network, z), yardstick, truth, terms=most_terms, unit=unit)


@settings(max_examples=60)
@given(p=any_problem())
def test_any_network(backend, p):
    check(replace(p.network, link="identity", spans=()), p.z, terms(p))


def halving(channels, crop=None, activation="relu"):
    """Each convolution doubles the sides, of 4 at first."""
    geometry = dict(stride=(2, 2), padding=(1, 1))
    behind = [transposed(a, b, (4, 4), activation, **geometry) for a, b in zip(channels, channels[1:], strict=False)]
    behind[-1] = replace(behind[-1], activation="identity")
    front = dense([5, 24, 16 * channels[0]])
    front[-1] = replace(front[-1], activation=activation)
    return Network((*front, *behind), (channels[0], 4, 4), crop)


# Whole blocks of pixels and channels, a crop that leaves none, channels that fill none, and all taps at once.
@pytest.mark.parametrize("crop", [None, (12, 16), (13, 15)])
@pytest.mark.parametrize("channels", [(64, 32, 32), (16, 17, 20), (32, 32, 1)])
def test_images(backend, channels, crop):
    network = halving(channels, crop, "silu")
    check(network, numbers(7)(9, 5), 16 * 64 * 2)


def test_a_rows_bits_do_not_depend_on_others(backend):
    for network in (halving((32, 32, 32)), Network(tuple(dense([5, 40, 1100])))):
        z = numbers(3)(70, 5)
        together = network_outputs(network, z)
        assert torch.equal(together[41:42], network_outputs(network, z[41:42]))
        assert torch.equal(together[:35], network_outputs(network, z[:35]))


def test_threads_change_nothing(backend):
    network, z, before = halving((64, 32, 32)), numbers(3)(64, 5), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = network_outputs(network, z)
        torch.set_num_threads(3)
        assert torch.equal(alone, network_outputs(network, z))
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row(backend):
    network, z = Network(tuple(dense([5, 40, 50]))), numbers(3)(4, 5)
    z[1, 2], z[2, 0] = torch.nan, torch.inf
    out, expected = network_outputs(network, z), outputs(network, z)
    assert torch.equal(out.isfinite().all(1), torch.tensor([True, False, False, True]))
    assert torch.equal(out.isnan(), expected.isnan())


def test_no_rows(backend):
    assert network_outputs(halving((32, 32, 32)), torch.empty(0, 5)).shape == (0, 32 * 16 * 16)
