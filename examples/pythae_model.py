"""Measure a model that pythae trained (pip install pythae)."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from pythae.models import BetaVAE, BetaVAEConfig
from pythae.trainers import BaseTrainer, BaseTrainerConfig

import vaecirc_fast as vf


def main(out: str = "runs/pythae", epochs: int = 20, **protocol: Any) -> vf.studies.ModelMeasurement:
    ds = vf.data.load("digits")
    x = ds.images(torch.arange(len(ds)))
    torch.manual_seed(0)
    model = BetaVAE(BetaVAEConfig(input_dim=ds.shape, latent_dim=6, beta=1.0, reconstruction_loss="bce"))
    with tempfile.TemporaryDirectory() as directory:
        settings = BaseTrainerConfig(
            output_dir=directory, num_epochs=epochs, per_device_train_batch_size=64, no_cuda=True
        )
        rows = [{"data": image} for image in x]
        BaseTrainer(model, train_dataset=Rows(rows), training_config=settings).train()
    found = vf.studies.measure_model(model, ds, name="pythae_beta_vae", **protocol)
    print(found)
    print("report:", found.save(out))
    return found


class Rows(torch.utils.data.Dataset):
    """What pythae's trainer asks for: rows with the key `data`."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict:
        return self.rows[n]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/pythae")
