"""The op patch_mix: its reference against patching by hand, its C++ kernel against the reference, bits, bad input."""

import itertools
import math
from dataclasses import dataclass, replace

import guarded
import pytest
import torch
from backends import CPP, parameters
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import network_problems
from ops.network_problems import any_problem, dense, doubled, numbers, transposed

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.groups import Groups
from vaecirc_fast.interventions import selection
from vaecirc_fast.ops.latent_sweep import Dense, Network, outputs
from vaecirc_fast.reference.effect_reduction import KINDS

OP = torch.ops.vaecirc_fast.patch_mix


@pytest.fixture(params=parameters(CPP))
def backend(request):
    with request.param.forced() as backend:
        yield backend


@dataclass(frozen=True)
class Problem:
    """Arguments of patch_mix."""

    network: Network
    base: torch.Tensor
    source: torch.Tensor
    labels: torch.Tensor
    units: torch.Tensor
    kinds: tuple[str, ...]
    groups: Groups
    against: str = "base"

    def run(self, **changes):
        p = replace(self, **changes)
        given = (p.base, p.source, p.labels, p.units, p.network, p.kinds)
        return vf.ops.patch_mix(*given, groups=p.groups, against=p.against)


def problem(network, labels=None, units=None, groups=None, samples=2, kinds=None, seed=0):
    random, width = numbers(seed), network.inputs()
    if labels is None:
        labels = torch.randint(-1, 5, (width,), generator=torch.Generator().manual_seed(seed))
    units = torch.arange(int(labels.max()) + 1) if units is None else torch.tensor(units)
    known = tuple(kind for kind in KINDS if kind != "logit_mse" or network.link != "identity")
    groups = groups or partitions.whole(math.prod(network.shapes()[-1]))
    base, source = random(samples, width), random(samples, width)
    return Problem(network, base, source, labels.int(), units, kinds or known, groups)


def as_sweep(p):
    """The same effects as a latent sweep: every element a latent, behind a layer that does nothing."""
    one = Dense(torch.eye(p.network.inputs()))
    shifts = torch.where(p.labels == p.units[:, None], (p.source - p.base)[:, None], 0)
    latents = torch.arange(p.network.inputs()).expand(len(p.units), -1)
    network = replace(p.network, layers=(one, *p.network.layers))
    return network_problems.Problem(network, p.base, latents, shifts, p.kinds, p.groups)


def truth_of(p):
    with vf.backend("reference"):
        return replace(p, network=doubled(p.network), base=p.base.double(), source=p.source.double()).run()


def check(p, out=None):
    out = p.run() if out is None else out
    truth = truth_of(p)
    with vf.backend("reference"):
        yardstick = p.run()
    # 0 * inf would spoil every unit
    sweep = as_sweep(replace(p, base=p.base.nan_to_num(0, 0, 0), source=p.source.nan_to_num(0, 0, 0)))
    unit = torch.maximum(network_problems.units(sweep), truth.abs())
    if p.against == "source":  # whose output is rounded as well
        everything = replace(p, labels=torch.zeros_like(p.labels), units=torch.zeros(1, dtype=torch.int64))
        finite = replace(everything, base=p.base.nan_to_num(0, 0, 0), source=p.source.nan_to_num(0, 0, 0))
        unit = unit + network_problems.units(as_sweep(finite))
    assert_close(out, yardstick, truth, terms=network_problems.terms(sweep), unit=unit)


# --- networks --------------------------------------------------------------------------------------------------------


