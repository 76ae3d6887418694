"""The one comparison rule: how far a kernel may be from the truth. No test types a tolerance of its own.

The truth is the reference in float64. The yardstick is the same reference in the kernel's dtype. `unit`, of the truth's
shape, is how large the numbers were that rounding could spoil: the truth's own magnitude, or, where a result is a
difference of larger numbers, the sum of their magnitudes (float64, computed from the formula). Then

    error(x) = the largest (|x - truth| - rounding - floor) / unit over all elements, at least 0
    error(kernel) <= C * error(reference) + n eps

- C is 2: as good as plain torch, up to another order of additions.
- eps is that of the working precision (float64 for float64, else float32: 16-bit inputs are computed in float32).
- n is the number of roundings a result passes through. `terms` numbers that are added in any order drift apart by about
  sqrt(terms) roundings, not by `terms`; two more are for what happens to each number before and after.
- rounding is half a unit in the last place of outputs of 16 bits: the one rounding that they cannot avoid.
- floor is what may be flushed to zero: the smallest normal number of the working precision for each term, and the
  smallest number at all of the output's dtype. Where the truth is zero, the kernel is, up to that.

A yardstick that would allow more than MOST sees nothing: the comparison itself then fails and asks for a better unit.
A number that is not finite in the truth must be so, with its sign, in the kernel. Where only the reference overflows,
the kernel may overflow likewise, or be right. Shapes and dtypes are those of the reference.

Gradients of 16 bits hide a wrong factor behind their rounding. So for gradients the magnitude of each row, the sum of
its absolute values, must agree as well, by the same rule: over a row the roundings cancel, and a wrong factor does not.
"""

import math

import torch
from torch import Tensor

C = 2
MOST = 1 / 64


def roundings(terms: int) -> float:
    """n of the rule: the roundings in a sum of `terms` numbers."""
    return 2 + math.sqrt(terms)


def assert_close(kernel: Tensor, reference: Tensor, truth: Tensor, *, terms: int, unit: Tensor | None = None) -> None:
    """The rule above; `terms` is the largest number of added terms of any element. AssertionError says where."""
    rule = _Rule(kernel, reference, truth, terms, unit)
    errors, yardstick = rule.errors(kernel), float(rule.errors(reference).max())
    allowed = C * yardstick + rule.working
    if not allowed <= MOST:
        raise AssertionError(f"the reference is off by {yardstick:.3g} of its unit: the unit misses what cancels here")
    if bool((errors > allowed).any()):
        at = int(errors.argmax())
        raise AssertionError(
            f"element {_index(at, truth)}: {float(kernel.flatten()[at]):.9g}, truth {float(truth.flatten()[at]):.9g}, "
            f"error {float(errors[at]):.3g} of its unit; allowed {allowed:.3g}, the reference has {yardstick:.3g} "
            f"({int((errors > allowed).sum())} of {errors.numel()} elements are off)"
        )


def assert_gradient_close(
    kernel: Tensor, reference: Tensor, truth: Tensor, *, terms: int, unit: Tensor | None = None
) -> None:
    """The rule, and for each row (of the last dimension) the ratio of its magnitude to the truth's."""
    assert_close(kernel, reference, truth, terms=terms, unit=unit)
    if truth.numel() == 0:
        return
    rule = _Rule(kernel, reference, truth, terms, unit)
    rows, units = _rows(truth), _rows(rule.unit)
    # Roundings to 16 bits are independent, each about a quarter of eps: added up they are so of the root of the sum of
    # squares. Four times that happens to none of a million rows.
    rounding = rule.output * rows.square().sum(1).sqrt()

    def deviation(x: Tensor) -> Tensor:
        difference = (_rows(x.double()).abs().sum(1) - rows.abs().sum(1)).abs() - rounding - rule.floor * rows.shape[1]
        finite = rows.isfinite().all(1) & _rows(reference).isfinite().all(1) & (difference > 0)
        return torch.where(finite, difference / units.sum(1), 0.0)

    ours, yardstick = deviation(kernel), float(deviation(reference).max())
    allowed = C * yardstick + rule.working
    if bool((ours > allowed).any()):
        at = int(ours.argmax())
        raise AssertionError(
            f"row {at}: its magnitude is off by {float(ours[at]):.3g} of its unit; allowed {allowed:.3g}, "
            f"the reference has {yardstick:.3g}"
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)


class _Rule:
    """What both rules need: units and allowances. Checks shapes, dtypes and what is not finite on the way."""

    def __init__(self, kernel: Tensor, reference: Tensor, truth: Tensor, terms: int, unit: Tensor | None) -> None:
        for name, got, expected in (
            ("shape", tuple(kernel.shape), tuple(reference.shape)),
            ("dtype", kernel.dtype, reference.dtype),
            ("device", kernel.device, reference.device),
            ("shape of the truth", tuple(truth.shape), tuple(reference.shape)),
            ("dtype of the truth", truth.dtype, torch.float64),
        ):
            if got != expected:
                raise AssertionError(f"{name}: got {got}, expected {expected}")
        self.truth = truth
        self.unit = truth.abs() if unit is None else unit.expand(truth.shape)
        assert not bool((self.unit < truth.abs()).any()), "a unit is at least the magnitude of the truth"
        working = torch.float64 if kernel.dtype == torch.float64 else torch.float32
        n = roundings(terms)
        self.working = n * torch.finfo(working).eps
        self.output = 0.0 if kernel.dtype == working else torch.finfo(kernel.dtype).eps
        smallest = torch.finfo(kernel.dtype)
        self.floor = terms * torch.finfo(working).tiny + smallest.tiny * smallest.eps
        self._check_not_finite(kernel, reference)

    def _check_not_finite(self, kernel: Tensor, reference: Tensor) -> None:
        k, r = kernel.double(), reference.double()
        overflown = self.truth.isfinite() & ~r.isfinite()
        self.compared = self.truth.isfinite() & ~(overflown & _same(k, r))
        wrong = ~self.truth.isfinite() & ~_same(k, self.truth) | self.compared & ~k.isfinite()
        if bool(wrong.any()):
            at = int(wrong.flatten().nonzero()[0])
            got, true, plain = (float(x.flatten()[at]) for x in (k, self.truth, r))
            raise AssertionError(
                f"element {_index(at, self.truth)}: {got}, truth {true}, reference {plain} "
                f"({int(wrong.sum())} such elements)"
            )

    def errors(self, x: Tensor) -> Tensor:
        """The error of each element in its unit, 0 where nothing is compared; one zero where there are no elements."""
        compared = self.compared & x.isfinite()
        difference = (x.double() - self.truth).abs() - self.output / 2 * self.truth.abs() - self.floor
        errors = torch.where(compared & (difference > 0), difference / self.unit, 0.0).flatten()
        return errors if errors.numel() else errors.new_zeros(1)


def _index(at: int, x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(at), x.shape))


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())
