"""The comparison rule itself: what it accepts and what it must reject."""

import numpy
import pytest
import torch
from close import assert_close, assert_gradient_close
from hypothesis import given
from hypothesis import strategies as st

SIZES = [1, 2, 37, 4096, 1 << 18]


def sums(terms, dtype=torch.float32, rows=5, seed=0):
    """Numbers (rows, terms), their sum one after the other in their dtype (the yardstick), and the truth."""
    x = torch.rand(rows, terms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x, in_order(x), x.double().sum(1)


def in_order(x):
    """Sums over rows, one number after the other, rounded each time (torch.cumsum adds in float64)."""
    return torch.from_numpy(numpy.add.accumulate(x.numpy(), 1))[:, -1]


def gradients(width, dtype, seed=0):
    """A gradient (rows, width) in `dtype`, rightly rounded, and the truth."""
    truth = torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return truth.to(dtype), truth


def where_it_passes(wrong, reference, truth):
    """The wrong gradient where it is within half a unit in the last place, and the right one elsewhere."""
    half = (truth * torch.finfo(wrong.dtype).eps / 2).abs()
    return torch.where((wrong.double() - truth).abs() < half, wrong, reference)


def rejects(match, function, *args, **kwargs):
    with pytest.raises(AssertionError, match=match):
        function(*args, **kwargs)


# --- accepted --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 1000))
def test_any_order_of_additions_is_accepted(terms, dtype, seed):
    x, reference, truth = sums(terms, dtype, seed=seed)
    shuffled = x[:, torch.randperm(terms, generator=torch.Generator().manual_seed(seed))]
    lanes = torch.nn.functional.pad(x, (0, -terms % 16)).view(len(x), -1, 16).mT.flatten(0, 1)
    blocked = in_order(lanes).view(len(x), 16).sum(1)
    for kernel in (in_order(x.flip(1)), in_order(shuffled), x.sum(1), blocked, truth.to(dtype)):
        assert_close(kernel, reference, truth, terms=terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 3, 4096])
def test_a_rounded_gradient_is_accepted(dtype, width):
    reference, truth = gradients(width, dtype)
    neighbour = (truth * (1 + torch.finfo(torch.float32).eps)).to(dtype)  # rounded from a sum in another order
    for kernel in (reference, neighbour):
        assert_gradient_close(kernel, reference, truth, terms=4)


def test_no_elements_and_scalars_are_accepted():
    for shape in ((0, 3), (3, 0), (0,), ()):
        x = torch.zeros(shape)
        assert_close(x, x, x.double(), terms=1)
        assert_gradient_close(x, x, x.double(), terms=1)


def test_what_lies_below_the_normal_range_may_be_lost():
    truth = torch.tensor([1.0, 1e-39, -3e-42, 0.0], dtype=torch.float64)
    kernel = torch.tensor([1.0, 0.0, 0.0, -0.0])
    assert_close(kernel, truth.float(), truth, terms=1)
    assert_close(truth.float(), kernel, truth, terms=1)
    larger = truth + torch.tensor([0, 1e-30, 0, 0])
    rejects("element \\(1,\\)", assert_close, kernel, larger.float(), larger, terms=1)


def test_where_the_reference_overflows_the_kernel_may_or_may_be_right():
    truth = torch.tensor([1e39, 2e38, 1.0], dtype=torch.float64)
    reference = torch.tensor([torch.inf, torch.inf, 1.0])
    for kernel in (reference, torch.tensor([torch.inf, 2e38, 1.0])):
        assert_close(kernel, reference, truth, terms=1)
    rejects("element \\(1,\\)", assert_close, torch.tensor([torch.inf, 1e38, 1.0]), reference, truth, terms=1)
    rejects("element \\(0,\\): -inf", assert_close, torch.tensor([-torch.inf, 2e38, 1.0]), reference, truth, terms=1)
    rejects("element \\(1,\\): nan", assert_close, torch.tensor([torch.inf, torch.nan, 1.0]), reference, truth, terms=1)


# --- rejected --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.001, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", SIZES)
def test_a_small_wrong_factor_is_rejected(terms, dtype, factor):
    x, reference, truth = sums(terms, dtype)
    kernel = x.sum(1)
    assert_close(kernel, reference, truth, terms=terms)
    rejects("of its unit; allowed", assert_close, kernel * factor, reference, truth, terms=terms)
    one = kernel.clone()
    one[3] *= factor
    rejects("element \\(3,\\).*1 of 5", assert_close, one, reference, truth, terms=terms)


