"""Benchmark of training: `fit` against the loop one writes first, on dSprites with the reference nets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vaecirc_fast as vf

from .harness import measure
from .plain_objectives import OPTIONS, PlainTraining
from .plain_vq_vae import PlainVqTraining

BATCH, STEPS = 64, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _loop(name: str, net: str, *, bf16: bool = False, compiled: bool = False) -> Callable[[], None]:
    """STEPS updates in plain torch: the same nets, data and objective, Adam with its defaults."""
    if name == "vq_vae":
        plain = PlainVqTraining(net, BATCH, DEVICE, bf16=bf16)
    else:
        plain = PlainTraining(name, net, BATCH, DEVICE, bf16=bf16, compiled=compiled)

    def call() -> None:
        for _ in range(STEPS):
            plain.step()

    return call


def _fit(name: str, net: str, precision: str) -> Callable[[], None]:
    """One whole call of `fit`, with its checks, its optimizer made anew and the model's layout changed and restored."""
    torch.manual_seed(0)
    ds = vf.data.load("dsprites")
    model = vf.models.build(name, ds.shape, net=net, **OPTIONS.get(name, {})).to(DEVICE)

    def call() -> None:
        vf.training.fit(model, ds, steps=STEPS, batch_size=BATCH, precision=precision, progress=False)

    return call


# The loops come first: `fit` leaves the C allocator keeping blocks up to 32 MiB, which speeds up what runs after it.
FORMS: dict[str, Callable[[str, str], Callable[[], None]]] = {
    "torch loop, fp32": lambda name, net: _loop(name, net),
    "torch loop, bf16 autocast": lambda name, net: _loop(name, net, bf16=True),
    "torch loop, compiled, bf16 autocast": lambda name, net: _loop(name, net, bf16=True, compiled=True),
    "fit": lambda name, net: _fit(name, net, "auto"),
    "fit, fp32": lambda name, net: _fit(name, net, "fp32"),
}
CASES = [("vae", "conv"), ("vae", "mlp"), *((name, "conv") for name in OPTIONS if name != "vae"), ("vq_vae", "conv")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "net"), CASES)
def test_training(benchmark, name: str, net: str, form: str) -> None:
    if "compiled" in form and name != "vae":
        pytest.skip("compiled once, for the nets, which all share")
    label = "VAE" if name == "vae" else name
    case = f"training, {net} {label}, 64x64, {STEPS} steps of {BATCH} images"
    images = STEPS * BATCH
    measure(benchmark, FORMS[form](name, net), case=case, form=form, ours=form.startswith("fit"), images=images)
