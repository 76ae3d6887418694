"""The op tc_logsumexp on every backend: values, gradients, weights by enumeration, extremes, bad input."""

import itertools
import math

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given, settings
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops.tc_logsumexp import _log_weights
from vaecirc_fast.reference import tc_logsumexp as reference

ROW = _registry.rows["tc_logsumexp"]
OP = torch.ops.vaecirc_fast.tc_logsumexp.default
OP_BACKWARD = torch.ops.vaecirc_fast.tc_logsumexp_backward.default
N = 1000


def problem(B=5, M=7, L=3, seed=0, dtype=torch.float32, spread=1.0):
    """Codes, means and log variances; `spread` of the means and of the log variances."""
    g = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(M, L, generator=g) * spread, torch.randn(M, L, generator=g) * spread - 1
    z = mu[torch.arange(B) % M] + torch.randn(B, L, generator=g)
    return [t.to(dtype) for t in (z, mu, logvar)]


def sizes_of(tensors, weights):
    """In float64: how large the numbers are whose rounding a log density carries, of all latents and of each."""
    z, mu, logvar = (t.double() for t in tensors)
    u, _ = reference.standardised(z, mu, logvar)
    size = u.square() + logvar.abs() / 2 + 1
    return size.sum(2) + abs(weights[1]), size + abs(weights[1])


def shares_of(tensors, weights):
    """In float64: what each posterior's density has of a code's sum, of all latents (B, M) and of each (B, M, L)."""
    z, mu, logvar = (t.double() for t in tensors)
    together, each = reference.weighted_densities(reference.standardised(z, mu, logvar)[0], logvar, *weights)
    return together.softmax(1), each.softmax(1)


def check(tensors, backend, kind="mws", dataset=N):
    """The op against the reference by the rule of close.py."""
    weights = _log_weights(kind, len(tensors[0]), len(tensors[1]), dataset)
    out = vf.ops.tc_logsumexp(*(t.to(backend.device) for t in tensors), kind=kind, dataset_size=dataset)
    truths = reference.forward(*(t.double() for t in tensors), *weights)
    yardsticks = reference.forward(*tensors, *weights)
    for got, yardstick, truth, share, size in zip(
        out, yardsticks, truths, shares_of(tensors, weights), sizes_of(tensors, weights), strict=True
    ):
        unit = torch.maximum((share * size).sum(1), truth.abs())
        assert_close(got.cpu(), yardstick, truth, terms=len(tensors[1]) + tensors[0].shape[1], unit=unit)


def upstream(tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    B, L = tensors[0].shape
    return torch.randn(B, generator=g), torch.randn(B, L, generator=g)


def gradients(function, tensors, device="cpu", dtype=None):
    """Gradients of the results weighted by `upstream`, on the CPU."""
    inputs = [t.detach().to(device, dtype).requires_grad_() for t in tensors]
    total = sum((out * w.to(out)).sum() for out, w in zip(function(*inputs), upstream(tensors), strict=True))
    return [grad.cpu() for grad in torch.autograd.grad(total, inputs)]


def gradient_units(tensors, weights):
    """What one rounding of every number on the way changes in the gradients of z, mu and logvar."""
    z, mu, logvar = (t.double() for t in tensors)
    u, scale = reference.standardised(z, mu, logvar)
    of_joint, of_each = (
        w.double().abs()[:, None] * share * (1 + size)
        for w, share, size in zip(
            upstream(tensors), shares_of(tensors, weights), sizes_of(tensors, weights), strict=True
        )
    )
    p = of_joint[:, :, None] + of_each
    towards = p * u.abs() * scale
    return towards.sum(1), towards.sum(0), (p * (u.square() + 1)).sum(0)


def check_gradients(tensors, backend, kind="mws", dataset=N):
    weights = _log_weights(kind, len(tensors[0]), len(tensors[1]), dataset)
    op = lambda *t: vf.ops.tc_logsumexp(*t, kind=kind, dataset_size=dataset)  # noqa: E731
    plain = lambda *t: reference.forward(*t, *weights)  # noqa: E731
    got = gradients(op, tensors, backend.device)
    truths, yardsticks = gradients(plain, tensors, dtype=torch.float64), gradients(plain, tensors)
    terms = max(len(tensors[0]), len(tensors[1])) + tensors[0].shape[1]
    for grad, yardstick, truth, unit in zip(got, yardsticks, truths, gradient_units(tensors, weights), strict=True):
        assert_gradient_close(grad, yardstick, truth, terms=terms, unit=torch.maximum(unit, truth.abs()))


# B, M, L: of the C++ kernel's 4 codes at once and tiles of 128 (gradient) and 512 posteriors (half of that in float64).
SIZES = [(1, 1, 1), (1, 17, 3), (5, 7, 2), (4, 130, 1), (9, 64, 20), (3, 600, 2), (30, 11, 3)]


def smaller(sizes, backend):
    """For the interpreter, whose blocks are of 32 posteriors."""
    return (sizes[0], min(sizes[1], 40), sizes[2]) if backend.interpreted else sizes


def kinds(B, M):
    return ("mws", "mss") if B <= M and M > 1 else ("mws",)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(backend, sizes):
    sizes = smaller(sizes, backend)
    for kind in kinds(*sizes[:2]):
        check(problem(*sizes), backend, kind)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(backend, sizes):
    sizes = smaller(sizes, backend)
    for kind in kinds(*sizes[:2]):
        check_gradients(problem(*sizes), backend, kind)


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 18), st.floats(0, 3), st.integers(0, 99))
def test_any_problem(backend, B, more, L, spread, seed):
    tensors = problem(B, B + more, L, seed, spread=spread)
    kind = kinds(B, B + more)[seed % 2 - 1]
    check(tensors, backend, kind, B + more + seed)
    if not backend.interpreted or seed % 4 == 0:
        check_gradients(tensors, backend, kind, B + more + seed)


