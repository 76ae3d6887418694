"""Triton kernel of `render_sprites`; the mathematics is vaecirc_fast/reference/render_sprites.py.

A program draws a block of images, each as 64 rows of 64 bits: the columns from a left crossing to the next right one
are 2^right - 2^left, so a row is the sum of +-2^column over its crossings. Then it spreads the bits into the format.
"""

import torch
import triton
import triton.language as tl

# Numbers of the formats; the order of FORMATS in the reference.
FLOAT32, UINT8, BITS = (tl.constexpr(n) for n in range(3))


@triton.jit
def _render_sprites_kernel(
    factors,  # (B, 6) color, shape, scale, orientation, posX, posY
    x,  # (shape scale orientation, posX, VERTICES)
    first,  # (shape scale orientation posY + 1) where each list of crossings starts
    crossings,  # (n, 4) row, edge, along, rise
    out,
    B,
    SCALES: tl.constexpr,
    ORIENTATIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    VERTICES: tl.constexpr,
    MAX_CROSSINGS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = b < B
    v = factors + 6 * b
    shape = tl.load(v + 1, mask=inside, other=0)
    scale = tl.load(v + 2, mask=inside, other=0)
    orientation = tl.load(v + 3, mask=inside, other=0)
    pos_x = tl.load(v + 4, mask=inside, other=0)
    pos_y = tl.load(v + 5, mask=inside, other=0)
    outline = (shape * SCALES + scale) * ORIENTATIONS + orientation
    start = tl.load(first + outline * ROWS + pos_y)
    size = tl.load(first + outline * ROWS + pos_y + 1) - start

    k = tl.arange(0, MAX_CROSSINGS)
    there = k[None, :] < size[:, None]
    record = crossings + 4 * (start[:, None] + k[None, :])
    row = tl.load(record, mask=there, other=0).to(tl.int32)
    edge = tl.load(record + 1, mask=there, other=0).to(tl.int32)
    along = tl.load(record + 2, mask=there, other=0).to(tl.int32)
    rise = tl.load(record + 3, mask=there, other=1).to(tl.int32)
    vertex = x + ((outline * COLUMNS + pos_x) * VERTICES)[:, None] + edge
    x0 = tl.load(vertex, mask=there, other=0).to(tl.int32)
    x1 = tl.load(vertex + 1, mask=there, other=0).to(tl.int32)
    # The first column whose centre is at or right of the crossing: a quotient, rounded up. Everything is positive.
    height = tl.where(rise < 0, -rise, rise)
    column = ((x0 - 128) * height + along * (x1 - x0) + 256 * height - 1) // (256 * height)
    # For packed bits the first column is the highest one, and what is right of a crossing lies below it.
    shift = 64 - column if FORM == BITS else column
    bit = tl.full([BLOCK, MAX_CROSSINGS], 1, tl.int64) << shift.to(tl.int64)
    bit = tl.where((rise < 0) == (FORM == BITS), bit, -bit)
    r = tl.arange(0, 64)
    here = there[:, None, :] & (row[:, None, :] == r[None, :, None])
    rows = tl.sum(tl.where(here, bit[:, None, :], 0), 2)

    if FORM == BITS:
        j = tl.arange(0, 8)
        byte = (rows[:, :, None] >> (56 - 8 * j)[None, None, :].to(tl.int64)) & 255
        at = (b * 512)[:, None, None] + (r * 8)[None, :, None] + j[None, None, :]
        tl.store(out + at, byte.to(tl.uint8), mask=inside[:, None, None])
    else:
        c = tl.arange(0, 64)
        pixel = (rows[:, :, None] >> c[None, None, :].to(tl.int64)) & 1
        at = (b * 4096)[:, None, None] + (r * 64)[None, :, None] + c[None, None, :]
        tl.store(out + at, pixel.to(out.dtype.element_ty), mask=inside[:, None, None])


def forward(factors, sizes, x, first, crossings, max_crossings, form, out):
    """Writes the images of factors (B, 6), all in range, to `out`; the tables are those of ops/render_sprites.py."""
    # On a GPU two images fill the registers of a program; the interpreter wants few, big programs.
    block = 2 if factors.is_cuda else 64
    if len(factors):
        _render_sprites_kernel[(triton.cdiv(len(factors), block),)](
            *(factors.contiguous(), x, first, crossings, out, len(factors)),
            *sizes[2:],
            VERTICES=x.shape[2],
            MAX_CROSSINGS=max_crossings,
            FORM=form,
            BLOCK=block,
        )


def _draw(form, shape, dtype):
    """A batch drawn with tables of their real sizes, for the calls below."""
    factors = torch.empty(4096, 6, dtype=torch.int64, device="cuda")
    x = torch.empty(720, 32, 151, dtype=torch.int16, device="cuda")
    first = torch.empty(23041, dtype=torch.int32, device="cuda")
    crossings = torch.empty(751_592, 4, dtype=torch.int16, device="cuda")
    out = torch.empty(4096, *shape, dtype=dtype, device="cuda")
    forward(factors, (1, 3, 6, 40, 32, 32), x, first, crossings, 64, form, out)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "float32": (lambda: _draw(0, (1, 64, 64), torch.float32), ("STG.E.128",)),
    "uint8": (lambda: _draw(1, (64, 64), torch.uint8), ("STG.E.128",)),
    "bits": (lambda: _draw(2, (512,), torch.uint8), ("STG.E.64",)),
}
