"""The Triton kernels of latent_sweep: values of every kind of tail, tiles, precisions, what is not finite, memory."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from backends import ALL, parameters
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions.live_memory import LiveMemory
from strategies import any_partition, decoder_module

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast.interventions.networks import record
from vaecirc_fast.ops.latent_sweep import Dense, Network, TransposedConvolution
from vaecirc_fast.reference import effect_reduction as effects
from vaecirc_fast.reference import latent_sweep as reference

pytest.importorskip("triton")
on_triton = pytest.mark.parametrize("backend", parameters([b for b in ALL if b.name == "triton"]), indirect=True)
kernels = pytest.importorskip("vaecirc_fast.triton_kernels.latent_sweep")
KINDS = effects.KINDS
L = 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def dense(taken, made, activation="relu", slope=0.0):
    return Dense(normal(made, taken) / taken**0.5, normal(made, seed=1), activation, slope)


def transposed(taken, made, kernel, activation="relu", **geometry):
    weight = normal(taken, made, *kernel) / (taken * 2) ** 0.5
    return TransposedConvolution(weight, normal(made, seed=2), activation, **geometry)


def last(layer):
    return replace(layer, activation="identity")


def any_labels(elements, count=5, seed=0):
    """Any partition: elements of a group anywhere, some left out, groups of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(elements, generator=generator) ** 2 * (count + 1)).long() - 1
    labels[torch.randperm(elements, generator=generator)[:count]] = torch.arange(count)
    return partitions.from_labels(labels)


DENSE = (dense(L, 20), dense(20, 33), last(dense(33, 90)))
HALVES = {"stride": (2, 2), "padding": (1, 1)}
ONE = (dense(L, 3 * 2 * 3), last(transposed(3, 2, (4, 4), **HALVES)))
TWO = (dense(L, 3 * 2 * 3), transposed(3, 5, (4, 4), **HALVES), last(transposed(5, 1, (4, 4), **HALVES)))
ODD = (
    dense(L, 7),
    dense(7, 2 * 3 * 2, "tanh"),
    transposed(2, 6, (3, 2), "silu", stride=(1, 3)),  # rows of outputs that no tap reaches
    transposed(6, 17, (2, 3), "elu", slope=0.5, padding=(0, 1)),
    last(transposed(17, 2, (3, 4), stride=(2, 1), padding=(1, 0), output_padding=(1, 0))),
)
# name: network, groups
CASES = {
    "one layer": (Network((last(dense(L, 30)),)), any_labels(30)),
    "one layer, sigmoid": (Network((last(dense(L, 30)),), link="sigmoid"), partitions.whole(30)),
    "one layer, softmax": (Network((last(dense(L, 30)),), link="softmax", spans=(1, 20, 9)), any_labels(30)),
    "dense, one group": (Network(DENSE), partitions.whole(90)),
    "dense, any labels": (Network(DENSE, link="sigmoid"), any_labels(90)),
    "dense, columns of one": (Network(DENSE), partitions.spans([1] * 90)),
    "dense, equal cells": (Network(DENSE, link="sigmoid"), partitions.spans([30, 30, 30])),
    "dense, softmax": (Network(DENSE, link="softmax", spans=(40, 2, 48)), partitions.spans([40, 2, 48])),
    "one convolution": (Network(ONE, grid=(3, 2, 3), link="sigmoid"), partitions.cells(4, 6, 3, channels=2)),
    "one convolution, softmax": (Network(ONE, grid=(3, 2, 3), link="softmax", spans=(8, 40)), any_labels(48)),
    "two convolutions, cropped": (Network(TWO, grid=(3, 2, 3), crop=(7, 10), link="sigmoid"), any_labels(70)),
    "two convolutions, cells": (Network(TWO, grid=(3, 2, 3), link="sigmoid"), partitions.cells(8, 12, 4)),
    "odd convolutions": (Network(ODD, grid=(2, 3, 2)), any_labels(192)),
}


def problem(B=3, J=5, K=1, seed=0):
    latents = torch.randint(0, L, (J, K), generator=torch.Generator().manual_seed(seed))
    return normal(B, L, seed=seed), latents, normal(B, J, K, seed=seed + 1)


def kinds_of(network):
    return tuple(kind for kind in KINDS if kind != "logit_mse" or network.link != "identity")


def cast(network, dtype, device="cpu"):
    layers = (
        replace(layer, weight=layer.weight.detach().to(device, dtype), bias=_none_or(layer.bias, device, dtype))
        for layer in network.layers
    )
    return replace(network, layers=tuple(layers))


