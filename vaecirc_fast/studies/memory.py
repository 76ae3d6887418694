"""What the runs of a study need in memory, told before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import models
from ..data import Dataset, memory

PROCESS = 700 << 20  # bytes of a process that has imported torch, scipy and scikit-learn
COPIES = 2.5  # of the images that a model is judged on: themselves, and what is made of them on the way
TRAINING = 3  # of every layer's output: the value, its gradient, and what is in flight


def check_memory(
    runs: Sequence[Mapping[str, Any]], sets: Mapping[str, Dataset], workers: int, device: torch.device
) -> None:
    """InputError where the largest run, in each of `workers` processes at a time, does not fit what is free now.

    An estimate from the shapes of images and layers; on a CPU only, since a GPU's memory is not the process's alone.
    """
    if device.type != "cpu":
        return
    needs = {}
    for c in runs:
        cell = tuple(str(value) for key, value in sorted(c.items()) if key not in ("seed", "lr", "steps"))
        needs.setdefault(cell, (needed_bytes(c, sets[c["data"]]), c))
    need, c = max(needs.values(), key=lambda pair: pair[0])
    what = f"{workers} runs at a time, of the largest" if workers > 1 else "the largest run"
    memory.check(
        workers * need,
        f"{what} ({c['data']}, {c['architecture']})",
        f"lower workers, images ({c['images']:,}), batch_size ({c['batch_size']:,}) or width ({c['width']:g})",
    )


def needed_bytes(c: Mapping[str, Any], ds: Dataset) -> int:
    """About how many bytes the run `c` takes at its peak, in training or in measuring."""
    with torch.device("meta"):
        options = {"latents": c["latents"], "net": c["net"], "likelihood": ds.likelihood, "width": c["width"]}
        size = {"dataset_size": len(ds)} if "dataset_size" in models.options(c["architecture"]) else {}
        model = models.build(c["architecture"], ds.shape, **options, **size, **c["options"])
    parameters = 4 * sum(p.numel() for p in model.parameters())
    layers = 4 * _outputs(model)
    image = 4 * math.prod(ds.shape)
    training = 4 * parameters + TRAINING * c["batch_size"] * (layers + image)
    images = min(c["images"], len(ds))
    judged = 2 * parameters + COPIES * images * image
    swept = 4 * c["sweep_images"] * image + 500 * layers
    patched = 2 * max(c["pairs"], c["circuit_pairs"]) * (layers + (1 + len(ds.factor_sizes)) * image)
    return PROCESS + int(max(training, judged + max(swept, patched)))


def _outputs(model: models.ImageModel) -> int:
    """Numbers that the layers of the encoder and the decoder give for one image."""
    found = []

    def count(module: nn.Module, given: Any, output: Any) -> None:
        found.extend(t.numel() for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t))

    handles = [m.register_forward_hook(count) for m in model.modules() if not any(m.children())]
    model.encoder(torch.zeros(1, *model.shape, device="meta"))
    width = (model.codebook.shape[1],) if isinstance(model, models.VQVAE) else ()
    model.decoder(torch.zeros(1, *width, model.latents, device="meta"))
    for handle in handles:
        handle.remove()
    return sum(found)
