"""The op sparse_decode and its two sums on every backend: values, gradients, transforms, threads, memory, bad input."""

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops.sparse_decode import accumulate, gather, grad_values
from vaecirc_fast.reference import sparse_decode as reference

ROW = _registry.rows["sparse_decode"]
OPS = torch.ops.vaecirc_fast
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """Arguments of sparse_decode."""

    values: torch.Tensor
    indices: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor | None
    offsets: torch.Tensor | None
    target: torch.Tensor | None

    @property
    def floats(self):
        """What has a gradient, by the op's order."""
        return [x for x in (self.values, self.w, self.b, self.target) if x is not None]

    def of(self, floats):
        """The same with other numbers."""
        rest = iter(floats)
        values, w = next(rest), next(rest)
        b, target = (None if x is None else next(rest) for x in (self.b, self.target))
        return replace(self, values=values, w=w, b=b, target=target)

    def mapped(self, function):
        """The same with every float tensor through a function."""
        return self.of([function(x) for x in self.floats])

    def on(self, device):
        """The same on a device."""
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        return replace(self.mapped(move), indices=move(self.indices), offsets=move(self.offsets))


def problem(rows, latents, width, dtype=torch.float32, bias=True, target=True, zeros=0.2, seed=0):
    """rows: (B, K), or the lengths of B rows. Some values are 0, and some indices of a row equal."""
    generator = torch.Generator().manual_seed(seed)
    fixed = isinstance(rows, tuple)
    count, shape = (rows[0], rows) if fixed else (len(rows), (sum(rows),))
    offsets = None if fixed else torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < zeros] = 0
    normal = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    return Problem(
        values.to(dtype),
        torch.randint(0, latents, shape, generator=generator, dtype=torch.int32),
        normal(latents, width),
        normal(width) if bias else None,
        offsets,
        normal(count, width) if target else None,
    )


# name: rows, latents, width. The C++ kernels' own limits: vectors of 4, 8 or 16 floats, blocks of 8, 4 and 1 of them,
# groups of as many entries, sums of 2 or 4 side by side.
CASES = {
    "one number": ((1, 1), 1, 1),
    "a row": ((1, 7), 5, 64),
    "one column": ((4, 3), 6, 1),
    "three columns": ((3, 5), 7, 3),
    "below a vector": ((3, 5), 7, 15),
    "a vector": ((3, 17), 9, 16),
    "past a vector": ((3, 16), 9, 17),
    "two vectors and one": ((2, 4), 9, 33),
    "odd": ((5, 19), 40, 77),
    "a block": ((5, 33), 12, 64),
    "blocks": ((3, 6), 11, 128),
    "every block and a rest": ((3, 37), 11, 128 + 64 + 32 + 5),
    "one latent": ((6, 3), 1, 20),
    "many latents": ((7, 4), 500, 24),
    "no entries": ((3, 0), 4, 5),
    "no rows": ((0, 3), 4, 5),
    "no width": ((3, 2), 4, 0),
    "lengths": ([3, 0, 1, 40, 0, 0, 17, 2], 13, 20),
    "empty rows only": ([0, 0, 0], 4, 6),
    "no lengths": ([], 4, 6),
    "lengths, wide": ([5, 0, 21], 30, 130),
}
WHICH = list(itertools.product((False, True), (False, True)))  # bias, target


def which(backend):
    """With and without bias and target; of the interpreter, which is slow, both or neither."""
    return [(True, True), (False, False)] if backend.interpreted else WHICH


def runs(backend, dtype):
    """Whether the backend has kernels for `dtype`; the row says so."""
    return ROW.why_not(backend.name, backend.device, dtype) is None


def run(p, backend):
    """The op on the backend's device: [y] or [y, squared error], on the CPU."""
    p = p.on(backend.device)
    out = vf.ops.sparse_decode(p.values, p.indices, p.w, p.b, offsets=p.offsets, target=p.target)
    return [x.cpu() for x in ((out,) if p.target is None else out)]


# --- truth, yardstick and unit ---------------------------------------------------------------------------------------


def formula(p):
    """The reference on the CPU, in the dtype of its arguments."""
    y, squared_error = reference.forward(p.values, p.indices, p.w, p.b, p.offsets, p.target)
    return [y] if p.target is None else [y, squared_error]


def magnitudes(p):
    """The same problem in float64 with all its numbers positive, and no target: its sums are the units."""
    return replace(p.mapped(lambda x: x.double().abs()), target=None)


def distance_unit(p):
    """The numbers that y - target is made of, (B, D)."""
    return formula(magnitudes(p))[0] + p.target.double().abs()


def units(p):
    """The units of the results, for the comparison rule."""
    (unit,) = formula(magnitudes(p))
    if p.target is None:
        return [unit]
    eps = torch.finfo(torch.float64 if p.w.dtype == torch.float64 else torch.float32).eps
    y, _ = formula(p.mapped(torch.Tensor.double))
    parts, difference = distance_unit(p), (y - p.target.double()).abs()
    return [unit, (difference * parts + eps * parts.square()).sum(1)]


def at_least(unit, truth):
    return torch.maximum(unit, truth.abs())


