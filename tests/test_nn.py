"""Sparse autoencoders: gradients of dense autograd, one compilation for all k, Adam, dead latents, refusals."""

import copy
import math
import pickle

import pytest
import torch
from close import assert_close, assert_gradient_close

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError
from vaecirc_fast.nn import L1SAE, BatchTopKSAE, JumpReLUSAE, SparseAdam, TopKSAE

D, M, K, B = 12, 40, 7, 30


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(n=B, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def some(kind, **options):
    """A module whose parameters are all away from where they start."""
    made = {
        "topk": lambda: TopKSAE(D, M, K, generator=generator(), **options),
        "aux": lambda: TopKSAE(D, M, K, k_aux=5, dead_after=100, generator=generator(), **options),
        "batch": lambda: BatchTopKSAE(D, M, K, generator=generator(), **options),
        "jump": lambda: JumpReLUSAE(D, M, threshold=0.5, bandwidth=0.3, generator=generator(), **options),
        "l1": lambda: L1SAE(D, M, l1_coefficient=0.1, generator=generator(), **options),
    }[kind]()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator(n)))
        made.since_fired[::3] = 1000
    return made


def top(a, k):
    """The k largest of each row, and zeros elsewhere."""
    values, indices = torch.topk(a, k)
    return torch.zeros_like(a).scatter(-1, indices, values)


class Step(torch.autograd.Function):
    """The number of a above t, as the authors of JumpReLU define its gradient."""

    @staticmethod
    def forward(ctx, a, t, width):
        ctx.save_for_backward(a, t)
        ctx.width = width
        return (a > t).to(a)

    @staticmethod
    def backward(ctx, grad):
        a, t = ctx.saved_tensors
        near = ((a - t) / ctx.width).abs() < 0.5
        return None, -(near * grad).sum(0) / ctx.width, None


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, t, width):
        ctx.save_for_backward(a, t)
        ctx.width = width
        return a * (a > t)

    @staticmethod
    def backward(ctx, grad):
        a, t = ctx.saved_tensors
        near = ((a - t) / ctx.width).abs() < 0.5
        return (a > t) * grad, -(t * near * grad).sum(0) / ctx.width, None


def dense(sae, x):
    """Reconstruction, loss and activations in plain torch, every matrix made."""
    pre = (x - sae.b_dec) @ sae.w_enc.T + sae.b_enc
    w_dec, extra = sae.w_dec, 0
    if isinstance(sae, TopKSAE):
        acts = top(pre.relu(), sae.k)
    elif isinstance(sae, BatchTopKSAE):
        acts = top(pre.relu().view(1, -1), sae.k * len(x)).view_as(pre)
    elif isinstance(sae, JumpReLUSAE):
        t = sae.log_threshold.exp()
        acts = Jump.apply(pre, t, sae.bandwidth)
        extra = sae.l0_coefficient * Step.apply(pre, t, sae.bandwidth).sum(1).mean()
    else:
        acts = pre.relu()
        w_dec = w_dec / w_dec.norm(dim=1, keepdim=True)
        extra = sae.l1_coefficient * acts.sum(1).mean()
    y = acts @ w_dec + sae.b_dec
    loss = (y - x).square().sum(1).mean() + extra
    if getattr(sae, "k_aux", 0):
        dead = sae.since_fired >= sae.dead_after
        revived = top(pre.relu() * dead, sae.k_aux) @ sae.w_dec
        loss = loss + sae.aux_coefficient * ((x - y).detach() - revived).square().sum(1).mean()
    return y, loss, acts


def gradients(sae):
    return {name: p.grad for name, p in sae.named_parameters()}


