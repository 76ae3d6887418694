"""The op topk on every backend: the selection to the bit, padding, gradients, transforms, memory and bad input."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import ALL, CPP, one_of_each, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS
from torch._dynamo.testing import CompileCounterWithBackend

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.reference import topk as reference

ROW = _registry.rows["topk"]
OP = torch.ops.vaecirc_fast.topk
OP_BACKWARD = torch.ops.vaecirc_fast.topk_backward
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def runs(backend, dtype):
    """Whether the backend has a kernel for `dtype`; the row says so."""
    return ROW.why_not(backend.name, backend.device, dtype) is None


# --- the truth: a stable sort ----------------------------------------------------------------------------------------


def expected(a, k, size=None, by_value=False):
    """The first k of a stable descending sort of each row of a (B, M), in float64, padded to `size`."""
    number = a.double()
    number = torch.where(number.isnan(), math.inf, number + 0)
    # NaN first, whatever else is infinite: two stable sorts, by value and then by being NaN.
    order = torch.sort(number, dim=1, descending=True, stable=True).indices
    order = order.gather(1, torch.sort((~a.isnan()).byte().gather(1, order), dim=1, stable=True).indices)[:, :k]
    order = order if by_value else order.sort(1).values
    padding = (size or k) - k
    values = torch.nn.functional.pad(a.gather(1, order), (0, padding))
    return values, torch.nn.functional.pad(order, (0, padding)).int()


def assert_same(got, truth):
    """Equal to the bit; one NaN is as good as another."""
    for tensor, right in zip(got, truth, strict=True):
        assert tensor.shape == right.shape and tensor.dtype == right.dtype
        if right.dtype.is_floating_point:
            nan = right.isnan()
            assert torch.equal(tensor.isnan(), nan)
            tensor, right = (x.masked_fill(nan, 0).view(BITS[x.dtype]) for x in (tensor, right))
        assert torch.equal(tensor, right), f"{int((tensor != right).sum())} of {right.numel()} entries"


def run(a, k, backend, **options):
    """The op on the backend's device, results on the CPU."""
    k = k.to(backend.device) if isinstance(k, torch.Tensor) else k
    return [out.cpu() for out in vf.ops.topk(a.to(backend.device), k, **options)]


def check(a, k, backend):
    for by_value in (False, True):
        assert_same(run(a, k, backend, sorted=by_value), expected(a, k, by_value=by_value))


# --- rows that are hard ----------------------------------------------------------------------------------------------

INF, NAN, TINY = math.inf, math.nan, 1e-45


