"""Problems for the kernels that run a network's rows, and what a rounding on the way does to their results."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from strategies import any_partition

import vaecirc_fast as vf
from vaecirc_fast.groups import Groups
from vaecirc_fast.ops.latent_sweep import Dense, Network, TransposedConvolution
from vaecirc_fast.reference import latent_sweep as reference
from vaecirc_fast.reference.effect_reduction import KINDS

ACTIVATIONS = reference.ACTIVATIONS

# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Arguments of latent_sweep."""

    network: Network
    z: torch.Tensor
    latents: torch.Tensor
    shifts: torch.Tensor
    kinds: tuple[str, ...]
    groups: Groups

    def run(self, **changes):
        p = replace(self, **changes)
        return vf.ops.latent_sweep(p.z, p.latents, p.shifts, p.network, p.kinds, groups=p.groups)


def numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)


def dense(sizes, activation="relu", random=None, slope=0.3):
    random = random or numbers(1)
    layers = [Dense(random(n, k) / k**0.5, random(n) / 4, activation, slope) for k, n in itertools.pairwise(sizes)]
    return layers[:-1] + [replace(layers[-1], activation="identity")]


def transposed(before, after, kernel, activation="relu", random=None, **geometry):
    random = random or numbers(2)
    scale = (before * max(1, math.prod(kernel) / math.prod(geometry.get("stride", (1, 1))))) ** 0.5
    return TransposedConvolution(random(before, after, *kernel) / scale, random(after) / 4, activation, 0.3, **geometry)


def problem(network, groups=None, samples=2, interventions=3, changes=1, kinds=None, seed=0):
    random, width = numbers(seed), network.layers[0].weight.shape[1]
    latents = torch.randint(0, width, (interventions, changes), generator=torch.Generator().manual_seed(seed))
    known = tuple(kind for kind in KINDS if kind != "logit_mse" or network.link != "identity")
    groups = groups or vf.groups.whole(math.prod(network.shapes()[-1]))
    z, shifts = random(samples, width), random(samples, interventions, changes)
    return Problem(network, z, latents, shifts, kinds or known, groups)


def doubled(network):
    layers = [
        replace(layer, weight=layer.weight.double(), bias=None if layer.bias is None else layer.bias.double())
        for layer in network.layers
    ]
    return replace(network, layers=tuple(layers))


# --- the rule --------------------------------------------------------------------------------------------------------


def rounding_scale(network, pre, scale):
    """What one rounding of every number of the forward pass does to outputs before the link, were all independent."""
    squares, h, image = scale.square(), pre, False
    for n, layer in enumerate(network.layers):
        if n:
            moved = h.square() + squares
            if isinstance(layer, Dense):
                h, squares = torch.nn.functional.linear(h, layer.weight, layer.bias), moved @ layer.weight.square().T
                squares = squares if layer.bias is None else squares + layer.bias.square()
            else:
                if not image:
                    h, moved, image = h.unflatten(1, network.grid), moved.unflatten(1, network.grid), True
                geometry = (layer.stride, layer.padding, layer.output_padding)
                h = torch.nn.functional.conv_transpose2d(h, layer.weight, layer.bias, *geometry)
                bias = None if layer.bias is None else layer.bias.square()
                squares = torch.nn.functional.conv_transpose2d(moved, layer.weight.square(), bias, *geometry)
        h = reference.activate(h, ACTIVATIONS.index(layer.activation), layer.slope)
    if image:
        height, width = network.crop or h.shape[2:]
        h, squares = (x[..., :height, :width].flatten(1) for x in (h, squares))
    return h, squares.sqrt()


def behind_link(network, raw, scale):
    """Outputs and their scale after the link."""
    spans = torch.tensor([0, *network.spans]).cumsum(0)
    y = reference.linked(raw, reference.LINKS.index(network.link), spans)
    if network.link == "sigmoid":
        return y, scale * y * (1 - y) + y
    if network.link == "softmax":
        parts = zip(y.split(network.spans, -1), scale.split(network.spans, -1), strict=True)
        return y, torch.cat([p * (1 + s + (p * s).sum(-1, keepdim=True)) for p, s in parts], -1)
    return y, scale