def check(p, backend, got=None):
    """The op's results against the reference, by the rule."""
    got = run(p, backend) if got is None else got
    truths, yardsticks = formula(p.mapped(torch.Tensor.double)), formula(p)
    longest = int(p.offsets.diff().max()) if p.offsets is not None and len(p.offsets) > 1 else p.values.shape[-1]
    terms = (longest + 1, longest + 1 + p.w.shape[1])
    for kernel, yardstick, truth, unit, n in zip(got, yardsticks, truths, units(p), terms, strict=False):
        assert_close(kernel, yardstick, truth, terms=n, unit=at_least(unit, truth))


def weights_of(p):
    """Weights (B, D) and (B,) of the results in a loss."""
    generator = torch.Generator().manual_seed(1)
    rows = len(p.values) if p.offsets is None else len(p.offsets) - 1
    weights = [torch.randn(rows, p.w.shape[1], generator=generator).to(p.w.dtype)]
    return weights if p.target is None else [*weights, torch.randn(rows, generator=generator).to(p.w.dtype)]


def gradients(p, weights, backend="auto", device="cpu", op=None):
    """Gradients of a weighted sum of the results for p.floats, on the CPU."""
    p = p.on(device).mapped(lambda x: x.detach().clone().requires_grad_())
    with vf.backend(backend):
        call = op or vf.ops.sparse_decode
        out = call(p.values, p.indices, p.w, p.b, offsets=p.offsets, target=p.target)
        out = (out,) if p.target is None else out
        grads = torch.autograd.grad(out, p.floats, [x.to(device, out[0].dtype) for x in weights])
    return [x.cpu() for x in grads]


def gradient_units(p, weights):
    """What one rounding of each factor changes in the gradients."""
    g = weights[0].double().abs()
    if p.target is not None:
        of_error = 2 * weights[1].double().abs()[:, None] * distance_unit(p)
        g = g + of_error
    values, w = p.values.double().abs(), p.w.double().abs()
    found = [reference.grad_values(p.indices, w, g, p.offsets)]
    found += [reference.accumulate(values, p.indices, g, len(w), p.offsets)[0]]
    return found + [g.sum(0)] * (p.b is not None) + [of_error for _ in range(p.target is not None)]


def check_gradients(p, backend, got=None):
    """The op's gradients against those of the reference, by the rule with magnitudes."""
    weights = weights_of(p)
    got = gradients(p, weights, backend.name, backend.device) if got is None else got
    truths = gradients(p.mapped(torch.Tensor.double), weights, "reference")
    yardsticks = gradients(p, weights, "reference")
    terms = p.w.shape[1] + p.values.numel() + len(weights[0])
    for kernel, yardstick, truth, unit in zip(got, yardsticks, truths, gradient_units(p, weights), strict=True):
        assert_gradient_close(kernel, yardstick, truth, terms=terms, unit=at_least(unit, truth))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_values(backend, case):
    for bias, target in which(backend):
        check(problem(*CASES[case], bias=bias, target=target), backend)


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.01])
def test_many_entries(backend, dtype, zeros):
    """C++ looks at about 1,024 entries at once: with none that is 0 it reads them in place, but for the last."""
    if runs(backend, dtype):
        for rows in ((70, 33), (2, 1030), [1100, 3, 0, 40, 1, 900], [40] * 60):
            for width in (20, 3):
                p = problem(rows, 25, width, dtype, zeros=zeros)
                check(p, backend)
                check_gradients(p, backend)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", ["odd", "every block and a rest", "one column", "lengths", "no rows"])
def test_values_in_other_dtypes(backend, case, dtype):
    if not runs(backend, dtype):
        with pytest.raises(BackendError, match=f"has no kernel for {dtype}"):
            run(problem(*CASES[case], dtype), backend)
        return
    for bias, target in which(backend):
        check(problem(*CASES[case], dtype, bias, target), backend)


@st.composite
def any_problem(draw, dtypes=FLOATS, least=0):
    """A problem of sparse_decode with at least `least` rows."""
    if draw(st.booleans()):
        rows = draw(st.integers(least, 6)), draw(st.integers(0, 20))
    else:
        rows = draw(st.lists(st.integers(0, 20), min_size=least, max_size=6))
    latents, width = draw(st.integers(1, 30)), draw(st.integers(0, 150))
    options = draw(st.sampled_from(dtypes)), draw(st.booleans()), draw(st.booleans())
    return problem(rows, latents, width, *options, draw(st.sampled_from([0.0, 0.5])), draw(st.integers(0, 999)))


@given(p=any_problem())
def test_any_problem(backend, p):
    if runs(backend, p.w.dtype):
        check(p, backend)


def test_the_reference_is_the_definition():
    for rows in ((4, 5), [3, 0, 5, 2]):
        p = problem(rows, 6, 3, torch.float64)
        offsets = range(0, 21, 5) if p.offsets is None else p.offsets.tolist()
        values, indices = p.values.flatten().tolist(), p.indices.flatten().tolist()
        g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        y, of_values = p.b.repeat(4, 1), torch.zeros(len(values), dtype=torch.float64)
        sums, totals = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for b in range(4):
            for j in range(offsets[b], offsets[b + 1]):
                y[b] += values[j] * p.w[indices[j]]
                of_values[j] = math.fsum((p.w[indices[j]] * g[b]).tolist())
                sums[indices[j]] += values[j] * g[b]
                totals[indices[j]] += values[j]
        squared = torch.tensor([math.fsum(row.tolist()) for row in (y - p.target).square()], dtype=torch.float64)
        with vf.backend("reference"):
            got = [*formula(p), grad_values(p.indices, p.w, g, p.offsets)]
            got += accumulate(p.values, p.indices, g, 6, p.offsets)
        for one, truth in zip(got, (y, squared, of_values.view(p.indices.shape), sums, totals), strict=True):
            # A bound on the magnitudes: every number here is a sum of at most 20 products of numbers below 8.
            assert_close(one, truth, truth, terms=20, unit=torch.full_like(truth, 20 * 64))