def _none_or(bias, device, dtype):
    return None if bias is None else bias.detach().to(device, dtype)


def outputs_of(network, z, latents, shifts, precision):
    """In float64: outputs and logits, base (B, 1, P) and moved (B, J, P), with the sum of magnitudes in the last layer
    and so what a rounding is relative to."""
    layers, precision = network.layers, reference.PRECISIONS.index(precision)
    layout = vf.ops.latent_sweep.__globals__["_numbers"]
    layout = [number for layer in layers for number in layout(layer)]
    shape = vf.ops.latent_sweep.__globals__["_shape"](network)
    weights = [layer.weight for layer in layers]
    biases = [torch.zeros(made(layer), dtype=z.dtype) if layer.bias is None else layer.bias for layer in layers]
    slopes = [layer.slope for layer in layers]
    base, moved = reference.first_layer(z, latents, shifts, weights[0], biases[0])
    rest = (layout, slopes, shape, precision)
    spans = torch.tensor([0, *network.spans]).cumsum(0)
    link = reference.LINKS.index(network.link)
    found = []
    for pre in (base[:, None], moved):
        rows = pre.flatten(0, 1)
        x = reference.logits(rows, weights, biases, *rest)
        if len(layers) == 1:
            magnitude = x.abs() + weights[0].abs().sum(1) * 4
        else:
            # the layers before the last, then the last of absolute numbers
            h = _before_last(rows, weights, biases, *rest)
            last = layers[-1]
            if isinstance(last, Dense):
                magnitude = h.abs() @ last.weight.abs().T + biases[-1].abs()
            else:
                geometry = (last.stride, last.padding, last.output_padding)
                magnitude = torch.nn.functional.conv_transpose2d(
                    h.abs(), last.weight.abs(), biases[-1].abs(), *geometry
                )
                magnitude = magnitude[..., : shape[3], : shape[4]].flatten(1)
        y = reference.linked(x, link, spans)
        found.append([t.unflatten(0, pre.shape[:2]) for t in (x, y, x.abs() + magnitude)])
    return found


def made(layer):
    return layer.weight.shape[0 if isinstance(layer, Dense) else 1]


def _before_last(rows, weights, biases, layout, slopes, shape, precision):
    """What enters the last layer: an identity in its place."""
    kind = layout[-8]
    if kind == 0:
        width = weights[-1].shape[1]
        eye, zero = torch.eye(width, dtype=rows.dtype), torch.zeros(width, dtype=rows.dtype)
        return reference.logits(rows, [*weights[:-1], eye], [*biases[:-1], zero], layout, slopes, shape, precision)
    channels = weights[-1].shape[0]
    eye = torch.eye(channels, dtype=rows.dtype)[..., None, None]
    plain = [*layout[:-6], 1, 1, 0, 0, 0, 0]
    zero = torch.zeros(channels, dtype=rows.dtype)
    large = [*shape[:3], 10**6, 10**6]
    flat = reference.logits(rows, [*weights[:-1], eye], [*biases[:-1], zero], plain, slopes, large, precision)
    grid = shape[1:3]
    for n in range(len(weights) - 1):
        if layout[8 * n]:
            grid = reference.output_grid(grid, weights[n].shape[2:], layout[8 * n + 2 : 8 * n + 8])
    return flat.unflatten(1, (channels, *grid))


def units(network, groups, kinds, found):
    """What one rounding of the numbers behind each result changes in it."""
    (x0, y0, m0), (x, y, m) = found
    eps = torch.finfo(torch.float32).eps
    before = m + m0
    unit = before if network.link == "identity" else before + y + y0
    dy, raw = (y - y0).abs(), (x - x0).abs()
    sizes = groups.sizes.double()

    def mean(values):
        total = torch.zeros(*values.shape[:2], len(groups), dtype=torch.float64)
        return total.index_add(2, groups.labels[groups.order].long(), values[:, :, groups.order]) / sizes

    of = {
        "l1": lambda: mean(unit),
        "mse": lambda: mean(dy * unit + eps * unit.square()),
        "rms": lambda: mean(unit.square()).sqrt(),
        "logit_mse": lambda: mean(raw * before + eps * before.square()),
        "tv": lambda: mean(unit) * sizes / 2,
        "signed": lambda: mean(unit),
    }
    return torch.stack([of[kind]() for kind in kinds], 2)


