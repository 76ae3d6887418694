"""Op `boosted_importance`: codes, factors -> how much boosted trees rely on each latent, and what they predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import boosted_importance as reference
from ._library import LIBRARY, is_traced

_BYTES = 1 << 29  # of raw predictions and residuals at once, unless one factor takes more


class Boosted(NamedTuple):
    """`importance` (L, K) float64, columns of sum 1 or all 0; `fitted` (N, K), `predicted` (T, K) int64 labels."""

    importance: Tensor
    fitted: Tensor
    predicted: Tensor


def boosted_importance(
    codes: Tensor, labels: Tensor, codes_test: Tensor | None = None, *, rounds: int = 100, seed: int = 0
) -> Boosted:
    """Gradient-boosted trees that predict each factor from the codes: importance of every latent, and predictions.

    codes: (N, L) float64 or float32, finite. labels: (N, K) int64, any ids, at least two a factor. codes_test: (T, L),
    as codes; none by default. rounds: trees of each class (of both where there are two). seed: of ties.

    Returns `Boosted`: the importance of latent l for factor k is its share of the squared error that the splits of all
    trees of the factor remove; classes predicted for the codes and for `codes_test`. Codes are compared in float32, and
    two that differ by at most 1e-7 are equal, as in scikit-learn, whose GradientBoostingClassifier with its defaults
    this is: depth 3, learning rate .1, no subsampling. Where latents split a node equally well, one is drawn.

    The same for any number of threads. About N (8 L + 16 sum of classes) bytes; factors are taken in parts of 512 MB.
    Codes and labels have no gradient. InputError for other shapes, dtypes or devices, codes that are not finite in
    float32, a factor of one value, and fewer than one round.
    """
    if not isinstance(codes, Tensor) or not isinstance(labels, Tensor):
        raise InputError(f"codes, labels: expected tensors, got {type(codes).__name__} and {type(labels).__name__}")
    codes_test = codes[:0] if codes_test is None else codes_test
    if not isinstance(codes_test, Tensor):
        raise InputError(f"codes_test: expected a tensor, got {type(codes_test).__name__}")
    for name, tensor in (("codes", codes), ("codes_test", codes_test)):
        if tensor.ndim != 2 or tensor.dtype not in (torch.float64, torch.float32):
            letter = "N" if name == "codes" else "T"
            raise InputError(f"{name}: expected float64 ({letter}, L), got {tensor.dtype} {tuple(tensor.shape)}")
    if 0 in codes.shape or len(codes) >= 1 << 31:
        raise InputError(f"codes: expected at least one sample (below 2^31) and latent, got {tuple(codes.shape)}")
    if labels.ndim != 2 or labels.dtype != torch.int64 or len(labels) != len(codes) or labels.shape[1] == 0:
        raise InputError(f"labels: expected int64 (N = {len(codes)}, K), got {labels.dtype} {tuple(labels.shape)}")
    if codes_test.shape[1] != codes.shape[1]:
        raise InputError(f"codes_test: expected {codes.shape[1]} latents as codes have, got {codes_test.shape[1]}")
    if not codes.device == labels.device == codes_test.device:
        raise InputError(
            f"codes, labels, codes_test: expected one device, got {codes.device}, {labels.device}, {codes_test.device}"
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds: expected a whole number >= 1, got {rounds!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        raise InputError(f"seed: expected a whole number of 64 bits, got {seed!r}")
    traced = is_traced(codes, labels, codes_test)
    run = torch.ops.vaecirc_fast.boosted_importance if traced else _run
    return Boosted(*run(codes.detach().double(), labels, codes_test.detach().double(), rounds, seed))


def _run(codes: Tensor, labels: Tensor, codes_test: Tensor, rounds: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("codes", codes), ("codes_test", codes_test)):
        wrong = ~tensor.float().isfinite().all(0)
        if bool(wrong.any()):
            raise InputError(f"{name}: expected numbers that are finite in float32, latent {int(wrong.nonzero()[0])}")
    ids, levels = [], []
    for k in range(labels.shape[1]):
        values, level = labels[:, k].unique(return_inverse=True)
        if len(values) < 2:
            raise InputError(f"labels: expected at least two values of each factor, got one of factor {k}")
        ids.append(values)
        levels.append(level)
    classes = [len(values) for values in ids]
    kernel = ROW.function("boosted_importance", codes)
    reduction, *places = kernel(codes, torch.stack(levels, 1), classes, codes_test, rounds, seed)
    total = reduction.sum(0, keepdim=True)
    importance = reduction / torch.where(total > 0, total, 1)
    fitted, predicted = (torch.stack([values[place[:, k]] for k, values in enumerate(ids)], 1) for place in places)
    return importance, fitted, predicted


LIBRARY.define(
    "boosted_importance(Tensor codes, Tensor labels, Tensor codes_test, int rounds, int seed) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("boosted_importance", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::boosted_importance", lib=LIBRARY)
def _fake(codes, labels, codes_test, rounds, seed):
    return (
        codes.new_empty(codes.shape[1], labels.shape[1]),
        labels.new_empty(labels.shape),
        labels.new_empty(codes_test.shape[0], labels.shape[1]),
    )


def _cpp(
    codes: Tensor, labels: Tensor, classes: list[int], codes_test: Tensor, rounds: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, x_test = codes.float().contiguous(), codes_test.float().contiguous()
    order = x.argsort(dim=0, stable=True).T.contiguous().int()
    labels = labels.T.contiguous().int()
    (samples, latents), tested, factors = x.shape, len(x_test), len(classes)
    reduction = torch.empty(factors, latents, dtype=torch.float64, device="cpu")
    fitted = torch.empty(factors, samples, dtype=torch.int32, device="cpu")
    predicted = torch.empty(factors, tested, dtype=torch.int32, device="cpu")
    keys = reference.factor_keys(seed, factors)
    for first, last in _parts(classes, 16 * samples + 8 * tested):
        counts = torch.tensor(classes[first:last], device="cpu")
        priors = torch.cat([reference.prior(labels[k], classes[k]) for k in range(first, last)])
        arrays = (x, order, labels[first], counts, keys[first:], priors, x_test)
        _native.cpp().boosted_importance(
            [array.data_ptr() for array in arrays],
            [samples, latents, last - first, tested, rounds],
            [part[first].data_ptr() for part in (reduction, fitted, predicted)],
            _native.threads(samples * len(priors) * rounds),
        )
    return reduction.T.contiguous(), fitted.T.long(), predicted.T.long()


def _parts(classes: list[int], bytes_of_class: int) -> list[tuple[int, int]]:
    """Runs of factors whose memory stays within bounds."""
    parts, first, used = [], 0, 0
    for k, count in enumerate(classes):
        if k > first and used + count * bytes_of_class > _BYTES:
            parts.append((first, k))
            first, used = k, 0
        used += count * bytes_of_class
    return [*parts, (first, len(classes))]


def _load_reference():
    return {"boosted_importance": reference.forward}


def _load_cpp():
    return {"boosted_importance": _cpp}


ROW = _registry.Row(
    "boosted_importance",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), (torch.float64,), _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), (torch.float64,), _registry.cpp_reason),
        "triton": _registry.Absent(
            "is not written: trees grow by walks over sorted codes, step after step; a CPU does them in seconds"
        ),
        "cuda": _registry.Absent(
            "is not written: trees grow by walks over sorted codes, step after step; a CPU does them in seconds"
        ),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("reference",)},
)