def rows(kind, count, M, seed=0):
    """Rows (count, M) of float32: normal numbers, ties of every kind, few positives, NaN, infinities, zeros."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, M, generator=generator)
    chance = torch.rand(count, M, generator=generator)
    match kind:
        case "ties":
            return a.mul(2).round().div(2)
        case "few positives":
            return torch.where(chance < 12 / M, a.abs(), 0.0)
        case "no positives":
            return -a.relu()
        case "all equal":
            return a[:, :1].expand(count, M).contiguous()
        case "zeros of both signs":
            return torch.where(chance < 0.5, 0.0, -0.0)
        case "NaN":
            return torch.where(chance < 0.1, NAN, torch.where(chance > 0.9, -NAN, a))
        case "infinities":
            return torch.where(chance < 0.05, INF, torch.where(chance > 0.4, -INF, torch.where(chance > 0.35, NAN, a)))
        case "only NaN and -infinity":
            return torch.where(chance < 0.02, NAN, -INF)
        case "denormal":
            return torch.where(chance < 0.5, a.sign() * TINY, a * 1e-40)
        case "wide":
            return a * torch.exp(85 * torch.randn(count, M, generator=generator)).clamp(max=1e30)
        case "ascending":
            return a.sort(1).values
        case "descending":
            return a.sort(1, descending=True).values
        case "in every group":  # the large elements share the strided groups whose maxima bound the row
            return torch.where(torch.arange(M) % 128 < 2, a + 100, a)
        case "blocks of ties":
            return torch.where(torch.arange(M) % 128 < 40, 1.0, 0.0).expand(count, M).contiguous()
    return a


KINDS = ("normal", "ties", "few positives", "no positives", "all equal", "zeros of both signs", "NaN", "infinities")
KINDS += ("only NaN and -infinity", "denormal", "wide", "ascending", "descending", "in every group", "blocks of ties")

# M and k around the kernels' limits: registers of 4, 8 and 16, groups of 32 times a power of two, runs of 64.
SIZES = [(1, 1), (2, 1), (3, 3), (15, 4), (16, 16), (17, 5), (33, 32), (64, 1), (70, 28), (127, 50), (128, 56)]
SIZES += [(256, 57), (257, 112), (300, 150), (500, 50), (511, 113), (512, 32), (513, 500), (1000, 65), (4100, 300)]


@pytest.mark.parametrize("kind", KINDS)
def test_values(backend, kind):
    sizes = SIZES[2:14:3] if backend.interpreted else SIZES
    for M, k in sizes:
        check(rows(kind, 3, M), k, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_in_other_dtypes(backend, dtype):
    if not runs(backend, dtype):
        with pytest.raises(BackendError, match=f"has no kernel for {dtype}"):
            run(torch.ones(2, 3, dtype=dtype), 1, backend)
        return
    for kind, (M, k) in itertools.product(KINDS, SIZES[5:14:4] if backend.interpreted else SIZES[3::4]):
        check(rows(kind, 3, M).to(dtype), k, backend)


@st.composite
def problem(draw):
    """A row or two of any floats, or of few different ones, and k."""
    M = draw(st.integers(1, 300))
    some = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, TINY, -TINY, 3.4e38])
    any_float = st.floats(width=32)
    values = draw(
        st.lists(draw(st.sampled_from([some, any_float, st.one_of(some, any_float)])), min_size=M, max_size=M)
    )
    a = torch.tensor(values).repeat(draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    return a, draw(st.integers(1, a.shape[1]))


@settings(max_examples=60)
@given(problem=problem())
def test_any_row(backend, problem):
    check(*problem, backend)


@pytest.mark.deep
@pytest.mark.parametrize("backend", parameters(CPP))
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_rows(backend, kind):
    """Over all kinds and sizes: a million rows."""
    each = 1_000_000 // (len(KINDS) * 40)
    with backend.forced():
        generator = torch.Generator().manual_seed(KINDS.index(kind))
        for seed in range(40):
            M = int(torch.randint(1, 700, (), generator=generator))
            k = int(torch.randint(1, min(M, 150) + 1, (), generator=generator))
            dtype = (torch.float32, torch.bfloat16)[seed % 2]
            a = rows(kind, each, M, seed).to(dtype)
            assert_same(vf.ops.topk(a, k, sorted=seed % 3 == 0), expected(a, k, by_value=seed % 3 == 0))


@pytest.mark.parametrize("by_value", [False, True])
def test_the_reference_is_the_definition(by_value):
    """In words: among two elements the larger goes first, NaN being larger than all; of equal ones the earlier."""
    for kind in KINDS:
        a = rows(kind, 2, 37)
        for row in a.tolist():
            order = sorted(range(37), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))  # noqa: B023
            order = order[:9] if by_value else sorted(order[:9])
            values, indices = reference.forward(torch.tensor([row]), None, 9, by_value)
            assert indices.tolist() == [order]
            assert_same((values,), (torch.tensor([row])[:, order],))


# --- shapes, padding -------------------------------------------------------------------------------------------------


@one_of_each
def test_leading_dimensions(backend):
    a = rows("ties", 24, 40)
    flat = run(a, 7, backend)
    for shape in ((24,), (2, 12), (4, 3, 2)):
        assert_same(run(a.view(*shape, 40), 7, backend), [x.view(*shape, 7) for x in flat])
    assert_same(run(a[0], 7, backend), [x[0] for x in flat])
    for shape in ((0,), (3, 0), (0, 2)):
        values, indices = run(torch.empty(*shape, 40), 7, backend)
        assert values.shape == indices.shape == (*shape, 7) and indices.dtype == torch.int32


def test_memory_layout_changes_nothing(backend):
    a = rows("normal", 6, 260)
    layouts = {
        "wider rows": torch.cat([a, a + 9], 1)[:, :260],
        "offset": torch.cat([a[:1], a])[1:],
        "transposed": a.T.contiguous().T,
        "every other": a.repeat_interleave(2, 1)[:, ::2],
        "reversed rows": a.flip(0).flip(0),
        "expanded": a[:1].expand(6, 260),
        "one value": a[:1, :1].expand(6, 260),
    }
    for laid_out in layouts.values():
        check(laid_out, 33, backend)


def test_k_as_a_tensor_is_padded(backend):
    a = rows("ties", 3, 300)
    a[1] = rows("NaN", 1, 300)
    for k, k_max in ((1, 1), (1, 40), (13, 40), (40, 40), (64, 65)):
        for by_value, dtype in ((False, torch.int32), (True, torch.int64)):
            truth = expected(a, k, k_max, by_value)
            for count in (torch.tensor(k, dtype=dtype), torch.tensor([k], dtype=dtype), k):
                assert_same(run(a, count, backend, k_max=k_max, sorted=by_value), truth)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(backend, dtype):
    """Each entry's gradient lies where it came from, to the bit; everything else, and padding, is zero."""
    if not runs(backend, dtype):
        return
    for (M, k), kind in itertools.product([(1, 1), (40, 7), (300, 50)], ("normal", "few positives", "NaN")):
        a = rows(kind, 3, M).to(backend.device, dtype).requires_grad_()
        for count, k_max in ((k, None), (torch.tensor(k, device=backend.device), min(M, k + 3))):
            values, indices = vf.ops.topk(a, count, k_max=k_max)
            assert values.requires_grad and not indices.requires_grad
            weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
            weight[:, k:] = NAN  # of padding: must not be seen
            (grad,) = torch.autograd.grad(values, a, weight)
            truth = torch.zeros(3, M, dtype=dtype)
            truth.scatter_(1, indices.cpu()[:, :k].long(), weight.cpu()[:, :k])
            assert_same((grad.cpu(),), (truth,))


