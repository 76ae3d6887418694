"""Op `threshold_encode`: every backend against the float64 reference, gradients, transforms, hostile input."""

import pytest
import torch
from backends import CPP, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError
from vaecirc_fast.ops.threshold_encode import TILE_BYTES, Thresholded
from vaecirc_fast.reference import threshold_encode as reference

KINDS = reference.KINDS
BANDWIDTH = 0.5
NAMES = ("acts", "penalty", "l0", "fired")


def problem(B=7, D=5, M=37, seed=0, device="cpu", threshold=0.25):
    """Inputs whose products are exact in float32: whether one is above its threshold is then no matter of rounding."""
    g = torch.Generator().manual_seed(seed)

    def eighths(*shape):
        return (torch.randint(-8, 9, shape, generator=g) / 8).to(device)

    thresholds = torch.randint(0, 9, (M,), generator=g).to(device) * (threshold / 4)
    return eighths(B, D), eighths(M, D), eighths(M), thresholds


def gradients(tensors, kind, weights, *, counts=True):
    """The results, and the gradients of a weighted sum of activations, penalties and numbers."""
    tensors = [t.detach().clone().requires_grad_() if t is not None else None for t in tensors]
    out = vf.ops.threshold_encode(*tensors, kind, bandwidth=BANDWIDTH, counts=True)
    of_acts, of_penalty, of_l0 = (w.to(out.acts) for w in weights)
    ((out.acts * of_acts).sum() + (out.penalty * of_penalty).sum() + (out.l0 * of_l0).sum()).backward()
    return out, [t.grad for t in tensors if t is not None]


def weights_of(B, M, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, M, generator=g), torch.randn(B, generator=g), torch.randn(B, generator=g)


def check(tensors, kind, backend_name=None):
    """Values and gradients of the forced backend by the rule of close.py."""
    B, D = tensors[0].shape
    M = tensors[1].shape[0]
    weights = weights_of(B, M)
    out, grads = gradients(tensors, kind, weights)
    with vf.backend("reference"):
        plain, plain_grads = gradients(tensors, kind, weights)
        truth, true_grads = gradients([t.double() if t is not None else None for t in tensors], kind, weights)
    x, w, b, threshold = (t.double() if t is not None else torch.zeros(()).to(tensors[0]) for t in tensors)
    unit = x.abs() @ w.abs().T + b.abs() + threshold.abs()
    # The penalty adds up differences of this size; gradients are sums over rows or latents of such products.
    largest = torch.cat([torch.ones(1), *(v.abs().double().flatten() for v in weights)]).max()
    per_pre = largest * (2 + threshold.abs().max() * 2 / BANDWIDTH + 2 / BANDWIDTH)
    assert_close(out.acts.detach(), plain.acts.detach(), truth.acts.detach(), terms=D + 2, unit=unit)
    assert_close(out.penalty.detach(), plain.penalty.detach(), truth.penalty.detach(), terms=M + D, unit=unit.sum(1))
    assert torch.equal(out.l0, plain.l0) and torch.equal(out.fired, plain.fired)
    assert out.fired.dtype == torch.int32
    units = [
        per_pre * w.abs().sum(0).expand(B, D),
        (per_pre * x.abs().sum(0)).expand(M, D),
        per_pre * B * torch.ones(M, dtype=torch.float64),
        per_pre * B * torch.ones(M, dtype=torch.float64),
    ]
    if tensors[2] is None:
        del units[2]
    for got, ref, true, u in zip(grads, plain_grads, true_grads, units, strict=True):
        assert_gradient_close(got, ref, true, terms=B + M, unit=u.to(got.device).clamp(min=1e-30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 15, 16, 37, 600])
def test_values(backend, kind, M):
    check(problem(M=M, device=backend.device), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_without_bias(backend, kind):
    x, w, _, threshold = problem(device=backend.device)
    check((x, w, None, threshold), kind)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 70), st.sampled_from(KINDS), st.integers(0, 99))
def test_any_problem(backend, B, D, M, kind, seed):
    check(problem(B, D, M, seed, device=backend.device), kind)