@one_of_each
def test_the_sums_by_themselves(backend):
    """gather, grad_values and accumulate: what the gradients of other ops call."""
    for case in ("odd", "lengths"):
        p = problem(*CASES[case], bias=False, target=False)
        (g,) = weights_of(p)
        q, device = p.on(backend.device), backend.device
        check(p, backend, [gather(q.values, q.indices, q.w, q.offsets).cpu()])
        got = [grad_values(q.indices, q.w, g.to(device), q.offsets)]
        got += accumulate(q.values, q.indices, g.to(device), len(q.w), q.offsets)

        def plain(values, w, g, p=p):
            sums = reference.accumulate(values, p.indices, g, len(w), p.offsets)
            return reference.grad_values(p.indices, w, g, p.offsets), *sums

        truths = plain(p.values.double(), p.w.double(), g.double())
        units = plain(p.values.double().abs(), p.w.double().abs(), g.double().abs())
        for one, yardstick, truth, unit in zip(got, plain(p.values, p.w, g), truths, units, strict=True):
            terms = p.values.numel() + p.w.shape[1]
            assert_gradient_close(one.cpu(), yardstick, truth, terms=terms, unit=at_least(unit, truth))


@one_of_each
def test_leading_dimensions(backend):
    p = problem((12, 5), 9, 20).on(backend.device)
    y, error = vf.ops.sparse_decode(p.values, p.indices, p.w, p.b, target=p.target)
    for lead in ((3, 4), (2, 1, 6), (12,)):
        entries = p.values.view(*lead, 5), p.indices.view(*lead, 5)
        got = vf.ops.sparse_decode(*entries, p.w, p.b, target=p.target.view(*lead, 20))
        assert torch.equal(got[0], y.view(*lead, 20)) and torch.equal(got[1], error.view(lead))
    one = vf.ops.sparse_decode(p.values[0], p.indices[0], p.w, p.b, target=p.target[0])
    assert torch.equal(one[0], y[0]) and torch.equal(one[1], error[0])
    assert vf.ops.sparse_decode(p.values.view(3, 4, 5)[:0], p.indices.view(3, 4, 5)[:0], p.w).shape == (0, 4, 20)


@one_of_each
def test_memory_layout_changes_nothing(backend):
    p = problem((6, 5), 9, 20).on(backend.device)
    weights = [x.to(backend.device) for x in weights_of(p.on("cpu"))]
    layouts = {
        "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "offset": lambda x: torch.cat([x[:1], x])[1:],
        "backwards and back": lambda x: x.flip(0).contiguous().flip(0),
    }

    def all_of(p):
        q = p.mapped(lambda x: x.detach().requires_grad_())
        out = vf.ops.sparse_decode(q.values, q.indices, q.w, q.b, target=q.target)
        return [*out, *torch.autograd.grad(out, q.floats, weights)]

    expected = all_of(p)
    for name, change in layouts.items():
        changed = replace(p.mapped(change), indices=change(p.indices))
        assert all(torch.equal(a, b) for a, b in zip(all_of(changed), expected, strict=True)), name
    long = replace(p, indices=p.indices.long())
    assert all(torch.equal(a, b) for a, b in zip(all_of(long), expected, strict=True))
    one = gather(p.values[:1].expand(6, 5), p.indices[:1].expand(6, 5), p.w)
    assert torch.equal(one, gather(p.values[:1], p.indices[:1], p.w).expand(6, 20))


def test_fixed_and_given_lengths_agree(backend):
    for width in (20, 133):
        fixed = problem((6, 11), 9, width)
        flat = replace(
            fixed,
            values=fixed.values.flatten(),
            indices=fixed.indices.flatten(),
            offsets=torch.arange(0, 67, 11, dtype=torch.int32),
        )
        for a, b in zip(run(fixed, backend), run(flat, backend), strict=True):
            assert torch.equal(a, b)
        grads = [gradients(p, weights_of(p), backend.name, backend.device) for p in (fixed, flat)]
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*grads, strict=True))


# --- padding, numbers that are not finite, wrong indices --------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 16, 77, 150])
def test_padding_adds_nothing(backend, width):
    """Entries (0, 0): also where latent 0 is not finite, and for a row of nothing else."""
    p = problem((4, 6), 9, width)
    p.indices.clamp_(min=1)
    p.values[1] = 0
    padded = replace(
        p,
        values=torch.cat([p.values, torch.zeros(4, 5)], 1),
        indices=torch.cat([p.indices, torch.zeros(4, 5, dtype=torch.int32)], 1),
    )
    padded.w[0] = torch.tensor([math.nan, math.inf, -math.inf, 1, 2] * 30)[:width]
    for a, b in zip(run(padded, backend), run(p, backend), strict=True):
        assert bool(a.isfinite().all()) and torch.equal(a, b)
    assert torch.equal(run(replace(padded, target=None), backend)[0][1], p.b)
    # A gradient of y that is not finite reaches no latent through entries of value 0.
    g = weights_of(replace(p, target=None))[0]
    g[1] = math.nan
    args = padded.values.to(backend.device), padded.indices.to(backend.device), g.to(backend.device)
    sums, totals = accumulate(*args, 9)
    assert bool(sums.isfinite().all()) and bool((sums[0] == 0).all()) and float(totals[0]) == 0