def test_float64(backend):
    tensors = problem(dtype=torch.float64)
    if ROW.why_not(backend.name, backend.device, torch.float64):
        with pytest.raises(BackendError, match="has no kernel for torch.float64"):
            vf.ops.tc_logsumexp(*tensors, dataset_size=N)
        return
    for sizes in ((5, 7, 3), (6, 300, 2)):
        for kind in ("mws", "mss"):
            check(problem(*sizes, dtype=torch.float64), backend, kind)
            check_gradients(problem(*sizes, dtype=torch.float64), backend, kind)


@one_of_each
def test_gradcheck(backend):
    if ROW.why_not(backend.name, backend.device, torch.float64):
        pytest.skip("has no float64")
    tensors = [t.requires_grad_() for t in problem(4, 6, 3, dtype=torch.float64)]
    for kind in ("mws", "mss"):
        assert torch.autograd.gradcheck(lambda *t: vf.ops.tc_logsumexp(*t, kind=kind, dataset_size=9), tensors)  # noqa: B023


# --- the definition, apart from the reference ------------------------------------------------------------------------


def density(z, mu, logvar):
    """Of one code under one posterior, all latents."""
    return math.prod(
        math.exp(-((x - m) ** 2) / (2 * math.exp(v))) / math.sqrt(2 * math.pi * math.exp(v))
        for x, m, v in zip(z.tolist(), mu.tolist(), logvar.tolist(), strict=True)
    )


def test_the_definition(backend):
    """Sums of densities by loops, of a published formula and of weights counted out."""
    z, mu, logvar = (t.double() for t in problem(3, 4, 2))
    weight = {"mws": lambda b, m: 1 / (N * 4), "mss": lambda b, m: 1 / N if b == m else (N - 1) / N / 3}
    for kind, w in weight.items():
        joint, marginals = vf.ops.tc_logsumexp(
            *(t.to(backend.device) for t in problem(3, 4, 2)), kind=kind, dataset_size=N
        )
        sums = [sum(w(b, m) * density(z[b], mu[m], logvar[m]) for m in range(4)) for b in range(3)]
        truth = torch.tensor(sums, dtype=torch.float64).log()
        assert_close(joint.cpu(), truth.float(), truth, terms=6, unit=truth.abs() + math.log(N) + 5)
        for l in range(2):
            at = slice(l, l + 1)
            sums = [sum(w(b, m) * density(z[b, at], mu[m, at], logvar[m, at]) for m in range(4)) for b in range(3)]
            truth = torch.tensor(sums, dtype=torch.float64).log()
            assert_close(marginals[:, l].cpu(), truth.float(), truth, terms=6, unit=truth.abs() + math.log(N) + 5)


def published_weights(B, dataset):
    """The matrix that is widely copied: meant for the diagonal and its neighbour, it fills columns 0 and 1."""
    w = torch.full((B, B), 1 / (B - 1), dtype=torch.float64)
    w[:, 0], w[:, 1] = 1 / dataset, (dataset - B + 1) / (dataset * (B - 1))
    w[B - 2, 0] = w[0, 1]
    return w


