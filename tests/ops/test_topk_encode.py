"""The op topk_encode on every backend: selection from its own products, AuxK, BatchTopK, gradients and bad input."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.reference import topk as topk_reference
from vaecirc_fast.reference import topk_encode as reference

ROW = _registry.rows["topk_encode"]
MODULE = sys.modules["vaecirc_fast.ops.topk_encode"]
PRODUCT = sys.modules["vaecirc_fast.ops._product"]
OP = torch.ops.vaecirc_fast.topk_encode
BATCH_OP = torch.ops.vaecirc_fast.batch_topk_encode
NAN, INF = math.nan, math.inf


def runs(backend, dtype):
    """Whether the backend has a kernel for `dtype`; the row says so."""
    return ROW.why_not(backend.name, backend.device, dtype) is None


# --- problems --------------------------------------------------------------------------------------------------------


def inputs(B, D, M, dtype=torch.float32, whole=False, bias=0.0, seed=0):
    """x (B, D), w_enc (M, D) and b_enc (M,). `whole` numbers: products exact in any order of additions, many ties."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        draw = lambda *size: torch.randint(-2, 3, size, generator=generator).to(dtype)  # noqa: E731
        return draw(B, D), draw(M, D), draw(M) + round(bias)
    x, w, b = (torch.randn(size, generator=generator) for size in ((B, D), (M, D), (M,)))
    return x.to(dtype), (w / D**0.5).to(dtype), (b / 4 + bias).to(dtype)


def deads(M, share, seed=0):
    return torch.rand(M, generator=torch.Generator().manual_seed(seed)) < share


def to(backend, *tensors):
    return [x.to(backend.device) if isinstance(x, torch.Tensor) else x for x in tensors]


def run(backend, x, w, b, k, **options):
    """The op on the backend's device, results on the CPU."""
    options = {name: value.to(backend.device) if name == "dead" else value for name, value in options.items()}
    out = vf.ops.topk_encode(*to(backend, x, w, b, k), **options)
    return [part if part is None else part.cpu() for part in out]


# --- the truth -------------------------------------------------------------------------------------------------------


def first(act, k, among=None):
    """Indices (B, k) of a stable descending sort among some columns, ascending; padded with zeros."""
    columns = torch.arange(act.shape[1]) if among is None else among.nonzero().flatten()
    k_found = min(k, len(columns))
    order = topk_reference.descending(act[:, columns])[:, :k_found].sort(1).values
    return torch.nn.functional.pad(columns[order], (0, k - k_found)).int(), k_found


def check_row(act, out, k, dtype, dead=None, k_aux=0):
    """Results against a stable sort of activations (B, M) that are what the op chose from."""
    indices, _ = first(act, k)
    values = act.gather(1, indices.long())
    parts = [values.to(dtype), indices]
    if len(out) > 2:
        fired = torch.zeros(act.shape[1], dtype=torch.int32)
        parts.append(fired.index_add(0, indices.flatten(), (values > 0).flatten().int()))
        if dead is None:
            parts += [None, None]
        else:
            aux, found = first(act, k_aux, dead)
            aux_values = act.gather(1, aux.long())
            aux_values[:, found:] = 0
            parts += [aux_values.to(dtype), aux]
    assert_equal(out, parts)