def test_nan_reaches_its_row_only(backend):
    for rows, width in (((5, 20), 37), ((5, 20), 5), ([20, 0, 7, 20, 3], 64)):
        p = problem(rows, 40, width)
        p.indices.flatten()[:] = torch.arange(p.indices.numel(), dtype=torch.int32) % 20
        start = 40 if p.offsets is None else 20
        spoilt = p.mapped(torch.clone)
        spoilt.values.view(-1)[start + 3] = math.nan
        for clean, got in zip(run(p, backend), run(spoilt, backend), strict=True):
            assert bool(got[2].isnan().all())
            got[2] = clean[2]
            assert torch.equal(got, clean)
        of_clean, of_spoilt = (
            gradients(q, weights_of(q)[:1], backend.name, backend.device)
            for q in (replace(p, target=None), replace(spoilt, target=None))
        )
        latent = int(p.indices.view(-1)[start + 3])
        assert bool(of_spoilt[1][latent].isnan().all())
        of_spoilt[1][latent] = of_clean[1][latent]
        assert all(torch.equal(a, b) for a, b in zip(of_spoilt, of_clean, strict=True))
        # In a latent's row: those samples that use it, and no others.
        spoilt = p.mapped(torch.clone)
        spoilt.w[3] = math.inf
        users = [
            bool(((i == 3) & (v != 0)).any())
            for i, v in zip(*(split(x, p) for x in (p.indices, p.values)), strict=True)
        ]
        got, clean = run(spoilt, backend)[0], run(p, backend)[0]
        assert any(users) and got.isfinite().all(1).logical_not().tolist() == users
        assert torch.equal(got[~torch.tensor(users)], clean[~torch.tensor(users)])


def split(entries, p):
    """The entries of each row."""
    return entries if p.offsets is None else entries.split(p.offsets.diff().tolist())


def test_latents_without_entries_have_no_gradient(backend):
    for dtype in (torch.float32, torch.bfloat16):
        for width in (3, 70, 200):
            p = problem((4, 3), 50, width, dtype, target=False)
            of_w = gradients(p, weights_of(p), backend.name, backend.device)[1]
            used = torch.zeros(50, dtype=torch.bool)
            used[p.indices[p.values != 0].long()] = True
            assert torch.equal(of_w[~used], torch.zeros_like(of_w[~used]))
            assert bool((of_w[used] != 0).all())


@pytest.mark.parametrize("index", [9, -1, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range(backend, index):
    for rows, place in (((5, 6), r"row 3, 4"), ([10, 0, 15, 5], r"entry 22")):
        p = problem(rows, 9, 20, target=False)
        (g,) = weights_of(p)
        p.indices.view(-1)[22] = index
        q, g = p.on(backend.device), g.to(backend.device)
        calls = [
            lambda q=q: gather(q.values, q.indices, q.w, q.offsets),
            lambda q=q, g=g: grad_values(q.indices, q.w, g, q.offsets),
            lambda q=q, g=g: accumulate(q.values, q.indices, g, 9, q.offsets),
        ]
        if backend.device == "cpu":
            for call in calls:
                with pytest.raises(InputError, match=rf"^indices: {place} is {index}, expected indices in \[0, 9\)$"):
                    call()
            wide = q.indices.long()
            wide.view(-1)[22] = 2**32 + 1
            with pytest.raises(InputError, match=rf"^indices: {place} is 2147483647, expected"):
                vf.ops.sparse_decode(q.values, wide, q.w, offsets=q.offsets)
        else:
            without = q.values.clone(), q.indices.clone()
            for tensor in without:
                tensor.view(-1)[22] = 0
            assert torch.equal(calls[0](), gather(*without, q.w, q.offsets))
            assert float(calls[1]().view(-1)[22]) == 0
            expected = accumulate(*without, g, 9, q.offsets)
            assert all(torch.equal(a, b) for a, b in zip(calls[2](), expected, strict=True))


@pytest.mark.parametrize(
    "offsets", [[0, 3, 2, 6], [1, 3, 4, 6], [0, 3, 4, 5], [0, 3, 4, 7], [0, -1, 4, 6], [0]], ids=str
)
def test_offsets_that_do_not_ascend(backend, offsets):
    if backend.device != "cpu":
        pytest.skip("on a GPU offsets must be right")
    values, indices, w = torch.ones(6), torch.zeros(6, dtype=torch.int32), torch.ones(2, 5)
    wrong = torch.tensor(offsets, dtype=torch.int32)
    g = torch.ones(len(offsets) - 1, 5)
    calls = [
        lambda: vf.ops.sparse_decode(values, indices, w, offsets=wrong),
        lambda: grad_values(indices, w, g, wrong),
        lambda: accumulate(values, indices, g, 2, wrong),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"^offsets: expected ascending numbers from 0 to N = 6, got \["):
            call()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, case, dtype):
    if runs(backend, dtype):
        for bias, target in which(backend):
            check_gradients(problem(*CASES[case], dtype, bias, target), backend)


@given(p=any_problem())
def test_any_gradient(backend, p):
    if runs(backend, p.w.dtype):
        check_gradients(p, backend)


@pytest.mark.parametrize("rows", [(3, 4), [2, 0, 4]], ids=str)
def test_gradcheck(rows):
    """Of the op and of its sums, also a second time: each one's gradient is made of the others."""
    for bias, target in WHICH:
        p = problem(rows, 4, 3, torch.float64, bias, target).mapped(torch.Tensor.requires_grad_)

        def op(*floats, p=p):
            q = p.of(floats)
            return vf.ops.sparse_decode(q.values, q.indices, q.w, q.b, offsets=q.offsets, target=q.target)

        with vf.backend("reference"):
            assert torch.autograd.gradcheck(op, p.floats)
            assert torch.autograd.gradgradcheck(op, p.floats)
    values = torch.randn_like(p.values).requires_grad_()  # without zeros
    g = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with vf.backend("reference"):
        sums = lambda v, g: accumulate(v, p.indices, g, 4, p.offsets)  # noqa: E731
        each = lambda w, g: grad_values(p.indices, w, g, p.offsets)  # noqa: E731
        for function, inputs in ((sums, (values, g)), (each, (p.w, g))):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)
        assert torch.autograd.gradcheck(lambda v: sums(v, g)[1], values)


