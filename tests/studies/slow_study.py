"""The command line, for tests to stop in mid-training: checkpoints are frequent, and step 50 is announced.

Arguments: "wait" (step 50 never ends) or "crawl" (every later step takes a while), then those of `vaecirc`.
"""

import functools
import sys
import time

import torch

from vaecirc_fast import cli
from vaecirc_fast.studies import image

torch.set_num_threads(1)


def pace(step, terms):
    if step == 50:
        print("under way", flush=True)
    if step >= 50:
        time.sleep(600 if sys.argv[1] == "wait" else 0.05)


fit = image.training.fit


@functools.wraps(fit)
def slow(*args, **options):
    return fit(*args, **options | {"progress": pace, "log_every": 1, "checkpoint_every": 20})


image.training.fit = slow
sys.exit(cli.main(sys.argv[2:]))