def test_the_formulas():
    x, w = torch.tensor([[-2.0], [0.0], [0.5], [1.0], [2.0]]), torch.ones(1, 1)
    found = {kind: vf.ops.threshold_encode(x, w, None, 0.5, kind).flatten().tolist() for kind in KINDS}
    assert found == {"relu": [0, 0, 0, 1, 2], "soft": [-1.5, 0, 0, 0.5, 1.5], "jump": [0, 0, 0, 1, 2]}
    assert vf.ops.threshold_encode(x, w).flatten().tolist() == [0, 0, 0.5, 1, 2]
    out = vf.ops.threshold_encode(x, w, None, 0.5, "soft", counts=True)
    assert isinstance(out, Thresholded)
    assert out.penalty.tolist() == [1.5, 0, 0, 0.5, 1.5] and out.l0.tolist() == [1, 0, 0, 1, 1] and out.fired == 2


def test_the_straight_through_gradient_of_the_threshold():
    """-(threshold / bandwidth) and -1 / bandwidth for each pre-activation nearer than half the bandwidth, else 0."""
    x, w = torch.tensor([[0.7], [0.8], [1.2], [1.3], [5.0]]), torch.ones(1, 1)
    threshold = torch.tensor([1.0], requires_grad=True)
    out = vf.ops.threshold_encode(x, w, None, threshold, "jump", bandwidth=0.5, counts=True)
    (of_acts,) = torch.autograd.grad(out.acts.sum(), threshold, retain_graph=True)
    (of_l0,) = torch.autograd.grad(out.l0.sum(), threshold)
    assert of_acts.tolist() == [-4.0] and of_l0.tolist() == [-4.0]


@pytest.mark.parametrize("kind", ["relu", "soft"])
def test_gradcheck(kind):
    """Where the function has a derivative, it is that; the threshold of relu is a constant."""
    tensors = [t.double().requires_grad_() for t in problem(B=3, M=6)]
    tensors[3] = (tensors[3].detach() + 0.03).requires_grad_(kind == "soft")

    def f(*given):
        out = vf.ops.threshold_encode(*given, kind, counts=True)
        return out.acts, out.penalty

    assert torch.autograd.gradcheck(f, tensors)


def test_nan_and_infinity(backend):
    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [-0.0]], device=backend.device)
    for kind in KINDS:
        out = vf.ops.threshold_encode(x, torch.ones(1, 1, device=backend.device), kind=kind, counts=True)
        a = out.acts.flatten().tolist()
        assert a[0] != a[0] and a[1:] == [float("inf"), -float("inf") if kind == "soft" else 0, 0]
        assert out.l0.tolist() == [1, 1, float(kind == "soft"), 0] and out.fired.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    tensors = [t.to(dtype) for t in problem()]
    out = vf.ops.threshold_encode(*tensors, "jump", counts=True)
    assert out.acts.dtype == dtype
    assert out.penalty.dtype == out.l0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = vf.ops.threshold_encode(*(t.double() for t in tensors), "jump")
    assert torch.equal(out.acts != 0, truth != 0)