def check(backend, network, groups, arguments, kinds=None, precision="float32"):
    kinds = kinds or kinds_of(network)
    device = [t.to(backend.device) for t in arguments]
    got = vf.ops.latent_sweep(
        *device, cast(network, torch.float32, backend.device), kinds, groups=groups, precision=precision
    )
    with vf.backend("reference"):
        plain = vf.ops.latent_sweep(*arguments, network, kinds, groups=groups, precision=precision)
        z, latents, shifts = arguments
        exact = (z.double(), latents, shifts.double(), cast(network, torch.float64))
        truth = vf.ops.latent_sweep(*exact, kinds, groups=groups, precision=precision)
    unit = units(network, groups, kinds, outputs_of(exact[-1], *exact[:3], precision))
    widths = [layer.weight[0].numel() for layer in network.layers]
    assert_close(
        got.cpu(), plain, truth, terms=int(groups.sizes.max()) + sum(widths), unit=torch.maximum(unit, truth.abs())
    )
    return got.cpu()


@on_triton
@pytest.mark.parametrize("case", CASES)
def test_values(backend, case):
    network, groups = CASES[case]
    result = check(backend, network, groups, problem(K=2 if "any" in case else 1))
    assert (result != 0).float().mean() > 0.9  # softmax's differences add up to 0


@on_triton
@pytest.mark.parametrize("case", ["dense, any labels", "one convolution"])
def test_every_effect_alone(backend, case):
    network, groups = CASES[case]
    together = check(backend, network, groups, problem())
    for n, kind in enumerate(kinds_of(network)):
        alone = check(backend, network, groups, problem(), (kind,))
        assert torch.equal(alone[:, :, 0], together[:, :, n])


@on_triton
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(backend, activation):
    """On numbers of all sizes: near zero, where differences would cancel, and where an exponential is infinite."""
    small = normal(40, L) * torch.logspace(-6, 2, 40)[:, None]
    layers = (Dense(small, normal(40, seed=1) * small[:, 0].abs(), activation, 0.3), last(dense(40, 6)))
    check(backend, Network(layers), partitions.spans([1] * 6), problem(K=2), ("signed", "l1"))
    layers = (Dense(small, None, activation, 0.3), Dense(torch.eye(40), None))
    check(backend, Network(layers), partitions.spans([1] * 40), problem(), ("l1",))
    assert torch.equal(
        kernels_of(activation, torch.zeros(1), backend), reference.activate(torch.zeros(1), *code(activation))
    )


def code(activation):
    return reference.ACTIVATIONS.index(activation), 0.3


def kernels_of(activation, x, backend):
    """The activation as the kernels have it, of numbers x (N,): the first layer's output for shifts of zero."""
    network = Network((Dense(torch.ones(1, 1), None, activation, 0.3), Dense(torch.ones(1, 1), None)))
    zero = torch.zeros(len(x), 1)
    arguments = [t.to(backend.device) for t in (zero, torch.zeros(1, 1, dtype=torch.int64), x[:, None, None])]
    moved = vf.ops.latent_sweep(*arguments, cast(network, torch.float32, backend.device), "signed").cpu().flatten()
    return moved + reference.activate(torch.zeros(1), *code(activation))


@on_triton
@pytest.mark.parametrize("case", ["dense, any labels", "dense, softmax", "two convolutions, cells", "odd convolutions"])
def test_tiles(backend, case, monkeypatch):
    """Memory for a few rows: many tiles of rows and of samples, of whole samples or parts of one."""
    network, groups = CASES[case]
    monkeypatch.setattr(kernels, "TILE_BYTES", 1 << 13)
    monkeypatch.setattr(kernels, "BASE_BYTES", 3 << 10)
    monkeypatch.setattr(kernels, "TAP_BYTES", 1 << 13)
    for B, J in ((5, 2), (2, 9)):
        check(backend, network, groups, problem(B, J), kinds_of(network)[:2])


@on_triton
@pytest.mark.parametrize("refused", [False, True])
def test_tiles_replayed(backend, refused, monkeypatch):
    """What a captured graph does where there is none to capture: the same launches again, none of them made anew. And
    where the driver refuses to capture, every tile is launched."""
    replayed = []

    class Graph:
        def __init__(self, call):
            self.call = call

        def replay(self):
            replayed.append(self)
            self.call()

    original = kernels._Repeated.__init__
    monkeypatch.setattr(kernels._Repeated, "__init__", lambda self, call, gpu: original(self, call, True))
    monkeypatch.setattr(kernels._Repeated, "_captured", lambda self: None if refused else Graph(self.call))
    monkeypatch.setattr(kernels, "WORTH_CAPTURING", 2)
    monkeypatch.setattr(kernels, "TILE_BYTES", 1 << 10)
    monkeypatch.setattr(kernels, "BASE_BYTES", 3 << 10)
    network, groups = CASES["dense, any labels"]
    check(backend, network, groups, problem(5, 9), ("l1",))
    assert bool(replayed) is not refused and len(set(replayed)) <= 1