def test_gradcheck(backend):
    if not runs(backend, torch.float64):
        return
    a = rows("normal", 2, 9).to(backend.device, torch.float64).requires_grad_()
    for k in (4, torch.tensor(3, device=backend.device)):
        op = lambda a, k=k: vf.ops.topk(a, k, k_max=4, sorted=True)[0]  # noqa: E731
        assert torch.autograd.gradcheck(op, a)
        assert torch.autograd.gradgradcheck(op, a)


@one_of_each
def test_a_gradient_of_nothing(backend):
    a = torch.zeros(0, 5, device=backend.device, requires_grad=True)
    vf.ops.topk(a, 2)[0].sum().backward()
    assert a.grad is not None and a.grad.shape == (0, 5)
    with torch.no_grad():
        assert not vf.ops.topk(a, 2)[0].requires_grad


def test_a_gradient_runs_where_its_forward_was_forced_to(monkeypatch):
    called = []
    cpp = ROW.cells["cpp"]

    def load():
        return {name: lambda *a, name=name: called.append(name) or cpp.load()[name](*a) for name in cpp.load()}

    monkeypatch.setitem(ROW.cells, "cpp", _registry.Kernel(load, cpp.devices, cpp.dtypes, cpp.reason))
    a = rows("normal", 2, 9).requires_grad_()
    with vf.backend("reference"):
        values, _ = vf.ops.topk(a, 3)
    values.sum().backward()
    assert called == []
    vf.ops.topk(a, 3)[0].sum().backward()
    assert called == ["topk", "topk_backward"]


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(backend, dim):
    a = rows("ties", 12, 40).view(3, 4, 40)
    flat = run(a, 5, backend)
    values, indices = torch.vmap(lambda a: vf.ops.topk(a, 5), dim)(a.movedim(0, dim).to(backend.device))
    assert_same((values.cpu(), indices.cpu()), flat)
    twice = torch.vmap(torch.vmap(lambda a: vf.ops.topk(a, 5)))(a.to(backend.device))
    assert_same([x.cpu() for x in twice], flat)
    weight = torch.arange(1.0, 6.0, device=backend.device)
    gradient = torch.func.grad(lambda a: (vf.ops.topk(a, 5)[0] * weight).sum())
    got = torch.vmap(gradient, dim)(a.movedim(0, dim).to(backend.device))
    truth = torch.zeros(3, 4, 40).scatter(2, flat[1].long(), torch.arange(1.0, 6.0).expand(3, 4, 5))
    assert_same((got.cpu(),), (truth,))
    jacobian = torch.func.jacrev(lambda a: vf.ops.topk(a, 5)[0])(a[0, 0].to(backend.device))
    assert_same((jacobian.cpu(),), (torch.eye(40)[flat[1][0, 0].long()],))