@one_of_each
def test_second_derivatives(backend):
    """Of the kernels: as those of the reference."""
    p = problem((5, 6), 9, 20)

    def second(p, device, name):
        q = p.on(device).mapped(lambda x: x.detach().requires_grad_())
        with vf.backend(name):
            _, error = vf.ops.sparse_decode(q.values, q.indices, q.w, q.b, target=q.target)
            grads = torch.autograd.grad(error.square().sum(), q.floats, create_graph=True)
            found = torch.autograd.grad(sum((grad**2).sum() for grad in grads), q.floats)
        return [x.cpu() for x in found]

    truths = second(p.mapped(torch.Tensor.double), "cpu", "reference")
    got, yardsticks = second(p, backend.device, backend.name), second(p, "cpu", "reference")
    for one, yardstick, truth in zip(got, yardsticks, truths, strict=True):
        # What cancels here is not written down: the largest number of a tensor stands for it.
        assert_close(one, yardstick, truth, terms=1000, unit=truth.abs().max().expand(truth.shape))


@one_of_each
def test_the_gradient_of_one_input_alone(backend):
    p = problem((4, 5), 9, 20)
    weights = [x.to(backend.device) for x in weights_of(p)]
    all_ = gradients(p, weights_of(p), backend.name, backend.device)
    for n in range(4):
        q = p.on(backend.device).mapped(torch.clone)
        q.floats[n].requires_grad_()
        out = vf.ops.sparse_decode(q.values, q.indices, q.w, q.b, target=q.target)
        assert torch.equal(torch.autograd.grad(out, q.floats[n], weights)[0].cpu(), all_[n])
    # Of one result alone.
    q = p.on(backend.device).mapped(torch.Tensor.requires_grad_)
    y, error = vf.ops.sparse_decode(q.values, q.indices, q.w, q.b, target=q.target)
    alone = torch.autograd.grad(y, (q.values, q.w, q.b), weights[0], retain_graph=True)
    p = p.mapped(torch.Tensor.detach)
    without = gradients(replace(p, target=None), weights_of(p)[:1], backend.name, backend.device)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(alone, without, strict=True))
    of_error = [x.cpu() for x in torch.autograd.grad(error, q.floats, weights[1])]
    check_gradients_of_the_error(p, weights_of(p), of_error)
    with torch.no_grad():
        assert not vf.ops.sparse_decode(q.values, q.indices, q.w).requires_grad


def check_gradients_of_the_error(p, weights, got):
    weights = [torch.zeros_like(weights[0]), weights[1]]
    truths = gradients(p.mapped(torch.Tensor.double), weights, "reference")
    for one, yardstick, truth, unit in zip(
        got, gradients(p, weights, "reference"), truths, gradient_units(p, weights), strict=True
    ):
        assert_gradient_close(one, yardstick, truth, terms=p.values.numel() + 20, unit=at_least(unit, truth))


def test_a_gradient_runs_where_its_forward_was_forced_to(monkeypatch):
    called = []
    cpp = ROW.cells["cpp"]

    def load():
        return {name: lambda *a, name=name: called.append(name) or cpp.load()[name](*a) for name in cpp.load()}

    monkeypatch.setitem(ROW.cells, "cpp", _registry.Kernel(load, cpp.devices, cpp.dtypes, cpp.reason))
    p = problem((4, 5), 9, 20, target=False).mapped(torch.Tensor.requires_grad_)
    with vf.backend("reference"):
        out = vf.ops.sparse_decode(p.values, p.indices, p.w)
    out.sum().backward()
    assert called == []
    vf.ops.sparse_decode(p.values, p.indices, p.w).sum().backward()
    assert called == ["sparse_decode", "sparse_decode_values", "accumulate"]


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


def stacked(problems, batched):
    """Tensors (values, indices, w, b, offsets, target) of several problems, shared but for `batched`; and in_dims."""
    tensors, in_dims = [], []
    for name in ("values", "indices", "w", "b", "offsets", "target"):
        several = [getattr(p, name) for p in problems]
        one = several[0] is None or name not in batched
        dim = None if one else 1 if name == "w" else 0
        tensors.append(several[0] if one else torch.stack(several, dim))
        in_dims.append(dim)
    return tensors, tuple(in_dims)