def chen_weights(B, dataset):
    """Appendix C.2 of Chen et al.: 1 / N for the code's own, one other has what is left, the rest 1 / (B - 1)."""
    w = torch.full((B, B), 1 / (B - 1), dtype=torch.float64)
    for b in range(B):
        w[b, b], w[b, (b + 1) % B] = 1 / dataset, (dataset - B + 1) / (dataset * (B - 1))
    return w


@pytest.mark.parametrize("dataset, B", [(5, 2), (5, 3), (6, 4), (4, 4)])
def test_stratified_weights_are_unbiased_and_the_published_ones_are_not(dataset, B):
    """All minibatches of a tiny data set, in all orders: the mean of the estimate of q(z) for a z of each sample."""
    z, mu, logvar = problem(dataset, dataset, 2, dtype=torch.float64)
    each = torch.exp(reference.weighted_densities(reference.standardised(z, mu, logvar)[0], logvar, 0.0, 0.0)[0])
    q = each.mean(1)  # of the z of every sample, under all posteriors
    found = {"ours": [], "appendix": [], "published": []}
    for b, n in itertools.product(range(B), range(dataset)):  # z of sample n stands in row b
        batches = [batch for batch in itertools.permutations(range(dataset), B) if batch[b] == n]
        means = {name: [] for name in found}
        for batch in map(list, batches):
            joint, marginals = vf.ops.tc_logsumexp(z[batch], mu[batch], logvar[batch], kind="mss", dataset_size=dataset)
            means["ours"].append(torch.cat([joint[b, None], marginals[b]]).exp())
            for name, w in (("appendix", chen_weights), ("published", published_weights)):
                means[name].append((w(B, dataset)[b] * each[n, batch]).sum())
        for name, values in means.items():
            found[name].append(torch.stack(values))
        of_latents = torch.stack(
            [
                torch.exp(reference.forward(z[n : n + 1, at], mu[:, at], logvar[:, at], 0.0, 0.0)[0][0]) / dataset
                for at in (slice(0, 1), slice(1, 2))
            ]
        )
        truth = torch.cat([q[n : n + 1], of_latents])
        assert_close(found["ours"][-1].mean(0), truth, truth, terms=len(batches) * B)
        assert_close(found["appendix"][-1].mean(), q[n], q[n], terms=len(batches) * B)
        # given the set of the others, ours is the mean of the appendix' over their orders: it varies less
        assert float(found["ours"][-1][:, 0].var()) <= float(found["appendix"][-1].var()) + 1e-15
    if B < dataset:
        off = [abs(float(values.mean() / q[k % dataset]) - 1) for k, values in enumerate(found["published"])]
        assert max(off) > 0.25


def test_the_whole_data_set_is_exact():
    """M = N: log q(z) itself, for any number of codes, drawn from whatever."""
    z, mu, logvar = problem(20, 6, 2, dtype=torch.float64)
    joint, marginals = vf.ops.tc_logsumexp(z, mu, logvar, kind="mss", dataset_size=6)
    for b in range(20):
        truth = torch.tensor(sum(density(z[b], mu[m], logvar[m]) for m in range(6)) / 6, dtype=torch.float64).log()
        assert_close(joint[b], truth, truth, terms=8, unit=truth.abs() + 10)
    mws = vf.ops.tc_logsumexp(z, mu, logvar, kind="mws", dataset_size=6)
    assert_close(mws[0], joint - math.log(6), joint - math.log(6), terms=8, unit=joint.abs() + 10)
    assert_close(mws[1], marginals - math.log(6), marginals - math.log(6), terms=8, unit=marginals.abs() + 10)


@pytest.mark.parametrize("kind", ["mws", "mss"])
def test_equal_posteriors(backend, kind):
    """Of equal posteriors the estimate is their density times the sum of the weights: 1 / N, and 1."""
    z, mu, logvar = problem(5, 1, 3)
    tensors = [t.to(backend.device) for t in (z, mu.expand(6, 3), logvar.expand(6, 3))]
    joint, marginals = vf.ops.tc_logsumexp(*tensors, kind=kind, dataset_size=N)
    log_sum = -math.log(N) if kind == "mws" else 0.0
    each = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp()).log_prob(z.double())
    for got, truth in ((joint, each.sum(1) + log_sum), (marginals, each + log_sum)):
        assert_close(got.cpu(), truth.float(), truth, terms=9, unit=truth.abs() + 15)


# --- extremes --------------------------------------------------------------------------------------------------------


