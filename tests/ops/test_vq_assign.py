"""The op vq_assign on every backend: nearness by exact distances, ties, totals, gradients, extremes, bad input."""

import itertools
import math
import subprocess
import sys

import guarded
import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given, settings
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.reference import vq_assign as reference

ROW = _registry.rows["vq_assign"]
OP = torch.ops.vaecirc_fast.vq_assign.default


def problem(N=9, K=7, D=3, seed=0, dtype=torch.float32, shift=0.0):
    """Rows and codes; `shift` moves all of them, which makes nearness harder to tell."""
    g = torch.Generator().manual_seed(seed)
    z, codebook = (torch.randn(n, D, generator=g, dtype=torch.float64) + shift for n in (N, K))
    return z.to(dtype), codebook.to(dtype)


def lattice(N, K, D, seed=0, dtype=torch.float32):
    """Whole numbers: every score is exact, and many codes are equally near or equal."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (n, D), generator=g).to(dtype) for n in (N, K)]


def exact_distances(z, codebook):
    """(N, K) float64, without the reference: the square of the difference."""
    return (z.double()[:, None] - codebook.double()).square().sum(2)


def check(z, codebook, backend):
    """A code may be chosen if its exact distance is the least one, by the rule of close.py; then all else follows."""
    found = vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device), totals=True)
    indices, z_q, distance, counts, sums = (t.cpu() for t in found)
    distances = exact_distances(z, codebook)
    (N, D), K = z.shape, len(codebook)
    assert indices.dtype == torch.int64 and indices.shape == (N,) and counts.dtype == torch.int64
    assert ((indices >= 0) & (indices < K)).all()
    of = lambda chosen: distances.gather(1, chosen[:, None])[:, 0].to(z.dtype)  # noqa: E731
    # what the scores are made of: |e|^2 and z . e
    size = codebook.double().square().sum(1).max() + 2 * z.double().square().sum(1)
    least = distances.amin(1)
    assert_close(of(indices), of(reference.nearest(z, codebook)), least, terms=D, unit=torch.maximum(size, least))
    assert torch.equal(z_q, codebook[indices])
    truth = (z.double() - z_q.double()).square().sum(1)
    assert_close(distance, (z - z_q).square().sum(1), truth, terms=D)
    expected = torch.zeros(K, dtype=torch.int64)
    truth, unit = torch.zeros(K, D, dtype=torch.float64), torch.zeros(K, D, dtype=torch.float64)
    for n, k in enumerate(indices.tolist()):
        expected[k] += 1
        truth[k] += z[n].double()
        unit[k] += z[n].double().abs()
    assert torch.equal(counts, expected)
    assert_close(sums, reference.totals(z, indices, K)[1], truth, terms=int(counts.max()) if N else 1, unit=unit)


# N, K, D: about tiles of 12, 6 and 4 rows, blocks of 192, panels of 32, 16 and 8 codes, and vectors of channels.
SIZES = [(1, 1, 1), (5, 2, 1), (13, 33, 17), (193, 65, 8), (40, 512, 16), (7, 100, 64), (0, 4, 3)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(backend, sizes):
    check(*problem(*sizes), backend)


@settings(max_examples=12)
@given(st.integers(0, 30), st.integers(1, 70), st.integers(1, 40), st.integers(0, 99), st.sampled_from([0, 3, 100]))
def test_any_problem(backend, N, K, D, seed, shift):
    check(*problem(N, K, D, seed, shift=shift), backend)


def test_float64(backend):
    z, codebook = problem(30, 20, 5, dtype=torch.float64)
    if ROW.why_not(backend.name, backend.device, torch.float64):
        with pytest.raises(BackendError, match="has no kernel for torch.float64"):
            vf.ops.vq_assign(z, codebook)
        return
    check(z, codebook, backend)
    check(*problem(200, 40, 17, dtype=torch.float64, shift=1e4), backend)


def test_ties_go_to_the_lowest_index(backend):
    """Exact scores: the code is the lowest of the nearest, found by a search of its own."""
    for sizes in ((50, 90, 2), (20, 33, 3), (20, 300, 1)):
        z, codebook = lattice(*sizes)
        distances = exact_distances(z, codebook).tolist()
        expected = [row.index(min(row)) for row in distances]
        assert any(row.count(min(row)) > 1 for row in distances)
        assert vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device)).indices.tolist() == expected


def test_equal_codes(backend):
    z, codebook = problem(40, 1, 5)
    found = vf.ops.vq_assign(z.to(backend.device), codebook.expand(70, 5).to(backend.device), totals=True)
    assert not found.indices.any() and found.counts[0] == 40 and not found.counts[1:].any()
    assert not found.sums[1:].any()


def test_a_code_is_nearest_to_itself(backend):
    _, codebook = problem(1, 60, 9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    found = vf.ops.vq_assign(codebook[order].to(backend.device), codebook.to(backend.device), totals=True)
    assert torch.equal(found.indices.cpu(), order) and not found.distance.any()
    assert torch.equal(found.sums.cpu(), codebook) and (found.counts == 1).all()


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradients(backend):
    """Straight-through for z_q; of the distance against the reference, differentiated, in float64."""
    z, codebook = problem(30, 11, 5)
    g = torch.Generator().manual_seed(1)
    of_q, of_distance = torch.randn(30, 5, generator=g), torch.randn(30, generator=g)

    def gradients(z, codebook, call, device="cpu"):
        z, codebook = (t.detach().to(device).requires_grad_() for t in (z, codebook))
        z_q, distance = call(z, codebook)
        total = (z_q * of_q.to(z)).sum() + (distance * of_distance.to(z)).sum()
        return [grad.cpu() for grad in torch.autograd.grad(total, (z, codebook))]

    def plain(z, codebook):
        chosen = codebook[reference.nearest(z, codebook)]
        return z, (z - chosen).square().sum(1)  # z itself: whose gradient is what z_q's must be

    got = gradients(z, codebook, lambda *t: vf.ops.vq_assign(*t)[1:3], backend.device)
    yardsticks, truths = gradients(z, codebook, plain), gradients(z.double(), codebook.double(), plain)
    indices = reference.nearest(z, codebook)
    each = 2 * of_distance.abs().double()[:, None] * (z.double().abs() + codebook.double()[indices].abs())
    units = of_q.abs().double() + each, torch.zeros(11, 5, dtype=torch.float64).index_add(0, indices, each)
    for grad, yardstick, truth, unit in zip(got, yardsticks, truths, units, strict=True):
        assert_gradient_close(grad, yardstick, truth, terms=30, unit=unit)


def test_z_q_passes_its_gradient_unchanged(backend):
    z, codebook = (t.to(backend.device) for t in problem(20, 6, 4))
    z.requires_grad_()
    given = torch.randn(20, 4).to(z)
    (grad,) = torch.autograd.grad(vf.ops.vq_assign(z, codebook).z_q, z, given)
    assert torch.equal(grad, given)
    codebook.requires_grad_()
    out = vf.ops.vq_assign(z, codebook)
    assert torch.autograd.grad(out.z_q.sum(), codebook, retain_graph=True)[0].count_nonzero() == 0
    assert not out.indices.requires_grad


@one_of_each
def test_gradcheck(backend):
    if ROW.why_not(backend.name, backend.device, torch.float64):
        pytest.skip("has no float64")
    z, codebook = (t.requires_grad_() for t in problem(6, 5, 3, dtype=torch.float64))
    distance = lambda *t: vf.ops.vq_assign(*t).distance  # noqa: E731  z_q is straight-through, which differences deny
    assert torch.autograd.gradcheck(distance, (z, codebook))
    assert torch.autograd.gradgradcheck(distance, (z, codebook))


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [2, 20])
def test_a_row_that_is_not_finite_spoils_itself_alone(backend, bad, channels):
    z, codebook = problem(20, 40, channels)
    expected = vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device))
    for channel in {0, channels - 1}:
        spoilt = z.clone()
        spoilt[7, channel] = bad
        found = vf.ops.vq_assign(spoilt.to(backend.device), codebook.to(backend.device))
        rest = torch.arange(20) != 7
        assert found.indices[7] == 0 and not found.distance[7].isfinite()
        assert found.distance[7].isnan() == math.isnan(bad)
        assert all(torch.equal(a.cpu()[rest], b.cpu()[rest]) for a, b in zip(found[:3], expected[:3], strict=True))


def test_a_code_with_nan_is_nearest_to_nothing(backend):
    z, codebook = problem(30, 9, 3)
    codebook[0, 1] = codebook[5, 0] = math.nan
    found = vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device)).indices.cpu()
    sound = [k for k in range(9) if k not in (0, 5)]
    assert torch.equal(found, torch.tensor(sound)[exact_distances(z, codebook[sound]).argmin(1)])
    codebook[:] = math.nan
    assert not vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device)).indices.any()


def test_numbers_whose_squares_overflow(backend):
    z = torch.tensor([[1e25, 1.0], [-1e25, 1.0], [0.5, 0.0]])
    codebook = torch.tensor([[3e25, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = vf.ops.vq_assign(z.to(backend.device), codebook.to(backend.device))
    # |e|^2 of the first code is no float32: it is nearest to nothing
    assert found.indices.tolist() == [2, 1, 1] and found.distance[:2].isposinf().all()


# --- other ways to call it -------------------------------------------------------------------------------------------


@one_of_each
def test_leading_dimensions_and_memory_layout_change_nothing(backend):
    z, codebook = (t.to(backend.device) for t in problem(24, 20, 6))
    expected = vf.ops.vq_assign(z, codebook, totals=True)
    shaped = vf.ops.vq_assign(z.view(2, 3, 4, 6), codebook, totals=True)
    assert shaped.indices.shape == shaped.distance.shape == (2, 3, 4) and shaped.z_q.shape == (2, 3, 4, 6)
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(shaped, expected, strict=True))
    single = vf.ops.vq_assign(z[3], codebook)
    assert single.indices.shape == () and single.z_q.shape == (6,) and single.counts is single.sums is None
    assert single.indices == expected.indices[3]
    for laid_out in (lambda t: t.T.contiguous().T, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        found = vf.ops.vq_assign(laid_out(z), laid_out(codebook), totals=True)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.z_q, expected.z_q)
        assert torch.equal(found.counts, expected.counts)
        if backend.name != "reference":  # torch adds in the order of memory
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_nothing(backend, dtype):
    z, codebook = problem(3000, 130, 20, dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert _native.threads(3000 * 130 * 20 // 16) == threads
        found.append(vf.ops.vq_assign(z, codebook, totals=True))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_rows_do_not_depend_on_their_neighbours(backend):
    z, codebook = problem(400, 50, 7)
    together = vf.ops.vq_assign(z, codebook)
    apart = vf.ops.vq_assign(z[100:111], codebook)
    assert all(torch.equal(a[100:111], b) for a, b in zip(together[:3], apart[:3], strict=True))


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_nothing_beyond_the_arguments_is_touched(backend):
    for sizes, before in itertools.product([(3, 5, 1), (14, 33, 19)], (False, True)):
        z, codebook = problem(*sizes)
        expected = vf.ops.vq_assign(z, codebook, totals=True)
        found = vf.ops.vq_assign(guarded.placed(z, before), guarded.placed(codebook, before), totals=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


GROWTH = """
import resource, torch, vaecirc_fast as vf
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call = lambda rows: vf.ops.vq_assign(torch.randn(rows, 2), torch.randn(2000, 2), totals=True)
call(8)
before = peak()
call(10_000)
print(peak() - before)
"""


@pytest.mark.skipif(not CPP[0].instruction_set, reason="C++ is not built")
def test_no_matrix_of_distances_is_made():
    """One would take 80 MB; rows and results take .5."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 8 << 10