def test_vmap_over_k_is_an_error():
    with pytest.raises(InputError, match="^k: must be the same for the whole batch"):
        torch.vmap(lambda a, k: vf.ops.topk(a, k, k_max=3))(torch.zeros(2, 4), torch.tensor([1, 2]))


@one_of_each
@pytest.mark.parametrize("k", [None, 3])
def test_the_registered_ops_pass_opcheck(backend, k):
    a = rows("normal", 4, 30).to(backend.device).requires_grad_()
    k = k and torch.tensor(k, device=backend.device)
    torch.library.opcheck(OP.default, (a, k, 5, True))
    indices = OP(a, k, 5, False)[1]
    torch.library.opcheck(OP_BACKWARD.default, (torch.randn(4, 5).to(a).requires_grad_(), indices, k, 30))


@one_of_each
def test_the_registered_op_is_the_op(backend):
    a = rows("ties", 6, 50).to(backend.device).requires_grad_()
    values, indices = OP(a, None, 9, False)
    assert_same((values.detach().cpu(), indices.cpu()), expected(a.detach().cpu(), 9))
    (grad,) = torch.autograd.grad(values.sum(), a, create_graph=True)
    assert_same((grad.detach().cpu(),), (torch.zeros(6, 50).scatter(1, indices.cpu().long(), 1.0),))
    batched = torch.vmap(lambda a: OP(a, None, 9, False))(a.detach().view(2, 3, 50))
    assert_same([x.flatten(0, 1) for x in batched], (values.detach(), indices))


