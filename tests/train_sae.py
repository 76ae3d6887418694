"""Trains a TopKSAE on the digits VAE's encoder, alone or as one of several processes under torchrun; prints its loss.

Arguments: the file of activations, and the number of steps.
"""

import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import vaecirc_fast as vf

BATCH, SEED = 256, 0


def main(file: str, steps: int) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        torch.distributed.init_process_group("gloo")
    x = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(SEED)
    sae = vf.nn.TopKSAE(
        x.shape[1], 300, 16, k_aux=32, dead_after=20 * BATCH, all_processes=size > 1, generator=generator
    )
    sae.centre(x)
    module = DistributedDataParallel(sae) if size > 1 else sae
    optimizer = torch.optim.Adam(sae.parameters(), 2e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]  # alike in every process
        optimizer.zero_grad()
        module(batch[rank * BATCH // size : (rank + 1) * BATCH // size]).loss.backward()
        optimizer.step()
    if rank == 0:
        with torch.no_grad():
            unexplained = sae.eval()(x).loss / (x - x.mean(0)).square().sum(1).mean()
        print(f"{float(unexplained):.6f} {int(sae.since_fired.sum())}")
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