@on_triton
def test_layers_that_one_program_cannot_join(backend, monkeypatch):
    network, groups = CASES["two convolutions, cells"]
    monkeypatch.setattr(kernels, "MOST_CHANNELS", 2)
    check(backend, network, groups, problem())


LARGER = {
    "dense": Network((dense(L, 70), dense(70, 130), last(dense(130, 300))), link="sigmoid"),
    "softmax": Network((dense(L, 70), last(dense(70, 300))), link="softmax", spans=(130, 2, 168)),
    "convolutions": Network(
        (
            dense(L, 70 * 4 * 3),
            transposed(70, 140, (2, 2), stride=(2, 1)),
            transposed(140, 36, (3, 4), stride=(1, 2)),
            last(transposed(36, 7, (4, 4), **HALVES)),
        ),
        grid=(70, 4, 3),
        link="sigmoid",
    ),
}


@on_triton
@pytest.mark.parametrize(
    ("net", "precision"),
    [
        *itertools.product(("dense", "softmax"), ("float32", "bf16")),
        ("convolutions", "bf16"),
        pytest.param("convolutions", "float32", marks=pytest.mark.deep),
    ],
)
def test_blocks_of_a_gpu(backend, net, precision, monkeypatch):
    """Several blocks along every axis of every product: rows, outputs, depth, taps, runs."""
    monkeypatch.setattr(kernels, "BIG_BLOCKS", False)
    network = LARGER[net]
    arguments = problem(2, 3 if (net, precision) == ("convolutions", "float32") else 70)
    if precision != "float32":  # so that no first activation is near the middle between two operands
        first = network.layers[0]
        first = replace(first, weight=(first.weight * 16).round() / 16, bias=None)
        network = replace(network, layers=(first, *network.layers[1:]))
        arguments = tuple((t * 8).round() / 8 if t.is_floating_point() else t for t in arguments)
        if net == "dense":  # a second layer's sums round differently
            network = replace(network, layers=(first, last(dense(70, 300))))
        elif net == "convolutions":
            network = replace(network, layers=(first, last(transposed(70, 7, (4, 4), **HALVES))))
    elements = math.prod(network.shapes()[-1])
    check(backend, network, any_labels(elements, 9), arguments, kinds_of(network)[:3], precision)


@on_triton
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_lower_precision(backend, kind):
    """Operands with few bits, so that sums are exact: rounding is then the reference's, to the bit."""

    def eighths(*shape):
        return torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(sum(shape))) / 8

    if kind == "dense":
        layers = (Dense(eighths(20, L), eighths(20), "relu"), Dense(eighths(9, 20) / 8, eighths(9), "relu"))
        network, groups = Network((*layers, Dense(eighths(12, 9), None))), any_labels(12, 3)
    else:
        layers = (Dense(eighths(12, L), eighths(12), "relu"), TransposedConvolution(eighths(3, 4, 2, 2), None, "relu"))
        end = TransposedConvolution(eighths(4, 1, 2, 2), eighths(1), stride=(2, 2))
        network, groups = Network((*layers, end), grid=(3, 2, 2)), any_labels(36, 3)
    arguments = (eighths(3, L) + 1 / 64, problem()[1], eighths(3, 5, 1) + 1 / 512)
    results = []
    for precision in ("float32", "tf32", "bf16"):
        results.append(check(backend, network, groups, arguments, ("l1", "mse"), precision))
    for a, b in itertools.pairwise(results):
        assert not torch.equal(a, b)


@on_triton
@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", ["dense, any labels", "dense, softmax", "two convolutions, cropped", "one layer"])
def test_what_is_not_finite_stays_where_it_is(backend, case):
    network, groups = CASES[case]
    z, latents, shifts = problem()
    clean = check(backend, network, groups, (z, latents, shifts))
    z[1] = torch.nan
    shifts[2, 3] = torch.inf
    device = [t.to(backend.device) for t in (z, latents, shifts)]
    net = cast(network, torch.float32, backend.device)
    dirty = vf.ops.latent_sweep(*device, net, kinds_of(network), groups=groups).cpu()
    assert dirty[1].isnan().all()
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[1], kept[2, 3] = False, False
    assert torch.equal(dirty[kept], clean[kept])