def test_leading_dimensions_and_layouts(backend):
    x, w, b, threshold = problem(B=12, device=backend.device)
    expected = vf.ops.threshold_encode(x, w, b, threshold, "jump", counts=True)
    shaped = vf.ops.threshold_encode(x.view(2, 3, 2, 5), w.T.contiguous().T, b, threshold, "jump", counts=True)
    assert torch.equal(shaped.acts.flatten(0, 2), expected.acts) and shaped.penalty.shape == (2, 3, 2)
    strided = torch.stack([x, x], 1)[:, 1]
    doubled = torch.stack([b, threshold], 1)
    assert torch.equal(vf.ops.threshold_encode(strided, w, doubled[:, 0], doubled[:, 1], "jump"), expected.acts)
    one = vf.ops.threshold_encode(x[0], w, b, threshold, "jump", counts=True)
    assert torch.equal(one.acts, expected.acts[0]) and one.penalty.shape == ()
    none = vf.ops.threshold_encode(x[:0], w, b, threshold, "jump", counts=True)
    assert none.acts.shape == (0, 37) and not none.fired.any()


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_tile(backend, kind):
    M = 300
    rows = 2 * max(256, TILE_BYTES // (4 * M)) + 3 if not backend.interpreted else 70
    check(problem(B=rows, D=3, M=M, device=backend.device), kind)


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_change_nothing(backend):
    tensors, found = problem(B=900, D=8, M=1100), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with backend.forced():
            out, grads = gradients(tensors, "jump", weights_of(900, 1100))
        found.append([*out, *grads])
    del found[0][4:6], found[1][4:6]  # the gradients of x and w are products of torch's own
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_registered_op_is_the_op(backend):
    x, w, b, threshold = (t.requires_grad_() for t in problem(device=backend.device))
    for kind in range(3):
        torch.library.opcheck(torch.ops.vaecirc_fast.threshold_encode.default, (x, w, b, threshold, kind, 0.5))


def test_compiled_forward_and_backward(backend):
    tensors, weights = problem(device=backend.device), weights_of(7, 37)
    expected, expected_grads = gradients(tensors, "jump", weights)
    leaves = [t.clone().requires_grad_() for t in tensors]
    run = torch.compile(vf.ops.threshold_encode, fullgraph=True, backend="aot_eager")
    out = run(*leaves, "jump", bandwidth=BANDWIDTH, counts=True)
    of_acts, of_penalty, of_l0 = (w.to(backend.device) for w in weights)
    ((out.acts * of_acts).sum() + (out.penalty * of_penalty).sum() + (out.l0 * of_l0).sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected_grads, strict=True))


def test_vmap(backend):
    x, w, b, threshold = problem(B=12, device=backend.device)
    batched = x.view(3, 4, 5)

    def one(x):
        return vf.ops.threshold_encode(x, w, b, threshold, "soft", counts=True)

    out = torch.vmap(one)(batched)
    for name, each in zip(NAMES, out, strict=True):
        assert torch.equal(each, torch.stack([getattr(one(part), name) for part in batched])), name
    gradient = torch.func.grad(lambda w, x: vf.ops.threshold_encode(x, w, b, threshold, "soft").square().sum())
    per_batch = torch.vmap(gradient, (None, 0))(w, batched)
    for part, found in zip(batched, per_batch, strict=True):
        assert torch.equal(found, gradient(w, part)) and found.any()
    with pytest.raises(InputError, match="only x can be batched"):
        torch.vmap(lambda w: vf.ops.threshold_encode(x, w))(torch.stack([w, w]))


X, W, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, W, B), {"kind": "relu6"}, "kind: 'relu6' is unknown; known: relu, soft, jump"),
        ((X.numpy(), W, B), {}, "x: expected a tensor, got ndarray"),
        ((X, W.double(), B), {}, "w_enc: expected floats of x's dtype torch.float32, got torch.float64"),
        ((X.int(), W, B), {}, "x: expected floats"),
        ((X, W[:, :2], B), {}, r"x: expected \(..., 2\) for w_enc \(4, 2\), got \(2, 3\)"),
        ((X, W[0], B), {}, r"w_enc: expected \(M, D\) with M, D > 0, got \(3,\)"),
        ((X, W[:0], B[:0]), {}, "w_enc: expected"),
        ((X, W, B[:3]), {}, r"b_enc: expected \(4,\), got \(3,\)"),
        ((X, W, B, B[:2]), {}, r"threshold: expected a number or \(4,\), got \(2,\)"),
        ((X, W, B, B.double()), {}, "threshold: expected torch.float32 on cpu"),
        ((X, W, B, -0.5), {"kind": "soft"}, "threshold: expected none below 0 for 'soft', got -0.5"),
        ((X, W, B), {"bandwidth": 0}, "bandwidth: expected a positive number, got 0"),
        ((X, W.to("meta"), B), {}, "w_enc: expected the device of x, cpu, got meta"),
    ],
)
def test_wrong_input_is_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        vf.ops.threshold_encode(*arguments, **options)