def check_compiled(backend, compiler):
    """20 values of k, forward and backward, and one compilation of each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda a, k: vf.ops.topk(a * 1, k, k_max=20), fullgraph=True, backend=counter)
    a = rows("ties", 3, 300)
    for k in range(1, 21):
        on_device = a.to(backend.device).requires_grad_()
        values, indices = compiled(on_device, torch.tensor(k, device=backend.device))
        truth = expected(a, k, 20)
        assert_same((values.detach().cpu(), indices.cpu()), truth)
        (grad,) = torch.autograd.grad(values.sum(), on_device)
        assert_same((grad.cpu(),), (torch.zeros(3, 300).scatter(1, truth[1][:, :k].long(), 1.0),))
    assert counter.frame_count == 1


@one_of_each
def test_compiled_once_for_every_k(backend):
    check_compiled(backend, "aot_eager")


@pytest.mark.deep
@one_of_each
def test_compiled_by_inductor(backend):
    check_compiled(backend, "inductor")


@one_of_each
def test_a_trace_holds_the_registered_op(backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(a, k):
        a = a.detach().requires_grad_()
        return torch.autograd.grad(vf.ops.topk(a, k, k_max=5)[0].sum(), a)[0]

    inputs = rows("normal", 2, 9).to(backend.device), torch.tensor(4, device=backend.device)
    graph = make_fx(gradient)(*inputs)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "vaecirc_fast.topk.default" in targets and "vaecirc_fast.topk_backward.default" in targets
    others = rows("normal", 2, 9, seed=1).to(backend.device), torch.tensor(2, device=backend.device)
    assert torch.equal(graph(*others), gradient(*others))


# --- memory, threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", parameters(CPP))
@pytest.mark.parametrize("wrong", ["ties to the highest index", "NaN last", "one entry not written", "-0.0 below 0.0"])
def test_a_wrong_kernel_is_found(backend, wrong, monkeypatch):
    """The checks of this file bite: planted in place of the kernel, each of these makes them fail."""
    cpp = ROW.cells["cpp"]

    def kernel(a, k, k_max, by_value):
        match wrong:
            case "ties to the highest index":
                values, indices = reference.forward(a.flip(1), k, k_max, by_value)
                return values, (a.shape[1] - 1 - indices).int()
            case "NaN last":
                return reference.forward(a.nan_to_num(-INF, INF, -INF), k, k_max, by_value)
            case "-0.0 below 0.0":
                lowered = torch.where((a == 0) & a.signbit(), -TINY, a)
                return reference.forward(lowered, k, k_max, by_value)
        values, indices = reference.forward(a, k, k_max, by_value)
        out = torch.empty_like(values)
        out.view(-1)[:-1] = values.view(-1)[:-1]
        return out, indices

    kind = {"NaN last": "NaN", "-0.0 below 0.0": "zeros of both signs"}.get(wrong, "ties")
    with backend.forced():
        check(rows(kind, 4, 300), 20, backend)
        monkeypatch.setitem(
            ROW.cells, "cpp", _registry.Kernel(lambda: {"topk": kernel}, cpp.devices, cpp.dtypes, cpp.reason)
        )
        with pytest.raises(AssertionError):
            check(rows(kind, 4, 300), 20, backend)


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_change_no_bit(backend):
    with backend.forced():
        for dtype in (torch.float32, torch.bfloat16):
            a = rows("ties", 301, 1000).to(dtype).requires_grad_()
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                assert _native.threads(a.numel()) == threads
                values, indices = vf.ops.topk(a, 50, sorted=True)
                results.append([values.detach(), indices, *torch.autograd.grad(values.square().sum(), a)])
            torch.set_num_threads(1)
            for again in results[1:]:
                assert_same(again, results[0])


GUARDED = """
import itertools, torch
from guarded import guarded, placed
from vaecirc_fast import _native
cpp = _native.cpp()
generator = torch.Generator().manual_seed(0)
sizes = [*range(1, 70), 255, 256, 257, 500, 513]
for M, dtype, before in itertools.product(sizes, (torch.float32, torch.bfloat16), (0, 1)):
    a = placed(torch.randn(2, M, generator=generator).to(dtype), before)
    if M % 3 == 0:
        a.clamp_(max=0)
    for name, k, K in itertools.product(cpp.instruction_sets(), {1, min(M, 40), M}, (0, 3)):
        cpp.set_instruction_set(name)
        K += k
        values, indices = guarded((2, K), dtype, before), guarded((2, K), torch.int32, before)
        cpp.topk(a.data_ptr(), _native.DTYPES[dtype], 2, M, M, k, K, True, values.data_ptr(), indices.data_ptr(), 1)
        out = guarded((2, M), dtype, before)
        cpp.topk_backward(values.data_ptr(), indices.data_ptr(), a.element_size(), 2, M, k, K, out.data_ptr(), 1)
        assert torch.equal(out.count_nonzero(1), values.count_nonzero(1))
