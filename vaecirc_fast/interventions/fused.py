"""The fused engine: sweeps of decoders whose layers are known, by the op `latent_sweep` and by algebra."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _native, ops
from .._registry import Row, forced
from ..groups import Groups, from_labels
from ..ops.latent_sweep import ROW, Dense, Network, outputs
from . import grids

SQUARED = ("mse", "rms", "logit_mse")
SCRATCH_BYTES = 16 << 20  # of base outputs and effects of one part of the samples
QR_COST = 8  # a multiply-add of a factorisation in float64 in those of a product in float32
DISAGREES = 1e-3  # of the largest output: far above rounding, far below a layer read wrongly


@dataclass(frozen=True)
class Head:
    """What stands for the last layer under a squared effect: ||W_g dh|| = ||R_g dh|| with W_g = Q_g R_g.

    network: with the R_g stacked as its last layer, no bias and no link. groups: the rows of R by group. factor: (G,)
    rows over elements of each group, since a mean over rows is not one over elements.
    """

    network: Network
    groups: Groups
    factor: Tensor


class FusedPath:
    """Effects of a grid's interventions through a network that stands for the decoder."""

    def __init__(
        self,
        network: Network,
        groups: Groups,
        z: Tensor,
        spec: grids.Grid,
        effect: str,
        *,
        head: Head | None,
        precision: str,
    ):
        self.z, self.spec, self.effect, self.head, self.precision = z, spec, effect, head, precision
        self.network, self.groups = (network, groups) if head is None else (head.network, head.groups)
        self.original = network
        latents, steps = spec.decoded.nonzero(as_tuple=True)
        # a latent that no unit of the first layer reads changes nothing
        self.reaches = (network.layers[0].weight != 0).any(0).cpu()[latents]
        self.latents, self.steps = latents[self.reaches].to(z.device), steps[self.reaches].to(z.device)
        self.backend = backend_for(z, precision) or "reference"
        size = self.groups.labels.numel()
        held = 8 * size + 8 * spec.decoded.numel() * len(groups)
        if self.backend == "reference":  # which forms all outputs
            held += 4 * z.element_size() * size * max(1, len(self.latents))
        self.samples = max(1, min(len(z), SCRATCH_BYTES // held))
        self.decodes = 0

    def examples(self) -> Tensor:
        """A few codes (R, L) that the sweep decodes, to compare the network with the decoder on."""
        codes = self.z[:1].repeat(3, 1)
        for row, at in ((1, 0), (2, -1)):
            if len(self.latents):
                latent, step = self.latents[at : at + 1 or None], self.steps[at : at + 1 or None]
                codes[row, latent] = self.spec.values(self.z, slice(0, 1), latent, step)[0]
        return codes

    def parts(self) -> Iterator[slice]:
        """Slices of the samples whose scratch memory is bounded."""
        for start in range(0, len(self.z), self.samples):
            yield slice(start, min(start + self.samples, len(self.z)))

    def effects(self, part: slice) -> Tensor:
        """(B, J, G) effects of the decoded interventions on the samples of `part`."""
        found = self._effects(part, self.precision)
        self.decodes += found.shape[0] * (1 + found.shape[1])
        if bool(self.reaches.all()):
            return found
        full = found.new_zeros(found.shape[0], len(self.reaches), found.shape[2])
        full[:, self.reaches.to(found.device)] = found
        return full

    def _effects(self, part: slice, precision: str) -> Tensor:
        z = self.z[part]
        if self.spec.shift is not None:
            shifts = self.spec.shift.to(z)[self.latents, self.steps].expand(len(z), -1)
        else:
            shifts = self.spec.values(self.z, part, self.latents, self.steps) - z[:, self.latents]
        kind = self.effect
        if self.network.link == "identity" and kind == "logit_mse" or self.head and kind == "rms":
            kind = "mse"  # what was recorded are the logits; and the root comes after the factor
        out = ops.latent_sweep(
            *(z, self.latents[:, None], shifts[..., None], self.network, kind),
            groups=self.groups,
            precision=precision,
        )
        if self.head is not None:
            out = out * self.head.factor.to(out)
        return out.sqrt() if self.head is not None and self.effect == "rms" else out

    def plan(self, seconds: float) -> str:
        """What was done, for people."""
        where = self.backend + (f" {_native.instruction_set()}" if self.backend == "cpp" else "")
        name = "fused engine" if self.head is None else "gram engine"
        parts = [
            f"{name} ({where}): {describe(self.original)}; {self.decodes} decodes",
            f"{1e6 * seconds / max(self.decodes, 1):.1f} us a decode",
            "first layer updated by rank 1",
            "outputs formed a part at a time" if self.backend == "reference" else "no output formed in memory",
        ]
        if self.head is not None:
            rows, elements = self.groups.labels.numel(), self.original.layers[-1].weight.shape[0]
            parts.append(f"squared effects through the R factor of the last layer: {rows} rows for {elements}")
        if self.spec.zero_steps:
            parts.append(f"{self.spec.zero_steps} zero steps not decoded")
        if not bool(self.reaches.all()):
            parts.append(f"nor {int((~self.reaches).sum())} steps of latents that nothing reads")
        if self.precision != "float32":
            parts.append(self._error())
        return ", ".join(parts)

    def _error(self) -> str:
        part = slice(0, min(4, len(self.z)))
        exact, fast = self._effects(part, "float32"), self._effects(part, self.precision)
        error = float((fast - exact).norm() / exact.norm())
        decodes = exact.shape[0] * exact.shape[1]
        return f"{self.precision} effects differ from float32 by {error:.1e} (root mean square, {decodes} decodes)"


def backend_for(z: Tensor, precision: str = "float32", row: Row = ROW) -> str | None:
    """The backend that an op takes for these inputs, `latent_sweep` by default; None where it may take none."""
    device, name = z.device.type, forced()
    if precision != "float32" and device == "cpu":
        return "reference" if name in (None, "auto", "reference") else None
    if name not in (None, "auto") and row.why_not(name, device, z.dtype) is not None:
        return None
    return row.choose(device, z.dtype)


def describe(network: Network) -> str:
    """Its layers in short: widths of dense layers, channels of transposed convolutions, shape and link."""
    dense = [layer for layer in network.layers if isinstance(layer, Dense)]
    text = "-".join(str(n) for n in (dense[0].weight.shape[1], *(layer.weight.shape[0] for layer in dense)))
    convolutions = network.layers[len(dense) :]
    if convolutions:
        text += f" as {'x'.join(map(str, network.grid or ()))}, transposed convolutions "
        text += "-".join(str(layer.weight.shape[1]) for layer in convolutions)
        text += f" to {'x'.join(map(str, network.shapes()[-1]))}"
    return text if network.link == "identity" else f"{text}, {network.link}"


def agrees(network: Network, codes: Tensor, y: Tensor) -> bool:
    """Whether the network's outputs for `codes` (R, L) are the decoder's y (R, P), up to rounding; NaN agrees."""
    difference = (outputs(network, codes) - y).abs()
    return not bool((difference > DISAGREES * y.abs().amax().clamp(min=torch.finfo(y.dtype).tiny)).any())


def gram_head(network: Network, groups: Groups, effect: str, decodes: int | None = None) -> Head | str:
    """The head for a squared effect, or why there is none. decodes: how many it would save work in; None: any."""
    last = network.layers[-1]
    if effect not in SQUARED:
        return f"{effect} is not a squared effect"
    if not isinstance(last, Dense):
        return "the last layer is a transposed convolution"
    if network.link != "identity":
        return f"{effect} is taken after the {network.link}"
    if len(network.layers) == 1:
        return "there is one layer"
    sizes, width = groups.sizes.tolist(), last.weight.shape[1]
    if max(sizes) <= width:
        return f"no group has more elements than the last layer's {width} inputs"
    known = _known(last.weight, groups)
    if known is None and decodes is not None:
        spared = decodes * sum(n - width // 2 for n in sizes if n > width) * width
        if spared < QR_COST * sum(2 * n * width * width for n in sizes if n > width):
            return "so few decodes would not pay for factoring the last layer"
    rows, counts = known or _factor(last.weight, groups)
    head = replace(last, weight=rows, bias=None)
    labels = torch.arange(len(groups)).repeat_interleave(torch.tensor(counts))
    factor = torch.tensor(counts, dtype=torch.float64) / torch.tensor(sizes, dtype=torch.float64)
    return Head(replace(network, layers=(*network.layers[:-1], head)), from_labels(labels).to(rows.device), factor)


# The factors of the last few layers: several grids, or many calls, factor each once. Weights are compared, not trusted.
_factors: deque[tuple[Tensor, Groups, Tensor, list[int]]] = deque(maxlen=4)


def _known(weight: Tensor, groups: Groups) -> tuple[Tensor, list[int]] | None:
    for held, of, rows, counts in _factors:
        same = held.shape == weight.shape and held.dtype == weight.dtype and held.device == weight.device
        if same and torch.equal(of.labels, groups.labels.cpu()) and torch.equal(held, weight):
            return rows, counts
    return None


def _factor(weight: Tensor, groups: Groups) -> tuple[Tensor, list[int]]:
    """The R_g of all groups, one below the other, of the weight's dtype, and the rows of each."""
    parts = []
    offsets = groups.offsets.tolist()
    for g in range(len(groups)):
        rows = weight[groups.order[offsets[g] : offsets[g + 1]].long()]
        if rows.shape[0] > rows.shape[1]:
            rows = torch.linalg.qr(rows.double(), mode="r").R.to(weight.dtype)
        parts.append(rows)
    stacked = torch.cat(parts)
    counts = [len(part) for part in parts]
    _factors.append((weight.detach().clone(), groups.to("cpu"), stacked, counts))
    return stacked, counts