@pytest.mark.parametrize("backend", parameters(CPP[-1:]), indirect=True)  # it is of the registration, not of a kernel
def test_opcheck(backend):
    z, codebook = problem()
    for totals in (False, True):
        torch.library.opcheck(OP, (z, codebook, totals))
        torch.library.opcheck(OP, (z.clone().requires_grad_(), codebook.clone().requires_grad_(), totals))


@one_of_each
def test_compiled(backend):
    z, codebook = (t.to(backend.device) for t in problem())
    compiled = torch.compile(lambda *t: vf.ops.vq_assign(*t, totals=True), fullgraph=True, backend="aot_eager")
    expected = vf.ops.vq_assign(z, codebook, totals=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(z, codebook), expected, strict=True))
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    for call, leaf in ((compiled, x), (vf.ops.vq_assign, y)):
        out = call(leaf, codebook)
        (out.z_q.square().sum() + out.distance.sum()).backward()
    assert torch.equal(x.grad, y.grad)


@one_of_each
def test_vmap(backend):
    z, codebook = (t.to(backend.device) for t in problem())
    several, books = torch.stack([z, z + 1, -z], 2), torch.stack([codebook, -codebook, 2 * codebook])
    for totals in (False, True):
        shared = torch.vmap(lambda x: vf.ops.vq_assign(x, codebook, totals=totals)[:3], in_dims=2)(several)  # noqa: B023
        own = torch.vmap(lambda x, e: vf.ops.vq_assign(x, e, totals=totals)[:3], in_dims=(2, 0))(several, books)  # noqa: B023
        for v in range(3):
            for found, book in ((shared, codebook), (own, books[v])):
                expected = vf.ops.vq_assign(several[:, :, v].contiguous(), book)[:3]
                assert all(torch.equal(a[v], b) for a, b in zip(found, expected, strict=True))
    of = lambda x: (vf.ops.vq_assign(x, codebook).z_q * 3).sum()  # noqa: E731
    assert torch.equal(torch.vmap(torch.func.grad(of), in_dims=2)(several), torch.full((3, 9, 3), 3.0).to(z))