def test_extreme_widths(backend):
    """Posteriors of no width and of any: a code on a mean of no width, far off it, and under a flat one."""
    z = torch.tensor([[0.0], [1.0], [-1e30]])
    for width in (-1e3, -200.0, -80.0, 80.0, 1e3, 1e30):
        mu, logvar = torch.tensor([[0.0], [3.0], [-2.0]]), torch.full((3, 1), width)
        weights = _log_weights("mss", 3, 3, 9)
        inputs = [t.to(backend.device).requires_grad_() for t in (z, mu, logvar)]
        out = vf.ops.tc_logsumexp(*inputs, kind="mss", dataset_size=9)
        truths = reference.forward(z.double(), mu.double(), logvar.double(), *weights)
        yardsticks = reference.forward(z, mu, logvar, *weights)
        for got, yardstick, truth in zip(out, yardsticks, truths, strict=True):
            unit = torch.where(truth.isfinite(), truth.abs() + abs(width) + 10, math.inf)
            assert_close(got.detach().cpu(), yardstick, truth, terms=4, unit=unit)
        for n in range(3):  # each row's own, so that one that overflows hides no other
            grads = torch.autograd.grad(out[0][n] + out[1][n].sum(), inputs, retain_graph=True)
            assert not any(bool(grad.isnan().any()) for grad in grads), (width, n)


def test_a_density_of_zero(backend):
    """A code that no posterior reaches: -inf, and no gradient; its neighbour is as it was."""
    z, mu, logvar = torch.tensor([[1e25, 0.0], [0.5, 0.0]]), torch.zeros(2, 2), torch.zeros(2, 2)
    inputs = [t.to(backend.device).requires_grad_() for t in (z, mu, logvar)]
    joint, marginals = vf.ops.tc_logsumexp(*inputs, dataset_size=10)
    assert joint.isneginf().tolist() == [True, False]
    assert marginals.isneginf().tolist() == [[True, False], [False, False]]
    grads = torch.autograd.grad(joint.sum() + marginals.sum(), inputs)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    truth = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert_close(grads[0].cpu(), truth.float(), truth, terms=4, unit=truth.abs())


@pytest.mark.parametrize("what", range(3), ids=["z", "mu", "logvar"])
def test_nan_spoils_what_it_enters_and_nothing_else(backend, what):
    tensors = problem(6, 7, 3)
    tensors[what][1, 2] = math.nan
    spoilt = torch.zeros(6, 3, dtype=torch.bool)
    spoilt[1 if what == 0 else slice(None), 2] = True
    joint, marginals = vf.ops.tc_logsumexp(*(t.to(backend.device) for t in tensors), dataset_size=N)
    assert torch.equal(marginals.isnan().cpu(), spoilt)
    assert torch.equal(joint.isnan().cpu(), spoilt[:, 2])


def test_all_nan(backend):
    tensors = [torch.full((3, 2), math.nan, device=backend.device) for _ in range(3)]
    assert all(bool(out.isnan().all()) for out in vf.ops.tc_logsumexp(*tensors, dataset_size=N))


def test_no_codes_and_one_of_each(backend):
    tensors = [t.to(backend.device).requires_grad_() for t in problem(0, 4, 3)]
    joint, marginals = vf.ops.tc_logsumexp(*tensors, kind="mss", dataset_size=N)
    assert joint.shape == (0,) and marginals.shape == (0, 3)
    grads = torch.autograd.grad(joint.sum() + marginals.sum(), tensors)
    assert [grad.shape for grad in grads] == [(0, 3), (4, 3), (4, 3)]
    assert all(float(grad.abs().sum()) == 0 for grad in grads)
    check(problem(1, 1, 1), backend, "mss", dataset=1)


# --- other ways to call it -------------------------------------------------------------------------------------------