@on_triton
@pytest.mark.parametrize("case", ["dense, any labels", "two convolutions, cropped"])
def test_an_output_that_is_not_finite_is_of_its_group(backend, case):
    """An element left out, which fills up no run, counts nowhere."""
    network, groups = CASES[case]
    out = network.layers[-1]
    if isinstance(out, Dense):
        bias = out.bias.clone()
        bias[int((groups.labels == 2).nonzero()[0])] = torch.nan
        bias[int((groups.labels == -1).nonzero()[0])] = torch.nan
        network = replace(network, layers=(*network.layers[:-1], replace(out, bias=bias)))
        expected = torch.arange(len(groups)) == 2
    else:
        network = replace(network, layers=(*network.layers[:-1], replace(out, bias=out.bias * torch.nan)))
        expected = torch.ones(len(groups), dtype=torch.bool)
    arguments = [t.to(backend.device) for t in problem()]
    got = vf.ops.latent_sweep(*arguments, cast(network, torch.float32, backend.device), "l1", groups=groups).cpu()
    assert torch.equal(got.isnan(), expected.expand_as(got))


@on_triton
def test_nothing_to_do(backend):
    for case, (B, J) in itertools.product(("dense, any labels", "one layer", "odd convolutions"), ((0, 3), (3, 0))):
        network, groups = CASES[case]
        arguments = [t.to(backend.device) for t in problem(B, J)]
        got = vf.ops.latent_sweep(*arguments, cast(network, torch.float32, backend.device), groups=groups)
        assert got.shape == (B, J, len(groups))


@on_triton
def test_no_shift_no_effect(backend):
    for case in ("one layer", "dense, any labels", "one convolution"):
        network, groups = CASES[case]
        z, latents, shifts = (t.to(backend.device) for t in problem())
        net = cast(network, torch.float32, backend.device)
        got = vf.ops.latent_sweep(z, latents, 0 * shifts, net, "l1", groups=groups).cpu()
        # products of few rows and of many may differ by a rounding
        limit = 64 * torch.finfo(torch.float32).eps
        assert got.abs().max() <= limit, case


@on_triton
@settings(max_examples=6)
@given(data=st.data(), convolutions=st.booleans(), B=st.integers(1, 3), J=st.integers(1, 4), K=st.integers(1, 2))
def test_any_decoder(backend, data, convolutions, B, J, K):
    decoder, latents = data.draw(decoder_module(convolutions))
    network = record(decoder, torch.zeros(1, latents, dtype=torch.float64)).network
    assert network is not None
    network = cast(network, torch.float32)
    groups = data.draw(any_partition(math.prod(network.shapes()[-1])))
    z, _, shifts = problem(B, J, K)
    which = torch.randint(0, latents, (J, K), generator=torch.Generator().manual_seed(J))
    check(backend, network, groups, (z.repeat(1, 2)[:, :latents], which, shifts), kinds_of(network)[:3])


class _Nothing:
    """Stands for a kernel that computes nothing: only the memory of a call is of interest."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.parametrize("rows", [(1024, 100), (16, 6400), (1, 30000), (6000, 1)])
@pytest.mark.parametrize("net", ["dense", "convolutions", "softmax"])
def test_memory_of_a_call(net, rows, monkeypatch):
    """Of the sizes of real decoders: below 64 MiB beside inputs and effects, whatever B and J."""
    for name in ("_first", "_dense", "_dense_tail", "_transposed", "_transposed_tail", "_runs", "_softmax"):
        monkeypatch.setattr(kernels, f"{name}_kernel", _Nothing())
    monkeypatch.setattr(kernels.effect_reduction, "_effect_reduction_kernel", _Nothing())
    if net == "convolutions":
        halves = [transposed(a, b, (4, 4), **HALVES) for a, b in ((64, 64), (64, 32), (32, 32), (32, 3))]
        layers = (dense(L, 256), dense(256, 1024), *halves[:-1], last(halves[-1]))
        network, groups = Network(layers, grid=(64, 4, 4), link="sigmoid"), partitions.cells(64, 64, 8, 3)
    else:
        spans = (64,) * 64 if net == "softmax" else ()
        network = Network((dense(L, 256), last(dense(256, 4096))), link=net if spans else "sigmoid", spans=spans)
        groups = partitions.cells(64, 64, 8)
    z, latents, shifts = problem(*rows)
    with vf.backend("triton"), LiveMemory() as memory, torch.no_grad():
        result = vf.ops.latent_sweep(z, latents, shifts, network, ("l1", "logit_mse"), groups=groups)
    assert memory.peak - result.nbytes <= 64 << 20