BATCHED = {
    "entries and target": ("values", "indices", "target"),
    "values": ("values",),
    "target": ("target",),
    "w": ("w",),
    "b": ("b",),
    "all": ("values", "indices", "w", "b", "target"),
}


@one_of_each
@pytest.mark.parametrize("rows", [(3, 4), [2, 0, 4]], ids=str)
@pytest.mark.parametrize("batched", BATCHED)
def test_vmap(backend, rows, batched):
    """Values and gradients under vmap are those of a loop."""
    problems = [problem(rows, 6, 10, seed=seed) for seed in range(3)]
    shared = {name for name in ("values", "indices", "w", "b", "target") if name not in BATCHED[batched]}
    problems = [replace(p, **{name: getattr(problems[0], name) for name in shared}) for p in problems]
    tensors, in_dims = stacked([p.on(backend.device) for p in problems], BATCHED[batched])
    weights = [x.to(backend.device) for x in weights_of(problems[0])]

    def op(values, indices, w, b, offsets, target):
        return vf.ops.sparse_decode(values, indices, w, b, offsets=offsets, target=target)

    def loss(*arguments):
        return sum((out * weight).sum() for out, weight in zip(op(*arguments), weights, strict=True))

    out = torch.vmap(op, in_dims)(*tensors)
    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 2, 3, 5)), in_dims)(*tensors)
    for v, p in enumerate(problems):
        check(p, backend, [x[v].cpu() for x in out])
        check_gradients(p, backend, [x[v].cpu() for x in grads])


@one_of_each
def test_vmap_of_the_sums(backend):
    problems = [problem((3, 4), 6, 10, target=False, seed=seed).on(backend.device) for seed in range(3)]
    gs = torch.stack([weights_of(p.on("cpu"))[0] + n for n, p in enumerate(problems)]).to(backend.device)
    (values, indices, w, *_), _ = stacked(problems, ("values", "indices"))
    for one, got in zip(gs, torch.vmap(lambda i, g: grad_values(i, w, g))(indices, gs), strict=True):
        n = int((gs == one).flatten(1).all(1).nonzero())
        assert torch.equal(got, grad_values(indices[n], w, one))
    found = torch.vmap(lambda v, i, g: accumulate(v, i, g, 6))(values, indices, gs)
    for n in range(3):
        expected = accumulate(values[n], indices[n], gs[n], 6)
        assert torch.equal(found[0][n], expected[0]) and torch.equal(found[1][n], expected[1])
    twice = torch.vmap(torch.vmap(lambda v: gather(v, indices[0], w)))(values[None])
    assert torch.equal(twice[0], torch.stack([gather(v, indices[0], w) for v in values]))
    jacobian = torch.func.jacrev(lambda v: gather(v, indices[0], w))(values[0])
    assert torch.equal(jacobian[1, :, 1], w[indices[0, 1].long()].T)


@one_of_each
@pytest.mark.parametrize("rows", [(3, 4), [2, 0, 4]], ids=str)
def test_the_registered_ops_pass_opcheck(backend, rows):
    for bias, target in WHICH[::3]:
        p = problem(rows, 5, 6, bias=bias, target=target, zeros=0).on(backend.device)
        floats = p.mapped(torch.Tensor.requires_grad_)
        arguments = (floats.values, p.indices, floats.w, floats.b, p.offsets, floats.target)
        torch.library.opcheck(OPS.sparse_decode.default, arguments)
    g = weights_of(p.on("cpu"))[0].to(backend.device).requires_grad_()
    torch.library.opcheck(OPS.sparse_decode_values.default, (p.indices, floats.w, g, p.offsets))
    torch.library.opcheck(OPS.sparse_accumulate.default, (floats.values, p.indices, g, 5, p.offsets))


def check_compiled(backend, compiler):
    torch._dynamo.reset()
    op = lambda v, i, w, b, offsets, target: vf.ops.sparse_decode(  # noqa: E731
        v * 1, i, w * 1, b, offsets=offsets, target=target
    )
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    for p in (problem((3, 4), 6, 20), problem([2, 0, 5], 6, 20, bias=False, target=False)):
        call = lambda v, i, w, b, offsets, target: compiled(v, i, w, b, offsets, target)  # noqa: E731
        check_gradients(p, backend, gradients(p, weights_of(p), backend.name, backend.device, call))
        with torch.no_grad():
            q = p.on(backend.device)
            out = compiled(q.values, q.indices, q.w, q.b, q.offsets, q.target)
        check(p, backend, [x.cpu() for x in ((out,) if p.target is None else out)])


@one_of_each
def test_compiled_without_breaks(backend):
    check_compiled(backend, "aot_eager")


@pytest.mark.deep
@one_of_each
def test_compiled_by_inductor(backend):
    check_compiled(backend, "inductor")


@one_of_each
def test_a_trace_holds_the_registered_ops(backend):
    """make_fx sees the op and its gradients, and not a constant that a kernel made behind its back."""
    from torch.fx.experimental.proxy_tensor import make_fx

    p, other = (problem((3, 4), 6, 20, seed=seed).on(backend.device) for seed in range(2))

    def gradient(values, w):
        inputs = values.detach().requires_grad_(), w.detach().requires_grad_()
        _, error = vf.ops.sparse_decode(inputs[0], p.indices, inputs[1], p.b, target=p.target)
        return torch.autograd.grad(error.sum(), inputs)

    graph = make_fx(gradient)(p.values, p.w)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"vaecirc_fast.sparse_{name}.default" for name in ("decode", "decode_values", "accumulate")} <= targets
    expected = gradient(other.values, other.w)
    assert all(torch.equal(a, b) for a, b in zip(graph(other.values, other.w), expected, strict=True))


