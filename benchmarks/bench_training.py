"""Benchmark of training: `fit` against the loop one writes first, on dSprites with the reference nets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaecirc_fast as vf

from .harness import measure

BATCH, STEPS = 64, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _loop(net: str, *, bf16: bool = False, compiled: bool = False) -> Callable[[], None]:
    """STEPS updates in plain torch: the same model, data and objective, Adam with its defaults."""
    torch.manual_seed(0)
    ds = vf.data.load("dsprites")
    model = vf.models.VAE(ds.shape, net=net).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def objective(x: Tensor, noise: Tensor) -> Tensor:
        mu, logvar = model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * noise
        return sum(model.terms(x, model.decoder.logits(z), z, mu, logvar).values(), x.new_zeros(()))

    loss = torch.compile(objective) if compiled else objective

    def call() -> None:
        for _ in range(STEPS):
            x, _ = ds.sample(BATCH, generator)
            noise = torch.randn(BATCH, model.latents, generator=generator)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                value = loss(x.to(DEVICE), noise.to(DEVICE))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()  # what a loop prints

    return call


def _fit(net: str, precision: str) -> Callable[[], None]:
    """One whole call of `fit`, with its checks, its optimizer made anew and the model's layout changed and restored."""
    torch.manual_seed(0)
    ds = vf.data.load("dsprites")
    model = vf.models.VAE(ds.shape, net=net).to(DEVICE)

    def call() -> None:
        vf.training.fit(model, ds, steps=STEPS, batch_size=BATCH, precision=precision, progress=False)

    return call


# The loops come first: `fit` leaves the C allocator keeping blocks up to 32 MiB, which speeds up what runs after it.
FORMS: dict[str, Callable[[str], Callable[[], None]]] = {
    "torch loop, fp32": lambda net: _loop(net),
    "torch loop, bf16 autocast": lambda net: _loop(net, bf16=True),
    "torch loop, compiled, bf16 autocast": lambda net: _loop(net, bf16=True, compiled=True),
    "fit": lambda net: _fit(net, "auto"),
    "fit, fp32": lambda net: _fit(net, "fp32"),
}


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("form", FORMS)
def test_training(benchmark, net: str, form: str) -> None:
    case = f"training, {net} VAE, 64x64, {STEPS} steps of {BATCH} images"
    measure(benchmark, FORMS[form](net), case=case, form=form, ours=form.startswith("fit"), images=STEPS * BATCH)
