"""Memory that ends at a page nobody may touch: reading or writing one byte too far ends the process.

Run as a program it puts every argument of the emulated CUDA kernels of effect_reduction into such memory.
"""

import ctypes
import itertools
import mmap

import cuda_emulator
import torch

import vaecirc_fast as vf
from vaecirc_fast import _native

_libc = ctypes.CDLL(None, use_errno=True)
_kept = []  # the mappings, alive as long as the process


def guarded(size, dtype, before=False) -> torch.Tensor:
    """A tensor of `size` whose last byte, or `before` it whose first, lies at a forbidden page; filled with NaN."""
    count = torch.Size(size).numel()
    bytes_ = count * torch.empty(0, dtype=dtype).element_size()
    pages = -(-bytes_ // mmap.PAGESIZE) + 2
    mapping = mmap.mmap(-1, pages * mmap.PAGESIZE)
    _kept.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (0, pages - 1):
        if _libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE if before else (pages - 1) * mmap.PAGESIZE - bytes_
    tensor = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(size)
    return tensor.fill_(torch.nan) if dtype.is_floating_point else tensor


def placed(tensor: torch.Tensor, before: bool) -> torch.Tensor:
    """A copy of a tensor in such memory."""
    return guarded(tensor.shape, tensor.dtype, before).copy_(tensor)


def results(module, inputs, link, new) -> list[torch.Tensor]:
    """Effects apart and summed, and gradients in one and in several parts; `new` makes the tensors they go to."""
    base, perturbed, labels, order, offsets, factors = inputs
    B, I, P = perturbed.shape
    G = len(offsets) - 1
    sizes = (_native.DTYPES[base.dtype], link, B, I, P, G)
    found = []
    for summed, outer in ((False, B), (True, min(B, 2))):
        out = new((outer, I, 3, G), factors.dtype)
        module.effect_reduction(
            *(base.data_ptr(), perturbed.data_ptr(), order.data_ptr(), offsets.data_ptr(), *sizes, len(order)),
            *([0, 2, 5], summed, outer, out.data_ptr(), 0, 0),
        )
        found.append(out)
    for parts in {1, min(I, 3)}:
        of_perturbed = new((B, I, P), base.dtype)
        of_base = new((B, P), base.dtype) if parts == 1 else new((parts, B, P), factors.dtype)
        module.effect_reduction_backward(
            *(base.data_ptr(), perturbed.data_ptr(), labels.data_ptr(), *sizes, factors.data_ptr(), I * 4 * G),
            *(of_perturbed.data_ptr(), parts, of_base.data_ptr(), 0, 0),
        )
        found += [of_perturbed, of_base]
    return found


def problems():
    """Inputs whose rows are copied to shared memory, of whole and of broken vectors, or are too long for that.

    In one a whole block adds up several groups, one after the other.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 64, 5), (2, 5, 37, 3), (3, 1, 8, 8), (3, 2, 1200, 2), (1, 3, 16640, 3), (2, 2, 16397, 2)]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for (B, I, P, G), dtype in itertools.product(shapes, dtypes):
        labels = torch.randint(-1, G, (P,), generator=generator)
        labels[-G:] = torch.arange(G)
        groups = vf.groups.from_labels(labels.sort().values if P % 2 else labels)
        base = torch.randn(B, P, generator=generator).to(dtype)
        perturbed = torch.randn(B, I, P, generator=generator).to(dtype)
        factors = torch.randn(B, I, 4, G, generator=generator, dtype=torch.float64)
        factors = factors.to(torch.float64 if dtype == torch.float64 else torch.float32)
        yield base, perturbed, groups.labels, groups.order, groups.offsets, factors


def main() -> None:
    """What the kernels give in such memory is what they give elsewhere, to the bit."""
    module = cuda_emulator.load(cuda_emulator.build())
    for inputs, (link, before) in itertools.product(problems(), ((0, False), (1, True))):
        expected = results(module, inputs, link, lambda size, dtype: torch.full(size, torch.nan, dtype=dtype))
        edge = [placed(x, before) for x in inputs]
        got = results(module, edge, link, lambda size, dtype, before=before: guarded(size, dtype, before))
        for a, b in zip(got, expected, strict=True):
            assert bool(a.isfinite().all()) and torch.equal(a, b), (inputs[1].shape, inputs[1].dtype, link, before)
    print("all within bounds")


if __name__ == "__main__":
    main()