@pytest.mark.parametrize("kind", ["topk", "aux", "batch", "jump", "l1"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradients_are_those_of_dense_autograd(kind, backend):
    sae, x = some(kind), rows()
    plain, double = copy.deepcopy(sae), copy.deepcopy(sae).double()
    y, loss, acts = dense(plain, x)
    loss.backward()
    true_y, true_loss, _ = dense(double, x.double())
    true_loss.backward()
    with vf.backend(backend):
        out = sae(x)
        out.loss.backward()
    # Numbers of order one are added up; what cancels is the reconstruction against its target.
    size = float((x.abs().max() + acts.sum(1).max() * sae.w_dec.abs().max()).detach())
    assert_close(out.reconstruction.detach(), y.detach(), true_y.detach(), terms=M + D, unit=torch.tensor(size))
    assert torch.equal(out.acts != 0, acts != 0) and torch.equal(out.fired, (acts > 0).sum(0).int())
    for name, p in sae.named_parameters():
        ours, reference, truth = p.grad, dict(plain.named_parameters())[name].grad, gradients(double)[name]
        unit = torch.full_like(truth, float(truth.abs().max()) + size)
        assert_gradient_close(ours, reference, truth, terms=B * K, unit=unit)


@pytest.mark.parametrize("kind", ["topk", "batch", "jump", "l1"])
def test_outputs_agree_with_themselves(kind):
    sae, x = some(kind), rows().view(2, 3, 5, D)
    for mode in (True, False):
        out = sae.train(mode)(x)
        assert out.reconstruction.shape == x.shape and out.acts.shape == (2, 3, 5, M)
        values, indices, offsets = out.csr()
        assert len(offsets) == B + 1 and offsets[-1] == len(values)
        again = torch.zeros(B, M)
        for b in range(B):
            here = slice(offsets[b], offsets[b + 1])
            again[b, indices[here].long()] = values[here]
        assert torch.equal(again, out.acts.view(B, M))
        assert torch.equal(out.fired, (again > 0).sum(0).int())
        decoded = sae.decode(out.acts)
        torch.testing.assert_close(decoded, out.reconstruction)
        alone = sae(x.view(B, D))
        assert torch.equal(alone.reconstruction.view_as(x), out.reconstruction)
    if kind == "topk":
        assert out.values.shape == out.indices.shape == (2, 3, 5, K) and out.indices.dtype == torch.int32
        assert torch.equal(sae.encode(x)[0], out.values)
    one = sae(rows()[0])
    assert one.reconstruction.shape == (D,) and one.acts.shape == (M,)


@pytest.mark.parametrize("kind", ["topk", "aux", "batch", "jump", "l1"])
def test_no_rows(kind):
    sae = some(kind)
    out = sae(torch.zeros(0, D))
    out.loss.backward()
    assert out.loss == 0 and out.reconstruction.shape == (0, D)


# --- k ---------------------------------------------------------------------------------------------------------------


def test_k_may_be_set_at_any_step():
    sae, x = TopKSAE(D, M, M), rows()
    for k in (M, 20, 3, 1, 12):
        sae.k = k
        out = sae(x)
        assert sae.k == k and out.values.shape == (B, k)
        assert torch.equal(out.acts, dense(sae, x)[2])


def test_twenty_values_of_k_and_one_compilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    sae, x, counter = some("aux", dtype=torch.float32), rows(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sae, backend=counter, fullgraph=True)
    for k in torch.randperm(K, generator=generator()).repeat(3)[:20].tolist():
        sae.k = k + 1
        eager = copy.deepcopy(sae)
        sae.zero_grad(), eager.zero_grad()
        out, expected = compiled(x), eager(x)
        assert out.values.shape == (B, K) and not out.values[:, k + 1 :].any() and not out.indices[:, k + 1 :].any()
        assert torch.equal(out.acts, expected.acts)
        out.loss.backward(), expected.loss.backward()
        for name, grad in gradients(eager).items():
            torch.testing.assert_close(gradients(sae)[name], grad)
        sae.since_fired.copy_(eager.since_fired)
    assert counter.frame_count == 1


def test_k_is_part_of_the_state():
    sae, other = TopKSAE(D, M, K), TopKSAE(D, M, 2, k_max=K)
    sae.k = 5
    pickle.loads(pickle.dumps(other)).load_state_dict(sae.state_dict())
    other.load_state_dict(sae.state_dict())
    assert other.k == 5 and torch.equal(other(rows()).values, sae(rows()).values)


# --- dead latents ----------------------------------------------------------------------------------------------------


def test_rows_since_a_latent_fired_are_counted():
    sae = TopKSAE(D, M, 1, dead_after=50)
    for n in range(1, 3):
        fired = sae(rows(seed=n)).fired > 0
        assert (sae.since_fired[fired] == 0).all() and (sae.since_fired[~fired] > 0).all()
    assert int(sae.since_fired.max()) == 2 * B and torch.equal(sae.dead, sae.since_fired >= 50)
    before = sae.since_fired.clone()
    sae.eval()(rows(seed=9))
    assert torch.equal(sae.since_fired, before)


def test_without_dead_latents_there_is_no_auxiliary_loss():
    sae = TopKSAE(D, M, K, k_aux=5)
    out = sae(rows())
    assert out.losses["aux"] == 0 and torch.equal(out.loss, out.losses["mse"])
    sae.since_fired += sae.dead_after
    assert sae(rows()).losses["aux"] > 0
    assert "aux" not in sae.eval()(rows()).losses


def test_the_auxiliary_loss_revives():
    """Latents that never fire move only by it."""
    torch.manual_seed(0)
    x = rows(200)
    for k_aux, moved in ((0, False), (10, True)):
        sae = TopKSAE(D, M, 1, k_aux=k_aux, dead_after=1, generator=generator())
        with torch.no_grad():
            sae.b_enc[:10] -= 2  # positive now and then, but never the first
        sae.since_fired += 10
        sae(x).loss.backward()
        assert bool(sae.w_enc.grad[:10].any()) is moved


# --- BatchTopK -------------------------------------------------------------------------------------------------------


def test_a_batch_has_k_on_average_and_a_threshold_for_later():
    sae, x = BatchTopKSAE(D, M, K, momentum=0.5), rows(200)
    assert sae.eval()(x).csr().values.numel() > 200 * K  # no threshold yet
    sae.train()
    out = sae(x)
    assert out.csr().values.numel() == 200 * K and out.csr().offsets.diff().unique().numel() > 1
    assert sae.threshold == out.csr().values.min()
    first = float(sae.threshold)
    smallest = float(sae(2 * x).csr().values.detach().min())
    assert float(sae.threshold) == pytest.approx((first + smallest) / 2)
    sae.threshold.fill_(first)
    evaluated = sae.eval()(x)
    assert torch.equal(evaluated.acts != 0, torch.where(out.acts > first, out.acts, 0) != 0)
    single = torch.cat([sae(row[None]).acts for row in x])
    on_the_edge = (evaluated.acts == 0) & ((out.acts - first).abs() < 1e-5)  # where a product's rounding decides
    torch.testing.assert_close(single.masked_fill(on_the_edge, 0), evaluated.acts)


# --- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "aux"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}])
def test_the_optimizer_is_adam(kind, options):
    sae = some(kind)
    plain, double = copy.deepcopy(sae), copy.deepcopy(sae).double()
    moved = copy.deepcopy(sae)
    other = {"decoupled_weight_decay" if k == "decoupled" else k: v for k, v in options.items()}
    optimizers = [SparseAdam(sae, 1e-2, **options)]
    optimizers += [torch.optim.Adam(m.parameters(), 1e-2, **other) for m in (plain, double)]
    for step in range(4):
        for module, optimizer in zip((sae, plain, double), optimizers, strict=True):
            x = rows(seed=step).to(module.b_dec.dtype)
            optimizer.zero_grad()
            (module(x).loss if module is sae else dense(module, x)[1]).backward()
            optimizer.step()
            if module is not sae:
                module.since_fired.copy_(sae.since_fired)
    assert sae.w_enc.grad is sae.b_enc.grad is sae.w_dec.grad is None
    for name, p in sae.named_parameters():
        start, truth = dict(moved.named_parameters())[name], dict(double.named_parameters())[name]
        # A step divides by the root of a running mean of squares: where gradients vanish it magnifies their rounding.
        unit = truth.detach().abs() + (truth - start).detach().abs().max()
        assert_close(p.detach(), dict(plain.named_parameters())[name].detach(), truth.detach(), terms=B * K, unit=unit)


def test_the_state_goes_on_in_torch_and_back():
    sae = some("topk")
    ours = SparseAdam(sae, 1e-2)
    ours.zero_grad()
    sae(rows()).loss.backward()
    ours.step()
    twin = copy.deepcopy(sae)
    twin._optimizer = None
    theirs = torch.optim.Adam(twin.parameters(), 1e-2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for module, optimizer in ((sae, ours), (twin, theirs)):
        optimizer.zero_grad()
        module(rows(seed=5)).loss.backward()
        optimizer.step()
    for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_backward_passes_add_up_until_the_step():
    sae, x = some("topk"), rows()
    twin = copy.deepcopy(sae)
    ours, theirs = SparseAdam(sae, 1e-2), torch.optim.Adam(twin.parameters(), 1e-2)
    for module, optimizer in ((sae, ours), (twin, theirs)):
        optimizer.zero_grad()
        module(x[:10]).loss.backward()
        module(2 * x[10:]).loss.backward()
        optimizer.step()
    for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    sae(x).loss.backward()
    ours.zero_grad()
    before = copy.deepcopy(sae.state_dict())
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sae.state_dict().values(), strict=True))


def test_the_optimizer_refuses_gradients_from_elsewhere():
    sae = some("topk")
    optimizer = SparseAdam(sae)
    (sae(rows()).loss + sae.w_dec.square().sum()).backward()
    with pytest.raises(InputError, match="w_dec: has a gradient beside that of its codes"):
        optimizer.step()


def test_gradients_reach_the_input():
    sae, x = some("aux"), rows().requires_grad_()
    (expected,) = torch.autograd.grad(dense(sae, x)[0].square().sum(), x)
    (found,) = torch.autograd.grad(sae(x).reconstruction.square().sum(), x)
    torch.testing.assert_close(found, expected)
    SparseAdam(sae)
    (deferred,) = torch.autograd.grad(sae(x).reconstruction.square().sum(), x)
    torch.testing.assert_close(deferred, expected)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batch", "jump", "l1"])
def test_training_finds_planted_directions(kind):
    """Rows that are sums of two of sixteen directions: after training the codes explain them."""
    directions = torch.nn.functional.normalize(torch.randn(16, D, generator=generator()), dim=1)
    g = generator(2)

    def batch():
        chosen = torch.zeros(256, 16).scatter(1, torch.rand(256, 16, generator=g).topk(2).indices, 1)
        return (chosen * (1 + torch.rand(256, 16, generator=g))) @ directions

    sae = {
        "topk": lambda: TopKSAE(D, 32, 2, generator=g),
        "batch": lambda: BatchTopKSAE(D, 32, 2, generator=g),
        "jump": lambda: JumpReLUSAE(D, 32, threshold=0.1, bandwidth=0.2, l0_coefficient=0.02, generator=g),
        "l1": lambda: L1SAE(D, 32, l1_coefficient=0.4, generator=g),
    }[kind]()
    sae.centre(batch())
    optimizer = SparseAdam(sae, 1e-2) if kind == "topk" else torch.optim.Adam(sae.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        sae(batch()).loss.backward()
        optimizer.step()
    x = batch()
    out = sae.eval()(x)
    unexplained = float((out.reconstruction - x).square().sum() / (x - x.mean(0)).square().sum())
    assert unexplained < 0.2 and float((out.acts != 0).sum(1).float().mean()) < 8


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSAE(0, M, K), "d_in: expected an integer of at least 1, got 0"),
        (lambda: TopKSAE(D, M, 0), "k: expected an integer of at least 1, got 0"),
        (lambda: TopKSAE(D, M, 2.0), "k: expected an integer of at least 1, got 2.0"),
        (lambda: TopKSAE(D, M, True), "k: expected an integer of at least 1, got True"),
        (lambda: TopKSAE(D, M, M + 1), "k: expected at most the 40 latents, got 41"),
        (lambda: TopKSAE(D, M, K, k_max=3), "k: expected at most k_max = 3, got 7"),
        (lambda: TopKSAE(D, M, K, k_aux=M + 1), "k_aux: expected an integer from 0 to the 40 latents, got 41"),
        (lambda: BatchTopKSAE(D, M, M + 1), "k: expected at most the 40 latents, got 41"),
        (lambda: BatchTopKSAE(D, M, K, momentum=1), r"momentum: expected a number in \[0, 1\), got 1"),
        (lambda: JumpReLUSAE(D, M, threshold=0), "threshold: expected a positive number, got 0"),
        (lambda: TopKSAE(D, M, K)(torch.zeros(3, D + 1)), r"x: expected \(..., 12\), got \(3, 13\)"),
        (lambda: L1SAE(D, M)(None), r"x: expected \(..., 12\), got NoneType"),
        (lambda: SparseAdam(L1SAE(D, M)), "sae: expected a TopKSAE, got L1SAE"),
    ],
)
def test_wrong_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_nan_goes_to_its_row_alone():
    sae, x = some("topk"), rows()
    expected = sae(x).reconstruction
    x[3, 2] = math.nan
    found = sae(x).reconstruction
    assert found[3].isnan().all()
    assert torch.equal(torch.cat([found[:3], found[4:]]), torch.cat([expected[:3], expected[4:]]))