@pytest.mark.parametrize("terms", SIZES[1:-1])
def test_a_dropped_or_doubled_term_is_rejected(terms):
    x, reference, truth = sums(terms)
    for wrong in (x[:, 1:].sum(1), x[:, :-1].sum(1), x.sum(1) + x[:, 0]):
        rejects("of its unit; allowed", assert_close, wrong, reference, truth, terms=terms)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_one_element_not_written_or_not_a_number_is_rejected(value):
    x, reference, truth = sums(37)
    kernel = x.sum(1)
    kernel[2] = value
    rejects("element \\(2,\\)", assert_close, kernel, reference, truth, terms=37)


def test_what_is_not_finite_in_the_truth_must_be_in_the_kernel():
    truth = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], dtype=torch.float64)
    reference = truth.float()
    assert_close(reference, reference, truth, terms=1)
    for at, value in ((0, 1.0), (0, torch.inf), (1, torch.nan), (1, -torch.inf), (1, 3e38), (2, 0.0)):
        kernel = reference.clone()
        kernel[at] = value
        rejects(f"element \\({at},\\)", assert_close, kernel, reference, truth, terms=1)


def test_a_wrong_shape_or_dtype_is_rejected():
    x, reference, truth = sums(37)
    kernel = x.sum(1)
    rejects("shape: got", assert_close, kernel[:1], reference, truth, terms=37)
    rejects("shape: got", assert_close, kernel[None], reference, truth, terms=37)
    rejects("dtype: got", assert_close, kernel.double(), reference, truth, terms=37)
    rejects("dtype of the truth", assert_close, kernel, reference, reference, terms=37)
    rejects("shape of the truth", assert_close, kernel, reference, truth[:, None], terms=37)


def test_a_swapped_or_shifted_element_is_rejected():
    x, reference, truth = sums(37)
    for wrong in (x.sum(1).roll(1), x.sum(1).flip(0), -x.sum(1)):
        rejects("of its unit", assert_close, wrong, reference, truth, terms=37)


def test_a_unit_allows_cancellation_and_no_more():
    """Sums of 1 and -1 times large numbers: relative to the result the yardstick itself is useless, and says so."""
    x, _, _ = sums(4096)
    x = torch.cat([x, -x * (1 + 1e-6)], 1)
    reference, truth, unit = in_order(x), x.double().sum(1), x.double().abs().sum(1)
    kernel = x.view(len(x), -1, 16).sum(1).sum(1)
    assert_close(kernel, reference, truth, terms=8192, unit=unit)
    rejects("the unit misses what cancels", assert_close, kernel, reference, truth, terms=8192)
    rejects("of its unit", assert_close, kernel + 1e-3 * unit.float(), reference, truth, terms=8192, unit=unit)
    with pytest.raises(AssertionError, match="at least the magnitude"):
        assert_close(kernel, reference, truth, terms=8192, unit=truth.abs() / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_small_wrong_factor_of_a_gradient_is_rejected(dtype, factor):
    """In 16 bits most elements pass, since 1e-3 is a quarter of bfloat16's rounding: the row's magnitude tells."""
    reference, truth = gradients(4096, dtype)
    assert_gradient_close(reference, reference, truth, terms=4)
    wrong = (truth * factor).to(dtype)
    rejects("of its unit", assert_gradient_close, wrong, reference, truth, terms=4)
    one = reference.clone()
    one[4] = wrong[4]
    rejects("row 4|element \\(4", assert_gradient_close, one, reference, truth, terms=4)
    if dtype == torch.bfloat16:  # where the wrong factor shows in no element
        same = where_it_passes(wrong, reference, truth)
        assert_close(same, reference, truth, terms=4)
        rejects("row", assert_gradient_close, same, reference, truth, terms=4)


def test_truncation_in_place_of_rounding_is_rejected():
    reference, truth = gradients(4096, torch.bfloat16)
    cut = (truth.float().view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16)
    assert (cut != reference).float().mean() > 0.4
    rejects("element", assert_close, cut, reference, truth, terms=4)
    half = where_it_passes(cut, reference, truth)
    assert_close(half, reference, truth, terms=4)
    rejects("row", assert_gradient_close, half, reference, truth, terms=4)
