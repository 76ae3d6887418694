"""Sweeps over discrete latents: what each position's code, or each channel, of a quantiser does to the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..groups import Groups
from ..metrics.causal import REPLICATES
from ..models.codes import Codes
from . import grids
from .accumulate import Axes
from .effects import Effects
from .engine import Calls, GenericPath, check_options, sweep

NAMES = ("code_swap", "code_neighbour", "z_e", "z_q")
DISCRETE = ("code_swap", "code_neighbour")
_SCORE_BYTES = 8 << 20  # of distances to codes at once


@torch.no_grad()
def code_sweep(
    decoder: Callable[[Tensor], Tensor],
    codes: Codes,
    codebook: Tensor,
    *,
    grid: str = "code_swap",
    scale: Tensor | None = None,
    effect: str = "l1",
    groups: Groups | None = None,
    reduce: str | None = "mean",
    on: str = "output",
    draws: int = grids.DRAWS,
    replicates: int = REPLICATES,
    seed: int = 0,
    tile: int | None = None,
    out: str | Path | None = None,
) -> Effects:
    """Effects of changing the codes of a vector quantiser on the decoder's output.

    decoder: any callable (rows, D, ...) -> (rows, ...) of quantised latents. codebook: (K, D) of z_q's dtype, K >= 2.
    grid, of P positions:
    - "code_swap": the code of one position becomes another one, drawn by usage: code k with probability
      n_k / sum of n over the codes other than the present one, n_k how often k occurs in `codes.indices`. `draws`
      independent draws of `seed`. A position whose code is the only one in use stays as it is.
    - "code_neighbour": it becomes its 1st, ..., `draws`-th nearest other code (Euclidean; ties: lowest index).
    - "z_e": channel c of z_e moves by t s_c at every position, t = +-.5, ..., +-2, and z_e is quantised again to the
      nearest codes (Euclidean; ties: lowest index). The base is the output for the nearest codes of z_e itself.
    - "z_q": channel c of z_q moves so and is not quantised.
    scale: (D,) s_c of "z_e" and "z_q"; by default the standard deviation of that channel of z_e, or z_q, over samples
    and positions (of the population: no N - 1).
    Everything else as in `latent_sweep`.

    Returns Effects with dims (position, draw, group) for the first two, positions row-major and neighbours counted from
    1, and (channel, step, group) for the others; sample first if reduce is None. CES divides by |t| for "z_e" and
    "z_q" and by nothing for the others. An intervention that changes nothing (a draw of an equal vector, a shift after
    which every code is nearest still) is exactly 0 and never decoded.
    InputError for a codebook of one code, indices outside it, shapes or dtypes that do not fit together, NaN, codes
    that are not of this codebook, unknown names.
    """
    _check_codes(codes, codebook)
    if grid not in NAMES:
        raise InputError(f"grid: {grid!r} is unknown; known: {', '.join(NAMES)}")
    check_options(
        effect=effect, groups=groups, reduce=reduce, on=on, replicates=replicates, tile=tile, draws=draws, out=out
    )
    started = time.perf_counter()
    make = _Discrete if grid in DISCRETE else _Requantised if grid == "z_e" else _Shifted
    form = make(codes, codebook, grid, scale, draws, seed)
    call = Calls(decoder, form.base, effect, on, tile)
    groups = call.partition(groups)
    with call:
        path = GenericPath(call, form.axes, form.intervened, groups, skip_unchanged=True, why="codes")
        return sweep(
            *(call, form.axes, path, groups),
            effect=effect,
            reduce=reduce,
            replicates=replicates,
            seed=seed,
            started=started,
            out=out,
        )


class _Discrete:
    """One position's code replaced."""

    def __init__(self, codes: Codes, codebook: Tensor, grid: str, scale: Tensor | None, draws: int, seed: int):
        self.codebook = codebook
        indices = codes.indices.reshape(len(codes.indices), -1).long()
        if grid == "code_swap":
            self.codes = swaps(indices, len(codebook), draws, seed)
            coordinates = torch.arange(draws)
        else:
            if draws >= len(codebook):
                raise InputError(f"draws: a code has {len(codebook) - 1} neighbours in this codebook, got {draws}")
            self.codes = neighbours(codebook, draws)[indices]
            coordinates = torch.arange(1, draws + 1)
        self.base = _looked_up(codebook, codes.indices)
        positions = indices.shape[1]
        decoded = torch.ones(positions, draws, dtype=torch.bool)
        self.axes = Axes(grid, "position", "draw", range(positions), coordinates, decoded)
        self.positions, self.draws = decoded.nonzero().to(codebook.device).unbind(1)

    def intervened(self, samples: slice, chosen: Tensor) -> Tensor:
        position, draw = self.positions[chosen], self.draws[chosen]
        batch = _copies(self.base[samples], len(chosen))
        vectors = self.codebook[self.codes[samples][:, position, draw]]
        where = position[None, :, None, None].expand(*batch.shape[:3], 1)
        return batch.scatter_(3, where, vectors[..., None]).reshape(*batch.shape[:2], *self.base.shape[1:])