def units(p):
    """The unit of every result: what a rounding of each number on the way changes in it."""
    net, z, shifts = doubled(p.network), p.z.double(), p.shifts.double()
    first = net.layers[0]
    bias = first.weight.new_zeros(len(first.weight)) if first.bias is None else first.bias
    base, moved = reference.first_layer(z, p.latents, shifts, first.weight, bias)
    squares = z.square() @ first.weight.square().T + bias.square()
    added = torch.einsum("bjk,jkh->bjh", shifts.square(), first.weight.square().T[p.latents])
    raw0, scale0 = rounding_scale(net, base, squares.sqrt())
    raw, scale = rounding_scale(net, moved.flatten(0, 1), (squares[:, None] + added).sqrt().flatten(0, 1))
    (y0, u0), (y, u) = behind_link(net, raw0, scale0), behind_link(net, raw, scale)
    shape = (*shifts.shape[:2], raw0.shape[1])
    dy, unit = y.view(shape) - y0[:, None], u.view(shape) + u0[:, None] + y.view(shape).abs() + y0[:, None].abs()
    d_raw = raw.view(shape) - raw0[:, None]
    raw_unit = scale.view(shape) + scale0[:, None] + raw.view(shape).abs() + raw0[:, None].abs()
    eps, sizes = torch.finfo(torch.float32).eps, p.groups.sizes

    def total(values):
        out = torch.zeros(*values.shape[:2], len(p.groups), dtype=torch.float64)
        return out.index_add(2, p.groups.labels[p.groups.order].long(), values[:, :, p.groups.order])

    of = {
        "l1": lambda: total(unit) / sizes,
        "mse": lambda: total(2 * dy.abs() * unit + eps * unit.square()) / sizes,
        "rms": lambda: (total(unit.square()) / sizes).sqrt(),
        "logit_mse": lambda: total(2 * d_raw.abs() * raw_unit + eps * raw_unit.square()) / sizes,
        "tv": lambda: total(unit) / 2,
        "signed": lambda: total(unit) / sizes,
    }
    return torch.stack([of[kind]() for kind in p.kinds], 2)


def terms(p):
    """The largest number of added terms on the way to a result."""
    fan_in = [
        layer.weight[0].numel() if isinstance(layer, Dense) else layer.weight[:, 0].numel()
        for layer in p.network.layers
    ]
    return sum(fan_in) + int(p.groups.sizes.max())


@st.composite
def any_problem(draw):
    """Any small network, problem and partition."""
    random = numbers(draw(st.integers(0, 999)))
    activation = st.sampled_from(ACTIVATIONS)
    sizes = [draw(st.integers(1, 6))]
    sizes += draw(st.lists(st.sampled_from([1, 3, 16, 17, 33, 40]), min_size=1, max_size=3))
    slope = draw(st.sampled_from([0.01, 0.3, 1.0]))
    layers: list[Dense | TransposedConvolution] = []
    layers += [replace(layer, activation=draw(activation)) for layer in dense(sizes, random=random, slope=slope)]
    grid = crop = None
    if draw(st.booleans()):
        channels, height, width = (
            draw(st.sampled_from([1, 2, 15, 16, 40])),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 5)),
        )
        grid = (channels, height, width)
        layers += dense([sizes[-1], math.prod(grid)], random=random)
        for _ in range(draw(st.integers(1, 3))):
            after = draw(st.sampled_from([1, 2, 3, 16, 17, 40]))
            kernel, stride = [(draw(st.integers(1, n)), draw(st.integers(1, n))) for n in (5, 3)]
            geometry = dict(stride=stride, output_padding=tuple(draw(st.integers(0, s - 1)) for s in stride))
            sides = reference.output_grid((height, width), kernel, (*stride, 0, 0, *geometry["output_padding"]))
            padding = tuple(draw(st.integers(0, min(3, (side - 1) // 2))) for side in sides)
            height, width = (side - 2 * pad for side, pad in zip(sides, padding, strict=True))
            layers.append(transposed(channels, after, kernel, draw(activation), random, padding=padding, **geometry))
            channels = after
            if height * width > 400:
                break
        crop = draw(st.sampled_from([None, (max(1, height - 1), max(1, width - 2)), (1, 1)]))
    layers[-1] = replace(layers[-1], activation="identity")
    network = Network(tuple(layers), grid, crop)
    elements = math.prod(network.shapes()[-1])
    link = draw(st.sampled_from(reference.LINKS))
    if link == "softmax":
        cuts = sorted({0, elements, *draw(st.lists(st.integers(0, elements), max_size=4))})
        spans = tuple(b - a for a, b in itertools.pairwise(cuts))
    network = replace(network, link=link, spans=spans if link == "softmax" else ())
    if elements <= 70 and draw(st.booleans()):
        groups = draw(any_partition(elements))
    else:
        labels = torch.randint(-1, 5, (elements,), generator=torch.Generator().manual_seed(elements))
        labels[0] = 0
        groups = vf.groups.from_labels(torch.unique(labels, return_inverse=True)[1] - int((labels == -1).any()))
    counts = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    p = problem(network, groups, *counts, seed=draw(st.integers(0, 999)))
    return replace(p, kinds=tuple(draw(st.lists(st.sampled_from(p.kinds), min_size=1, unique=True))))
