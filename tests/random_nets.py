"""Random networks in float64 with sites that a change passes one after the other, and runs of them forced by hooks."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn


@dataclass(frozen=True)
class Net:
    """A module, pairs of inputs, sites from the input to the output, and which of those are cuts by themselves."""

    module: nn.Module
    base: torch.Tensor
    source: torch.Tensor
    sites: tuple[str, ...]
    cuts: tuple[str, ...]

    @property
    def terms(self) -> int:
        """Numbers added up for any output: no more than there are weights and elements."""
        return sum(p.numel() for p in self.module.parameters()) + self.base.numel()


class Residual(nn.Module):
    """Blocks around which their input goes, dropout (an identity here), an activation in place, and a head that nobody
    reads."""

    def __init__(self, width: int, depth: int, outputs: int):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Dropout(0.5), nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.unread, self.head = nn.Linear(width, 2), nn.Linear(width, outputs)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        self.unread(h)
        return self.head(h.tanh())


@st.composite
def random_net(draw) -> Net:
    """An MLP, a convolutional net or a residual one."""
    kind = draw(st.sampled_from(["mlp", "conv", "residual"]))
    width, outputs, rows = draw(st.integers(2, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    shape: tuple[int, ...] = (3,)
    if kind == "mlp":
        activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU]))
        module = nn.Sequential(
            nn.Linear(3, width),
            activation(),
            nn.Linear(width, width + 1),
            activation(),
            nn.Linear(width + 1, width),
            activation(),
            nn.Linear(width, outputs),
        )
        sites = cuts = ("0", "1", "2", "4.input", "5")
    elif kind == "conv":
        shape = (2, 5, 4)
        module = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(width, 2, 2, 2),
            nn.Tanh(),
            nn.Conv2d(2, outputs, 2),
        )
        sites = cuts = ("0", "2", "3")
    else:
        depth = draw(st.integers(1, 3))
        module = Residual(width, depth, outputs)
        sites = ("stem", *(f"blocks.{n}{k}" for n in range(depth) for k in (".input", ".0", ".1", ".3")), "head.input")
        cuts = ("stem", "head.input")
    module.double().eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
    base, source = torch.randn(2, rows, *shape, generator=generator, dtype=torch.float64)
    return Net(module, base, source, sites, cuts)


def mask_of(activation: torch.Tensor, units) -> torch.Tensor:
    """Which elements of a site's activation (N, C, ...) belong to some of its channels, None for all."""
    mask = torch.zeros_like(activation, dtype=torch.bool)
    mask[:, slice(None) if units is None else list(units)] = True
    return mask


@torch.no_grad()
def hooked(module, x, forced=(), record=()):
    """The output of x, and activations at `record`, with forced = [(site, units, values)] set by hooks in one run."""
    modules, handles, seen = dict(module.named_modules()), [], {}

    def change(a, units, values):
        return torch.where(mask_of(a, units), values, a)

    for site, units, values in forced:
        m = modules[site.removesuffix(".input")]
        if site.endswith(".input"):
            handles.append(m.register_forward_pre_hook(lambda _, a, u=units, v=values: (change(a[0], u, v), *a[1:])))
        else:
            handles.append(m.register_forward_hook(lambda _, __, out, u=units, v=values: change(out, u, v)))
    for site in record:
        m = modules[site.removesuffix(".input")]
        if site.endswith(".input"):
            handles.append(m.register_forward_pre_hook(lambda _, a, s=site: seen.update({s: a[0].clone()})))
        else:
            handles.append(m.register_forward_hook(lambda _, __, out, s=site: seen.update({s: out.clone()})))
    try:
        y = module(x)
    finally:
        for handle in handles:
            handle.remove()
    return y, seen