class _Shifted:
    """One channel of z_q moved at every position."""

    def __init__(self, codes: Codes, codebook: Tensor, grid: str, scale: Tensor | None, draws: int, seed: int):
        self.base = codes.z_q
        self.axes, self.shift = _channel_axes(grid, codes.z_q, scale)
        self.channels, self.steps = self.axes.decoded.nonzero(as_tuple=True)

    def intervened(self, samples: slice, chosen: Tensor) -> Tensor:
        channel, step = self.channels[chosen], self.steps[chosen]
        batch = _copies(self.base[samples], len(chosen))
        numbers = torch.arange(len(chosen), device=batch.device)
        batch[:, numbers, channel] += self.shift[channel, step][:, None]
        return batch.reshape(*batch.shape[:2], *self.base.shape[1:])


class _Requantised:
    """One channel of z_e moved at every position, and the nearest codes looked up."""

    def __init__(self, codes: Codes, codebook: Tensor, grid: str, scale: Tensor | None, draws: int, seed: int):
        self.z_e, self.codebook = codes.z_e, codebook
        self.axes, self.shift = _channel_axes(grid, codes.z_e, scale)
        self.channels, self.steps = self.axes.decoded.nonzero(as_tuple=True)
        nearest = self._nearest(slice(0, len(codes.z_e)))
        _check_nearest(codes, codebook, nearest)
        self.base = _looked_up(codebook, nearest)

    def intervened(self, samples: slice, chosen: Tensor) -> Tensor:
        channel, step = self.channels[chosen], self.steps[chosen]
        nearest = self._nearest(samples, channel, self.shift[channel, step].double())
        return _looked_up(self.codebook, nearest.flatten(0, 1)).unflatten(0, nearest.shape[:2])

    def _nearest(self, samples: slice, channel: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Nearest codes (B, ...) of z_e[samples], or (B, J, ...) with channel[j] moved by shift[j].

        |z - e|^2 / 2 less |z|^2 / 2, which is the same for every code, is |e|^2 / 2 - z e; a move by d along a channel
        takes d e_c from it. In float64: of codes that lie equally far, as float32 has them, the first is taken.
        """
        z = self.z_e[samples]
        book = self.codebook.double()
        half = book.square().sum(1) / 2
        count = 1 if channel is None else len(channel)
        nearest = torch.empty(len(z), count, *z.shape[2:], dtype=torch.int64, device=z.device)
        flat = nearest.view(len(z), count, -1)
        for part in _parts(len(z), 8 * flat.shape[2] * len(book)):
            scores = half - z[part].reshape(*z[part].shape[:2], -1).transpose(1, 2).double() @ book.T
            for j in range(count):
                moved = scores if channel is None or shift is None else scores - shift[j] * book[:, channel[j]]
                flat[part, j] = moved.argmin(2)
        return nearest[:, 0] if channel is None else nearest


def swaps(indices: Tensor, size: int, draws: int, seed: int) -> Tensor:
    """For codes (N, P) of a codebook of `size`, others drawn by usage: (N, P, draws) int64.

    Code k != c replaces c with probability n_k / (total - n_c); c itself where no other code is in use. Drawn on the
    CPU from `seed` alone.
    """
    present = indices.cpu()
    usage = torch.bincount(present.flatten(), minlength=size)
    below = usage.cumsum(0) - usage  # of the codes in a row by index, how many come before the first k
    others = present.numel() - usage[present]
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(*present.shape, draws, generator=generator, dtype=torch.float64)
    place = (uniform * others[..., None]).long().clamp(max=(others - 1).clamp(min=0)[..., None])
    place += torch.where(place >= below[present][..., None], usage[present][..., None], 0)
    drawn = torch.searchsorted(usage.cumsum(0), place, right=True)
    return torch.where(others[..., None] > 0, drawn, present[..., None]).to(indices.device)


def neighbours(codebook: Tensor, count: int) -> Tensor:
    """The `count` nearest other codes of each code, nearest first: (K, count) int64. Ties: lowest index."""
    book = codebook.double()
    nearest = torch.empty(len(book), count, dtype=torch.int64, device=book.device)
    for part in _parts(len(book), 8 * book.numel()):
        distance = (book[part, None] - book).square().sum(2)
        rows = torch.arange(part.start, part.stop, device=book.device)
        distance[rows - part.start, rows] = torch.inf
        nearest[part] = distance.argsort(dim=1, stable=True)[:, :count]
    return nearest


def _parts(rows: int, bytes_a_row: int) -> Iterator[slice]:
    size = max(1, _SCORE_BYTES // bytes_a_row)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _copies(base: Tensor, count: int) -> Tensor:
    """(B, D, ...) as (B, count, D, positions)."""
    return base.reshape(*base.shape[:2], -1)[:, None].repeat(1, count, 1, 1)


def _looked_up(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[indices] with channels second: (N, ...) -> (N, D, ...)."""
    return codebook[indices.long()].movedim(-1, 1).contiguous()


def _channel_axes(grid: str, values: Tensor, scale: Tensor | None) -> tuple[Axes, Tensor]:
    """The axes of channels and steps t, and the shifts t s_c (D, S)."""
    channels = values.shape[1]
    if scale is None:
        if values.numel() == channels:
            raise InputError(f"codes: one value a channel has no standard deviation; pass scale ({channels},)")
        scale = values.double().transpose(0, 1).flatten(1).std(1, correction=0)
    elif not isinstance(scale, Tensor) or tuple(scale.shape) != (channels,):
        given = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise InputError(f"scale: expected a tensor ({channels},), one number a channel, got {given}")
    elif not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise InputError(f"scale: expected finite numbers >= 0, got {scale.tolist()}")
    t = grids.symmetric(4, 0.5).to(values.device)
    shift = (scale.to(t)[:, None] * t).to(values.dtype)
    t = t.to(values.dtype)
    axes = Axes(grid, "channel", "step", range(channels), t, shift != 0, t.abs().expand(channels, -1))
    return axes, shift


def _check_codes(codes: Codes, codebook: Tensor) -> None:
    if not all(isinstance(getattr(codes, name, None), Tensor) for name in ("indices", "z_e", "z_q")):
        raise InputError(f"codes: expected Codes(indices, z_e, z_q) of tensors, got {type(codes).__name__}")
    indices, z_e, z_q = codes.indices, codes.z_e, codes.z_q
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        given = f"{codebook.dtype} {tuple(codebook.shape)}" if isinstance(codebook, Tensor) else type(codebook).__name__
        raise InputError(f"codebook: expected floats (K, D), got {given}")
    size, width = codebook.shape
    if size < 2 or width < 1:
        raise InputError(f"codebook: expected at least 2 codes of at least 1 channel, got {size} of {width}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise InputError(f"codes.indices: expected integers, got {indices.dtype}")
    if indices.ndim < 1 or 0 in indices.shape:
        raise InputError(f"codes.indices: expected (N, ...) with at least one position, got {tuple(indices.shape)}")
    expected = (indices.shape[0], width, *indices.shape[1:])
    for name, values in (("z_e", z_e), ("z_q", z_q)):
        if tuple(values.shape) != expected:
            raise InputError(
                f"codes.{name}: expected shape {expected} for indices {tuple(indices.shape)} and a codebook "
                f"{tuple(codebook.shape)}, got {tuple(values.shape)}"
            )
        if values.dtype != codebook.dtype:
            raise InputError(f"codes.{name}: expected the codebook's dtype {codebook.dtype}, got {values.dtype}")
    devices = {t.device for t in (indices, z_e, z_q, codebook)}
    if len(devices) > 1:
        raise InputError(f"codes: expected one device with the codebook, got {', '.join(sorted(map(str, devices)))}")
    for name, values in (("codebook", codebook), ("codes.z_e", z_e), ("codes.z_q", z_q)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name}: contains NaN or infinity")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise InputError(f"codes.indices: expected 0..{size - 1}, the codebook's rows, got {low}..{high}")
    # z_q may be z_e + (z_q - z_e), the straight-through form, which rounds
    off = float((z_q - _looked_up(codebook, indices)).abs().max())
    largest = float(codebook.abs().max() + z_e.abs().max())
    if off > 8 * torch.finfo(z_q.dtype).eps * largest:
        raise InputError(
            f"codes.z_q: differs from codebook[indices] by up to {off:.3g}; pass the codebook it came from"
        )


def _check_nearest(codes: Codes, codebook: Tensor, nearest: Tensor) -> None:
    """z_e is quantised by Euclidean distance here; InputError where `codes.indices` were found otherwise."""

    def distance(indices: Tensor) -> Tensor:
        return (codes.z_e.double() - _looked_up(codebook, indices).double()).square().sum(1)

    given, least = distance(codes.indices), distance(nearest)
    rounding = (
        64
        * torch.finfo(codebook.dtype).eps
        * (codes.z_e.double().square().sum(1) + codebook.double().square().sum(1).max())
    )
    wrong = int((given > least + rounding).sum())
    if wrong:
        raise InputError(
            f"codes.indices: {wrong} of {given.numel()} are not the code nearest to z_e, by which grid='z_e' "
            "quantises; use a discrete grid or z_q"
        )