print("all within bounds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_beyond_a_tensor_is_touched():
    """Inputs and outputs that end, or begin, at a page nobody may touch."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all within bounds\n"), done.stderr


@pytest.mark.deep
@pytest.mark.parametrize("backend", parameters([b for b in ALL if b.name == "cpp" or b.device == "cuda"]))
def test_offsets_beyond_32_bits(backend):
    """More than 2^31 elements: the last row is not the first."""
    if backend.name == "reference":
        pytest.skip("takes too much memory")
    with open("/proc/meminfo") as file:
        available = int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024
    if backend.device == "cpu" and available < 11 * 2**30:
        pytest.skip("not enough memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    M, count = 1 << 20, (1 << 11) + 1
    a = torch.zeros(count, M, dtype=torch.bfloat16, device=backend.device)
    a[-1, -3], a[-1, 5] = 2.0, 1.0
    with backend.forced():
        values, indices = vf.ops.topk(a.requires_grad_(), 3, sorted=True)
        assert indices[-1].tolist() == [M - 3, 5, 0] and indices[:-1].cpu().unique().tolist() == [0, 1, 2]
        (grad,) = torch.autograd.grad(values[-1, 0], a)
    assert float(grad[-1, -3]) == 1 and int(grad.count_nonzero()) == 1


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(a=(2, 4), k=2, dtype=torch.float32, **others):
    """Arguments of which one is wrong; the tensor by its shape."""
    return {"a": torch.zeros(a, dtype=dtype) if isinstance(a, tuple) else a, "k": k} | others


BAD = {
    "no tensor": (bad([1.0]), r"^a: expected a tensor, got list$"),
    "integers": (bad(dtype=torch.int64), r"^a: expected a floating dtype, got torch.int64$"),
    "complex": (bad(dtype=torch.complex64), r"^a: expected a floating dtype"),
    "no axis": (bad(()), r"^a: expected shape \(..., M\) with M > 0, got \(\)$"),
    "empty rows": (bad((2, 0), 1), r"^a: expected shape \(..., M\) with M > 0, got \(2, 0\)$"),
    "k zero": (bad(k=0), r"^k: expected 1 <= k <= M = 4, got 0$"),
    "k negative": (bad(k=-1), r"^k: expected 1 <= k <= M = 4, got -1$"),
    "k above M": (bad(k=5), r"^k: expected 1 <= k <= M = 4, got 5$"),
    "k a float": (bad(k=2.0), r"^k: expected an integer or an integer tensor, got 2.0$"),
    "k a bool": (bad(k=True), r"^k: expected an integer or an integer tensor, got True$"),
    "k None": (bad(k=None), r"^k: expected an integer or an integer tensor, got None$"),
    "k above k_max": (bad(k=3, k_max=2), r"^k: expected 1 <= k <= k_max = 2, got 3$"),
    "k_max above M": (bad(k_max=5), r"^k_max: expected 1 <= k_max <= M = 4, got 5$"),
    "k_max a bool": (bad(k_max=True), r"^k_max: expected an integer, got True$"),
    "k_max a float": (bad(k_max=3.0), r"^k_max: expected an integer, got 3.0$"),
    "tensor without k_max": (bad(k=torch.tensor(2)), r"^k: a tensor needs k_max"),
    "float tensor": (bad(k=torch.tensor(2.0), k_max=3), r"^k: expected an integer tensor of one element, got torch.fl"),
    "bool tensor": (bad(k=torch.tensor(True), k_max=3), r"^k: expected an integer tensor of one element, got torch.b"),
    "two k": (bad(k=torch.tensor([1, 2]), k_max=3), r"^k: expected an integer tensor of one element, .* \(2,\)$"),
    "k elsewhere": (
        bad(k=torch.tensor(2, device="meta"), k_max=3),
        r"^k: expected a tensor on the device .* got meta$",
    ),
    "tensor k zero": (bad(k=torch.tensor(0), k_max=3), r"^k: expected 1 <= k <= k_max = 3, got a tensor of 0$"),
    "tensor k too large": (bad(k=torch.tensor(4), k_max=3), r"^k: expected 1 <= k <= k_max = 3, got a tensor of 4$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    for backend in ("auto", "reference"):
        with vf.backend(backend), pytest.raises(InputError, match=message) as caught:
            vf.ops.topk(**arguments)
        assert "\n" not in str(caught.value)
