"""A training run for test_resume.py to kill: a checkpoint at every step, and a line once it is well under way.

Arguments: the directory, the precision, the number of steps.
"""

import sys

import torch
from blobs import Blobs

from vaecirc_fast import models, training

out, precision, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])


def announce(step, terms):
    if step == 20:
        print("under way", flush=True)


torch.set_num_threads(1)
torch.manual_seed(0)
model = models.build("beta_vae", (1, 16, 16), 4, width=0.25)
training.fit(
    model,
    Blobs(),
    steps=steps,
    batch_size=8,
    out=out,
    precision=precision,
    checkpoint_every=1,
    log_every=5,
    progress=announce,
)
