"""Kernels that the compile gate must judge as their names say: what shows that it can fail."""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_kernel(x, out, n, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + k, row - tl.max(row), mask=k < n)


@triton.jit
def _dot_kernel(x, out, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    at = k[:, None] * BLOCK + k[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tl.dot(tile, tile, out_dtype=tl.float32).to(out.dtype.element_ty))


@triton.jit
def _broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.zeros([BLOCK + 1], tl.float32))


def _launch(kernel, dtype=torch.float32, **options):
    x = torch.empty(4096, dtype=dtype, device="cuda")
    if kernel is _row_kernel:
        kernel[(1,)](x, x, 4096, BLOCK=4096, **options)
    elif kernel is _dot_kernel:
        kernel[(1,)](x, x, BLOCK=64, **options)
    else:
        kernel[(1,)](x, BLOCK=64, **options)


GATE = {
    "passes": (lambda: _launch(_row_kernel), ("LDG.E.128", "STG")),
    "passes on Hopper's matrix units": (lambda: _launch(_dot_kernel, torch.bfloat16), ("90:HGMMA", "80:HMMA")),
    "too few registers": (lambda: _launch(_row_kernel, maxnreg=24), ()),
    "no kernel at all": (lambda: _launch(_broken_kernel), ()),
}
