"""A kernel whose compilation does not end in any time that one would wait."""

import torch
import triton
import triton.language as tl


@triton.jit
def _endless_kernel(x):
    value = tl.load(x)
    for _ in tl.static_range(1_000_000_000):
        value = value * value + 1.0
    tl.store(x, value)


GATE = {"endless": (lambda: _endless_kernel[(1,)](torch.empty(1, device="cuda")), ())}