def check_batch(act, out, k, dtype):
    flat = topk_reference.descending(act.flatten())[: k * len(act)].sort().values
    counts = torch.bincount(flat // act.shape[1], minlength=len(act))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    assert_equal(out, [act.flatten()[flat].to(dtype), (flat % act.shape[1]).int(), offsets])


def assert_equal(out, parts):
    for got, right in zip(out, parts, strict=True):
        if right is None:
            assert got is None
            continue
        assert got.shape == right.shape and got.dtype == right.dtype
        if right.dtype.is_floating_point:
            assert torch.equal(got.isnan(), right.isnan())
            got, right = got.nan_to_num(), right.nan_to_num()
        assert torch.equal(got, right), f"{int((got != right).sum())} of {right.numel()} entries"


def own_activations(x, w, b, activation):
    """What the C++ kernel chooses from: its own tiles of products, then bias and activation in float."""
    tiles = [tile.clone() for _, tile in MODULE.products(x, w)]
    pre = torch.cat([x.new_empty(0, len(w)), *tiles]).float()
    pre = pre if b is None else pre + b.float()
    return torch.relu(pre) if activation == "relu" else pre


def activations_of(backend, x, w, b, activation):
    """The activations that the backend chose from; of Triton those of the reference, for whole numbers the same."""
    if backend.name == "cpp":
        return own_activations(x, w, b, activation)
    return reference.activations(x, w, b, reference.ACTIVATIONS.index(activation))


# B, D, M, k: one row, one latent, all latents, widths beside the registers', several tiles.
SIZES = [(1, 1, 1, 1), (2, 3, 5, 5), (7, 8, 40, 9), (3, 5, 131, 30), (5, 16, 300, 120), (40, 64, 500, 50)]
LARGE = (1100, 4, 500, 20)  # three tiles
ACTIVATIONS = reference.ACTIVATIONS


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("whole", [False, True], ids=["any numbers", "whole numbers"])
def test_values(backend, activation, whole):
    """Of any numbers only the kernel's own products tell what it chose from; of whole ones all backends agree."""
    if not whole and backend.name == "triton":
        return
    sizes = SIZES[:4] if backend.interpreted else [*SIZES, LARGE]
    for B, D, M, k in sizes:
        for bias in (0.0, -2.0) if whole else (0.0,):
            x, w, b = inputs(B, D, M, whole=whole, bias=bias)
            for bias in (b, None):
                act = activations_of(backend, x, w, bias, activation)
                check_row(act, run(backend, x, w, bias, k, activation=activation), k, torch.float32)
                out = run(backend, x, w, bias, k, activation=activation, fired=True)
                check_row(act, out, k, torch.float32)
                out = run(backend, x, w, bias, k, activation=activation, scope="batch")
                check_batch(act, out, k, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_in_other_dtypes(backend, dtype):
    if not runs(backend, dtype):
        with pytest.raises(BackendError, match=f"has no kernel for {dtype}"):
            run(backend, *inputs(2, 3, 5, dtype), 2)
        return
    for (B, D, M, k), activation in itertools.product(SIZES[:4] if backend.interpreted else SIZES, ACTIVATIONS):
        x, w, b = inputs(B, D, M, dtype, whole=True)
        act = activations_of(backend, x, w, b, activation)
        dead = deads(M, 0.3)
        out = run(backend, x, w, b, k, activation=activation, fired=True, dead=dead, k_aux=min(M, 7))
        check_row(act, out, k, dtype, dead, min(M, 7))
        check_batch(act, run(backend, x, w, b, k, activation=activation, scope="batch"), k, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_the_dead_have_a_list_of_their_own(backend, share, activation):
    for B, D, M, k in SIZES[1:4] if backend.interpreted else SIZES:
        x, w, b = inputs(B, D, M, whole=True, bias=-1.0)
        act, dead = activations_of(backend, x, w, b, activation), deads(M, share)
        for k_aux in {1, min(M, 40), M}:
            out = run(backend, x, w, b, k, activation=activation, fired=True, dead=dead, k_aux=k_aux)
            check_row(act, out, k, torch.float32, dead, k_aux)
            without = run(backend, x, w, b, k, activation=activation, dead=dead, k_aux=k_aux)
            assert without[2] is None
            assert_equal([*without[:2], *without[3:]], [*out[:2], *out[3:]])


@st.composite
def problem(draw):
    """Whole numbers with some NaN and infinities in the bias, which every product reaches unchanged."""
    B, D, M = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 300))
    x, w, _ = inputs(B, D, M, whole=True, seed=draw(st.integers(0, 99)))
    some = draw(st.sampled_from([[0.0, -1.0], [-100.0, 5.0], [0.0, NAN], [INF, -INF, NAN, 1.0], [-INF, 0.0, 0.5]]))
    b = torch.tensor(draw(st.lists(st.sampled_from(some), min_size=M, max_size=M)))
    dead = deads(M, draw(st.sampled_from([0.0, 0.1, 0.9])), draw(st.integers(0, 99)))
    k, k_aux = draw(st.integers(1, M)), draw(st.integers(1, M))
    return x, w, b, k, draw(st.sampled_from(ACTIVATIONS)), dead, k_aux


@settings(max_examples=40)
@given(problem=problem())
def test_any_problem(backend, problem):
    x, w, b, k, activation, dead, k_aux = problem
    act = activations_of(backend, x, w, b, activation)
    out = run(backend, x, w, b, k, activation=activation, fired=True, dead=dead, k_aux=k_aux)
    check_row(act, out, k, torch.float32, dead, k_aux)
    check_batch(act, run(backend, x, w, b, k, activation=activation, scope="batch"), k, torch.float32)


def test_values_are_those_of_the_truth(backend):
    """By the rule of tests/close.py: each chosen value is the activation of its latent."""
    for dtype in FLOATS:
        if not runs(backend, dtype):
            continue
        for activation in ACTIVATIONS:
            x, w, b = inputs(9, 32, 200, dtype)
            values, indices = run(backend, x, w, b, 30, activation=activation)
            number = ACTIVATIONS.index(activation)
            truth = reference.activations(x.double(), w.double(), b.double(), number).gather(1, indices.long())
            plain = reference.activations(x, w, b, number).gather(1, indices.long()).to(dtype)
            unit = (x.double().abs() @ w.double().abs().T + b.double().abs()).gather(1, indices.long())
            assert_close(values, plain, truth, terms=33, unit=unit)


@pytest.mark.parametrize("backend", parameters(CPP))
def test_the_threshold_of_a_batch_rises_tile_by_tile(backend):
    """Rows that grow, shrink, are all equal or hold everything: the candidates are cut again and again, or never."""
    M, B = 300, 1200
    ramp = torch.linspace(0.1, 8, B)[:, None]
    batches = {"growing": ramp, "shrinking": ramp.flip(0), "equal": torch.ones(B, 1)}
    batches["last row"] = torch.zeros(B, 1).index_fill(0, torch.tensor([B - 1]), 9.0)
    batches["first row"] = batches["last row"].flip(0)
    batches["negative"] = -ramp
    batches["NaN"] = torch.where(torch.arange(B)[:, None] % 7 == 0, NAN, ramp)
    w = torch.rand(M, 1, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    with backend.forced():
        for x, activation, k in itertools.product(batches.values(), ACTIVATIONS, (1, 37, M)):
            act = own_activations(x, w, None, activation)
            check_batch(act, run(backend, x, w, None, k, activation=activation, scope="batch"), k, torch.float32)


@pytest.mark.parametrize("rows", [40, 1000])
def test_nan_and_infinity_reach_their_row_only(backend, rows):
    x, w, b = inputs(rows, 8, 100, whole=True)
    clean = run(backend, x, w, b, 9)
    for spoilt in (NAN, INF):
        x[7, 3], x[rows - 2, 0] = spoilt, spoilt
        others = torch.ones(rows, dtype=torch.bool).index_fill(0, torch.tensor([7, rows - 2]), False)
        got = run(backend, x, w, b, 9)
        assert_equal([part[others] for part in got], [part[others] for part in clean])
        act = reference.activations(x, w, b, 0)[~others]
        check_row(act, [part[~others] for part in got], 9, torch.float32)


@one_of_each
def test_the_products_of_onednn_and_plain_ones_agree(backend, monkeypatch):
    """Whole numbers: both are exact."""
    for layout in (lambda w: w, lambda w: w.T.contiguous().T, lambda w: w.repeat_interleave(2, 1)[:, ::2]):
        x, w, b = inputs(259, 8, 100, whole=True)
        found = run(backend, x, layout(w), b, 9)
        enabled, *_ = torch.backends.mkldnn.set_flags(False)
        try:
            plain = run(backend, x, layout(w), b, 9)
        finally:
            torch.backends.mkldnn.set_flags(enabled)
        assert_equal(found, plain)
        monkeypatch.setattr(PRODUCT, "_onednn", lambda: None)
        assert_equal(run(backend, x, layout(w), b, 9), plain)
        monkeypatch.undo()


@one_of_each
def test_shapes_and_layouts(backend):
    x, w, b = inputs(24, 6, 40, whole=True)
    flat = run(backend, x, w, b, 7)
    for shape in ((24,), (2, 12), (4, 3, 2)):
        assert_equal(run(backend, x.view(*shape, 6), w, b, 7), [part.view(*shape, 7) for part in flat])
    assert_equal(run(backend, x[0], w, b, 7), [part[0] for part in flat])
    for layout in (w.T.contiguous().T, torch.cat([w, w], 1)[:, :6], w.repeat_interleave(2, 1)[:, ::2]):
        for rows in (x, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
            assert_equal(run(backend, rows, layout, b.repeat_interleave(2)[::2], 7), flat)
    for shape in ((0,), (3, 0)):
        values, indices, fired, aux_values, aux_indices = run(
            backend, torch.zeros(*shape, 6), w, b, 7, fired=True, dead=deads(40, 0.5), k_aux=3
        )
        assert values.shape == indices.shape == (*shape, 7) and aux_values.shape == aux_indices.shape == (*shape, 3)
        assert fired.tolist() == [0] * 40
    values, indices, offsets = run(backend, x[:0], w, b, 7, scope="batch")
    assert len(values) == len(indices) == 0 and offsets.tolist() == [0]


def test_k_as_a_tensor_is_padded(backend):
    x, w, b = inputs(5, 4, 140, whole=True, bias=-3.0)
    for (k, k_max), activation in itertools.product(((1, 1), (1, 30), (17, 30), (30, 30)), ACTIVATIONS):
        plain = run(backend, x, w, b, k, activation=activation, fired=True)
        padded = [torch.nn.functional.pad(part, (0, k_max - k)) for part in plain[:2]] + plain[2:]
        for count in (torch.tensor(k), torch.tensor([k], dtype=torch.int32), k):
            assert_equal(run(backend, x, w, b, count, k_max=k_max, activation=activation, fired=True), padded)


# --- gradients -------------------------------------------------------------------------------------------------------


def scattered(grad, indices, M):
    """A dense (B, M) with the entries of fixed k, in float64."""
    return torch.zeros(len(grad), M, dtype=torch.float64).scatter_add(1, indices.long(), grad.double())


def check_gradients(backend, x, w, b, g, got):
    """Gradients against dense g (B, M) of the chosen pre-activations, in float64, by the rule with magnitudes."""
    x64, w64 = x.double(), w.double()
    truths = [g @ w64, g.T @ x64, g.sum(0)]
    units = [g.abs() @ w64.abs(), g.abs().T @ x64.abs(), g.abs().sum(0)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    plain = [(g.to(dtype) @ w.to(dtype)), (g.to(dtype).T @ x.to(dtype)), g.to(dtype).sum(0)]
    for grad, yardstick, truth, unit in zip(got, plain, truths, units, strict=False):
        terms = max(int((g != 0).sum(1).max()), int((g != 0).sum(0).max()), 1)
        assert_gradient_close(grad.cpu(), yardstick.to(x.dtype), truth, terms=terms, unit=unit)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(backend, dtype, activation):
    """Through values and auxiliary values; zeros of a ReLU and padding pass nothing, whatever their gradient is."""
    if not runs(backend, dtype):
        return
    for (B, D, M, k), padded in itertools.product([(5, 6, 40, 9), (12, 3, 300, 120)], (False, True)):
        x, w, b = inputs(B, D, M, dtype, whole=True, bias=-2.0)
        leaves = [t.to(backend.device, copy=True).requires_grad_() for t in (x, w, b)]
        dead, k_aux = deads(M, 0.1), M // 2
        n, k_max = (torch.tensor(k, device=backend.device), k + 4) if padded else (k, None)
        out = vf.ops.topk_encode(
            *leaves, n, k_max=k_max, activation=activation, fired=True, dead=dead.to(backend.device), k_aux=k_aux
        )
        assert [part.requires_grad for part in out] == [True, False, False, True, False]
        weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(part) for part in out[::3]]
        weights[0][:, k:] = NAN
        weights[1][:, int(dead.sum()) :] = NAN
        got = torch.autograd.grad([out.values, out.aux_values], leaves, weights)
        g = torch.zeros(B, M, dtype=torch.float64)
        for weight, values, indices in zip(weights, out[::3], out[1::3], strict=True):
            passed = (values > 0 if activation == "relu" else ~weight.isnan()).cpu()
            g += scattered(weight.cpu().masked_fill(~passed, 0), indices.cpu(), M)
        check_gradients(backend, x, w, b, g, got)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_a_batch(backend, activation):
    x, w, b = inputs(9, 5, 60, whole=True, bias=-2.0)
    leaves = [t.to(backend.device, copy=True).requires_grad_() for t in (x, w, b)]
    values, indices, offsets = vf.ops.topk_encode(*leaves, 7, activation=activation, scope="batch")
    assert values.requires_grad and not indices.requires_grad and not offsets.requires_grad
    weight = torch.randn(63, generator=torch.Generator().manual_seed(1)).to(values)
    got = torch.autograd.grad(values, leaves, weight)
    rows = torch.arange(9).repeat_interleave(offsets.cpu().diff())
    passed = weight.cpu() if activation == "identity" else torch.where(values.cpu() > 0, weight.cpu(), 0)
    g = torch.zeros(9, 60, dtype=torch.float64).index_put((rows, indices.cpu().long()), passed.double())
    check_gradients(backend, x, w, b, g, got)


def test_gradcheck(backend):
    """Of the whole op, and so of its reference, in float64."""
    if not runs(backend, torch.float64):
        return
    x, w, b = inputs(3, 4, 12, torch.float64)
    leaves = [t.to(backend.device, copy=True).requires_grad_() for t in (x, w, b)]
    dead = deads(12, 0.5).to(backend.device)
    for activation in ACTIVATIONS:
        both = lambda *t, a=activation: vf.ops.topk_encode(*t, 3, activation=a, dead=dead, k_aux=2)[::3]  # noqa: E731
        assert torch.autograd.gradcheck(lambda *t: both(*t)[0], leaves)  # noqa: B023
        assert torch.autograd.gradcheck(lambda *t: both(*t)[1], leaves)  # noqa: B023
        batch = lambda *t, a=activation: vf.ops.topk_encode(*t, 3, activation=a, scope="batch")[0]  # noqa: E731
        assert torch.autograd.gradcheck(batch, leaves)
    assert torch.autograd.gradcheck(lambda x, w: vf.ops.topk_encode(x, w, None, 3)[0], leaves[:2])


@one_of_each
def test_the_gradient_of_one_input_alone(backend):
    x, w, b = to(backend, *inputs(6, 4, 40, whole=True))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    together = torch.autograd.grad(vf.ops.topk_encode(*leaves, 5)[0].sum(), leaves)
    for n in range(3):
        alone = [t.clone().requires_grad_(i == n) for i, t in enumerate((x, w, b))]
        (grad,) = torch.autograd.grad(vf.ops.topk_encode(*alone, 5)[0].sum(), alone[n])
        assert torch.equal(grad, together[n])
    with torch.no_grad():
        assert not vf.ops.topk_encode(*leaves, 5)[0].requires_grad


def test_the_second_derivative():
    leaves = [t.requires_grad_() for t in inputs(3, 4, 12, torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *t: vf.ops.topk_encode(*t, 3)[0].square(), leaves)


@one_of_each
def test_a_step_of_nothing(backend):
    x, w, b = (t.requires_grad_() for t in to(backend, *inputs(0, 4, 9)))
    vf.ops.topk_encode(x, w, b, 3)[0].sum().backward()
    assert x.grad.shape == (0, 4) and not w.grad.any() and not b.grad.any()


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0), (None, 2)], ids=str)
def test_vmap(backend, in_dims):
    """Values, counts and gradients are those of a loop."""
    x, w = (torch.stack([inputs(4, 3, 20, whole=True, seed=n)[i] for n in range(3)]) for i in (0, 1))
    b, dead = inputs(4, 3, 20, whole=True, bias=-1.0)[2].to(backend.device), deads(20, 0.4).to(backend.device)
    of = lambda tensor, dim, v: tensor[0 if dim is None else v].to(backend.device)  # noqa: E731
    stacked = [
        (tensor[0] if dim is None else tensor.movedim(0, dim)).to(backend.device)
        for tensor, dim in zip((x, w), in_dims, strict=True)
    ]
    whole = lambda x, w: vf.ops.topk_encode(x, w, b, 5, fired=True, dead=dead, k_aux=3)  # noqa: E731
    short = lambda x, w: vf.ops.topk_encode(x, w, b, 5)  # noqa: E731
    batch = lambda x, w: vf.ops.topk_encode(x, w, b, 5, scope="batch")  # noqa: E731
    gradient = torch.func.grad(lambda x, w: short(x, w)[0].square().sum(), argnums=(0, 1))
    for op in (lambda x, w: tuple(whole(x, w)), short, lambda x, w: tuple(batch(x, w)), gradient):
        got = torch.vmap(op, in_dims)(*stacked)
        for v in range(3):
            right = op(of(x, in_dims[0], v), of(w, in_dims[1], v))
            for part, one in zip(got, right, strict=True):
                assert torch.equal(part[v], one)


@one_of_each
@pytest.mark.parametrize("k", [None, 3])
def test_the_registered_ops_pass_opcheck(backend, k):
    x, w, b = (t.requires_grad_() for t in to(backend, *inputs(4, 3, 20)))
    dead = deads(20, 0.4).to(backend.device)
    k = k and torch.tensor(k, device=backend.device)
    torch.library.opcheck(OP.default, (x, w, b, k, 5, 0, True, dead, 4))
    torch.library.opcheck(OP.default, (x, w, None, k, 5, 1, False, None, 0))
    torch.library.opcheck(BATCH_OP.default, (x, w, b, 4, 0))


@one_of_each
def test_the_registered_op_is_the_op(backend):
    x, w, b = (t.requires_grad_() for t in to(backend, *inputs(6, 4, 50, whole=True)))
    dead = deads(50, 0.3).to(backend.device)
    out = vf.ops.topk_encode(x, w, b, 5, fired=True, dead=dead, k_aux=4)
    assert_equal(OP(x, w, b, None, 5, 0, True, dead, 4), list(out))
    assert_equal(BATCH_OP(x, w, b, 5, 0), list(vf.ops.topk_encode(x, w, b, 5, scope="batch")))
    loss = lambda out: out[0].square().sum() + out[3].square().sum()  # noqa: E731
    ours = torch.autograd.grad(loss(out), (x, w, b))
    for grad, right in zip(
        torch.autograd.grad(loss(OP(x, w, b, None, 5, 0, True, dead, 4)), (x, w, b)), ours, strict=True
    ):
        assert torch.equal(grad, right)


def check_compiled(backend, compiler):
    """20 values of k, forward and backward, and one compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    dead = deads(60, 0.3).to(backend.device)

    def op(x, w, b, k):
        return tuple(vf.ops.topk_encode(x * 1, w, b, k, k_max=20, fired=True, dead=dead, k_aux=6))

    compiled = torch.compile(op, fullgraph=True, backend=counter)
    x, w, b = (t.requires_grad_() for t in to(backend, *inputs(7, 4, 60, whole=True)))
    for k in range(1, 21):
        count = torch.tensor(k, device=backend.device)
        out, right = compiled(x, w, b, count), op(x, w, b, count)
        assert_equal(out, list(right))
        loss = lambda out: out[0].square().sum() + out[3].sum()  # noqa: E731
        grads = zip(*(torch.autograd.grad(loss(o), (x, w, b)) for o in (out, right)), strict=True)
        assert all(torch.equal(a, c) for a, c in grads)
    assert counter.frame_count == 1


@one_of_each
def test_compiled_once_for_every_k(backend):
    check_compiled(backend, "aot_eager")


@pytest.mark.deep
@one_of_each
def test_compiled_by_inductor(backend):
    check_compiled(backend, "inductor")


@one_of_each
def test_a_compiled_batch(backend):
    torch._dynamo.reset()
    op = lambda x, w, b: tuple(vf.ops.topk_encode(x * 1, w, b, 4, scope="batch"))  # noqa: E731
    x, w, b = (t.requires_grad_() for t in to(backend, *inputs(7, 4, 60, whole=True)))
    out, right = torch.compile(op, fullgraph=True, backend="aot_eager")(x, w, b), op(x, w, b)
    assert_equal(out, list(right))
    grads = zip(*(torch.autograd.grad(o[0].square().sum(), (x, w, b)) for o in (out, right)), strict=True)
    assert all(torch.equal(a, c) for a, c in grads)


# --- memory, threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_change_no_bit(backend):
    x, w, b = inputs(1100, 4, 500, whole=True)
    dead = deads(500, 0.2)
    with backend.forced():
        for dtype, activation in itertools.product((torch.float32, torch.bfloat16), ACTIVATIONS):
            arguments = [t.to(dtype) for t in (x, w, b)]
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                assert _native.threads(1100 * 500) == threads
                out = vf.ops.topk_encode(*arguments, 20, activation=activation, fired=True, dead=dead, k_aux=9)
                results.append([*out, *vf.ops.topk_encode(*arguments, 20, activation=activation, scope="batch")])
            torch.set_num_threads(1)
            for again in results[1:]:
                assert_equal(again, results[0])


@pytest.mark.parametrize("backend", parameters(CPP))
@pytest.mark.parametrize("wrong", ["the bias left out", "no ReLU", "counts of zeros", "the second list of all latents"])
def test_a_wrong_kernel_is_found(backend, wrong, monkeypatch):
    """The checks of this file bite: planted around the real kernel, each of these makes them fail."""
    cpp = ROW.cells["cpp"]

    def kernel(x, w, b, k, k_max, activation, count, dead, k_aux):
        right = cpp.load()["topk_encode"]
        if wrong == "counts of zeros":
            values, indices, _, *aux = right(x, w, b, k, k_max, activation, count, dead, k_aux)
            return values, indices, torch.bincount(indices.flatten(), minlength=len(w)).int(), *aux
        b = None if wrong == "the bias left out" else b
        activation = 1 if wrong == "no ReLU" else activation
        dead = torch.ones_like(dead) if wrong == "the second list of all latents" else dead
        return right(x, w, b, k, k_max, activation, count, dead, k_aux)

    x, w, b = inputs(6, 4, 300, whole=True, bias=-3.0)
    act, dead = own_activations(x, w, b, "relu"), deads(300, 0.1)
    call = lambda: run(backend, x, w, b, 90, fired=True, dead=dead, k_aux=9)  # noqa: E731
    with backend.forced():
        check_row(act, call(), 90, torch.float32, dead, 9)
        planted = _registry.Kernel(lambda: {"topk_encode": kernel}, cpp.devices, cpp.dtypes, cpp.reason)
        monkeypatch.setitem(ROW.cells, "cpp", planted)
        with pytest.raises(AssertionError):
            check_row(act, call(), 90, torch.float32, dead, 9)


GUARDED = """
import itertools, torch
from guarded import guarded, placed
from vaecirc_fast import _native
cpp = _native.cpp()
generator = torch.Generator().manual_seed(0)
for M, dtype, before in itertools.product([*range(1, 40), 255, 300, 513], (torch.float32, torch.bfloat16), (0, 1)):
    R, k, K = 3, min(M, 30), min(M, 30) + 2
    pre = placed(torch.randn(R, M, generator=generator).to(dtype), before)
    bias = placed(torch.randn(M, generator=generator), before)
    dead = placed(torch.arange(0, M, 3, dtype=torch.int32), before)
    for name, relu in itertools.product(cpp.instruction_sets(), (False, True)):
        cpp.set_instruction_set(name)
        values, indices = guarded((R, K), dtype, before), guarded((R, K), torch.int32, before)
        aux_values, aux_indices = guarded((R, 7), dtype, before), guarded((R, 7), torch.int32, before)
        fired = guarded((M,), torch.int32, before).zero_()
        cpp.topk_encode(pre.data_ptr(), _native.DTYPES[dtype], R, M, bias.data_ptr(), relu, k, K, values.data_ptr(),
                        indices.data_ptr(), fired.data_ptr(), dead.data_ptr(), len(dead), 7, aux_values.data_ptr(),
                        aux_indices.data_ptr(), 1)
        assert int(fired.sum()) == int((values > 0).sum()) and bool(aux_values.isfinite().all())
        room, keep = R * M + 64, R * max(1, k // 3)
        found_values, columns = guarded((room,), torch.float32, before), guarded((room,), torch.int32, before)
        counts = guarded((R,), torch.int32, before)
        found = cpp.batch_append(pre.data_ptr(), _native.DTYPES[dtype], R, M, bias.data_ptr(),
                                 cpp.CUT_ZERO if relu else cpp.CUT_ALL, found_values.data_ptr(), columns.data_ptr(), 0,
                                 counts.data_ptr(), 1)
        if found > keep:
            exact_values, exact_columns = placed(found_values[:found], before), placed(columns[:found], before)
            cpp.batch_cut(exact_values.data_ptr(), exact_columns.data_ptr(), found, keep, counts.data_ptr(), R)
        else:
            out = guarded((keep,), torch.float32, before), guarded((keep,), torch.int32, before)
            cpp.batch_fill(found_values.data_ptr(), columns.data_ptr(), counts.data_ptr(), R, M, found, keep,
                           out[0].data_ptr(), out[1].data_ptr())
        assert int(counts.sum()) == keep
print("all within bounds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_beyond_a_tensor_is_touched():
    """Inputs and outputs that end, or begin, at a page nobody may touch."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all within bounds\n"), done.stderr


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(x=(2, 4), w_enc=(9, 4), b_enc=(9,), k=2, dtype=torch.float32, **others):
    """Arguments of which one is wrong; tensors by their shape."""
    tensors = {
        name: torch.zeros(shape, dtype=dtype) if isinstance(shape, tuple) else shape
        for name, shape in (("x", x), ("w_enc", w_enc), ("b_enc", b_enc))
    }
    return tensors | {"k": k} | others


MASK = torch.zeros(9, dtype=torch.bool)
BAD = {
    "no tensor": (bad(x=[1.0]), r"^x: expected a tensor, got list$"),
    "weights no tensor": (bad(w_enc=None), r"^w_enc: expected a tensor, got NoneType$"),
    "bias a number": (bad(b_enc=0.0), r"^b_enc: expected a tensor, got float$"),
    "integers": (bad(dtype=torch.int64), r"^x: expected the floating dtype of x, got torch.int64"),
    "other dtype": (
        bad(w_enc=torch.zeros(9, 4).double()),
        r"^w_enc: expected the floating dtype of x, got torch.float64",
    ),
    "bias of other dtype": (
        bad(b_enc=torch.zeros(9).half()),
        r"^b_enc: expected the floating dtype of x, got torch.fl",
    ),
    "other device": (bad(w_enc=torch.zeros(9, 4, device="meta")), r"^w_enc: expected the device of x, cpu, got meta$"),
    "transposed weights": (bad(w_enc=(4, 9)), r"^w_enc: expected shape \(M, D\) .* got \(4, 9\) .* its view w_enc.T$"),
    "other width": (bad(w_enc=(9, 5)), r"^w_enc: expected shape \(M, D\) for x \(..., D\), got \(9, 5\) for \(2, 4\)$"),
    "weights of one axis": (bad(w_enc=(4,)), r"^w_enc: expected shape"),
    "x of no axis": (bad(x=()), r"^w_enc: expected shape"),
    "no latents": (
        bad(w_enc=(0, 4), b_enc=(0,)),
        r"^w_enc: expected shape \(M, D\) with M > 0 and D > 0, got \(0, 4\)$",
    ),
    "no width": (bad(x=(2, 0), w_enc=(9, 0)), r"^w_enc: expected shape \(M, D\) with M > 0 and D > 0, got \(9, 0\)$"),
    "other bias": (bad(b_enc=(4,)), r"^b_enc: expected shape \(M,\) = \(9,\), got \(4,\)$"),
    "k zero": (bad(k=0), r"^k: expected 1 <= k <= M = 9, got 0$"),
    "k above M": (bad(k=10), r"^k: expected 1 <= k <= M = 9, got 10$"),
    "k a float": (bad(k=2.5), r"^k: expected an integer or an integer tensor, got 2.5$"),
    "k a bool": (bad(k=False), r"^k: expected an integer or an integer tensor, got False$"),
    "tensor k too large": (bad(k=torch.tensor(4), k_max=3), r"^k: expected 1 <= k <= k_max = 3, got a tensor of 4$"),
    "unknown activation": (bad(activation="gelu"), r"^activation: 'gelu' is unknown; known: relu, identity$"),
    "unknown scope": (bad(scope="rows"), r"^scope: expected \"row\" or \"batch\", got 'rows'$"),
    "fired a number": (bad(fired=1), r"^fired: expected True or False, got 1$"),
    "k_aux alone": (bad(k_aux=3), r"^k_aux: needs dead"),
    "dead alone": (bad(dead=MASK), r"^k_aux: expected 1 <= k_aux <= M = 9, got 0$"),
    "k_aux too large": (bad(dead=MASK, k_aux=10), r"^k_aux: expected 1 <= k_aux <= M = 9, got 10$"),
    "k_aux a bool": (bad(dead=MASK, k_aux=True), r"^k_aux: expected an integer, got True$"),
    "dead of numbers": (
        bad(dead=MASK.int(), k_aux=1),
        r"^dead: expected a bool tensor \(M,\) = \(9,\) on cpu, got torch.in",
    ),
    "dead of others": (
        bad(dead=MASK[:4], k_aux=1),
        r"^dead: expected a bool tensor \(M,\) = \(9,\) on cpu, got .*\(4,\)",
    ),
    "dead a list": (bad(dead=[True] * 9, k_aux=1), r"^dead: expected a bool tensor .* got list$"),
    "batch with a tensor": (bad(k=torch.tensor(2), scope="batch"), r'^scope: "batch" takes an integer k, and neither'),
    "batch with k_max": (bad(k_max=3, scope="batch"), r'^scope: "batch" takes'),
    "batch with fired": (bad(fired=True, scope="batch"), r'^scope: "batch" takes'),
    "batch with dead": (bad(dead=MASK, k_aux=1, scope="batch"), r'^scope: "batch" takes'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.topk_encode(**arguments)
    assert "\n" not in str(caught.value)


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation within makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_no_tensor_of_all_activations_is_made(backend):
    """Forward and backward, of rows and of a batch: nothing has the size of rows x latents, nor of entries x width."""
    rows, width, latents, k = 3000, 40, 1500, 20
    x, w, b = (t.requires_grad_() for t in inputs(rows, width, latents))
    for options in ({"fired": True, "dead": deads(latents, 0.5), "k_aux": 10}, {"scope": "batch"}):
        with Largest() as largest:
            values = vf.ops.topk_encode(x, w, b, k, **options)[0]
            values.sum().backward()
        assert rows * k <= largest.elements < min(rows * latents, rows * k * width) / 3
