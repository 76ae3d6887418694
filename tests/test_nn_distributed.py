"""A TopKSAE trained by two processes on a digits VAE's activations reaches the loss of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaecirc_fast as vf

SCRIPT = Path(__file__).parent / "train_sae.py"
STEPS = 150


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """What the last hidden layer of a trained encoder gives for all digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ds = vf.data.load("digits")
    model = vf.models.build("vae", ds.shape, latents=6, net="mlp", trials=ds.trials)
    vf.training.fit(model, ds, steps=300, batch_size=64, lr=1e-3, progress=False)
    found = []
    handle = model.encoder.mu.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    model.encode(ds.images(range(len(ds))))
    handle.remove()
    torch.set_num_threads(threads)
    file = tmp_path_factory.mktemp("activations") / "digits.pt"
    torch.save(found[0].clone(), file)
    return file


def loss_of(command, file):
    done = subprocess.run([*command, str(SCRIPT), str(file), str(STEPS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loss, since_fired = done.stdout.split()
    return float(loss), int(since_fired)


def test_two_processes_reach_the_loss_of_one(activations):
    alone, counted = loss_of([sys.executable], activations)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together, counted_together = loss_of(torchrun, activations)
    # Gradients of two halves, averaged, are those of the whole but for their rounding, which training spreads.
    assert alone < 0.1 and together == pytest.approx(alone, rel=0.02)
    assert counted_together == pytest.approx(counted, rel=0.1)