BAD = {
    "z: expected a tensor, got list": lambda z, e: (([1.0], e), {}),
    "codebook: expected a tensor, got NoneType": lambda z, e: ((z, None), {}),
    "z: expected float32 or float64, got torch.bfloat16": lambda z, e: ((z.bfloat16(), e.bfloat16()), {}),
    "codebook: expected float32 or float64, got torch.int64": lambda z, e: ((z, e.long()), {}),
    "codebook: expected the dtype of z, torch.float64": lambda z, e: ((z.double(), e), {}),
    r"codebook: expected shape \(K, D\) with K > 0 and D > 0, got \(3,\)": lambda z, e: ((z, e[0]), {}),
    r"K > 0 and D > 0, got \(0, 3\)": lambda z, e: ((z, e[:0]), {}),
    r"K > 0 and D > 0, got \(7, 0\)": lambda z, e: ((z[:, :0], e[:, :0]), {}),
    r"z: expected shape \(..., 3\), the codebook's D, got \(9, 2\)": lambda z, e: ((z[:, :2], e), {}),
    r"z: expected shape \(..., 3\), the codebook's D, got \(\)": lambda z, e: ((z[0, 0], e), {}),
    "codebook: expected the device of z, cpu, got meta": lambda z, e: ((z, e.to("meta")), {}),
    "totals: expected True or False, got 1": lambda z, e: ((z, e), {"totals": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(message):
    tensors, options = BAD[message](*problem())
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.vq_assign(*tensors, **options)
    assert "\n" not in str(caught.value)