def halving(activation="relu", channels=(20, 20, 1), kernel=(4, 4), side=4, link="sigmoid"):
    """Each convolution doubles the sides."""
    geometry = dict(stride=(2, 2), padding=((kernel[0] - 2) // 2, (kernel[1] - 2) // 2))
    layers = [transposed(a, b, kernel, activation, **geometry) for a, b in itertools.pairwise(channels)]
    layers[-1] = replace(layers[-1], activation="identity")
    return Network(tuple(layers), (channels[0], side, side), link=link)


def of_images(unit, channels, side):
    return selection.units((channels, side, side), unit).labels


def mlp():
    return Network(tuple(dense([40, 33, 70])), link="sigmoid")


def dense_and_convolutions():
    behind = halving(channels=(3, 17, 2))
    return replace(behind, layers=(Dense(numbers(3)(48, 30), None, "tanh"), *behind.layers))


CASES = {
    "channels": lambda: problem(halving(), of_images("channel", 20, 4), groups=partitions.cells(16, 16, 8)),
    "cells": lambda: problem(halving("tanh"), of_images("cell", 20, 4), groups=partitions.cells(16, 16, 8)),
    "cells of some channels": lambda: problem(
        halving("leaky_relu", (40, 33, 3)), torch.where(torch.arange(640) // 16 % 9 == 2, of_images("cell", 40, 4), -1)
    ),
    "parts of lines": lambda: problem(
        halving("relu", (6, 2), side=7), torch.where(torch.arange(294) % 7 > 2, of_images("channel", 6, 7), -1)
    ),
    "scattered": lambda: problem(halving("silu", (8, 40)), groups=partitions.channels(40, 8, 8)),
    "some units, one twice, one of nothing": lambda: problem(halving(), units=[3, 9, 0, 3, 2**32 - 1]),
    "one convolution, few channels out": lambda: problem(halving(channels=(32, 1), side=9)),
    "one convolution, odd": lambda: problem(halving("elu", (17, 2), (6, 4), 5), samples=30),
    "softmax": lambda: problem(
        replace(halving(channels=(16, 3), side=3), link="softmax", spans=(36, 72)), groups=partitions.spans([36, 72])
    ),
    "dense": lambda: problem(mlp(), samples=5),
    "one dense layer": lambda: problem(Network(tuple(dense([12, 1500]))), samples=5),
    "elements of a vector": lambda: problem(mlp(), torch.arange(40)),
    "dense, then convolutions": lambda: problem(dense_and_convolutions(), samples=3),
}


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["base", "source"])
@pytest.mark.parametrize("case", ["channels", "scattered", "softmax", "dense, then convolutions"])
def test_the_reference_is_a_loop_of_patches(case, against):
    p = CASES[case]()
    p = replace(p, network=doubled(p.network), base=p.base.double(), source=p.source.double(), against=against)
    raw = replace(p.network, link="identity", spans=())
    with vf.backend("reference"):
        effects = p.run()
    for u, unit in enumerate(p.units.tolist()):
        patched = p.base.clone()
        patched[:, p.labels == unit] = p.source[:, p.labels == unit]
        for n, kind in enumerate(p.kinds):
            network = raw if kind == "logit_mse" else p.network
            d = outputs(network, patched) - outputs(network, getattr(p, against))
            for g in range(len(p.groups)):
                of = d[:, p.groups.labels == g]
                expected = {
                    "l1": of.abs().mean(1),
                    "mse": of.square().mean(1),
                    "rms": of.square().mean(1).sqrt(),
                    "logit_mse": of.square().mean(1),
                    "tv": of.abs().sum(1) / 2,
                    "signed": of.mean(1),
                }[kind]
                assert torch.allclose(effects[:, u, n, g], expected, rtol=1e-10, atol=1e-13), kind
        assert float(effects[:, u].abs().max()) > 0


# --- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_values(backend, case):
    check(CASES[case]())


@pytest.mark.parametrize("case", CASES)
def test_distances_from_the_source(backend, case):
    """A unit that nothing has is as far from the source as the base is; one that everything has, not at all."""
    p = replace(CASES[case](), against="source")
    check(p)
    p = replace(p, labels=torch.zeros_like(p.labels), units=torch.tensor([7, 0]))
    check(p)
    back = replace(p, base=p.source, source=p.base, against="base")
    assert torch.allclose(truth_of(p)[:, 0], truth_of(back)[:, 1], rtol=1e-10, atol=1e-13)


@st.composite
def any_patches(draw):
    """Any small network, beginning with either kind of layer, and any units of it."""
    sweep = draw(any_problem())
    network = sweep.network
    if network.grid is not None and draw(st.booleans()):
        network = replace(network, layers=tuple(n for n in network.layers if not isinstance(n, Dense)))
    units = draw(st.lists(st.integers(0, 5), max_size=4))
    samples, seed = draw(st.integers(0, 3)), draw(st.integers(0, 999))
    p = problem(network, None, units or [0], sweep.groups, samples, sweep.kinds, seed)
    if network.grid is not None and isinstance(network.layers[0], Dense) is False and draw(st.booleans()):
        p = replace(p, labels=selection.units(network.grid, draw(st.sampled_from(["channel", "cell"]))).labels)
    p = replace(p, against=draw(st.sampled_from(["base", "source"])))
    return p if units else replace(p, units=p.units[:0])


@settings(max_examples=40)
@given(p=any_patches())
def test_any_problem(backend, p):
    check(p)


@pytest.mark.parametrize("case", ["channels", "one convolution, odd", "dense", "dense, then convolutions"])
def test_threads_and_neighbours_change_nothing(backend, case, monkeypatch):
    p = CASES[case]()
    alone = p.run()
    for threads in (2, 5):
        monkeypatch.setattr(_native, "threads", lambda work: threads)  # noqa: B023
        assert torch.equal(p.run(), alone)
    monkeypatch.undo()
    for chosen in ([0], [3, 1], [2, 2, 4]):
        assert torch.equal(p.run(units=p.units[chosen]), alone[:, chosen])
        some = [b for b in chosen if b < len(p.base)]
        assert torch.equal(p.run(base=p.base[some], source=p.source[some]), alone[some])


@pytest.mark.parametrize("case", ["channels", "one convolution, odd", "dense"])
def test_what_is_set_to_itself_has_no_effect(backend, case):
    p = CASES[case]()
    assert torch.equal(p.run(source=p.base), torch.zeros_like(p.run()))


@pytest.mark.parametrize("case", ["channels", "one convolution, odd", "dense", "dense, then convolutions"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_effects(backend, case, value):
    p = CASES[case]()
    clean = p.run()
    at = int((p.labels == 1).nonzero()[0])
    source, base = p.source.clone(), p.base.clone()
    source[0, at] = value
    out = p.run(source=source)
    others = torch.ones_like(out, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(out[others], clean[others])
    check(replace(p, source=source), out)
    base[1, at] = value
    out = p.run(base=base)
    assert torch.equal(out[0], clean[0])
    check(replace(p, base=base), out)


def test_a_base_that_is_not_finite_is_set_not_shifted(backend):
    """A sigmoid of an infinite sum is a number, and so are the effects of taking the infinity back."""
    weight = numbers(5)
    p = problem(Network((Dense(weight(20, 9), None, "sigmoid"), Dense(weight(30, 20)))))
    base = p.base.clone()
    base[0, int((p.labels == 1).nonzero()[0])] = torch.inf
    p = replace(p, base=base)
    assert truth_of(p)[0, 1].isfinite().all()
    check(p)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("case", ["channels", "one convolution, odd", "dense"])
def test_nothing_beyond_the_arguments_is_touched(backend, case, before):
    p = CASES[case]()
    expected = p.run()
    inputs = {name: guarded.placed(getattr(p, name), before) for name in ("base", "source", "labels", "units")}
    assert torch.equal(p.run(**inputs), expected)


def test_empty_problems(backend):
    p = CASES["channels"]()
    of_one = (len(p.kinds), len(p.groups))
    assert p.run(units=p.units[:0]).shape == (2, 0, *of_one)
    assert p.run(base=p.base[:0], source=p.source[:0]).shape == (0, 20, *of_one)


# --- transforms, precisions, bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["channels", "dense"])
def test_opcheck(case, monkeypatch):
    p, seen = CASES[case](), []
    monkeypatch.setitem(vf.ops.patch_mix.__globals__, "_forward", lambda *given: seen.extend(given) or torch.ones(1, 1))
    p.run()
    torch.library.opcheck(OP.default, tuple(seen))


def test_compiled_and_vmapped():
    p = CASES["channels"]()

    def effects(base):
        return p.run(base=base)

    assert torch.equal(torch.compile(effects, fullgraph=True, backend="aot_eager")(p.base), effects(p.base))
    mapped = torch.vmap(effects)(torch.stack([p.base, -p.base]))
    assert torch.equal(mapped, torch.stack([effects(p.base), effects(-p.base)]))


def test_lower_precision_stays_near_and_no_kernel_hides_it():
    p = CASES["channels"]()
    arguments = (p.base, p.source, p.labels, p.units, p.network)
    exact = vf.ops.patch_mix(*arguments)
    for precision, error in (("tf32", 2**-8), ("bf16", 2**-5)):
        near = vf.ops.patch_mix(*arguments, precision=precision)
        assert 0 < (near - exact).abs().max() < error * exact.abs().max()
        with vf.backend("cpp"), pytest.raises(BackendError, match=f"has no {precision}"):
            vf.ops.patch_mix(*arguments, precision=precision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.ones(2, 5)}, r"base: expected floats of shape \(B, 320\), got torch.float32 \(2, 5\)"),
        ({"source": torch.ones(3, 320)}, r"source: expected torch.float32 of shape \(2, 320\)"),
        ({"labels": torch.ones(320)}, r"labels: expected int32 of shape \(320,\), got torch.float32"),
        ({"units": torch.ones(3)}, r"units: expected int64 of shape \(U,\), got torch.float32 \(3,\)"),
        ({"units": torch.tensor([0, -1])}, "units: expected numbers from 0 on, got -1"),
        ({"base": torch.ones(2, 320, requires_grad=True)}, "base: a gradient is wanted, and patch_mix has none"),
        ({"kinds": ("l2",)}, "effect: 'l2' is unknown"),
        ({"groups": partitions.whole(8)}, "groups: partition 8 elements, but an output has 256"),
        ({"against": "both"}, 'against: expected "base" or "source", got \'both\''),
        ({"network": replace(halving(), grid=None)}, "first layer is a transposed convolution, which needs a grid"),
        ({"network": replace(halving(), grid=(5, 8, 8))}, "layer 0 takes 20 inputs, but the grid gives 5"),
        ({"network": Network((), link="sigmoid")}, "network: it has no layer"),
        ({"network": doubled(halving())}, "layer 0 is torch.float64, but base is torch.float32"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InputError, match=message):
        CASES["channels"]().run(**change)


def test_a_latent_sweep_begins_with_a_dense_layer():
    one = torch.ones(1, 320)
    with pytest.raises(InputError, match="first layer must be Dense"):
        vf.ops.latent_sweep(one, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1), halving())


def test_the_row_says_what_it_can():
    row = _registry.rows["patch_mix"]
    assert row.why_not("reference", "cpu", torch.float64) is None
    assert all(isinstance(row.cells[name], _registry.Absent) for name in ("triton", "cuda"))