# --- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["one element not written", "a factor", "an entry dropped"])
def test_a_wrong_kernel_is_found(wrong, monkeypatch):
    """The checks of this file bite: planted around the real kernels, each of these makes them fail."""
    cpp, backend = ROW.cells["cpp"], CPP[-1]

    def spoilt(name):
        def kernel(*arguments):
            if wrong == "an entry dropped":
                first = arguments[0].clone()
                first.view(-1)[-1] = 0
                right = cpp.load()[name](first, *arguments[1:])
                return right
            right = cpp.load()[name](*arguments)
            out = right[0] if isinstance(right, tuple) else right
            if wrong == "a factor":
                out *= 1.001
            else:
                out.view(-1)[-1] = math.nan
            return right

        return kernel

    p = problem((5, 6), 9, 20, zeros=0)
    with backend.forced():
        check(p, backend)
        check_gradients(p, backend)
        for name, function in (
            ("sparse_decode", check),
            ("sparse_decode_values", check_gradients),
            ("accumulate", check_gradients),
        ):
            kernels = {**cpp.load(), name: spoilt(name)}
            with monkeypatch.context() as planted:
                cell = _registry.Kernel(lambda kernels=kernels: kernels, cpp.devices, cpp.dtypes, cpp.reason)
                planted.setitem(ROW.cells, "cpp", cell)
                with pytest.raises(AssertionError, match="element|row"):
                    function(p, backend)


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_and_repetition_change_no_bit(backend):
    lengths = [n % 90 for n in range(150)]  # two threads cannot share these equally
    with backend.forced():
        for dtype, rows in itertools.product((torch.float32, torch.bfloat16), ((130, 45), lengths)):
            p = problem(rows, 37, 77, dtype)
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                assert _native.threads(p.values.numel() * 77) == threads
                (g, *_) = weights_of(p)
                found = [*run(p, backend), *gradients(p, weights_of(p), "cpp")]
                results.append([*found, *accumulate(p.values, p.indices, g, 37, p.offsets)])
            torch.set_num_threads(1)
            for again in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
            check(p, backend, results[1][:2])
            broken = p.indices.clone()
            broken.view(-1)[[-7, 5000]] = 99
            torch.set_num_threads(2)
            place = "entry 5000" if p.offsets is not None else "row 111, 5"
            with pytest.raises(InputError, match=f"^indices: {place} is 99"):
                gather(p.values, broken, p.w, p.offsets)
            with pytest.raises(InputError, match=f"^indices: {place} is 99"):
                accumulate(p.values, broken, g, 37, p.offsets)
            torch.set_num_threads(1)


@pytest.mark.gpu
def test_repetition_changes_no_bit_on_a_gpu():
    """Its blocks run in any order."""
    p = problem((1000, 45), 37, 77)
    first = None
    for _ in range(3):
        results = gradients(p, weights_of(p), "triton", "cuda")
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