@one_of_each
def test_memory_layout_changes_nothing(backend):
    tensors = [t.to(backend.device) for t in problem()]
    op = lambda *t: vf.ops.tc_logsumexp(*t, kind="mss", dataset_size=N)  # noqa: E731
    expected, of_expected = op(*tensors), gradients(op, tensors, backend.device)
    for n in range(3):
        for laid_out in (tensors[n].T.contiguous().T, tensors[n].repeat_interleave(2, 1)[:, ::2]):
            given = [laid_out if k == n else t for k, t in enumerate(tensors)]
            if backend.name == "reference":  # torch adds in the order of memory
                check([t.cpu() for t in given], backend, "mss")
                continue
            assert all(torch.equal(a, b) for a, b in zip(op(*given), expected, strict=True))
            for a, b in zip(gradients(op, given, backend.device), of_expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_threads_change_nothing(backend):
    tensors, found = problem(70, 1300, 3), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert _native.threads(70 * 1300 * 3) == threads
        op = lambda *t: vf.ops.tc_logsumexp(*t, kind="mss", dataset_size=2000)  # noqa: E731
        found.append([*op(*tensors), *gradients(op, tensors)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    check(tensors, backend, "mss", 2000)
    check_gradients(tensors, backend, "mss", 2000)


@one_of_each
def test_opcheck(backend):
    tensors = [t.to(backend.device) for t in problem()]
    torch.library.opcheck(OP, ([*tensors], -7.0, -6.0)[0] + [-7.0, -6.0])
    torch.library.opcheck(OP, [t.detach().requires_grad_() for t in tensors] + [-7.0, -6.0])
    results = [*OP(*tensors, -7.0, -6.0), *(w.to(backend.device) for w in upstream(tensors))]
    torch.library.opcheck(OP_BACKWARD, (*tensors, *results, -7.0, -6.0))


@one_of_each
def test_compiled(backend):
    tensors = [t.to(backend.device) for t in problem()]
    op = lambda *t: vf.ops.tc_logsumexp(*t, dataset_size=N)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*tensors), op(*tensors), strict=True))
    for a, b in zip(gradients(compiled, tensors, backend.device), gradients(op, tensors, backend.device), strict=True):
        assert torch.equal(a, b)


@one_of_each
def test_vmap(backend):
    z, mu, logvar = (t.to(backend.device) for t in problem())
    several = torch.stack([z, z + 1, -z], 2)
    op = lambda x: vf.ops.tc_logsumexp(x, mu, logvar, dataset_size=N)  # noqa: E731
    joint, marginals = torch.vmap(op, in_dims=2)(several)
    for v in range(3):
        expected = op(several[:, :, v])
        assert torch.equal(joint[v], expected[0]) and torch.equal(marginals[v], expected[1])
    grads = torch.vmap(torch.func.grad(lambda x: op(x)[0].sum()), in_dims=2)(several)
    x = several[:, :, 1].clone().requires_grad_()
    assert torch.equal(grads[1], torch.autograd.grad(op(x)[0].sum(), x)[0])


def test_a_second_derivative_names_the_way_out():
    z, mu, logvar = (t.requires_grad_() for t in problem())
    (grad,) = torch.autograd.grad(vf.ops.tc_logsumexp(z, mu, logvar, dataset_size=N)[0].sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*reference.tc_logsumexp.forward"):
        grad.sum().backward()


BAD = {
    "z: expected a tensor of two dimensions": lambda z, m, v: ((z[0], m, v), {}),
    "mu: expected a tensor of two dimensions, got list": lambda z, m, v: ((z, [1], v), {}),
    "z: expected at least one latent": lambda z, m, v: ((z[:, :0], m[:, :0], v[:, :0]), {}),
    "mu: expected at least one posterior": lambda z, m, v: ((z, m[:0], v[:0]), {}),
    "mu: expected 3 latents, as z has, got 2": lambda z, m, v: ((z, m[:, :2], v), {}),
    r"logvar: expected shape \(7, 3\), as mu has, got \(6, 3\)": lambda z, m, v: ((z, m, v[:6]), {}),
    "expected one dtype, float32 or float64, got z torch.float64": lambda z, m, v: ((z.double(), m, v), {}),
    "got z torch.bfloat16": lambda z, m, v: (([t.bfloat16() for t in (z, m, v)]), {}),
    "expected one device, got z on cpu": lambda z, m, v: ((z, m.to("meta"), v), {}),
    "kind: 'is' is unknown; known: mws, mss": lambda z, m, v: ((z, m, v), {"kind": "is"}),
    "dataset_size: expected a whole number >= 1, got 0": lambda z, m, v: ((z, m, v), {"dataset_size": 0}),
    "dataset_size: expected a whole number >= 1, got 9.0": lambda z, m, v: ((z, m, v), {"dataset_size": 9.0}),
    "dataset_size: expected a whole number >= 1, got True": lambda z, m, v: ((z, m, v), {"dataset_size": True}),
    "dataset_size: expected at least the 7 samples": lambda z, m, v: ((z, m, v), {"kind": "mss", "dataset_size": 6}),
    'mu: "mss" expected the posteriors of all 5 codes, got 4': lambda z, m, v: ((z, m[:4], v[:4]), {"kind": "mss"}),
    'mu: "mss" expected at least two posteriors': lambda z, m, v: ((z[:1], m[:1], v[:1]), {"kind": "mss"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(message):
    tensors, options = BAD[message](*problem())
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.tc_logsumexp(*tensors, **{"dataset_size": N, **options})
    assert "\n" not in str(caught.value)
