"""Op `render_sprites`: factor indices of dSprites -> its images, as float32, bytes or bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import render_sprites as reference
from ._library import LIBRARY, is_traced

MAX_CROSSINGS = 64  # of an outline with the rows of pixel centres, as csrc/cpu/render_sprites.h; 56 occur


def render_sprites(factors: Tensor, *, dtype: str = "float32", out: Tensor | None = None) -> Tensor:
    """The images of dSprites with the given factors.

    factors: (B, 6) int64, indices of color, shape, scale, orientation, posX and posY as `Dataset.factors` gives them;
    the sizes are 1, 3, 6, 40, 32, 32.
    dtype: "float32" for images (B, 1, 64, 64) of 0.0 and 1.0, what a model takes; "uint8" for (B, 64, 64) of 0 and 1,
    as in the official file; "bits" for uint8 (B, 512), a bit a pixel, row by row, the first pixel in the highest bit
    (`numpy.packbits`). The whole grid of 737,280 images is 12 GB, 3 GB or 377 MB.
    out: where to write, contiguous, of that shape and dtype on the device of `factors`, and what is then returned.

    Every pixel is that of the reference, on every backend: coordinates are whole numbers of 1/256 pixel. There is no
    gradient: factors are integers. Under vmap the batch dimensions are joined; `out` cannot be given there. InputError
    for other shapes, dtypes, devices, or factors out of range, before anything is written. The first call makes 14 MB
    of tables, in .1 s.
    """
    if dtype not in reference.FORMATS:
        raise InputError(f"dtype: {dtype!r} is unknown; known: {', '.join(reference.FORMATS)}")
    if not isinstance(factors, Tensor):
        raise InputError(f"factors: expected a tensor, got {type(factors).__name__}")
    if factors.ndim != 2 or factors.shape[1] != len(reference.FACTOR_SIZES) or factors.dtype != torch.int64:
        raise InputError(f"factors: expected int64 (B, 6), got {factors.dtype} {tuple(factors.shape)}")
    form = reference.FORMATS.index(dtype)
    transformed = torch._C._are_functorch_transforms_active()
    if out is None:
        run = torch.ops.vaecirc_fast.render_sprites if transformed or is_traced(factors) else _run
        return run(factors, form)
    _check_out(out, factors, form)
    run = torch.ops.vaecirc_fast.render_sprites_into if transformed or is_traced(factors, out) else _run_into
    run(factors, form, out)
    return out


def _check_out(out: Tensor, factors: Tensor, form: int) -> None:
    expected = reference.image_shape(form, factors.shape[0])
    if not isinstance(out, Tensor):
        raise InputError(f"out: expected a tensor, got {type(out).__name__}")
    if out.shape != expected or out.dtype != reference.DTYPES[form]:
        raise InputError(f"out: expected {reference.DTYPES[form]} {expected}, got {out.dtype} {tuple(out.shape)}")
    if out.device != factors.device:
        raise InputError(f"out: expected the device of factors, {factors.device}, got {out.device}")
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if out.requires_grad:
        raise InputError("out: expected a tensor without gradient; images of factors have none")


def _check_range(factors: Tensor) -> None:
    sizes = torch.tensor(reference.FACTOR_SIZES, device=factors.device)
    wrong = ((factors < 0) | (factors >= sizes)).any(1)
    if bool(wrong.any()):
        raise _out_of_range(factors, int(wrong.nonzero()[0]))


def _out_of_range(factors: Tensor, at: int) -> InputError:
    return InputError(
        f"factors: row {at} is {tuple(factors[at].tolist())}, expected indices in [0, size) with sizes "
        f"{reference.FACTOR_SIZES}"
    )


def _run(factors: Tensor, form: int) -> Tensor:
    return ROW.function("render_sprites", factors)(factors, form, None)


def _run_into(factors: Tensor, form: int, out: Tensor) -> None:
    ROW.function("render_sprites", factors)(factors, form, out)
    # Kernels write behind torch's back: a graph that has saved `out` must hear of it.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


LIBRARY.define("render_sprites(Tensor factors, int form) -> Tensor")
LIBRARY.define("render_sprites_into(Tensor factors, int form, Tensor(a!) out) -> ()")
LIBRARY.impl("render_sprites", _run, "CompositeExplicitAutograd")
LIBRARY.impl("render_sprites_into", _run_into, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::render_sprites", lib=LIBRARY)
def _fake(factors, form):
    return factors.new_empty(reference.image_shape(form, factors.shape[0]), dtype=reference.DTYPES[form])


@torch.library.register_fake("vaecirc_fast::render_sprites_into", lib=LIBRARY)
def _fake_into(factors, form, out):
    return None


def _vmap(info: Any, in_dims: tuple, factors: Tensor, form: int) -> tuple[Tensor, int]:
    factors = factors.movedim(in_dims[0], 0)
    out = torch.ops.vaecirc_fast.render_sprites(factors.flatten(0, 1), form)
    return out.unflatten(0, factors.shape[:2]), 0


def _vmap_into(info: Any, in_dims: tuple, factors: Tensor, form: int, out: Tensor):
    raise InputError("out: cannot be given under vmap")


torch.library.register_vmap("vaecirc_fast::render_sprites", _vmap, lib=LIBRARY)
torch.library.register_vmap("vaecirc_fast::render_sprites_into", _vmap_into, lib=LIBRARY)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x int16 (720, 32, V + 1), first int32 (23041) and crossings int16 (n, 4) of csrc/cpu/render_sprites.h."""
    outlines, centres = reference.sprite_outlines().flatten(0, 2), reference.sprite_centres()
    abscissas, crossings, counts = [], [], [torch.zeros(1, dtype=torch.int64, device="cpu")]
    for some in outlines.split(20):  # so that the temporaries stay in cache
        x, y = reference.snap(some[:, None] + centres[:, None, None]).unbind(-1)
        abscissas.append(torch.cat([x, x[..., :1]], -1).short())
        edge, row, along, rise = reference.crossings(y.flatten(0, 1))
        outline, edge = edge // y.shape[2], edge % y.shape[2]
        crossings.append(torch.stack([row, edge, along, rise], 1).short())
        counts.append(torch.bincount(outline, minlength=len(some) * len(centres)))
    assert int(torch.cat(counts).max()) <= MAX_CROSSINGS
    first = torch.cat(counts).cumsum(0).int()
    return torch.cat(abscissas).to(device), first.to(device), torch.cat(crossings).to(device)


