"""Op `histogram_mi`: mutual information of binned codes and factors, of all pairs and resamples in one pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import histogram_mi as reference
from ._library import LIBRARY, is_traced

_MOST_WEIGHTED = (1 << 32) // 255  # samples whose weights a 32-bit count can hold


class HistogramMi(NamedTuple):
    """In nats, float64; with a first dimension R where there are weights. `information` (L, K) of codes and factors,
    `of_codes` (L,) and `of_levels` (K,) entropies, `between` (L, L) information of codes on each other, None unless
    asked for, entropies on its diagonal."""

    information: Tensor
    of_codes: Tensor
    of_levels: Tensor
    between: Tensor | None


def histogram_mi(
    codes: Tensor, levels: Tensor | None, bins: int = 20, *, weights: Tensor | None = None, pairs: bool = False
) -> HistogramMi:
    """Mutual information of L codes and K factors over N samples, from joint histograms of all pairs.

    codes: (N, L), finite float32 or float64, each cut into `bins` equal-width bins from its least to its greatest value
    (np.histogram's edges, in float64; a constant code is all in the first bin); or integers in [0, bins), cut already.
    levels: (N, K) integers, numbered 0, 1, ... for each factor, or None. weights: (R, N) uint8, how often each sample
    counts in each of R resamples, in the bins of all samples. pairs: of codes with codes too.

    Returns `HistogramMi`: I(a; b) = H(a) + H(b) - H(a, b) >= 0 of the counts, which are exact; 0 where one of both is
    constant or nothing is counted. Deterministic for any number of threads. The memory is that of the weights again,
    and for each thread 256 bytes (without weights 16) for each bin of a code and level of any factor. No gradient:
    codes count as constants. InputError for wrong shapes, dtypes, devices, values or more than 2^31 cells of a pair.
    """
    alone = levels is None
    levels = _one_level(codes) if levels is None else levels
    _check(codes, levels, bins, weights)
    sizes = [int(size) + 1 for size in levels.amax(0).tolist()]
    if bins * max(bins if pairs else 1, *sizes) >= 1 << 31:
        raise InputError(f"levels: expected at most 2^31 bins of a pair, got {bins} x {max(bins, *sizes)}")
    binned = codes if not codes.is_floating_point() else cut(codes, bins)
    call = torch.ops.vaecirc_fast.histogram_mi if is_traced(binned, levels) else _run
    results = call(binned.int(), levels.int(), bins, sizes, weights, pairs)
    if weights is None:
        results = tuple(result[0] for result in results)
    information, of_codes, of_levels, between = results
    if alone:
        information, of_levels = information[..., :0], of_levels[..., :0]
    return HistogramMi(information, of_codes, of_levels, between if pairs else None)


def cut(codes: Tensor, bins: int) -> Tensor:
    """The bin of each code, as `histogram_mi` cuts them: (N, L) int32."""
    codes = codes.detach()
    edges = np.full((codes.shape[1], bins), np.inf)
    least, greatest = (bound.double().cpu().numpy() for bound in torch.aminmax(codes, dim=0))
    finite = np.isfinite(least) & np.isfinite(greatest)
    if not finite.all():
        raise InputError(f"codes: expected finite numbers, got NaN or infinity in latent {int(finite.argmin())}")
    if (greatest / 2 - least / 2).max() >= np.finfo(np.float64).max / 2:
        raise InputError("codes: expected latents whose range float64 can hold, got a range above 1.8e308")
    edges[:, 0] = least
    for row, low, high in zip(edges, least, greatest, strict=True):
        if low < high:
            row[:] = np.linspace(low, high, bins + 1)[:-1]
    on_device = torch.from_numpy(edges).to(codes.device)
    call = torch.ops.vaecirc_fast.histogram_cut if is_traced(codes) else _run_cut
    return call(codes, on_device).T  # codes of one latent lie together, as they are counted


def _one_level(codes: Tensor) -> Tensor:
    """A factor that never varies, of as many samples as there are codes; codes are not checked yet."""
    if not isinstance(codes, Tensor) or not codes.ndim:
        return torch.zeros(1, 1, dtype=torch.int32)
    return torch.zeros(len(codes), 1, dtype=torch.int32, device=codes.device)


def _check(codes: Tensor, levels: Tensor, bins: int, weights: Tensor | None) -> None:
    for name, tensor, shape in (("codes", codes, "(N, L)"), ("levels", levels, "(N, K)")):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or 0 in tensor.shape:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name}: expected a tensor of shape {shape}, none of them 0, got {what}")
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins < 1 << 31:
        raise InputError(f"bins: expected a whole number from 1 to 2^31, got {bins!r}")
    if codes.dtype not in (torch.float32, torch.float64, *_WHOLE):
        raise InputError(f"codes: expected float32, float64 or integers, got {codes.dtype}")
    if levels.dtype not in _WHOLE:
        raise InputError(f"levels: expected integers, got {levels.dtype}")
    if len(levels) != len(codes):
        raise InputError(f"levels: expected N = {len(codes)} samples, as codes has, got {len(levels)}")
    if len(codes) >= 1 << 31:
        raise InputError(f"codes: expected fewer than 2^31 samples, got {len(codes)}")
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.dtype != torch.uint8:
            what = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise InputError(f"weights: expected uint8, whole numbers from 0 to 255, got {what}")
        if weights.ndim != 2 or weights.shape[1] != len(codes):
            raise InputError(f"weights: expected shape (R, {len(codes)}), got {tuple(weights.shape)}")
        if len(codes) > _MOST_WEIGHTED:
            raise InputError(f"weights: expected at most {_MOST_WEIGHTED} samples, got {len(codes)}")
    if len({tensor.device for tensor in (codes, levels, *([] if weights is None else [weights]))}) > 1:
        raise InputError("codes, levels, weights: expected one device")
    least, greatest = (int(bound) for bound in torch.aminmax(levels))
    if least < 0:
        raise InputError(f"levels: expected numbers from 0 on, got {least}")
    if greatest >= 1 << 31:
        raise InputError(f"levels: expected numbers below 2^31, got {greatest}")
    if not codes.is_floating_point():
        least, greatest = (int(bound) for bound in torch.aminmax(codes.T))  # as they lie where `cut` made them
        if least < 0 or greatest >= bins:
            raise InputError(f"codes: expected bins from 0 to {bins - 1}, got {least} to {greatest}")


def _run(
    binned: Tensor, levels: Tensor, bins: int, sizes: list[int], weights: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ROW.function("histogram_mi", binned)(binned, levels, bins, sizes, weights, pairs)


def _run_cut(codes: Tensor, edges: Tensor) -> Tensor:
    return ROW.function("histogram_cut", codes)(codes, edges)


LIBRARY.define(
    "histogram_mi(Tensor binned, Tensor levels, int bins, int[] sizes, Tensor? weights, bool pairs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("histogram_cut(Tensor codes, Tensor edges) -> Tensor")
LIBRARY.impl("histogram_mi", _run, "CompositeExplicitAutograd")
LIBRARY.impl("histogram_cut", _run_cut, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::histogram_mi", lib=LIBRARY)
def _fake(binned, levels, bins, sizes, weights, pairs):
    R, L, K = 1 if weights is None else weights.shape[0], binned.shape[1], len(sizes)
    shapes = ((R, L, K), (R, L), (R, K), (R, L if pairs else 0, L))
    return tuple(binned.new_empty(shape, dtype=torch.float64) for shape in shapes)


@torch.library.register_fake("vaecirc_fast::histogram_cut", lib=LIBRARY)
def _fake_cut(codes, edges):
    return codes.new_empty(codes.T.shape, dtype=torch.int32)


def _cpp(
    binned: Tensor, levels: Tensor, bins: int, sizes: list[int], weights: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, L), K = binned.shape, len(sizes)
    binned, levels = binned.T.contiguous(), levels.T.contiguous()
    weights = None if weights is None else weights.contiguous()
    R = 1 if weights is None else len(weights)
    shapes = ((R, L, K), (R, L), (R, K), (R, L if pairs else 0, L))
    first, second, third, fourth = (torch.empty(shape, dtype=torch.float64) for shape in shapes)
    results = first, second, third, fourth
    if R:
        _native.cpp().histogram_mi(
            *(binned.data_ptr(), levels.data_ptr(), _native.address(weights), sizes, (N, L, K, R, bins), pairs),
            *([result.data_ptr() for result in results], _native.threads(N * L * K * R)),
        )
    return results


def _cpp_cut(codes: Tensor, edges: Tensor) -> Tensor:
    codes, edges = codes.contiguous(), edges.contiguous()
    (N, L), bins = codes.shape, edges.shape[1]
    out = torch.empty(L, N, dtype=torch.int32)
    _native.cpp().histogram_cut(
        *(_native.DTYPES[codes.dtype], codes.data_ptr(), edges.data_ptr(), (N, L, bins), out.data_ptr()),
        _native.threads(N * L),
    )
    return out


def _load_reference():
    return {"histogram_mi": reference.forward, "histogram_cut": reference.cut}


def _load_cpp():
    return {"histogram_mi": _cpp, "histogram_cut": _cpp_cut}


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.int32, torch.float32, torch.float64)
ROW = _registry.Row(
    "histogram_mi",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _DTYPES, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), _DTYPES, _registry.cpp_reason),
        "triton": _registry.Absent(
            "is not written: codes are counted once a model, and torch counts on a GPU by the same atomic additions"
        ),
        "cuda": _registry.Absent("is not written, for the reason that Triton is not"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("reference",)},
)
