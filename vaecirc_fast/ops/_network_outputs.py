"""Outputs of a network of known layers, by the C++ kernel of `latent_sweep`: what lies in front of a site, fast."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _native
from ..groups import whole
from .latent_sweep import Network, cpp_network, flattened


def network_outputs(network: Network, z: Tensor) -> Tensor:
    """Outputs (R, P) before the link of a network that begins with a dense layer, for inputs z (R, L).

    All float32 on a CPU, as the cell "cpp" of `latent_sweep` has them; no gradient. The bits of a row do not depend on
    the rows beside it. The reference is `reference.latent_sweep.network`.
    """
    z, elements = z.contiguous(), math.prod(network.shapes()[-1])
    out = torch.empty(len(z), elements)
    weights, biases, layout, slopes, shape, labels, *_ = flattened(network, whole(elements), ("mse",), "float32")
    spans = torch.empty(0, dtype=torch.int32)
    effects = torch.empty(len(z), 1, 1, 1)  # none is written; their number says how much work there is
    with cpp_network(weights, biases, layout, slopes, shape, labels, [0], 0, spans, effects) as arguments:
        _native.cpp().network_outputs(_native.address(z), z.shape[1], _native.address(out), arguments)
    return out