def _reference(factors: Tensor, form: int, out: Tensor | None) -> Tensor:
    _check_range(factors)
    return reference.forward(factors, form, out)


def _cpp(factors: Tensor, form: int, out: Tensor | None) -> Tensor:
    x, first, crossings = _tables(factors.device)
    factors, fresh = factors.contiguous(), out is None
    if out is None:
        out = torch.empty(reference.image_shape(form, len(factors)), dtype=reference.DTYPES[form], device="cpu")
    wrong = _native.cpp().render_sprites(
        *(factors.data_ptr(), len(factors), reference.FACTOR_SIZES, x.data_ptr(), x.shape[2]),
        *(first.data_ptr(), crossings.data_ptr(), form, out.data_ptr(), fresh),
        # A batch of 64 takes .1 ms: on a busy machine threads need longer to find each other.
        _native.threads(len(factors) << 8),
    )
    if wrong >= 0:
        raise _out_of_range(factors, wrong)
    return out


def _load_reference():
    return {"render_sprites": _reference}


def _load_cpp():
    return {"render_sprites": _cpp}


def _load_triton():
    from ..triton_kernels import render_sprites as kernels  # pyright: ignore[reportMissingImports]

    def forward(factors: Tensor, form: int, out: Tensor | None) -> Tensor:
        _check_range(factors)
        if out is None:
            shape = reference.image_shape(form, len(factors))
            out = torch.empty(shape, dtype=reference.DTYPES[form], device=factors.device)
        kernels.forward(factors, reference.FACTOR_SIZES, *_tables(factors.device), MAX_CROSSINGS, form, out)
        return out

    return {"render_sprites": forward}


_INDICES = (torch.int64,)
ROW = _registry.Row(
    "render_sprites",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _INDICES, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), _INDICES, _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _INDICES, _registry.triton_reason),
        "cuda": _registry.Absent("is not written: threads exchange nothing but one sum, which Triton expresses fully"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