EDGES = """
import sys, torch, guarded, vaecirc_fast as vf
from vaecirc_fast import _native
from vaecirc_fast.ops.sparse_decode import accumulate, gather, grad_values

torch.manual_seed(0)
plain = torch.empty

def everything(values, indices, w, b, offsets, target, g):
    found = [*vf.ops.sparse_decode(values, indices, w, b, offsets=offsets, target=target)]
    return [*found, grad_values(indices, w, g, offsets), *accumulate(values, indices, g, len(w), offsets)]

for name in _native.cpp().instruction_sets():
    _native.cpp().set_instruction_set(name)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, 3, 8, 15, 16, 17, 64, 77, 150):
            for rows in ((3, 5), (2, 16), (1, 37), [3, 0, 21], (70, 16)):
                count = rows[0] if isinstance(rows, tuple) else len(rows)
                shape = rows if isinstance(rows, tuple) else (sum(rows),)
                offsets = None if shape == rows else torch.tensor([0, *rows]).cumsum(0).int()
                indices = torch.randint(0, 7, shape, dtype=torch.int32)
                indices.view(-1)[-1] = 6  # the last row of w, at its end
                inputs = [torch.randn(shape).to(dtype), indices, torch.randn(7, width).to(dtype)]
                inputs += [torch.randn(width).to(dtype), offsets, torch.randn(count, width).to(dtype)]
                inputs += [torch.randn(count, width).to(dtype)]
                expected = everything(*inputs)
                for before in (False, True):
                    edge = [None if x is None else guarded.placed(x, before) for x in inputs]
                    torch.empty = lambda *size, dtype, device=None, before=before: (
                        plain(*size, dtype=dtype) if device is None else  # its own use of it
                        guarded.guarded(size[0] if isinstance(size[0], tuple) else size, dtype, before))
                    got = everything(*edge)
                    torch.empty = plain
                    assert all(torch.equal(a, b) for a, b in zip(got, expected)), (name, dtype, width, rows, before)
print("all within bounds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forbidden pages are made by mprotect")
def test_nothing_beside_the_tensors_is_read_or_written():
    """In memory that ends at a forbidden page, before or behind."""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", EDGES], cwd=tests, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all within bounds\n", (done.returncode, done.stderr[-2000:])


def available_memory():
    with open("/proc/meminfo") as file:
        return int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024


@pytest.mark.deep
@one_of_each
def test_offsets_beyond_32_bits(backend):
    """More than 2^31 elements of w and of g: the last rows are where they belong."""
    latents, width = (1 << 20) + 1, 1 << 11
    if backend.name == "reference" or (backend.device == "cpu" and available_memory() < 11 * 2**30):
        pytest.skip("not enough memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    w = torch.zeros(latents, width, dtype=torch.bfloat16, device=backend.device)
    w[-1] = torch.arange(width) % 128
    indices = torch.tensor([[0, latents - 1]], dtype=torch.int32, device=backend.device)
    values = torch.ones(1, 2, dtype=torch.bfloat16, device=backend.device)
    assert torch.equal(gather(values, indices, w)[0], w[-1])
    assert grad_values(indices, w, w[-1:])[0].tolist() == [0, float(w[-1].float().square().sum().bfloat16())]
    last = w[-1:].clone()
    del w
    sums, totals = accumulate(values, indices, last, latents)
    assert torch.equal(sums[0], last[0]) and torch.equal(sums[-1], last[0])
    assert int(sums[1:-1].count_nonzero()) == 0 and float(totals.sum()) == 2


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(values=(2, 3), indices=None, w_dec=(4, 5), **others):
    """Arguments of which one is wrong; tensors by their shape."""
    make = lambda x: torch.zeros(x) if isinstance(x, tuple) else x  # noqa: E731
    indices = torch.zeros(values, dtype=torch.int32) if indices is None else indices
    return dict(values=make(values), indices=indices, w_dec=make(w_dec)) | {k: make(x) for k, x in others.items()}


int32 = torch.int32
BAD = {
    "values no tensor": (bad([[1.0]], torch.zeros(1, 1, dtype=int32)), r"^values: expected a tensor, got list$"),
    "indices no tensor": (bad(indices=[[0, 0, 0]]), r"^indices: expected a tensor, got list$"),
    "w no tensor": (bad(w_dec=3), r"^w_dec: expected a tensor, got int$"),
    "w of one axis": (bad(w_dec=(4,)), r"^w_dec: expected floating \(M, D\) with M > 0, got torch.float32 \(4,\)$"),
    "no latents": (bad(w_dec=(0, 5)), r"^w_dec: expected floating \(M, D\) with M > 0"),
    "integers": (bad(w_dec=torch.zeros(4, 5).int()), r"^w_dec: expected floating \(M, D\) .* got torch.int32"),
    "other shape": (
        bad(indices=torch.zeros(2, 4, dtype=int32)),
        r"^indices: expected the shape of values, \(2, 3\), got",
    ),
    "floating indices": (bad(indices=torch.zeros(2, 3)), r"^indices: expected int32 or int64, got torch.float32$"),
    "a number": (bad((), torch.zeros((), dtype=int32)), r"^values: expected \(..., K\), got a single number$"),
    "other dtype": (
        bad(torch.zeros(2, 3).double(), torch.zeros(2, 3, dtype=int32)),
        r"^values: expected the dtype of w_dec",
    ),
    "other dtype of b": (
        bad(b_dec=torch.zeros(5).bfloat16()),
        r"^b_dec: expected the dtype of w_dec, torch.float32, got",
    ),
    "other device": (bad(b_dec=torch.zeros(5, device="meta")), r"^b_dec: expected the device of w_dec, cpu, got meta$"),
    "b of others": (bad(b_dec=(4,)), r"^b_dec: expected shape \(5,\) for w_dec \(4, 5\), got \(4,\)$"),
    "b no tensor": (bad(b_dec=0.5), r"^b_dec: expected a tensor, got float$"),
    "target of others": (bad(target=(2, 4)), r"^target: expected the shape of y, \(2, 5\), got \(2, 4\)$"),
    "target of rows": (
        bad((3,), offsets=torch.tensor([0, 3]), target=(3, 5)),
        r"^target: expected the shape of y, \(1, 5\)",
    ),
    "offsets no tensor": (bad((3,), offsets=[0, 3]), r"^offsets: expected a tensor, got list$"),
    "offsets of floats": (bad((3,), offsets=(2,)), r"^offsets: expected int32 or int64 \(B \+ 1,\), got torch.float32"),
    "no offsets": (bad((3,), offsets=torch.zeros(0, dtype=int32)), r"^offsets: expected int32 or int64 \(B \+ 1,\)"),
    "offsets and rows": (bad(offsets=torch.tensor([0, 6])), r"^values: expected \(N,\) with offsets, got \(2, 3\)$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.sparse_decode(**arguments)
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_run_is_an_error():
    for name, dtype, reason in (("cuda", torch.float32, "is not"), ("cpp", torch.float16, "has no kernel for")):
        p = problem((2, 3), 4, 5, dtype, target=False)
        with vf.backend(name), pytest.raises(BackendError, match=f"^sparse_decode: backend '{name}' .* but {reason}"):
            vf.ops.sparse_decode(p.values, p.indices, p.w)
        # Not forced, the next of the order takes it.
        assert vf.ops.sparse_decode(p.values, p.indices, p.w).dtype == dtype
