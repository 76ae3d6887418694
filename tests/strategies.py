"""Hypothesis strategies: partitions of outputs, and problems for the ops. Small, so that the interpreter is quick."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from vaecirc_fast import groups as partitions
from vaecirc_fast.groups import Groups
from vaecirc_fast.reference.effect_reduction import KINDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def any_partition(draw, elements: int) -> Groups:
    """Any partition of `elements`: labels in any order, elements left out, groups of one."""
    count = draw(st.integers(1, min(elements, 9)))
    labels = draw(st.lists(st.integers(-1, count - 1), min_size=elements, max_size=elements))
    present = sorted({label for label in labels if label >= 0})
    if not present:
        labels[draw(st.integers(0, elements - 1))] = 0
        present = [0]
    renamed = {label: g for g, label in enumerate(present)}
    return partitions.from_labels([renamed.get(label, -1) for label in labels])


@st.composite
def image_partition(draw) -> Groups:
    """Cells or channels of a small image."""
    height, width, channels = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        return partitions.channels(channels, height, width)
    return partitions.cells(height, width, draw(st.integers(1, 17)), channels)


def partition() -> st.SearchStrategy[Groups]:
    """A partition of some number of elements."""
    spans = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(partitions.spans)
    whole = st.integers(1, 300).map(partitions.whole)
    return st.one_of(st.integers(1, 70).flatmap(any_partition), image_partition(), spans, whole)


@dataclass(frozen=True)
class Problem:
    """Arguments of effect_reduction."""

    base: torch.Tensor
    perturbed: torch.Tensor
    groups: Groups
    kinds: tuple[str, ...]
    link: str
    reduce: str | None


@st.composite
def effect_problem(draw, dtypes=FLOATS, least: int = 0) -> Problem:
    """A problem of effect_reduction with at least `least` samples and interventions."""
    groups = draw(partition())
    samples, interventions = draw(st.integers(least, 9)), draw(st.integers(least, 3))
    link = draw(st.sampled_from(["identity", "sigmoid"]))
    known = [kind for kind in KINDS if link == "sigmoid" or kind != "logit_mse"]
    kinds = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    return Problem(
        *outputs(samples, interventions, len(groups.labels), draw(st.sampled_from(dtypes)), draw(st.integers(0, 999))),
        groups,
        tuple(kinds),
        link,
        draw(st.sampled_from([None, "sum"])),
    )


def outputs(samples, interventions, elements, dtype=torch.float32, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Base (B, P) and perturbed (B, I, P) outputs or logits. No difference is near zero, where l1 has a kink."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(samples, elements, generator=generator)
    step = torch.randn(samples, interventions, elements, generator=generator)
    return base.to(dtype), (base[:, None] + step + step.sign() / 4).to(dtype)


@st.composite
def decoder_module(draw, convolutions: bool) -> tuple[torch.nn.Module, int]:
    """A random decoder in float64 and its latents: depths, widths, activations, kernels, strides, channels, links.

    Weights are wide enough that effects stand well above rounding.
    """
    nn = torch.nn
    latents = draw(st.integers(1, 5))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU, nn.ELU, nn.Sigmoid, lambda: nn.LeakyReLU(0.2)]))
    parts: list[torch.nn.Module] = []
    width = latents
    for hidden in draw(st.lists(st.integers(1, 40), min_size=0 if convolutions else 1, max_size=3)):
        parts += [nn.Linear(width, hidden, bias=draw(st.booleans())), activation()]
        width = hidden
    if convolutions:
        channels, height, columns = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
        parts += [nn.Linear(width, channels * height * columns), activation()]
        parts.append(nn.Unflatten(1, (channels, height, columns)))
        count = draw(st.integers(1, 3))
        for n in range(count):
            out, kernel, stride = draw(st.integers(1, 20)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
            padding = draw(st.integers(0, (kernel - 1) // 2))
            extra = draw(st.integers(0, stride - 1))
            parts.append(nn.ConvTranspose2d(channels, out, kernel, stride, padding, extra))
            parts += [activation()] if n < count - 1 else []
            channels = out
    else:
        parts.append(nn.Linear(width, draw(st.integers(1, 70))))
    if draw(st.booleans()):
        parts.append(nn.Sigmoid())
    elif not convolutions and draw(st.booleans()):
        parts.append(nn.Softmax(1))
    decoder = nn.Sequential(*parts).double().eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        for p in decoder.parameters():
            fan_in = p[0].numel() if p.ndim == 2 else max(1, p.shape[0])
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (1.5 / fan_in**0.5))
    return decoder, latents
